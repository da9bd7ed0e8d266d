"""The published restoring procedure in PyTorch, written from its description: the oracle for ours.

NCHW, one image, diffusers' schedulers; every tile is denoised, guided and stepped on its own, then tiles are blended.
"""

import math

import numpy as np
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def euler_scheduler(steps: int) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


def grid(height: int, width: int, tile: int, overlap: float):
    def starts(side):
        size = min(tile, side)
        stride = size if (side - 1) // size + 1 == 1 else math.ceil(size * overlap)
        found, at = [], 0
        while True:
            if at + size >= side:
                return [*found, side - size]
            found.append(at)
            at += stride

    return [(i, j) for i in starts(height) for j in starts(width)], min(tile, height), min(tile, width)


def tile_weights(height: int, width: int) -> torch.Tensor:
    def gauss(side, middle):
        x = (np.arange(side) - middle) / side
        return np.exp(-x * x / 0.02) / np.sqrt(0.02 * np.pi)

    return torch.from_numpy(np.outer(gauss(height, height / 2), gauss(width, (width - 1) / 2)))


def denoise(
    predict_noise,
    features,
    texts,
    noise,
    *,
    steps,
    guidance,
    rescale=0.0,
    start=None,
    image_size,
    tile=128,
    overlap=0.5,
    factor=8,
):
    """`texts` is [(negative context, pooled), (context, pooled)], or the latter alone without guidance."""
    scheduler = euler_scheduler(steps)
    latents = noise * scheduler.init_noise_sigma
    if start is not None:
        ddpm = DDPMScheduler(**SCHEDULE)
        latents = ddpm.add_noise(start, latents, torch.tensor([999]))
    corners, height, width = grid(*latents.shape[2:], tile, overlap)
    weights = tile_weights(height, width)
    for step, t in enumerate(scheduler.timesteps):
        total, count = torch.zeros_like(latents, dtype=torch.float64), torch.zeros(latents.shape[2:]).double()
        for top, left in corners:
            here = (..., slice(top, top + height), slice(left, left + width))
            part = latents[here]
            scheduler._step_index = step
            x = scheduler.scale_model_input(part, t)
            ids = torch.tensor([[*image_size, top, left, tile * factor, tile * factor]], dtype=torch.float32)
            predictions = [
                predict_noise(x, t[None], features[here], context, pooled, None if pooled is None else ids)
                for context, pooled in texts
            ]
            predicted = predictions[-1]
            if guidance > 1:
                predicted = predictions[0] + guidance * (predictions[1] - predictions[0])
                if rescale > 0:
                    axes = (1, 2, 3)
                    ratio = predictions[1].std(axes, keepdim=True) / predicted.std(axes, keepdim=True)
                    predicted = rescale * predicted * ratio + (1 - rescale) * predicted
            scheduler._step_index = step
            total[here] += scheduler.step(predicted, t, part).prev_sample * weights
            count[here[1:]] += weights
        latents = (total / count).float()
    return latents
