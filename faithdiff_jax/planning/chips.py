"""Accelerators by name: what their vendors publish of them, and how a number of them is asked for.

v5e:4x4, v5p:2x2x1   a slice of Google's TPUs by its topology
h100:8, rtx4090:1    so many GPUs of one machine
"""

import dataclasses
import math
import re

from faithdiff_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, by its vendor's figures.

    Attributes:
        tflops: dense bfloat16 with float32 accumulation, TFLOP/s.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        interconnect: bytes/s that a chip sends to others over all its links, one direction.
        topology: for a TPU, the smallest slice that its compiler knows; for a GPU, None.
    """

    tflops: float
    memory: float
    bandwidth: float
    interconnect: float
    topology: str | None = None


# Google Cloud's TPU pages: peak, HBM, its bandwidth, and half of the bidirectional inter-chip bandwidth. NVIDIA's
# datasheets: half of the NVLink (or PCIe) bandwidth, which they give for both directions.
CHIPS = {
    "v4": Chip(275, 32 * 2**30, 1228e9, 300e9 / 2, "2x2x1"),
    "v5e": Chip(197, 16 * 2**30, 819e9, 200e9 / 2, "2x2"),
    "v5p": Chip(459, 95e9, 2765e9, 600e9 / 2, "2x2x1"),
    "v6e": Chip(918, 32 * 2**30, 1638e9, 448e9 / 2, "2x2"),
    "a100": Chip(312, 80e9, 2039e9, 600e9 / 2),
    "h100": Chip(989.5, 80e9, 3350e9, 900e9 / 2),
    "h200": Chip(989.5, 141e9, 4800e9, 900e9 / 2),
    "l40s": Chip(362.05, 48e9, 864e9, 64e9 / 2),
    "rtx4090": Chip(165.2, 24e9, 1008e9, 64e9 / 2),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.topology is not None)
GPUS = tuple(name for name, chip in CHIPS.items() if chip.topology is None)
LARGEST = 8960
"""Chips of the largest pod that there is, a v5p's."""

# What stands for GPUs where a compiler must lay out memory: slices of v5p by their number of chips.
STAND_INS = {1: "2x2x1", 2: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}


@dataclasses.dataclass(frozen=True)
class Target:
    """So many chips of one kind.

    Attributes:
        name: as it was asked for.
        chip: one of them.
        count: how many.
        topology: what TPU's compiler is asked for: "v5e:4x4"; of GPUs, the v5p slice that stands for them.
    """

    name: str
    chip: Chip
    count: int
    topology: str

    @property
    def is_gpu(self) -> bool:
        """Whether memory is laid out by the compiler of another chip."""
        return self.chip.topology is None


def tpu_slice(text: str) -> Target:
    """A slice of TPUs from CHIP:TOPOLOGY, such as v5e:4x4 or v5p:2x2x1.

    Raises:
        InputError: a chip that is not known, or a topology that is not one of its kind.
    """
    name, _, sides = text.partition(":")
    if name not in TPUS:
        raise InputError(f"topology {text!r}: the chip must be one of {', '.join(TPUS)}, as in v5e:4x4")
    chip = CHIPS[name]
    assert chip.topology is not None
    axes = chip.topology.count("x") + 1
    if not re.fullmatch(r"[0-9]{1,3}(x[0-9]{1,3})*", sides) or sides.count("x") + 1 != axes:
        raise InputError(f"topology {text!r}: {name} has {axes} axes, such as {name}:{chip.topology}")
    count = math.prod(map(int, sides.split("x")))
    if not 1 <= count <= LARGEST:
        raise InputError(f"topology {text!r}: {count:,} chips, there are slices of 1 to {LARGEST:,}")
    return Target(text, chip, count, text)


def gpus(text: str) -> Target:
    """GPUs of one machine, or of several, from KIND:COUNT, such as h100:8.

    Raises:
        InputError: a kind that is not known, or a number for which there is no stand-in.
    """
    name, _, number = text.partition(":")
    if name not in GPUS:
        raise InputError(f"gpu {text!r}: the kind must be one of {', '.join(GPUS)}, as in h100:8")
    if not re.fullmatch(r"[0-9]{1,4}", number) or int(number) not in STAND_INS:
        raise InputError(f"gpu {text!r}: the number must be one of {', '.join(map(str, STAND_INS))}, as in {name}:8")
    return Target(text, CHIPS[name], int(number), f"v5p:{STAND_INS[int(number)]}")
