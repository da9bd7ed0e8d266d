"""What all steps share, computed before the first: tiles, embedded LQ features, text keys and values, embeddings."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan, Text
from faithdiff_jax.inference.tiling import blend_tiles, gather_tiles, gaussian_weights
from faithdiff_jax.models.faithdiff import Denoiser

Constrain = Callable[[jax.Array], jax.Array]
"""Lays a batch that goes through the UNet out over devices."""


class Tiles:
    """The tiles of a picture in chunks of `plan.tile_batch`, which go through the UNet one after another.

    Attributes:
        places: (chunks, tile_batch, 2), the corners; the last chunk is filled up with the last tile, so that every
            chunk is the same program.
    """

    def __init__(self, plan: SamplingPlan, shape: tuple[int, ...]):
        """Lay the tiles out for latents of a shape (B, H, W, c)."""
        self._corners, self._tile = plan.corners, plan.tile
        self._shape = shape
        self._chunks = math.ceil(len(plan.corners) / plan.tile_batch)
        self._surplus = self._chunks * plan.tile_batch - len(plan.corners)
        self.places = self.in_chunks(jnp.asarray(plan.corners, jnp.int32))

    @property
    def batch(self) -> int:
        """Pictures that each tile is cut out of."""
        return self._shape[0]

    def in_chunks(self, per_tile: jax.Array) -> jax.Array:
        """(tiles, ...) -> (chunks, tile_batch, ...), what belongs to the last tile repeated."""
        filled = jnp.concatenate([per_tile, jnp.repeat(per_tile[-1:], self._surplus, axis=0)])
        return filled.reshape(self._chunks, -1, *per_tile.shape[1:])

    def cut(self, x: jax.Array, places: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (tile_batch * B, h, w, C), the tiles of one chunk."""
        if self._is_whole:
            return x
        return gather_tiles(x, places, *self._tile).reshape(-1, *self._tile, x.shape[-1])

    def join(self, x: jax.Array) -> jax.Array:
        """The way back, from all chunks (chunks, tile_batch * B, h, w, c), overlaps averaged."""
        if self._is_whole:
            return x[0]
        _, height, width, _ = self._shape
        tiles = x.reshape(-1, self.batch, *self._tile, x.shape[-1])[: len(self._corners)]
        return blend_tiles(tiles, self._corners, jnp.asarray(gaussian_weights(*self._tile)), height, width)

    @property
    def _is_whole(self) -> bool:
        return self._chunks == 1 and len(self._corners) + self._surplus == 1


class Prepared(NamedTuple):
    """What is computed before the first step.

    Attributes:
        steps: of each step, the share of signal in what the UNet sees and the timestep's embedding (E,).
        conditions: (chunks, tile_batch * B, h, w, C) embedded LQ features; None where each step embeds them anew.
        passes: one entry for each pass through the UNet: added embeddings (chunks, k, tile_batch, B, E), and text keys
            and values of k * tile_batch * B texts; k is 2 where both sides of the guidance go through together.
    """

    steps: tuple[jax.Array, jax.Array]
    conditions: jax.Array | None
    passes: list[tuple[jax.Array, Any]]


def prepare(denoiser: Denoiser, plan: SamplingPlan, inputs: SamplingInputs, constrain: Constrain) -> Prepared:
    """Compute what all steps share."""
    tiles = Tiles(plan, inputs.noise.shape)
    time_ids = tiles.in_chunks(inputs.time_ids)

    def condition(places: jax.Array) -> jax.Array:
        return denoiser.alignment.embed(constrain(tiles.cut(inputs.features, places)))

    # Chunk by chunk, so that the LQ features never lie there a second time in overlapping tiles.
    conditions = None if inputs.features is None else jax.lax.map(condition, tiles.places)
    # Contexts of one length go through the UNet as one batch, the unconditional half first.
    sides = [inputs.text] if inputs.negative is None else [inputs.negative, inputs.text]
    together = len({side.context.shape[1] for side in sides}) == 1
    groups = [sides] if together else [[side] for side in sides]
    passes = [jax.tree.map(lambda *x: jnp.stack(x), *group) for group in groups]
    visited = jnp.asarray(plan.sampler.timesteps())
    fed = None if denoiser.unet.config.guidance_dim is None else jnp.full(visited.shape, inputs.guidance)
    steps = jnp.asarray(plan.sampler.alphas()), denoiser.embed_timesteps(visited, fed)
    return Prepared(steps, conditions, [_prepare_text(denoiser, side, time_ids) for side in passes])


def _prepare_text(denoiser: Denoiser, side: Text, time_ids: jax.Array) -> tuple[jax.Array, Any]:
    """One entry of `Prepared.passes`.

    `side` holds k texts: context (k, B, M, D) and pooled (k, B, P); `time_ids` is (chunks, tile_batch, B or 1, 6).
    """
    chunks, tile_batch, _, _ = time_ids.shape
    texts, batch, length, dim = side.context.shape
    shape = (chunks, texts, tile_batch, batch)
    if side.pooled is None or denoiser.unet.add_embedding is None:
        added = jnp.zeros((*shape, denoiser.embedding_dim))
    else:
        pooled = jnp.broadcast_to(side.pooled[None, :, None], (*shape, side.pooled.shape[-1]))
        ids = jnp.broadcast_to(time_ids[:, None], (*shape, 6))
        added = denoiser.embed_added(pooled.reshape(-1, pooled.shape[-1]), ids.reshape(-1, 6))
        added = added.reshape(*shape, -1)
    # Keys and values are projected before they are repeated for the tiles of a batch.
    keys_values = denoiser.project_text(side.context.reshape(texts * batch, length, dim))

    def repeat(
        x: jax.Array,
    ) -> jax.Array:  # (depth, k * B, M, heads, dim) -> (depth, k * tile_batch * B, M, heads, dim)
        depth, _, *rest = x.shape
        x = x.reshape(depth, texts, 1, batch, *rest)
        return jnp.broadcast_to(x, (depth, texts, tile_batch, batch, *rest)).reshape(depth, -1, *rest)

    return added, jax.tree.map(repeat, keys_values)
