"""A page to compare methods in, picture by picture: one HTML file that needs no network.

    Comparison, Measured  --write_gallery-->  FILE.html, or that and a folder of pictures beside it

What the page does is in `page/gallery.js`. Pictures are decoded and written anew as WebP, without loss unless a quality
is asked for; nothing that a file carries along, such as where it was taken, gets into the page, and no colour profile.
"""

import base64
import contextlib
import hashlib
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TextIO

from PIL import Image

from faithdiff_jax.config import Range, check_ranges
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.comparison import REFERENCE, Comparison, Group, Picture
from faithdiff_jax.evaluation.measured import Measured
from faithdiff_jax.files.reading import printable
from faithdiff_jax.files.sheets import at_most
from faithdiff_jax.files.writing import refuse_existing, replacing, whole

EMBED_LIMIT = 2**28
"""In bytes, 268 MB: the largest page that is written."""
THUMBNAIL = 168
"""In pixels of the larger side; twice what the page shows it at, for screens with small pixels."""
THUMBNAIL_QUALITY = 70


@dataclass(frozen=True, kw_only=True)
class GalleryOptions:
    """How the page is made.

    Attributes:
        title: heads the page.
        largest_side: of a picture on the page, in pixels; larger ones are reduced (Lanczos), and the page says so.
        quality: of WebP, 1 to 100; None keeps every pixel as it is.
        beside: the pictures go into a folder FILE_pictures beside the page.
    """

    title: str = "Comparison"
    largest_side: int = 1024
    quality: int | None = None
    beside: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, largest_side=Range(16, 8192, whole=True))
        if self.quality is not None:
            check_ranges(self, quality=Range(1, 100, whole=True))


def write_gallery(
    output: Path,
    comparison: Comparison,
    measured: Measured | None = None,
    options: GalleryOptions | None = None,
) -> list[str]:
    """Write the page, whole or not at all; what was there before is replaced.

    Args:
        output: the HTML file.
        comparison: of `comparison.compare`.
        measured: figures to show; those of `measured.measure`, or known from elsewhere.
        options: see there.

    Returns:
        A line for each picture that cannot be read; the page has a blank there, and these lines.

    Raises:
        InputError: no picture can be read, the page would be over `EMBED_LIMIT`, or cannot be written; with `beside`,
            the folder is there already.
    """
    options = options or GalleryOptions()
    check_output(output, options.beside)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(output))
        folder = None
        if options.beside:
            folder = stack.enter_context(whole(_folder(output), 0))  # in its place before the page is
            folder.mkdir()
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            return _Writer(file, options, folder, _folder(output).name).write(comparison, measured or Measured())


def check_output(output: Path, beside: bool) -> None:
    """See that a page can be called so, before anything is read.

    Raises:
        InputError: another suffix than .html, or the folder of pictures is there already.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: must end in .html")
    if output.is_dir():
        raise InputError(f"{output}: is a folder, name a file")
    if beside:
        refuse_existing(_folder(output))


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}_pictures")


class _Writer:
    """Writes a page from its beginning to its end, the pictures of one name at a time."""

    def __init__(self, file: TextIO, options: GalleryOptions, folder: Path | None, folder_name: str):
        self.file = file
        self.options = options
        self.folder = folder
        self.folder_name = folder_name
        self.length = 0

    def write(self, comparison: Comparison, measured: Measured) -> list[str]:
        """The whole page; returns the faults."""
        left, right = map(comparison.columns.index, comparison.opposites())
        pictures: list[dict[str, object]] = []
        notes, faults = comparison.missing, []
        before, after = self._template()
        self._put(before)
        for group in comparison.groups():
            faults += group.faults
            notes += [f"{group.name}: {note}" for note in group.notes]
            if group.pictures:
                entry = self._picture(len(pictures), comparison.columns, group)
                entry["figures"] = [
                    [_number(value) for value in measured.of(column, group.name)] for column in comparison.columns
                ]
                pictures.append(entry)
        if not pictures:
            raise InputError(f"no picture can be shown; the first: {faults[0]}")
        page = {
            "methods": [printable(column) for column in comparison.columns],
            "metrics": [
                {"title": info.title, "digits": info.digits, "better": info.better, "note": info.note}
                for info in measured.infos
            ],
            "pictures": pictures,
            "left": left,
            "right": right,
            "notes": [printable(note) for note in (*notes, *measured.notes, *faults)],
        }
        self._put(after.replace("[[page]]", _json(page)))
        return faults

    def _template(self) -> tuple[str, str]:
        """The page up to its pictures, and from there on, where `[[page]]` is still to be filled in."""
        folder = resources.files("faithdiff_jax.evaluation") / "page"
        page, style, script = ((folder / f"gallery.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
        # The browser then runs this script only and loads nothing from anywhere, whatever a name might contain.
        source = "'self' file: data:" if self.options.beside else "data:"
        policy = f"default-src 'none'; img-src {source}; script-src {_hash(script)}; style-src {_hash(style)}"
        before, after = page.split("[[pictures]]")
        title = html.escape(printable(self.options.title))
        before = before.replace("[[policy]]", policy).replace("[[style]]", style).replace("[[title]]", title)
        return before, after.replace("[[script]]", script)

    def _picture(self, index: int, columns: Sequence[str], group: Group) -> dict[str, object]:
        """Write the pictures of one name; returns what the page's data say of it."""
        sources: list[dict[str, object] | None] = []
        for number, column in enumerate(columns):
            if column not in group.pictures:
                sources.append(None)
                continue
            small = at_most(group.pictures[column], self.options.largest_side)
            data = _webp(small, self.options.quality)
            sources.append({"src": self._source(f"{index:05d}_{number:02d}.webp", data), "width": small.shape[1]})
        self._put(f'<script type="application/json" id="p{index}">{_json(sources)}</script>\n')
        height, width = group.size
        reduction = min(1.0, self.options.largest_side / max(group.size))
        size = f"{width} x {height}"
        if reduction < 1:
            size += f", shown reduced to {max(1, round(width * reduction))} x {max(1, round(height * reduction))}"
        first = group.pictures.get(REFERENCE, next(reversed(group.pictures.values())))
        thumb = _data_uri(_webp(at_most(first, THUMBNAIL), THUMBNAIL_QUALITY))
        return {
            "name": printable(group.name),
            "width": width * reduction,
            "height": height * reduction,
            "size": size,
            "thumb": thumb,
        }

    def _source(self, name: str, data: bytes) -> str:
        if self.folder is None:
            return _data_uri(data)
        (self.folder / name).write_bytes(data)
        return f"{self.folder_name}/{name}"

    def _put(self, text: str) -> None:
        self.length += len(text)
        if self.length > EMBED_LIMIT:
            raise InputError(
                f"the page would be larger than {EMBED_LIMIT // 10**6} MB: put the pictures into a folder beside it, "
                "or reduce their size or quality"
            )
        self.file.write(text)


def _webp(picture: Picture, quality: int | None) -> bytes:
    data = io.BytesIO()
    if quality is None:
        # The least effort: a tenth larger than the most, and ten times as fast.
        Image.fromarray(picture).save(data, format="WEBP", lossless=True, method=0, quality=0)
    else:
        Image.fromarray(picture).save(data, format="WEBP", quality=quality)
    return data.getvalue()


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"


def _json(value: object) -> str:
    """JSON that nothing in it can end the script element of."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _number(value: float | None) -> float | str | None:
    """A figure as JSON has it: infinity as text, none for NaN."""
    if value is None or math.isnan(value):
        return None
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
