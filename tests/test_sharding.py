"""Meshes and layouts on eight simulated devices: where arrays lie changes no result."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from parity import relative_error
from port import normal

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.sharding import (
    SMALLEST_SPLIT,
    batch_constraint,
    batch_sharding,
    make_mesh,
    parameter_sharding,
)

UNET = UNetConfig(
    channels=(32, 64),
    resnets_per_level=1,
    transformer_depth=(0, 1),
    mid_transformer_depth=2,
    heads=(2, 4),
    context_dim=48,
    pooled_dim=24,
    time_id_dim=8,
    norm_groups=8,
)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"fsdp": 4}, (2, 4)),
        ({"data": 1, "fsdp": -1}, (1, 8)),
        ({"data": 8, "fsdp": 1}, (8, 1)),
        ({"data": -1, "fsdp": 8}, (1, 8)),
    ],
)
def test_mesh_takes_all_devices(sizes, expected):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == (("data", expected[0]), ("fsdp", expected[1]))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1}, "mesh 3 x 1: must multiply to the 8 devices there are"),
        ({"data": 4, "fsdp": 4}, "mesh 4 x 4: must multiply to the 8 devices"),
        ({"data": -1, "fsdp": 3}, "mesh 2 x 3: must multiply to the 8 devices"),
        ({"data": -1, "fsdp": 16}, "mesh 1 x 16: must multiply to the 8 devices"),
        ({"data": -1, "fsdp": -1}, "mesh -1 x -1: sizes must be at least 1, and one of them may be -1"),
        ({"data": 0, "fsdp": 8}, "mesh 0 x 8: sizes must be at least 1"),
        ({"data": 8, "fsdp": -2}, "mesh 8 x -2: sizes must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((256, 1024), (None, "fsdp")),
        ((1024, 256), ("fsdp", None)),
        ((3, 3, 128, 256), (None, None, None, "fsdp")),
        ((1026, 256), (None, "fsdp")),  # the largest axis is not a multiple of 4
        ((10, 1280, 1280), (None, "fsdp", None)),  # of equal axes, the first
        ((SMALLEST_SPLIT,), ("fsdp",)),
        ((SMALLEST_SPLIT - 4,), ()),  # small
        ((1280,), ()),
        ((257, 1023), ()),  # nothing divides
        ((), ()),
    ],
)
def test_the_largest_axis_that_divides_is_split(shape, expected):
    mesh = make_mesh(data=2, fsdp=4)
    sharding = parameter_sharding(mesh, shape)
    assert sharding.spec == PartitionSpec(*expected)
    parts = 4 if expected else 1
    assert np.prod(sharding.shard_shape(shape), dtype=int) * parts == np.prod(shape, dtype=int)


def test_without_fsdp_parameters_are_copied():
    large = (1024, 1024)
    assert parameter_sharding(make_mesh(data=8, fsdp=1), large).is_fully_replicated
    only_data = Mesh(np.array(jax.devices()), ("data",))
    assert parameter_sharding(only_data, large).is_fully_replicated


@pytest.mark.parametrize(
    ("batch", "axes", "part"),
    [(8, ("data", "fsdp"), 1), (16, ("data", "fsdp"), 2), (2, "data", 1), (6, "data", 3), (1, None, 1), (5, None, 5)],
)
def test_a_batch_is_split_over_the_axes_that_divide_it(batch, axes, part):
    sharding = batch_sharding(make_mesh(data=2, fsdp=4), batch)
    assert sharding.spec == PartitionSpec(axes)
    assert sharding.shard_shape((batch, 3)) == (part, 3)


def test_a_batch_that_data_does_not_divide_may_still_go_over_fsdp():
    sharding = batch_sharding(make_mesh(data=4, fsdp=2), 6)
    assert sharding.spec == PartitionSpec("fsdp")


def test_constraint_lays_the_batch_out_under_jit(rng):
    x = normal(rng, 8, 3)
    constrain = batch_constraint(make_mesh(data=2, fsdp=4))
    laid_out = jax.jit(lambda x: constrain(x) + 1)(x)
    assert laid_out.sharding.shard_shape(x.shape) == (1, 3)
    np.testing.assert_array_equal(laid_out, x + 1)
    assert batch_constraint(None)(x) is x


def test_a_unet_over_eight_devices_equals_one_device(rng):
    def build():
        return nnx.to_pure_dict(nnx.state(UNet(UNET, rngs=nnx.Rngs(0))))

    graph, _ = nnx.split(nnx.eval_shape(lambda: UNet(UNET, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: normal(rng, *leaf.shape) / max(1, leaf.size) ** 0.25, jax.eval_shape(build))
    inputs = (
        normal(rng, 8, 6, 5, 4),
        np.linspace(0, 999, 8).astype(np.int32),
        normal(rng, 8, 7, UNET.context_dim),
        normal(rng, 8, UNET.pooled_dim),
        rng.uniform(0, 1024, (8, 6)).astype(np.float32),
    )
    apply = jax.jit(lambda params, inputs: nnx.merge(graph, params)(*inputs))
    one = apply(params, inputs)

    mesh = make_mesh(data=2, fsdp=4)
    spread = jax.device_put(params, jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf.shape), params))
    split = [leaf for leaf in jax.tree.leaves(spread) if not leaf.sharding.is_fully_replicated]
    assert split
    assert all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in split)
    eight = apply(spread, jax.device_put(inputs, batch_sharding(mesh, 8)))
    assert eight.sharding.shard_shape(eight.shape)[0] == 1
    assert relative_error(eight, one) < 1e-5
