"""Torch modules to ours, through the project's own rules."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from faithdiff_jax.models.parts import flatten, unflatten
from faithdiff_jax.weights.keymap import KeyMap, Rule, compare


def port(build: Callable[[], nnx.Module], rules: list[Rule], state: dict) -> nnx.Module:
    """Our module with the weights of a torch state dict; every tensor of both must be spoken for."""
    graph, parameters = nnx.split(nnx.eval_shape(build))
    keymap = KeyMap(rules, {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(parameters)).items()})
    arrays = {name: tensor.detach().numpy() for name, tensor in state.items()}
    assert not compare(keymap.published_shapes(), {name: array.shape for name, array in arrays.items()})
    return nnx.merge(graph, unflatten(dict(keymap.read(arrays.__getitem__))))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return rng.standard_normal(shape).astype(np.float32)


def call(module: nnx.Module, *arrays, method: str = "__call__", **static):
    """Run a method of a module as one compiled program."""
    graph, parameters = nnx.split(module)
    return jax.jit(lambda parameters, *a: getattr(nnx.merge(graph, parameters), method)(*a, **static))(
        parameters, *arrays
    )
