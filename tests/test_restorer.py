"""One interface for everything that restores a picture."""

import numpy as np
import pytest
from PIL import Image

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.baselines.restorer import Bicubic, FaithDiffRestorer
from faithdiff_jax.errors import InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (19, 13, 3), dtype=np.uint8)


def test_bicubic_is_pillows():
    enlarged = Bicubic(4).restore(PICTURE, "ignored")
    assert np.array_equal(enlarged, np.array(Image.fromarray(PICTURE).resize((52, 76), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("scale", [0, -1, float("nan"), 1e9])
def test_bicubic_refuses_a_scale_by_its_value(scale):
    with pytest.raises(InputError, match=r"^scale "):
        Bicubic(scale).restore(PICTURE)


def test_faithdiff_restores_with_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(FaithDiff, "restore", lambda model, *arguments: calls.append(arguments) or PICTURE)
    model = FaithDiff.load(SMALL_MODEL)
    options = model.defaults.replace(scale=2, steps=1)
    restorer = FaithDiffRestorer(model, options)
    assert (restorer.scale, FaithDiffRestorer(model).scale) == (2, model.defaults.scale)
    assert np.array_equal(restorer.restore(PICTURE, "a cat"), PICTURE)
    assert calls == [(PICTURE, "a cat", options)]
