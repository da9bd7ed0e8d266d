"""The published model at full size, ours and PyTorch's: largest relative error, seconds, compile time, peak memory.

    python benchmarks/full_size.py                         # float32 on CPU, one evaluation of FaithDiff at 64x64
    python benchmarks/full_size.py --image 256 --steps 4   # and a whole restoration
    python benchmarks/full_size.py --device cuda --dtype bfloat16 --latent 128 --image 1024 --steps 20

Each framework runs in processes of its own, in turns, so that only one copy of the 2.61 billion parameters is in
memory. Parameters are random, the same in both: each is drawn from a generator seeded with its published name.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time

import numpy as np
from paired import SIZES, TorchNetworks, in_turns, measure, our_config, our_parameters, relative_error

GUIDANCE = 5.0


def inputs(latent: int, size: str) -> dict[str, np.ndarray]:
    """One sample's inputs at one of `paired.SIZES`, NHWC; `images` are eight times the latent."""
    (first, _), (second, _) = SIZES[size]["text"]
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    return {
        "latents": normal(1, latent, latent, 4),
        "images": rng.uniform(-1, 1, (1, 8 * latent, 8 * latent, 3)).astype(np.float32),
        "context": normal(1, 77, first + second),
        "negative": normal(1, 77, first + second),
        "pooled": normal(1, second),
        "time_ids": np.array([[8 * latent, 8 * latent, 0, 0, 1024, 1024]], np.float32),
        "timesteps": np.array([501]),
    }


