"""A service whose model only enlarges, step by step, as its test lets it."""

import contextlib
import io
import threading
import types

import numpy as np
from PIL import Image

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.explain import explain
from faithdiff_jax.errors import Cancelled
from faithdiff_jax.inference import restoration
from faithdiff_jax.inference.loading import default_options, preset_options
from faithdiff_jax.inference.making import Making
from faithdiff_jax.service.app import build_app
from faithdiff_jax.service.guard import Guard
from faithdiff_jax.service.service import Service
from faithdiff_jax.service.settings import ServiceOptions
from faithdiff_jax.weights.model_directory import ModelDirectory

BAD = (13, 13)
"""The size of a picture for which there is no memory."""


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(image, 4, 0), 4, 1)


class Steps:
    """Takes the place of `restore_all`: every step waits until it is let go.

    `batches` has the seeds and sizes of what went through together.
    """

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, tuple[int, int]]]] = []
        self.free = threading.Event()
        self.free.set()
        self.one = threading.Semaphore(0)

    def __call__(self, model, requests, options, *, on_step):
        self.batches.append([(one.seed, one.image.shape[:2]) for one in requests])
        if any(one.image.shape[:2] == BAD for one in requests):
            raise MemoryError
        for step in range(options.steps):
            while not (self.free.is_set() or self.one.acquire(timeout=0.01)):
                pass
            if on_step(step + 1, options.steps, lambda number=0: enlarged(requests[number].image)) is False:
                raise Cancelled("as asked")
        return [restoration.Restored(image=enlarged(one.image), seconds={}) for one in requests]


def stub_model() -> types.SimpleNamespace:
    stored = ModelDirectory.open(SMALL_MODEL)
    return types.SimpleNamespace(
        config=stored.config, defaults=default_options(stored), presets=preset_options(stored), digest=stored.digest
    )


def picture(height: int = 20, width: int = 30, kind: str = "PNG", seed: int = 0) -> bytes:
    rng, file = np.random.default_rng(seed), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@contextlib.contextmanager
def service_of(model=None, *, describe=None, own=None, **settings):
    """A service at work."""
    model = model or stub_model()
    making = Making(model.defaults, getattr(model, "digest", "digest"), {})
    service = Service(model, ServiceOptions(**settings), making, explain, own=own, describe=describe)
    with service.running():
        yield service


def guarded(service: Service) -> Guard:
    return Guard(build_app(service), service.settings)
