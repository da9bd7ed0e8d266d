"""A folder through `faithdiff restore`, with a model that only enlarges: order, manifest, resuming, faults, signals."""

import json
import random
import signal
import time

import numpy as np
import pytest
from folder_runs import enlarged, enlarging, lines, opened, records, restore, started, wait_for, write

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.manifest import NAME
from faithdiff_jax.weights.model_directory import ModelDirectory


@pytest.fixture
def batches(monkeypatch) -> list[list[tuple[tuple[int, int], int]]]:
    return enlarging(monkeypatch)


def test_pictures_of_one_padded_size_go_together(batches, tmp_path):
    photos = write(tmp_path / "in", a=(20, 30), b=(40, 40), c=(30, 20), d=(32, 32), e=(33, 9), f=(25, 25))
    out = tmp_path / "out"
    assert restore("--input", photos, "--output", out, "--multiple", 128, "--batch", 3) == 0
    sizes = [[size for size, _ in batch] for batch in batches]
    assert sizes == [[(20, 30), (30, 20), (32, 32)], [(25, 25)], [(40, 40)], [(33, 9)]]
    for name in "abcdef":
        source, result = (np.asarray(opened(place / f"{name}.png")) for place in (photos, out))
        np.testing.assert_array_equal(result, enlarged(source))
    assert sorted(record["result"] for record in records(out)) == [f"{name}.png" for name in "abcdef"]


def test_a_result_says_how_it_was_made_and_not_when(batches, tmp_path):
    photos = write(tmp_path / "in", a=(20, 30))
    for name in ("one", "two"):
        flags = ["--output", tmp_path / name, "--caption", "a cat", "--seed", 7, "--steps", 3]
        assert restore("--input", photos, *flags) == 0
    assert (tmp_path / "one" / "a.png").read_bytes() == (tmp_path / "two" / "a.png").read_bytes()
    (record,) = records(tmp_path / "one")
    made = json.loads(opened(tmp_path / "one" / "a.png").text["faithdiff"])
    assert made["options"]["seed"] == 7
    assert made["options"]["steps"] == 3
    assert made["caption"] == "a cat"
    assert made["model"] == ModelDirectory.open(SMALL_MODEL).digest
    assert made.items() <= record.items()
    assert record["input"] == [30, 20]
    assert set(record["seconds"]) == {"read", "denoise", "write"}
    assert record["error"] is None
    assert restore("--input", photos, "--output", tmp_path / "tif", "--format", "tif") == 0
    described = json.loads(opened(tmp_path / "tif" / "a.tif").tag_v2[270])
    assert described["model"] == made["model"]


def test_every_picture_with_several_seeds(batches, tmp_path):
    photos, out = write(tmp_path / "in", a=(20, 30), b=(20, 30)), tmp_path / "out"
    assert restore("--input", photos, "--output", out, "--seeds", "3,1", "--batch", 8) == 0
    assert batches == [[((20, 30), 3), ((20, 30), 1)] * 2]
    names = {"a_seed3.png", "a_seed1.png", "b_seed3.png", "b_seed1.png", NAME}
    assert {path.name for path in out.iterdir()} == names
    assert sorted(record["options"]["seed"] for record in records(out)) == [1, 1, 3, 3]


def test_failures_are_kept_and_retried_when_asked(batches, tmp_path, capsys):
    photos, out = write(tmp_path / "in", a=(20, 30)), tmp_path / "out"
    (photos / "bad.png").write_text("no picture")
    assert restore("--input", photos, "--output", out) == 2
    assert "1 of 2 pictures could not be restored:" in capsys.readouterr().err
    assert restore("--input", photos, "--output", out) == 2
    said = capsys.readouterr()
    assert "1 of 2 already done, skipped" in said.out
    assert "1 of 2 results failed before and are left out (--retry-failed)" in said.err
    assert "bad.png: not a picture" in said.err
    assert len(batches) == 1
    assert restore("--input", photos, "--output", out, "--retry-failed") == 2
    assert "1 of 1 pictures could not be restored:" in capsys.readouterr().err
    write(photos, bad=(20, 20))  # another file of that name is another picture
    assert restore("--input", photos, "--output", out) == 0
    kept = [(one["result"], bool(one["error"])) for one in records(out)]
    assert [failed for name, failed in kept if name == "bad.png"] == [True, True, False]
    assert [failed for name, failed in kept if name == "a.png"] == [False]


def test_a_batch_without_memory_is_done_one_by_one(batches, tmp_path, capsys):
    photos, out = write(tmp_path / "in", a=(12, 12), b=(13, 13), c=(12, 13)), tmp_path / "out"
    flags = ["--input", photos, "--output", out, "--batch", 4, "--multiple", 64]
    assert restore(*flags) == 1
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]
    assert "b.png: not enough memory" in capsys.readouterr().err
    assert restore(*flags) == 1  # not the picture's fault: tried again
    assert len(batches) == 5


def test_results_of_others_are_left_alone(batches, tmp_path, capsys):
    photos, out = write(tmp_path / "in", a=(20, 30), b=(20, 30)), tmp_path / "out"
    write(out, a=(3, 3))
    before = (out / "a.png").read_bytes()
    assert restore("--input", photos, "--output", out) == 0
    assert (out / "a.png").read_bytes() == before
    assert [(one["result"], one.get("found", False)) for one in records(out)] == [("a.png", True), ("b.png", False)]
    capsys.readouterr()
    assert restore("--input", photos, "--output", out, "--steps", 9) == 0
    assert "1 of these were made with another model or other options" in capsys.readouterr().out
    assert restore("--input", photos, "--output", out, "--overwrite") == 0
    assert (out / "a.png").read_bytes() != before


