import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.degradation.degrade import (
    LEVELS,
    PUBLISHED,
    Blur,
    DegradationParameters,
    Noise,
    Resize,
    Sinc,
    apply,
    draw,
    stages,
)
from faithdiff_jax.data.preview import MARGIN, Pair, describe, draw_sheet, read_config, sample_pairs
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.sheets import GAP, PAPER

ROOT = Path(__file__).parents[1]

PARAMETERS = DegradationParameters(
    shape=(256, 512),
    blur1=Blur(family="generalized_aniso", size=13, sigma_x=1.8, sigma_y=0.5, theta=-np.pi / 2, beta=2.126),
    resize1=Resize(factor=0.62, mode="area", height=158, width=317),
    noise1=Noise(kind="poisson", strength=0.9, gray=True, seed=1),
    jpeg1=73,
    blur2=Sinc(size=7, omega=1.5),
    resize2=Resize(factor=1.1, mode="bicubic", height=70, width=140),
    noise2=Noise(kind="gaussian", strength=11.25, gray=False, seed=2),
    jpeg2=88,
    final_resize=Resize(factor=1.0, mode="bilinear", height=64, width=128),
    final_sinc=Sinc(size=21, omega=3.14),
    jpeg_last=True,
)
"""One of everything."""


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:200, :240]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:160, :300]).save(folder / "more" / "coffee.png")
    Image.fromarray(data.chelsea()[:130, :140]).save(folder / "cat.png")
    (folder / "astronaut.txt").write_text("The image features a woman in orange. She smiles. She waves.")
    return folder


def run(folder, output, *more):
    flags = ["--input", folder, "--output", output, "--crop", 64, "--count", 3, *more]
    return run_command("preview", [str(flag) for flag in flags])


def pixels(path):
    return np.asarray(Image.open(path))


def photographs_of(folder):
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png"))]


def test_every_stage_is_described():
    assert describe(PARAMETERS) == [
        "1st: blur generalized aniso 13 s=1.80x0.50 at -90 deg b=2.13 | resize 0.62 area to 317x158 | "
        "noise poisson 0.90 gray | jpeg 73",
        "2nd: blur sinc 7 w=1.50 | resize 1.10/4 bicubic to 140x70 | noise gaussian 11.25",
        "end: resize 1/4 bilinear to 128x64 | sinc 21 w=3.14 | jpeg 88",
    ]


def test_stages_are_described_in_their_order():
    assert describe(dataclasses.replace(PARAMETERS, jpeg_last=False))[2] == (
        "end: jpeg 88 | resize 1/4 bilinear to 128x64 | sinc 21 w=3.14"
    )


def test_resizes_are_relative_to_the_scale_of_the_pair():
    half = dataclasses.replace(PARAMETERS, final_resize=Resize(factor=1.0, mode="area", height=128, width=256))
    text = " ".join(describe(half))
    assert "resize 1.10/2 bicubic to 140x70" in text
    assert "resize 1/2 area to 256x128" in text


def test_what_does_not_happen_is_not_described():
    mild = dataclasses.replace(
        PARAMETERS,
        blur1=Blur(family="iso", size=9, sigma_x=0.7, sigma_y=0.7, theta=0.0, beta=None),
        resize1=Resize(factor=1.0, mode="area", height=256, width=512),
        blur2=None,
        resize2=Resize(factor=1.0, mode="area", height=64, width=128),
        noise2=None,
        jpeg2=None,
        final_sinc=None,
    )
    assert describe(mild) == [
        "1st: blur iso 9 s=0.70 | noise poisson 0.90 gray | jpeg 73",
        "2nd: resize 1.00/4 area to 128x64",
    ]


@pytest.mark.parametrize("config", [PUBLISHED, *LEVELS.values()])
def test_descriptions_have_as_many_parts_as_there_are_stages(config, rng):
    for _ in range(300):
        parameters = draw(rng, (256, 192), config)
        sizes = [(256, 192)]
        idle = 0
        for name, _ in stages(parameters):
            if "resize" in name:
                resize = getattr(parameters, name)
                idle += sizes[-1] == (resize.height, resize.width)
                sizes.append((resize.height, resize.width))
        parts = [part for line in describe(parameters) for part in line.split(": ", 1)[1].split(" | ")]
        assert len(parts) == len(list(stages(parameters))) - idle


