"""The small model's photographs: manifest, gathering, attribution, and what is written for training."""

import dataclasses
import hashlib
import importlib
import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pictures import coordinates
from PIL import Image

from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.files.captions import trim_caption

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "tiny"
TEST = {
    "Picture_0B_by_freespace", "Twigonometry", "abstract-spiral", "canyon-wren", "free_by_Peter_Nerlich",
    "greentock_by_Peter_Nerlich", "mountain-range", "photos_gabriele-diwald-201135", "sea", "snowy-mountains",
}  # fmt: skip
VALIDATION = {
    "aitzgorri_by_Aitzol_Berasategi", "boats-on-the-river", "casa-mila", "friends_by_Aitzol_Berasategi",
    "komodo-dragon", "perched-shrike", "photos_matteo-botto-16023", "rosa-kent",
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch):
    """Imports the scripts beside the manifest by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("photographs", "gather_photographs", "training_photos"):
        sys.modules.pop(name, None)


def encoded(picture: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def photograph(module, file: str, source: str, picture: np.ndarray, split: str = "train"):
    """A line of a manifest for a picture that is small enough to be kept as it is."""
    image = Image.fromarray(picture)
    return module.Photograph(
        file=file, source=source, there=f"there/{file}", author="A", licence="CC0-1.0", split=split,
        sha256=hashlib.sha256(encoded(picture)).hexdigest(), width=image.width, height=image.height,
        means=module.mean_colours(image).tobytes().hex(), caption="The image features a sign. It is red.",
    )  # fmt: skip


def test_manifest(scripts):
    photographs = scripts("photographs").read_manifest()
    split = {p.name: p.split for p in photographs}
    assert len(split) == len(photographs) == 66 + 13
    assert {name for name in split if split[name] == "test"} == TEST
    assert {name for name in split if split[name] == "validation"} == VALIDATION
    assert {name for name in split if split[name] == "example"} == {"chelsea", "coffee", "camera"}
    for p in photographs:
        assert p.caption.startswith("The image features ")
        assert p.caption.endswith(".")
        assert p.caption.count(". ") <= 1
        assert trim_caption(p.caption)
        assert all((p.author, p.licence, p.there))
        assert len(p.means) == 2 * 3 * 4 * 4
        assert max(p.width, p.height) <= 2048


def test_every_picture_is_attributed(scripts):
    assert (ROOT / "docs" / "photographs.md").read_text(encoding="utf-8") == scripts("photographs").page()


def test_a_file_is_compared_with_the_manifest(scripts):
    module = scripts("photographs")
    picture = coordinates(40, 60)
    line = photograph(module, "a.png", "here", picture)
    assert not line.fault(encoded(picture))
    assert not line.fault(encoded(picture, "JPEG", quality=95))  # other bytes, the same picture
    assert "another picture" in line.fault(encoded(picture[::-1]))
    assert "is 60x39 pixels" in line.fault(encoded(picture[1:]))
    assert "cannot be read" in line.fault(encoded(picture)[:50])


def repository(folder: pathlib.Path, files: dict[str, bytes]) -> str:
    """A Git repository with these files; returns its commit, abbreviated."""
    folder.mkdir(parents=True)
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "pictures"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], check=True, capture_output=True, text=True).stdout


def package(folder: pathlib.Path, name: str, files: dict[str, bytes]) -> None:
    """A Debian package with these files, in `folder`."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 2\nArchitecture: all\nMaintainer: n <e>\nDescription: pictures\n"
    (root / "DEBIAN" / "control").write_text(control)
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, folder / f"{name}_2_all.deb"], check=True)
    shutil.rmtree(root)


