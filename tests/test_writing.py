"""Output appears complete or not at all, and nothing else stays in the folder."""

import pytest

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import replacing, whole, write_bytes, write_text


def test_a_file_and_the_folders_above_it_are_written(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "naïve\r\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "naïve\r\n".encode()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.txt"]


def test_what_was_there_is_replaced(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"before")
    with replacing(path) as temporary:
        temporary.write_bytes(b"after")
        assert path.read_bytes() == b"before"
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError("no space\nleft"), InputError), (RuntimeError(), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path, error, raised):
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(raised) as caught:
        fail_halfway()
    if raised is InputError:
        assert str(caught.value) == f"{path}: cannot be written (no space left)"
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path):
    with whole(tmp_path / "made", 10) as folder:
        folder.mkdir()
        (folder / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "file").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail_halfway():
        with whole(tmp_path / "made", 10) as folder:
            folder.mkdir()
            (folder / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_foreseen(tmp_path):
    with pytest.raises(InputError, match=r"big: needs 1000000000\.0 GB, the disk has"), whole(tmp_path / "big", 10**18):
        raise AssertionError("the body must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 300, "File name too long"), ("a/b", "File exists"), ("a/b/c", "Not a directory"), ("d", "Is a directory")],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, name, message):
    (tmp_path / "a").write_text("a file")
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match=message):
        write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


def test_a_long_name_that_the_file_system_takes_is_written(tmp_path):
    write_text(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_half_a_surrogate_pair_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not Unicode text"):
        write_text(tmp_path / "a", "caf\udce9")
    assert list(tmp_path.iterdir()) == []