def test_pairs_are_photographs_and_what_training_would_make_of_them(photographs):
    source = PhotoFolder(photographs)
    pairs, faults = sample_pairs(source, LEVELS["II"], count=5, crop=64, seed=3)
    assert faults == []
    names = [pair.title for pair in pairs]
    assert sorted(names[:3]) == photographs_of(photographs)
    assert names[3:] == names[:2]
    for place, pair in enumerate(pairs):
        photograph = pixels(photographs / pair.title)
        top, left = (photograph.shape[0] - 64) // 2, (photograph.shape[1] - 64) // 2
        np.testing.assert_array_equal(pair.hq, photograph[top : top + 64, left : left + 64])
        parameters = draw(np.random.default_rng((3, place)), (64, 64), LEVELS["II"])
        assert pair.settings == describe(parameters)
        small = Image.fromarray(apply(pair.hq, parameters))
        filters = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}
        prefix, _, name = pair.lq_label.rpartition(" ")
        assert prefix == "LQ 16x16, enlarged"
        np.testing.assert_array_equal(pair.lq, np.asarray(small.resize((64, 64), filters[name])))
        assert pair.caption == ("A woman in orange. She smiles." if pair.title == "astronaut.png" else "")
    # The same photograph twice, degraded differently.
    assert (pairs[3].lq != pairs[0].lq).any()
    longer, _ = sample_pairs(source, LEVELS["II"], count=7, crop=64, seed=3)
    np.testing.assert_array_equal([pair.lq for pair in longer[:5]], [pair.lq for pair in pairs])


def test_a_photograph_smaller_than_the_crop_is_mirrored(photographs):
    small = pixels(photographs / "cat.png")[:40, :56]
    for path in photographs.rglob("*.png"):
        path.unlink()
    Image.fromarray(small).save(photographs / "small.png")
    (pair,), _ = sample_pairs(PhotoFolder(photographs), PUBLISHED, count=1, crop=64, seed=0)
    np.testing.assert_array_equal(pair.hq, np.pad(small, ((0, 24), (0, 8), (0, 0)), mode="reflect"))


def test_sheet_shows_both_pictures_of_every_pair_magnified_and_keeps_its_margins(rng):
    captions = ["", "word " * 300, "x" * 500 + " y", "Ein Café, 咖啡.", "short"]
    pictures = rng.integers(255, size=(5, 2, 120, 120, 3)).astype(np.uint8)
    texts = ["a/rather long name, häuser " * 9, "LQ 30x30, " + "x" * 99, ["1st: " + "y" * 200, "2nd: z | jpeg 9"]]
    pairs = [Pair(*both, *texts, caption) for both, caption in zip(pictures, captions, strict=True)]
    sheet = draw_sheet(pairs, "heading " * 80)
    cell = 2 * 240 + GAP
    assert sheet.shape[1] == MARGIN + 3 * (cell + MARGIN)  # three fit into a row
    for number, pair in enumerate(pairs):
        left = MARGIN + number % 3 * (cell + MARGIN)
        hq, lq = (image.repeat(2, axis=0).repeat(2, axis=1) for image in pair[:2])
        (top, _) = np.flatnonzero((sheet[:, left : left + 240] == hq[0]).all(axis=(1, 2)))
        np.testing.assert_array_equal(sheet[top : top + 240, left : left + 240], hq)
        np.testing.assert_array_equal(sheet[top : top + 240, left + 240 + GAP : left + cell], lq)
        assert (sheet[top:, left + cell : left + cell + MARGIN] == PAPER).all()
    for border in (sheet[:MARGIN], sheet[-MARGIN:], sheet[:, :MARGIN], sheet[:, -MARGIN:]):
        assert (border == PAPER).all()


def test_same_seed_same_bytes(photographs, tmp_path):
    sheets = {}
    for name, flags in {"a": [], "b": [], "seed": ["--seed", 1], "level": ["--level", "III"]}.items():
        assert run(photographs, tmp_path / f"{name}.png", *flags) == 0
        sheets[name] = (tmp_path / f"{name}.png").read_bytes()
    assert sheets["a"] == sheets["b"]
    assert len(set(sheets.values())) == 3


