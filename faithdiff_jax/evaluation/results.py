"""A folder of results: what was measured of every picture, kept from run to run.

    RESULT/settings.json    the protocol, and what each method restores with: what figures may stand beside one another
    RESULT/METHOD.csv       a row per picture: SHA-256 of its files, seconds, a column per metric, notes
    RESULT/restored/        pictures that were restored here, METHOD/SET/PICTURE.png
    RESULT/summary.json, table.md, table.tex    written anew at the end of each run (see `tables`)

A figure is kept as long as the files it was computed from hold the same bytes. Empty cells are tried again.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faithdiff_jax.config import from_dict, shown, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.protocols import Protocol
from faithdiff_jax.evaluation.resources import Peak
from faithdiff_jax.files.reading import is_unicode, read_json, read_text
from faithdiff_jax.files.writing import write_text

SETTINGS = "settings.json"
FORMAT = 1
FIXED = ("set", "picture", "input", "restored", "reference", "seconds")
NOTES = "notes"
TAKEN = ("summary", "settings", "table", "restored", "gallery")
CSV_LIMIT = 1 << 26  # bytes; a row has about 200
WHOLE_SET = "*"
"""In place of a picture's name: figures of all pictures together."""
DIGEST = 32  # hexadecimal digits of SHA-256 that are kept
_NAME = re.compile(r"[^\W_][\w .,+()@-]{0,59}")

Key = tuple[str, str]
"""Set, picture."""


@dataclass
class Row:
    """What is known of one picture: digests of its files ("" for none), seconds it took, figures, notes."""

    input: str = ""
    restored: str = ""
    reference: str = ""
    seconds: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    notes: str = ""


def check_name(name: str, what: str) -> str:
    """The name of a method or set, which becomes that of a file.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name) or name.endswith((".", " ")) or name.casefold() in TAKEN:
        raise InputError(
            f"{what} {shown(name)}: must be 1 to 60 letters, digits, blanks or . , + - ( ) @ _, none of "
            f"{', '.join(TAKEN)}"
        )
    return name


def digest(path: Path, *more: str) -> str:
    """SHA-256 of a file's bytes and of texts that belong to it, shortened.

    Raises:
        InputError: it cannot be read.
    """
    state = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for text in more:
        state.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:DIGEST]


class Results:
    """A folder of results, opened for one protocol."""

    def __init__(self, folder: Path, protocol: Protocol):
        """Open the folder, or begin one; nothing is written before the first figure.

        Raises:
            InputError: the folder holds something else, results of another protocol, or a damaged file.
        """
        self.folder = folder
        self.protocol = protocol
        self.settings: dict[str, dict[str, Any]] = {}
        self.peaks: dict[str, Peak] = {}
        path = folder / SETTINGS
        if os.path.lexists(path):
            self._read_settings(path)
        elif os.path.isdir(folder) and os.listdir(folder):
            raise InputError(f"{folder}: holds other files than results, name a new or empty folder")
        self._rows: dict[str, dict[Key, Row]] = {}

    @property
    def methods(self) -> list[str]:
        """Methods that there are results of, in the order in which they came."""
        return list(self.settings)

    def add(self, method: str, settings: Mapping[str, Any]) -> None:
        """Say that a method is measured, and with what settings its pictures are restored.

        Raises:
            InputError: its results here come from other settings, or its name is nearly another's.
        """
        check_name(method, "method")
        plain = json.loads(json.dumps(settings))
        known = self.settings.get(method)
        if known is not None and known != plain:
            what = ", ".join(
                f"{key} {shown(known.get(key))}, now {shown(plain.get(key))}"
                for key in sorted({*known, *plain})
                if known.get(key) != plain.get(key)
            )
            raise InputError(f"{self.folder}: {method} was measured with {what}; give it another name or --output")
        for other in self.settings:
            if other != method and other.casefold() == method.casefold():
                raise InputError(f"method {method}: {other} is there already, choose another name")
        if known is None:
            self.settings[method] = plain

    def rows(self, method: str) -> dict[Key, Row]:
        """What was measured of a method; changes count once `save` has written them.

        Raises:
            InputError: the method's file is damaged.
        """
        if method not in self._rows:
            path = self.folder / f"{method}.csv"
            self._rows[method] = read_rows(path) if os.path.lexists(path) else {}
        return self._rows[method]

    def save(self, method: str) -> None:
        """Write a method's rows, whole or not at all."""
        self._write_settings()
        write_text(self.folder / f"{method}.csv", _to_csv(self.rows(method)))

    def restored_path(self, method: str, set_name: str, picture: str) -> Path:
        """Where a picture that is restored here is kept."""
        return self.folder / "restored" / method / set_name / f"{picture}.png"

    def write(self, name: str, text: str) -> None:
        """Write one of the files that are made anew at the end of a run."""
        write_text(self.folder / name, text)

    def _read_settings(self, path: Path) -> None:
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise InputError(f"{path}: not the settings of results, name a new folder")
        protocol, methods, peaks = (stored.get(key) for key in ("protocol", "methods", "peaks"))
        if not (isinstance(protocol, dict) and isinstance(methods, dict) and isinstance(peaks, dict)):
            raise InputError(f"{path}: damaged, name a new folder")
        ours = _definition(to_dict(self.protocol))
        theirs = _definition(protocol)
        if ours != theirs:
            keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            what = ", ".join(f"{key} {shown(theirs.get(key))}, not {shown(ours.get(key))}" for key in keys)
            raise InputError(f"{self.folder}: holds results of another protocol ({what}); name another folder")
        for method, settings in methods.items():
            if not isinstance(settings, dict):
                raise InputError(f"{path}: damaged at {shown(method)}, name a new folder")
            self.settings[check_name(method, "method")] = settings
        for method, peak in peaks.items():
            self.peaks[method] = from_dict(Peak, peak, f"{path}: peaks.{method}")

    def _write_settings(self) -> None:
        peaks = {method: to_dict(peak) for method, peak in self.peaks.items()}
        content = {"format": FORMAT, "protocol": to_dict(self.protocol), "methods": self.settings, "peaks": peaks}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path = self.folder / SETTINGS
        if not os.path.exists(path) or read_text(path) != text:
            write_text(path, text)


