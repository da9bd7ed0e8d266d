"""One of two training processes fails or is killed: it says why, and the other ends soon, with an error."""

import os
import socket
import subprocess
import sys
import time

import pytest
import yaml
from devices import simulated

HEARTBEAT = 10
CONFIG = {
    "steps": 1000,
    "batch": 2,
    "groups": {"alignment": {"parameters": ["alignment.*"], "learning_rate": 1e-2}},
    "frozen": ["unet.*", "lq_encoder.*", "vae.*", "text_encoder*"],
    "data": {"sources": [{"photos": "none"}]},
}

# The command as it is, around a training that only waits for the other process, as a step's collectives do.
SCRIPT = """
import os, signal, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from faithdiff_jax.cli import train
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.training import loop

def waits(config, model, output, **others):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    halves = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_process_local_data(halves, np.ones((1, 4), np.float32))
    step = jax.jit(lambda x: x + x.sum(), out_shardings=halves)
    for number in range(1_000_000):
        x = step(x).block_until_ready()
        if number == 20 and jax.process_index() == FAILS:
            FAILURE

loop.train = waits
train.HEARTBEAT_SECONDS = HEARTBEAT
sys.exit(run_command("train", sys.argv[1:]))
"""
FULL = "raise OSError(28, 'No space left on device', 'checkpoints')"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("failing", "failure", "code"), [(1, FULL, 1), (0, FULL, 1), (1, KILLED, -9)])
def test_the_other_process_ends(tmp_path, failing, failure, code):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = SCRIPT.replace("FAILS", str(failing)).replace("FAILURE", failure).replace("= HEARTBEAT", f"= {HEARTBEAT}")
    flags = ["--config", config, "--model", tmp_path, "--output", tmp_path / "run", "--coordinator", address]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, flags), "--processes", "2", "--process-id", str(i)],
            stderr=subprocess.PIPE,
            env={**os.environ, **simulated(1)},
            text=True,
        )
        for i in range(2)
    ]
    begin = time.monotonic()
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[failing].returncode == code, said
    assert processes[1 - failing].returncode not in (0, None)
    assert time.monotonic() - begin < 100
    if failure is FULL:
        assert "error: checkpoints: no space left on the disk" in said[failing]
