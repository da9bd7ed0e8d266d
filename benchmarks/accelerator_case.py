"""What both frameworks are measured on by `accelerator.py`: sizes, and the arrays of a picture."""

import argparse

import numpy as np
from paired import FACTOR, LATENT_CHANNELS, SIZES, TOKENS

STEPS, PARITY_STEPS, GUIDANCE = 20, 2, 5.0
BATCHES = {"sdxl": (1, 4, 8), "small": (1, 2), "tiny": (1, 2)}
CROP = {"sdxl": 512, "small": 128, "tiny": 64}
TRAIN_BATCH = {"sdxl": 8, "small": 2, "tiny": 2}
# Sides of pictures in pixels.
SIDES: dict[str, dict] = {
    "sdxl": {"parity": 512, "restore": 1024, "memory": (1024, 2048, 4096)},
    "small": {"parity": 128, "restore": 256, "memory": (256,)},
    "tiny": {"parity": 64, "restore": 64, "memory": (64,)},
}


def case(size: str, batch: int, side: int) -> dict[str, np.ndarray]:
    """Arrays of so many pictures of side x side, NHWC float32; the first ones are the same in every batch."""
    of = SIZES[size]
    context, pooled = of["text"][0][0] + of["text"][1][0], of["text"][1][0]
    latent = side // FACTOR

    def each(seed: int, *shape: int) -> np.ndarray:
        return np.stack([np.random.default_rng([seed, i]).standard_normal(shape, np.float32) for i in range(batch)])

    return {
        "images": np.clip(0.5 * each(0, side, side, 3), -1, 1),
        "latents": each(1, latent, latent, LATENT_CHANNELS),
        "context": each(2, TOKENS, context),
        "negative": each(3, TOKENS, context),
        "pooled": each(4, pooled),
        "time_ids": np.tile(np.array([side, side, 0, 0, side, side], np.float32), (batch, 1)),
        "timesteps": np.full((batch,), 501),
    }


def training_options(options: argparse.Namespace) -> argparse.Namespace:
    """The flags of `train_step.py` that this size and device ask for."""
    on_cpu = options.device == "cpu"
    return argparse.Namespace(
        size=options.size,
        batch=TRAIN_BATCH[options.size],
        crop=CROP[options.size],
        steps=1 if options.size == "tiny" else 5,
        device=options.device,
        dtype="float32" if on_cpu else "bfloat16",
        compile=not on_cpu,
        rematerialisation="none" if on_cpu else "full",
    )
