"""Temporary memory of attention on a TPU, by implementation, from TPU's own compiler; no TPU is needed.

    pip install "faithdiff-jax[tpu]"
    python benchmarks/tpu_attention.py

4,096 tokens, 10 heads of 64, batch 2, bfloat16, on one chip of a v5e: the UNet's largest self-attention at 1024x1024.
"""

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from faithdiff_jax.models.attention import attention, use_implementation
from faithdiff_jax.planning import compiler


def main() -> None:
    compiler.prepare()
    chip = compiler.slice_devices("v5e:4x4", 1)[0]
    x = jax.ShapeDtypeStruct((2, 4096, 10, 64), jnp.bfloat16, sharding=SingleDeviceSharding(chip))
    for name in ("splash", "xla"):
        with use_implementation(name):
            compiled = jax.jit(lambda q: attention(q, q, q)).lower(x).compile()
        print(f"{name:8}{compiled.memory_analysis().temp_size_in_bytes / 2**20:8.1f} MiB temporary")


if __name__ == "__main__":
    main()
