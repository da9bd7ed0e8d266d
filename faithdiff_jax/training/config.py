"""What a training run is, in one file: which parameters train and how fast, on what data, on which devices.

    configs/stage1.yaml --extends--> other files --key=value overrides--> TrainConfig

A run's own copy, with everything resolved, is RUN_DIR/config.yaml.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from faithdiff_jax.config import (
    Range,
    check_choice,
    check_ranges,
    find_config,
    from_dict,
    load_yaml,
    merged,
    override,
    shown,
)
from faithdiff_jax.data.loader import SECONDS, DataConfig
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import metric_info
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.training.distill_config import WEIGHTS, DistillConfig

LOSSES = ("l1", "l2")
DTYPES = ("float32", "bfloat16")
REMATERIALISATIONS = ("none", "full", "dots", "offload")
MOMENTS = (*DTYPES, "int8")
SCHEDULES = ("cosine", "constant")
FRESH = ("alignment", "lq_encoder")


# Steps are counted in int32; everything else is far above what anybody needs, and below what breaks.
STEPS = Range(1, 100_000_000, whole=True)
COUNTS = Range(1, 1_000_000, whole=True)
RATES = Range(0, 10, above=True)
DECAYS = Range(0, 100)
SEEDS = Range(0, 2**32 - 1, whole=True)
EXTENDED_AT_MOST = 16
VALIDATION_SCALE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Parameters that train at one rate.

    `parameters` are patterns over dotted paths, `unet.conv_in.kernel` say, in which `*` stands for any characters.
    """

    parameters: tuple[str, ...]
    learning_rate: float
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError("parameters is empty: a group needs at least one pattern, such as unet.*")
        check_ranges(self, learning_rate=RATES, weight_decay=DECAYS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, as published; `clip` is the largest global norm of the gradients, None for no limit."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = 1.0
    warmup: int = 300
    schedule: str = "cosine"
    momentum_dtype: str = "float32"
    """Of the first moment; "bfloat16" saves two bytes a trained parameter. "int8" holds both moments in 8 bits, with a
    scale for each 64 values (see `eight_bit`), and saves six."""

    def __post_init__(self) -> None:
        below_one = Range(0, 1, below=True)
        # Below 1e-30, float32 divides by what it rounds to zero.
        check_ranges(
            self,
            beta1=below_one,
            beta2=below_one,
            epsilon=Range(1e-30, 1),
            clip=Range(0, 1e9, above=True, optional=True),
            warmup=Range(0, STEPS.high, whole=True),
        )
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "momentum_dtype", MOMENTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """An exponential moving average of the trained parameters; at step s the decay is min(decay, (1+s)/(10+s)).

    Taken every `every` steps, with the decay to that power: what a step long ago weighs is the same.
    """

    decay: float = 0.9999
    every: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, decay=Range(0, 1, below=True), every=COUNTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank updates W + (alpha / rank) A B of frozen kernels (Hu et al. 2021); A and B train as group `group`."""

    parameters: tuple[str, ...] = ("unet.*.attn1.to_*.kernel", "unet.*.attn2.to_*.kernel")
    rank: int = 16
    alpha: float = 16.0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError("parameters is empty: LoRA needs at least one pattern, such as unet.*.to_q.kernel")
        ranks, alphas = Range(1, 2**16, whole=True), Range(0, 2**16, above=True)
        check_ranges(self, rank=ranks, alpha=alphas, learning_rate=RATES, weight_decay=DECAYS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices: `data` x `fsdp`, -1 for what is left; see `sharding.make_mesh`."""

    data: int = 1
    fsdp: int = -1

    def __post_init__(self) -> None:
        sizes = Range(-1, 2**20, whole=True)
        check_ranges(self, data=sizes, fsdp=sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `every` steps and at the end; keep the `latest` newest, and every `keep_every`-th step for good."""

    every: int = 500
    latest: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, every=STEPS, latest=COUNTS, keep_every=dataclasses.replace(STEPS, optional=True))
        if self.keep_every is not None and (self.keep_every < self.every or self.keep_every % self.every):
            raise ValueError(f"keep_every is {self.keep_every}: must be a multiple of every, {self.every}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Restore `count` pictures of each folder every `every` steps, always with the same noise.

    `photos` are high-quality pictures, degraded with a fixed seed at `level` (I, II or III; see
    `data.degradation.degrade.LEVELS`) after a crop from their middle of `crop` pixels, scale 4. `real` are folders of
    pictures that are low-quality already, of which a middle of `crop` / 4 pixels is restored; they have no original.
    `restore` says how they are restored, as on the command line; its seed plays no part. `metrics` are computed under
    `protocol` (see `evaluation.metrics.names` and `evaluation.protocols`): all of them for `photos`, those without
    reference for `real`.
    """

    photos: str | None = None
    real: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("psnr", "ssim", "gmsd", "sharpness")
    protocol: str = "paper"
    every: int = 1000
    count: int = 4
    crop: int = 512
    level: str = "II"
    restore: RestoreOptions = RestoreOptions(scale=VALIDATION_SCALE)
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            every=STEPS,
            count=Range(1, 1000, whole=True),
            crop=Range(1, 4096, whole=True),
            seed=SEEDS,
        )
        check_choice(self, "level", ("I", "II", "III"))
        if self.photos is None and not self.real:
            raise ValueError("photos is missing: a validation needs photos or real, or both")
        for name in self.metrics:
            metric_info(name)
        if self.restore.scale != VALIDATION_SCALE:
            raise ValueError(
                f"restore.scale is {self.restore.scale:g}: must be {VALIDATION_SCALE}, as the degradation's"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is reported: scalars every `every` steps to TensorBoard, and to Weights & Biases if a project is named.

    `peak_tflops` is one device's bfloat16 matrix rate; None to look it up by the device's name.
    """

    every: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        check_ranges(self, every=STEPS, peak_tflops=Range(0, 1e6, above=True, optional=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """Weights of the parts of the loss, for each sample.

    `latent` is that of the published loss, in latents. `pixel` and `lpips` compare pictures in [-1, 1]: what the
    decoder makes of the clean latents that the prediction stands for, and the original (under `distill` the teacher's).
    With one of them, the decoder (`vae.decoder.*`, `vae.post_quant_conv.*`) may train too, and is then not frozen.
    """

    latent: float = 1.0
    pixel: float = 0.0
    lpips: float = 0.0
    """Of LPIPS (alex), for which the weights must be installed; see the metrics."""
    guidance: tuple[float, float] | None = None
    """Two values, one of which each sample draws to be fed to the UNet as its guidance, which needs
    `model.unet.guidance_dim`. LPIPS counts for the second alone, so that one chooses when restoring."""

    def __post_init__(self) -> None:
        weights = Range(0, 1e6)
        check_ranges(self, latent=weights, pixel=weights, lpips=weights)
        if not self.latent + self.pixel + self.lpips:
            raise ValueError("latent, pixel and lpips are all 0: one must be above")
        if self.guidance is None:
            return
        low, high = self.guidance
        if not (low in WEIGHTS and high in WEIGHTS and low < high):
            raise ValueError(f"guidance is [{low:g}, {high:g}]: must be two rising numbers from 1 to 100")

    @property
    def in_pictures(self) -> bool:
        """Whether latents must be decoded for the loss."""
        return bool(self.pixel or self.lpips)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    Every parameter of the model is in exactly one of `groups`, or matched by `frozen`. `model` overrides keys of the
    model directory's architecture; parts whose parameters this changes, or that are to start anew, are named in
    `fresh`: the aligner then starts as published, the LQ encoder as a copy of the VAE's encoder.
    """

    steps: int
    batch: int = 256
    """The global batch: all devices and all `accumulation` rounds of a step."""
    accumulation: int = 1
    seed: int = 0
    groups: Mapping[str, GroupConfig]
    frozen: tuple[str, ...] = ()
    lora: LoRAConfig | None = None
    distill: DistillConfig | None = None
    """None to learn from photographs, as published."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    loss: str = "l1"
    """Of latents and pixels: "l1" or "l2"."""
    losses: LossesConfig = LossesConfig()
    noise_offset: float = 0.02
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig | None = EMAConfig()
    dtype: str = "bfloat16"
    """What the networks compute in, and what frozen parameters are held in; trained ones are float32."""
    rematerialisation: str = "full"
    """Per block: "none" keeps every activation, "dots" the results of matrix products, "full" the blocks' inputs,
    "offload" these in the host's memory."""
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    watch: WatchConfig = WatchConfig()
    stop_after_bad_steps: int = 10
    """Steps in a row whose loss or gradients are not finite; each is left out, this many end the run."""
    step_timeout: float | None = None
    """Seconds after which a step that has not ended, its batch included, ends the run with the stacks of all threads.
    None for no limit; the first step, which compiles, validation and checkpoints have none."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps=STEPS,
            batch=COUNTS,
            accumulation=COUNTS,
            seed=SEEDS,
            noise_offset=Range(0, 10),
            stop_after_bad_steps=COUNTS,
            step_timeout=dataclasses.replace(SECONDS, optional=True),
        )
        if not self.groups and self.lora is None:
            raise ValueError("groups is empty: at least one group of parameters must train")
        if self.losses.guidance is not None and self.distill is not None:
            raise ValueError("losses.guidance is for learning from photographs: leave it or distill out")
        if self.batch % self.accumulation:
            raise ValueError(f"batch is {self.batch}: must be a multiple of accumulation, {self.accumulation}")
        if self.optimizer.warmup >= self.steps and self.optimizer.schedule == "cosine":
            raise ValueError(f"optimizer.warmup is {self.optimizer.warmup}: must be below steps, {self.steps}")
        check_choice(self, "loss", LOSSES)
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "rematerialisation", REMATERIALISATIONS)
        unknown = [part for part in self.fresh if part not in FRESH]
        if unknown:
            raise ValueError(f"fresh has {unknown[0]!r}: must be of {', '.join(FRESH)}")


# What a resumed run may change: none of it bears on the parameters that come out.
FREE_TO_CHANGE = (
    "mesh", "data.workers", "data.prefetch", "data.timeout", "data.bad_file_limit", "checkpoint", "validation", "watch",
    "stop_after_bad_steps", "step_timeout", "rematerialisation",
)  # fmt: skip


def load_train_config(path: pathlib.Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's configuration.

    `path` is a file, or the name of a configuration that comes with the package (`config.find_config`). A file may
    begin with `extends: OTHER.yaml` (beside it, or such a name), whose keys it then overrides one by one, however deep;
    null takes a key's value away, so that a group of the other file can be left out.

    Raises:
        InputError: a file that cannot be read, an unknown key, or a value outside its range.
    """
    path = find_config(str(path))
    data = override(_extended(path, ()), overrides)
    groups = data.get("groups")
    if isinstance(groups, dict):
        data["groups"] = {name: group for name, group in groups.items() if group is not None}
    return train_config(data, str(path))


def train_config(data: Mapping[str, Any], source: str) -> TrainConfig:
    """Build a run's configuration from nested mappings; those of version 0.1.0 are understood.

    Raises:
        InputError: an unknown key, or a value outside its range, with `source` and the key's full name.
    """
    validation = data.get("validation")
    if isinstance(validation, Mapping):
        # Version 0.1.0 had these two beside `photos`, and no others.
        moved = {name: validation[name] for name in ("steps", "guidance") if name in validation}
        if moved and isinstance(validation.get("restore", {}), Mapping):
            kept = {name: value for name, value in validation.items() if name not in moved}
            data = {**data, "validation": {**kept, "restore": {**moved, **validation.get("restore", {})}}}
    return from_dict(TrainConfig, data, source)


def _extended(path: pathlib.Path, seen: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself")
    if len(seen) > EXTENDED_AT_MOST:
        raise InputError(f"{path}: more than {EXTENDED_AT_MOST} files extend one another")
    data = load_yaml(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"{path}: extends is {shown(base)}: must be the name of a file or configuration")
    return merged(_extended(find_config(base, path.parent), (*seen, path.resolve())), data)