@pytest.fixture
def gathering(scripts, tmp_path, monkeypatch):
    """The script, a manifest of four pictures of two sources, and those sources, without a network."""
    module, manifest = scripts("gather_photographs"), scripts("photographs")
    pictures = [np.roll(coordinates(40, 60), 15 * i, axis=1) for i in range(4)]
    files = [encoded(picture) for picture in pictures]
    origin = repository(tmp_path / "origin" / "o" / "r", {"x/there/0.png": files[0], "x/there/1.png": files[1]})
    sources = [f"o/r {origin.strip()}"] * 2 + ["Debian package p 1"] * 2
    lines = [
        photograph(manifest, f"{i}.png", source, picture)
        for i, (source, picture) in enumerate(zip(sources, pictures, strict=True))
    ]
    lines[2:] = [dataclasses.replace(line, there=line.file) for line in lines[2:]]
    bundled = dataclasses.replace(lines[0], file="astronaut.png", source="scikit-image 0.25")
    monkeypatch.setattr(module, "REPOSITORIES", f"file://{tmp_path}/origin/")
    monkeypatch.setattr(module, "read_manifest", lambda: [*lines, bundled])
    return module, lines, files, tmp_path


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="reads Debian packages with dpkg-deb")
def test_photographs_are_gathered_from_their_sources(gathering, capsys, monkeypatch):
    module, lines, files, folder = gathering
    downloads = folder / "downloads"
    # In the package one is larger than asked for, as its like is in the real ones, and one is another picture.
    monkeypatch.setattr(module, "LARGEST_SIDE", 60)
    large = np.asarray(Image.open(io.BytesIO(files[2])).resize((120, 80), Image.Resampling.BICUBIC))
    package(downloads, "p", {"usr/share/2.png": encoded(large), "usr/share/3.png": files[0]})
    command = ["--output", str(folder / "out"), "--downloads", str(downloads)]
    assert module.main(command) == 2
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    for line in lines[:3]:
        assert not line.fault((folder / "out" / line.file).read_bytes())
    error = capsys.readouterr().err
    assert error.startswith("1 of 4 photographs could not be had:\n  3.png: is another picture")
    assert len(error.splitlines()) == 2

    # The rest, from a folder; a damaged file is replaced, the others are left alone.
    before = (folder / "out" / "1.png").stat().st_mtime_ns
    (folder / "out" / "0.png").write_bytes(files[0][:40])
    for i in (0, 3):
        (folder / f"{i}.png").write_bytes(files[i])
    assert module.main([*command, "--from", str(folder)]) == 0
    assert (folder / "out" / "0.png").read_bytes() == files[0]
    assert (folder / "out" / "1.png").stat().st_mtime_ns == before
    assert "2 of 4 photographs are in" in capsys.readouterr().out


def test_a_source_that_cannot_be_reached_costs_its_own_pictures_only(gathering, capsys, monkeypatch):
    module, _, _, folder = gathering

    def run(*words, folder, really=module._run):
        if words[0] == "apt-get":
            raise module.InputError("apt-get is not installed")
        return really(*words, folder=folder)

    monkeypatch.setattr(module, "_run", run)
    assert module.main(["--output", str(folder / "out")]) == 2
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["0.png", "1.png"]
    error = capsys.readouterr().err
    assert "  2.png: apt-get is not installed\n  3.png: apt-get is not installed\n" in error
    assert module.main(["--output", str(folder / "out"), "--from", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.fixture
def training_photos(scripts, tmp_path, monkeypatch):
    """The script, drawing few and small pictures; scikit-image's photographs and three that were gathered."""
    module, manifest = scripts("training_photos"), scripts("photographs")
    for name, value in {"LEAVES": 0, "PAGES": 1, "CHARTS": 1, "SIDE": 64, "HALVED": ("retina",)}.items():
        monkeypatch.setattr(module, name, value)
    lines = [line for line in module.read_manifest() if line.bundled]
    (tmp_path / "photographs").mkdir()
    for i, split in enumerate(("train", "validation", "test")):
        picture = np.roll(coordinates(64, 64), 20 * i, axis=1)
        lines.append(photograph(manifest, f"{split}.png", "o/r 1", picture, split))
        (tmp_path / "photographs" / f"{split}.png").write_bytes(encoded(picture))
    monkeypatch.setattr(module, "read_manifest", lambda: lines)
    return module


def test_the_splits_are_written_with_captions(training_photos, tmp_path, capsys):
    command = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "photos")]
    assert training_photos.main(command) == 0
    expected = {"train/photos": 15, "train/drawn": 2, "validation": 1, "test": 1, "example": 3}
    for folder, count in expected.items():
        source = PhotoFolder(tmp_path / "photos" / folder)
        assert len(source) == count
        assert all(trim_caption(source[index].caption) for index in range(count))
    held_out = {"validation", "test", "chelsea", "coffee", "camera"}
    trained = {path.stem.removesuffix("_half") for path in (tmp_path / "photos" / "train").rglob("*.png")}
    assert not trained & held_out
    assert (tmp_path / "photos" / "test" / "test.png").read_bytes() == (
        tmp_path / "photographs" / "test.png"
    ).read_bytes()
    assert training_photos.main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_photograph_that_is_missing_or_another_is_named(training_photos, tmp_path, capsys):
    command = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "photos")]
    (tmp_path / "photographs" / "validation.png").write_bytes((tmp_path / "photographs" / "test.png").read_bytes())
    assert training_photos.main(command) == 2
    assert "validation.png: is another picture" in capsys.readouterr().err
    (tmp_path / "photographs" / "train.png").unlink()
    assert training_photos.main(command) == 2
    assert "train.png: no such file; run gather_photographs.py" in capsys.readouterr().err
    assert not (tmp_path / "photos").exists()


def test_drawn_pictures_are_the_same_on_every_run(training_photos):
    textures = [coordinates(50, 70)]
    for draw in (lambda rng: training_photos.leaves(rng, textures), training_photos.page, training_photos.chart):
        first, second, other = (draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert first.shape == (64, 64, 3)
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)
        assert np.std(first) > 3
