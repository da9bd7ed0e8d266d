"""The restore command: what it restores, skips, says and refuses."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import yaml
from converted import published_and_converted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.jobs import plan_jobs
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.cli.restore_flags import add_flags
from faithdiff_jax.config import Range, load_yaml
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference import executables, pipeline
from faithdiff_jax.inference.options import RestoreOptions, option
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.programs import Program
from faithdiff_jax.inference.restoration import Restored

main = functools.partial(run_command, "restore")
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


def results(folder: pathlib.Path) -> list[str]:
    """What is in a folder of results, but for the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.name != "manifest.jsonl")


def infer(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_programs_are_kept_for_the_next_process(model, photos, tmp_path, monkeypatch):
    flags = ["--model", model, "--input", photos / "face.jpg", *QUICK, "--cache", tmp_path / "cache", "--output"]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")  # JAX's own is left as it is
    try:
        pipeline._programs.cache_clear()  # what other tests have compiled
        assert infer(*flags, tmp_path / "first") == 0
        pipeline._programs.cache_clear()
        monkeypatch.setattr(Program, "_jit", lambda self: pytest.fail(f"{self.function.__name__} was traced"))
        assert infer(*flags, tmp_path / "second") == 0
    finally:
        executables.keep_in(None)
        pipeline._programs.cache_clear()
    assert (tmp_path / "first" / "face.png").read_bytes() == (tmp_path / "second" / "face.png").read_bytes()


def test_a_folder_is_restored_and_then_skipped(model, photos, tmp_path, capsys):
    output = tmp_path / "restored"
    assert infer("--model", model, "--input", photos, "--output", output, *QUICK) == 0
    said = capsys.readouterr()
    assert results(output) == ["face.png", "glass.png", "gray.png"]
    assert opened(output / "face.png").size == (60, 48)
    assert opened(output / "gray.png").mode == "L"
    glass = opened(output / "glass.png")
    assert glass.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(glass)[..., 3], 128)
    assert "gray repeated into three channels" in said.out
    assert "alpha upscaled with Lanczos" in said.out

    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}  # the manifest's too
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
    said = capsys.readouterr().err
    assert "3 of 6 pictures could not be restored:" in said
    assert all(name in said for name in ("cut.jpg", "text.png", "dot.png"))
    assert results(output) == ["face.png", "glass.png", "gray.png"]


