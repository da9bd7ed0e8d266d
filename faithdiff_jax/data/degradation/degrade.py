"""Second-order degradation of a photograph: what is drawn (`draw`), and what it does to the pixels (`apply`).

`degrade` is the two together. The random numbers are NumPy's, filters, resizing and JPEG are OpenCV's. The result
does not depend on the number of threads or processes; with other releases of NumPy or OpenCV, or on a processor with
other vector instructions, a pixel can round differently.

A process that shares its cores with other workers, or was forked, calls `cv2.setNumThreads(0)` first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import cv2
import numpy as np
from jaxtyping import UInt8

from faithdiff_jax.data.degradation import kernels
from faithdiff_jax.data.degradation.config import (
    BlurConfig,
    DegradationConfig,
    FinalSincConfig,
    JpegConfig,
    NoiseConfig,
    ResizeConfig,
)
from faithdiff_jax.data.degradation.presets import LEVELS, PUBLISHED
from faithdiff_jax.data.degradation.sensor_noise import gaussian_noise, poisson_noise, to_uint8

__all__ = ["LEVELS", "PUBLISHED", "DegradationConfig", "DegradationParameters", "apply", "degrade", "draw", "stages"]

_INTERPOLATION = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_DIRECT_TAPS = 11**2
_BANDED_TAPS = 17**2


@dataclass(frozen=True, kw_only=True)
class Blur:
    """One drawn kernel of a family of `kernels.FAMILIES`; `beta` is None for the Gaussians."""

    family: str
    size: int
    sigma_x: float
    sigma_y: float
    theta: float
    beta: float | None

    def kernel(self) -> np.ndarray:
        """Build the kernel, (size, size) float64."""
        return kernels.family_kernel(self.family, self.size, self.sigma_x, self.sigma_y, self.theta, self.beta)


@dataclass(frozen=True, kw_only=True)
class Sinc:
    """One drawn sinc kernel."""

    family: ClassVar[str] = "sinc"
    size: int
    omega: float

    def kernel(self) -> np.ndarray:
        """Build the kernel, (size, size) float64."""
        return kernels.sinc(self.size, self.omega)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """One drawn resize: `factor` against the size it is relative to, the mode, and the resulting size in pixels."""

    factor: float
    mode: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Noise:
    """One drawn noise: "gaussian" with `strength` as its sigma of 255, or "poisson" times `strength`.

    `gray` noise is the same in all channels; `seed` makes the field.
    """

    kind: str
    strength: float
    gray: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class DegradationParameters:
    """Everything one degradation drew; a stage that does not happen is None. JPEG stages are their quality."""

    shape: tuple[int, int]
    blur1: Blur | Sinc | None
    resize1: Resize
    noise1: Noise | None
    jpeg1: int | None
    blur2: Blur | Sinc | None
    resize2: Resize
    noise2: Noise | None
    jpeg2: int | None
    final_resize: Resize
    final_sinc: Sinc | None
    jpeg_last: bool


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], config: DegradationConfig = PUBLISHED
) -> DegradationParameters:
    """Draw the branches and parameters of one degradation, without touching a pixel.

    `shape` is that of the image, (H, W) or (H, W, 3), both sides multiples of `config.scale`, else ValueError.
    """
    height, width = shape[:2]
    if height < 1 or width < 1 or height % config.scale or width % config.scale:
        raise ValueError(f"image of {height}x{width}: both sides must be multiples of the scale {config.scale}")
    target = height // config.scale, width // config.scale
    # The order below is that of the random numbers: moving a line changes every degraded image.
    return DegradationParameters(
        shape=(height, width),
        blur1=_draw_blur(rng, config.blur1),
        resize1=_draw_resize(rng, config.resize1, config.resize_modes, (height, width)),
        noise1=_draw_noise(rng, config.noise1),
        jpeg1=_draw_quality(rng, config.jpeg1),
        blur2=_draw_blur(rng, config.blur2),
        resize2=_draw_resize(rng, config.resize2, config.resize_modes, target),
        noise2=_draw_noise(rng, config.noise2),
        jpeg2=_draw_quality(rng, config.jpeg2),
        final_resize=_resize_to(target, 1.0, _pick(rng, config.resize_modes)),
        final_sinc=_draw_final_sinc(rng, config.final_sinc),
        jpeg_last=_happens(rng, config.jpeg_last_probability),
    )


def apply(image: UInt8[np.ndarray, "h w 3"], parameters: DegradationParameters) -> UInt8[np.ndarray, "H W 3"]:
    """Degrade an image as drawn: (H, W, 3) uint8 RGB to (H/scale, W/scale, 3) uint8.

    A pure function of its arguments. Raises ValueError for another dtype or for a shape that is not the drawn one.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"image of dtype {image.dtype}: must be uint8")
    if image.shape != (*parameters.shape, 3):
        raise ValueError(f"image of shape {image.shape}: the parameters were drawn for {(*parameters.shape, 3)}")
    result = image.astype(np.float32)
    for _, stage in stages(parameters):
        result = stage(result)
    return to_uint8(result)


