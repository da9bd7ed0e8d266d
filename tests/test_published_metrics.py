"""Every metric against figures of its published implementation, which `record_metrics.py` made."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from damaged_pictures import CHANGED, photograph
from record_metrics import SIZES, SMALL

from faithdiff_jax.evaluation.metrics import make_metric
from faithdiff_jax.evaluation.metrics.features import l2_pool, max_pool
from faithdiff_jax.evaluation.protocols import PROTOCOLS, Protocol

RECORDED = json.loads((pathlib.Path(__file__).parent / "data" / "metrics.json").read_text(encoding="utf-8"))


def protocol(recorded):
    """What "psnr ycbcr, border 4", "lpips vgg", "niqe yiq" and the like stand for."""
    metric, _, choice = recorded.partition(" ")
    kind, _, border = choice.removesuffix(" of pyiqa").partition(", border ")
    chosen = {metric: kind} if metric in ("psnr", "ssim", "lpips", "niqe") else {}
    return metric, Protocol(name="recorded", metrics=(metric,), border=int(border or 0), **chosen)


@pytest.mark.parametrize("recorded", RECORDED)
def test_figures_equal_the_published_ones(recorded):
    name, chosen = protocol(recorded)
    metric = make_metric(name, chosen)
    image = photograph(*SIZES.get(name, SMALL))
    for damage, expected in RECORDED[recorded].items():
        restored = CHANGED[damage](image) if damage in CHANGED else image
        figure = metric(restored, image if metric.info.needs_reference else None)
        # BasicSR takes what rounding leaves of black areas for texture: only noise leaves none.
        tolerance = 2e-2 if recorded == "niqe ycbcr" and damage != "noisy" else 1e-5
        assert figure == pytest.approx(expected, abs=tolerance), damage


def test_protocols_choose_what_their_papers_do():
    """The published script's pyiqa defaults, and the Y of BT.601 of most others."""
    image = photograph(*SMALL)
    other = CHANGED["blurred"](image)
    for name, figures in {
        "paper": ("psnr rgb", "ssim yiq", "lpips alex"),
        "ycbcr": ("psnr ycbcr", "ssim ycbcr"),
    }.items():
        assert PROTOCOLS[name].border == 0
        for recorded in figures:
            metric = make_metric(recorded.partition(" ")[0], name)
            assert metric(other, image) == pytest.approx(RECORDED[recorded]["blurred"], abs=1e-5)


def test_many_pictures_get_what_each_gets_alone(monkeypatch):
    """In batches of two, the last of them filled up, and of two sizes."""
    monkeypatch.setattr("faithdiff_jax.evaluation.metrics.perceptual.PIXELS_AT_ONCE", {"cpu": 2 * 40 * 50})
    references = [photograph(40, 50), photograph(50, 40), photograph(40, 50)[:, ::-1], photograph(40, 50)[::-1]]
    references = [np.ascontiguousarray(picture) for picture in references]
    changes = [*CHANGED.values()]
    restored = [change(picture) for change, picture in zip(changes, references, strict=True)]
    metric = make_metric("lpips")
    figures = metric.many(restored, references)
    monkeypatch.setattr("faithdiff_jax.evaluation.metrics.perceptual.PIXELS_AT_ONCE", {})
    alone = [metric(*pair) for pair in zip(restored, references, strict=True)]
    np.testing.assert_allclose(figures, alone, atol=1e-6)
    assert len(set(figures)) == 4


def test_pooling_of_odd_sides(rng):
    """Windows that are not whole are left out by the largest, and completed with zeros by the root of squares."""
    x = rng.random((1, 5, 4, 2)).astype(np.float32)
    expected = [[x[0, i : i + 2, j : j + 2].max((0, 1)) for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 2)[0], expected)
    padded = np.pad(x[0] ** 2, ((1, 1), (1, 1), (0, 0)))
    window = np.outer([1, 2, 1], [1, 2, 1])[..., None] / 16
    expected = [[np.sqrt((padded[i : i + 3, j : j + 3] * window).sum((0, 1))) for j in (0, 2)] for i in (0, 2, 4)]
    np.testing.assert_allclose(l2_pool(jnp.asarray(x))[0], expected, atol=1e-6)
