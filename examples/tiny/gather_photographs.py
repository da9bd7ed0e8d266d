"""Gather the photographs of photographs.tsv from where it says, or from a folder that has them.

    python examples/tiny/gather_photographs.py --output photographs
    python examples/tiny/gather_photographs.py --output photographs --from FOLDER

Those of Debian's packages are fetched by `apt-get download` (any version of a package that has the picture will do) and
read with `dpkg-deb`; the .jxl among them need `pip install pillow-jxl-plugin`. Those of GitHub's repositories are
fetched with `git`, at the commit that the manifest names. Originals larger than 2,048 pixels a side are scaled down.
Every file is compared with the manifest, by SHA-256 or, as decoders differ, by its size and mean colours; only right
ones are written. What is in --output already is not fetched again, nor is what is in --downloads: a package that apt
does not know can be put there by hand. Pictures that could not be had are named, and the exit code is then 2.
"""

import argparse
import io
import itertools
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence

from photographs import Photograph, read_manifest
from PIL import Image

from faithdiff_jax.cli import command
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import write_bytes

LARGEST_SIDE = 2048
QUALITY = 93
REPOSITORIES = "https://"
"""What the manifest's names of repositories are put behind."""

Originals = Iterator[tuple[Photograph, bytes]]


def main(argv: list[str] | None = None) -> int:
    """Gather; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder for the photographs")
    parser.add_argument("--from", dest="given", type=pathlib.Path, help="a folder that has them already")
    parser.add_argument(
        "--downloads", type=pathlib.Path, help="the folder for packages and repositories (default: OUTPUT.downloads)"
    )
    options = parser.parse_args(argv)
    downloads = options.downloads or options.output.with_name(options.output.name + ".downloads")
    return command.run(lambda: gather(options.output, options.given, downloads))


def gather(output: pathlib.Path, given: pathlib.Path | None, downloads: pathlib.Path) -> int:
    """Fill `output`; returns the exit code."""
    if given is not None and not given.is_dir():
        raise InputError(f"--from {given}: no such folder")
    photographs = [photograph for photograph in read_manifest() if not photograph.bundled]
    missing = [photograph for photograph in photographs if not _is_right(photograph, output / photograph.file)]
    print(f"{len(photographs) - len(missing)} of {len(photographs)} photographs are in {output} already", flush=True)
    faults = {}
    for source, group in itertools.groupby(missing, lambda photograph: photograph.source):
        wanted = list(group)
        faults |= {photograph.file: "not found there" for photograph in wanted}
        try:
            originals = _given(given, wanted) if given is not None else _fetched(source, wanted, downloads)
            for photograph, data in originals:
                faults[photograph.file] = _write(output / photograph.file, photograph, data)
        except InputError as error:
            faults |= {name: str(error) for name, fault in faults.items() if fault == "not found there"}
        done = [photograph for photograph in wanted if not faults[photograph.file]]
        print(f"{source}: {len(done)} of {len(wanted)}", flush=True)
    lines = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    return command.report_faults(lines, len(photographs), "photographs could not be had")


def _is_right(photograph: Photograph, path: pathlib.Path) -> bool:
    return path.is_file() and not photograph.fault(path.read_bytes())


def _write(path: pathlib.Path, photograph: Photograph, data: bytes) -> str:
    """Write a picture, scaled down if it is too large, if it is the manifest's; returns what is wrong with it."""
    fault = photograph.fault(data)
    if fault:
        try:
            data = scaled(data)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot be read ({error})"
        fault = photograph.fault(data)
    if not fault:
        write_bytes(path, data)
    return fault


def scaled(data: bytes) -> bytes:
    """A picture file as a JPEG of at most `LARGEST_SIDE` pixels a side, without profile or other metadata."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    largest = max(picture.size)
    if largest > LARGEST_SIDE:
        width, height = (round(side * LARGEST_SIDE / largest) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def _given(folder: pathlib.Path, wanted: Sequence[Photograph]) -> Originals:
    for photograph in wanted:
        path = folder / photograph.file
        if path.is_file():
            yield photograph, path.read_bytes()


def _fetched(source: str, wanted: Sequence[Photograph], downloads: pathlib.Path) -> Originals:
    """The originals of one source; InputError if it cannot be reached."""
    downloads.mkdir(parents=True, exist_ok=True)
    if source.startswith("Debian package "):
        return _of_package(*source.split()[2:], wanted, downloads)
    return _of_repository(*source.split(), wanted, downloads)


def _of_package(name: str, version: str, wanted: Sequence[Photograph], downloads: pathlib.Path) -> Originals:
    """Read the pictures of a Debian package, without unpacking the rest."""
    if any(photograph.there.endswith(".jxl") for photograph in wanted):
        _register_jxl()
    package = next(downloads.glob(f"{name}_*.deb"), None) or _download(name, version, downloads)
    by_name = {photograph.there: photograph for photograph in wanted}
    content = io.BytesIO(_run("dpkg-deb", "--fsys-tarfile", package.name, folder=downloads))
    with tarfile.open(fileobj=content) as files:
        for member in files:
            photograph = by_name.get(pathlib.PurePosixPath(member.name).name)
            file = files.extractfile(member) if photograph is not None and member.isfile() else None
            if photograph is not None and file is not None:
                yield photograph, file.read()


def _download(name: str, version: str, downloads: pathlib.Path) -> pathlib.Path:
    """Fetch a package, in the version that the manifest names or, where apt has that no more, the one it has."""
    with tempfile.TemporaryDirectory(dir=downloads) as unfinished:
        folder = pathlib.Path(unfinished)
        try:
            _run("apt-get", "download", f"{name}={version}", folder=folder)
        except InputError:
            _run("apt-get", "download", name, folder=folder)
        package = next(folder.glob(f"{name}_*.deb"))
        return package.rename(downloads / package.name)


def _of_repository(name: str, commit: str, wanted: Sequence[Photograph], downloads: pathlib.Path) -> Originals:
    """Read the pictures of a repository at a commit; git fetches these files only."""
    folder = downloads / name.replace("/", "_")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=downloads) as unfinished:
            clone = "clone", "--quiet", "--filter=blob:none", "--no-checkout"
            _run("git", *clone, REPOSITORIES + name, "it", folder=pathlib.Path(unfinished))
            (pathlib.Path(unfinished) / "it").rename(folder)
    paths = _run("git", "ls-tree", "-r", "-z", "--name-only", commit, folder=folder).decode().split("\0")
    for photograph in wanted:
        found = [path for path in paths if f"/{path}".endswith(f"/{photograph.there}")]
        if len(found) == 1:
            yield photograph, _run("git", "show", f"{commit}:{found[0]}", folder=folder)


def _register_jxl() -> None:
    try:
        import pillow_jxl  # noqa: F401 - Pillow opens .jxl from here on
    except ImportError:
        raise InputError("these are JPEG XL: pip install pillow-jxl-plugin") from None


def _run(*words: str, folder: pathlib.Path) -> bytes:
    """What a command prints; InputError if it fails or is not there. It is not to ask for anything."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise InputError(f"{words[0]} is not installed") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"{words[0]} {words[1]}: {said[-1]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
