"""Distillation as a training step: a teacher's guidance, or all of its steps, into a student.

    guidance   noisy latent of HQ --teacher, twice--> guided prediction   <--loss-- prediction of the student
    steps      noised latent of LQ --teacher's 20 steps--> latent         <--loss-- latent after the student's 4, 2 or 1

The teacher is the model directory that the run starts from, and so is the student's start. Its parameters are frozen,
and its targets are computed in the student's own step, by the denoising program that restores. What the student
trains, the teacher has again under `teacher.`; under LoRA both share the frozen kernels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from faithdiff_jax.diffusion import samplers, schedule
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference.denoise import denoise
from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_and_complete
from faithdiff_jax.inference.loading import default_options
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.faithdiff import Denoiser
from faithdiff_jax.models.layers import rematerialise
from faithdiff_jax.models.parts import Networks, flatten, part_shapes, unflatten
from faithdiff_jax.models.vae import VAE
from faithdiff_jax.sharding import parameter_sharding
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.distill_config import DistillConfig
from faithdiff_jax.training.lora import PREFIX, merge_adapters
from faithdiff_jax.training.losses import mean_error
from faithdiff_jax.training.optimizer import Flat
from faithdiff_jax.training.parameters import TEACHER, Shapes
from faithdiff_jax.training.step import Batch, Draws, TrainStep, guidance_keys
from faithdiff_jax.weights.model_directory import ModelDirectory

DISTILLED = ("unet", "alignment")
Latents = Float32[Array, "b h w c"]
Compared = tuple[Latents, Latents, Callable[[Latents], Latents]]
"""The student's and the teacher's, and what makes clean latents of them."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a student learns from, but for the parameters.

    Attributes:
        model: the architecture, as it is stored.
        options: how it restores: steps, sampler, guidance.
        negative_ids: the negative caption's token ids (1, M), for each text encoder.
    """

    model: FaithDiffConfig
    options: RestoreOptions
    negative_ids: tuple[np.ndarray, ...]


class _Encoded(NamedTuple):
    """What both see: LQ features, the captions, and the negative caption for each of them."""

    features: Float[Array, "b h w f"]
    text: Text
    negative: Text


def make_step(
    config: TrainConfig,
    model: FaithDiffConfig,
    labels: Mapping[str, str],
    mesh: Mesh | None,
    stored: ModelDirectory,
    tokenizers: Tokenizers,
) -> TrainStep:
    """The step of a run, of whatever kind its configuration says.

    Args:
        config: the run.
        model: the architecture that is trained.
        labels: path -> group of what trains.
        mesh: devices, or None for the default one.
        stored: the model directory that the run starts from.
        tokenizers: the model's.

    Raises:
        InputError: a distillation that this model cannot have.
    """
    if config.losses.guidance is not None and model.unet.guidance_dim is None:
        raise InputError("losses.guidance is fed to the UNet, which needs model.unet.guidance_dim, 64 say")
    if config.distill is None:
        return TrainStep(config, model, labels, mesh)
    options = teacher_options(config.distill, default_options(stored))
    negative_ids = tuple(tokenizers([options.negative_caption]))
    teacher = Teacher(stored.config, options, negative_ids)
    check_distillation(config, model, labels, teacher)
    return DistillStep(config, model, labels, mesh, teacher)


def teacher_options(config: DistillConfig, defaults: RestoreOptions) -> RestoreOptions:
    """How the teacher restores: by its defaults, but for what the configuration says, from the noised LQ latent."""
    given = {"steps": config.teacher_steps, "guidance": config.guidance}
    return defaults.replace(start="lr", **{name: value for name, value in given.items() if value is not None})


def student_options(config: DistillConfig, model: FaithDiffConfig, teacher: RestoreOptions) -> RestoreOptions:
    """How the student restores: the defaults that its exported model has."""
    steps = config.steps if config.method == "steps" else teacher.steps
    guidance = 1.0 if model.unet.guidance_dim is None else teacher.guidance
    return teacher.replace(steps=steps, guidance=guidance, guidance_rescale=0.0)


def exported_defaults(config: TrainConfig, model: FaithDiffConfig, stored: ModelDirectory) -> dict[str, Any]:
    """The defaults of restoring that a run's exported model has and its model directory has not; {} for most runs."""
    if config.distill is None:
        return {}
    student = student_options(config.distill, model, teacher_options(config.distill, default_options(stored)))
    return {name: getattr(student, name) for name in ("steps", "guidance", "guidance_rescale", "start")}