def ours(options: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Our process: FaithDiffModel from published names through the project's rules."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from faithdiff_jax.inference.denoise import denoise
    from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_sampling
    from faithdiff_jax.inference.options import RestoreOptions
    from faithdiff_jax.models.faithdiff import FaithDiffModel
    from faithdiff_jax.models.layers import layers_apart
    from faithdiff_jax.models.parts import unflatten

    if options.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    config = our_config(options.size)
    dtype = jnp.dtype(options.dtype)
    build = lambda: FaithDiffModel(  # noqa: E731
        config.unet, config.alignment, config.lq_encoder_config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype
    )
    graph, _ = nnx.split(nnx.eval_shape(build))
    params = unflatten(
        {
            f"{place}.{path}": jnp.asarray(array, dtype)
            for place, part in (("denoiser.unet", "unet"), ("denoiser.alignment", "alignment"), ("lq_encoder",) * 2)
            for path, array in our_parameters(config, part)
        }
    )
    if options.layers == "apart":
        params = layers_apart(params)
    x = {name: jnp.asarray(array) for name, array in inputs(options.latent, options.size).items()}

    def predict(params, x):
        model = nnx.merge(graph, params)
        return model(x["latents"], x["timesteps"], x["images"], x["context"], x["pooled"], x["time_ids"])

    def evaluate(params, x, features):
        denoiser = nnx.merge(graph, params).denoiser
        return denoiser(x["latents"], x["timesteps"], features, x["context"], x["pooled"], x["time_ids"])

    report = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
    np.save(folder / "ours.npy", np.asarray(jax.jit(predict)(params, x), np.float32))

    features = jnp.asarray(
        np.random.default_rng(1).standard_normal((1, options.latent, options.latent, SIZES[options.size]["vae"][-1])),
        dtype,
    )
    begin = time.perf_counter()
    program = jax.jit(evaluate).lower(params, x, features).compile()
    report["compile, cold"] = time.perf_counter() - begin
    jax.clear_caches()
    begin = time.perf_counter()
    jax.jit(evaluate).lower(params, x, features).compile()
    report["compile, from the cache"] = time.perf_counter() - begin
    report["evaluation"], _ = measure(lambda: program(params, x, features).block_until_ready(), options.repeats)

    if options.image:
        size = options.image // 8
        x = {name: jnp.asarray(array) for name, array in inputs(size, options.size).items()}
        plan = plan_sampling(RestoreOptions(steps=options.steps, tile=size), config.schedule, size, size)

        @jax.jit
        def image(params, x):
            model = nnx.merge(graph, params)
            arrays = SamplingInputs(
                features=model.lq_encoder(x["images"]),
                text=Text(context=x["context"], pooled=x["pooled"]),
                negative=Text(context=x["negative"], pooled=x["pooled"]),
                noise=x["latents"],
                time_ids=x["time_ids"][None],  # of one tile
                guidance=jnp.float32(GUIDANCE),
            )
            return denoise(model.denoiser, plan, arrays)

        report["image"], latents = measure(lambda: image(params, x).block_until_ready(), max(1, options.repeats - 2))
        np.save(folder / "ours_image.npy", np.asarray(latents, np.float32))
    if options.device == "cuda":
        report["peak memory"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return report


def reference(options: argparse.Namespace, folder: pathlib.Path) -> dict:
    """PyTorch's process: diffusers' UNet and encoder, the tests' copy of the aligner."""
    import torch
    from diffusers import EulerDiscreteScheduler

    dtype = getattr(torch, options.dtype if options.device == "cpu" else options.torch_dtype)
    networks = TorchNetworks(options.size, options.device, dtype=dtype, parts=("unet", "lq_encoder"))
    unet, encoder = networks.unet, networks.lq_encoder

    def tensors(latent: int) -> dict:
        arrays = {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in inputs(latent, options.size).items()}
        keep = ("timesteps", "time_ids")
        return {
            k: torch.from_numpy(np.ascontiguousarray(v)).to(options.device, None if k in keep else dtype)
            for k, v in arrays.items()
        }

    denoiser = torch.compile(unet) if options.compile else unet

    def evaluate(latents, timesteps, context, pooled, time_ids):
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return denoiser(latents, timesteps, context, added_cond_kwargs=added).sample

    def done(result):
        if options.device == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        x = tensors(options.latent)
        networks.features = encoder(x["images"])
        arguments = (x["latents"], x["timesteps"], x["context"], x["pooled"], x["time_ids"])
        np.save(folder / "reference.npy", evaluate(*arguments).float().cpu().numpy().transpose(0, 2, 3, 1))
        report = {}
        report["evaluation"], _ = measure(lambda: done(evaluate(*arguments)), options.repeats)

        if options.image:
            x = tensors(options.image // 8)

            def image():
                networks.features = encoder(x["images"]).repeat(2, 1, 1, 1)
                scheduler = EulerDiscreteScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                    timestep_spacing="leading",
                )  # fmt: skip
                scheduler.set_timesteps(options.steps)
                latents = x["latents"].float() * scheduler.init_noise_sigma
                pair = [torch.cat([x[a], x[b]]) for a, b in (("negative", "context"), ("pooled", "pooled"))]
                for t in scheduler.timesteps:
                    scaled = scheduler.scale_model_input(latents, t).to(dtype).repeat(2, 1, 1, 1)
                    noise = evaluate(scaled, t.to(options.device), *pair, x["time_ids"].repeat(2, 1)).float()
                    plain, guided = noise.chunk(2)
                    latents = scheduler.step(plain + GUIDANCE * (guided - plain), t, latents).prev_sample
                return done(latents)

            report["image"], latents = measure(image, max(1, options.repeats - 2))
            np.save(folder / "reference_image.npy", latents.cpu().numpy().transpose(0, 2, 3, 1))
    if options.device == "cuda":
        report["peak memory"] = torch.cuda.max_memory_allocated()
    return report


def child(options: argparse.Namespace) -> None:
    """Run one framework and print its report as JSON on the last line."""
    report = {"ours": ours, "reference": reference}[options.child](options, pathlib.Path(options.folder))
    # The kernel counts resident memory in KiB.
    report.setdefault("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sdxl", help="of the networks; others than sdxl to try it out")
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--image", type=int, default=0, help="side in pixels of a whole restoration; 0 for none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="times that the two frameworks take turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", choices=("apart", "together"), help="of stacks, in arrays; apart on CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch-dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="on cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile for PyTorch")
    parser.add_argument("--child", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.layers = options.layers or ("apart" if options.device == "cpu" else "together")
    if options.child:
        child(options)
        return

    with tempfile.TemporaryDirectory() as folder:
        reports = in_turns(__file__, options.rounds, folder)
        errors = {}
        for what, suffix in (("one evaluation", ""), (f"{options.steps} steps", "_image")):
            files = [pathlib.Path(folder) / f"{who}{suffix}.npy" for who in reports]
            if files[0].exists():
                errors[what] = relative_error(*files)

    print(f"{reports['ours'][0]['parameters']:,} parameters, {options.dtype}, {options.device}, {os.cpu_count()} cores")
    for what, error in errors.items():
        print(f"largest relative error, {what}: {error:.1e}")
    print(f"{'':32}{'ours':>12}{'PyTorch':>12}{'ratio':>8}")
    for name in ("evaluation", "image"):
        if name in reports["ours"][0]:
            medians = [statistics.median(s for r in reports[who] for s in r[name]) for who in ("ours", "reference")]
            label = f"{name}, {options.latent if name == 'evaluation' else options.image // 8} latent, s"
            print(f"{label:32}{medians[0]:12.2f}{medians[1]:12.2f}{medians[0] / medians[1]:8.2f}")
    peaks = [max(r["peak memory"] for r in reports[who]) / 2**30 for who in ("ours", "reference")]
    print(f"{'peak memory, GiB':32}{peaks[0]:12.2f}{peaks[1]:12.2f}{peaks[0] / peaks[1]:8.2f}")
    for name in ("compile, cold", "compile, from the cache"):
        print(f"{name + ', s':32}{statistics.median(r[name] for r in reports['ours']):12.2f}")


if __name__ == "__main__":
    main()
