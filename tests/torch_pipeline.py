"""The published restoring procedure in PyTorch, written from its description: the oracle for ours.

NCHW, one image, diffusers' schedulers; every tile is denoised, guided and stepped on its own, then tiles are blended.
"""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image
from transformers import CLIPTokenizer

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def euler_scheduler(steps: int, prediction: str = "epsilon") -> EulerDiscreteScheduler:
    # This scheduler of diffusers has a word of its own for it.
    kind = "original_sample" if prediction == "sample" else prediction
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", prediction_type=kind, **SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


def published_scheduler(folder: Path, steps: int) -> EulerDiscreteScheduler:
    """Euler's in the place of the folder's own scheduler, at the timesteps that this one visits.

    Left to itself, `from_config` has another default than the scheduler that the configuration is of.
    """
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    own = getattr(diffusers, settings["_class_name"]).from_pretrained(folder, subfolder="scheduler")
    scheduler = EulerDiscreteScheduler.from_config(own.config, timestep_spacing=own.config.timestep_spacing)
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
    scheduler=None,
):
    """`texts` is [(negative context, pooled), (context, pooled)], or the latter alone without guidance; or it is a
    function that is called before each tile of a step, with the numbers of both, and gives that tile's.

    The scheduler is Euler's unless another is given; one that remembers earlier steps, for a single tile.
    """
    scheduler = scheduler or euler_scheduler(steps)
    latents = noise * scheduler.init_noise_sigma
    if start is not None:
        ddpm = DDPMScheduler(**SCHEDULE)
        latents = ddpm.add_noise(start, latents, torch.tensor([999]))
    corners, height, width = grid(*latents.shape[2:], tile, overlap)
    weights = tile_weights(height, width)
    for step, t in enumerate(scheduler.timesteps):
        total, count = torch.zeros_like(latents, dtype=torch.float64), torch.zeros(latents.shape[2:]).double()
        for tile_number, (top, left) in enumerate(corners):
            sides = texts(step, tile_number) if callable(texts) else texts
            here = (..., slice(top, top + height), slice(left, left + width))
            part = latents[here]
            scheduler._step_index = step
            x = scheduler.scale_model_input(part, t)
            ids = torch.tensor([[*image_size, top, left, tile * factor, tile * factor]], dtype=torch.float32)
            predictions = [
                predict_noise(x, t[None], features[here], context, pooled, None if pooled is None else ids)
                for context, pooled in sides
            ]
            predicted = predictions[-1]
            if len(predictions) > 1:
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


def encode_text(models, captions):
    """Context and pooled of each caption: hidden states [-2] side by side (SDXL), the pooled of the last encoder."""
    hidden, pooled = [], None
    for i, encoder in enumerate(models.text_encoders):
        tokenizer = CLIPTokenizer.from_pretrained(models.sdxl / (f"tokenizer_{i + 1}" if i else "tokenizer"))
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        sdxl = len(models.text_encoders) > 1
        hidden.append(output.hidden_states[-2] if sdxl else output.last_hidden_state)
        pooled = output.text_embeds if "text_embeds" in output else None
    return torch.cat(hidden, dim=-1), pooled


def upscaled(image: np.ndarray, scale: float) -> np.ndarray:
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((round(width * scale), round(height * scale)), Image.LANCZOS))


def restore(models, image, caption, noise, encode_noise, *, scale, steps, guidance, start, tile=128, overlap=0.5):
    """Everything up to the decoder, step by step: name -> NCHW tensor; noises are NHWC arrays."""
    big = upscaled(image, scale)
    height, width = big.shape[:2]
    padded = np.pad(big, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    pixels = torch.from_numpy(padded.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    to_nchw = lambda array: torch.from_numpy(np.asarray(array)).permute(0, 3, 1, 2)  # noqa: E731
    scaling = models.vae.config.scaling_factor
    with torch.no_grad():
        features = models.lq_encoder(pixels)
        distribution = models.vae.encode(pixels).latent_dist
        encoded = (distribution.mean + distribution.std * to_nchw(encode_noise)) * scaling
        context, pooled = encode_text(models, ["", caption])
        sides = [(context[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in (0, 1)]
        latents = denoise(
            models.predict_noise,
            features,
            sides if guidance > 1 else sides[1:],
            to_nchw(noise),
            steps=steps,
            guidance=guidance,
            start=encoded if start == "lr" else None,
            image_size=padded.shape[:2],
            tile=tile,
            overlap=overlap,
            scheduler=published_scheduler(models.sdxl, steps),
        )
        decoded = models.vae.decode(latents / scaling).sample[:, :, :height, :width]
    return {"features": features, "encoded": encoded, "latents": latents, "decoded": decoded}


def adain(decoded: torch.Tensor, reference: np.ndarray) -> np.ndarray:
    """The published colour fix on eight-bit pictures, in [0, 1], rounded back to eight bits."""
    ours = (decoded[0] / 2 + 0.5).clamp(0, 1).mul(255).round() / 255
    theirs = torch.from_numpy(reference.astype(np.float32) / 255).permute(2, 0, 1)

    def statistics(x):
        flat = x.reshape(3, -1)
        return flat.mean(1)[:, None, None], (flat.var(1) + 1e-5).sqrt()[:, None, None]

    (mean, deviation), (target_mean, target_deviation) = statistics(ours), statistics(theirs)
    fixed = (ours - mean) / deviation * target_deviation + target_mean
    return fixed.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
