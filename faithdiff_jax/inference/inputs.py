"""What the denoising program takes: the plan, which is static, and the arrays; and what noise a picture needs.

options, size of the latents --> SamplingPlan: sampler, tiles
arrays that a caller has, options --> SamplingInputs, complete and checked
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.diffusion.sampler import Sampler
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.evaluations import Evaluation, plan_evaluations
from faithdiff_jax.inference.grid import Corners, latent_grid
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig

Normal = Callable[[jax.Array, int], Any]

SAMPLING = (
    "steps",
    "guidance",
    "guidance_rescale",
    "sampler",
    "sigma_spacing",
    "timesteps",
    "tile",
    "overlap",
    "batch",
)
"""The options that sampling reads; the others are for what comes before and after."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is fixed when the program is compiled."""

    sampler: Sampler
    corners: Corners
    """(top, left) of every tile, in latent pixels."""
    tile: tuple[int, int]
    """Height and width of every tile, in latent pixels."""
    tile_batch: int
    """Tiles of each picture that go through the UNet together."""
    evaluations: tuple[Evaluation, ...]
    """Of each step."""
    deepcache_levels: int = 0
    """The finest levels of the UNet, which every step evaluates; 0 if every step evaluates all."""


def make_sampler(options: RestoreOptions, schedule: schedule.ScheduleConfig) -> Sampler:
    """The sampler that options name, for a model's schedule."""
    make = samplers.SAMPLERS[options.sampler]
    return make(schedule, options.evaluated_steps, options.sigma_spacing, options.timesteps)


