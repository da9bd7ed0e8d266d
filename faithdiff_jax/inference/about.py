"""What is known of an option, of which its flag, its field of a form, its help and its checks are made.

Nothing here imports JAX, so that help and wrong flags need not wait for it.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from faithdiff_jax.config import Range
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files.captions import is_unicode

WHOLE_NUMBERS = tuple[int, ...]
MOST_STEPS = 100_000
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def whole_number(text: str) -> int:
    """ASCII digits: Python's `int` also takes underscores, blanks and other alphabets.

    Raises:
        InputError: anything else.
    """
    if not _WHOLE.fullmatch(text):
        raise InputError(f"{shown(text)}: must be a whole number")
    return int(text)


def number(text: str) -> float:
    """A number, infinity and NaN among them; InputError for anything else."""
    try:
        if not text.isascii() or "_" in text:
            raise ValueError
        return float(text)
    except ValueError:
        raise InputError(f"{shown(text)}: must be a number") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between; InputError for anything else."""
    try:
        return tuple(whole_number(part.strip()) for part in text.split(","))
    except InputError:
        raise InputError(f"{shown(text)}: must be whole numbers with commas between") from None


def truth(text: str) -> bool:
    """true or false; InputError for anything else."""
    if text not in ("true", "false"):
        raise InputError(f"{shown(text)}: must be true or false")
    return text == "true"


READERS: Mapping[Any, Callable[[str], Any]] = {
    bool: truth,
    int: whole_number,
    float: number,
    str: str,
    WHOLE_NUMBERS: whole_numbers,
}
"""Kind -> what makes a value of text; InputError for text of another kind. The range is `About`'s matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of an option: its type, its range, what it is for."""

    kind: Any
    """bool, int, float, str or WHOLE_NUMBERS; None is taken too where it is the default."""
    help: str
    """For people, with the unit; the range and the default are added to it."""
    within: Range | None = None
    """Of numbers."""
    among: tuple[str, ...] = ()
    """The values there are; for strings."""
    flag: str | None = None
    """On the command line, where it is not --name-with-hyphens."""

    @property
    def range(self) -> str:
        """The range in words: "a whole number from 1 to 10"."""
        if self.kind == WHOLE_NUMBERS and self.within is not None:
            return f"whole numbers from {self.within.high} to {self.within.low}, each below the one before"
        if self.within is not None:
            return str(self.within).removeprefix("must be ")
        if self.kind is bool:
            return "true or false"
        return f"one of {', '.join(self.among)}" if self.among else "text"

    def accepted(self, value: Any) -> Any:
        """The value as a plain int, float, str or tuple; ValueError for another type or one out of range."""
        if self.kind == WHOLE_NUMBERS:
            return self._falling(value)
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if self.kind is str:
            if not isinstance(value, str) or (self.among and value not in self.among) or not is_unicode(value):
                raise ValueError
            return str(value)
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            raise ValueError
        try:
            number = self.kind(value)
        except OverflowError:
            raise ValueError from None
        if self.within is not None and number not in self.within:
            raise ValueError
        return number

    def _falling(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list | tuple) or not value or len(value) > MOST_STEPS:
            raise ValueError
        numbers = tuple(dataclasses.replace(self, kind=int).accepted(number) for number in value)
        if any(below >= above for above, below in itertools.pairwise(numbers)):
            raise ValueError
        return numbers


def option(default: Any, help: str, *, kind: Any = None, within: Range | None = None, **more: Any) -> Any:
    """A field of `RestoreOptions`, or of another class of options.

    Args:
        default: the published one.
        help: what it is for.
        kind: of the value; the default's by default.
        within: the numbers there are; whole ones only where `kind` is int.
        more: the other fields of `About`.
    """
    kind = kind or type(default)
    if within is not None:
        within = dataclasses.replace(within, whole=kind is not float)
    about = About(kind=kind, help=help, within=within, **more)
    return dataclasses.field(default=default, metadata={"about": about})


def check_each(options: Any) -> list[str]:
    """Bring the fields of an options object, each from `option`, to their plain types.

    Returns:
        A line for each that is of another type or out of its range; None is right where it is the default.
    """
    faults = []
    for field in dataclasses.fields(options):
        about, value = field.metadata["about"], getattr(options, field.name)
        if value is None and field.default is None:
            continue
        try:
            object.__setattr__(options, field.name, about.accepted(value))
        except ValueError:
            faults.append(f"{field.name} is {shown(value)}: must be {about.range}")
    return faults