def test_captions_change_the_result_and_bad_ones_are_named(model, photos, tmp_path, capsys):
    captions = tmp_path / "captions"
    captions.mkdir()
    (captions / "face.json").write_text(json.dumps({"caption": "The image features a cat. It sits. It sleeps."}))
    (captions / "gray.json").write_text("{}")
    with_captions = tmp_path / "with"
    assert infer("--model", model, "--input", photos, "--output", with_captions, "--captions", captions, *QUICK) == 2
    said = capsys.readouterr()
    assert "gray.json" in said.err
    assert "no caption found, restored without one" in said.out
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
    assert results(output) == ["face_jpg.jpg", "face_png.jpg", "gray.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.png"], "none.png: no such file or folder"),
        (["--input", "empty"], "empty: holds no pictures"),
        (["--input", "text.png"], "text.png"),
        (["--input", "dot.png"], "dot.png"),
        (["--input", "tiny.png", "--scale", "1"], "each side must come to 8 or more"),
        (["--scale", "0"], "scale is 0.0: must be above 0 and at most 32"),
        (["--scale", "nan"], "scale is nan: must be above 0"),
        (["--scale", "179"], "scale is 179.0: must be above 0 and at most 32"),
        (["--scale", "٣"], "argument --scale: '٣': must be a number"),
        (["--steps", "0"], "steps is 0: must be a whole number from 1 to"),
        (["--steps", "1001"], "steps is 1001: must be between 1 and 1000 for this model"),
        (["--steps", "many"], "argument --steps: 'many': must be a whole number"),
        (["--steps", "9" * 5000], "must be a whole number"),
        (["--guidance", "-1"], "guidance is -1.0: must be from 0 to 100"),
        (["--tile", "2"], "tile is 2 latent pixels: must be at least 4"),
        (["--overlap", "2"], "overlap is 2.0"),
        (["--overlap", "1e-9"], "overlap is 1e-09: must be from 0.0625 to 1"),
        (["--vae-tile", "100"], "vae_tile is 100: must be a multiple of 32 for this model"),
        (["--vae-tile", "16"], "vae_tile is 16: must be a whole number from 64 to"),
        (["--vae-tile", "-1024"], "vae_tile is -1024"),
        (["--multiple", "9"], "multiple is 9: must be a multiple of 8 for this model"),
        (["--multiple", "0"], "multiple is 0: must be a whole number from 1 to 2048"),
        (["--multiple", "-8"], "multiple is -8"),
        (["--multiple", "2147483648"], "multiple is 2147483648"),
        (["--seed", "-1"], "seed is -1: must be a whole number from 0 to 4294967295"),
        (["--start", "middle"], "argument --start: invalid choice: 'middle'"),
        (["--captions", "nowhere"], "argument --captions: nowhere: no such folder"),
        (["--captions", "empty", "--caption", "x"], "--caption and --captions: give one of them"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--model", "empty"], "not a model directory"),
        (["--mesh", "3"], "argument --mesh: '3': must be DATAxFSDP"),
        (["--mesh", "²x1"], "argument --mesh: '²x1': must be DATAxFSDP"),
        (["--mesh", "3x1"], "mesh 3 x 1: must multiply to the 8 devices"),
        (["--output", "."], "is where the input lies"),
        (["--output", "text.png"], "is a file, name a folder"),
        (["--output", ""], "argument --output: '': must not be empty"),
        (["--output", "x" * 300], "the name is too long for the file system"),
        (["--input", "x" * 300], "no such file or folder"),
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
    assert failed.stderr.startswith("error: tile is 1 ")
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
    assert "face.png: is 30x24, the restored picture 60x48; they must be of one size" in capsys.readouterr().err


def test_references_are_for_comparisons(model, photos, tmp_path, capsys):
    command = ["--model", model, "--input", str(photos), "--output", str(tmp_path / "out")]
    assert main([*command, "--references", str(photos)]) == 2
    assert capsys.readouterr().err == "error: --references: is for --compare, which is not given\n"


def test_options_are_checked_though_every_result_exists(model, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "face.png").write_bytes(b"done before")
    command = ["--model", model, "--input", photos / "face.jpg", "--output", tmp_path / "out"]
    assert infer(*command) == 0
    assert "1 of 1 already done" in capsys.readouterr().out
    assert infer(*command, "--steps", "1001") == 2
    assert "steps is 1001" in capsys.readouterr().err


def test_no_two_pictures_have_one_result(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["same.jpg", "same.png", "same_jpg.png", "x.png", "x_compare.png", "Case.png", "case.webp", "a.b.png"]
    for name in names:
        (folder / name).touch()
    jobs = {job.source.name: job for job in plan_jobs(folder, tmp_path / "out", "png")}
    assert {name: job.target.name for name, job in jobs.items()} == {
        "same.jpg": "same_jpg_2.png",
        "same.png": "same_png.png",
        "same_jpg.png": "same_jpg.png",
        "x.png": "x.png",
        "x_compare.png": "x_compare.png",
        "Case.png": "Case_png.png",
        "case.webp": "case_webp.png",
        "a.b.png": "a.b.png",
    }
    assert jobs["x.png"].sheet.name == "x_compare_2.png"
    written = [path.name.casefold() for job in jobs.values() for path in (job.target, job.sheet)]
    assert len(set(written)) == len(written)


def test_faults_of_one_picture_do_not_stop_the_others(model, photos, tmp_path, capsys, monkeypatch):
    """No memory for one, a caption nested too deep for another, a bug of a decoder for a third."""
    raised = iter([MemoryError(), RecursionError("maximum recursion depth exceeded")])

    def restore_all(model, requests, options):
        error = next(raised, None)
        if error is not None:
            raise error
        return [Restored(image=np.repeat(np.repeat(one.image, 2, 0), 2, 1), seconds={}) for one in requests]

    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", restore_all)
    assert infer("--model", model, "--input", photos, "--output", tmp_path / "out", *QUICK) == 2
    said = capsys.readouterr().err
    assert "2 of 3 pictures could not be restored:" in said
    assert "face.jpg: not enough memory; a smaller picture, tile, crop or batch needs less" in said
    assert "glass.webp: something given is nested too deep to be read" in said
    assert results(tmp_path / "out") == ["gray.png"]


def test_a_pipe_among_the_pictures_is_left_alone(model, photos, tmp_path):
    os.mkfifo(photos / "pipe.png")
    names = [job.source.name for job in plan_jobs(photos, tmp_path, "png")]
    assert names == ["face.jpg", "glass.webp", "gray.png"]


def test_presets_are_options_by_name(model, photos, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    config = load_yaml(folder / "config.yaml")
    config["restore"] = {"scale": 2.0, "steps": 3, "presets": {"quick": {"steps": 1}, "small": {"scale": 1.0}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    flags = ["--model", folder, "--input", photos / "face.jpg", "--multiple", "64", "--cache", ""]
    for name, expected in (("quick", (60, 48)), ("small", (30, 24))):
        assert infer(*flags, "--output", tmp_path / name, "--preset", name, "--steps", "1") == 0
        assert opened(tmp_path / name / "face.png").size == expected
    loaded = FaithDiff.load(folder)
    assert (loaded.defaults.steps, loaded.preset("quick").steps, loaded.preset("quick").scale) == (3, 1, 2.0)
    restored = loaded.restore(np.asarray(opened(photos / "face.jpg")), "", loaded.preset("quick"), multiple=64)
    np.testing.assert_array_equal(restored, np.asarray(opened(tmp_path / "quick" / "face.png")))
    capsys.readouterr()
    assert infer(*flags, "--output", tmp_path / "none", "--preset", "swift") == 2
    assert capsys.readouterr().err.strip() == (
        "error: unknown preset 'swift' of this model (its presets: quick, small)"
    )
    with pytest.raises(InputError, match="unknown preset 'swift'"):
        loaded.preset("swift")
    config["restore"]["presets"]["quick"] = {"steps": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert infer(*flags, "--output", tmp_path / "none", "--preset", "small") == 2
    assert "steps is 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_without_presets_says_so(model, photos, tmp_path, capsys):
    flags = ["--model", model, "--input", photos, "--output", tmp_path / "none"]
    assert infer(*flags, "--preset", "swift") == 2
    assert capsys.readouterr().err.strip() == "error: unknown preset 'swift' of this model (it has no presets)"


def test_every_option_is_a_flag_with_its_range_and_default(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(RestoreOptions):
        assert f"--{field.name.replace('_', '-')}" in said.replace(",", "").split()
    assert "--steps N denoising steps; a whole number from 1 to 100000 (default: 20)" in said


def test_a_new_field_is_a_new_flag():
    """One place: nothing else names the options."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(RestoreOptions):
        sharpness: float = option(0.5, "of the result", within=Range(0, 1))

    parser = Parser("")
    add_flags(parser, More)
    given = parser.parse_args(["--input", "a", "--output", "b", "--sharpness", "0.25"])
    assert More(sharpness=given.sharpness, steps=3).sharpness == 0.25
    with pytest.raises(InputError, match="sharpness is 2: must be from 0 to 1"):
        More(sharpness=2)


WORDS = st.sampled_from(
    [
        "0",
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "",
        " ",
        "x",
        "٣",
        "²",
        "1_0",
        "0x10",
        "9" * 5000,
        "1e-9",
        "2147483648",
        "\0",
    ]
)
FLAGS = st.sampled_from([f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(RestoreOptions)])


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(FLAGS, WORDS | st.text(max_size=8)), min_size=1, max_size=4))
def test_nonsense_flags_end_in_one_line(tmp_path, monkeypatch, capsys, pairs):
    """Exit code 2 and one line, or flags that happen to be right; no model is read and nothing is written."""
    monkeypatch.setattr("faithdiff_jax.cli.restore.load_model", lambda *a: pytest.fail("the model was read"))
    output = tmp_path / "out"
    arguments = ["--input", str(tmp_path / "none.png"), "--output", str(output)]
    try:
        code = main([*arguments, *(f"{flag}={value}" for flag, value in pairs)])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not output.exists()


def test_words_of_the_caption_are_attributed(model, photos, tmp_path, capsys):
    output, captions = tmp_path / "restored", tmp_path / "captions"
    captions.mkdir()
    (captions / "face.txt").write_text("the cat")
    flags = ["--attribute", "cat", "--attribute", "dog", "--captions", captions, "--keep-captions"]
    assert infer("--model", model, "--input", photos / "face.jpg", "--output", output, *flags, *QUICK) == 0
    assert "no map: word is 'dog': must be in the caption, 'the cat'" in capsys.readouterr().out
    assert results(output) == ["face.png", "face_attribution_cat.png"]
    assert opened(output / "face_attribution_cat.png").size == (60, 48 + 4 * 18)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attribute", "cat"], "--attribute: is for words of a caption, give --caption"),
        (["--attribute", "dog", "--caption", "the cat"], "word is 'dog': must be in the caption, 'the cat'"),
        (["--attribute", "", "--caption", "the cat"], "--attribute: '': must not be empty"),
    ],
)
def test_words_that_cannot_be_attributed_are_told_before_the_model_is_read(
    model, photos, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(FaithDiff, "load", None)
    assert infer("--model", model, "--input", photos, "--output", tmp_path / "restored", *flags, *QUICK) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "restored").exists()


def test_maps_of_words_that_read_alike_have_files_of_their_own(photos, tmp_path):
    words = ["red bus", "Red/Bus", "🐈", "x" * 300]
    face, *_ = plan_jobs(photos, tmp_path, "png", words)
    assert [face.maps[word].name for word in words] == [
        "face_attribution_red_bus.png",
        "face_attribution_Red_Bus_2.png",
        "face_attribution_word.png",
        f"face_attribution_{'x' * 40}.png",
    ]
