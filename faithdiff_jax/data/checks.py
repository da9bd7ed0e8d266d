"""Checks of configuration fields, written so that NaN, infinity and values of another type fail.

Each raises ValueError naming the field, its value and the limit.
"""

import math
from typing import Any


def is_whole(value: object) -> bool:
    """Whether a value is a whole number: an int, but not a bool, and not a float without a fraction."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def check_whole(config: Any, **limits: tuple[int, int]) -> None:
    """Check that fields are whole numbers within (lowest, highest)."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not (is_whole(value) and low <= value <= high):
            raise ValueError(f"{label(config, name)}: must be a whole number from {low} to {high}")


def check_probability(config: Any, *names: str) -> None:
    """Check that fields are from 0 to 1."""
    for name in names:
        value = getattr(config, name)
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{label(config, name)}: must be a probability, from 0 to 1")


def check_distribution(config: Any, *names: str) -> None:
    """Check that fields are probabilities that sum to one."""
    check_probability(config, *names)
    total = sum(getattr(config, name) for name in names)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        listed = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        raise ValueError(f"{type(config).__name__}: {listed} sum to {total:g}, must sum to 1")


def check_range(
    config: Any, name: str, lowest: float, highest: float, *, around_one: bool = False, whole: bool = False
) -> None:
    """Check that a field is a pair (low, high) with lowest <= low <= high <= highest.

    With `around_one` the pair must enclose 1, with `whole` be of whole numbers.
    """
    value = getattr(config, name)
    try:
        low, high = value
    except (TypeError, ValueError):
        raise ValueError(f"{label(config, name)}: must be two numbers, low and high") from None
    if whole and not (is_whole(low) and is_whole(high)):
        raise ValueError(f"{label(config, name)}: must be two whole numbers")
    if not (is_number(low) and is_number(high) and lowest <= low <= high <= highest):
        raise ValueError(f"{label(config, name)}: must be low <= high, from {lowest:g} to {highest:g}")
    if around_one and not low <= 1 <= high:
        raise ValueError(f"{label(config, name)}: must be low <= 1 <= high")


def label(config: Any, name: str) -> str:
    """How messages name a field with its value: `BlurConfig.sigma = 3`."""
    return f"{type(config).__name__}.{name} = {getattr(config, name)!r:.60}"