def check_distillation(
    config: TrainConfig, model: FaithDiffConfig, labels: Mapping[str, str], teacher: Teacher
) -> None:
    """See that student, teacher and what trains go together.

    Raises:
        InputError: they do not, with the key and what would be right.
    """
    distill = config.distill
    assert distill is not None
    others = sorted(path for path in labels if path.removeprefix(PREFIX).split(".")[0] not in DISTILLED)
    if others:
        raise InputError(f"distill: {others[0]} trains: UNet and aligner alone may, put the rest into frozen")
    if config.fresh:
        raise InputError(f"distill: fresh has {config.fresh[0]}: a student starts as its teacher, leave it out")
    theirs = teacher.model
    unet = dataclasses.replace(model.unet, guidance_dim=theirs.unet.guidance_dim)
    spacing = dataclasses.replace(model.schedule, spacing=theirs.schedule.spacing)
    if dataclasses.replace(model, unet=unet, schedule=spacing) != theirs:
        raise InputError("distill: model changes more than unet.guidance_dim and schedule.spacing, which a student may")
    fed = model.unet.guidance_dim is not None and theirs.unet.guidance_dim is None
    if fed != (distill.guidance_range is not None):
        raise InputError(
            "distill.guidance_range and model.unet.guidance_dim go together: the weights to draw, and the width at "
            "which the student is fed them"
        )
    if distill.method == "guidance":
        if theirs.unet.guidance_dim is not None:
            raise InputError("distill.method is guidance: this model is fed the weight, guidance is in it already")
        return
    teacher.options.check_against(theirs)
    student_options(distill, model, teacher.options).check_against(model)
    if teacher.options.sampler != "euler":
        raise InputError(f"distill: the model's sampler is {teacher.options.sampler}: a student of steps needs euler")
    if config.noise_offset:
        raise InputError(f"noise_offset is {config.noise_offset:g}: must be 0 to distil steps, as when restoring")


