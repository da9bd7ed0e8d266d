"""FLOPs against XLA's own count of single operations, against formulas, and through everything that holds a jaxpr."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from faithdiff_jax.models import attention
from faithdiff_jax.models.attention import use_implementation
from faithdiff_jax.models.blocks import Upsample
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.layers import Layers
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.planning.flops import count, peak_tflops
from faithdiff_jax.sharding import make_mesh


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolve(x, kernel, stride=1, padding=1, dilation=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 2,
        [(padding,) * 2] * 2,
        rhs_dilation=(dilation,) * 2,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def pullback(function):
    return lambda cotangent, *args: jax.vjp(function, *args)[1](cotangent)


def xla(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


CONVOLUTIONS = {
    "plain": ({}, array(3, 3, 8, 12)),
    "strided": ({"stride": 2}, array(3, 3, 8, 12)),
    "dilated": ({"dilation": 2}, array(3, 3, 8, 12)),
    "grouped": ({"groups": 2}, array(3, 3, 4, 12)),
    "asymmetric": ({"stride": 2, "padding": 0}, array(3, 2, 8, 12)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients_count_as_xla_does(name):
    options, kernel = CONVOLUTIONS[name]
    image, forward = array(2, 9, 7, 8), functools.partial(convolve, **options)
    cotangent = jax.eval_shape(forward, image, kernel)
    assert count(forward, image, kernel) == xla(forward, image, kernel)
    assert count(pullback(forward), cotangent, image, kernel) == xla(pullback(forward), cotangent, image, kernel)
    assert count(pullback(forward), cotangent, image, kernel) == 2 * count(forward, image, kernel)


def test_a_convolution_by_its_formula():
    """Two a multiply-add; at a border of one zero the outermost of n rows has 2 taps of 3: 3 n - 2 in all."""
    assert count(convolve, array(2, 9, 7, 8), array(3, 3, 8, 12)) == 2 * 2 * (3 * 9 - 2) * (3 * 7 - 2) * 8 * 12
    valid = functools.partial(convolve, padding=0)
    assert count(valid, array(2, 9, 7, 8), array(3, 3, 8, 12)) == 2 * 2 * (7 * 5) * 9 * 8 * 12


def test_products():
    assert count(jnp.matmul, array(5, 7), array(7, 9)) == 2 * 5 * 7 * 9
    scores = lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)  # noqa: E731
    assert count(scores, array(2, 5, 4, 8), array(2, 6, 4, 8)) == 2 * (2 * 4) * (5 * 6) * 8
    assert count(lambda x: jnp.tanh(x) * x + x.sum(), array(64, 64)) == 0


def layer(weights, x):
    return jnp.tanh(convolve(x, weights["kernel"])) @ weights["matrix"]


LAYER = {"kernel": array(3, 3, 8, 16), "matrix": array(16, 8)}
INPUT = array(2, 6, 6, 8)
ONE = 2 * 2 * (16 * 16) * 8 * 16 + 2 * (2 * 36) * 16 * 8  # (3 * 6 - 2)^2 taps


def chain(weights, x, depth=3):
    stacked = jax.tree.map(lambda w: jnp.broadcast_to(w, (depth, *w.shape)), weights)
    return jax.lax.scan(lambda x, w: (layer(w, x), None), x, stacked)[0]


def test_a_scan_counts_all_its_rounds():
    assert count(layer, LAYER, INPUT) == ONE
    assert count(chain, LAYER, INPUT) == 3 * ONE
    assert count(lambda w, x: jax.lax.fori_loop(0, 5, lambda i, x: layer(w, x), x), LAYER, INPUT) == 5 * ONE


FIRST_CONVOLUTION = 2 * 2 * (16 * 16) * 8 * 16


def squared(function):
    return lambda *args: (function(*args) ** 2).sum()


def test_a_gradient_is_three_forwards_but_for_the_inputs_own():
    def unrolled(weights, x):
        for _ in range(3):
            x = layer(weights, x)
        return x

    assert count(jax.grad(squared(unrolled)), LAYER, INPUT) == 3 * (3 * ONE) - FIRST_CONVOLUTION
    assert count(jax.grad(squared(unrolled), argnums=(0, 1)), LAYER, INPUT) == 3 * (3 * ONE)
    # Inside a scan the first layer is not told apart: its input's gradient is computed with the others.
    assert count(jax.grad(squared(chain)), LAYER, INPUT) == 3 * (3 * ONE)


def test_rematerialised_work_counts_again():
    def grad(function):
        return count(jax.grad(squared(function), (0, 1)), LAYER, INPUT)

    # Of what is computed again, the last product's result is not needed to go back.
    assert grad(jax.checkpoint(layer)) == grad(layer) + FIRST_CONVOLUTION


def test_what_no_result_depends_on_is_not_counted():
    assert count(lambda w, x: (layer(w, x), x)[1], LAYER, INPUT) == 0
    assert count(jax.grad(lambda w, x: (x @ w).sum()), array(8, 3), array(5, 8)) == 2 * 5 * 8 * 3


def test_branches_and_loops():
    square = array(9, 9)
    branches = lambda i, x: jax.lax.switch(i, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)  # noqa: E731
    assert count(branches, jax.ShapeDtypeStruct((), jnp.int32), square) == 2 * 2 * 9**3

    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="while loop cannot be counted"):
        count(until, square)
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), square) == 0


def test_inside_jit_custom_gradients_and_shard_map():
    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, c: (c @ kept[1].T, kept[0].T @ c))
    square, one = array(8, 8), 2 * 8**3
    assert count(jax.jit(product), square, square) == one
    assert count(jax.value_and_grad(squared(jax.jit(product)), (0, 1)), square, square) == 3 * one

    mesh = make_mesh(data=4, fsdp=2)
    rows = PartitionSpec(("data", "fsdp"))
    spread = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(spread, square, square) == one


@pytest.mark.parametrize("training", [False, True])
def test_fused_attention_counts_as_its_products(monkeypatch, training):
    """cuDNN's kernel is one opaque operation of a trace: the same as the plain products, gradient included."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    q, k = (jax.ShapeDtypeStruct((2, tokens, 3, 64), jnp.bfloat16) for tokens in (128, 78))

    def attend(implementation, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    def step(implementation):
        forward = functools.partial(attend, implementation)
        if not training:
            return forward
        return jax.value_and_grad(lambda *a: (forward(*a).astype(jnp.float32) ** 2).sum(), (0, 1, 2))

    expected = (6 if training else 2) * 2 * (2 * 3) * 128 * 78 * 64
    assert count(step("cudnn"), q, k, k) == count(step("xla"), q, k, k) == expected


def test_a_pallas_kernel_counts_its_grid():
    q = array(2, 1024, 3, 128)
    assert count(attention._splash, q, q, q) == 2 * 2 * (2 * 3) * 1024 * 1024 * 128


def test_pieces_of_the_unet():
    graph, state = nnx.split(nnx.eval_shape(lambda: Upsample(32, make=Layers(nnx.Rngs(0)))))
    upsample = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    assert count(upsample, state, array(3, 5, 4, 32)) == 2 * 3 * (3 * 10 - 2) * (3 * 8 - 2) * 32 * 32


def sdxl(side: int, tokens: int = 77) -> int:
    """The UNet's matrix FLOPs for one sample of `side` latent pixels, added up from SDXL's sizes alone."""
    total = 0

    def conv(n, a, b, stride=1):
        taps = 3 * n - 2 if stride == 1 else 3 * n // 2 - 1  # along a side of n
        nonlocal total
        total += 2 * taps**2 * a * b

    def dense(rows, a, b):
        nonlocal total
        total += 2 * rows * a * b

    def resnet(n, a, b):
        conv(n, a, b)
        dense(1, 1280, b)
        conv(n, b, b)
        if a != b:
            dense(n * n, a, b)

    def transformer(n, width, depth):
        rows = n * n
        dense(rows, width, width)  # in
        for _ in range(depth):
            for keys, source in ((rows, width), (tokens, 2048)):
                dense(rows, width, width)  # queries
                dense(keys, source, width)
                dense(keys, source, width)
                dense(rows, keys, width)  # scores of all heads
                dense(rows, keys, width)  # and their values
                dense(rows, width, width)
            dense(rows, width, 8 * width)
            dense(rows, 4 * width, width)
        dense(rows, width, width)  # out

    dense(1, 320, 1280)
    dense(1, 1280, 1280)
    dense(1, 1280 + 6 * 256, 1280)
    dense(1, 1280, 1280)
    widths, depths = (320, 640, 1280), (0, 2, 10)
    conv(side, 4, 320)
    skips, width, n = [320], 320, side
    for level in range(3):
        for _ in range(2):
            resnet(n, width, widths[level])
            width = widths[level]
            if depths[level]:
                transformer(n, width, depths[level])
            skips.append(width)
        if level < 2:
            conv(n, width, width, stride=2)
            n //= 2
            skips.append(width)
    resnet(n, 1280, 1280)
    transformer(n, 1280, 10)
    resnet(n, 1280, 1280)
    for level in reversed(range(3)):
        for _ in range(3):
            resnet(n, width + skips.pop(), widths[level])
            width = widths[level]
            if depths[level]:
                transformer(n, width, depths[level])
        if level:
            n *= 2
            conv(n, width, width)
    conv(side, 320, 4)
    return total


@pytest.mark.parametrize(("side", "compiler"), [(64, 1.577e12), (128, 6.757e12)])
def test_the_whole_unet_of_sdxl(monkeypatch, side, compiler):
    """To the last FLOP by SDXL's sizes. XLA's total, elementwise work included, is under 0.5 % larger."""
    monkeypatch.setattr(attention, "SCORES_IN_MEMORY", 2**40)  # chunks of queries are filled up with zeros
    config = FaithDiffConfig().unet
    graph, state = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
    inputs = (array(1, side, side, 4), array(1), array(1, 77, 2048), array(1, 1280), array(1, 6))
    with use_implementation("xla"):
        flops = count(lambda state, *arrays: nnx.merge(graph, state)(*arrays), state, *inputs)
    assert flops == sdxl(side)
    assert 0.995 * compiler < flops < compiler


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_whole_names(kind, peak):
    assert peak_tflops(types.SimpleNamespace(device_kind=kind)) == peak
    assert peak_tflops(jax.devices()[0]) is None


def test_a_count_needs_no_memory():
    assert count(jnp.matmul, array(10**6, 10**6), array(10**6, 10**6)) == 2e18
    assert math.isfinite(count(convolve, array(4096, 4096, 4096, 320), array(3, 3, 320, 320)))
