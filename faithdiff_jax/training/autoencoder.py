"""Train a model's autoencoder from the start: the first stage of a small model that has no published weights.

photographs -> random crops -> L1 + edges + KL -> AdamW -> latents' scale -> model directory, all else fresh
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from faithdiff_jax.config import Range, check_ranges, load
from faithdiff_jax.data.decode import decode
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import psnr
from faithdiff_jax.files.images import crop, pad_to_multiple, to_float, to_uint8
from faithdiff_jax.files.writing import refuse_existing
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, flatten, graph, unflatten
from faithdiff_jax.models.vae import VAE, VAEConfig
from faithdiff_jax.weights.initialisation import check_tokenizers, fresh_params, fresh_part, write_model

CROPS_FOR_SCALE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A run. Paths are relative to the file that names them.

    The loss is the mean absolute error, plus `edge_weight` times that of the differences between neighbouring pixels,
    plus `kl_weight` times the Kullback-Leibler divergence of a latent number from the standard normal.
    """

    model: str
    """The architecture, a YAML of FaithDiffConfig."""
    tokenizers: str
    """A folder with `tokenizer/`, `tokenizer_2/`, which go into the model directory."""
    steps: int
    batch: int = 16
    crop: int = 64
    learning_rate: float = 1e-3
    """At its highest: it rises over `warmup` steps and falls to zero in a half cosine."""
    warmup: int = 100
    weight_decay: float = 1e-4
    edge_weight: float = 0.5
    kl_weight: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps=Range(1, 10_000_000, whole=True),
            batch=Range(1, 4096, whole=True),
            crop=Range(2, 4096, whole=True),
            learning_rate=Range(0, 10, above=True),
            warmup=Range(0, 10_000_000, whole=True),
            weight_decay=Range(0, 100),
            edge_weight=Range(0, 1e6),
            kl_weight=Range(0, 1e6),
            seed=Range(0, 2**32 - 1, whole=True),
        )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}: must be below steps, {self.steps}")


def make_model(
    config_file: pathlib.Path,
    data: pathlib.Path,
    output: pathlib.Path,
    *,
    held_out: pathlib.Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Train an autoencoder on the photographs of a folder and write a model directory whose other parts are fresh.

    Args:
        config_file: YAML of an AutoencoderConfig, changed by `overrides` (`key=value`).
        held_out: folder of photographs to measure the reconstruction with.

    Returns:
        The latents' `scaling_factor` and, with `held_out`, the mean `held_out_psnr` in dB.

    Raises:
        InputError: before the training for what can be found wrong by then.
    """
    config = load(AutoencoderConfig, config_file, overrides)
    folder = config_file.parent
    model = load(FaithDiffConfig, folder / config.model)
    refuse_existing(output)
    check_tokenizers(model, folder / config.tokenizers)
    photographs = load_photographs(data, config.crop)
    judged = [] if held_out is None else load_photographs(held_out, model.vae.factor)

    params = fresh_params(model, config.seed)
    params["vae"] = train(config, model.vae, params["vae"], photographs)
    params["lq_encoder"] = fresh_part(model, "lq_encoder", params.__getitem__, config.seed)
    scale = latent_scale(config, model.vae, params["vae"], photographs)
    model = dataclasses.replace(model, vae=dataclasses.replace(model.vae, scaling_factor=scale))
    figures = {"scaling_factor": scale}
    if judged:
        figures["held_out_psnr"] = round(float(np.mean(reconstruction_psnr(model.vae, params["vae"], judged))), 2)
    provenance: dict[str, Any] = {"autoencoder": {**dataclasses.asdict(config), **figures}}
    write_model(model, params, folder / config.tokenizers, output, provenance)
    return figures


def load_photographs(folder: pathlib.Path, smallest: int) -> list[np.ndarray]:
    """Every picture under a folder, (H, W, 3) uint8; InputError for a bad one, or a side under `smallest` pixels."""
    source = PhotoFolder(folder)
    photographs = [decode(source[index].hq, source.name(index)) for index in range(len(source))]
    for index, pixels in enumerate(photographs):
        if min(pixels.shape[:2]) < smallest:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise InputError(f"{source.name(index)}: {size} pixels, each side must have at least {smallest}")
    return photographs


def random_crops(photographs: Sequence[np.ndarray], count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Cut squares out of random photographs, mirrored, turned by quarters and with their colours exchanged at random.

    Returns:
        (count, side, side, 3) uint8.
    """
    crops = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):
        pixels = photographs[int(rng.integers(len(photographs)))]
        top, left = (rng.integers(length - side + 1) for length in pixels.shape[:2])
        square = pixels[top : top + side, left : left + side]
        square = np.rot90(square, int(rng.integers(4)))
        square = square[:, ::-1] if rng.random() < 0.5 else square
        crops[i] = square[..., rng.permutation(3)]
    return crops


