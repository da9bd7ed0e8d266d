"""The noise of whole latents at one step: tiles through the UNet, guided, blended; and what steps take from another."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.inference.evaluations import Evaluation
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan
from faithdiff_jax.inference.prepared import Constrain, Prepared, TextPass, Tiles
from faithdiff_jax.models.attribution import Words
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.models.reuse import Reuse


class Reusable(NamedTuple):
    """What steps take over from earlier ones, of all chunks of tiles.

    Attributes:
        deep: of each side of the guidance, (chunks, tile_batch * B, h, w, C): what the UNet's deep levels gave.
        attended: of each transformer, (chunks, depth, tile_batch * B, N, C): what attention to the text gave, the mean
            over both sides.
    """

    deep: tuple[jax.Array, ...] = ()
    attended: tuple[jax.Array, ...] = ()


class Memory(NamedTuple):
    """What is taken from step to step beside the latents; None for what nobody asks for.

    Attributes:
        maps: (B, H, W, W'), the sum of the words' maps so far.
        clean: (B, H, W, c), what the last prediction says the clean latent is.
        reusable: what later steps may take over.
    """

    maps: jax.Array | None = None
    clean: jax.Array | None = None
    reusable: Reusable = Reusable()


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
        self.denoiser, self.plan, self.prepared, self.inputs = denoiser, plan, prepared, inputs
        self.words, self.constrain = words, constrain
        self.prediction = plan.sampler.schedule.prediction
        self.tiles = Tiles(plan, inputs.noise.shape)
        self.kinds = tuple(dict.fromkeys(plan.evaluations))

    def conditions(self) -> Any:
        """What differs from step to step, with a leading axis of steps."""
        if len(self.kinds) == 1:
            return self.prepared.steps, None
        return self.prepared.steps, jnp.array([self.kinds.index(each) for each in self.plan.evaluations], jnp.int32)

    def empty_memory(self, *, keep_clean: bool) -> Memory:
        """What there is before the first step, which takes over nothing: zeros of the right shapes."""
        latents = self.inputs.noise
        empty = Memory(clean=jnp.zeros_like(latents) if keep_clean else None)
        if not (self.plan.deepcache_levels or any(kind.frozen for kind in self.kinds)):
            return empty
        full = Evaluation(guided=True, keep_attended=any(kind.frozen for kind in self.kinds))
        nothing = jax.tree.map(lambda x: x[0], self.prepared.steps)[1]
        found = jax.eval_shape(lambda x, step: self._evaluate(full, x, step, Reusable())[2], latents, nothing)
        return empty._replace(reusable=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found))

    def __call__(self, x: jax.Array, condition: Any, memory: Memory) -> tuple[jax.Array, Memory]:
        """(B, H, W, c) of unit variance and a slice of `conditions` -> noise; and the memory."""
        (alpha, time_embedding), kind = condition
        evaluate = [functools.partial(self._evaluate, each) for each in self.kinds]
        given = x, time_embedding, memory.reusable
        output, found, reusable = evaluate[0](*given) if kind is None else jax.lax.switch(kind, evaluate, *given)
        noise = schedule.noise_at(self.prediction, output, x, alpha)
        clean = None if memory.clean is None else (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
        return noise, Memory(jax.tree.map(jnp.add, memory.maps, found), clean, reusable)

    def _evaluate(
        self, kind: Evaluation, x: jax.Array, time_embedding: jax.Array, reusable: Reusable
    ) -> tuple[jax.Array, jax.Array | None, Reusable]:
        """What the UNet puts out for whole latents, the caption's maps, and what later steps may take over."""
        passes = self._passes(kind.guided)
        sides = sum(texts.added.shape[1] for texts in passes)
        taken = Reusable(
            deep=reusable.deep[-sides:] if kind.shallow else (), attended=reusable.attended if kind.frozen else ()
        )
        shared = [texts.shared for texts in passes]
        chunks = self.tiles.places, self.prepared.conditions, [(texts.added, texts.own) for texts in passes], taken
        predict = functools.partial(self._predict_chunk, kind, x, time_embedding, shared)
        output, found, new = jax.lax.map(predict, chunks)
        output, found = jax.tree.map(self.tiles.join, (output, found))
        kept = Reusable(
            # A step without guidance knows the caption's side alone.
            deep=(*reusable.deep[: len(reusable.deep) - len(new.deep)], *new.deep),
            attended=new.attended or reusable.attended,
        )
        return output, found, kept

    def _passes(self, guided: bool) -> list[TextPass]:
        """What goes through the UNet: `Prepared.passes`, of which the caption's side is the last of the last."""
        passes = self.prepared.passes
        if guided or self.inputs.negative is None:
            return passes
        added, shared, own = passes[-1]
        others = added.shape[1] - 1

        def last(x: jax.Array) -> jax.Array:  # (depth, k * tile_batch * B, ...)
            return x[:, others * x.shape[1] // (others + 1) :]

        if own is not None:
            shared = None
        elif others:
            shared = jax.tree.map(last, shared)
        return [TextPass(added[:, others:], shared, own)]

    def _predict_chunk(
        self, kind: Evaluation, x: jax.Array, time_embedding: jax.Array, shared: Sequence[Any], chunk: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array | None, Reusable]:
        """The same for the tiles of one chunk."""
        places, condition, of_tiles, taken = chunk
        passes = [TextPass(added, each, own) for each, (added, own) in zip(shared, of_tiles, strict=True)]
        return self._predict_tiles(kind, self.tiles.cut(x, places), time_embedding, passes, (condition, taken))

    def _text_of(self, texts: TextPass) -> Any:
        """Keys and values of the texts of one chunk."""
        if texts.own is None:
            return texts.shared
        own = self.denoiser.project_text(self.constrain(texts.own))
        if texts.shared is None:
            return own
        return jax.tree.map(lambda *sides: jnp.concatenate(sides, axis=1), texts.shared, own)

    def predict_cut(
        self, kind: Evaluation, latents: jax.Array, features: jax.Array, chunk: jax.Array, step: jax.Array
    ) -> jax.Array:
        """The same for tiles that were cut out outside, of steps that take nothing over from one another.

        Args:
            kind: of the evaluation.
            latents: (tile_batch * B, h, w, c) of unit variance.
            features: (tile_batch * B, h, w, F), LQ features.
            chunk: which one these tiles are.
            step: which one this is.
        """
        passes = [
            TextPass(added[chunk], shared, None if own is None else own[chunk])
            for added, shared, own in self._passes(kind.guided)
        ]
        condition = self.denoiser.alignment.embed(self.constrain(features))
        return self._predict_tiles(kind, latents, self.prepared.steps[1][step], passes, (condition, Reusable()))[0]

    def _predict_tiles(
        self,
        kind: Evaluation,
        latents: jax.Array,
        time_embedding: jax.Array,
        passes: Sequence[TextPass],
        given: tuple[jax.Array, Reusable],
    ) -> tuple[jax.Array, jax.Array | None, Reusable]:
        """The same for tiles that are cut out, `passes` without chunks: both texts guided into one."""
        condition, taken = given
        predictions: list[jax.Array] = []
        deep: list[jax.Array] = []
        attended: list[tuple[jax.Array, ...]] = []
        to_take = list(taken.deep)
        # The caption's side is the last of the last pass.
        words = [None] * (len(passes) - 1) + [self.words]
        for texts, attributed in zip(passes, words, strict=True):
            sides = texts.added.shape[0]
            embedding = time_embedding[None] + texts.added.reshape(-1, texts.added.shape[-1])
            of_sides, to_take = to_take[:sides], to_take[sides:]
            evaluated = self.denoiser.evaluate(
                self.constrain(latents),
                self.constrain(embedding),
                self.constrain(condition),
                taken.attended if kind.frozen else self._text_of(texts),
                attributed,
                Reuse(
                    self.plan.deepcache_levels,
                    self.constrain(jnp.concatenate(of_sides)) if kind.shallow else None,
                    kind.keep_attended,
                ),
                group=self.tiles.batch,
            )
            maps = evaluated.maps
            predictions += jnp.split(evaluated.noise.astype(jnp.float32), sides)
            if evaluated.deep is not None:
                deep += of_sides if kind.shallow else jnp.split(evaluated.deep, sides)
            if kind.keep_attended:
                attended += zip(*(jnp.split(x, sides, axis=1) for x in evaluated.attended), strict=True)
        # As published, what is kept of the text is the mean over both sides.
        mean = tuple(sum(of_sides[1:], start=of_sides[0]) / len(of_sides) for of_sides in zip(*attended, strict=True))
        new = Reusable(tuple(deep), mean)
        if len(predictions) == 1:
            return predictions[0], maps, new
        unconditional, conditional = predictions
        return samplers.guide(unconditional, conditional, self.inputs.guidance, self.inputs.rescale), maps, new
