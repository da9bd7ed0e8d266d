"""Small files read within limits: what they hold is as promised here, or refused in one line that names the file."""

import json
import math
import os
import pathlib
import re
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Any

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import file_size, is_remote, place, reached, require_reachable

TEXT_LIMIT = 1 << 24  # bytes; parsed JSON may take thirty times as many
DEPTH_LIMIT = 64  # of lists and objects in one another; a published configuration has five
DIGIT_LIMIT = 308  # of a whole number, so that each is also a finite float

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def require_file(path: str | os.PathLike[str], kind: str = "file") -> int:
    """Return the size in bytes of a regular file, or of the one a link leads to; `kind` says what it should have been.

    Raises:
        InputError: there is nothing, a folder, a named pipe, a socket or a device, or the path cannot be looked up.
    """
    if is_remote(path):
        return _remote_size(place(path), kind)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{os.fspath(path)!r}: cannot be the name of a file") from None
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a folder, name a {kind}")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    return status.st_size


def read_bytes(path: str | os.PathLike[str], limit: int, kind: str = "file") -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        InputError: as `require_file`, for a file that is larger, and for one that cannot be read.
    """
    require_file(path, kind)
    try:
        with reached(path), place(path).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise InputError(f"{path}: too large for a {kind}, at most {limit:,} bytes are read")
    return data


def _remote_size(path: pathlib.Path, kind: str) -> int:
    with reached(path):
        if path.is_dir():
            raise InputError(f"{path}: is a folder, name a {kind}")
        if not path.is_file():
            require_reachable(path)
            raise InputError(f"{path}: no such file")
        return file_size(path)


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT, kind: str = "text file") -> str:
    """Read a regular file of UTF-8 text, of at most `limit` bytes; a byte order mark in front is dropped.

    Raises:
        InputError: as `read_bytes`, and for a file that is not UTF-8.
    """
    try:
        return read_bytes(path, limit, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the {kind} is not UTF-8 (byte {error.start})") from None


def read_json(path: str | os.PathLike[str], limit: int = TEXT_LIMIT, *, finite: bool = True) -> Any:
    """Read a JSON file of at most `limit` bytes as `parse_json` does.

    Raises:
        InputError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit, "JSON file"), path, finite=finite)


def parse_json(text: str | bytes, name: object, *, finite: bool = True) -> Any:
    """Parse JSON text, of a file called `name` in messages.

    What comes out is nested at most `DEPTH_LIMIT` deep; its whole numbers have at most `DIGIT_LIMIT` digits and its
    other numbers are finite; its strings are valid Unicode, and no key occurs twice in an object. Unless `finite`, the
    words NaN, Infinity and -Infinity, which are not JSON but which Python writes, are taken for floats.

    Raises:
        InputError: anything else.
    """
    constant = _not_finite if finite else float
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_int=_whole_number,
            parse_float=_finite_number,
            parse_constant=constant,
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON (line {error.lineno}: {error.msg})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not JSON (byte {error.start} is not UTF-8)") from None
    except RecursionError:
        raise _too_deep(name) from None
    except ValueError as error:
        raise InputError(f"{name}: not JSON that can be used ({error})") from None
    depth = 1
    level: list[Any] = [value]
    while level := [item for node in level for item in _items(node)]:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise _too_deep(name)
    # Only an escape can put half of a surrogate pair into a text, so strings are looked at where there is one.
    if _ESCAPED_SURROGATE.search(text):
        for string in _strings(value):
            if not is_unicode(string):
                raise InputError(f"{name}: holds {string[:40]!r}, which is not valid Unicode (an unpaired surrogate)")
    return value


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: not so for halves of surrogate pairs, as in file names that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(text: object) -> str:
    """A text as one line that any UTF-8 output takes: control characters and unpaired surrogates are spelled out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(text)
    )


def _too_deep(name: object) -> InputError:
    return InputError(f"{name}: nested too deep, at most {DEPTH_LIMIT} lists and objects in one another are read")


def _items(node: Any) -> list[Any]:
    """The lists and objects in a list or object."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [child for child in children if isinstance(child, (dict, list))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {double[:80]!r} occurs twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGIT_LIMIT:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite_number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is beyond the range of floats")
    return value


def _not_finite(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")
