"""A run's batch: what it must divide by, how much memory it takes at least, and its shapes."""

import os

import jax
import jax.numpy as jnp

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.training.config import TrainConfig

Shaped = dict[str, jax.ShapeDtypeStruct]


def check_batch(config: TrainConfig, model: FaithDiffConfig, devices: int, processes: int) -> None:
    """See that the batch divides over accumulation rounds, devices and processes, before anything is allocated.

    Raises:
        InputError: it does not, or under `mixing="batch"` a group is not stated or would be torn apart.
    """
    alignment = model.alignment
    unit = 1
    if alignment.mixing == "batch":
        if alignment.group is None:
            raise InputError("model.alignment.group is null: mixing 'batch' needs the group's size to train, 16 say")
        unit = alignment.group
    if config.batch % processes:
        raise InputError(f"batch is {config.batch}: must be a multiple of the processes, {processes}")
    if config.batch % (config.accumulation * devices * unit):
        groups = f" x alignment.group {unit}" if unit > 1 else ""
        raise InputError(
            f"batch is {config.batch}: must be a multiple of accumulation {config.accumulation} x "
            f"{devices} devices{groups}, {config.accumulation * devices * unit}"
        )
    if config.data.crop % model.vae.factor:
        raise InputError(f"data.crop is {config.data.crop}: must be a multiple of the VAE's {model.vae.factor}")


def check_memory(config: TrainConfig, model: FaithDiffConfig, devices: int, processes: int) -> None:
    """Refuse a batch of which even the pictures, or the VAE's first activations, are larger than the memory.

    Lower bounds: a batch that passes may still be too large.

    Raises:
        InputError: the batch cannot fit, with the sizes.
    """
    crop = config.data.crop
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    pictures = config.batch // processes * 2 * crop**2 * 3 * 4
    if pictures > host:
        raise InputError(
            f"batch is {config.batch} with data.crop {crop}: {pictures / 1e9:,.0f} GB of pictures for each process, "
            f"which has {host / 1e9:,.0f} GB of memory; lower batch or data.crop"
        )
    samples = config.batch // (devices * config.accumulation)
    features = samples * crop**2 * model.vae.channels[0] * jnp.dtype(config.dtype).itemsize
    limit = _device_memory(host)
    if features > limit:
        raise InputError(
            f"batch is {config.batch} with data.crop {crop}: the VAE's first activations of {samples} pictures take "
            f"{features / 1e9:,.0f} GB of a device's {limit / 1e9:,.0f} GB; raise accumulation, or lower batch or "
            "data.crop"
        )


def abstract_batch(config: TrainConfig, model: FaithDiffConfig, samples: int) -> Shaped:
    """Shapes of a batch as `TrainStep.update` takes it."""
    image = (samples, config.data.crop, config.data.crop, 3)
    batch = {name: jax.ShapeDtypeStruct(image, jnp.float32) for name in ("hq", "lq")}
    batch["time_ids"] = jax.ShapeDtypeStruct((samples, 6), jnp.float32)
    batch["row"] = jax.ShapeDtypeStruct((samples,), jnp.int32)
    for i, encoder in enumerate(model.text_encoders):
        batch[f"token_ids_{i}"] = jax.ShapeDtypeStruct((samples, encoder.positions), jnp.int32)
    return batch


def _device_memory(host: int) -> int:
    """Bytes of one device; devices on the CPU share the host's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else host // jax.local_device_count()
