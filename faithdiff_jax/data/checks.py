"""Checks of configuration fields that the data have beside `config.check_ranges`: probabilities, pairs (low, high).

Each raises InputError naming the field, its value and the limit; NaN, infinity and values of another type fail.
"""

import dataclasses
import math

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.errors import InputError, shown

ANY = Range(-math.inf, math.inf, above=True, below=True)
WHOLE = dataclasses.replace(ANY, whole=True)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number: an int, but not a bool, and not a float without a fraction."""
    return value in WHOLE


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float."""
    return value in ANY


def check_probability(config: object, *names: str) -> None:
    """Check that fields are from 0 to 1."""
    check_ranges(config, **dict.fromkeys(names, Range(0, 1)))


def check_distribution(config: object, *names: str) -> None:
    """Check that fields are probabilities that sum to one."""
    check_probability(config, *names)
    total = sum(getattr(config, name) for name in names)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        listed = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        raise InputError(f"{listed} sum to {total:g}: must sum to 1")


def check_pairs(config: object, allowed: Range, *names: str, around_one: bool = False) -> None:
    """Check that fields are pairs (low, high) of numbers within a range; with `around_one` they must enclose 1."""
    for name in names:
        value = getattr(config, name)
        is_pair = isinstance(value, (tuple, list)) and len(value) == 2
        if not (is_pair and all(number in allowed for number in value) and value[0] <= value[1]):
            raise InputError(f"{name} is {shown(value)}: must be two numbers, low and high, each of which {allowed}")
        if around_one and not value[0] <= 1 <= value[1]:
            raise InputError(f"{name} is {shown(value)}: must be low <= 1 <= high")
