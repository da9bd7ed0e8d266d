"""Ranges of the whole numbers in a configuration, checked before anything is built from them."""

from typing import Any

LARGEST_WIDTH = 65_536
MOST_LAYERS = 256
MOST_LEVELS = 10


def check_sizes(config: Any, least: int, most: int, *names: str) -> None:
    """Raise ValueError unless the fields named are whole numbers from `least` to `most`.

    A tuple is checked number by number, and None is passed over.
    """
    for name in names:
        value = getattr(config, name)
        for size in value if isinstance(value, tuple) else () if value is None else (value,):
            if not isinstance(size, int) or isinstance(size, bool):
                raise ValueError(f"{name} is {value!r}: must be a whole number")
            if size < least:
                raise ValueError(f"{name} is {value}: must be at least {least}")
            if size > most:
                raise ValueError(f"{name} is {value}: must be at most {most:,}")


def check_levels(channels: tuple[int, ...]) -> None:
    """Raise ValueError unless there is a level, and no more than any picture has."""
    if not channels:
        raise ValueError("channels is empty: at least one level is needed")
    if len(channels) > MOST_LEVELS:
        raise ValueError(f"channels has {len(channels)} levels: must have at most {MOST_LEVELS}")
