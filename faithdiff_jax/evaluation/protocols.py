"""Protocols: which definition of each metric a table uses. Figures are comparable only under one and the same.

Metrics of one name differ between papers: PSNR on RGB or on Y of either range (1.32 dB apart), with or without a border
cut off, LPIPS on AlexNet or VGG, three CLIPIQAs and two MANIQAs.
"""

import dataclasses
import difflib
import os
from typing import Literal

from faithdiff_jax.config import Range, check_ranges, load, shown
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import metric_info

Color = Literal["rgb", "yiq", "ycbcr"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How metrics are computed, and which of them belong to a table."""

    name: str
    metrics: tuple[str, ...]
    """In a table's order; names of `metrics.METRICS`."""
    psnr: Color = "rgb"
    """RGB, or Y: of YIQ, full range ("yiq"), or of YCbCr, BT.601 limited range ("ycbcr")."""
    ssim: Color = "yiq"
    niqe: Literal["yiq", "ycbcr"] = "yiq"
    """Y of YIQ, as pyiqa has it, or of YCbCr, as BasicSR has it."""
    border: int = 0
    """Pixels cut off on each side for PSNR and SSIM."""
    lpips: Literal["alex", "vgg"] = "alex"

    def __post_init__(self) -> None:
        check_ranges(self, border=Range(0, 1024, whole=True))
        if not self.metrics:
            raise ValueError("metrics is empty: a protocol needs at least one, such as psnr")
        for metric in self.metrics:
            metric_info(metric)


PROTOCOLS = {
    "paper": Protocol(
        name="paper",
        metrics=(
            "psnr", "ssim", "lpips", "dists", "niqe", "musiq", "maniqa-pipal", "clipiqa+_vitL14_512", "paq2piq", "fid",
        ),
    ),
    "ycbcr": Protocol(
        name="ycbcr",
        metrics=("psnr", "ssim", "lpips", "dists", "niqe", "musiq", "maniqa-pipal", "clipiqa", "fid"),
        psnr="ycbcr",
        ssim="ycbcr",
    ),
}  # fmt: skip
"""`paper`: the published FaithDiff script. `ycbcr`: OSEDiff, TSD-SR, SeeSR and others."""


def find_protocol(name: str) -> Protocol:
    """The protocol of a name, or of a YAML file with the fields of `Protocol`.

    Raises:
        InputError: there is neither, or the file does not hold a protocol.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if os.path.isfile(name):
        protocol = load(Protocol, name)
        if protocol.name in PROTOCOLS:
            raise InputError(f"{name}: the name {shown(protocol.name)} is taken by a protocol of the package")
        return protocol
    close = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the protocols are {', '.join(PROTOCOLS)}, or a YAML file"
    raise InputError(f"no protocol {shown(name)}; {hint}")
