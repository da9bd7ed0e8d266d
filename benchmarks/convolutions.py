"""Every 3x3 convolution of the UNet and the VAE at one size: ours by each algorithm, the one chosen, and PyTorch's.

    python benchmarks/convolutions.py                   # UNet for a 512x512 picture, decoder, float32 on CPU
    python benchmarks/convolutions.py --batch 2 --kernel-gradients

Milliseconds a convolution, the best of three rounds of eight in one program: alone in a program, the large temporary
arrays would be fetched from the system anew each time, which costs more than the convolution. `models/convolution.py`
chooses by a model of these costs; where it does not choose the fastest, its rates are to be changed.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from faithdiff_jax.models import winograd
from faithdiff_jax.models.convolution import ALGORITHMS, TILES, choose

# Height = width, input channels, output channels.
UNET = (
    (64, 320, 320),
    (64, 640, 320),
    (64, 960, 320),
    (32, 320, 640),
    (32, 640, 640),
    (32, 1280, 640),
    (32, 1920, 640),
    (16, 640, 1280),
    (16, 1280, 1280),
    (16, 2560, 1280),
)
VAE = ((64, 512, 512), (128, 512, 512), (256, 512, 256), (256, 256, 256), (512, 256, 128), (512, 128, 128))
TIMES = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kernel-gradients", action="store_true", help="the gradient of the kernel instead")
    options = parser.parse_args()
    print(f"{'ms':28}" + "".join(f"{name:>12}" for name in (*ALGORITHMS, "PyTorch")) + "  chosen")
    for side, inputs, outputs in UNET + VAE:
        shape = (options.batch, side, side, inputs)
        ours = {name: milliseconds(program(name, options.kernel_gradients), shape, outputs) for name in ALGORITHMS}
        theirs = pytorch(shape, outputs, options.kernel_gradients)
        chosen = choose("cpu", shape, outputs, jnp.float32)
        times = "".join(f"{time:12.1f}" for time in (*ours.values(), theirs))
        note = (
            "" if ours[chosen] == min(ours.values()) else f" ({ours[chosen] / min(ours.values()):.2f} of the fastest)"
        )
        print(f"{f'{side}x{side} {inputs} -> {outputs}':28}{times}  {chosen}{note}", flush=True)


def program(name: str, kernel_gradients: bool):
    """(pictures, kernel) -> a number that needs the convolution, or the kernel's gradient."""

    def direct(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    by_name = direct if name == "direct" else lambda x, kernel: winograd.convolve(x, kernel, TILES[name])
    if not kernel_gradients:
        return lambda x, kernel: by_name(x, kernel)[..., :1]

    def gradient(x, kernel):
        result = jnp.repeat(x[..., :1], kernel.shape[-1], axis=-1)
        return jax.vjp(lambda kernel: by_name(x, kernel), kernel)[1](result)[0][:1, :1, :1, :1]

    return gradient


def milliseconds(function, shape: tuple[int, ...], outputs: int) -> float:
    """Of one of `TIMES` in a row, each of which waits for the one before."""
    x, kernel = (jnp.asarray(array) for array in arrays(shape, outputs))

    @jax.jit
    def rounds(x, kernel):
        return jax.lax.fori_loop(0, TIMES, lambda _, x: x + 1e-6 * function(x, kernel), x)[0, 0, 0, 0]

    return best(lambda: rounds(x, kernel).block_until_ready()) / TIMES


def pytorch(shape: tuple[int, ...], outputs: int, kernel_gradients: bool) -> float:
    """The same by PyTorch, once a round: its memory comes from a pool."""
    x, kernel = arrays(shape, outputs)
    x = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    kernel = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    result = x[:, :1].repeat(1, outputs, 1, 1)
    with torch.no_grad():
        if kernel_gradients:
            return best(lambda: torch.nn.grad.conv2d_weight(x, kernel.shape, result, padding=1))
        return best(lambda: torch.nn.functional.conv2d(x, kernel, padding=1))


def arrays(shape: tuple[int, ...], outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures (B, H, W, C) and a kernel (3, 3, C, O)."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, shape[-1], outputs), np.float32) / (9 * shape[-1]) ** 0.5
    return rng.standard_normal(shape, np.float32), kernel


def best(run) -> float:
    """Milliseconds, the least of three after one that compiles."""
    run()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
