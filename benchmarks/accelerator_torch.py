"""What `accelerator.py` measures of PyTorch and diffusers; each function is one part, in a process of its own."""

import argparse
import resource
import statistics
import time
from typing import Any

import numpy as np
import torch
import train_step
from accelerator import Emit
from accelerator_case import CROP, GUIDANCE, PARITY_STEPS, SIDES, STEPS, case, training_options
from diffusers import EulerDiscreteScheduler
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from paired import TorchNetworks, measure


def parity(options: argparse.Namespace, emit: Emit) -> None:
    """Leave what float32 gives for ours to be compared with, and say how far PyTorch's own bfloat16 is from it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, np.ndarray] = {}
    for dtype in (torch.float32, torch.bfloat16):
        networks = TorchNetworks(options.size, options.device, dtype=dtype, parts=("unet", "lq_encoder"))
        x = tensors(options, 1, SIDES[options.size]["parity"], dtype)
        with torch.no_grad():
            networks.features = networks.lq_encoder(x["images"])
            one = to_numpy(evaluate(networks.unet, x["latents"], x["timesteps"], x, "context"))
            steps = to_numpy(denoise(networks, networks.unet, x, x["latents"].float(), PARITY_STEPS))
        if dtype == torch.float32:
            found = {"one": one, "steps": steps}
            np.savez(options.output / "parity.npz", **found)
            emit("left for ours to be compared with", "float32")
        else:
            for what, array, wanted in (("one evaluation", one, "one"), (f"{PARITY_STEPS} steps", steps, "steps")):
                error = np.abs(array - found[wanted]).max() / np.abs(found[wanted]).max()
                emit(f"largest relative error, {what}", float(error), "PyTorch, bfloat16")
        del networks


def restore(options: argparse.Namespace, emit: Emit) -> None:
    """Seconds a picture, eager and compiled."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    kinds = [("eager, plain attention", False, False), ("eager, SDPA", True, False)]
    kinds += [("eager, SDPA, channels_last", True, True)]
    # A compiler for CPUs is not always there, and says nothing about the device.
    kinds += [("compiled, SDPA, channels_last", True, True)] if options.device == "cuda" else []
    networks = TorchNetworks(options.size, options.device, dtype=dtype, parts=("unet", "lq_encoder", "vae"))
    for name, fused, last in kinds:
        label = f"diffusers, {str(dtype).removeprefix('torch.')}, {name}"
        try:
            networks.unet.set_attn_processor(AttnProcessor2_0() if fused else AttnProcessor())
            for module in (networks.unet, networks.lq_encoder, networks.vae) if last else ():
                module.to(memory_format=torch.channels_last)
            unet = torch.compile(networks.unet) if name.startswith("compiled") else networks.unet
            x = tensors(options, 1, SIDES[options.size]["restore"], dtype)
            begin = time.perf_counter()
            whole(networks, unet, x)
            emit("seconds of the first, with compiling", time.perf_counter() - begin, label)
            seconds, _ = measure(lambda unet=unet, x=x: whole(networks, unet, x), 3)
            emit("seconds a picture", statistics.median(seconds), label)
            emit("peak memory so far, GiB", peak_memory(options) / 2**30, label)
        except Exception as error:  # whatever a device may raise
            emit("failed", f"{type(error).__name__}: {error}".splitlines()[0][:300], label)


def train(options: argparse.Namespace, emit: Emit) -> None:
    """One step of stage 2, by `train_step.py`."""
    found = train_step.reference(training_options(options))
    second = statistics.median(found["seconds"])
    emit("loss of the first step", found["loss"])
    emit("seconds a step", second)
    emit(f"pictures of {CROP[options.size]} a second", training_options(options).batch / second)
    emit("peak memory, GiB", found.get("peak memory", peak_memory(options)) / 2**30)


def whole(networks: TorchNetworks, unet: Any, x: dict[str, torch.Tensor]) -> np.ndarray:
    """A restoration from pictures to pictures, on the host again at the end."""
    with torch.no_grad():
        networks.features = networks.lq_encoder(x["images"])
        mean = networks.vae.encode(x["images"]).latent_dist.mean.float() * networks.vae.config.scaling_factor
        scheduler = make_scheduler(STEPS)
        noisy = scheduler.add_noise(mean, x["latents"].float(), scheduler.timesteps[:1])
        latents = denoise(networks, unet, x, noisy / noisy.std(), STEPS)
        decoded = networks.vae.decode((latents / networks.vae.config.scaling_factor).to(x["images"].dtype)).sample
        return to_numpy(decoded)


def denoise(
    networks: TorchNetworks, unet: Any, x: dict[str, torch.Tensor], start: torch.Tensor, steps: int
) -> torch.Tensor:
    """Euler steps with guidance from a start of unit variance, float32."""
    networks.features = networks.features[: len(start)].repeat(2, 1, 1, 1)
    scheduler = make_scheduler(steps)
    latents = start * scheduler.init_noise_sigma
    both = {name: torch.cat([x[a], x[b]]) for name, a, b in PAIRS}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t).to(x["images"].dtype).repeat(2, 1, 1, 1)
        plain, guided = evaluate(unet, scaled, t.to(start.device), both, "context").float().chunk(2)
        latents = scheduler.step(plain + GUIDANCE * (guided - plain), t, latents).prev_sample
    return latents


PAIRS = (("context", "negative", "context"), ("pooled", "pooled", "pooled"), ("time_ids", "time_ids", "time_ids"))


def evaluate(unet: Any, latents: torch.Tensor, t: torch.Tensor, x: dict[str, torch.Tensor], context: str) -> Any:
    added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]}
    return unet(latents, t, x[context], added_cond_kwargs=added).sample


def make_scheduler(steps: int) -> EulerDiscreteScheduler:
    """SDXL's, at so many steps."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    return scheduler


def tensors(options: argparse.Namespace, batch: int, side: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`case` on the device, NCHW."""
    found = {}
    for name, array in case(options.size, batch, side).items():
        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        keep = name in ("timesteps", "time_ids")
        found[name] = torch.from_numpy(np.ascontiguousarray(array)).to(options.device, None if keep else dtype)
    return found


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """NHWC float32, once the device is done."""
    return tensor.float().cpu().numpy().transpose(0, 2, 3, 1)


def peak_memory(options: argparse.Namespace) -> int:
    """Of the device, in bytes; of this process on a CPU."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
