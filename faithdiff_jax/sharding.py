"""Device meshes, and where parameters and batches lie on them.

Axes: `data` splits the batch and holds a copy of the parameters on each of its rows; `fsdp` splits the batch too, and
the parameters with it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from faithdiff_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")
# Splitting small parameters costs more in messages than it saves in memory.
SMALLEST_SPLIT = 2**16


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh over all devices; -1 stands for what is left.

    Raises:
        InputError: the product is not the number of devices.
    """
    devices = jax.device_count()
    if (data, fsdp) == (-1, -1) or any(size < 1 and size != -1 for size in (data, fsdp)):
        raise InputError(f"mesh {data} x {fsdp}: sizes must be at least 1, and one of them may be -1")
    sizes = dict(zip(BATCH_AXES, mesh_sides(data, fsdp, devices), strict=True))
    if math.prod(sizes.values()) != devices:
        raise InputError(f"mesh {sizes['data']} x {sizes['fsdp']}: must multiply to the {devices} devices there are")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)


def mesh_sides(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Both sides of a mesh, the one that is -1 as what the other leaves of the devices."""
    if data == -1:
        return max(1, devices // max(1, fsdp)), fsdp
    if fsdp == -1:
        return data, max(1, devices // max(1, data))
    return data, fsdp


def placed_shapes(tree: Any, places: Any) -> Any:
    """A pytree of arrays or shapes as shapes that lie as `places`, a pytree of shardings, says."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a pytree of arrays, or of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Split the largest axis that `fsdp` divides; small parameters and undividable ones are copied."""
    size = mesh.shape.get("fsdp", 1)
    if size > 1 and math.prod(shape) >= SMALLEST_SPLIT:
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if divisible:
            axis = max(divisible, key=lambda a: shape[a])
            return NamedSharding(mesh, PartitionSpec(*(["fsdp" if a == axis else None for a in range(len(shape))])))
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Split the leading axis over as many of the mesh's batch axes as divide it."""
    axes: tuple[str, ...] = ()
    for name in BATCH_AXES:
        if name in mesh.shape and batch % math.prod(mesh.shape[a] for a in (*axes, name)) == 0:
            axes = (*axes, name)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def batch_places(mesh: Mesh | None) -> Callable[[int], NamedSharding] | None:
    """`batch_sharding` on a mesh, for `models.backend.batches_placed`."""
    return None if mesh is None else lambda samples: batch_sharding(mesh, samples)


def batch_constraint(mesh: Mesh | None) -> Callable[[Any], Any]:
    """A function that, under jit, lays an array's leading axis out over the mesh; without a mesh it does nothing."""
    if mesh is None:
        return lambda x: x
    return lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.shape[0]))
