"""What all steps share, computed before the first: tiles, embedded LQ features, text keys and values, embeddings."""

import math
from collections.abc import Callable, Sequence
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


class TextPass(NamedTuple):
    """The texts of one pass through the UNet: k for each tile, both sides of the guidance where they go together.

    Attributes:
        added: (chunks, k, tile_batch, B, E), added embeddings.
        shared: keys and values of tile_batch * B copies of each text that all tiles share; None if there are none.
        own: (chunks, tile_batch * B, M, D), contexts where each tile has its own caption, the last of the k; or None.
            Their keys and values are computed when a chunk's turn comes: those of SDXL take 25 MiB a tile in bfloat16,
            and to compute them is less than a hundredth of what the UNet does with the tile.
    """

    added: jax.Array
    shared: Any
    own: jax.Array | None


class Prepared(NamedTuple):
    """What is computed before the first step.

    Attributes:
        steps: of each step, the share of signal in what the UNet sees and the timestep's embedding (E,).
        conditions: (chunks, tile_batch * B, h, w, C) embedded LQ features; None where each step embeds them anew.
        passes: one entry for each pass through the UNet; the caption is the last text of the last.
    """

    steps: tuple[jax.Array, jax.Array]
    conditions: jax.Array | None
    passes: list[TextPass]


def prepare(denoiser: Denoiser, plan: SamplingPlan, inputs: SamplingInputs, constrain: Constrain) -> Prepared:
    """Compute what all steps share."""
    tiles = Tiles(plan, inputs.noise.shape)

    def condition(places: jax.Array) -> jax.Array:
        return denoiser.alignment.embed(constrain(tiles.cut(inputs.features, places)))

    # Chunk by chunk, so that the LQ features never lie there a second time in overlapping tiles.
    conditions = None if inputs.features is None else jax.lax.map(condition, tiles.places)
    # Contexts of one length go through the UNet as one batch, the unconditional half first.
    sides = [inputs.text] if inputs.negative is None else [inputs.negative, inputs.text]
    together = len({side.context.shape[-2] for side in sides}) == 1
    groups = [sides] if together else [[side] for side in sides]
    visited = jnp.asarray(plan.sampler.timesteps())
    fed = None if denoiser.unet.config.guidance_dim is None else jnp.full(visited.shape, inputs.guidance)
    steps = jnp.asarray(plan.sampler.alphas()), denoiser.embed_timesteps(visited, fed)
    passes = [_prepare_texts(denoiser, group, tiles, tiles.in_chunks(inputs.time_ids)) for group in groups]
    return Prepared(steps, conditions, passes)


def _prepare_texts(denoiser: Denoiser, sides: Sequence[Text], tiles: Tiles, time_ids: jax.Array) -> TextPass:
    """One entry of `Prepared.passes`; `time_ids` is (chunks, tile_batch, B or 1, 6)."""
    chunks, tile_batch, _, _ = time_ids.shape
    batch = sides[0].context.shape[0]
    shape = (chunks, len(sides), tile_batch, batch)

    def of_tiles(x: jax.Array) -> jax.Array:  # (B, tiles, ...) -> (chunks, tile_batch, B, ...)
        return tiles.in_chunks(jnp.moveaxis(x, 1, 0))

    if any(side.pooled is None for side in sides) or denoiser.unet.add_embedding is None:
        added = jnp.zeros((*shape, denoiser.embedding_dim))
    else:
        each = [of_tiles(side.pooled) if side.by_tile else side.pooled[None, None] for side in sides]
        pooled = jnp.stack([jnp.broadcast_to(x, (chunks, tile_batch, *x.shape[2:])) for x in each], axis=1)
        ids = jnp.broadcast_to(time_ids[:, None], (*shape, 6))
        added = denoiser.embed_added(pooled.reshape(-1, pooled.shape[-1]), ids.reshape(-1, 6))
        added = added.reshape(*shape, -1)
    shared = [side.context for side in sides if not side.by_tile]
    own = None
    if sides[-1].by_tile:
        own = of_tiles(sides[-1].context)
        own = own.reshape(chunks, tile_batch * batch, *own.shape[3:])
    return TextPass(added, _keys_values(denoiser, shared, tile_batch) if shared else None, own)


def _keys_values(denoiser: Denoiser, contexts: Sequence[jax.Array], tile_batch: int) -> Any:
    """Of texts (B, M, D), projected before they are repeated for the tiles of a chunk."""
    texts, batch = len(contexts), contexts[0].shape[0]

    def repeat(
        x: jax.Array,
    ) -> jax.Array:  # (depth, k * B, M, heads, dim) -> (depth, k * tile_batch * B, M, heads, dim)
        depth, _, *rest = x.shape
        x = x.reshape(depth, texts, 1, batch, *rest)
        return jnp.broadcast_to(x, (depth, texts, tile_batch, batch, *rest)).reshape(depth, -1, *rest)

    return jax.tree.map(repeat, denoiser.project_text(jnp.concatenate(contexts)))
