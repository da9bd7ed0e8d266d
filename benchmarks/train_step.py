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
import pathlib
import resource
import statistics
import subprocess
import sys
import time
import zlib

import numpy as np

LATENT_CHANNELS, FACTOR, TOKENS = 4, 8, 77
# Widths of the UNet's levels, of the VAE's, and of the two text encoders with their layers; all of SDXL's shape.
SIZES = {
    "tiny": {"unet": (32, 64), "vae": (8, 16, 32, 32), "text": ((16, 2), (16, 2)), "depth": (0, 1), "groups": 8},
    "small": {
        "unet": (64, 128, 256),
        "vae": (32, 64, 128, 128),
        "text": ((128, 4), (256, 4)),
        "depth": (0, 2, 10),
        "groups": 32,
    },
    "sdxl": {
        "unet": (320, 640, 1280),
        "vae": (128, 256, 512, 512),
        "text": ((768, 12), (1280, 32)),
        "depth": (0, 2, 10),
        "groups": 32,
    },
}
HEAD, TIME_IDS, VOCABULARY = 64, 256, 49408
RATES = {"lq_encoder": 5e-6, "rest": 1e-5}
CLIP = 1.0


def published_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random numbers that both frameworks use for one tensor: matrices keep activations near one."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 1:
        is_scale = name.endswith("weight")
        return (0.1 * rng.standard_normal(shape, np.float32) + np.float32(is_scale)).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)


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


def measure(step, repeats: int) -> tuple[list[float], float]:
    """Seconds of each step after the first, which compiles and warms up, and the loss of that."""
    first = float(step())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds, first


