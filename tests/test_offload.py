"""Parts that do not denoise, in the host's memory: the same picture, and nothing of them left on the device."""

import jax
import numpy as np
import pytest
from converted import loaded, published_and_converted
from test_pipeline import photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.loading import DENOISING
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.sharding import make_mesh


def load(**options) -> FaithDiff:
    return FaithDiff.load(published_and_converted()[1], offload=True, **options)


def on_device(params) -> set[str]:
    return {part for part in params if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params[part]))}


def test_the_picture_is_the_same_and_only_what_denoises_stays_on_the_device():
    model = load()
    assert on_device(model.params) == set(DENOISING)
    assert on_device(loaded().params) == set(model.params)
    image = photograph(16, 24)
    before = {array.unsafe_buffer_pointer() for array in jax.live_arrays() if len(array.devices()) == 1}
    restored = model.restore(image, "the cat", steps=2, scale=1)
    after = {array.unsafe_buffer_pointer() for array in jax.live_arrays() if len(array.devices()) == 1}
    assert after <= before
    np.testing.assert_array_equal(restored, loaded().restore(image, "the cat", steps=2, scale=1))


def test_on_a_mesh_and_in_8_bits():
    model = load(mesh=make_mesh(data=4, fsdp=2), quantized="int8")
    assert on_device(model.params) == set(DENOISING)
    assert model.restore(photograph(16, 24), steps=1, scale=1).shape == (16, 24, 3)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="offload is true: must be false where several processes share a model"):
        load()
