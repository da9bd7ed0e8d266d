"""What restoring takes: peak memory, as far as the platform tells."""

import resource
import sys
from dataclasses import dataclass
from typing import Literal

from faithdiff_jax.config import Range, check_ranges


@dataclass(frozen=True)
class Peak:
    """The most memory that was held since the process began, in bytes."""

    size: int
    where: Literal["device", "resident"]

    def __post_init__(self) -> None:
        check_ranges(self, size=Range(0, 2**60, whole=True))

    @property
    def mebibytes(self) -> float:
        """The size in MiB."""
        return self.size / 2**20


def peak_memory() -> Peak:
    """Peak memory of the first device, where its platform reports it (GPU, TPU), otherwise the process's resident one.

    Either holds for the process as a whole: it cannot be set back.
    """
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return Peak(int(statistics["peak_bytes_in_use"]), "device")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Peak(size if sys.platform == "darwin" else size * 1024, "resident")
