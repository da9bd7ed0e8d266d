"""How long a program takes at least, by what it computes, moves and sends, and what a chip can do of each.

The time is a model: all three at their published rates. If they overlap wholly, the slowest counts; if not at all,
their sum. No chip reaches its rates, so that both are lower bounds, the first a loose one.
"""

import dataclasses
from collections.abc import Mapping

from faithdiff_jax.planning.chips import Target
from faithdiff_jax.planning.hlo import Traffic


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run of a program on each chip.

    Attributes:
        arithmetic: in the matrix units.
        memory: to and from the chip's memory.
        interconnect: to other chips.
    """

    arithmetic: float
    memory: float
    interconnect: float

    @property
    def parts(self) -> Mapping[str, float]:
        """Name -> seconds."""
        return dataclasses.asdict(self)

    @property
    def overlapped(self) -> float:
        """Seconds if all three go on at once."""
        return max(self.parts.values())

    @property
    def one_by_one(self) -> float:
        """Seconds if each waits for the others."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """Which of the three is the slowest."""
        return max(self.parts, key=lambda name: self.parts[name])


def roofline(flops: float, traffic: Traffic, target: Target) -> Roofline:
    """The model's times; `flops` are those of all chips together, `traffic` that of one."""
    sent = sum(collective.sent for collective in traffic.collectives)
    return Roofline(
        arithmetic=flops / target.count / (target.chip.tflops * 1e12),
        memory=traffic.memory_bytes / target.chip.bandwidth,
        interconnect=sent / target.chip.interconnect,
    )


def utilisation(model_flops: float, seconds: float, target: Target) -> float:
    """The part of the matrix units' time in which they do what the model needs, 0 to 1 (PaLM's MFU)."""
    return model_flops / (seconds * target.count * target.chip.tflops * 1e12)
