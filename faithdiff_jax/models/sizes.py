"""Ranges of the whole numbers in a configuration, checked before anything is built from them."""

import typing
from typing import Any

from faithdiff_jax.config import Range
from faithdiff_jax.errors import shown

LARGEST_WIDTH = 65_536
MOST_LAYERS = 256
MOST_LEVELS = 10


def check_sizes(config: Any, least: int, most: int, *names: str) -> None:
    """Raise ValueError unless the fields named are whole numbers from `least` to `most`.

    A field whose default is a tuple holds one per level, each of which is checked; None passes where its type has it.
    """
    for name in names:
        value = getattr(config, name)
        if value is None and type(None) in typing.get_args(config.__dataclass_fields__[name].type):
            continue
        per_level = isinstance(getattr(type(config), name), tuple)
        if isinstance(value, tuple) != per_level:
            wanted = "a list, one whole number per level" if per_level else "a whole number"
            raise ValueError(f"{name} is {shown(value)}: must be {wanted}")
        allowed = Range(least, most, whole=True)
        if any(size not in allowed for size in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is {shown(value)}: {allowed}")


def check_levels(channels: tuple[int, ...]) -> None:
    """Raise ValueError unless there is a level, and no more than any picture has."""
    if not isinstance(channels, tuple):
        raise ValueError(f"channels is {shown(channels)}: must be a list, one whole number per level")
    if not channels:
        raise ValueError("channels is empty: at least one level is needed")
    if len(channels) > MOST_LEVELS:
        raise ValueError(f"channels has {len(channels)} levels: must have at most {MOST_LEVELS}")
