"""The denoising program of FaithDiff: what is constant is computed once, then every step runs over the tiles.

    LQ features --cut by the grid--> condition of each tile  \
    contexts --> text keys and values                         > every step: tiles -> UNet -> guidance -> blend
    timesteps, pooled text, time ids --> embeddings          /

`SamplingPlan` says what is static, `SamplingInputs` holds the arrays (see `inputs`); `denoise` is `begin` and `advance`
in one program, and the two are also programs of their own, to look in from outside between steps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.diffusion.sampler import Carry
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan, Text
from faithdiff_jax.inference.tiling import blend_tiles, gather_tiles, gaussian_weights
from faithdiff_jax.models.attribution import Maps, Words
from faithdiff_jax.models.faithdiff import Denoiser

Constrain = Callable[[jax.Array], jax.Array]


def denoise(
    denoiser: Denoiser, plan: SamplingPlan, inputs: SamplingInputs, constrain: Constrain = lambda x: x
) -> Float[Array, "b h w c"]:
    """Denoise from the start point to a clean, scaled latent, in float32.

    Args:
        denoiser: UNet and aligner.
        plan: what is static.
        inputs: the arrays.
        constrain: applied to every batch that goes through the UNet, to lay it out over devices.
    """
    return denoise_and_attribute(denoiser, plan, inputs, None, constrain)[0]


def denoise_and_attribute(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    words: Words | None,
    constrain: Constrain = lambda x: x,
) -> tuple[Float[Array, "b h w c"], Maps | None]:
    """`denoise`, and which pixels looked at which words of the caption (see `models.attribution`).

    Args:
        denoiser: as for `denoise`, like `plan`, `inputs` and `constrain`.
        plan: what is static.
        inputs: the arrays.
        words: (B, M, W), the weight of each token of the caption in each word; None for no maps.
        constrain: see `denoise`.

    Returns:
        The latent (B, H, W, c), as without maps but for rounding; and (B, H, W, W'), for each word what part of a
        pixel's attention went to it, 0 to 1 but for what interpolation adds: the mean over heads, layers and steps.
        Tiles are blended as those of the latents are, at every step.
    """
    prepared, carry = begin(denoiser, plan, inputs, words, constrain)
    carry = advance(denoiser, plan, inputs, prepared, carry, words=words, constrain=constrain)
    maps = carry.memory.maps
    return carry.latents, None if maps is None else maps / plan.sampler.steps


class Memory(NamedTuple):
    """What is taken from step to step beside the latents; None for what nobody asks for.

    Attributes:
        maps: (B, H, W, W'), the sum of the words' maps so far.
        clean: (B, H, W, c), what the last prediction says the clean latent is.
    """

    maps: jax.Array | None = None
    clean: jax.Array | None = None


def begin(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    words: Words | None = None,
    constrain: Constrain = lambda x: x,
    *,
    keep_clean: bool = False,
) -> tuple["Prepared", Carry]:
    """Everything before the first step: what all steps share, and the start point. Arguments as of `advance`.

    `keep_clean` asks for `Memory.clean`.
    """
    sampler = plan.sampler
    prepared = prepare(denoiser, plan, inputs, constrain)
    latents = inputs.noise * sampler.init_noise_scale
    if inputs.start is not None:  # the LQ latent, noised to the last timestep (published `start_point="lr"`)
        latents = schedule.add_noise(sampler.schedule, inputs.start, latents, sampler.schedule.train_steps - 1)
    memory = Memory(
        maps=None if words is None else jnp.zeros((*latents.shape[:3], words.shape[-1]), jnp.float32),
        clean=jnp.zeros_like(latents) if keep_clean else None,
    )
    return prepared, sampler.begin(latents, memory)


def advance(
    denoiser: Denoiser,
    plan: SamplingPlan,
    inputs: SamplingInputs,
    prepared: "Prepared",
    carry: Carry,
    *,
    part: tuple[Any, Any] | None = None,
    words: Words | None = None,
    constrain: Constrain = lambda x: x,
) -> Carry:
    """Walk all steps, or the part of them from one to before another, which may be traced.

    Args:
        denoiser: as for `denoise`, like `plan`, `inputs` and `constrain`.
        plan: what is static.
        inputs: the arrays.
        prepared: from `begin`.
        carry: from `begin`, or from the part before.
        part: the first step and the one after the last; None for all.
        words: see `denoise_and_attribute`.
        constrain: see `denoise`.
    """
    if words is not None:
        words = jnp.tile(words, (plan.tile_batch, 1, 1))
    predict = Predictor(denoiser, plan, prepared, inputs, words, constrain)
    return plan.sampler.walk(predict, carry, prepared.steps, inputs.step_noise, part)


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
        """(tiles, n) -> (chunks, tile_batch, n), what belongs to the last tile repeated."""
        filled = jnp.concatenate([per_tile, jnp.repeat(per_tile[-1:], self._surplus, axis=0)])
        return filled.reshape(self._chunks, -1, per_tile.shape[-1])

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
        conditions: (chunks, tile_batch * B, h, w, C) embedded LQ features.
        passes: one entry for each pass through the UNet: added embeddings (chunks, k, tile_batch, B, E), and text keys
            and values of k * tile_batch * B texts; k is 2 where both sides of the guidance go through together.
    """

    steps: tuple[jax.Array, jax.Array]
    conditions: jax.Array
    passes: list[tuple[jax.Array, Any]]


def prepare(denoiser: Denoiser, plan: SamplingPlan, inputs: SamplingInputs, constrain: Constrain) -> Prepared:
    """Compute what all steps share."""
    tiles = Tiles(plan, inputs.noise.shape)
    time_ids = tiles.in_chunks(inputs.time_ids)

    def condition(places: jax.Array) -> jax.Array:
        return denoiser.alignment.embed(constrain(tiles.cut(inputs.features, places)))

    # Chunk by chunk, so that the LQ features never lie there a second time in overlapping tiles.
    conditions = jax.lax.map(condition, tiles.places)
    # Contexts of one length go through the UNet as one batch, the unconditional half first.
    sides = [inputs.text] if inputs.negative is None else [inputs.negative, inputs.text]
    together = len({side.context.shape[1] for side in sides}) == 1
    groups = [sides] if together else [[side] for side in sides]
    passes = [jax.tree.map(lambda *x: jnp.stack(x), *group) for group in groups]
    visited = jnp.asarray(plan.sampler.timesteps())
    fed = None if denoiser.unet.config.guidance_dim is None else jnp.full(visited.shape, inputs.guidance)
    steps = jnp.asarray(plan.sampler.alphas()), denoiser.unet.embed_timesteps(visited, fed)
    return Prepared(steps, conditions, [_prepare_text(denoiser, side, time_ids) for side in passes])


class Predictor:
    """Predicts the noise of whole latents, tile by tile: what a sampler calls at every step."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: SamplingPlan,
        prepared: Prepared,
        inputs: SamplingInputs,
        words: Words | None,
        constrain: Constrain,
    ):
        """`words` is (tile_batch * B, M, W), or None for no maps."""
        self.denoiser, self.prepared, self.inputs = denoiser, prepared, inputs
        self.words, self.constrain = words, constrain
        self.prediction = plan.sampler.schedule.prediction
        self.tiles = Tiles(plan, inputs.noise.shape)

    def __call__(
        self, x: jax.Array, condition: tuple[jax.Array, jax.Array], memory: Memory
    ) -> tuple[jax.Array, Memory]:
        """(B, H, W, c) of unit variance; (its alpha, the timestep's embedding (E,)) -> noise; and the memory."""
        alpha, time_embedding = condition
        added = [added for added, _ in self.prepared.passes]
        chunks = self.tiles.places, self.prepared.conditions, added
        results = jax.lax.map(functools.partial(self._predict_chunk, x, time_embedding), chunks)
        output, found = jax.tree.map(self.tiles.join, results)
        noise = schedule.noise_at(self.prediction, output, x, alpha)
        clean = None if memory.clean is None else (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
        return noise, Memory(jax.tree.map(jnp.add, memory.maps, found), clean)

    def _predict_chunk(
        self, x: jax.Array, time_embedding: jax.Array, chunk: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the UNet puts out for the tiles of one chunk, both texts guided into one, and the caption's maps."""
        places, condition, added = chunk
        latents = self.tiles.cut(x, places)
        predictions: list[jax.Array] = []
        # The caption's side is the last of the last pass.
        words = [None] * (len(added) - 1) + [self.words]
        for (_, keys_values), of_pass, attributed in zip(self.prepared.passes, added, words, strict=True):
            embedding = time_embedding[None] + of_pass.reshape(-1, of_pass.shape[-1])
            predicted, maps = self.denoiser.attribute(
                self.constrain(latents),
                self.constrain(embedding),
                self.constrain(condition),
                keys_values,
                attributed,
                group=self.tiles.batch,
            )
            predictions += jnp.split(predicted.astype(jnp.float32), len(predicted) // len(latents))
        if self.inputs.negative is None:
            return predictions[0], maps
        unconditional, conditional = predictions
        return samplers.guide(unconditional, conditional, self.inputs.guidance, self.inputs.rescale), maps


def _prepare_text(denoiser: Denoiser, side: Text, time_ids: jax.Array) -> tuple[jax.Array, Any]:
    """One entry of `Prepared.passes`.

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

    def repeat(
        x: jax.Array,
    ) -> jax.Array:  # (depth, k * B, M, heads, dim) -> (depth, k * tile_batch * B, M, heads, dim)
        depth, _, *rest = x.shape
        x = x.reshape(depth, texts, 1, batch, *rest)
        return jnp.broadcast_to(x, (depth, texts, tile_batch, batch, *rest)).reshape(depth, -1, *rest)

    return added, jax.tree.map(repeat, keys_values)
