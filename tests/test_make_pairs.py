import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import image_generator, make_pairs
from faithdiff_jax.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.fromarray(data.astronaut()[:71, :94]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:80, :120]).save(folder / "coffee.jpg", quality=92)
    (folder / "astronaut.txt").write_text("A woman in an orange suit.\n")
    return folder


def run(folder, output, *more, level="II"):
    return run_command("pairs", ["--input", str(folder), "--output", str(output), "--level", level, *more])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(path):
    return np.asarray(Image.open(path))


def test_pairs_are_the_image_and_its_degradation(photographs, tmp_path):
    output = tmp_path / "pairs"
    assert run(photographs, output, "--seed", "5") == 0
    assert set(contents(output)) == {
        "HR/astronaut.png",
        "HR/coffee.png",
        "LR/astronaut.png",
        "LR/coffee.png",
        "Caption/astronaut.json",
    }
    # 71x94 loses its last row or two on either side of the middle: 68x92 is left.
    high = pixels(output / "HR" / "astronaut.png")
    np.testing.assert_array_equal(high, data.astronaut()[1:69, 1:93])
    low = degrade(np.ascontiguousarray(high), image_generator(5, "astronaut.png"), LEVELS["II"])
    np.testing.assert_array_equal(pixels(output / "LR" / "astronaut.png"), low)
    assert low.shape == (17, 23, 3)
    caption = json.loads((output / "Caption" / "astronaut.json").read_text())
    assert caption == {"caption": "A woman in an orange suit."}


def test_same_seed_same_bytes_whatever_else_is_there(photographs, tmp_path):
    assert run(photographs, tmp_path / "first") == 0
    Image.fromarray(data.chelsea()[:64, :64]).save(photographs / "another.png")
    assert run(photographs, tmp_path / "second") == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert second.keys() - first.keys() == {"HR/another.png", "LR/another.png"}
    assert all(second[name] == content for name, content in first.items())
    assert run(photographs, tmp_path / "third", "--seed", "1") == 0
    third = contents(tmp_path / "third")
    assert third["HR/coffee.png"] == first["HR/coffee.png"]
    assert third["LR/coffee.png"] != first["LR/coffee.png"]


def test_generator_depends_on_seed_and_name():
    names = [(0, "a.png"), (1, "a.png"), (0, "b.png"), (0, "a.jpg")]
    assert len({image_generator(seed, name).integers(1 << 62) for seed, name in names}) == 4
    expected = np.random.default_rng((3, zlib.crc32(b"\xc3\xa9.png"))).integers(1 << 62)
    assert image_generator(3, "é.png").integers(1 << 62) == expected


def test_crop_and_captions_elsewhere(photographs, tmp_path):
    captions = tmp_path / "captions"
    captions.mkdir()
    (captions / "coffee.json").write_text(json.dumps({"caption": "Ein Kaffee, heiß."}))
    assert run(photographs, tmp_path / "pairs", "--crop", "64", "--captions", str(captions), level="published") == 0
    np.testing.assert_array_equal(pixels(tmp_path / "pairs/HR/astronaut.png"), data.astronaut()[3:67, 15:79])
    assert pixels(tmp_path / "pairs/LR/coffee.png").shape == (16, 16, 3)
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pairs/Caption").iterdir()}
    assert {name: json.loads(text) for name, text in written.items()} == {
        "coffee.json": {"caption": "Ein Kaffee, heiß."}
    }


def test_rerun_makes_only_what_is_missing(photographs, tmp_path):
    output = tmp_path / "pairs"
    assert run(photographs, output) == 0
    before = contents(output)
    (output / "LR" / "coffee.png").unlink()
    (output / "HR" / "coffee.png").write_bytes(b"cut short")
    (output / "LR" / "astronaut.png").write_bytes(b"left alone")
    assert run(photographs, output) == 0
    assert contents(output) == before | {"LR/astronaut.png": b"left alone"}


def test_bad_files_are_listed_and_stop_no_others(photographs, tmp_path, capsys):
    (photographs / "bad.png").write_bytes((photographs / "astronaut.png").read_bytes()[:3000])
    Image.fromarray(np.zeros((3, 50, 3), np.uint8)).save(photographs / "flat.png")
    (photographs / "coffee.json").write_text("{}")
    output = tmp_path / "pairs"
    assert run(photographs, output) == 2
    assert set(contents(output)) == {"HR/astronaut.png", "LR/astronaut.png", "Caption/astronaut.json"}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "3 of 4 photographs could not be used:"
    assert str(photographs / "bad.png") in lines[1]
    assert str(photographs / "coffee.json") in lines[2]
    assert lines[3] == f"  {photographs / 'flat.png'}: 50x3 pixels, each side must have at least 4"
    assert len(lines) == 4


def test_faults_are_one_line_and_exit_code_2(photographs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    pairs = tmp_path / "pairs"
    faults = [
        (lambda: run(tmp_path / "nowhere", pairs), "no such folder"),
        (lambda: run(empty, pairs), "holds no pictures"),
        (lambda: run(photographs, pairs, "--crop", "30"), "--crop 30: must be a multiple of 4"),
        (lambda: run(photographs, pairs, "--crop", "0"), "--crop: '0': must be a whole number, 1 or more"),
        (lambda: run(photographs, pairs, "--captions", str(file)), "is a file, a folder is needed"),
        (lambda: run(photographs, file), "is a file, name a folder"),
    ]
    for call, message in faults:
        assert call() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for flags in (["--seed", "-1"], ["--seed", "one"], ["--level", "IV"]):
        assert run(photographs, pairs, *flags) == 2
        assert flags[0] in capsys.readouterr().err
    assert not pairs.exists()


def test_names_that_would_collide_are_refused(photographs, tmp_path):
    images = [photographs / "coffee.jpg", photographs / "coffee.JPG"]
    with pytest.raises(InputError, match=r"coffee\.JPG.*same files"):
        make_pairs(images, tmp_path / "pairs", LEVELS["I"], seed=0)


def test_command_runs_as_a_module(photographs, tmp_path):
    flags = ["--input", str(photographs), "--output", str(tmp_path / "pairs"), "--level", "III"]
    result = subprocess.run(
        [sys.executable, "-m", "faithdiff_jax", "pairs", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    run(photographs, tmp_path / "again", level="III")
    assert contents(tmp_path / "again") == contents(tmp_path / "pairs")
