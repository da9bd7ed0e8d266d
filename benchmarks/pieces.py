"""Why two choices were made: attention by implementation, and a ten-deep transformer stack scanned or unrolled.

python benchmarks/pieces.py
"""

import operator
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from faithdiff_jax.models.attention import attention, use_implementation
from faithdiff_jax.models.layers import Layers
from faithdiff_jax.models.transformer import SpatialTransformer


def seconds(function, *arrays) -> tuple[float, float]:
    """Compile time, and the median of five runs."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arrays).compile()
    compiled = time.perf_counter() - begin
    runs = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        runs.append(time.perf_counter() - begin)
    return compiled, statistics.median(runs[1:])


def main() -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    print("attention, ms:            heads       xla")
    for tokens, heads in ((256, 20), (1024, 10), (4096, 10)):
        x = normal(1, tokens, heads, 64)
        times = []
        for name in ("heads", "xla"):
            with use_implementation(name):
                times.append(1e3 * seconds(lambda q: attention(q, q, q), x)[1])
        print(f"{tokens:5} tokens, {heads:2} heads {times[0]:10.1f}{times[1]:10.1f}")

    build = lambda: SpatialTransformer(1280, 2048, 20, 10, groups=32, make=Layers(nnx.Rngs(0)))  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(build))
    params = jax.tree.map(lambda leaf: 0.02 * normal(*leaf.shape), nnx.to_pure_dict(state))
    hidden, context = normal(1, 16, 16, 1280), normal(1, 77, 2048)
    text = jax.jit(lambda params: nnx.merge(graph, params).project_text(context))(params)

    def scanned(params, hidden, text):
        return nnx.merge(graph, params)(hidden, text)

    def unrolled(params, layers, hidden, text):
        module = nnx.merge(graph, params)
        block = nnx.split(module.blocks)[0]
        tokens = module.proj_in(module.norm(hidden).reshape(1, -1, 1280))
        for layer, keys_values in zip(layers, text, strict=True):
            tokens = nnx.merge(block, layer)(tokens, keys_values)
        return hidden + module.proj_out(tokens).reshape(hidden.shape)

    def apart(tree):
        return [jax.tree.map(operator.itemgetter(i), tree) for i in range(10)]

    print("ten-deep stack:      compile, s    run, s")
    compiled, run = seconds(scanned, params, hidden, text)
    print(f"scanned            {compiled:12.2f}{run:10.2f}")
    compiled, run = seconds(unrolled, params, apart(params["blocks"]), hidden, apart(text))
    print(f"unrolled, apart    {compiled:12.2f}{run:10.2f}")


if __name__ == "__main__":
    main()
