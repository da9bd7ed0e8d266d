"""How much matrix arithmetic a function does, and how much a device can do: the two halves of a utilisation figure.

function, shapes --trace--> jaxpr --walk--> FLOPs of its products and convolutions
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from faithdiff_jax.planning.chips import CHIPS

_FUSED_FORWARD = "dot_product_attention_fwd"
_FUSED_BACKWARD = "dot_product_attention_bwd"
_WINOGRAD = ("winograd_convolution", "winograd_kernel_gradient")

# Dense bfloat16 with float32 accumulation, in TFLOP/s, by JAX's name of the device: `chips` has the vendors' figures,
# and variants that it does not list have theirs here. Names are compared whole: slices of a device ("... MIG 1g.10gb")
# and its laptop namesakes are slower.
_PEAKS = {
    # NVIDIA A100 datasheet
    "NVIDIA A100-SXM4-40GB": CHIPS["a100"].tflops,
    "NVIDIA A100-SXM4-80GB": CHIPS["a100"].tflops,
    "NVIDIA A100-PCIE-40GB": CHIPS["a100"].tflops,
    "NVIDIA A100 80GB PCIe": CHIPS["a100"].tflops,
    # NVIDIA H100 and H200 datasheets, whose figures are with sparsity: half of 1,979, 1,513 and 1,671
    "NVIDIA H100 80GB HBM3": CHIPS["h100"].tflops,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": CHIPS["h200"].tflops,
    "NVIDIA H200 NVL": 835.5,
    # NVIDIA L40S datasheet; Ada architecture whitepaper, appendix A
    "NVIDIA L40S": CHIPS["l40s"].tflops,
    "NVIDIA GeForce RTX 4090": CHIPS["rtx4090"].tflops,
    # Google Cloud TPU documentation, a chip each, which is one device in JAX
    "TPU v4": CHIPS["v4"].tflops,
    "TPU v5 lite": CHIPS["v5e"].tflops,
    "TPU v5e": CHIPS["v5e"].tflops,
    "TPU v5": CHIPS["v5p"].tflops,
    "TPU v5p": CHIPS["v5p"].tflops,
    "TPU v6 lite": CHIPS["v6e"].tflops,
    "TPU v6e": CHIPS["v6e"].tflops,
}


def count(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs, two a multiply-add, of the matrix products and convolutions that a call of `function` does.

    Of a convolution, only taps on real elements count: not those on padding, nor those on the holes that a stride
    leaves in its gradient's operands. Both gradients of a convolution then count exactly what the convolution does, so
    that a step without rematerialisation counts three forwards. What a rematerialised step computes again is counted
    again: for a utilisation in the usual sense, count the step without it. By Winograd, a convolution counts as what it
    stands for. cuDNN's fused attention counts as the two
    products that it stands for, its gradient as four; a Pallas kernel as its body times its grid. A conditional counts
    as its most expensive branch, work in `shard_map` on all devices, a loop of static length every round.

    Args:
        function: anything that `jax.make_jaxpr` traces; nothing runs and no memory is needed.
        args: pytrees of arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: there are products in a `while` loop, whose number of rounds a trace does not tell.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # What no result depends on, such as the forward half of a gradient that is linear, is not computed.
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of_jaxpr(used)


def peak_tflops(device: jax.Device) -> float | None:
    """A device's dense bfloat16 matrix rate in TFLOP/s by its vendor's figures, None for one that is not listed."""
    return _PEAKS.get(device.device_kind)


def _of_jaxpr(jaxpr: Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if params.get("name") in _WINOGRAD:
        return _same_convolution(equation)
    if name.startswith(_FUSED_FORWARD):
        return 2 * _attention_product(equation)
    if name.startswith(_FUSED_BACKWARD):
        return 4 * _attention_product(equation)
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(params)]
    match name:
        case "scan":
            return float(params["length"] * sum(inner))
        case "cond":
            return max(inner)
        case "while":
            if sum(inner):
                raise ValueError("matrix products in a while loop cannot be counted: use a scan or a static fori_loop")
            return 0.0
        case "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return float(devices * sum(inner))
        case "pallas_call":
            grid = params["grid_mapping"].grid
            if not all(isinstance(size, int) for size in grid):
                raise ValueError(f"a Pallas kernel with the dynamic grid {grid} cannot be counted")
            return float(math.prod(grid) * sum(inner))
        case _:
            return sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The functions inside an equation: its body, its branches, its condition."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return float(2 * math.prod(out) * math.prod(left[axis] for axis in contracted))


def _convolution(equation: Any) -> float:
    params = equation.params
    left, right = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    taps = 1
    for i, (left_axis, right_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        starts = np.arange(out[out_axis]) * params["window_strides"][i] - params["padding"][i][0]
        places = starts[:, None] + np.arange(right[right_axis]) * params["rhs_dilation"][i]
        hole = params["lhs_dilation"][i]
        taps *= int(((places >= 0) & (places % hole == 0) & (places // hole < left[left_axis])).sum())
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return float(2 * taps * batch * features * right[numbers.rhs_spec[1]])


def _same_convolution(equation: Any) -> float:
    """A 3x3 convolution of (B, H, W, C) with zeros around it to O channels, or the gradient of its kernel."""
    batch, height, width, inputs = equation.invars[0].aval.shape
    outputs = equation.invars[1].aval.shape[-1]
    return float(2 * batch * (3 * height - 2) * (3 * width - 2) * inputs * outputs)


def _attention_product(equation: Any) -> float:
    """One product of fused attention: queries (B, N, heads, dim) with keys (B, M, heads, dim)."""
    queries, keys = (variable.aval.shape for variable in equation.invars[:2])
    heads_first = equation.params["layout"] == 1  # jax's AttentionLayout.BNTH
    return float(2 * math.prod(queries) * keys[2 if heads_first else 1])
