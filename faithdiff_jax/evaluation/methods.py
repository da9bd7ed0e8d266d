"""What is evaluated: methods by their pictures, or by what restores them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import find_caption, read_caption, trim_caption


class Restorer(Protocol):
    """Whatever restores a picture; see `baselines.restorer`."""

    def restore(self, image: UInt8[np.ndarray, "h w 3"], caption: str) -> UInt8[np.ndarray, "H W 3"]: ...  # noqa: D102


@dataclass(frozen=True)
class Method:
    """What is evaluated: pictures that others have restored, or a restorer.

    Attributes:
        name: for tables and files.
        folders: of each set, the folder of the method's pictures.
        load: makes the restorer for a scale; called when there is something to restore.
        settings: what the restorer does, as the results record it.
        ending: what the names of the pictures in `folders` have behind the picture's name, if known.
    """

    name: str
    folders: Mapping[str, Path] = field(default_factory=dict)
    load: Callable[[float], Restorer] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ending: str | None = None


class TimedRestorer:
    """A restorer that is loaded when it is first used, and times what it does."""

    def __init__(self, load: Callable[[float], Restorer] | None):
        self._load = load
        self._restorers: dict[float, Restorer] = {}
        self._sizes: set[tuple[float, ...]] = set()

    @property
    def used(self) -> bool:
        """Whether anything was restored."""
        return bool(self._restorers)

    def __call__(self, low: np.ndarray, caption: str, scale: float) -> tuple[np.ndarray, float | None]:
        """Restore; and the seconds that took, None for the first picture of a size, whose program is compiled."""
        if scale not in self._restorers:
            assert self._load is not None
            self._restorers[scale] = self._load(scale)
        start = time.perf_counter()
        restored = self._restorers[scale].restore(low, caption)
        seconds = time.perf_counter() - start
        size = (scale, *low.shape)
        warm = size in self._sizes
        self._sizes.add(size)
        return restored, seconds if warm else None


def middle(picture: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    """The middle `side` x `side` of a picture.

    Raises:
        InputError: it is smaller.
    """
    height, width = picture.shape[:2]
    if min(height, width) < side:
        raise InputError(f"{width}x{height} pixels, each side must have at least {side}")
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def caption_of(source: Path, folder: Path | None) -> str:
    """The picture's text as the models read it, "" without one."""
    found = None if folder is None else find_caption(source, folder)
    return "" if found is None else trim_caption(read_caption(found))
