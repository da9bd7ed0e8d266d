"""What a program would take of machines that are not there: memory, arithmetic, traffic and, by a model, time."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from faithdiff_jax.planning.chips import Target
from faithdiff_jax.planning.hlo import Traffic
from faithdiff_jax.planning.roofline import Roofline, roofline, utilisation

GIB = 2**30
COLLECTIVES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One program on one target.

    Attributes:
        title: what it is, in a line.
        target: the chips.
        held: bytes on each chip of what stays between runs of the program, by what it is.
        temporary: bytes on each chip of all else, by the compiler's layout.
        model_flops: what the model needs in one run, on all chips together.
        all_flops: the same with what is computed again to save memory.
        traffic: what a run moves on each chip.
        repeats: how often the program runs: steps of a training.
        advice: what to change first where it does not fit.
    """

    title: str
    target: Target
    held: Mapping[str, int]
    temporary: int
    model_flops: float
    all_flops: float
    traffic: Traffic
    repeats: int | None = None
    advice: str | None = None

    def with_advice(self, advice: str) -> "Plan":
        """The same, with what to change first."""
        return dataclasses.replace(self, advice=advice)

    @property
    def memory(self) -> int:
        """Bytes on each chip, all together."""
        return sum(self.held.values()) + self.temporary

    @property
    def fits(self) -> bool:
        """Whether a chip has that much."""
        return self.memory <= self.target.chip.memory

    @property
    def time(self) -> Roofline:
        """Seconds of one run, by the model."""
        return roofline(self.all_flops, self.traffic, self.target)

    @property
    def utilisations(self) -> tuple[float, float]:
        """Of the matrix units, 0 to 1, for what the model needs: if nothing overlaps, and if everything does."""
        time = self.time
        return (
            utilisation(self.model_flops, time.one_by_one, self.target),
            utilisation(self.model_flops, time.overlapped, self.target),
        )

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON: bytes, FLOPs, seconds, and parts from 0 to 1."""
        return {
            "title": self.title,
            "target": self.target.name,
            "chips": self.target.count,
            "bytes_held": dict(self.held),
            "bytes_temporary": self.temporary,
            "bytes_of_a_chip": self.target.chip.memory,
            "fits": self.fits,
            "model_flops": self.model_flops,
            "all_flops": self.all_flops,
            "memory_bytes_moved": self.traffic.memory_bytes,
            "collectives": [dataclasses.asdict(collective) for collective in self.traffic.collectives],
            "seconds": dict(self.time.parts),
            "seconds_overlapped": self.time.overlapped,
            "seconds_one_by_one": self.time.one_by_one,
            "utilisation": self.utilisations,
            "repeats": self.repeats,
            "advice": self.advice,
        }

    def json(self) -> str:
        """`as_dict` on one line."""
        return json.dumps(self.as_dict())

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        chip, time = self.target.chip, self.time
        limit = chip.memory / GIB
        yield self.title
        spare = (chip.memory - self.memory) / GIB
        verdict = f"fits, {spare:.1f} GiB to spare" if self.fits else f"does not fit, {-spare:.1f} GiB too much"
        yield _line("memory of a chip", f"{self.memory / GIB:.2f} GiB of {limit:.1f}: {verdict}")
        for name, size in self.held.items():
            yield _line(f"  {name}", f"{size / GIB:.2f} GiB")
        yield _line("  temporary", f"{self.temporary / GIB:.2f} GiB, without the program's own code")
        again = self.all_flops / self.model_flops - 1
        extra = f", and {again:.0%} computed again to save memory" if again > 0.005 else ""
        yield _line("arithmetic", f"{self.model_flops / 1e12:,.2f} TFLOP on all chips{extra}")
        yield _line("memory traffic", f"{self.traffic.memory_bytes / 1e9:,.2f} GB on each chip")
        sent = sum(collective.sent for collective in self.traffic.collectives)
        yield _line("sent by each chip", f"{sent / 1e9:,.2f} GB")
        for collective in self.traffic.collectives[:COLLECTIVES_SHOWN]:
            yield _line(
                f"  {collective.kind}",
                f"{collective.count:,} of {collective.size / 2**20:,.1f} MiB among {collective.devices}",
            )
        if left := self.traffic.collectives[COLLECTIVES_SHOWN:]:
            rest = sum(collective.sent for collective in left)
            yield _line("  others", f"{sum(c.count for c in left):,}, {rest / 1e9:,.2f} GB together")
        each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in time.parts.items())
        yield _line("time, by a model", f"{time.overlapped:.3g} to {time.one_by_one:.3g} s: {each}")
        low, high = self.utilisations
        yield _line("utilisation", f"{low:.0%} to {high:.0%} of the matrix units; {time.limit} is the slowest")
        if self.repeats is not None:
            low, high = (seconds * self.repeats / 3600 for seconds in (time.overlapped, time.one_by_one))
            days = "" if high < 48 else f", {low / 24:.3g} to {high / 24:.3g} days"
            yield _line(f"{self.repeats:,} steps", f"{low:.3g} to {high:.3g} hours{days}")
        if self.target.is_gpu:
            yield f"Memory and traffic are those of {self.target.topology}: nothing compiles for an absent GPU."
        yield "Times are lower bounds, of published rates: no chip reaches them."
        if self.advice is not None:
            yield f"Change first: {self.advice}"


def _line(name: str, text: str) -> str:
    return f"{name:22}{text}"
