"""One training step of stage 2, ours and PyTorch's: seconds, samples/s, model TFLOP/s and peak memory.

    python benchmarks/train_step.py --size small                 # float32 on CPU, 96 M parameters that train
    python benchmarks/train_step.py --size sdxl --device cuda --dtype bfloat16 --batch 8 --crop 512 --compile \\
        --rematerialisation full

A step is everything from pictures and token ids to new parameters: VAE, text encoders, LQ encoder, aligner, UNet, L1
loss, gradients, clipping and AdamW on float32 masters; the aligner mixes the batch, as the published code does. Each
framework runs in processes of its own, in turns, on the same random parameters, pictures, noise and timesteps, so that
the loss of the first step must agree. PyTorch is diffusers' modules under autocast, and the tests' copy of the aligner.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from paired import (
    FACTOR,
    LATENT_CHANNELS,
    SIZES,
    TOKENS,
    VOCABULARY,
    TorchNetworks,
    measure,
    our_config,
    our_parameters,
)

RATES = {"lq_encoder": 5e-6, "rest": 1e-5}
CLIP = 1.0


def make_batch(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """What a step is given, what it would draw included; NHWC."""
    rng = np.random.default_rng(0)
    samples, crop = options.batch, options.crop
    latent = (samples, crop // FACTOR, crop // FACTOR, LATENT_CHANNELS)
    batch = {name: rng.uniform(-1, 1, (samples, crop, crop, 3)).astype(np.float32) for name in ("hq", "lq")}
    for i in range(2):
        batch[f"token_ids_{i}"] = rng.integers(0, VOCABULARY - 1, (samples, TOKENS)).astype(np.int32)
        batch[f"token_ids_{i}"][:, 20:] = VOCABULARY - 1
    batch["time_ids"] = np.tile(np.array([crop, crop, 0, 0, crop, crop], np.float32), (samples, 1))
    batch["row"] = np.arange(samples, dtype=np.int32)
    batch["timesteps"] = rng.integers(0, 1000, samples).astype(np.int32)
    batch["noise"] = rng.standard_normal(latent, np.float32)
    batch["vae_noise"] = rng.standard_normal(latent, np.float32)
    return batch


def ours(options: argparse.Namespace) -> dict:
    """Our process: `TrainStep` as the training loop runs it, on one device."""
    import jax
    import jax.numpy as jnp

    from faithdiff_jax.config import from_dict
    from faithdiff_jax.models.parts import part_names
    from faithdiff_jax.training.config import TrainConfig
    from faithdiff_jax.training.groups import assign_groups
    from faithdiff_jax.training.parameters import model_shapes
    from faithdiff_jax.training.preparation import step_flops
    from faithdiff_jax.training.step import TrainStep

    if options.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    model = our_config(options.size, "batch", options.batch)
    config = from_dict(TrainConfig, {
        "steps": 1000, "batch": options.batch, "dtype": options.dtype, "ema": None,
        "rematerialisation": options.rematerialisation, "data": {"crop": options.crop},
        "optimizer": {"warmup": 0, "clip": CLIP, "schedule": "constant"},
        "groups": {
            "lq_encoder": {"parameters": ["lq_encoder.*"], "learning_rate": RATES["lq_encoder"]},
            "rest": {"parameters": ["alignment.*", "unet.*"], "learning_rate": RATES["rest"]},
        },
        "frozen": ["vae.*", "text_encoder*"],
    }, "the benchmark")  # fmt: skip
    shapes = model_shapes(model)
    step = TrainStep(config, model, assign_groups(config, shapes), None)
    trained, frozen = {}, {}
    for part in part_names(model):
        for path, array in our_parameters(model, part):
            path = f"{part}.{path}"
            if path in step.labels:
                trained[path] = jnp.asarray(array)
            else:
                frozen[path] = jnp.asarray(array, step.dtype)
    report = {"parameters": sum(array.size for array in trained.values()), "flops": step_flops(step, shapes)}
    state = jax.jit(step.init, donate_argnums=0)(trained)
    batch = jax.device_put(make_batch(options))
    begin = time.perf_counter()
    program = step.run.lower(state, frozen, batch).compile()
    report["compile"] = time.perf_counter() - begin

    def one():
        nonlocal state
        state, metrics = program(state, frozen, batch)
        return jax.block_until_ready((state, metrics))[1]["loss"]

    report["seconds"], loss = measure(one, options.steps)
    report["loss"] = float(loss)
    if options.device == "cuda":
        report["peak memory"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return report


def reference(options: argparse.Namespace) -> dict:
    """PyTorch's process."""
    import diffusers
    import torch

    device = options.device
    compute = getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Convolutions on NVIDIA's tensor cores want channels last.
    channels_last = device == "cuda"
    networks = TorchNetworks(
        options.size, device, dtype=torch.float32, frozen_dtype=compute, channels_last=channels_last
    )
    unet, aligner, lq_encoder, vae = networks.unet, networks.aligner, networks.lq_encoder, networks.vae
    if options.rematerialisation != "none":
        unet.enable_gradient_checkpointing()
        unet.train()

    trained = [*unet.parameters(), *aligner.parameters(), *lq_encoder.parameters()]
    groups = [
        {"params": list(lq_encoder.parameters()), "lr": RATES["lq_encoder"]},
        {"params": [*unet.parameters(), *aligner.parameters()], "lr": RATES["rest"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, fused=True)
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    denoiser = torch.compile(unet) if options.compile else unet

    batch = {}
    for name, array in make_batch(options).items():
        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        last = channels_last and tensor.ndim == 4
        batch[name] = tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, compute, enabled=compute != torch.float32):
            with torch.no_grad():
                distribution = vae.encode(batch["hq"].to(compute)).latent_dist
                latents = distribution.mean.float() + distribution.std.float() * batch["vae_noise"]
                latents = latents * vae.config.scaling_factor
                hidden = [
                    encoder(batch[f"token_ids_{i}"].long(), output_hidden_states=True)
                    for i, encoder in enumerate(networks.text_encoders)
                ]
                context = torch.cat([output.hidden_states[-2] for output in hidden], dim=-1)
                added = {"text_embeds": hidden[1].text_embeds, "time_ids": batch["time_ids"]}
            noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"].long())
            networks.features = lq_encoder(batch["lq"])
            predicted = denoiser(noisy, batch["timesteps"], context, added_cond_kwargs=added).sample
        loss = (predicted.float() - batch["noise"]).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    report = {"parameters": sum(parameter.numel() for parameter in trained)}
    report["seconds"], loss = measure(step, options.steps)
    report["loss"] = float(loss)
    if device == "cuda":
        report["peak memory"] = torch.cuda.max_memory_allocated()
    return report


def child(options: argparse.Namespace) -> None:
    """Run one framework and print its report as JSON on the last line."""
    report = {"ours": ours, "reference": reference}[options.child](options)
    # The kernel counts resident memory in KiB.
    report.setdefault("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=256, help="side of the pictures, a multiple of 8")
    parser.add_argument("--steps", type=int, default=3, help="that are measured, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="times that the two frameworks take turns")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is computed")
    parser.add_argument("--compile", action="store_true", help="torch.compile for PyTorch's UNet")
    parser.add_argument(
        "--rematerialisation", choices=("none", "full", "dots"), default="none",
        help="PyTorch has none, or its checkpointing of the UNet's blocks for the others",
    )  # fmt: skip
    parser.add_argument("--child", choices=("ours", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return

    reports: dict[str, list[dict]] = {"ours": [], "reference": []}
    for _ in range(options.rounds):
        for name in reports:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if options.device == "cpu" else {})
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
            reports[name].append(json.loads(output.splitlines()[-1]))

    mine, theirs = (reports[name][0] for name in reports)
    if mine["parameters"] != theirs["parameters"]:
        raise SystemExit(f"{mine['parameters']:,} parameters train in ours, {theirs['parameters']:,} in PyTorch's")
    print(
        f"{mine['parameters']:,} parameters train, batch {options.batch} of {options.crop}x{options.crop}, "
        f"{options.dtype}, rematerialisation {options.rematerialisation}, {options.device}, {os.cpu_count()} cores"
    )
    print(f"loss of the first step: {mine['loss']:.6f} and {theirs['loss']:.6f}")
    print(f"model FLOPs of a step: {mine['flops'] / 1e12:.3f} TFLOP")
    print(f"{'':32}{'ours':>12}{'PyTorch':>12}{'ratio':>8}")
    seconds = [statistics.median(s for report in reports[who] for s in report["seconds"]) for who in reports]
    peaks = [max(report["peak memory"] for report in reports[who]) / 2**30 for who in reports]
    row("step, s", seconds)
    row("samples/s", [options.batch / second for second in seconds])
    row("model TFLOP/s", [mine["flops"] / 1e12 / second for second in seconds])
    row("peak memory, GiB", peaks)
    print(f"{'compile, s':32}{statistics.median(report['compile'] for report in reports['ours']):12.2f}")


def row(label: str, pair: list[float]) -> None:
    """A line of the table, with ours over PyTorch's at its end."""
    print(f"{label:32}{pair[0]:12.3f}{pair[1]:12.3f}{pair[0] / pair[1]:8.2f}")


if __name__ == "__main__":
    main()
