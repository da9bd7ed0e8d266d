"""What every test file shares: float32 means float32, and a fixed seed."""

import os

from devices import simulated

os.environ.update(simulated(8) | dict(os.environ))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


# A worker that took one of these last would keep the others waiting for minutes.
LONGEST_FILES = ("test_training_run", "test_training_step", "test_pipeline", "test_docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first."""
    items.sort(key=lambda item: (*LONGEST_FILES, item.path.stem).index(item.path.stem))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
