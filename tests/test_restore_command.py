"""The infer command: what it restores, skips, says and refuses."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from converted import published_and_converted
from PIL import Image

from faithdiff_jax.cli.restore import main

ROOT = pathlib.Path(__file__).parent.parent
QUICK = ["--steps", "1", "--cache", "", "--multiple", "64"]  # one padded size for all pictures: one compilation


@pytest.fixture(scope="module")
def model() -> str:
    return str(published_and_converted()[1])


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(skimage.data.astronaut()[:24, 200:230])
    picture.save(folder / "face.jpg")
    picture.convert("L").save(folder / "gray.png")
    alpha = picture.copy()
    alpha.putalpha(Image.fromarray(np.full((24, 30), 128, np.uint8)))
    alpha.save(folder / "glass.webp", lossless=True)
    return folder


def opened(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def infer(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_a_folder_is_restored_and_then_skipped(model, photos, tmp_path, capsys):
    output = tmp_path / "restored"
    assert infer("--model", model, "--input", photos, "--output", output, *QUICK) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in output.iterdir()) == ["face.png", "glass.png", "gray.png"]
    assert opened(output / "face.png").size == (60, 48)
    assert opened(output / "gray.png").mode == "L"
    glass = opened(output / "glass.png")
    assert glass.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(glass)[..., 3], 128)
    assert "gray repeated into three channels" in said.out
    assert "alpha upscaled with Lanczos" in said.out

    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert infer("--model", model, "--input", photos, "--output", output, *QUICK) == 0
    assert "3 of 3 already done, skipped" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def test_bad_files_do_not_stop_good_ones(model, photos, tmp_path, capsys):
    whole = (photos / "face.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    output = tmp_path / "restored"
    assert infer("--model", model, "--input", photos, "--output", output, *QUICK) == 2
    said = capsys.readouterr().out
    assert "3 of 6 could not be restored:" in said
    assert all(name in said for name in ("cut.jpg", "text.png", "dot.png"))
    assert sorted(path.name for path in output.iterdir()) == ["face.png", "glass.png", "gray.png"]


def test_captions_change_the_result_and_bad_ones_are_named(model, photos, tmp_path, capsys):
    captions = tmp_path / "captions"
    captions.mkdir()
    (captions / "face.json").write_text(json.dumps({"caption": "The image features a cat. It sits. It sleeps."}))
    (captions / "gray.json").write_text("{}")
    with_captions = tmp_path / "with"
    assert infer("--model", model, "--input", photos, "--output", with_captions, "--captions", captions, *QUICK) == 2
    said = capsys.readouterr().out
    assert "gray.json" in said
    assert "no caption found, restored without one" in said
    # The published rule makes this of the caption above.
    by_hand = tmp_path / "by_hand"
    face = photos / "face.jpg"
    assert infer("--model", model, "--input", face, "--output", by_hand, "--caption", "A cat. It sits.", *QUICK) == 0
    without = tmp_path / "without"
    assert infer("--model", model, "--input", face, "--output", without, *QUICK) == 0
    read = lambda folder: np.asarray(opened(folder / "face.png"))  # noqa: E731
    np.testing.assert_array_equal(read(with_captions), read(by_hand))
    assert (read(with_captions) != read(without)).any()


def test_inputs_of_one_stem_do_not_overwrite_each_other(model, photos, tmp_path):
    opened(photos / "gray.png").save(photos / "face.png")
    output = tmp_path / "restored"
    assert (
        infer("--model", model, "--input", photos, "--output", output, "--format", "jpg", "--scale", "1", *QUICK) == 2
    )
    # The alpha of glass.webp does not go into a JPEG: said, and nothing written for it.
    assert sorted(path.name for path in output.iterdir()) == ["face_jpg.jpg", "face_png.jpg", "gray.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.png"], "none.png: no such file or folder"),
        (["--input", "empty"], "empty: holds no pictures"),
        (["--input", "text.png"], "text.png"),
        (["--input", "dot.png"], "dot.png"),
        (["--input", "tiny.png", "--scale", "1"], "each side must come to 8 or more"),
        (["--scale", "0"], "--scale 0.0: must be a number above 0"),
        (["--scale", "nan"], "--scale nan: must be a number above 0"),
        (["--steps", "0"], "steps is 0: must be between 1 and 1000"),
        (["--steps", "1001"], "steps is 1001: must be between 1 and 1000"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--guidance", "-1"], "guidance is -1.0: must be 0 or more"),
        (["--tile", "2"], "tile is 2 latent pixels: must be at least 4"),
        (["--overlap", "2"], "overlap is 2.0"),
        (["--vae-tile", "100"], "vae_tile is 100"),
        (["--multiple", "9"], "multiple is 9"),
        (["--seed", "-1"], "--seed -1: must be between 0 and"),
        (["--start", "middle"], "argument --start: invalid choice: 'middle'"),
        (["--captions", "nowhere"], "--captions nowhere: no such folder"),
        (["--captions", "empty", "--caption", "x"], "--caption and --captions: give one of them"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--model", "empty"], "not a model directory"),
        (["--mesh", "3"], "--mesh 3: must be DATAxFSDP"),
        (["--mesh", "3x1"], "mesh 3 x 1: must multiply to the 8 devices"),
        (["--output", "."], "is where the input lies"),
        (["--output", "text.png"], "is a file, name a folder"),
        (["--stepz", "1"], "--stepz"),
    ],
)
def test_bad_input_is_one_line_and_code_2(model, photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty").mkdir()
    pathlib.Path("text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("RGB", (4, 4)).save("tiny.png")
    opened(photos / "gray.png").save("good.png")
    given = {"--model": model, "--input": "good.png", "--output": "out"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    try:
        code = infer(*(item for pair in given.items() for item in pair))
    except SystemExit as stopped:  # argparse's way out
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list(pathlib.Path("out").glob("*")) if pathlib.Path("out").exists() else True


def test_the_script_in_a_process_of_its_own(model, photos, tmp_path):
    command = [sys.executable, ROOT / "infer.py", "--model", model, "--input", photos / "face.jpg", *QUICK]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "face.png").exists()
    failed = subprocess.run(
        [*command, "--output", tmp_path / "out2", "--tile", "1"], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: tile is 1")
    assert failed.stderr.count("\n") == 1


def test_comparison_pictures(model, photos, tmp_path, capsys):
    references, output = tmp_path / "references", tmp_path / "out"
    references.mkdir()
    Image.fromarray(np.full((48, 60, 3), 128, np.uint8)).save(references / "face.png")
    command = ["--model", model, "--input", str(photos), "--output", str(output), *QUICK, "--compare"]
    assert main([*command, "--references", str(references)]) == 0
    with_original, without = opened(output / "face_compare.png"), opened(output / "gray_compare.png")
    assert with_original.width == 4 * 60 + 3 * 4  # input, bicubic, restored, original and gaps
    assert without.width == 3 * 60 + 2 * 4
    restored = np.asarray(opened(output / "face.png"))
    left = 2 * (60 + 4)
    np.testing.assert_array_equal(np.asarray(with_original)[-48:, left : left + 60], restored)
    np.testing.assert_array_equal(np.asarray(with_original)[-48:, -60:], 128)

    Image.fromarray(np.full((24, 30, 3), 128, np.uint8)).save(references / "face.png")
    capsys.readouterr()
    assert main([*command, "--references", str(references), "--overwrite"]) == 2
    assert "face.png: is 30x24, the restored picture 60x48; they must be of one size" in capsys.readouterr().out


def test_references_are_for_comparisons(model, photos, tmp_path, capsys):
    command = ["--model", model, "--input", str(photos), "--output", str(tmp_path / "out")]
    assert main([*command, "--references", str(photos)]) == 2
    assert capsys.readouterr().err == "error: --references: is for --compare, which is not given\n"
