"""What a program takes of a TPU's memory, asked of TPU's own compiler without waiting for the machine code.

The compiler assigns buffers in a few minutes and then generates code for many more. It can be told to write the
assignment down, but not to stop: scripts that have their answer leave with `os._exit`.
"""

import pathlib
import re
import tempfile
import threading
import time

import jax


def assigned_bytes(lowered: jax.stages.Lowered) -> tuple[int, int]:
    """Compile for TPU up to where every buffer has its place, in a thread that is still at work afterwards.

    Returns:
        Bytes of a device's memory for the program's arguments, and for all else but the program's own code.
    """
    with tempfile.TemporaryDirectory() as folder:
        failure: list[Exception] = []

        def run() -> None:
            try:
                lowered.compile(compiler_options={"xla_dump_to": folder})
            except Exception as error:
                failure.append(error)

        threading.Thread(target=run, daemon=True).start()
        while not (done := list(pathlib.Path(folder).glob("*after_optimizations_after_buffer_assignment.txt"))):
            if failure:
                raise SystemExit(f"the compiler gave up: {str(failure[0])[:600]}")
            time.sleep(1)
        name = done[0].name.replace("_after_buffer_assignment", "-buffer-assignment")
        lines = (pathlib.Path(folder) / name).read_text().splitlines()
    arguments = temporary = 0
    for line in lines:
        if found := re.match(r"allocation \d+: size (\d+), (parameter \d+|preallocated-temp|maybe-live-out)", line):
            if found[2].startswith("parameter"):
                arguments += int(found[1])
            else:
                temporary += int(found[1])
    return arguments, temporary
