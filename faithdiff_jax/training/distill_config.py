"""What a distillation is: of a run's configuration the section `distill`."""

import dataclasses

from faithdiff_jax.config import Range, check_choice, check_ranges

METHODS = ("guidance", "steps")
STEPS = Range(1, 1000, whole=True)
WEIGHTS = Range(1, 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distil the model directory that the run starts from, the teacher, into the model that the run trains.

    `method` "guidance" teaches the student to predict in one evaluation what the teacher predicts in two, at a random
    noise level (Meng et al. 2023, section 3.1). "steps" teaches it to get in `steps` steps, from the noised LQ latent,
    to where the teacher's sampler gets in `teacher_steps`, guidance included.
    """

    method: str
    steps: int = 4
    """The student's, under "steps"."""
    teacher_steps: int | None = None
    """The teacher's, under "steps"; None for its own default, as for `guidance`."""
    guidance: float | None = None
    """The teacher's weight; 1 for none. A student that is not fed the weight has learnt it and needs guidance 1."""
    guidance_range: tuple[float, float] | None = None
    """Under "guidance", weights to draw evenly from and feed to the student, which needs `model.unet.guidance_dim`;
    `guidance` is then the exported model's default."""

    def __post_init__(self) -> None:
        check_choice(self, "method", METHODS)
        optional = {"optional": True}
        check_ranges(
            self,
            steps=STEPS,
            teacher_steps=dataclasses.replace(STEPS, **optional),
            guidance=dataclasses.replace(WEIGHTS, **optional),
        )
        if self.guidance_range is None:
            return
        low, high = self.guidance_range
        if self.method != "guidance":
            raise ValueError(f"guidance_range is for method guidance: method {self.method} has one weight, guidance")
        if not (low in WEIGHTS and high in WEIGHTS and low < high):
            raise ValueError(f"guidance_range is [{low:g}, {high:g}]: must be two rising numbers from 1 to 100")
        if self.guidance is not None and not low <= self.guidance <= high:
            raise ValueError(f"guidance is {self.guidance:g}: must be in guidance_range, {low:g} to {high:g}")
