"""The photographs of the small model: photographs.tsv, what is checked of each file, and the page that names them all.

    python examples/tiny/photographs.py --output docs/photographs.md

Each line of the manifest is a picture: its file, where it is from and under what name, author, licence, `split`,
SHA-256, mean colours and caption. `train` is trained on; settings are chosen on `validation`; `test` is reported on,
neither trained on nor chosen by; `example` is what examples/ restores, neither trained on nor chosen by either.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import pathlib
import sys

import numpy as np
from PIL import Image

from faithdiff_jax.cli import command
from faithdiff_jax.files.writing import write_text

MANIFEST = pathlib.Path(__file__).parent / "photographs.tsv"
SPLITS = ("train", "validation", "test", "example")
BUNDLED = "scikit-image"
GRID = 4
TOLERANCE = 2
"""Of 255, between the mean colours of a file and those in the manifest: what decoders and libraries differ by."""


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A line of the manifest.

    Attributes:
        file: its name here.
        source: "Debian package NAME VERSION", "github.com/OWNER/NAME COMMIT" or "scikit-image VERSION".
        there: its name there, or the end of its path.
        author: who took it.
        licence: under which it may be used.
        split: one of `SPLITS`.
        sha256: of the file, in hexadecimal.
        width: in pixels.
        height: in pixels.
        means: mean RGB of the cells of a grid of `GRID` x `GRID`, row by row, two hexadecimal digits each.
        caption: what is seen on it.
    """

    file: str
    source: str
    there: str
    author: str
    licence: str
    split: str
    sha256: str
    width: int
    height: int
    means: str
    caption: str

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.rpartition(".")[0]

    @property
    def bundled(self) -> bool:
        """Whether scikit-image's installation has it: then nothing need be gathered."""
        return self.source.startswith(BUNDLED)

    def fault(self, data: bytes) -> str:
        """What is wrong with a file's content, "" if nothing: other bytes may still be the same picture."""
        if hashlib.sha256(data).hexdigest() == self.sha256:
            return ""
        try:
            with Image.open(io.BytesIO(data)) as picture:
                size, means = picture.size, mean_colours(picture.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot be read ({error})"
        if size != (self.width, self.height):
            return f"is {size[0]}x{size[1]} pixels, the manifest has {self.width}x{self.height}"
        expected = np.frombuffer(bytes.fromhex(self.means), np.uint8)
        difference = np.abs(means.astype(int) - expected).max()
        if difference > TOLERANCE:
            return f"is another picture: its mean colours differ by {difference} of 255, not by {TOLERANCE} at most"
        return ""


def mean_colours(picture: Image.Image) -> np.ndarray:
    """(GRID * GRID * 3,) uint8: the mean RGB of each cell."""
    return np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX)).ravel()


def read_manifest() -> list[Photograph]:
    """All photographs, as they stand in the manifest."""
    with MANIFEST.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [Photograph(**{**row, "width": int(row["width"]), "height": int(row["height"])}) for row in rows]


PAGE = """# Photographs

<!-- Written by examples/tiny/photographs.py from examples/tiny/photographs.tsv. -->

The photographs that the small model is trained, chosen and judged by, with their authors and licences. All were scaled
to at most 2,048 pixels a side; those of scikit-image are as it bundles them. `examples/tiny/gather_photographs.py`
gathers them again from where the list says.

- **train**: trained on.
- **validation**: not trained on; settings are chosen by them.
- **test**: not trained on, nothing is chosen by them; figures are reported of them.
- **example**: the pictures in `examples/`, treated as test pictures are.
"""


def page() -> str:
    """The page of attributions, Markdown."""
    photographs = read_manifest()
    lines = [PAGE]
    for split in SPLITS:
        chosen = [photograph for photograph in photographs if photograph.split == split]
        lines.append(f"## {split.capitalize()}: {len(chosen)}\n")
        lines += ["| picture | author | licence | from |", "|---|---|---|---|"]
        lines += [f"| {p.name} | {p.author} | {p.licence} | {p.source}: `{p.there}` |" for p in chosen]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the page to write")
    return command.run(lambda: write_text(parser.parse_args(argv).output, page()))


if __name__ == "__main__":
    sys.exit(main())