def ours(options: argparse.Namespace) -> dict:
    """Our process: `TrainStep` as the training loop runs it, on one device."""
    import jax
    import jax.numpy as jnp

    from faithdiff_jax.config import from_dict
    from faithdiff_jax.models.config import FaithDiffConfig
    from faithdiff_jax.models.parts import part_names, part_shapes
    from faithdiff_jax.training.config import TrainConfig
    from faithdiff_jax.training.groups import assign_groups
    from faithdiff_jax.training.loop import step_flops
    from faithdiff_jax.training.parameters import model_shapes
    from faithdiff_jax.training.step import TrainStep
    from faithdiff_jax.weights import rules
    from faithdiff_jax.weights.keymap import KeyMap

    if options.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    size = SIZES[options.size]
    (first, layers), (second, more_layers) = size["text"]
    encoder = {"vocab_size": VOCABULARY, "end_token": VOCABULARY - 1}
    widths, depth = size["unet"], size["depth"]
    unet = {
        "channels": widths, "transformer_depth": depth, "mid_transformer_depth": depth[-1],
        "heads": [max(1, width // HEAD) for width in widths], "context_dim": first + second, "pooled_dim": second,
        "time_id_dim": TIME_IDS, "norm_groups": size["groups"],
    }  # fmt: skip
    model = from_dict(FaithDiffConfig, {
        "unet": unet,
        "vae": {"channels": size["vae"], "norm_groups": size["groups"]},
        "alignment": {"mixing": "batch", "group": options.batch},
        "text_encoders": [
            encoder | {"width": first, "layers": layers, "heads": first // heads_of(first), "mlp_width": 4 * first},
            encoder | {"width": second, "layers": more_layers, "heads": second // heads_of(second),
                       "mlp_width": 4 * second, "activation": "gelu", "projection": second},
        ],
    }, "the benchmark")  # fmt: skip
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
        keymap = KeyMap(rules.of_part(part), part_shapes(model, part))
        published = keymap.published_shapes()
        prefix = "" if part in rules.FAITHDIFF_PARTS else part + "."
        read = keymap.read(lambda name, prefix=prefix, all=published: published_tensor(prefix + name, all[name]))
        for path, array in read:
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

    report["seconds"], report["loss"] = measure(one, options.steps)
    if options.device == "cuda":
        report["peak memory"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return report


def heads_of(width: int) -> int:
    """The width of one attention head of a text encoder."""
    return min(64, width // 2)


def reference(options: argparse.Namespace) -> dict:
    """PyTorch's process."""
    import diffusers
    import torch
    import transformers
    from diffusers.models.autoencoders.vae import Encoder

    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
    from torch_aligner import TorchAligner

    size, device = SIZES[options.size], options.device
    compute = getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def filled(module: torch.nn.Module, prefix: str, dtype: torch.dtype) -> torch.nn.Module:
        def tensor(name: str, value: torch.Tensor) -> torch.Tensor:
            array = torch.from_numpy(published_tensor(prefix + name, tuple(value.shape)))
            return array.to(device, dtype, memory_format=memory_format(array))

        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            values = tensor(name, parameter)
            setattr(module.get_submodule(owner), last, torch.nn.Parameter(values))
        return module.to(device)

    def memory_format(array: torch.Tensor) -> torch.memory_format:
        # Convolutions on NVIDIA's tensor cores want channels last.
        return torch.channels_last if array.ndim == 4 and device == "cuda" else torch.preserve_format

    def text_encoder(width: int, layers: int, projection: int | None) -> torch.nn.Module:
        config = transformers.CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // heads_of(width), hidden_act="gelu" if projection else "quick_gelu",
            projection_dim=projection or width, eos_token_id=2,
        )  # fmt: skip
        return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)

    widths, depth, vae_widths = size["unet"], size["depth"], size["vae"]
    (first, layers), (second, more_layers) = size["text"]
    attends = [bool(count) for count in depth]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths, cross_attention_dim=first + second, norm_num_groups=size["groups"],
        down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attends[::-1]],
        transformer_layers_per_block=[max(1, count) for count in depth], use_linear_projection=True,
        attention_head_dim=[max(1, width // HEAD) for width in widths], addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS, projection_class_embeddings_input_dim=second + 6 * TIME_IDS,
    )  # fmt: skip
    encoder = {
        "block_out_channels": vae_widths, "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
        "norm_num_groups": size["groups"],
    }  # fmt: skip
    vae = diffusers.AutoencoderKL(
        **encoder, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENT_CHANNELS, scaling_factor=0.13025
    )
    lq_encoder = Encoder(**encoder, out_channels=LATENT_CHANNELS)
    lq_encoder.conv_norm_out = lq_encoder.conv_act = lq_encoder.conv_out = torch.nn.Identity()
    aligner = TorchAligner(vae_widths[-1], widths[0])

    master = torch.float32
    unet, aligner = filled(unet, "", master), filled(aligner, "", master)
    lq_encoder = filled(lq_encoder, "denoise_encoder.", master)
    vae = filled(vae, "vae.", compute).requires_grad_(False)
    one, two = text_encoder(first, layers, None), text_encoder(second, more_layers, second)
    # transformers leaves the first component out of this class's names, and puts it back in files.
    has_prefix = next(iter(one.state_dict())).startswith("text_model.")
    one = filled(one, "text_encoder." + "text_model." * (not has_prefix), compute).requires_grad_(False)
    two = filled(two, "text_encoder_2.", compute).requires_grad_(False)
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
    condition: dict[str, torch.Tensor] = {}

    unet.conv_in.register_forward_hook(lambda module, args, hidden: aligner(hidden, condition["features"]))

    batch = {}
    for name, array in make_batch(options).items():
        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        batch[name] = tensor.contiguous(memory_format=memory_format(tensor))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, compute, enabled=compute != torch.float32):
            with torch.no_grad():
                distribution = vae.encode(batch["hq"].to(compute)).latent_dist
                latents = distribution.mean.float() + distribution.std.float() * batch["vae_noise"]
                latents = latents * vae.config.scaling_factor
                hidden = [
                    encoder(batch[f"token_ids_{i}"].long(), output_hidden_states=True)
                    for i, encoder in enumerate((one, two))
                ]
                context = torch.cat([output.hidden_states[-2] for output in hidden], dim=-1)
                added = {"text_embeds": hidden[1].text_embeds, "time_ids": batch["time_ids"]}
            noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"].long())
            condition["features"] = lq_encoder(batch["lq"])
            predicted = denoiser(noisy, batch["timesteps"], context, added_cond_kwargs=added).sample
        loss = (predicted.float() - batch["noise"]).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    report = {"parameters": sum(parameter.numel() for parameter in trained)}
    report["seconds"], report["loss"] = measure(step, options.steps)
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
