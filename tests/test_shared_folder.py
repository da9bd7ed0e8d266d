"""Several processes that share a folder (`faithdiff restore --shared`): each picture once, whoever is killed."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from folder_runs import enlarged, enlarging, lines, opened, records, restore, started, wait_for, write

from faithdiff_jax.cli.folder_run import FolderRun
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import claims, manifest

COUNT = 24
OTHER = """
import pathlib, sys
from faithdiff_jax.files import manifest
with manifest.opened(pathlib.Path(sys.argv[1]), shared=True) as kept:
    for line in sys.stdin:
        what, name = line.split()
        print(kept.claim(name) if what == "claim" else kept.add(name, {"error": None}), flush=True)
"""


class Other:
    """A second process that has a folder's manifest open."""

    def __init__(self, folder):
        command = [sys.executable, "-c", OTHER, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self, what: str) -> str:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def killed(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_claims_are_of_one_process_and_go_with_it(tmp_path):
    with manifest.opened(tmp_path, shared=True) as kept:
        other = Other(tmp_path)
        assert other.says("claim a.png") == "True"
        assert not kept.claim("a.png")
        assert kept.claim("b.png")
        assert kept.claim("b.png")  # ours already
        assert other.says("claim b.png") == "False"
        kept.release("b.png")
        assert other.says("claim b.png") == "True"
        assert other.says("add b.png") == "None"
        kept.add("c.png", {"error": None})  # after what the other has added
        assert kept.done_elsewhere("b.png")
        assert not kept.done_elsewhere("c.png")
        other.killed()
        assert kept.claim("a.png")
        assert not kept.done_elsewhere("a.png")
        with pytest.raises(InputError, match=r"another run is writing to it; .* --shared to both"):  # noqa: SIM117
            with manifest.opened(tmp_path):
                pass
    assert [record["result"] for record in records(tmp_path)] == ["b.png", "c.png"]
    assert not (tmp_path / claims.NAME).exists()


def test_the_last_to_leave_removes_the_file_of_claims(tmp_path):
    with manifest.opened(tmp_path, shared=True):
        other = Other(tmp_path)
        assert other.says("claim a.png") == "True"
    assert (tmp_path / claims.NAME).exists()
    with manifest.opened(tmp_path, shared=True) as kept:
        assert not kept.claim("a.png")  # in the file that the other has open
        other.killed()
    assert not (tmp_path / claims.NAME).exists()


def test_a_picture_that_cannot_be_read_leaves_no_folder(tmp_path, monkeypatch):
    enlarging(monkeypatch)
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert restore("--input", tmp_path / "a.png", "--output", tmp_path / "out", "--shared") == 2
    assert not (tmp_path / "out").exists()


def test_a_line_that_another_process_did_not_finish_is_dropped(tmp_path):
    with manifest.opened(tmp_path, shared=True) as kept:
        kept.add("a.png", {"error": None})
        with kept.path.open("ab") as file:
            file.write(b'{"result": "b')
        kept.add("c.png", {"error": None})
    assert [record["result"] for record in records(tmp_path)] == ["a.png", "c.png"]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", refuse)
    with claims.opened(tmp_path) as opened_, pytest.raises(InputError, match=r"has no locks \(No locks available\)"):
        opened_.take("a.png")


def test_one_process_of_three_is_killed_and_the_others_finish(tmp_path):
    write(tmp_path / "in", **{f"p{number}": (24, 24 + number % 5) for number in range(COUNT)})
    (tmp_path / "in" / "bad.png").write_text("no picture")
    processes = started(tmp_path, 0.5, "--batch", "2", "--shared", count=3)
    wait_for(lambda: lines(tmp_path / "out") >= 3)
    time.sleep(random.Random(0).random() * 0.3)
    processes[0].kill()
    for process in processes:
        process.communicate()
    codes = [process.returncode for process in processes]
    assert codes[0] == -signal.SIGKILL
    assert set(codes[1:]) <= {0, 2}  # 2 of the one, if it lives, that came upon the bad one
    made = [record for record in records(tmp_path / "out") if record["error"] is None]
    assert len(records(tmp_path / "out")) == COUNT + 1
    assert sorted(record["result"] for record in made) == sorted(f"p{number}.png" for number in range(COUNT))
    for path in (tmp_path / "out").glob("*.png"):
        source = np.asarray(opened(tmp_path / "in" / path.name))
        np.testing.assert_array_equal(np.asarray(opened(path)), enlarged(source))


def test_a_result_whose_process_was_killed_before_its_line(tmp_path, monkeypatch):
    """Written after this process has looked at what there is, and before it comes to it."""
    photos, out = write(tmp_path / "in", a=(20, 30), b=(20, 30)), tmp_path / "out"
    plan, batches = FolderRun._batches, enlarging(monkeypatch)

    def then_written(self, jobs):
        write(out, a=(80, 120))
        return plan(self, jobs)

    monkeypatch.setattr(FolderRun, "_batches", then_written)
    assert restore("--input", photos, "--output", out, "--shared") == 0
    assert batches == [[((20, 30), 42)]]
    assert [(one["result"], one.get("found", False)) for one in records(out)] == [("a.png", True), ("b.png", False)]


def test_to_do_again_what_others_have_done_is_refused(tmp_path, capsys):
    flags = ["--input", write(tmp_path / "in", a=(20, 30)), "--output", tmp_path / "out", "--shared", "--overwrite"]
    assert restore(*flags) == 2
    assert "--shared and --overwrite: give one of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
