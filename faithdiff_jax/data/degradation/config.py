"""Ranges and probabilities of the degradation, as configuration; the defaults are the published ones.

Ranges are (low, high), both ends included; angles and cut-offs in radians, noise in grey levels of 255.
"""

import math
from dataclasses import asdict, dataclass, field

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.data.checks import check_distribution, check_pairs, check_probability
from faithdiff_jax.errors import InputError, shown

Pair = tuple[float, float]

RESIZE_MODES = ("area", "bilinear", "bicubic")
LARGEST_KERNEL = 101


@dataclass(frozen=True, kw_only=True)
class FamilyProbabilities:
    """How often each kernel family is drawn; the six numbers sum to one."""

    iso: float = 0.45
    aniso: float = 0.25
    generalized_iso: float = 0.12
    generalized_aniso: float = 0.03
    plateau_iso: float = 0.12
    plateau_aniso: float = 0.03

    def __post_init__(self) -> None:
        check_distribution(self, *asdict(self))


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    """A blur: with `sinc_probability` a sinc kernel, else one of the six families.

    The size is odd and uniform in `sizes`; `sigma` is drawn once for an isotropic kernel and for each axis of another,
    which also gets an angle from `rotation`. An exponent is drawn, at even odds, below or above one in its range. The
    sinc's cut-off is `sinc_omega_small` for kernels below `sinc_large_from` and `sinc_omega_large` from there up.
    """

    probability: float = 1.0
    sinc_probability: float = 0.1
    families: FamilyProbabilities = field(default_factory=FamilyProbabilities)
    sizes: tuple[int, int] = (7, 21)
    sigma: Pair = (0.2, 3.0)
    rotation: Pair = (-math.pi, math.pi)
    beta_generalized: Pair = (0.5, 4.0)
    beta_plateau: Pair = (1.0, 2.0)
    sinc_omega_small: Pair = (math.pi / 3, math.pi)
    sinc_omega_large: Pair = (math.pi / 5, math.pi)
    sinc_large_from: int = 13

    def __post_init__(self) -> None:
        check_probability(self, "probability", "sinc_probability")
        _check_sizes(self, "sizes")
        check_ranges(self, sinc_large_from=Range(0, LARGEST_KERNEL + 1, whole=True))
        check_pairs(self, Range(1e-3, LARGEST_KERNEL), "sigma")
        check_pairs(self, Range(-math.pi, math.pi), "rotation")
        check_pairs(self, Range(1e-3, 100), "beta_generalized", "beta_plateau", around_one=True)
        check_pairs(self, Range(1e-3, math.pi), "sinc_omega_small", "sinc_omega_large")


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """A resize: enlarge by 1..scale[1], shrink by scale[0]..1, or keep; the three probabilities sum to one."""

    up: float
    down: float
    keep: float
    scale: Pair

    def __post_init__(self) -> None:
        check_distribution(self, "up", "down", "keep")
        check_pairs(self, Range(1e-2, 16), "scale", around_one=True)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise: Gaussian with a standard deviation in `gaussian_sigma`, else Poisson times `poisson_scale`.

    With `gray_probability` all three channels get the same noise.
    """

    probability: float = 1.0
    gaussian_probability: float = 0.5
    gaussian_sigma: Pair
    poisson_scale: Pair
    gray_probability: float = 0.4

    def __post_init__(self) -> None:
        check_probability(self, "probability", "gaussian_probability", "gray_probability")
        check_pairs(self, Range(0, 255), "gaussian_sigma")
        check_pairs(self, Range(0, 100), "poisson_scale")


@dataclass(frozen=True, kw_only=True)
class JpegConfig:
    """JPEG compression at a whole quality, uniform in `quality`."""

    probability: float = 1.0
    quality: tuple[int, int]

    def __post_init__(self) -> None:
        check_probability(self, "probability")
        check_pairs(self, Range(1, 100, whole=True), "quality")


@dataclass(frozen=True, kw_only=True)
class FinalSincConfig:
    """The sinc filter of the last stage: drawn with `probability`, odd size in `sizes`, cut-off in `omega`."""

    probability: float = 0.8
    sizes: tuple[int, int] = (7, 21)
    omega: Pair = (math.pi / 3, math.pi)

    def __post_init__(self) -> None:
        check_probability(self, "probability")
        _check_sizes(self, "sizes")
        check_pairs(self, Range(1e-3, math.pi), "omega")


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The second-order degradation, with the published settings as defaults.

    Order: blur, resize, noise, JPEG; again, the second resize being relative to the image's size over `scale`; then
    the final resize with its sinc filter, before the second JPEG or (`jpeg_last_probability`) after it. Every resize
    takes a mode from `resize_modes`, all equally likely. A stage's `probability` is that of it happening at all.
    Each dataclass raises InputError naming the field, its value and the limit.

    Source: Real-ESRGAN (Wang et al. 2021), figure 2, with the settings of PASD, which FaithDiff's training used.
    """

    scale: int = 4
    resize_modes: tuple[str, ...] = RESIZE_MODES
    blur1: BlurConfig = field(default_factory=BlurConfig)
    resize1: ResizeConfig = field(
        default_factory=lambda: ResizeConfig(up=0.2, down=0.7, keep=0.1, scale=(0.3, 1.5)),
    )
    noise1: NoiseConfig = field(
        default_factory=lambda: NoiseConfig(gaussian_sigma=(1.0, 15.0), poisson_scale=(0.05, 2.0))
    )
    jpeg1: JpegConfig = field(default_factory=lambda: JpegConfig(quality=(60, 95)))
    blur2: BlurConfig = field(default_factory=lambda: BlurConfig(probability=0.5, sigma=(0.2, 1.5)))
    resize2: ResizeConfig = field(
        default_factory=lambda: ResizeConfig(up=0.3, down=0.4, keep=0.3, scale=(0.6, 1.2)),
    )
    noise2: NoiseConfig = field(
        default_factory=lambda: NoiseConfig(gaussian_sigma=(1.0, 12.0), poisson_scale=(0.05, 1.0))
    )
    jpeg2: JpegConfig = field(default_factory=lambda: JpegConfig(quality=(60, 100)))
    final_sinc: FinalSincConfig = field(default_factory=FinalSincConfig)
    jpeg_last_probability: float = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, scale=Range(1, 16, whole=True))
        modes = self.resize_modes
        if not isinstance(modes, (tuple, list)) or not modes or any(mode not in RESIZE_MODES for mode in modes):
            raise InputError(f"resize_modes is {shown(modes)}: must list at least one of {', '.join(RESIZE_MODES)}")
        check_probability(self, "jpeg_last_probability")


def _check_sizes(config: object, name: str) -> None:
    check_pairs(config, Range(1, LARGEST_KERNEL, whole=True), name)
    if any(size % 2 == 0 for size in getattr(config, name)):
        raise InputError(f"{name} is {shown(getattr(config, name))}: kernel sizes are odd")
