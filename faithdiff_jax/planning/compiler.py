"""What a program takes of a TPU's memory, asked of TPU's own compiler, which needs no TPU: the package libtpu.

The compiler lays out every buffer within minutes, and then generates code for much longer. It can be told to write the
layout down, but not to stop: a process that has its answer leaves with `os._exit`.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np

from faithdiff_jax.errors import InputError, RunError

LAID_OUT = "after_optimizations_after_buffer_assignment.txt"
# libtpu asks the machine what it is, unless it is told; which slice it is told does not limit what is compiled for.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Else a process that ended without its farewell, as ours do, keeps the next one out by a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the compiler put a program's buffers on each device.

    Attributes:
        arguments: bytes of what the program is given and keeps.
        temporary: bytes of all else but the program's own code.
        text: the optimised program, in HLO.
    """

    arguments: int
    temporary: int
    text: str

    def beside(self, held: Mapping[str, int]) -> int:
        """Bytes of all but what is held, by its plain size: arguments are padded to whole tiles."""
        return self.temporary + max(0, self.arguments - sum(held.values()))


def prepare() -> None:
    """Tell libtpu what it needs to know, and JAX to compute on the CPU; before the first array.

    Raises:
        InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            'libtpu, TPU\'s compiler, is not installed: pip install "faithdiff-jax[tpu]", a TPU is not needed'
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def slice_devices(topology: str, count: int) -> np.ndarray:
    """The first `count` devices of a slice such as "v5e:4x4", that may be compiled for.

    Raises:
        InputError: there is no such slice, or libtpu is of another version than this JAX takes, or is being used.
    """
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"topology {topology}: TPU's compiler does not take it ({said})") from error
    return np.array(devices[:count])


def layout(lowered: jax.stages.Lowered) -> Layout:
    """Compile for TPU up to where every buffer has its place, in a thread that is still at work afterwards.

    Raises:
        RunError: the compiler gave up, with what it said: mostly that memory does not suffice.
    """
    with tempfile.TemporaryDirectory() as folder:
        failure: list[Exception] = []

        def run() -> None:
            try:
                lowered.compile(compiler_options={"xla_dump_to": folder})
            except Exception as error:
                failure.append(error)

        threading.Thread(target=run, daemon=True).start()
        while not (done := list(pathlib.Path(folder).glob(f"*{LAID_OUT}"))):
            if failure:
                raise RunError(f"TPU's compiler gave up: {' '.join(str(failure[0]).split())[:600]}")
            time.sleep(0.5)
        name = done[0].name.replace("_after_buffer_assignment", "-buffer-assignment")
        assignment = done[0].with_name(name).read_text()
        return Layout(*_assigned(assignment), done[0].read_text())


def _assigned(assignment: str) -> tuple[int, int]:
    arguments = temporary = 0
    for line in assignment.splitlines():
        if found := re.match(r"allocation \d+: size (\d+), (parameter \d+|preallocated-temp|maybe-live-out)", line):
            if found[2].startswith("parameter"):
                arguments += int(found[1])
            else:
                temporary += int(found[1])
    return arguments, temporary
