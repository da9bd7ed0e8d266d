"""Folders for `faithdiff restore`, and a model that only enlarges, in this process and in others."""

import json
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.files.manifest import NAME
from faithdiff_jax.inference.restoration import Restored
from faithdiff_jax.weights.model_directory import ModelDirectory

STUB = """
import sys, time, types
import numpy as np
from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli import restore
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.inference import restoration
from faithdiff_jax.weights.model_directory import ModelDirectory

def restore_all(model, requests, options):
    time.sleep(float(sys.argv[1]))
    return [restoration.Restored(image=np.repeat(np.repeat(one.image, 4, 0), 4, 1), seconds={}) for one in requests]

restoration.restore_all = restore_all
restore.load_model = lambda *given: types.SimpleNamespace(config=ModelDirectory.open(SMALL_MODEL).config)
print("begins", flush=True)
sys.exit(run_command("restore", sys.argv[2:]))
"""


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(image, 4, 0), 4, 1)


def enlarging(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[tuple[int, int], int]]]:
    """Let the model only enlarge, and run out of memory at 13x13: what went through it.

    Of each picture, by batches, its size and seed.
    """
    seen = []

    def restore_all(model, requests, options):
        seen.append([(one.image.shape[:2], one.seed) for one in requests])
        if any(one.image.shape[:2] == (13, 13) for one in requests):
            raise MemoryError
        return [Restored(image=enlarged(one.image), seconds={"denoise": 0.1}) for one in requests]

    model = types.SimpleNamespace(config=ModelDirectory.open(SMALL_MODEL).config)
    monkeypatch.setattr("faithdiff_jax.cli.restore.load_model", lambda *given: model)
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", restore_all)
    return seen


def opened(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def write(folder: pathlib.Path, **sizes: tuple[int, int]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def restore(*arguments: object) -> int:
    return run_command("restore", [str(argument) for argument in arguments])


def records(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def started(tmp_path: pathlib.Path, seconds: float, *flags: str, count: int = 1) -> list[subprocess.Popen]:
    """So many processes that restore tmp_path/in into tmp_path/out, each batch in so many seconds."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    given = ["--input", tmp_path / "in", "--output", tmp_path / "out", *flags]
    command = [sys.executable, stub, str(seconds), *given]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "begins\n"
    return processes


def wait_for(ready: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(out: pathlib.Path) -> int:
    return (out / NAME).read_bytes().count(b"\n") if (out / NAME).exists() else 0
