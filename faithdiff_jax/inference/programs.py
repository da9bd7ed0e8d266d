"""The compiled programs of a model: jitted pure functions of (parameters, arrays).

Parameters are passed in, so that a program works on any of the right shapes: loaded, trained, quantised or sharded.
"""

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.diffusion.sampler import Carry
from faithdiff_jax.inference import executables
from faithdiff_jax.inference.color import fix_color
from faithdiff_jax.inference.denoise import advance, begin, denoise, denoise_and_attribute
from faithdiff_jax.inference.evaluations import Evaluation
from faithdiff_jax.inference.inputs import SamplingInputs, SamplingPlan, joined
from faithdiff_jax.inference.predictor import Predictor
from faithdiff_jax.inference.prepared import Prepared
from faithdiff_jax.inference.progress import long_task
from faithdiff_jax.models.backend import Place, batches_placed
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.norms import Moments, Shared, sharing
from faithdiff_jax.models.parts import Networks, Params
from faithdiff_jax.sharding import batch_constraint, batch_places

SIZES_KEPT = 4
"""Sizes of picture whose compiled code is kept; one more throws out the one that was used longest ago."""
TILE_SIZES_KEPT = 3 * SIZES_KEPT
"""The same for encoders and decoder, which see up to nine sizes of tile of one large picture."""

Result = TypeVar("Result")


