"""A step that hangs ends its run with every thread's stack; the wait for data is measured, and whose it is."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from faithdiff_jax.training import stopping
from faithdiff_jax.training.stopping import DataWait, Watchdog

HANGS = """
import threading, time
from faithdiff_jax.training.stopping import Watchdog

def deaf():
    time.sleep(60)

dog = Watchdog(1)
for step in range(3):
    with dog.over(f"step {step}"):
        time.sleep(0.5)
time.sleep(1.5)
print("all quiet", flush=True)
threading.Thread(target=deaf).start()
with dog.over("step 3"):
    threading.Event().wait()
"""


def test_a_step_that_hangs():
    begin = time.monotonic()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done
    assert time.monotonic() - begin < 60
    assert done.stdout == "all quiet\n"
    _, line, *stacks = done.stderr.splitlines()
    assert line == "error: step 3 has taken 1 s (step_timeout); what every thread is at:"
    assert any(" in deaf" in frame for frame in stacks)
    assert any(" in wait" in frame for frame in stacks)


def test_without_a_limit_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(stopping.threading, "Timer", None)
    with Watchdog(None).over("step 1"):
        pass


@pytest.mark.parametrize(("others", "told"), [([0.2, 0.2, 0.3], True), ([2.0, 2.5, 2.0], False)])
def test_whose_data_all_wait_for(monkeypatch, caplog, others, told):
    """Two steps of 3 s a step in this process, and of what the other processes say."""
    clock = iter([0.0, 2.0, 10.0, 14.0])
    monkeypatch.setattr(stopping.time, "perf_counter", lambda: next(clock))
    waits = DataWait()
    for _ in range(2):
        with waits.measured():
            pass
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 4)
    gathered = []
    gather = lambda mine: gathered.append(mine) or np.array([*others, mine])  # noqa: E731
    monkeypatch.setattr(stopping.multihost_utils, "process_allgather", gather)
    with caplog.at_level("WARNING", "faithdiff_jax"):
        assert waits.shared() == {"data_seconds": 3.0, "data_slowest_process": 3}
    assert gathered == [3.0]
    assert ("process 3 waits 3.0 s a step for its data" in caplog.text) == told
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 1)
    assert waits.shared() == {"data_seconds": 0.0}
