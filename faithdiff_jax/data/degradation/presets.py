"""Degradations with a name: the published one, and the three levels of severity of synthetic test sets."""

from collections.abc import Mapping
from types import MappingProxyType

from faithdiff_jax.data.degradation.config import (
    BlurConfig,
    DegradationConfig,
    FamilyProbabilities,
    FinalSincConfig,
    JpegConfig,
    NoiseConfig,
    Pair,
    ResizeConfig,
)


def _one_order(sigma: Pair, resize: ResizeConfig, noise: NoiseConfig, quality: tuple[int, int]) -> DegradationConfig:
    """One round of blur, resize, noise and JPEG, then the final resize: the second round is switched off."""
    return DegradationConfig(
        blur1=_gaussian_blur(sigma),
        resize1=resize,
        noise1=noise,
        jpeg1=JpegConfig(quality=quality),
        blur2=BlurConfig(probability=0.0),
        resize2=ResizeConfig(up=0.0, down=0.0, keep=1.0, scale=(1.0, 1.0)),
        noise2=NoiseConfig(probability=0.0, gaussian_sigma=(0.0, 0.0), poisson_scale=(0.0, 0.0)),
        jpeg2=JpegConfig(probability=0.0, quality=(100, 100)),
        final_sinc=FinalSincConfig(probability=0.0),
    )


def _gaussian_blur(sigma: Pair, probability: float = 1.0) -> BlurConfig:
    """DASR's blur: Gaussians only, no sinc; its code draws sizes from 9 up, where its settings file says 7."""
    families = FamilyProbabilities(
        iso=0.65, aniso=0.35, generalized_iso=0, generalized_aniso=0, plateau_iso=0, plateau_aniso=0
    )
    return BlurConfig(probability=probability, sinc_probability=0.0, families=families, sizes=(9, 21), sigma=sigma)


PUBLISHED = DegradationConfig()
"""The degradation FaithDiff was trained with."""

LEVELS: Mapping[str, DegradationConfig] = MappingProxyType(
    {
        "I": _one_order(
            (0.2, 0.8),
            ResizeConfig(up=0.1, down=0.2, keep=0.7, scale=(0.85, 1.2)),
            NoiseConfig(gaussian_sigma=(1.0, 10.0), poisson_scale=(0.05, 0.5)),
            (90, 95),
        ),
        "II": _one_order(
            (0.2, 1.5),
            ResizeConfig(up=0.3, down=0.4, keep=0.3, scale=(0.5, 1.2)),
            NoiseConfig(gaussian_sigma=(1.0, 20.0), poisson_scale=(0.05, 1.5)),
            (50, 95),
        ),
        "III": DegradationConfig(
            blur1=_gaussian_blur((0.2, 3.0)),
            resize1=ResizeConfig(up=0.2, down=0.7, keep=0.1, scale=(0.15, 1.5)),
            noise1=NoiseConfig(gaussian_sigma=(1.0, 30.0), poisson_scale=(0.05, 3.0)),
            jpeg1=JpegConfig(quality=(30, 95)),
            blur2=_gaussian_blur((0.2, 1.5), probability=0.8),
            resize2=ResizeConfig(up=0.3, down=0.4, keep=0.3, scale=(0.3, 1.2)),
            noise2=NoiseConfig(gaussian_sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
            jpeg2=JpegConfig(quality=(30, 95)),
            final_sinc=FinalSincConfig(sizes=(9, 21)),
        ),
    }
)
"""Severity levels of synthetic test sets, for scale 4: I mild, II medium, III severe.

The ranges are DASR's ("Efficient and Degradation-Adaptive Network for Real-World Image Super-Resolution", Liang et al.
2022; `options/train/DASR/train_DASR.yml`: weak and standard with one round, severe with two). Unlike DASR the image is
not sharpened before it is degraded. Pictures made with them are not the published test pictures, whose draws are not
known: they have the same severity, not the same pixels.
"""
