"""Sources: what is found in folders and shards, and what is refused."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import coordinates, encode, write, write_caption, write_pairs
from PIL import Image

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.decode import decode, header_size
from faithdiff_jax.data.shard_writer import make_shards
from faithdiff_jax.data.shards import FORMAT, MANIFEST, Manifest, ShardSource, pack, unpack
from faithdiff_jax.data.sources import PairFolder, PhotoFolder, Record
from faithdiff_jax.errors import InputError

SMALL = coordinates(8, 12)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.png", "a.jpg", "deep/er/c.PNG", ".hidden.png", ".git/d.png"):
        write(folder / name, SMALL)
    (folder / "notes.md").write_text("no picture")
    write_caption(folder / "a.json", "Beside it.")
    (folder / "deep" / "er" / "c.txt").write_text("A text file.\n")
    return folder


@pytest.mark.parametrize("options", [("PNG",), ("JPEG",), ("WEBP",), ("TIFF",), ("BMP",)])
def test_decode_agrees_with_pillow(options):
    data = encode(coordinates(30, 50), *options)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decode(data, "x"), np.asarray(image))


def test_decode_turns_upright_and_header_knows(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SMALL).save(tmp_path / "turned.jpg", exif=exif)
    path = tmp_path / "turned.jpg"
    assert decode(path.read_bytes(), "x").shape == (12, 8, 3)
    assert header_size(path, "x") == (12, 8)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
def test_decode_refuses_what_is_cut_short(name, kept, rng):
    data = encode(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), name)
    with pytest.raises(InputError, match=r"cut\.x: "):
        decode(data[: int(kept * len(data))], "cut.x")


def test_photos_are_found_at_any_depth_with_their_captions(photos):
    source = PhotoFolder(photos)
    assert [os.path.relpath(source.name(i), photos) for i in range(len(source))] == ["a.jpg", "b.png", "deep/er/c.PNG"]
    assert [source[i].caption for i in range(3)] == ["Beside it.", "", "A text file."]
    assert source[1].hq == (photos / "b.png").read_bytes()
    assert source[1].lq == ()
    assert source.summary.endswith("3 photographs, 2 with a caption")


def test_captions_in_a_parallel_folder(photos, tmp_path):
    write_caption(tmp_path / "captions" / "deep" / "er" / "c.json", "Parallel.")
    source = PhotoFolder(photos, tmp_path / "captions")
    assert [source[i].caption for i in range(3)] == ["", "", "Parallel."]


def test_links_are_followed_but_not_in_circles(photos):
    (photos / "deep" / "up").symlink_to(photos)
    assert len(PhotoFolder(photos)) == 3


def test_pairs_in_the_published_layout(tmp_path):
    folder = write_pairs(tmp_path, 3)
    source = PairFolder(folder)
    record = source[2]
    assert record.hq == (folder / "HR_crops" / "002.png").read_bytes()
    assert record.lq == ((folder / "LR_crops" / "002.png").read_bytes(),)
    assert record.caption == "The image features picture 2."
    assert source.summary.endswith("3 pairs, 3 with a caption")


def test_pairs_as_make_pairs_writes_them(tmp_path):
    for name in ("HR", "LR"):
        (write_pairs(tmp_path) / f"{name}_crops").rename(tmp_path / name)
    for number, left in ((1, 2), (0, 1), (2, 0)):
        (tmp_path / "Caption" / f"00{number}.json").unlink()
        assert PairFolder(tmp_path).summary.endswith(f"3 pairs, {left} with a caption")


def test_pairs_with_alternatives(tmp_path):
    folder = write_pairs(tmp_path)
    (folder / "LR_crops").rename(folder / "LR_crops_1")
    for number in range(3):
        write(folder / "LR_crops_2" / f"{number:03}.png", coordinates(20, 24) // 2)
    source = PairFolder(folder)
    assert [len(record.lq) for record in (source[0], source[2])] == [2, 2]
    assert source[0].lq[1] == (folder / "LR_crops_2" / "000.png").read_bytes()


def spoil_photos(folder, fault):
    if fault == "no folder":
        return folder / "nowhere"
    if fault == "no pictures":
        (folder / "empty").mkdir()
        return folder / "empty"
    if fault == "pair layout":
        write_pairs(folder)
    if fault == "not JSON":
        (folder / "a.json").write_text("{")
    if fault == "no caption key":
        (folder / "a.json").write_text('{"text": "x"}')
    return folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", r"nowhere: no such folder"),
        ("no pictures", r"empty: no pictures .* there, at any depth"),
        ("pair layout", r"use it as pairs"),
        ("not JSON", r"1 captions cannot be used; the first: .*a\.json: not JSON"),
        ("no caption key", r'a\.json: no "caption" key'),
    ],
)
def test_photo_folders_that_are_refused(photos, fault, message):
    with pytest.raises(InputError, match=message) as caught:
        PhotoFolder(spoil_photos(photos, fault))
    assert "\n" not in str(caught.value)


def test_a_caption_folder_that_fits_nothing_is_refused(photos, tmp_path):
    write_caption(tmp_path / "captions" / "other.json", "x")
    with pytest.raises(InputError, match="captions: no caption there has the name of a picture"):
        PhotoFolder(photos, tmp_path / "captions")


def spoil_pairs(folder, fault):
    if fault == "no LQ folder":
        (folder / "LR_crops").rename(folder / "other")
    if fault == "HQ alone":
        (folder / "LR_crops" / "001.png").unlink()
    if fault == "LQ alone":
        (folder / "HR_crops" / "002.png").unlink()
    if fault == "size":
        write(folder / "LR_crops" / "001.png", coordinates(20, 25))
    if fault == "header":
        (folder / "LR_crops" / "001.png").write_bytes(b"nothing")
    if fault == "two suffixes":
        write(folder / "HR_crops" / "001.jpg", SMALL)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no LQ folder", r"pairs need HR_crops or HR, and LR_crops or LR"),
        ("HQ alone", r"LR_crops: 1 pictures have no partner there, the first is 001\.png"),
        ("LQ alone", r"HR_crops: 1 pictures have no partner there, the first is 002\.png"),
        ("size", r"1 pairs do not fit; the first: .*001\.png: LQ 25x20, HQ 96x80 .* must be 4 times as large"),
        ("header", r"001\.png: not a picture that can be read"),
        ("two suffixes", r"001\.jpg and 001\.png differ in their suffix only"),
    ],
)
def test_pair_folders_that_are_refused(tmp_path, fault, message):
    spoil_pairs(write_pairs(tmp_path), fault)
    with pytest.raises(InputError, match=message) as caught:
        PairFolder(tmp_path)
    assert "\n" not in str(caught.value)


def test_records_survive_packing():
    record = Record(name="a/ü.png", hq=b"hq\0\xff", lq=(b"", b"lq"), caption="“Grüße”\n")
    assert unpack(pack(record)) == record
    for damaged in (b"", pack(record)[:-1], pack(record) + b"x"):
        with pytest.raises(ValueError, match=r"not a record|its header counts"):
            unpack(damaged)


@pytest.mark.parametrize("kind", ["photos", "pairs"])
def test_shards_hold_what_the_folder_holds(tmp_path, photos, kind):
    source = PhotoFolder(photos) if kind == "photos" else PairFolder(write_pairs(tmp_path / "pairs"))
    manifest = make_shards(source, kind, tmp_path / "shards", 2)
    assert [shard.records for shard in manifest.shards] == [2, 1]
    shards = ShardSource(tmp_path / "shards")
    assert shards.summary.endswith(f"3 {kind} in 2 shards, {2 if kind == 'photos' else 3} with a caption")
    for index in range(3):
        ours, theirs = shards[index], source[index]
        assert (ours.hq, ours.lq, ours.caption) == (theirs.hq, theirs.lq, theirs.caption)
        assert ours.name == f"{shards.name(index)} ({os.path.relpath(source.name(index), source.folder)})"


class Interrupted(PhotoFolder):
    """Photographs whose reading is interrupted by Ctrl-C."""

    stop_at = 3

    def __getitem__(self, index):
        if index == self.stop_at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_run_is_continued_to_the_same_bytes(tmp_path):
    for number in range(5):
        write(tmp_path / "photos" / f"{number}.png", SMALL + number)
    source, whole, broken = PhotoFolder(tmp_path / "photos"), tmp_path / "whole", tmp_path / "broken"
    make_shards(source, "photos", whole, 2)
    with pytest.raises(KeyboardInterrupt):
        make_shards(Interrupted(tmp_path / "photos"), "photos", broken, 2)
    with pytest.raises(InputError, match="only 1 of 3 shards are written, run `faithdiff shards` again"):
        ShardSource(broken)
    first = broken / "shard-00000-of-00003.arrayrecord"
    before = first.stat().st_mtime_ns
    make_shards(source, "photos", broken, 2)
    assert first.stat().st_mtime_ns == before
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in broken.iterdir())
    assert all((whole / name).read_bytes() == (broken / name).read_bytes() for name in names)


def test_processes_share_the_work_and_any_of_them_may_be_killed(tmp_path, capsys):
    """Processes of their own: two write at once, a third is killed within a shard and another takes its place."""
    for number in range(7):
        write(tmp_path / "photos" / f"{number}.png", SMALL + number)
    (tmp_path / "photos" / "8.png").write_bytes(b"nothing")
    source, whole, shared = PhotoFolder(tmp_path / "photos"), tmp_path / "whole", tmp_path / "shared"
    make_shards(source, "photos", whole, 1)
    shared.mkdir()
    flags = ["shards", "--photos", tmp_path / "photos", "--output", shared, "--records-per-shard", "1"]

    def start(process: int, code: str = "") -> subprocess.Popen:
        call = [*map(str, flags), "--processes", "3", "--process-id", str(process)]
        text = f"{code}\nimport sys\nfrom faithdiff_jax.cli.main import main\nsys.exit(main({call!r}))"
        return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)

    killed = (
        "import os, signal\nfrom faithdiff_jax.data import shard_writer\n"
        "pack = shard_writer.pack\n"
        "def stop(record): return os.kill(os.getpid(), signal.SIGKILL) if '5' in record.name else pack(record)\n"
        "shard_writer.pack = stop"
    )
    running = [start(0), start(1), start(2, killed)]
    outputs = [process.communicate(timeout=100)[0] for process in running]
    # 2 for 8.png: of who wrote its shard, and of who found that shard there at its end.
    assert [process.returncode for process in running[1:]] == [2, -signal.SIGKILL], outputs
    assert running[0].returncode in (0, 2), outputs
    assert re.search(r"shards of 8, the others are other processes' to write", outputs[0])
    with pytest.raises(InputError, match="only 7 of 8 shards are written, run `faithdiff shards` again"):
        ShardSource(shared)
    # Fewer processes than before take up what is left.
    capsys.readouterr()
    assert run_command("shards", [*map(str, flags), "--processes", "2", "--process-id", "1"][1:]) == 2
    assert "8.png: not a picture" in capsys.readouterr().err
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in shared.iterdir() if not path.name.endswith(".tmp"))
    assert all((whole / name).read_bytes() == (shared / name).read_bytes() for name in names)
    assert len(ShardSource(shared)) == 7


def test_shards_that_an_earlier_version_left_unfinished(tmp_path):
    """It kept one manifest, of the shards so far."""
    for number in range(3):
        write(tmp_path / "photos" / f"{number}.png", SMALL + number)
    source, folder = PhotoFolder(tmp_path / "photos"), tmp_path / "shards"
    whole = make_shards(source, "photos", folder, 1)
    for note in folder.glob("shard-*.json"):
        note.unlink()
    (folder / whole.shards[2].file).unlink()
    dataclasses.replace(whole, shards=whole.shards[:2]).save(folder)
    with pytest.raises(InputError, match="only 2 of 3 shards are written"):
        ShardSource(folder)
    assert make_shards(source, "photos", folder, 1) == whole
    assert len(ShardSource(folder)) == 3


def test_unusable_records_are_left_out_and_named(tmp_path, photos, capsys):
    (photos / "bad.jpg").write_bytes(b"nothing")
    flags = ["--photos", str(photos), "--output", str(tmp_path / "shards")]
    assert run_command("shards", flags) == 2
    assert "bad.jpg: not a picture" in capsys.readouterr().err
    assert len(ShardSource(tmp_path / "shards")) == 3
    assert run_command("shards", flags) == 2, "a second run reports them too"


def test_the_command(tmp_path, capsys):
    flags = ["--pairs", str(write_pairs(tmp_path / "pairs")), "--output", str(tmp_path / "shards")]
    assert run_command("shards", [*flags, "--records-per-shard", "2"]) == 0
    assert "3 records in 2 shards" in capsys.readouterr().out
    assert run_command("shards", [*flags, "--records-per-shard", "0"]) == 2
    assert run_command("shards", [*flags, "--records-per-shard", "3"]) == 2
    assert "holds shards of other inputs" in capsys.readouterr().err
    assert run_command("shards", [*flags, "--processes", "2", "--process-id", "2"]) == 2
    assert "--process-id 2: must be below --processes, 2" in capsys.readouterr().err
    (tmp_path / "shards" / MANIFEST).unlink()
    assert run_command("shards", [*flags, "--records-per-shard", "3"]) == 2
    assert "holds shards of other inputs" in capsys.readouterr().err
    assert run_command("shards", ["--photos", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert run_command("shards", [*flags[:3], str(tmp_path / "file")]) == 2


def spoil_shards(folder, fault):
    shard = folder / "shard-00001-of-00002.arrayrecord"
    if fault == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    if fault == "missing":
        shard.unlink()
    if fault == "no manifest":
        (folder / MANIFEST).unlink()
    if fault == "broken manifest":
        (folder / MANIFEST).write_text("[]")
    if isinstance(fault, dict):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, **fault}))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut short", r"shard-00001-of-00002\.arrayrecord: .* cut short"),
        ("missing", r"shard-00001-of-00002\.arrayrecord: no such file"),
        ("no manifest", r"no shards\.json there"),
        ("broken manifest", r"shards\.json: not a manifest"),
        ({"format": "2"}, r"its format is '2'"),
        ({"inputs": "many"}, r"shards\.json: .*inputs"),
        ({"inputs": None}, r"shards\.json: .*inputs"),
        ({"inputs_per_shard": 0}, r"shards\.json: inputs_per_shard 0: must be at least 1"),
        ({"inputs_per_shard": -1}, r"shards\.json: inputs_per_shard -1: must be at least 1"),
        ({"inputs_per_shard": "x"}, r"shards\.json: .*inputs_per_shard"),
        ({"inputs_per_shard": 3}, r"shards\.json: 2 shards: 3 inputs fill 1"),
        ({"kind": "songs"}, r"shards\.json: kind 'songs'"),
        ({"shards": None}, r"shards\.json: shards is None: must be a list"),
        ({"shards": [{"file": "../other", "records": 1, "captions": 0, "bytes": 9}]}, r"file '\.\./other': must be"),
        ({"shards": [{"file": "a", "records": -1, "captions": 0, "bytes": 9}]}, r"a: 0 captions, -1 records, 9 bytes"),
        ({"shards": [{"file": "a", "records": 1, "captions": 0, "bytes": 9}] * 2}, r"shards: two have the same file"),
        ({"author": "x"}, r"shards\.json: unknown key author"),
    ],
)
def test_shards_that_are_refused(tmp_path, fault, message):
    make_shards(PairFolder(write_pairs(tmp_path / "pairs")), "pairs", tmp_path / "shards", 2)
    spoil_shards(tmp_path / "shards", fault)
    with pytest.raises(InputError, match=message):
        ShardSource(tmp_path / "shards")


@settings(max_examples=150)
@given(
    key=st.sampled_from(["kind", "inputs", "inputs_per_shard", "names", "shards", "left_out", "format", "more"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["file", "records", "captions", "bytes", "x"]), inner)
        ),
        max_leaves=8,
    ),
)
def test_a_manifest_of_nonsense_is_one_line(key, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    content = {"kind": "photos", "inputs": 1, "inputs_per_shard": 1, "names": "", "shards": [], "left_out": []}
    (folder / MANIFEST).write_text(json.dumps({**content, "format": FORMAT, key: value}))
    with contextlib.suppress(InputError):
        Manifest.load(folder)
    with pytest.raises(InputError) as caught:
        ShardSource(folder)
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(st.data())
def test_bytes_of_nonsense_are_no_record(data):
    packed = bytearray(pack(Record(name="a", hq=b"hq", lq=(b"lq",), caption="c")))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(packed) - 1), st.integers(0, 255)), max_size=4)
    ):
        packed[place] = value
    with contextlib.suppress(ValueError):
        assert isinstance(unpack(bytes(packed)), Record)


def test_names_that_are_not_utf8_go_through_shards(tmp_path):
    folder = tmp_path / "photos"
    name = os.fsdecode(b"caf\xe9.png")
    write(folder / name, SMALL)
    (folder / os.fsdecode(b"bad\xe9.png")).write_bytes(b"nothing")
    manifest = make_shards(PhotoFolder(folder), "photos", tmp_path / "shards")
    assert [line.isprintable() for line in manifest.left_out] == [True]
    shards = ShardSource(tmp_path / "shards")
    assert shards[0].name == f"{shards.name(0)} ({name})"
    assert Manifest.load(tmp_path / "shards") == manifest


@pytest.mark.parametrize("kind", ["photos", "pairs"])
def test_a_fingerprint_changes_with_names_and_sizes(tmp_path, photos, kind):
    folder = photos if kind == "photos" else write_pairs(tmp_path / "pairs")
    picture, caption = ("b.png", "a.json") if kind == "photos" else ("LR_crops/001.png", "Caption/001.json")

    def prints():
        source = PhotoFolder(folder) if kind == "photos" else PairFolder(folder)
        make_shards(source, kind, tmp_path / f"shards{len(seen)}")
        return source.fingerprint(), ShardSource(tmp_path / f"shards{len(seen)}").fingerprint()

    seen: list[tuple[str, str]] = []
    seen.append(prints())
    seen.append(prints())
    assert seen[0] == seen[1]
    before = (folder / picture).read_bytes()
    (folder / picture).write_bytes(before + b"\0")
    seen.append(prints())
    (folder / picture).write_bytes(before)
    write_caption(folder / caption, "Another one.")
    seen.append(prints())
    for group in zip(*seen, strict=True):
        assert len(set(group)) == 3
        assert all(len(text) == 32 for text in group)


def test_pipes_and_unreadable_folders(photos, monkeypatch, caplog):
    os.mkfifo(photos / "pipe.png")
    assert len(PhotoFolder(photos)) == 3
    assert [record.message for record in caplog.records] == [f"{photos}/pipe.png: not a regular file, skipped"]
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"deep/er: cannot be listed .Permission denied."):
        PhotoFolder(photos)


def test_a_damaged_record_is_named_and_its_neighbours_are_read(tmp_path):
    source = PairFolder(write_pairs(tmp_path / "pairs"))
    make_shards(source, "pairs", tmp_path / "shards")
    (shard,) = Manifest.load(tmp_path / "shards").shards
    data = bytearray((tmp_path / "shards" / shard.file).read_bytes())
    data[data.find(source[1].hq) + 20] ^= 255
    (tmp_path / "shards" / shard.file).write_bytes(data)
    shards = ShardSource(tmp_path / "shards")
    for _ in range(2):
        with pytest.raises(InputError, match=r"shards, record 1: the shard is damaged"):
            shards[1]
        assert (shards[0].hq, shards[2].hq) == (source[0].hq, source[2].hq)
