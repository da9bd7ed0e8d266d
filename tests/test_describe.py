"""Captions of what an RRDBNet cleaned: `caption --clean`, and `restore --caption-from`."""

import json

import numpy as np
import pytest
import skimage.data
import torch
from converted import published_and_converted
from PIL import Image
from tiny_llava import write_llava
from torch_rrdbnet import BSRGAN, TorchRRDBNet

from faithdiff_jax.baselines.rrdbnet_weights import convert_rrdbnet
from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer
from faithdiff_jax.cli.main import main
from faithdiff_jax.data.captioning import Captioner
from faithdiff_jax.files.captions import read_caption, trim_caption
from faithdiff_jax.files.images import load_image
from faithdiff_jax.inference.pipeline import FaithDiff

QUICK = ["--steps", "1", "--cache", "", "--multiple", "64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Captioner, cleaner and FaithDiff: tiny, and random."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    network = TorchRRDBNet(BSRGAN, blocks=1, channels=4, growth=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    torch.save(network.state_dict(), folder / "a.pth")
    convert_rrdbnet(folder / "a.pth", folder / "bsrnet")
    return write_llava(folder / "llava"), folder / "bsrnet", published_and_converted()[1]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(skimage.data.astronaut()[:24, 200:230]).save(folder / "face.png")
    Image.fromarray(skimage.data.chelsea()[50:80, 100:124]).save(folder / "cat.png")
    return folder


def run(*words):
    return main([str(word) for word in words])


def cleaned_captions(models, photos):
    """What the tiny model says of the cleaned pictures; it says something else of the pictures themselves."""
    captioner = Captioner.load(str(models[0]), device="cpu")
    cleaner = RRDBNetRestorer.load(models[1], scale=1)
    pictures = {path.stem: load_image(path).rgb for path in sorted(photos.iterdir())}
    captions = {stem: captioner([cleaner.restore(picture)])[0] for stem, picture in pictures.items()}
    assert all(captions[stem] != captioner([picture])[0] for stem, picture in pictures.items())
    return captions


def test_caption_clean(models, photos, tmp_path, capsys):
    flags = ["--input", photos, "--output", tmp_path / "captions", "--model", models[0], "--device", "cpu"]
    assert run("caption", *flags, "--clean", models[1], "--batch", 1) == 0
    found = {path.stem: read_caption(path) for path in (tmp_path / "captions").iterdir()}
    assert found == cleaned_captions(models, photos)
    assert run("caption", *flags, "--clean", models[1], "--cleaned", photos) == 2
    assert "--clean and --cleaned: give one of them" in capsys.readouterr().err
    assert run("caption", *flags, "--clean", models[2]) == 2
    assert "format is 2, that of an RRDBNet is" in capsys.readouterr().err


def test_restore_with_captions_of_cleaned_pictures(models, photos, tmp_path, capsys):
    (photos / "text.png").write_text("not a picture")
    flags = ["--model", models[2], "--input", photos, *QUICK]
    made = ["--caption-from", "cleaned", "--clean", models[1], "--captioner", models[0]]
    assert run("restore", *flags, "--output", tmp_path / "made", *made) == 2
    said = capsys.readouterr()
    assert "1 of 3 pictures could not be restored" in said.err
    assert "text.png: not a picture" in said.err
    (photos / "text.png").unlink()
    for stem, caption in cleaned_captions(models, photos).items():
        assert f"{photos / stem}.png: described as {trim_caption(caption)!r}" in said.out + said.err
        given = ["--input", photos / f"{stem}.png", "--output", tmp_path / "given", "--caption", trim_caption(caption)]
        assert run("restore", *flags, *given) == 0
        files = [tmp_path / folder / f"{stem}.png" for folder in ("made", "given")]
        assert np.array_equal(*(np.array(Image.open(file)) for file in files))


def test_each_tile_is_described_by_itself(models, photos, tmp_path, capsys):
    face, model = photos / "face.png", FaithDiff.load(models[2])
    tiles = {"tile": 4, "overlap": 1.0, "scale": 2}
    flags = ["--model", models[2], "--input", face, "--steps", 1, "--cache", "", "--keep-captions", "--tile-captions"]
    flags += [word for name, value in tiles.items() for word in (f"--{name}", value)]
    assert run("restore", *flags, "--captioner", models[0], "--output", tmp_path / "made") == 0
    picture, captioner = load_image(face).rgb, Captioner.load(str(models[0]), device="cpu")
    boxes = model.tile_boxes(picture, **tiles)
    captions = [captioner([picture[top:bottom, left:right]])[0] for left, top, right, bottom in boxes]
    assert len(set(captions)) == 4
    assert f"described as {captions!r}" in capsys.readouterr().out
    (record,) = (json.loads(line) for line in (tmp_path / "made" / "manifest.jsonl").read_text().splitlines())
    restored = np.asarray(Image.open(tmp_path / "made" / "face.png"))
    assert (
        record["caption"]
        == captions
        == json.loads(Image.open(tmp_path / "made" / "face.png").text["faithdiff"])["caption"]
    )
    np.testing.assert_array_equal(restored, model.restore(picture, captions, steps=1, **tiles))

    files = tmp_path / "captions"
    files.mkdir()
    for name, given, code in (
        ("tiles", {"caption": "a cat", "tile_captions": captions}, 0),
        ("one", {"caption": "a cat"}, 0),
        ("wrong", {"tile_captions": captions[1:]}, 2),
        ("none", {"tile_captions": "a cat"}, 2),
    ):
        (files / "face.json").write_text(json.dumps(given))
        assert run("restore", *flags, "--captions", files, "--output", tmp_path / name) == code
    said = capsys.readouterr()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "tiles" / "face.png")), restored)
    assert 'no "tile_captions" in face.json, all tiles have its caption' in said.out
    assert "caption is a list of 3: must be one text, or 4, one for each tile" in said.err
    assert '"tile_captions" must be a list of strings' in said.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--caption-from", "cleaned"], "--caption-from cleaned: needs --clean MODEL_DIR"),
        (["--caption-from", "output"], "argument --caption-from: invalid choice: 'output'"),
        (["--caption-from", "input", "--clean", "a"], "--clean: is for --caption-from cleaned"),
        (["--caption-from", "input", "--caption", "a cat"], "captions are made, give neither"),
        (["--caption-from", "input", "--captions", "."], "captions are made, give neither"),
        (["--captioner", "a/b", "--caption", "a cat"], "captions are made, give neither"),
        (["--tile-captions"], "--tile-captions: needs --captioner, --caption-from or --captions"),
        (["--tile-captions", "--captions", ".", "--attribute", "cat"], "leave out --tile-captions"),
        (
            ["--tile-captions", "--captioner", "a/b", "--progressive", "--scale", "4"],
            "progressive is true: takes one caption for a picture",
        ),
        (["--clean", "a"], "--clean: is for --caption-from cleaned"),
        (["--caption-from", "cleaned", "--clean", "nowhere"], "nowhere: no such model directory"),
    ],
)
def test_flags_of_restore_that_do_not_go_together(photos, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert run("restore", "--input", photos, "--output", "out", "--cache", "", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