def degrade(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, config: DegradationConfig = PUBLISHED
) -> UInt8[np.ndarray, "H W 3"]:
    """Degrade an image at random: (H, W, 3) uint8 RGB to (H/scale, W/scale, 3) uint8.

    A pure function of the image and the generator's state. Raises ValueError as `draw` and `apply` do.
    """
    return apply(image, draw(rng, image.shape, config))


def stages(parameters: DegradationParameters) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """List the stages that happen, in order: the field's name and the function of a float32 (H, W, 3) image in 0..255.

    Source: Real-ESRGAN's `feed_data`; noise is clamped to 0..255 as there, other overshoot is left until the next JPEG
    or the end.
    """
    order = [field.name for field in fields(parameters) if field.name not in ("shape", "jpeg_last")]
    if parameters.jpeg_last:
        order.append(order.pop(order.index("jpeg2")))
    operations: dict[type, Callable[..., np.ndarray]] = {
        Blur: _blur,
        Sinc: _blur,
        Resize: _resize,
        Noise: _add_noise,
        int: _jpeg,
    }
    for name in order:
        drawn = getattr(parameters, name)
        if drawn is not None:
            yield name, partial(operations[type(drawn)], drawn)


def _draw_blur(rng: np.random.Generator, config: BlurConfig) -> Blur | Sinc | None:
    if not _happens(rng, config.probability):
        return None
    size = _draw_size(rng, config.sizes)
    if _happens(rng, config.sinc_probability):
        omega = config.sinc_omega_small if size < config.sinc_large_from else config.sinc_omega_large
        return Sinc(size=size, omega=_uniform(rng, omega))
    family = _pick(rng, kernels.FAMILIES, [getattr(config.families, name) for name in kernels.FAMILIES])
    sigma_x = sigma_y = _uniform(rng, config.sigma)
    theta = 0.0
    if family.endswith("aniso"):
        sigma_y = _uniform(rng, config.sigma)
        theta = _uniform(rng, config.rotation)
    beta = None
    if family.startswith("generalized"):
        beta = _uniform_around_one(rng, config.beta_generalized)
    elif family.startswith("plateau"):
        beta = _uniform_around_one(rng, config.beta_plateau)
    return Blur(family=family, size=size, sigma_x=sigma_x, sigma_y=sigma_y, theta=theta, beta=beta)


def _draw_resize(
    rng: np.random.Generator, config: ResizeConfig, modes: tuple[str, ...], size: tuple[int, int]
) -> Resize:
    low, high = config.scale
    direction = _pick(rng, ("up", "down", "keep"), (config.up, config.down, config.keep))
    factor = {"up": (1.0, high), "down": (low, 1.0), "keep": (1.0, 1.0)}[direction]
    return _resize_to(size, _uniform(rng, factor), _pick(rng, modes))


def _resize_to(size: tuple[int, int], factor: float, mode: str) -> Resize:
    return Resize(factor=factor, mode=mode, height=max(1, int(size[0] * factor)), width=max(1, int(size[1] * factor)))


