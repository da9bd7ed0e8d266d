"""Low-rank adaptation (Hu et al. 2021): frozen kernels W become W + (alpha / rank) A B, and only A and B train.

A kernel's A is (..., in, rank) and its B (..., rank, out), with a leading axis for stacked layers. B starts at zero, so
training starts from the plain model. When a model is saved, the sum is an ordinary kernel again.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from faithdiff_jax.errors import InputError
from faithdiff_jax.training.config import LoRAConfig

LORA_GROUP = "lora"
PREFIX = "lora."

AnyArray = Array | np.ndarray


def adapter_shapes(config: LoRAConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`lora.<kernel's path>.a` and `.b` -> shape, for every kernel that the patterns match.

    Raises:
        InputError: a pattern that matches no parameter, or one that is not the kernel of a linear layer; a rank that
            is not below both sides of a kernel.
    """
    adapters = {}
    for pattern in config.parameters:
        matched = fnmatch.filter(shapes, pattern)
        if not matched:
            raise InputError(f"lora.parameters: pattern {pattern!r} matches no parameter")
        for path in matched:
            shape = shapes[path]
            if not path.endswith(".kernel") or len(shape) not in (2, 3):
                raise InputError(f"lora.parameters: pattern {pattern!r} matches {path} {shape}, not a linear kernel")
            *stack, inputs, outputs = shape
            if config.rank >= min(inputs, outputs):
                raise InputError(
                    f"lora.rank is {config.rank}: must be below the sides of {path}, {inputs} and {outputs}"
                )
            adapters[f"{PREFIX}{path}.a"] = (*stack, inputs, config.rank)
            adapters[f"{PREFIX}{path}.b"] = (*stack, config.rank, outputs)
    return adapters


def adapter_paths(
    config: LoRAConfig, shapes: Mapping[str, tuple[int, ...]], trained: Mapping[str, str]
) -> tuple[str, ...]:
    """The paths of `adapter_shapes`; InputError for a kernel that a group also trains."""
    paths = tuple(adapter_shapes(config, shapes))
    for path in paths:
        kernel = path.removeprefix(PREFIX).rpartition(".")[0]
        if kernel in trained:
            raise InputError(f"{kernel}: claimed by lora and by group {trained[kernel]!r}; freeze what LoRA adapts")
    return paths


def initial_adapter(path: str, shape: tuple[int, ...], key: PRNGKeyArray) -> Float32[Array, "..."]:
    """The initial A (uniform in +-1/sqrt(inputs)) or B (zeros), as the path says; float32."""
    if path.endswith(".b"):
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def merged(
    kernel: Float[AnyArray, "*layers i o"],
    a: Float[AnyArray, "*layers i r"],
    b: Float[AnyArray, "*layers r o"],
    scale: float,
) -> Any:
    """W + scale * A B, in the kernel's dtype; NumPy or JAX arrays, `scale` is alpha / rank."""
    return kernel + (scale * (a @ b)).astype(kernel.dtype)


def merge_adapters(config: LoRAConfig | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of the plain model: each adapted kernel with its update added, no `lora.` paths."""
    plain = {path: array for path, array in params.items() if not path.startswith(PREFIX)}
    if config is not None:
        for path in params:
            if path.startswith(PREFIX) and path.endswith(".a"):
                kernel = path.removeprefix(PREFIX).removesuffix(".a")
                b = params[path.removesuffix(".a") + ".b"]
                plain[kernel] = merged(plain[kernel], params[path], b, config.alpha / config.rank)
    return plain