def autoencoder_loss(
    config: AutoencoderConfig, vae: VAE, images: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of images (B, H, W, 3) in [-1, 1], with standard normal noise (B, H/f, W/f, latent_channels).

    Returns:
        The loss and the mean squared error, both scalars.
    """
    moments = vae.moments(images)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    error = vae.decode(vae.sample(moments, noise)) - images
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    loss = jnp.abs(error).mean() + config.edge_weight * edges + config.kl_weight * divergence.mean()
    return loss, jnp.square(error).mean()


def train(
    config: AutoencoderConfig, vae: VAEConfig, params: dict[str, np.ndarray], photographs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Train the VAE's parameters {dotted path: array}; returns the trained ones. The seed gives all randomness.

    Raises:
        InputError: a crop that the VAE's levels do not divide, or a loss that is no longer finite.
    """
    if config.crop % vae.factor:
        raise InputError(f"crop is {config.crop}: must be a multiple of the VAE's factor, {vae.factor}")
    optimizer, step = _training_step(config, vae)
    trained: Params = jax.tree.map(jnp.asarray, unflatten(params))
    state = optimizer.init(trained)
    progress = tqdm(range(config.steps), desc="autoencoder", unit="step", mininterval=1)
    for index in progress:
        crops = random_crops(photographs, config.batch, config.crop, np.random.default_rng((config.seed, index)))
        trained, state, loss, squared = step(trained, state, np.int32(index), crops.astype(np.float32))
        if not np.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {index}: a lower learning_rate or a longer warmup may help")
        progress.set_postfix(loss=f"{float(loss):.4f}", psnr=f"{-10 * np.log10(float(squared) / 4):.2f}", refresh=False)
    return {path: np.asarray(leaf) for path, leaf in flatten(trained).items()}


@functools.cache
def _training_step(
    config: AutoencoderConfig, vae: VAEConfig
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer, and (parameters, its state, step number, crops) -> both anew, loss, mean squared error."""
    structure = graph(functools.partial(VAE, vae))
    latent = (config.batch, config.crop // vae.factor, config.crop // vae.factor, vae.latent_channels)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay)
    )
    key = jax.random.key(config.seed)

    @jax.jit
    def step(params: Params, state: optax.OptState, index: jax.Array, crops: jax.Array) -> tuple[Any, ...]:
        noise = jax.random.normal(jax.random.fold_in(key, index), latent)
        images = crops / 127.5 - 1

        def objective(params: Params) -> tuple[jax.Array, jax.Array]:
            return autoencoder_loss(config, nnx.merge(structure, params), images, noise)

        (loss, squared), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, squared

    return optimizer, step


def latent_scale(
    config: AutoencoderConfig, vae: VAEConfig, params: dict[str, np.ndarray], photographs: Sequence[np.ndarray]
) -> float:
    """What latents must be multiplied by for unit variance, measured on random crops of the photographs."""
    structure = graph(functools.partial(VAE, vae))
    crops = random_crops(photographs, CROPS_FOR_SCALE, config.crop, np.random.default_rng((config.seed, 2**32)))

    @jax.jit
    def moments(params: Params, images: jax.Array) -> jax.Array:
        network: VAE = nnx.merge(structure, params)
        return network.moments(images)

    nested = unflatten(params)
    batches = np.split(to_float(crops), CROPS_FOR_SCALE // 16)
    mean, log_variance = np.split(np.concatenate([moments(nested, images) for images in batches]), 2, axis=-1)
    return float(1 / np.sqrt(np.var(mean, dtype=np.float64) + np.mean(np.exp(log_variance), dtype=np.float64)))


def reconstruction_psnr(
    vae: VAEConfig, params: dict[str, np.ndarray], photographs: Sequence[np.ndarray]
) -> list[float]:
    """PSNR in dB of each whole photograph after encoding (the mean latent) and decoding, at eight bits."""
    structure = graph(functools.partial(VAE, vae))

    @jax.jit
    def reconstruct(params: Params, images: jax.Array) -> jax.Array:
        network: VAE = nnx.merge(structure, params)
        moments = network.moments(images)
        return network.decode(network.sample(moments, jnp.zeros((*moments.shape[:3], vae.latent_channels))))

    nested = unflatten(params)
    values = []
    for pixels in photographs:
        padded = to_float(pad_to_multiple(pixels, vae.factor))[None]
        restored = crop(np.asarray(reconstruct(nested, padded)[0]), *pixels.shape[:2])
        values.append(psnr(to_uint8(restored), pixels))
    return values
