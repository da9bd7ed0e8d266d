"""The manifest of a folder: what it survives and what it refuses."""

import os
import subprocess
import sys

import pytest

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.manifest import NAME, opened


def test_the_last_record_of_a_result_counts(tmp_path):
    with opened(tmp_path) as manifest:
        assert manifest.records == {}
        assert not manifest.path.exists()
        manifest.add("a.png", {"error": "damaged"})
        manifest.add("b.png", {"error": None})
        manifest.add("a.png", {"error": None, "notes": ["é\n"]})
        manifest.add("\udcff.png", {})  # a name that is not UTF-8
    with opened(tmp_path) as manifest:
        assert manifest.get("a.png") == {"result": "a.png", "error": None, "notes": ["é\n"]}
        assert manifest.get("\udcff.png") is not None
        assert manifest.get("c.png") is None
    assert len((tmp_path / NAME).read_text().splitlines()) == 4


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    with opened(tmp_path) as manifest:
        for name in ("a.png", "b.png"):
            manifest.add(name, {"caption": "x" * 50})
    whole = (tmp_path / NAME).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        (tmp_path / NAME).write_bytes(whole[:end])
        with opened(tmp_path) as manifest:
            assert set(manifest.records) == {"a.png"}
            manifest.add("b.png", {"caption": "x" * 50})
        assert (tmp_path / NAME).read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"\xff", "line 2: "),
        (b"[" * 100_000, "line 2: "),
        (b"[]", "line 2: must be a record that names its result; rename the file"),
        (b'{"result": 1}', "line 2: must be a record"),
        (b"", "line 2: "),
    ],
)
def test_what_is_no_record_is_named(tmp_path, line, message):
    (tmp_path / NAME).write_bytes(b'{"result": "a"}\n' + line + b"\n")
    with pytest.raises(InputError, match=message), opened(tmp_path):
        pass


def test_something_else_in_its_place(tmp_path):
    place = tmp_path / NAME
    place.mkdir()
    with pytest.raises(InputError, match="is a folder"), opened(tmp_path):
        pass
    place.rmdir()
    os.mkfifo(place)  # which would keep a reader waiting for ever
    with pytest.raises(InputError, match="not a regular file"), opened(tmp_path):
        pass
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file"), opened(tmp_path):
        pass


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    lines = (
        "import pathlib, sys",
        "from faithdiff_jax.files import manifest",
        "manifest.opened(pathlib.Path(sys.argv[1])).__enter__()",
    )
    code = "; ".join(lines)
    with opened(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert "another run is writing to it" in other.stderr
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """Half a line fits: a limit on the size of files stands for the disk."""
    code = """
import pathlib, resource, signal, sys
from faithdiff_jax.files import manifest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
with manifest.opened(pathlib.Path(sys.argv[1])) as opened:
    opened.add("a.png", {})
    opened.add("b.png", {"caption": "x" * 100})
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "manifest.jsonl: cannot be written (" in done.stderr
    assert (tmp_path / NAME).read_text() == '{"result": "a.png"}\n'
