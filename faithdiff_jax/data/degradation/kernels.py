"""Blur kernels of the degradation: Gaussian, generalised Gaussian, plateau (each isotropic or not) and sinc.

All are (size, size) float64 arrays that sum to one, centred on the middle pixel, with odd `size`. Coordinates are
pixels from the centre, x to the right and y down. An isotropic kernel is the one with `sigma_y = sigma_x`.
"""

import numpy as np
from jaxtyping import Float64
from scipy.special import j1

FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> Float64[np.ndarray, "size size"]:
    """Gaussian `exp(-q / 2)` with `q = v^T S^-1 v`, `S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)^T`.

    Returns (size, size). `sigma_x` and `sigma_y` are standard deviations in pixels along the kernel's own axes,
    `theta` turns those axes, in radians. Raises ValueError for an even size or a sigma that is not positive.

    Source: Real-ESRGAN (Wang et al. 2021), section 3.2.
    """
    return _normalised(np.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta)))


def generalized_gaussian(
    size: int, sigma_x: float, sigma_y: float, theta: float, beta: float
) -> Float64[np.ndarray, "size size"]:
    """Generalised Gaussian `exp(-q^beta / 2)`: beta 1 is the Gaussian, below it a sharper peak, above it a flatter one.

    Returns (size, size); `q`, units and errors as in `gaussian`, and ValueError unless beta is positive.

    Source: Liu et al. 2020, "Estimating generalized Gaussian blur kernels for out-of-focus image deblurring", as
    Real-ESRGAN (section 3.2) uses it: the factor 1/2 stays outside the power.
    """
    return _normalised(np.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta) ** _positive("beta", beta)))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Float64[np.ndarray, "size size"]:
    """Plateau-shaped kernel `1 / (1 + q^beta)`: flat in the middle, falling off faster with a larger beta.

    Returns (size, size); `q`, units and errors as in `generalized_gaussian`.

    Source: Liu et al. 2020; Real-ESRGAN, section 3.2.
    """
    return _normalised(1.0 / (1.0 + _squared_distance(size, sigma_x, sigma_y, theta) ** _positive("beta", beta)))


def sinc(size: int, omega: float) -> Float64[np.ndarray, "size size"]:
    """Two-dimensional ideal low-pass `omega J1(omega r) / (2 pi r)`, which rings at edges; `omega^2 / 4 pi` at r = 0.

    Returns (size, size). `omega` is the cut-off in radians a pixel, 0 < omega <= pi; J1 is the Bessel function of
    order one. Raises ValueError for an even size or an omega outside that range.

    Source: Real-ESRGAN, section 3.4, equation (4).
    """
    if not 0 < omega <= np.pi:
        raise ValueError(f"omega = {omega}: must be above 0 and at most pi")
    x, y = _coordinates(size)
    radius = np.hypot(x, y)
    # The centre's limit is filled in by hand; a one stands in for the radius there, so that nothing divides by zero.
    centre = radius == 0
    radius[centre] = 1.0
    values = omega * j1(omega * radius) / (2 * np.pi * radius)
    values[centre] = omega**2 / (4 * np.pi)
    return _normalised(values)


def family_kernel(
    family: str, size: int, sigma_x: float, sigma_y: float, theta: float, beta: float | None
) -> Float64[np.ndarray, "size size"]:
    """Build the kernel of a family named in FAMILIES; `beta` is None for the two Gaussians.

    Returns (size, size). Raises ValueError for another name, for a missing beta, and as the family itself does.
    """
    if family not in FAMILIES:
        raise ValueError(f"kernel family = {family!r}: must be one of {', '.join(FAMILIES)}")
    if family in ("iso", "aniso"):
        return gaussian(size, sigma_x, sigma_y, theta)
    if beta is None:
        raise ValueError(f"beta = None: a kernel of the family {family} needs one")
    shape = generalized_gaussian if family.startswith("generalized") else plateau
    return shape(size, sigma_x, sigma_y, theta, beta)


def trim(kernel: Float64[np.ndarray, "size size"], tolerance: float = 1e-7) -> Float64[np.ndarray, "trimmed trimmed"]:
    """Drop what is too small to matter: single values, which become zero, and then the rim, ring by ring.

    Takes and returns a square of odd size, still centred and not rescaled. The values dropped, and again the rings,
    have together a mass of at most `tolerance`. The default is below the resolution of float32, in which images are
    filtered: the result is that of the whole kernel, for fewer multiplications. Values that float32 can only hold
    denormalised, on which processors are slow, go with the rest.
    """
    mass = np.abs(kernel)
    kernel = np.where(mass * mass.size < tolerance, 0.0, kernel)
    allowed = mass.sum() - tolerance
    cut = 0
    while kernel.shape[0] - 2 * (cut + 1) >= 1 and mass[cut + 1 : -cut - 1, cut + 1 : -cut - 1].sum() >= allowed:
        cut += 1
    return kernel[cut : kernel.shape[0] - cut, cut : kernel.shape[1] - cut]


def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the x and y of every pixel, from the centre; two (size, size) arrays."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size = {size}: a kernel has an odd, positive size")
    axis = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _squared_distance(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Give `q`: the squared distance from the centre, measured in sigmas along the turned axes."""
    x, y = _coordinates(size)
    along = (np.cos(theta) * x + np.sin(theta) * y) / _positive("sigma_x", sigma_x)
    across = (np.cos(theta) * y - np.sin(theta) * x) / _positive("sigma_y", sigma_y)
    squared: np.ndarray = along**2 + across**2
    return squared


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} = {value}: must be above 0")
    return value


def _normalised(values: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = values / values.sum()
    return kernel