def plan_sampling(
    options: RestoreOptions, schedule: schedule.ScheduleConfig, height: int, width: int, pictures: int = 1
) -> SamplingPlan:
    """The plan for latents of height x width, of so many pictures; InputError for more tiles than are worked on."""
    options.check_tiles(height, width)
    corners = latent_grid(height, width, options.tile, options.overlap)
    return SamplingPlan(
        sampler=make_sampler(options, schedule),
        corners=corners,
        tile=(min(options.tile, height), min(options.tile, width)),
        tile_batch=min(max(options.batch // pictures, 1), len(corners)),
        evaluations=plan_evaluations(options),
        deepcache_levels=options.deepcache_levels if options.deepcache_interval > 1 else 0,
    )


def noise_shapes(options: RestoreOptions, config: FaithDiffConfig, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of all noise for a padded picture of height x width pixels, by what it is for."""
    factor = config.vae.factor
    shape = (1, size[0] // factor, size[1] // factor, config.vae.latent_channels)
    shapes: dict[str, tuple[int, ...]] = {"start": shape, "encode": shape}
    sampler = make_sampler(options, config.schedule)
    if sampler.needs_step_noise:
        shapes["steps"] = (sampler.steps, *shape)
    return shapes


def drawn_noise(
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    normal: Normal,
    size: tuple[int, int],
    *,
    only: str | None = None,
) -> dict[str, np.ndarray]:
    """The noise of `noise_shapes` from a seed, each from a key of its own.

    Args:
        shapes: (..., h, w, c) by name.
        seed: of all of it.
        normal: (key, count) -> standard normal (count,).
        size: height and width in latent pixels up to which the noise is the one of that size, without any padding;
            what the padding has is from another key.
        only: the one name to draw; None for all.
    """
    key, found = jax.random.key(seed), {}
    for i, (name, shape) in enumerate(shapes.items()):
        if only not in (None, name):
            continue
        own = jax.random.fold_in(key, i)
        inside = (*shape[:-3], *size, shape[-1])
        found[name] = _normal(normal, own, inside)
        if inside != shape:
            padded = _normal(normal, jax.random.fold_in(own, 1), shape)
            padded[..., : size[0], : size[1], :] = found[name]
            found[name] = padded
    return found


def _normal(normal: Normal, key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """`jax.random.normal(key, shape)`, bit for bit, by a program that many shapes share.

    JAX counts an array's numbers through, whatever its shape: the first of a longer one are those of a shorter one.
    """
    count = math.prod(shape)
    return np.array(normal(key, 1 << (count - 1).bit_length())[:count]).reshape(shape)


def check_noise(noise: Mapping[str, Any], options: RestoreOptions, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare noise that is given with `noise_shapes`; "encode" is for the "lr" start alone.

    Raises:
        InputError: some is missing or of another shape.
    """
    faults = []
    for name, shape in shapes.items():
        found = np.shape(noise[name]) if name in noise else None
        if found != shape and (name != "encode" or options.start == "lr"):
            faults.append(f"noise[{name!r}] is {'missing' if found is None else found}: must be {shape}")
    if faults:
        raise InputError(f"{'; '.join(faults)}, standard normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One side of the guidance, a pytree: a context (B, M, D) and its pooled form (B, P), or None for SD 2.1.

    The caption's may be of each tile its own: (B, tiles, M, D) and (B, tiles, P).
    """

    context: Any
    pooled: Any = None

    @property
    def by_tile(self) -> bool:
        """Whether each tile has its own."""
        return np.ndim(self.context) == 4

    def of_each_tile(self, tiles: int) -> "Text":
        """The same with tiles, which all have this one, unless each has its own."""
        if self.by_tile:
            return self
        repeated: Text = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], tiles, axis=1), self)
        return repeated

    @classmethod
    def of(cls, context: ArrayLike, pooled: ArrayLike | None) -> "Text":
        """From arrays of any kind."""
        return cls(context=jnp.asarray(context), pooled=None if pooled is None else jnp.asarray(pooled))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingInputs:
    """The arrays that the program takes, a pytree; None where there is none of a kind.

    Attributes:
        features: (B, H, W, F) LQ features.
        text: the caption's, of all tiles or of each.
        negative: the negative caption's, or None for no guidance.
        noise: (B, H, W, c), standard normal.
        start: (B, H, W, c), scaled latent of the LQ image, or None to start from pure noise.
        step_noise: (steps, B, H, W, c), standard normal, for samplers that need it.
        time_ids: (tiles, B or 1, 6), image size, tile position and target size; like `guidance`, from
            `plan_and_complete`.
        guidance: scalar weight.
        rescale: scalar phi, or None.
    """

    features: Any
    text: Text
    negative: Text | None = None
    noise: Any
    start: Any = None
    step_noise: Any = None
    time_ids: Any = None
    guidance: Any = None
    rescale: Any = None


jax.tree_util.register_dataclass(Text)
jax.tree_util.register_dataclass(SamplingInputs)


def joined(rows: Sequence[SamplingInputs]) -> SamplingInputs:
    """The arrays of several pictures of one padded size as those of one batch; fit for jit."""
    steps = [row.step_noise for row in rows]
    without = [dataclasses.replace(row, step_noise=None) for row in rows]
    together: SamplingInputs = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *without)
    return together if steps[0] is None else dataclasses.replace(together, step_noise=jnp.concatenate(steps, axis=1))


def sampling_options(options: RestoreOptions, changes: Mapping[str, Any]) -> RestoreOptions:
    """A copy with some of the options in `SAMPLING` changed.

    Raises:
        InputError: an option that there is not or that sampling does not read, or a value that is refused.
    """
    changed = options.replace(**changes)
    unread = [name for name in changes if name not in SAMPLING]
    if unread:
        raise InputError(f"{', '.join(unread)}: not used by sample, which takes {', '.join(SAMPLING)}")
    return changed


def plan_and_complete(
    inputs: SamplingInputs,
    options: RestoreOptions,
    config: FaithDiffConfig,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> tuple[SamplingPlan, SamplingInputs]:
    """The plan for these arrays; and the arrays with what options say put in, and without what they make superfluous.

    Args:
        inputs: what a caller has: features, texts, noise, and a start and step noise if need be.
        options: those in `SAMPLING` are read.
        config: the model's.
        image_sizes: (H, W) in pixels of each whole padded picture, or of all; by default, that of the latents.

    Raises:
        InputError: an array that these options or this model need is missing, or there are too many tiles.
    """
    pictures, height, width, _ = inputs.noise.shape
    factor = config.vae.factor
    plan = plan_sampling(options, config.schedule, height, width, pictures)
    step_noise = inputs.step_noise if plan.sampler.needs_step_noise else None
    if plan.sampler.needs_step_noise and step_noise is None:
        raise InputError(
            f"step_noise is None: sampler {options.sampler!r} needs (steps, B, h, w, c) standard normal noise"
        )
    # A UNet that is fed the weight guides by itself.
    guided = any(each.guided for each in plan.evaluations) and config.unet.guidance_dim is None
    negative = inputs.negative if guided else None
    if guided and negative is None:
        raise InputError(f"guidance is {options.guidance}: above 1 it needs negative_context and negative_pooled")
    sides = [side for side in (inputs.text, negative) if side is not None]
    if inputs.text.by_tile and inputs.text.context.shape[1] != len(plan.corners):
        raise InputError(f"context is of {inputs.text.context.shape[1]} tiles: must be of one or {len(plan.corners)}")
    if config.unet.pooled_dim is not None and any(side.pooled is None for side in sides):
        raise InputError("pooled or negative_pooled is None: this model's added embedding needs pooled texts")
    sizes, target = image_sizes or [(height * factor, width * factor)], options.tile * factor
    return plan, dataclasses.replace(
        inputs,
        negative=negative,
        step_noise=step_noise,
        time_ids=np.array([[(*size, *at, target, target) for size in sizes] for at in plan.corners], np.float32),
        guidance=np.float32(options.guidance),
        rescale=np.float32(options.guidance_rescale) if options.guidance_rescale > 0 else None,
    )
