"""What every test file shares: float32 means float32, a fixed seed, and array shapes that are checked."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from devices import simulated

os.environ.update(simulated(8) | dict(os.environ))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the package is imported: from here on its functions that state an array's shape refuse what does not have it.
# Commands that a test starts run without, as users' do. Only modules that state shapes: the hook wraps each function of
# a module, and on all of them that took a seventh of the time of a run.
ROOT = Path(__file__).parent.parent
STATE_SHAPES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "faithdiff_jax").rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
jaxtyping.install_import_hook(STATE_SHAPES, "typechecking.checked")


# Traced programs are millions of objects that live on: looking through them for garbage again and again took a tenth of
# the time of a run.
gc.set_threshold(100_000, 20, 100)

# The same examples on every run, and as much time as a busy machine takes.
settings.register_profile("project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# A worker that took one of these last would keep the others waiting for minutes.
LONGEST_FILES = ("test_training_run", "test_training_step", "test_pipeline", "test_docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first."""
    items.sort(key=lambda item: (*LONGEST_FILES, item.path.stem).index(item.path.stem))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks on shapes, for tests of what our own messages say to a wrong type or shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
