"""Why two choices were made: attention by implementation, and a ten-deep transformer stack with its layers apart.

python benchmarks/pieces.py
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from faithdiff_jax.models.attention import attention, use_implementation
from faithdiff_jax.models.layers import Layers, layers_apart
from faithdiff_jax.models.transformer import SpatialTransformer

ROUNDS = 3


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
    project = jax.jit(lambda params, context: nnx.merge(graph, params).project_text(context))

    def run_stack(params, hidden, text):
        return nnx.merge(graph, params)(hidden, text)

    stacks = {"scanned": params, "apart": layers_apart(params)}
    for samples in (1, 2):
        hidden, text = normal(samples, 16, 16, 1280), project(params, normal(samples, 77, 2048))
        found = {name: [] for name in stacks}
        for _ in range(ROUNDS):  # in turns
            for name, given in stacks.items():
                found[name].append(seconds(run_stack, given, hidden, text))
        print(f"ten-deep stack, batch {samples}: compile, s    run, s")
        for name, each in found.items():
            run = statistics.median(run for _, run in each)
            print(f"{name:10}         {each[0][0]:12.2f}{run:10.2f}")  # compiled in the first round alone


if __name__ == "__main__":
    main()
