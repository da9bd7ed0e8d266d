"""XLA's flags for simulated devices; imported before jax is."""


def xla_flags(devices: int) -> str:
    """For so many CPU devices, with timeouts for a busy machine.

    Tiny models compile longer than they run, so the compiler's own optimiser is off. On a core or two, one device may
    keep the others waiting for longer than the 40 seconds after which XLA ends the process.
    """
    flags = {
        "xla_force_host_platform_device_count": devices,
        "xla_backend_optimization_level": 0,
        "xla_cpu_collective_call_terminate_timeout_seconds": 600,
        "xla_cpu_collective_timeout_seconds": 600,
    }
    return " ".join(f"--{name}={value}" for name, value in flags.items())
