"""Memory of the denoising program on a TPU, from TPU's own compiler; no TPU is needed, only the package libtpu.

    pip install libtpu   # at the version that jax's extra `tpu` names
    TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu \\
        python benchmarks/tpu_memory.py --image 1024

Compiles for one chip of a v5e: parameters in bfloat16, 20 steps, guidance, one picture in one program.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tpu_compiler import assigned_bytes

from faithdiff_jax.inference.denoise import denoise
from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_sampling
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.attention import attention, use_implementation
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.faithdiff import Denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tile-batch", type=int, default=1)
    options = parser.parse_args()

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices[0]
    config, side = FaithDiffConfig(), options.image // 8
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    build = lambda: Denoiser(config.unet, config.alignment, config.feature_channels, rngs=nnx.Rngs(0), **dtypes)  # noqa: E731
    graph, params = nnx.split(nnx.eval_shape(build))
    choices = RestoreOptions(steps=options.steps, tile_batch=options.tile_batch)
    plan = plan_sampling(choices, config.schedule, side, side)
    corners = plan.corners

    def program(params, features, text, negative, noise, start):
        model = nnx.merge(graph, params)
        time_ids = np.array([(options.image, options.image, *corner, 1024, 1024) for corner in corners], np.float32)
        arrays = SamplingInputs(
            features=features,
            text=text,
            negative=negative,
            noise=noise,
            start=start,
            time_ids=time_ids,
            guidance=jnp.float32(5),
        )
        return denoise(model, plan, arrays)

    def on_chip(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

    x = on_chip(2, 4096, 10, 64, dtype=jnp.bfloat16)
    for name in ("splash", "xla"):
        with use_implementation(name):
            compiled = jax.jit(lambda q: attention(q, q, q)).lower(x).compile()
        print(
            f"attention, 4096 tokens, {name}: {compiled.memory_analysis().temp_size_in_bytes / 2**20:.1f} MiB temporary"
        )

    params = jax.tree.map(lambda leaf: on_chip(*leaf.shape, dtype=leaf.dtype), nnx.to_pure_dict(params))
    text = Text(context=on_chip(1, 77, 2048), pooled=on_chip(1, 1280))
    latents = on_chip(1, side, side, 4)
    begin = time.perf_counter()
    with trace_for("tpu"):
        features = on_chip(1, side, side, 512)
        lowered = jax.jit(program).lower(params, features, text, text, latents, latents)
    arguments, temporary = (size / 2**30 for size in assigned_bytes(lowered))
    print(f"{options.image}x{options.image}, {len(corners)} tiles, {options.tile_batch} at a time, one v5e chip")
    print(f"parameters and inputs {arguments:6.2f} GiB")
    print(f"temporary             {temporary:6.2f} GiB")
    print(f"buffers assigned in   {time.perf_counter() - begin:6.0f} s", flush=True)
    os._exit(0)  # the compiler is still at work and cannot be told to stop


if __name__ == "__main__":
    main()