def _definition(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What figures depend on: which metrics a table has does not change them."""
    return {key: value for key, value in protocol.items() if key != "metrics"}


def _to_csv(rows: Mapping[Key, Row]) -> str:
    metrics = list(dict.fromkeys(name for row in rows.values() for name in row.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIXED, *metrics, NOTES])
    for (set_name, picture), row in sorted(rows.items()):
        figures = [repr(row.figures[name]) if name in row.figures else "" for name in metrics]
        seconds = "" if row.seconds is None else f"{row.seconds:.4f}"
        writer.writerow([set_name, picture, row.input, row.restored, row.reference, seconds, *figures, row.notes])
    return text.getvalue()


def read_rows(path: Path) -> dict[Key, Row]:
    """Read a method's file.

    Raises:
        InputError: it is damaged.
    """
    text = read_text(path, CSV_LIMIT, "file of results")
    rows: dict[Key, Row] = {}
    number = 0
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        number, header = 1, next(lines, [])
        metrics = header[len(FIXED) : -1]
        if header != [*FIXED, *metrics, NOTES] or len(set(metrics)) != len(metrics):
            raise ValueError("another header")
        for line in lines:
            number += 1
            if len(line) != len(header):
                raise ValueError(f"{len(line)} cells, not {len(header)}")
            set_name, picture, source, restored, reference, seconds = line[: len(FIXED)]
            if (set_name, picture) in rows:
                raise ValueError(f"{shown(picture)} again")
            cells = dict(zip(metrics, line[len(FIXED) : -1], strict=True))
            figures = {name: _finite(cell) for name, cell in cells.items() if cell}
            took = _finite(seconds) if seconds else None
            rows[set_name, picture] = Row(source, restored, reference, took, figures, line[-1])
    except (csv.Error, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path}: damaged at line {number} ({text}); delete it to measure again") from None
    return rows


def _finite(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(f"{shown(cell)} is not a number")
    return value


def check_picture_name(name: str) -> str:
    """A picture's name as results can hold it.

    Raises:
        InputError: it is not Unicode, or kept for something else.
    """
    if name == WHOLE_SET:
        raise InputError(f"{name}: a picture cannot be called so, rename the file")
    if not is_unicode(name):
        raise InputError(f"{name!r}: the name is not Unicode text, rename the file")
    return name
