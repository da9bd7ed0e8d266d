"""The rows of the paper's comparisons, as `ablations.py` trains them at a small size."""

import dataclasses

STAGE1 = ("stage1", 0.25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What every row is given."""

    steps: int = 120
    """Of all stages together."""
    base_steps: int = 400
    batch: int = 4
    crop: int = 48
    warmup: int = 10
    faster: float = 150.0
    """Learning rates are so many times the full size's."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row: the configurations of the full size that it is trained with, one after another.

    Attributes:
        stages: configuration, and its share of the budget.
        small: what the small size changes in the architecture that they name.
        base: whose base it starts from, configs/tiny/ablations_BASE.yaml.
    """

    stages: tuple[tuple[str, float], ...]
    small: tuple[str, ...] = ()
    base: str = "sdxl"


_HINT = "model.lq_encoder.channels=[8, 16, 32]"
ROWS = {
    "full": Row((STAGE1, ("stage2", 0.75))),
    "without_alignment": Row((("ablations/without_alignment", 1.0),)),
    "without_pretraining": Row((("ablations/without_pretraining", 1.0),)),
    "encoder_fixed": Row((STAGE1, ("ablations/encoder_fixed", 0.75))),
    "separate": Row((STAGE1, ("ablations/separate_encoder", 0.375), ("ablations/separate_diffusion", 0.375))),
    "sft": Row((("baselines/sft", 1.0),)),
    "last_layer": Row(
        (STAGE1, ("ablations/last_layer_features", 0.75)), ("model.lq_features=last", "model.alignment.norm_groups=1")
    ),
    "controlnet": Row((("baselines/controlnet", 1.0),), (_HINT, "model.lq_encoder.out_channels=32")),
    "sd21": Row((STAGE1, ("stage2", 0.75)), base="sd21"),
    "controlnet_xs": Row(
        (("baselines/controlnet_xs", 1.0),),
        (_HINT, "model.lq_encoder.out_channels=8", "model.alignment.xs.channels=[8, 16, 32]",
         "model.alignment.xs.heads=[1, 1, 2]"),
    ),
    "diffusion_fixed": Row((STAGE1, ("ablations/diffusion_fixed", 0.75))),
}  # fmt: skip
"""By the names under which tables know their models."""