class Program(Generic[Result]):
    """A jitted function that keeps what it compiled for the last few argument shapes only; `function` is it, plain.

    Compiled code is large (tens of megabytes for a denoising program) and jit keeps all of it for ever: a folder of
    photographs of all sizes would fill the memory with it.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        *,
        kept: int = SIZES_KEPT,
        static: tuple[int, ...] = (),
        describe: Callable[..., str] | None = None,
        identity: str | None = None,
        place: Place | None = None,
    ):
        """Wrap a function.

        Args:
            function: pure, of arrays and static values.
            kept: how many shapes.
            static: positions of arguments that are not arrays; hashable.
            describe: names the program to people, from its arguments: "the decoder for 512x512 pixels". What has no
                name compiles without a word.
            identity: what the function is made of beside its arguments, in words; with it, what is compiled is kept
                for other processes where `executables.keep_in` says.
            place: where batches lie, of a mesh (see `models.backend.batches_placed`).
        """
        self.function = function if place is None else _on_mesh(function, place)
        self._kept = kept
        self._static = static
        self._describe = describe
        self._identity = identity
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __call__(self, *arguments: Any) -> Result:
        """Run it, compiled now if these shapes are new."""
        key = self._key(arguments)
        with self._lock:  # rows of a picture are written, and their colours fixed, on a thread
            known = self._compiled.get(key)
            if known is None or (executables.compiles_only() and not isinstance(known, _Executable)):
                return self._first(key, arguments)
            self._compiled.move_to_end(key)
        result: Result = known(*arguments)
        return result

    def _first(self, key: Hashable, arguments: tuple[Any, ...]) -> Result:
        while len(self._compiled) >= self._kept:
            _, oldest = self._compiled.popitem(last=False)
            oldest.clear_cache()
        program = self._stored(arguments)
        if program is not None:
            result: Result = program(*arguments)
        else:
            program = self._jit()
            with self._said(arguments):
                result = program(*arguments)
        self._compiled[key] = program
        return result

    def _stored(self, arguments: tuple[Any, ...]) -> "_Executable | None":
        """The program from the folder of executables, put there now if it was not; None where there is no folder."""
        store, compile_only = executables.kept(), executables.compiles_only()
        if self._identity is None or (store is None and not compile_only):
            return None
        static = [arguments[i] for i in self._static]
        arrays = [argument for i, argument in enumerate(arguments) if i not in self._static]
        key = executables.key_of(self.function.__name__, self._identity, arrays, static)
        compiled = None if store is None else store.load(key)
        if compiled is None:
            with self._said(arguments):
                lowered = self.lower(*arguments)
                compiled = lowered.compile() if store is None else executables.compiled_anew(lowered)
            if store is not None:
                store.save(key, compiled)
        return _Executable(compiled, self._static)

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """What `jax.jit(...).lower` gives: for reading memory and FLOPs without running anything."""
        lowered: jax.stages.Lowered = self._jit().lower(*arguments)
        return lowered

    @property
    def shapes_kept(self) -> int:
        """For how many shapes compiled code is there."""
        return len(self._compiled)

    def _jit(self) -> Any:
        # A function of its own each time: jit shares what it compiled between wrappers of one function.
        def fresh(*arguments: Any) -> Result:
            return self.function(*arguments)

        fresh.__name__ = self.function.__name__
        return jax.jit(fresh, static_argnums=self._static)

    def _key(self, arguments: tuple[Any, ...]) -> Hashable:
        # Parameters too: models of one architecture share programs, but may hold their weights in other ways.
        arrays = [argument for i, argument in enumerate(arguments) if i not in self._static]
        leaves, tree = jax.tree.flatten(arrays)
        shapes = tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        return tree, shapes, tuple(arguments[i] for i in self._static)

    def _said(self, arguments: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
        if self._describe is None:
            return contextlib.nullcontext()
        return long_task(f"compiling {self._describe(*arguments)}", "the first picture of a size takes longer")


class _Executable:
    """A compiled program, called with all arguments as its jitted function is."""

    def __init__(self, compiled: jax.stages.Compiled, static: tuple[int, ...]):
        self._compiled = compiled
        self._static = static

    def __call__(self, *arguments: Any) -> Any:
        if executables.compiles_only():
            return executables.zeros(self._compiled)
        return self._compiled(*[argument for i, argument in enumerate(arguments) if i not in self._static])

    def clear_cache(self) -> None:
        """Nothing: the machine code goes with this object, and nobody else has it."""


class Programs:
    """One attribute a program; each compiles once for every new shape. Results are float32.

    Attributes:
        encode_lq: (lq_encoder, images) -> features.
        moments: (vae, images) -> mean and log-variance of the latent.
        draw: (vae, moments, noise) -> scaled latent.
        decode: (vae, latents) -> images.
        norms: (vae, latents, given, rows, columns) -> moments of the decoder's norms; see `models.norms.Shared`.
        decode_normed: (vae, latents, given, rows, columns) -> images, decoded with these moments.
        encode_text: ([text encoders], [token ids]) -> context, pooled.
        predict_noise: ({unet, alignment}, latents, timesteps, features, context, pooled, time_ids) -> noise.
        sample: ({unet, alignment}, plan, inputs) -> latents; see `denoise`.
        attribute: ({unet, alignment}, plan, inputs, words) -> latents, maps; see `denoise_and_attribute`.
        begin: ({unet, alignment}, plan, inputs) -> what `advance` starts from; `sample` in parts.
        advance: ({unet, alignment}, plan, inputs, prepared, carry, first, last) -> carry; see `denoise.advance`.
        predict_cut: ({unet, alignment}, plan, kind, inputs, prepared, latents, features, chunk, step) -> noise of the
            tiles of one chunk; see `Predictor.predict_cut`.
        join: (None, rows of inputs) -> inputs of a batch; see `joined`.
        normal: (key, count) -> standard normal noise.
        fix_color: (images, references, method, levels, sizes) -> images.
    """

    def __init__(self, config: FaithDiffConfig, *, dtype: Any = jnp.float32, mesh: Mesh | None = None):
        networks = Networks(config, dtype)
        constrain = batch_constraint(mesh)
        factor = config.vae.factor

        def encode_lq(params: Params, images: Array) -> Array:
            return networks.lq_encoder(params)(constrain(images)).astype(jnp.float32)

        def moments(params: Params, images: Array) -> Array:
            return networks.vae(params).moments(constrain(images)).astype(jnp.float32)

        def draw(params: Params, moments: Array, noise: Array) -> Array:
            return networks.vae(params).sample(moments, noise)

        def decode(params: Params, latents: Array) -> Array:
            return networks.vae(params).decode(constrain(latents)).astype(jnp.float32)

        def norms(params: Params, latents: Array, given: Any, rows: Array, columns: Array) -> list[Moments]:
            with sharing(Shared(given, rows, columns)) as shared:
                networks.vae(params).decode(constrain(latents))
            return shared.found

        def decode_normed(params: Params, latents: Array, given: Any, rows: Array, columns: Array) -> Array:
            with sharing(Shared(given, rows, columns)):
                return networks.vae(params).decode(constrain(latents)).astype(jnp.float32)

        def encode_text(params: list[Params], token_ids: list[Array]) -> tuple[Array, Array]:
            context, pooled = networks.encode_text(params, token_ids, constrain)
            return context.astype(jnp.float32), pooled.astype(jnp.float32)

        def predict_noise(params: Params, latents: Array, timesteps: Array, *arrays: Any) -> Array:
            output = networks.denoiser(params)(latents, timesteps, *arrays).astype(jnp.float32)
            return schedule.to_noise(config.schedule, output, latents, timesteps)

        def sample(params: Params, plan: SamplingPlan, inputs: SamplingInputs) -> Array:
            return denoise(networks.denoiser(params), plan, inputs, constrain)

        def attribute(params: Params, plan: SamplingPlan, inputs: SamplingInputs, words: Array) -> tuple[Array, Any]:
            return denoise_and_attribute(networks.denoiser(params), plan, inputs, words, constrain)

        def start(params: Params, plan: SamplingPlan, inputs: SamplingInputs) -> tuple[Prepared, Carry]:
            return begin(networks.denoiser(params), plan, inputs, constrain=constrain, keep_clean=True)

        def walk(params: Params, plan: SamplingPlan, inputs: SamplingInputs, *arrays: Any) -> Carry:
            prepared, carry, first, last = arrays
            part = first, last
            return advance(networks.denoiser(params), plan, inputs, prepared, carry, part=part, constrain=constrain)

        def predict_cut(
            params: Params, plan: SamplingPlan, kind: Evaluation, inputs: SamplingInputs, prepared: Prepared, *cut: Any
        ) -> Array:
            predictor = Predictor(networks.denoiser(params), plan, prepared, inputs, None, constrain)
            return predictor.predict_cut(kind, *cut)

        def join(_: None, rows: Sequence[SamplingInputs]) -> SamplingInputs:
            return joined(rows)

        def normal(key: Array, count: int) -> Array:
            return jax.random.normal(key, (count,))

        def of_images(what: str) -> Callable[..., str]:
            return lambda _, images: f"the {what} for {_pixels(images.shape, 1)}"

        def of_latents(what: str) -> Callable[..., str]:
            return lambda _, latents, *more: f"the {what} for {_pixels(latents.shape, factor)}"

        def of_sampling(_: Params, plan: SamplingPlan, inputs: SamplingInputs, *more: Any) -> str:
            return f"the denoiser for {_pixels(inputs.noise.shape, factor)}, {plan.sampler.steps} steps"

        def of_tiles(_: Params, plan: SamplingPlan, *more: Any) -> str:
            return f"the denoiser for a tile of {_pixels((1, *plan.tile, 1), factor)}"

        program = functools.partial(Program, identity=_identity(config, dtype, mesh), place=batch_places(mesh))
        self.encode_lq = program(encode_lq, kept=TILE_SIZES_KEPT, describe=of_images("LQ encoder"))
        self.moments = program(moments, kept=TILE_SIZES_KEPT, describe=of_images("VAE encoder"))
        self.draw = program(draw)
        self.decode = program(decode, kept=TILE_SIZES_KEPT, describe=of_latents("decoder"))
        self.norms = program(norms, describe=of_latents("decoder's norms"))
        self.decode_normed = program(decode_normed, describe=of_latents("decoder"))
        self.encode_text = program(encode_text)
        self.predict_noise = program(predict_noise)
        self.sample = program(sample, static=(1,), describe=of_sampling)
        self.attribute = program(attribute, static=(1,), describe=of_sampling)
        self.begin = program(start, static=(1,))
        self.advance = program(walk, static=(1,), describe=of_sampling)
        self.predict_cut = program(predict_cut, static=(1, 2), describe=of_tiles)
        self.join = program(join)
        self.normal = program(normal, kept=2 * SIZES_KEPT, static=(1,))  # two shapes a picture with "ddpm"
        self.fix_color = program(fix_color, static=(2, 3))


def _on_mesh(function: Callable[..., Result], place: Place) -> Callable[..., Result]:
    """The function, traced for batches that lie so."""

    @functools.wraps(function)
    def placed(*arguments: Any) -> Result:
        with batches_placed(place):
            return function(*arguments)

    return placed


def _identity(config: FaithDiffConfig, dtype: Any, mesh: Mesh | None) -> str:
    """What the functions of a model close over, in words."""
    devices = None if mesh is None else [device.id for device in mesh.devices.flat]
    return "\n".join(map(str, (config, jnp.dtype(dtype), mesh, devices)))


def _pixels(shape: tuple[int, ...], factor: int) -> str:
    """The size of (B, H, W, C) as people write it, in image pixels."""
    return f"{shape[2] * factor}x{shape[1] * factor} pixels"
