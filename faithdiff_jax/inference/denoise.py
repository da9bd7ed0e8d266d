"""The denoising program of FaithDiff: what is constant is computed once, then every step runs over the tiles.

    LQ features --cut by the grid--> condition of each tile  \
    contexts --> text keys and values                         > every step: tiles -> UNet -> guidance -> blend
    timesteps, pooled text, time ids --> embeddings          /

One jitted function of (params, arrays); shapes, grid and choices are static, guidance and the rest are not.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.tiling import Corners, blend_tiles, gather_tiles, gaussian_weights
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.faithdiff import Denoiser

SAMPLERS = ("euler", "ddpm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is fixed when the program is compiled."""

    schedule: schedule.ScheduleConfig
    steps: int
    sampler: str
    corners: Corners
    """(top, left) of every tile, in latent pixels."""
    tile: tuple[int, int]
    """Height and width of every tile, in latent pixels."""
    tile_batch: int
    """Tiles that go through the UNet together."""


def check_options(
    config: FaithDiffConfig,
    steps: int,
    guidance: float,
    guidance_rescale: float,
    tile: int,
    overlap: float,
    tile_batch: int,
    sampler: str,
) -> None:
    """Refuse options outside their range: one InputError names every one of them, its value and its range."""
    limit, smallest = config.schedule.train_steps, config.unet.smallest_side
    faults = {
        f"steps is {steps}: must be between 1 and {limit}": not 1 <= steps <= limit,
        f"guidance is {guidance}: must be 0 or more": not 0 <= guidance < math.inf,
        f"guidance_rescale is {guidance_rescale}: must be between 0 and 1": not 0 <= guidance_rescale <= 1,
        f"tile is {tile} latent pixels: must be at least {smallest} for this model": tile < smallest,
        f"overlap is {overlap}: must be above 0 and at most 1": not 0 < overlap <= 1,
        f"tile_batch is {tile_batch}: must be at least 1": tile_batch < 1,
        f"sampler is {sampler!r}: must be one of {', '.join(SAMPLERS)}": sampler not in SAMPLERS,
    }
    found = [message for message, wrong in faults.items() if wrong]
    if found:
        raise InputError("; ".join(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One side of the guidance: a context (B, M, D), its pooled form (B, P) and nothing else."""

    context: jax.Array
    pooled: jax.Array | None


jax.tree_util.register_dataclass(Text, ["context", "pooled"], [])


def sample(
    denoiser: Denoiser,
    plan: SamplingPlan,
    features: jax.Array,
    text: Text,
    negative: Text | None,
    noise: jax.Array,
    start: jax.Array | None,
    step_noise: jax.Array | None,
    time_ids: jax.Array,
    guidance: jax.Array,
    rescale: jax.Array | None,
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Denoise from the start point to a clean latent.

    Args:
        denoiser: UNet and aligner.
        plan: what is static.
        features: (B, H, W, F) LQ features.
        text: the caption's.
        negative: the empty caption's, or None for no guidance.
        noise: (B, H, W, c), standard normal.
        start: (B, H, W, c), scaled latent of the LQ image, or None to start from pure noise.
        step_noise: (steps, B, H, W, c), standard normal, for "ddpm" only.
        time_ids: (tiles, 6), image size, tile position and target size.
        guidance: scalar weight.
        rescale: scalar phi, or None.
        constrain: applied to every batch that goes through the UNet, to lay it out over devices.

    Returns:
        (B, H, W, c), float32.
    """
    batch, height, width, channels = noise.shape
    tiles = len(plan.corners)
    chunks = math.ceil(tiles / plan.tile_batch)
    # A last chunk that is not full is filled up with the last tile, so that every chunk is the same program.
    corners = plan.corners + plan.corners[-1:] * (chunks * plan.tile_batch - tiles)
    time_ids = jnp.concatenate([time_ids, jnp.repeat(time_ids[-1:], len(corners) - tiles, axis=0)])
    places = jnp.asarray(corners, jnp.int32).reshape(chunks, plan.tile_batch, 2)

    def cut(x, places):  # (B, H, W, C) -> (tile_batch * B, h, w, C), the tiles of one chunk
        if len(corners) == 1:
            return x
        return gather_tiles(x, places, *plan.tile).reshape(-1, *plan.tile, x.shape[-1])

    def join(x):  # the way back, overlaps averaged
        if len(corners) == 1:
            return x[0]
        x = x.reshape(len(corners), batch, *plan.tile, channels)[:tiles]
        return blend_tiles(x, plan.corners, jnp.asarray(gaussian_weights(*plan.tile)), height, width)

    # Chunk by chunk, so that the LQ features never lie there a second time in overlapping tiles.
    conditions = jax.lax.map(lambda here: denoiser.alignment.embed(constrain(cut(features, here))), places)
    # Contexts of one length go through the UNet as one batch, the unconditional half first.
    sides = [text] if negative is None else [negative, text]
    same_length = len({side.context.shape[1] for side in sides}) == 1
    passes = [jax.tree.map(lambda *x: jnp.stack(x), *sides)] if same_length else [_lift(side) for side in sides]
    prepared = [_prepare(denoiser, side, time_ids.reshape(chunks, plan.tile_batch, 6)) for side in passes]

    def predict_noise(x, condition):
        timestep, time_embedding = condition

        def chunk(operands):
            here, condition, added = operands
            latents = cut(x, here)
            predictions = []
            for (_, keys_values), side_added in zip(prepared, added, strict=True):
                side_added = side_added.reshape(-1, side_added.shape[-1])
                embedding = time_embedding[None] + side_added
                predicted = denoiser.denoise(
                    constrain(latents), constrain(embedding), constrain(condition), keys_values, group=batch
                )
                predictions += jnp.split(predicted.astype(jnp.float32), len(predicted) // len(latents))
            if negative is None:
                return predictions[0]
            unconditional, conditional = predictions
            return samplers.guide(unconditional, conditional, guidance, rescale)

        output = join(jax.lax.map(chunk, (places, conditions, [added for added, _ in prepared])))
        return schedule.to_noise(plan.schedule, output, x, timestep)

    visited = jnp.asarray(schedule.timesteps(plan.schedule, plan.steps))
    steps = visited, denoiser.unet.embed_timesteps(visited)
    if plan.sampler == "ddpm":
        assert step_noise is not None, "ancestral sampling needs step_noise"
        latents = _start_point(plan.schedule, noise, start)
        return samplers.ddpm(predict_noise, latents, samplers.ddpm_alphas(plan.schedule, plan.steps), step_noise, steps)
    noise = noise * schedule.init_noise_sigma(plan.schedule, plan.steps)
    sigmas = jnp.asarray(schedule.sigmas(plan.schedule, plan.steps))
    return samplers.euler(predict_noise, _start_point(plan.schedule, noise, start), sigmas, steps)


def _start_point(config: schedule.ScheduleConfig, noise: jax.Array, start: jax.Array | None) -> jax.Array:
    """Pure noise, or the LQ latent noised to the last timestep (published `start_point="lr"`)."""
    return noise if start is None else schedule.add_noise(config, start, noise, config.train_steps - 1)


def _lift(side: Text) -> Text:
    return jax.tree.map(lambda x: x[None], side)


def _prepare(denoiser: Denoiser, side: Text, time_ids: jax.Array):
    """Added embeddings (chunks, k, tile_batch, B, E) and text keys and values (..., k * tile_batch * B, ...).

    `side` holds k texts: context (k, B, M, D) and pooled (k, B, P); `time_ids` is (chunks, tile_batch, 6).
    """
    chunks, tile_batch, _ = time_ids.shape
    texts, batch, length, dim = side.context.shape
    shape = (chunks, texts, tile_batch, batch)
    if side.pooled is None or denoiser.unet.add_embedding is None:
        added = jnp.zeros((*shape, denoiser.unet.config.embedding_dim))
    else:
        pooled = jnp.broadcast_to(side.pooled[None, :, None], (*shape, side.pooled.shape[-1]))
        ids = jnp.broadcast_to(time_ids[:, None, :, None], (*shape, 6))
        added = denoiser.unet.embed_added(pooled.reshape(-1, pooled.shape[-1]), ids.reshape(-1, 6))
        added = added.reshape(*shape, -1)
    # Keys and values are projected before they are repeated for the tiles of a batch.
    keys_values = denoiser.unet.project_text(side.context.reshape(texts * batch, length, dim))

    def repeat(x):  # (depth, k * B, M, heads, dim) -> (depth, k * tile_batch * B, M, heads, dim)
        depth, _, *rest = x.shape
        x = x.reshape(depth, texts, 1, batch, *rest)
        return jnp.broadcast_to(x, (depth, texts, tile_batch, batch, *rest)).reshape(depth, -1, *rest)

    return added, jax.tree.map(repeat, keys_values)
