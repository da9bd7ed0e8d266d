"""Errors of what a step predicts: in latents, and in pictures through the decoder.

output, target            --L1 or L2--> latent error
clean latent --decoder--> picture; picture, reference --L1 or L2, LPIPS--> picture error
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from faithdiff_jax.evaluation.metrics.perceptual import lpips_distance
from faithdiff_jax.training.config import TrainConfig

Batched = Float[Array, "b h w c"]
Each = Float32[Array, " b"]
LPIPS_NET = "alex"


def mean_error(kind: str, ours: Batched, theirs: Batched) -> Each:
    """Each sample's mean absolute ("l1") or squared ("l2") difference, in float32: (b, h, w, c) twice -> (b,)."""
    error = ours.astype(jnp.float32) - theirs.astype(jnp.float32)
    return jnp.mean(jnp.abs(error) if kind == "l1" else error**2, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class PictureLoss:
    """The weighted error of pictures in [-1, 1].

    Attributes:
        kind: "l1" or "l2".
        pixel: weight of that difference.
        lpips: weight of LPIPS (alex).
        distance: LPIPS of two batches (b, H, W, 3), (b,); None where `lpips` is 0.
    """

    kind: str
    pixel: float
    lpips: float
    distance: Callable[[Batched, Batched], Each] | None

    def __call__(self, ours: Batched, theirs: Batched, wanted: Bool[Array, " b"] | None = None) -> Each:
        """Each sample's error: (b, H, W, 3) twice -> (b,). LPIPS counts where it is `wanted`; None for everywhere."""
        each = self.pixel * mean_error(self.kind, ours, theirs)
        if self.distance is not None:
            distance = self.distance(ours.astype(jnp.float32), theirs.astype(jnp.float32))
            each += self.lpips * (distance if wanted is None else jnp.where(wanted, distance, 0))
        return each


def picture_loss(config: TrainConfig) -> PictureLoss | None:
    """The part of a run's loss that needs pictures; None if it has none, and nothing need be decoded.

    Raises:
        Unavailable: the loss has LPIPS, whose weights are not installed.
    """
    losses = config.losses
    if not losses.in_pictures:
        return None
    distance = lpips_distance(LPIPS_NET) if losses.lpips else None
    return PictureLoss(config.loss, losses.pixel, losses.lpips, distance)
