import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import j0

from faithdiff_jax.data.degradation import kernels

SIZES = (7, 13, 21)
SHAPES = ((0.2, 0.2, 0.0), (1.7, 1.7, 0.0), (3.0, 0.4, 0.9), (0.6, 2.8, -2.4))


def pointwise(size, sigma_x, sigma_y, theta, profile):
    """Evaluate a kernel one pixel at a time from the inverse of its covariance matrix."""
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    values = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            point = np.array([column - size // 2, row - size // 2])
            values[row, column] = profile(point @ inverse @ point)
    return values / values.sum()


def family_profile(family, beta):
    if family in ("iso", "aniso"):
        return lambda q: math.exp(-q / 2)
    if family.startswith("generalized"):
        return lambda q: math.exp(-(q**beta) / 2)
    return lambda q: 1 / (1 + q**beta)


@pytest.mark.parametrize("family", kernels.FAMILIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.3])
def test_family_matches_its_formula(family, size, beta):
    for sigma_x, sigma_y, theta in SHAPES:
        if family.endswith("aniso") != (sigma_x != sigma_y):
            continue
        kernel = kernels.family_kernel(family, size, sigma_x, sigma_y, theta, beta)
        expected = pointwise(size, sigma_x, sigma_y, theta, family_profile(family, beta))
        np.testing.assert_allclose(kernel, expected, rtol=1e-9, atol=1e-15)
        assert kernel.shape == (size, size)
        assert kernel.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-15)


def test_gaussian_has_its_sigmas_along_the_turned_axes():
    kernel = kernels.gaussian(41, 3.0, 1.5, 0.6)
    axis = np.arange(41) - 20
    x, y = np.meshgrid(axis, axis)
    along = math.cos(0.6) * x + math.sin(0.6) * y
    across = math.cos(0.6) * y - math.sin(0.6) * x
    assert (kernel * along**2).sum() == pytest.approx(9, rel=1e-3)
    assert (kernel * across**2).sum() == pytest.approx(2.25, rel=1e-3)
    assert (kernel * along * across).sum() == pytest.approx(0, abs=1e-6)


def test_special_exponents():
    shape = (15, 2.0, 1.0, 0.3)
    np.testing.assert_allclose(kernels.generalized_gaussian(*shape, 1.0), kernels.gaussian(*shape))
    # A large exponent makes both a disc of radius sigma.
    axis = np.arange(15) - 7
    inside = np.add.outer(axis**2, axis**2) < 3.5**2
    for family in (kernels.generalized_gaussian, kernels.plateau):
        np.testing.assert_allclose(family(15, 3.5, 3.5, 0.0, 100.0), inside / inside.sum(), atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("omega", [math.pi / 5, 1.3, math.pi])
def test_sinc_is_the_transform_of_a_disc(size, omega):
    # Back from frequencies, all of the same weight up to omega: (1 / 2 pi) times the integral of J0(k r) k.
    kernel = kernels.sinc(size, omega)
    expected = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            radius = math.hypot(row - size // 2, column - size // 2)
            expected[row, column] = quad(lambda k, r: k * j0(k * r), 0, omega, args=(radius,), limit=200)[0]
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-9)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)


def test_trim_drops_nothing_that_float32_would_notice(rng):
    for sigma_x, sigma_y, theta in SHAPES:
        kernel = kernels.gaussian(21, sigma_x, sigma_y, theta)
        trimmed = kernels.trim(kernel)
        rim = (21 - len(trimmed)) // 2
        restored = np.pad(trimmed, rim)
        assert np.abs(kernel - restored).sum() <= 2e-7
        kept = trimmed[trimmed > 0]
        np.testing.assert_array_equal(kept, kernel[restored > 0])
        assert kept.min() > np.finfo(np.float32).tiny
    assert kernels.trim(kernels.gaussian(21, 0.2, 0.2)).shape == (3, 3)
    assert kernels.trim(kernels.plateau(21, 3.0, 3.0, 0.0, 1.0)).shape == (21, 21)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.gaussian(8, 1, 1), "size = 8"),
        (lambda: kernels.gaussian(-1, 1, 1), "size = -1"),
        (lambda: kernels.gaussian(7, 0, 1), "sigma_x = 0"),
        (lambda: kernels.gaussian(7, 1, math.nan), "sigma_y = nan"),
        (lambda: kernels.plateau(7, 1, 1, 0, -2), "beta = -2"),
        (lambda: kernels.generalized_gaussian(7, 1, 1, 0, 0), "beta = 0"),
        (lambda: kernels.sinc(7, 0), "omega = 0"),
        (lambda: kernels.sinc(7, 3.2), "omega = 3.2"),
        (lambda: kernels.sinc(10, 1.0), "size = 10"),
        (lambda: kernels.family_kernel("box", 7, 1, 1, 0, None), "kernel family = 'box'"),
        (lambda: kernels.family_kernel("plateau_iso", 7, 1, 1, 0, None), "beta = None"),
    ],
)
def test_bad_parameters_are_named(call, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        call()
