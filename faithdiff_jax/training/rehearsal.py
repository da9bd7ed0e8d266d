"""`train --dry-run`: everything that a run does but its steps, so that what would go wrong in the night goes wrong now.

checks -> parameters on the mesh -> first batch of the data -> compiled step, and what it takes of a device's memory
"""

import pathlib
import time
from collections.abc import Iterator

import jax

from faithdiff_jax.files.places import place
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.loop import initial_state
from faithdiff_jax.training.preparation import placed_batch, prepare, step_flops
from faithdiff_jax.training.reporting import timed

GIB = 2**30


def rehearse(config: TrainConfig, model_dir: pathlib.Path | str) -> Iterator[str]:
    """Do all that a new run does up to its first step; nothing is written.

    Args:
        config: the run.
        model_dir: the model directory that it would start from.

    Yields:
        What was found, a line each, when it is known.

    Raises:
        InputError: as `train`.
    """
    prepared = prepare(config, place(model_dir))
    step, mesh = prepared.step, prepared.mesh
    sides = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    yield f"devices: {mesh.size} of {mesh.devices.flat[0].device_kind}, mesh {sides}"
    with timed("reading the parameters"):
        state, frozen = initial_state(step, prepared.stored)
    trained = sum(array.size for array in state["trained"].values())
    yield f"parameters: {trained / 1e6:,.1f} M train in {len(set(step.labels.values()))} groups"
    begin = time.perf_counter()
    with iter(prepared.loader) as batches:
        batch = placed_batch(next(batches), mesh, config.batch)
        yield f"data: the first batch of {config.batch} in {time.perf_counter() - begin:.1f} s"
    begin = time.perf_counter()
    with timed("compiling the training step"):
        compiled = step.run.lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of ours tells
    used = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    of = "" if limit is None else f" of {limit / GIB:.1f}"
    yield f"step: compiled in {time.perf_counter() - begin:.0f} s, {used:.2f} GiB{of} a device, by the compiler"
    yield f"arithmetic: {step_flops(step, prepared.shapes) / 1e12:,.2f} TFLOP a step, {config.steps:,} steps"
    if jax.process_index() == 0:
        yield "nothing was written; the same command without --dry-run starts the run"