def _draw_noise(rng: np.random.Generator, config: NoiseConfig) -> Noise | None:
    if not _happens(rng, config.probability):
        return None
    gaussian = _happens(rng, config.gaussian_probability)
    return Noise(
        kind="gaussian" if gaussian else "poisson",
        strength=_uniform(rng, config.gaussian_sigma if gaussian else config.poisson_scale),
        gray=_happens(rng, config.gray_probability),
        seed=int(rng.integers(1 << 63)),
    )


def _draw_quality(rng: np.random.Generator, config: JpegConfig) -> int | None:
    if not _happens(rng, config.probability):
        return None
    return int(rng.integers(config.quality[0], config.quality[1], endpoint=True))


def _draw_final_sinc(rng: np.random.Generator, config: FinalSincConfig) -> Sinc | None:
    if not _happens(rng, config.probability):
        return None
    return Sinc(size=_draw_size(rng, config.sizes), omega=_uniform(rng, config.omega))


def _draw_size(rng: np.random.Generator, sizes: tuple[int, int]) -> int:
    return 2 * int(rng.integers(sizes[0] // 2, sizes[1] // 2, endpoint=True)) + 1


def _happens(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(rng.uniform(*limits))


def _uniform_around_one(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """Draw below one or above one at even odds: a range that starts at one gives exactly one half the time."""
    return _uniform(rng, (limits[0], 1.0) if _happens(rng, 0.5) else (1.0, limits[1]))


def _pick(rng: np.random.Generator, names: tuple[str, ...], probabilities: Sequence[float] | None = None) -> str:
    if probabilities is None:
        return names[int(rng.integers(len(names)))]
    # The last sum can be just below one: that number belongs to the last name that can be drawn.
    possible = [(name, share) for name, share in zip(names, probabilities, strict=True) if share > 0]
    place = np.searchsorted(np.cumsum([share for _, share in possible])[:-1], rng.random(), side="right")
    return possible[place][0]


def _blur(blur: Blur | Sinc, image: np.ndarray) -> np.ndarray:
    """Filter with the kernel; edges are mirrored without repeating the border pixel."""
    kernel = kernels.trim(blur.kernel())
    if blur.family == "iso":
        # The one family that is a product of a row and a column, for which two short filters give the same.
        line = kernel.sum(axis=0).astype(np.float32)
        return cv2.sepFilter2D(image, -1, line, line, borderType=cv2.BORDER_REFLECT_101)
    return _correlate(image, kernel.astype(np.float32))


def _correlate(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate (H, W, 3) float32 with a square kernel, edges mirrored as above."""
    size = len(kernel)
    if size**2 <= _DIRECT_TAPS or np.count_nonzero(kernel) > _BANDED_TAPS:
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    # OpenCV turns to Fourier transforms above 11x11 taps. With up to 17x17 that are not zero, which it skips, adding
    # up bands of few taps is faster.
    height, width = image.shape[:2]
    radius = size // 2
    padded = cv2.copyMakeBorder(image, radius, radius, radius, radius, cv2.BORDER_REFLECT_101)
    result = np.zeros_like(image)
    rows = _DIRECT_TAPS // size
    for top in range(0, size, rows):
        band = kernel[top : top + rows]
        part = cv2.filter2D(padded[top : top + height + len(band) - 1], -1, band, anchor=(radius, 0))
        result += part[:height, radius : radius + width]
    return result


def _resize(resize: Resize, image: np.ndarray) -> np.ndarray:
    """Resize without antialiasing for bilinear and bicubic (a = -0.75), as PyTorch's `interpolate`; area averages."""
    if image.shape[:2] == (resize.height, resize.width):
        return image
    return cv2.resize(image, (resize.width, resize.height), interpolation=_INTERPOLATION[resize.mode])


def _add_noise(noise: Noise, image: np.ndarray) -> np.ndarray:
    make = gaussian_noise if noise.kind == "gaussian" else poisson_noise
    noisy = make(image, noise.strength, noise.gray, np.random.default_rng(noise.seed))
    noisy += image
    return np.clip(noisy, 0, 255, out=noisy)


def _jpeg(quality: int, image: np.ndarray) -> np.ndarray:
    """Compress (baseline, 4:2:0) and decompress the image, clamped and rounded to 8 bits."""
    pixels = cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.float32)
