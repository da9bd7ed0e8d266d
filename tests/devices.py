"""The environment for simulated devices; set before jax is imported."""

THREADS = 64  # always as many: how a product is divided between threads may change its last bit


def simulated(devices: int) -> dict[str, str]:
    """So many CPU devices, with threads for all that they may wait for.

    Tiny models compile longer than they run, so the compiler's own optimiser is off, and so are its fusion emitters,
    which cost it half as much time again; nor is a program split to be compiled in parallel, which costs a fifth more.
    A device runs collectives that do not depend on each other at the same time, each holding a thread until the other
    devices come: with one thread a device, which is what XLA takes on a core or two, devices that wait in one
    collective leave none for another.
    """
    flags = {
        "xla_force_host_platform_device_count": devices,
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": "false",
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    return {
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items()),
        "PJRT_NPROC": str(THREADS),
        # PyTorch's threads wait for one another in a loop: two of them, in each of two processes on two cores, take
        # several times as long as one.
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