def test_what_a_killed_run_had_begun_is_removed(batches, tmp_path):
    photos, out = write(tmp_path / "in", a=(20, 30)), tmp_path / "out"
    out.mkdir()
    others, begun = {".notes.tmp", f".{'g' * 32}.tmp"}, {f".{'0f' * 16}.tmp", f".{'a1' * 16}.tmp"}
    for name in others | begun:
        (out / name).write_text("half a picture")
    assert restore("--input", photos, "--output", out, "--shared") == 0  # another process may be writing them
    assert begun < {path.name for path in out.iterdir()}
    assert restore("--input", photos, "--output", out) == 0
    assert {path.name for path in out.glob(".*.tmp")} == others


def test_a_folder_that_changes_under_the_run(batches, tmp_path, capsys, monkeypatch):
    """One picture goes, another becomes larger, after the batches were made."""
    photos, out = write(tmp_path / "in", a=(20, 30), b=(20, 30), c=(20, 30)), tmp_path / "out"
    from faithdiff_jax.cli.folder_run import FolderRun

    plan = FolderRun._batches

    def then_change(self, jobs):
        planned = plan(self, jobs)
        (photos / "a.png").unlink()
        write(photos, b=(90, 90))
        return planned

    monkeypatch.setattr(FolderRun, "_batches", then_change)
    assert restore("--input", photos, "--output", out, "--batch", 4) == 2
    assert "a.png" in capsys.readouterr().err
    assert opened(out / "b.png").size == (360, 360)
    assert opened(out / "c.png").size == (120, 80)


def test_captions_of_another_set(batches, tmp_path, capsys):
    photos, captions = write(tmp_path / "in", a=(20, 30), b=(20, 30)), tmp_path / "captions"
    captions.mkdir()
    (captions / "c.txt").write_text("a cat")
    flags = ["--input", photos, "--output", tmp_path / "out", "--captions", captions]
    assert restore(*flags) == 2
    assert "has a caption for none of the pictures (a.json or a.txt, for instance)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (captions / "b.txt").write_text("a dog")
    assert restore(*flags) == 0


def test_a_full_disk_ends_the_run(batches, tmp_path, capsys, monkeypatch):
    photos, out = write(tmp_path / "in", **{name: (20, 30) for name in "abcdefgh"}), tmp_path / "out"

    def save(path, *given, **named):
        if path.name != "a.png":
            raise InputError(f"{path}: cannot be written (No space left on device)") from OSError(28, "full")
        path.write_bytes(b"x")

    monkeypatch.setattr("faithdiff_jax.files.images.save_image", save)
    assert restore("--input", photos, "--output", out) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(batches) < 8
    assert [record["result"] for record in records(out)] == ["a.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1,2,1"], "--seeds: 1 is given twice"),
        (["--seeds", "1,-2"], "seed is -2: must be a whole number from 0"),
        (["--seeds", "1", "--seed", "2"], "--seed and --seeds: give one of them"),
        (["--batch", "0"], "batch is 0: must be a whole number from 1 to 1024"),
        (["--batch", "x"], "argument --batch: 'x': must be a whole number"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, message):
    photos = write(tmp_path / "in", a=(20, 30))
    assert restore("--input", photos, "--output", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_runs_and_ctrl_c(tmp_path):
    """A second run is refused; Ctrl-C finishes what is in hand and leaves the rest to the next run."""
    write(tmp_path / "in", **{f"p{number}": (8, 8) for number in range(30)})
    out = tmp_path / "out"
    (process,) = started(tmp_path, 0.3)
    wait_for(lambda: lines(out) >= 1)
    assert restore("--input", tmp_path / "in", "--output", out) == 2  # refused before a model is read
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "finishing the pictures in hand" in said
    results = {path.name for path in out.glob("*.png")}
    assert 0 < len(results) < 30
    assert {record["result"] for record in records(out)} == results
    assert not list(out.glob(".*"))


def test_kill_at_random_moments(tmp_path):
    """Every result whole, each made once, the manifest readable, however often the run is killed."""
    count = 40
    write(tmp_path / "in", **{f"p{number}": (24, 24 + number % 5) for number in range(count)})
    out, lots = tmp_path / "out", random.Random(0)
    for _ in range(10):
        (process,) = started(tmp_path, 0.1, "--batch", "2")
        before = lines(out)
        wait_for(lambda: lines(out) > before or process.poll() is not None)  # noqa: B023
        time.sleep(lots.random() * 0.15)
        process.kill()
        process.communicate()
    (process,) = started(tmp_path, 0)
    process.communicate()
    assert process.returncode == 0
    made = [record["result"] for record in records(out)]
    assert sorted(made) == sorted(set(made))
    assert set(made) == {f"p{number}.png" for number in range(count)}
    for path in out.glob("*.png"):
        source = np.asarray(opened(tmp_path / "in" / path.name))
        np.testing.assert_array_equal(np.asarray(opened(path)), enlarged(source))
