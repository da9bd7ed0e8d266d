"""Test sets: made of originals, and read as they are distributed; what is wrong with one is said in a line."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import coordinates, write, write_caption
from PIL import Image
from skimage import data

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import config_names, from_dict
from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import image_generator
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.configuration import EvaluationConfig, load_table
from faithdiff_jax.evaluation.testsets import KNOWN_SETS, Picture, open_set

run_testset = functools.partial(run_command, "testset")
TABLES = [name.removeprefix("evaluation/") for name in config_names() if name.startswith("evaluation/")]


@pytest.fixture
def originals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, photograph in (("0801", data.astronaut()), ("0802", data.coffee())):
        write(tmp_path / "originals" / f"{name}.png", photograph[:64, :72])
    return tmp_path / "originals"


def test_a_synthetic_set_is_made_and_checked(originals, capsys):
    assert run_testset(["div2k-val", "set", "--originals", "originals", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"set/{level}: DIV2K-Val, 2 pairs" for level in LEVELS]
    for level, config in LEVELS.items():
        high, low = (np.asarray(Image.open(f"set/{level}/{side}/0801.png")) for side in ("HR", "LR"))
        np.testing.assert_array_equal(low, degrade(high, image_generator(3, "0801.png"), config))
        record = json.loads(Path(f"set/{level}/degradation.json").read_text())
        assert (record["level"], record["seed"], record["crop"]) == (level, 3, None)
        assert tuple(record["degradation"]["jpeg1"]["quality"]) == config.jpeg1.quality
    # With pairs there already, only what is missing is made; with other settings nothing is.
    write(originals / "0803.png", coordinates(64, 64))
    before = Path("set/I/LR/0801.png").read_bytes()
    assert run_testset(["div2k-val", "set", "--originals", "originals", "--seed", "3", "--levels", "I"]) == 0
    assert Path("set/I/LR/0801.png").read_bytes() == before
    assert run_testset(["div2k-val", "set", "--originals", "originals", "--seed", "4"]) == 2
    assert capsys.readouterr().err == (
        "error: set/I: was made with other settings (seed 3, now 4); name another folder\n"
    )
    # The published set has another number of pictures: without originals, that is a fault.
    assert run_testset(["div2k-val", "set"]) == 2
    assert capsys.readouterr().err == "error: set/I: 3 pictures, DIV2K-Val has 100\n"


def fill(folder, names):
    for name in names:
        write(folder / name, coordinates(8, 8))


@pytest.mark.parametrize(
    ("name", "files", "line"),
    [
        ("realsr", ["Canon_001_HR.png", "Canon_001_LR4.png"], "set: RealSR, 1 pairs"),
        ("realsr", ["test_HR/a.png", "test_LR/a.png", "Caption/a.png"], "set: RealSR, 1 pairs, with captions"),
        ("drealsr", ["test_HR/a_x1.png", "test_LR/a_x4.png"], "set: DRealSR, 1 pairs"),
        ("own", ["a.png", "b.jpg"], "set: own pictures, 2 pictures without references"),
        ("own", ["LR/a.png"], "set: own pictures, 1 pictures without references"),
        ("own", ["HR/a.png", "LR/ax4.png"], "set: own pictures, 1 pairs"),
        ("realphoto60", [f"{i}.png" for i in range(60)], "set: RealPhoto60, 60 pictures without references"),
    ],
)
def test_layouts_as_they_are_distributed(tmp_path, monkeypatch, capsys, name, files, line):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "set", files)
    assert run_testset([name, "set"]) == 0
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("name", "files", "line"),
    [
        ("realphoto60", ["a.png"], "set: 1 pictures, RealPhoto60 has 60"),
        (
            "realphoto60",
            ["HR/a.png", "LR/a.png"],
            "set: RealPhoto60 has no originals, put its pictures into the folder",
        ),
        ("realsr", ["a.png"], "set: RealSR has originals, put them into HR/ and the low-quality pictures into LR/"),
        ("realsr", ["HR/a.png"], "set: has HR/ but no low-quality pictures (LR/, LR_crops/"),
        (
            "realsr",
            ["HR/a.png", "LR/b.png"],
            "set: no picture of it can be used (set/LR/b.png: no picture of that name",
        ),
        ("realsr", ["HR/a.png", "LR/a.png", "LR/b.png"], "set: 1 files belong to no other: set/LR/b.png"),
        ("realsr", ["HR/a.png", "HR/a_1.png", "LR/a_1.png"], "names can be read in 2 ways"),
        ("own", ["a.txt/x"], "set: holds no pictures"),
        ("own", ["a.png", "a.jpg"], "set: no picture of it can be used"),
        ("div2k-val", ["I/x/a.png"], "set/I: holds no pictures"),
        ("div2k-val", ["HR/a.png"], "set/I: no such folder (the test set DIV2K-Val)"),
    ],
)
def test_a_wrong_layout_is_one_line(tmp_path, monkeypatch, capsys, name, files, line):
    monkeypatch.chdir(tmp_path)
    for file in files:
        fill(tmp_path / "set", [file] if file.endswith(("png", "jpg")) else [file + ".png"])
    assert run_testset([name, "set"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["realdeg", "set", "--originals", "originals"], "--originals: RealDeg comes with its low-quality pictures"),
        (["div2k", "set"], "invalid choice: 'div2k'"),
        (["div2k-val", "set", "--originals", "nowhere"], "nowhere: no such folder"),
        (["div2k-val", "set", "--originals", "originals", "--crop", "6"], "a multiple of 4"),
        (["own", "originals", "--originals", "originals", "--levels", "IV"], "invalid choice: 'IV'"),
        (["own", "x" * 5000], "no such folder"),
    ],
)
def test_wrong_flags(originals, capsys, flags, message):
    before = sorted(originals.parent.rglob("*"))
    assert run_testset(flags) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(originals.parent.rglob("*")) == before


def test_a_set_is_cut_to_its_first_pictures(tmp_path):
    fill(tmp_path, ["c.png", "a.png", "b.png"])
    found = open_set(tmp_path, "x", limit=2, crop=8)
    assert found.pictures == {"a": Picture(tmp_path / "a.png", None), "b": Picture(tmp_path / "b.png", None)}
    fill(tmp_path / "pairs", ["HR/a.png", "LR/a.png"])
    with pytest.raises(InputError, match="crop is for pictures without references"):
        open_set(tmp_path / "pairs", "x", crop=8)


def test_captions_are_found(tmp_path):
    fill(tmp_path, ["HR/a.png", "LR/a.png"])
    write_caption(tmp_path / "Caption/a.json", "A picture.")
    assert open_set(tmp_path, "x").captions == tmp_path / "Caption"


def test_the_papers_tables_are_configurations():
    assert {"table1", "table2", "table3", "table4", "table7", "table9", "table10", "table11"} <= set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read(name):
    config = load_table(name)
    assert all(figure > 0 for one in config.published for figure in one.figures.values())
    known = {known.title for known in KNOWN_SETS.values()}
    assert {one.folder.split("/")[0] for one in config.sets.values()} <= known


GOOD = {
    "title": "x", "metrics": ["psnr"], "sets": {"a": {"folder": "a"}}, "methods": {"m": {}},
    "published": [{"set": "a", "method": "m", "figures": {"psnr": 20}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["psrn"]}, "no metric 'psrn'; did you mean psnr"),
        ({"protocol": "paperr"}, "no protocol 'paperr'"),
        ({"sets": {}}, "sets or methods is empty"),
        ({"sets": {"a/b": {"folder": "a"}}}, "set 'a/b': must be 1 to 60"),
        ({"sets": {3: {"folder": "a"}}}, "set 3: its name must be text"),
        ({"sets": {"a": {"folder": "../a"}}}, "must be a path within the folder of data"),
        ({"sets": {"a": {"folder": "/a"}}}, "must be a path within the folder of data"),
        ({"sets": {"a": {"folder": "a", "scale": float("nan")}}}, "scale is nan"),
        ({"sets": {"a": {"folder": "a", "limit": 0}}}, "limit is 0"),
        ({"methods": {"summary": {}}}, "method 'summary'"),
        ({"published": [{"set": "b", "method": "m", "figures": {}}]}, "'b' is none of the sets"),
        ({"published": [{"set": "a", "method": "m", "figures": {"ssim": 1}}]}, "'ssim' is none of the metrics"),
        ({"published": [{"set": "a", "method": "m", "figures": {"psnr": "20"}}]}, "must be a number"),
    ],
)
def test_wrong_configurations_are_named(change, message):
    assert from_dict(EvaluationConfig, GOOD, "file").published[0].figures == {"psnr": 20}
    with pytest.raises(InputError, match=message):
        from_dict(EvaluationConfig, GOOD | change, "file")


VALUE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | st.sampled_from(["psnr", "a", "m"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "m", "folder", "set"]), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from([*GOOD, "notes", "protocol", "nonsense"]), VALUE, min_size=1, max_size=3))
def test_nonsense_configurations_are_read_or_refused(change):
    try:
        config = from_dict(EvaluationConfig, GOOD | change, "file")
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 - reading it is as right
    else:
        assert config.sets