class DistillStep(TrainStep):
    """A training step whose targets are a teacher's; all but the loss is `TrainStep`'s.

    Attributes:
        teacher: what is learnt from.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FaithDiffConfig,
        labels: Mapping[str, str],
        mesh: Mesh | None,
        teacher: Teacher,
    ):
        super().__init__(config, model, labels, mesh)
        assert config.distill is not None
        self.distill, self.teacher = config.distill, teacher
        self._teacher_networks = Networks(teacher.model, self.dtype)

    def frozen_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
        """As in `TrainStep`; with the teacher's own copy of what trains."""
        copies = {f"{TEACHER}{path}": shapes[path] for path in self._copied()}
        return super().frozen_shapes(shapes) | copies

    def teacher_parameters(self, stored: ModelDirectory) -> Flat:
        """Read the teacher's own copy of what trains, in the compute dtype, onto the mesh."""
        assert self.mesh is not None
        copied: Flat = {}
        for part in DISTILLED:
            wanted = {path.removeprefix(f"{part}.") for path in self._copied() if path.startswith(f"{part}.")}
            if not wanted:
                continue
            shapes = part_shapes(self.teacher.model, part)
            sharding = {path: parameter_sharding(self.mesh, shape) for path, shape in shapes.items()}
            loaded = flatten(stored.load(part, dtype=self.dtype, sharding=sharding))
            copied |= {f"{TEACHER}{part}.{path}": loaded[path] for path in wanted}
        return copied

    def loss(
        self, trained: Flat, frozen: Flat, batch: Batch, draws: Draws
    ) -> tuple[Float32[Array, ""], Float32[Array, " b"]]:
        """As in `TrainStep`: the error of the student's predictions or latents against the teacher's."""
        own = {path: array for path, array in frozen.items() if not path.startswith(TEACHER)}
        params = unflatten(merge_adapters(self.config.lora, own | trained))
        student = self.networks.denoiser({part: params[part] for part in DISTILLED})
        with rematerialise(self.config.rematerialisation):
            vae = self.networks.vae(params["vae"])
            encoded = self._encode(params, batch)
            compare = self._predictions if self.distill.method == "guidance" else self._latents
            ours, theirs, to_clean = compare(student, self._teacher(frozen), vae, encoded, batch, draws)
            theirs = jax.lax.stop_gradient(theirs)
            each = self.config.losses.latent * mean_error(self.config.loss, ours, theirs)
            if self.pictures is not None:
                each += self.pictures(*(self.decode(vae, to_clean(latents), batch) for latents in (ours, theirs)))
        return jnp.mean(each), each

    def restored(
        self, denoiser: Denoiser, encoded: Any, start: Latents, noise: Latents, *, of_teacher: bool
    ) -> Latents:
        """The latents (b, h, w, c) that a denoiser restores from the LQ latents (b, h, w, c) and noise like them.

        Args:
            denoiser: the student's, or the teacher's with `of_teacher`.
            encoded: LQ features and texts.
            start: scaled LQ latents.
            noise: standard normal.
            of_teacher: whether by the teacher's schedule, steps and guidance, or by the student's.
        """
        options, model = self.teacher.options, self.teacher.model
        if not of_teacher:
            options, model = student_options(self.distill, self.model, options), self.model
        inputs = SamplingInputs(
            features=encoded.features, text=encoded.text, negative=encoded.negative, noise=noise, start=start
        )
        plan, inputs = plan_and_complete(inputs, options, model)
        return denoise(denoiser, plan, jax.tree.map(jnp.asarray, inputs), self._constrain)

    def without_rematerialisation(self) -> "DistillStep":
        """As in `TrainStep`."""
        plain = super().without_rematerialisation()
        return DistillStep(plain.config, self.model, self.labels, None, self.teacher)

    def _copied(self) -> list[str]:
        """What trains and the teacher has too: all but LoRA's parameters and the projection of the weight."""
        theirs = {f"{part}.{path}" for part in DISTILLED for path in part_shapes(self.teacher.model, part)}
        return [path for path in self.labels if path in theirs]

    def _teacher(self, frozen: Flat) -> Denoiser:
        arrays = {
            f"{part}.{path}": frozen.get(f"{TEACHER}{part}.{path}", frozen.get(f"{part}.{path}"))
            for part in DISTILLED
            for path in part_shapes(self.teacher.model, part)
        }
        return self._teacher_networks.denoiser(unflatten(arrays))

    def _encode(self, params: Mapping[Any, Any], batch: Batch) -> _Encoded:
        given = self.encode_text(params, batch)
        negative_ids = {f"token_ids_{i}": jnp.asarray(ids) for i, ids in enumerate(self.teacher.negative_ids)}
        one = self.encode_text(params, negative_ids)
        negative = [jnp.broadcast_to(array, (len(batch["lq"]), *array.shape[1:])) for array in one]
        features = self.networks.lq_encoder(params["lq_encoder"])(batch["lq"].astype(self.dtype))
        return _Encoded(features, Text.of(*given), Text.of(*negative))

    def _predictions(
        self, student: Denoiser, teacher: Denoiser, vae: VAE, encoded: _Encoded, batch: Batch, draws: Draws
    ) -> Compared:
        """What student and guided teacher predict for noisy HQ latents."""
        latents = vae.sample(vae.moments(batch["hq"].astype(self.dtype)), draws.vae_noise)
        forward = self.model.schedule, latents, draws.noise, draws.timesteps
        noisy = schedule.add_noise(*forward)

        def predict(denoiser: Denoiser, text: Text, weights: Array | None = None) -> Latents:
            texts = text.context, text.pooled
            arrays = noisy, draws.timesteps, encoded.features, *texts, batch["time_ids"], weights
            return denoiser(*arrays).astype(jnp.float32)

        options = self.teacher.options
        weights = draws.guidance
        guided = predict(teacher, encoded.text)
        if weights is not None or options.guidance > 1:
            by = options.guidance if weights is None else weights[:, None, None, None]
            rescale = options.guidance_rescale or None
            guided = samplers.guide(predict(teacher, encoded.negative), guided, by, rescale)
        to_clean = functools.partial(schedule.to_clean, forward[0], noisy=noisy, timestep=draws.timesteps)
        return predict(student, encoded.text, weights), guided, to_clean

    def _latents(
        self, student: Denoiser, teacher: Denoiser, vae: VAE, encoded: _Encoded, batch: Batch, draws: Draws
    ) -> Compared:
        """What student and teacher restore from the same start, each in its own steps."""
        start = vae.sample(vae.moments(batch["lq"].astype(self.dtype)), draws.vae_noise)
        arrays = encoded, start, draws.noise
        ours, theirs = (self.restored(who, *arrays, of_teacher=who is teacher) for who in (student, teacher))
        return ours, theirs, lambda latents: latents

    def _draw(self, part: Batch, step: jax.Array) -> Draws:
        draws = super()._draw(part, step)
        if self.distill.method == "steps":
            # They start where there is nothing but noise, and are reported there.
            return dataclasses.replace(draws, timesteps=jnp.full_like(draws.timesteps, self._last_timestep))
        if self.distill.guidance_range is None or "guidance" in part:
            return draws
        low, high = self.distill.guidance_range

        def one(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (), minval=low, maxval=high)

        weights = jax.vmap(one)(guidance_keys(self.config.seed, step, part["row"]))
        return dataclasses.replace(draws, guidance=weights)

    @property
    def _last_timestep(self) -> int:
        return self.model.schedule.train_steps - 1
