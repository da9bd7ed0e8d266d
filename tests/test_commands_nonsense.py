"""Structured nonsense at every command's flags: exit code 2, one line, nothing written, and no work begun."""

import os
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import write

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.main import run_command

NUMBERS = ["nan", "inf", "-1", "", " ", "x", "1e400", "0x10", "1_0", "1.5", "٣", "²", "9" * 5000, "-" + "9" * 40]
CHOICES = ["", "nothing like it", "III ", "é", "x" * 3000]
FOLDERS = ["", " ", "no/such", "x" * 5000, "a.png/below", "\ud800"]
CONFIGS = ["", "stage9", "../stage2", "tiny", "x" * 5000, "a.png", "\ud800"]

BASES = {
    "pairs": {"--input": "photos", "--output": "out", "--level": "II"},
    "shards": {"--photos": "photos", "--output": "out"},
    "preview": {"--input": "photos", "--output": "out.png"},
    "autoencoder": {"--config": "tiny/autoencoder", "--data": "photos", "--output": "out"},
    "caption": {"--input": "photos", "--output": "out"},
    "ocr": {"--method": "ours=photos", "--references": "photos"},
    "gallery": {"--method": "ours=photos", "--references": "photos", "--output": "out.html"},
    "train": {"--config": "tiny/stage2", "--model": str(SMALL_MODEL), "--output": "out", "--data": "photos"},
    "convert": {"--run": "no/such", "--output": "out"},
    "evaluate": {"--restored": "photos", "--output": "out"},
}
WRONG = {
    "pairs": {
        "--input": FOLDERS, "--captions": FOLDERS, "--level": CHOICES, "--seed": NUMBERS,
        "--crop": [*NUMBERS, "0", "6"],
    },
    "shards": {"--photos": FOLDERS, "--captions": FOLDERS, "--records-per-shard": [*NUMBERS, "0"]},
    "preview": {
        "--input": FOLDERS, "--captions": FOLDERS, "--level": CHOICES, "--config": CONFIGS, "--seed": NUMBERS,
        "--count": [*NUMBERS, "0", "501"], "--crop": [*NUMBERS, "0", "6", "100000"],
    },
    "autoencoder": {"--config": [*CONFIGS, "stage2"], "--data": FOLDERS, "--held-out": FOLDERS},
    "caption": {
        "--input": FOLDERS, "--cleaned": FOLDERS, "--batch": [*NUMBERS, "0"], "--max-tokens": [*NUMBERS, "0"],
        "--device": CHOICES, "--dtype": CHOICES,
    },
    "ocr": {
        "--method": [*FOLDERS, "=photos", "ours="], "--annotations": [*FOLDERS, "photos", "a.png"], "--input": FOLDERS,
    },
    "gallery": {
        "--method": [*FOLDERS, "=photos", "ours=", "ours=no/such", "reference=photos", f"{'x' * 99}=photos"],
        "--references": FOLDERS, "--input": FOLDERS, "--output": ["", " ", "x", "photos", "out.html/x", "a.png/x.html"],
        "--metrics": [*CHOICES[1:], "psnr,,ssim", "psnr;ssim"], "--protocol": CONFIGS, "--title": ["", " "],
        "--sheet": ["", " ", "x", "photos", "a.png/x.png"], "--crop": [*NUMBERS, "0,0,9", "0,0,7,7", "60,60,9,9"],
        "--picture": CHOICES, "--crop-size": [*NUMBERS, "0"], "--enlarge": CHOICES,
        "--largest-side": [*NUMBERS, "0", "8193"], "--quality": [*NUMBERS, "0", "101"],
    },
    "train": {
        "--config": [*CONFIGS, "models/sdxl"], "--model": FOLDERS, "--data": FOLDERS, "--resume": CHOICES,
        "--processes": [*NUMBERS, "0", "2"], "--process-id": [*NUMBERS, "1"],
        "--coordinator": ["", "host", "host:x", ":1"],
    },
    "evaluate": {
        "--restored": FOLDERS, "--references": FOLDERS, "--pairs": FOLDERS, "--data": FOLDERS, "--protocol": CONFIGS,
        "--config": CONFIGS, "--metrics": [*CHOICES, "psnr,", "psnr,nan"], "--baseline": [*CHOICES, "x=no/such"],
        "--scale": ["nan", "inf", "-1", "0", "", "x", "1e400", "1_0", "33"], "--seed": NUMBERS, "--dtype": CHOICES,
    },
    "convert": {"--run": FOLDERS, "--step": NUMBERS, "--seed": NUMBERS, "--nope": ["1"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photographs; the working directory."""
    folder = tmp_path_factory.mktemp("nonsense")
    write(folder / "photos" / "a.png", pictures())
    write(folder / "a.png", pictures())
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def pictures():
    import numpy as np

    return np.full((64, 64, 3), 128, np.uint8)


@st.composite
def wrong_calls(draw):
    name = draw(st.sampled_from(sorted(WRONG)))
    flag = draw(st.sampled_from(sorted(WRONG[name])))
    flags = BASES[name] | {flag: draw(st.sampled_from(WRONG[name][flag]))}
    if draw(st.booleans()) and flag in BASES[name] and flag not in ("--data",):
        del flags[flag]  # missing instead
    return name, [f"{key}={value}" for key, value in flags.items()]


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(wrong_calls())
def test_nonsense_ends_in_one_line(place, monkeypatch, capsys, call):
    for work in (
        "faithdiff_jax.cli.pairs.make_pairs",
        "faithdiff_jax.cli.shards.make_shards",
        "faithdiff_jax.cli.preview.draw_sheet",
        "faithdiff_jax.training.autoencoder.train",
        "faithdiff_jax.cli.caption.caption_pictures",
        "faithdiff_jax.training.loop.load_parameters",
        "faithdiff_jax.evaluation.runner.Evaluation.run",
    ):
        monkeypatch.setattr(work, lambda *rest, **more: pytest.fail("work was begun"))
    before = sorted(place.rglob("*"))
    name, flags = call
    assert run_command(name, flags) == 2, flags
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "internal error" not in said.err
    assert sorted(pathlib.Path(place).rglob("*")) == before
