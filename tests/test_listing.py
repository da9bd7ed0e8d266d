"""Folders of pictures: what is listed, what is passed over, and in which order."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_images, list_pictures


@pytest.fixture
def folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.txt", ".d.png", "e.webp", "f.tiff", "10.jpeg", "sub/h.png", ".git/i.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "g.png").mkdir()
    return tmp_path


def test_a_folder_is_listed_in_order(folder):
    names = ["10.jpeg", "a.jpg", "b.PNG", "e.webp", "f.tiff"]
    assert [path.name for path in list_images(folder)] == names
    assert list_pictures(folder).names == tuple(names)
    assert list_pictures(folder, deep=True).names == (*names, "sub/h.png")
    assert list_pictures(folder, deep=True).paths[-1] == folder / "sub" / "h.png"


def test_what_is_no_folder_is_refused(folder):
    for name, message in {"a.jpg": "not a folder", "none": "no such folder", "x" * 300: "no such folder"}.items():
        with pytest.raises(InputError, match=message):
            list_pictures(folder / name)


def test_pipes_devices_and_broken_links_are_passed_over_with_a_line(folder, caplog):
    os.mkfifo(folder / "pipe.png")
    (folder / "sub" / "null.png").symlink_to("/dev/null")
    (folder / "gone.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "link.png").symlink_to("a.jpg")
    names = list_pictures(folder, deep=True).names
    assert set(names) - {"link.png"} == {"10.jpeg", "a.jpg", "b.PNG", "e.webp", "f.tiff", "sub/h.png"}
    assert "link.png" in names
    skipped = list_pictures(folder, deep=True).skipped
    assert [line.removeprefix(f"{folder}/").partition(":")[0] for line in skipped] == [
        "gone.png",
        "loop.png",
        "pipe.png",
        "sub/null.png",
    ]
    list_images(folder)
    assert sum("not a regular file, skipped" in record.message for record in caplog.records) == 3


def test_links_are_followed_but_no_folder_is_entered_twice(folder):
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    assert [name for name in list_pictures(folder, deep=True).names if "/" in name] == ["again/h.png"]


def test_an_unreadable_folder_is_one_line_and_stops_no_other(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_pictures(folder, deep=True)
    assert listing.unreadable == (f"{folder}/sub: cannot be listed (Permission denied)",)
    assert len(listing.names) == 5
    with pytest.raises(InputError, match=r"sub: cannot be listed .Permission denied."):
        list_pictures(folder / "sub", deep=True)


STEMS = st.binary(min_size=1, max_size=20).map(lambda name: name.replace(b"\0", b"-").replace(b"/", b"-"))
SUFFIXES = st.sampled_from([*PICTURE_SUFFIXES, ".PNG", "", ".txt"])


@settings(max_examples=100)
@given(names=st.lists(st.tuples(STEMS.filter(lambda stem: stem not in (b".", b"..")), SUFFIXES), unique=True))
def test_names_of_any_bytes_are_listed(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    written = set()
    for name, suffix in names:
        with open(os.path.join(os.fsencode(folder), name + suffix.encode()), "wb"):
            written.add(os.fsdecode(name + suffix.encode()))
    expected = {name for name in written if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")}
    listing = list_pictures(folder)
    assert set(listing.names) == expected
    assert list(listing.names) == sorted(listing.names)
    assert all(path.is_file() for path in listing.paths)
