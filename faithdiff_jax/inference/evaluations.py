"""What each step evaluates: both sides of the guidance or one, all of the UNet or its finest levels, text or not.

guidance in a part of the schedule   Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval"
DeepCache                            deep levels every few steps, see `models.reuse`
T-GATE                               guided up to the gate; then without guidance, the text's effect taken over
"""

import dataclasses

from faithdiff_jax.inference.options import RestoreOptions


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One step's.

    Attributes:
        guided: both sides of the guidance are evaluated, if there are two.
        shallow: only the finest levels are, and take over what the deep ones gave at the last step that had them.
        keep_attended: what attention to the text gives is kept.
        frozen: what was kept stands in the place of attention to the text.
    """

    guided: bool
    shallow: bool = False
    keep_attended: bool = False
    frozen: bool = False


def plan_evaluations(options: RestoreOptions) -> tuple[Evaluation, ...]:
    """One for each step. The deep levels are evaluated again wherever guidance sets in or ends, and at the gate."""
    steps = options.evaluated_steps
    # At least the first step attends to the text.
    gate = next((step for step in range(1, steps) if step / steps >= options.tgate_after), steps)
    planned: list[Evaluation] = []
    since = 0  # steps since the deep levels were evaluated
    for step in range(steps):
        frozen = step >= gate
        keep = step == gate - 1 and gate < steps
        inside = options.guidance_start <= step / steps < options.guidance_end
        guided = options.guidance > 1 and inside and not frozen
        changed = step == 0 or guided != planned[-1].guided or frozen != planned[-1].frozen
        shallow = not (changed or keep) and since + 1 < options.deepcache_interval
        since = since + 1 if shallow else 0
        planned.append(Evaluation(guided, shallow, keep, frozen))
    return tuple(planned)