def test_captions_elsewhere_are_shown(photographs, tmp_path):
    captions = tmp_path / "captions"
    (captions / "more").mkdir(parents=True)
    (captions / "more" / "coffee.json").write_text(json.dumps({"caption": "The image features a cup."}))
    pairs, _ = sample_pairs(PhotoFolder(photographs, captions), PUBLISHED, count=3, crop=64, seed=0)
    assert {pair.title: pair.caption for pair in pairs} == {
        "astronaut.png": "",
        "cat.png": "",
        "more/coffee.png": "A cup..",
    }
    assert run(photographs, tmp_path / "with.png", "--captions", captions) == 0
    assert run(photographs, tmp_path / "without.png") == 0
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_config_file_is_a_degradation_or_holds_one(photographs, tmp_path):
    texts = [
        "jpeg_last_probability: 0.25",
        "degradation: {jpeg_last_probability: 0.25}\nbatch: 16",
        "data: {batch: 16, degradation: {jpeg_last_probability: 0.25}}\noptimizer: {}",
    ]
    path = tmp_path / "config.yaml"
    for text in texts:
        path.write_text(text)
        assert read_config(path) == dataclasses.replace(PUBLISHED, jpeg_last_probability=0.25)
    path.write_text("data: {batch: 16}")
    assert read_config(path) == PUBLISHED
    assert run(photographs, tmp_path / "sheet.png", "--config", path) == 0
    for text, message in {
        "jpeg_lost: 1": "unknown key jpeg_lost",
        "degradation: 3": "degradation is 3",
        "data: [1]": "data is",
        "jpeg_last_probability: 2": "from 0 to 1",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_config(path)


def test_bad_photographs_are_listed_and_replaced(photographs, tmp_path, capsys):
    for name in ("bad.png", "worse.png"):
        (photographs / name).write_bytes((photographs / "cat.png").read_bytes()[:500])
    assert run(photographs, tmp_path / "sheet.png", "--count", 5) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "2 of 5 photographs could not be used:"
    assert {line.partition(":")[0].strip() for line in lines[1:]} == {
        str(photographs / n) for n in ("bad.png", "worse.png")
    }
    assert (tmp_path / "sheet.png").exists()


def test_faults_are_one_line_and_exit_code_2(photographs, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_text("no picture")
    faults = [
        (lambda: run(tmp_path / "nowhere", sheet), "no such folder"),
        (lambda: run(broken, sheet), "none of 1 photographs can be used"),
        (lambda: run(photographs, sheet, "--count", 0), "--count: '0': must be a whole number, from 1 to 500"),
        (lambda: run(photographs, sheet, "--crop", 30), "--crop 30: must be a multiple of 4"),
        (
            lambda: run(photographs, sheet, "--crop", 4096),
            "crop 4096 with count 3: makes a sheet of 101 million pixels",
        ),
        (lambda: run(photographs, sheet, "--crop", 100_000), "--crop: '100000': must be"),
        (lambda: run(photographs, sheet, "--seed", -1), "--seed: '-1': must be a whole number, from 0"),
        (lambda: run(photographs, sheet, "--captions", broken), "no caption there"),
        (lambda: run(photographs, sheet, "--config", tmp_path / "none.yaml"), "none.yaml': no such file"),
        (lambda: run(photographs, tmp_path / "sheet.txt"), "cannot write '.txt'"),
        (lambda: run(photographs, tmp_path / "none" / "sheet.png"), "is not a folder"),
    ]
    for call, message in faults:
        assert call() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert run(photographs, sheet, "--level", "I", "--config", "some.yaml") == 2
    assert not sheet.exists()


def test_command_runs_as_a_module(photographs, tmp_path):
    flags = ["--input", str(photographs), "--output", str(tmp_path / "sheet.png"), "--count", "2", "--crop", "64"]
    result = subprocess.run(
        [sys.executable, "-m", "faithdiff_jax", "preview", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert pixels(tmp_path / "sheet.png").ndim == 3
