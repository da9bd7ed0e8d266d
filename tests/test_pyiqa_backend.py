"""Metrics through pyiqa: what it is given and what becomes of its faults, with a stand-in that computes means."""

import importlib.util
import pathlib
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from damaged_pictures import photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import METRICS, Unavailable, make_folder_metric, make_metric
from faithdiff_jax.evaluation.metrics.pyiqa_backend import _DECLARED, import_pyiqa
from faithdiff_jax.files.images import save_image

OURS = [name for name, info in METRICS.items() if info.backend == "pyiqa" and not info.over_folders]


def stand_in(monkeypatch, create):
    module = types.ModuleType("pyiqa")
    module.create_metric = create
    monkeypatch.setitem(sys.modules, "pyiqa", module)


@pytest.mark.parametrize("name", OURS)
def test_pyiqa_gets_its_own_name_and_each_picture_between_0_and_1(name, monkeypatch, caplog, capsys):
    seen = []

    def create(chosen):
        print("Loading pretrained model")
        seen.append(chosen)

        def metric(tensor):
            assert (tensor.dtype, tensor.ndim) == (torch.float32, 4)
            assert not torch.is_grad_enabled()
            return tensor.mean(dim=(1, 2, 3))[:, None]

        return metric

    stand_in(monkeypatch, create)
    pictures = [photograph(40, 50), photograph(60, 40)]
    figures = make_metric(name).many(pictures)
    assert seen == [name]
    assert figures == pytest.approx([picture.mean() / 255 for picture in pictures], abs=1e-6)
    assert "noncommercial use only (PolyForm Noncommercial 1.0.0)" in caplog.text
    assert "PolyForm Noncommercial" in METRICS[name].note
    assert capsys.readouterr().out == "", "a command's output is its own"


def test_fid_compares_folders(tmp_path, monkeypatch):
    stand_in(monkeypatch, lambda name: lambda *folders, **options: len(folders) + options["num_workers"])
    for folder in ("restored", "originals"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            save_image(tmp_path / folder / f"{name}.png", photograph(20, 20))
    fid = make_folder_metric("fid")
    assert fid(tmp_path / "restored", tmp_path / "originals") == 2
    with pytest.raises(InputError, match="none: no such folder"):
        fid(tmp_path / "restored", tmp_path / "none")
    (tmp_path / "originals" / "a.png").unlink()
    with pytest.raises(InputError, match="originals: has 1 pictures, fid needs 2 at least"):
        fid(tmp_path / "restored", tmp_path / "originals")
    with pytest.raises(InputError, match=r"^fid compares folders: it has no figure for a single picture"):
        make_metric("fid")
    with pytest.raises(InputError, match=r"^psnr compares pictures, not folders"):
        make_folder_metric("psnr")


@pytest.mark.parametrize(("fault", "message"), [
    (urllib.error.URLError("no such host"), r"^musiq: its weights cannot be fetched \(.*no such host"),
    (ModuleNotFoundError("No module named 'timm'", name="timm"), "^musiq: pyiqa needs timm, which is not installed"),
    (RuntimeError("Missing\nkeys " + 300 * "x"), r"^musiq: pyiqa cannot prepare it \(Missing keys x+\.\.\.\)$"),
    (AssertionError(), r"^musiq: pyiqa cannot prepare it \(AssertionError\)"),
])  # fmt: skip
def test_what_pyiqa_cannot_do_is_unavailable(fault, message, monkeypatch):
    def create(name):
        raise fault

    stand_in(monkeypatch, create)
    with pytest.raises(Unavailable, match=message):
        make_metric("musiq")


def test_without_pyiqa_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(
        Unavailable, match=r"^musiq: pyiqa is not installed: pip install pyiqa; .*noncommercial use only"
    ):
        make_metric("musiq")


TORCHVISION = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: dets)
"""
PYIQA = "import torchvision\ncreate_metric = lambda name: lambda tensor: tensor.sum()\n"


def test_torchvision_without_its_operators(tmp_path, monkeypatch):
    """torchvision's wheel for CUDA beside torch for the CPU: its first import fails, as the real one's does."""
    for name, text in {"torchvision": TORCHVISION, "pyiqa": PYIQA}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert make_metric("musiq")(np.full((32, 32, 3), 255, np.uint8)) == 32 * 32 * 3
    finally:
        _DECLARED.pop()._destroy()
        for name in ("torchvision", "pyiqa"):
            sys.modules.pop(name, None)


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="pyiqa is not installed")
def test_a_random_checkpoint_in_pyiqas_cache(tmp_path, monkeypatch):
    import_pyiqa()
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    from pyiqa.archs.musiq_arch import MUSIQ, default_model_urls

    model = MUSIQ(pretrained=False)
    torch.save(model.state_dict(), tmp_path / pathlib.PurePosixPath(default_model_urls["koniq10k"]).name)
    picture = photograph(64, 80)
    with torch.no_grad():
        expected = float(model.eval()(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255))
    assert make_metric("musiq")(picture) == pytest.approx(expected, rel=1e-5)
