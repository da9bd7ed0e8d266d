"""Records in ArrayRecord shards: their bytes, the manifest beside them, and the source that reads them.

A shard holds records one by one, for random access, and as they are: pictures are compressed already. The manifest
`shards.json` says what there is, so that a missing or short shard is found at the start and not a day later. Until all
shards are there, each that is has a manifest of its own beside it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from array_record.python.array_record_data_source import ArrayRecordDataSource

from faithdiff_jax.config import from_dict
from faithdiff_jax.data.sources import Record, fingerprint
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import place, require_reachable
from faithdiff_jax.files.reading import read_json, require_file
from faithdiff_jax.files.writing import write_text

MANIFEST = "shards.json"
NOTES = "shard-[0-9]*-of-[0-9]*[0-9].json"
WRITER_OPTIONS = "group_size:1,uncompressed"
FORMAT = "faithdiff-jax shards, version 1"
KINDS = ("photos", "pairs")
LARGEST_MANIFEST = 1 << 28  # bytes; a shard takes about a hundred
_MOST = 1 << 62
_HEADER_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Shard:
    """One finished shard: its file's name, its records, how many of them have a caption, and the file's bytes."""

    file: str
    records: int
    captions: int
    bytes: int

    def __post_init__(self) -> None:
        if not self.file or self.file in (".", "..") or set("/\\\0") & {*self.file}:
            raise ValueError(f"file {self.file!r}: must be the name of a file beside the manifest")
        if not 0 <= self.captions <= self.records <= self.bytes <= _MOST:
            counts = f"{self.captions} captions, {self.records} records, {self.bytes} bytes"
            raise ValueError(f"{self.file}: {counts}: must be counts, each at least the one before")


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and of how many inputs; `left_out` says which were unusable and why.

    `kind` is "photos" or "pairs"; `names` a digest of the inputs' names, by which an interrupted run knows its own.
    """

    kind: str
    inputs: int
    inputs_per_shard: int
    names: str
    shards: tuple[Shard, ...] = ()
    left_out: tuple[str, ...] = ()
    format: str = FORMAT
    fingerprint: str = ""
    """That of the inputs when the first shard was begun; "" in manifests from before it was kept."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: must be one of {', '.join(KINDS)}")
        for name in ("inputs", "inputs_per_shard"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if len(self.shards) > self.shard_count:
            raise ValueError(f"{len(self.shards)} shards: {self.inputs} inputs fill {self.shard_count}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("shards: two have the same file")

    @property
    def shard_count(self) -> int:
        """How many shards there are once all are written."""
        return -(-self.inputs // self.inputs_per_shard)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are written."""
        return len(self.shards) == self.shard_count

    def save(self, folder: Path, name: str = MANIFEST) -> None:
        """Write the manifest into the folder, whole or not at all."""
        write_text(folder / name, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path, name: str = MANIFEST) -> "Manifest":
        """Read a folder's manifest.

        Raises:
            InputError: it is missing, cannot be read, is of another format, or holds other types or values.
        """
        path = folder / name
        if not path.exists():
            written = [note.stem for note in folder.glob(NOTES)]
            if not written:
                raise InputError(f"{folder}: no {name} there, so not a folder of shards")
            _refuse_unfinished(folder, len(written), int(written[0].rpartition("-")[2]))
        content = read_json(path, LARGEST_MANIFEST)
        if not isinstance(content, dict) or "format" not in content:
            raise InputError(f"{path}: not a manifest of shards")
        if content["format"] != FORMAT:
            raise InputError(f"{path}: its format is {content['format']!r}, this program reads {FORMAT!r}")
        return from_dict(cls, content, str(path))


class ShardSource:
    """The records of a folder that `make_shards` wrote.

    Raises:
        InputError: the folder is unfinished, or a shard missing or cut short.
    """

    def __init__(self, folder: Path | str):
        root = place(folder)
        require_reachable(root)
        manifest = Manifest.load(root)
        if not manifest.is_complete:  # as earlier versions left it
            _refuse_unfinished(folder, len(manifest.shards), manifest.shard_count)
        for shard in manifest.shards:
            _check_file(root / shard.file, shard.bytes)
        self.folder = os.fspath(folder)
        self._sizes = [(manifest.fingerprint, 0), (manifest.names, 0)]
        self._sizes += [(shard.file, shard.bytes) for shard in manifest.shards]
        instructions = [_WholeFile(str(root / shard.file), shard.records) for shard in manifest.shards if shard.records]
        if not instructions:
            raise InputError(f"{folder}: its shards hold no records, all inputs were left out")
        self._records = ArrayRecordDataSource(instructions)
        captions = sum(shard.captions for shard in manifest.shards)
        shards = f"{len(manifest.shards):,} shard{'s' * (len(manifest.shards) != 1)}"
        left_out = f", {len(manifest.left_out):,} left out when made" if manifest.left_out else ""
        self.summary = f"{folder}: {len(self):,} {manifest.kind} in {shards}, {captions:,} with a caption{left_out}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = unpack(self._records[index])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.name(index)}: the shard is damaged ({reason})") from error
        return replace(record, name=f"{self.name(index)} ({record.name})")

    def name(self, index: int) -> str:
        """Give the folder and the record's number; its own name would have to be read."""
        return f"{self.folder}, record {index}"

    def fingerprint(self) -> str:
        """A digest of the inputs' fingerprint and names, and of the shards' names and sizes."""
        return fingerprint(self._sizes)


def pack(record: Record) -> bytes:
    """Turn a record into bytes: the length of a JSON header, the header, then the encoded pictures one by one.

    A name that is not UTF-8 keeps its bytes.
    """
    sizes = [len(record.hq), *map(len, record.lq)]
    header = json.dumps({"name": record.name, "caption": record.caption, "sizes": sizes}, ensure_ascii=False)
    encoded = header.encode("utf-8", "surrogateescape")
    return b"".join((_HEADER_LENGTH.pack(len(encoded)), encoded, record.hq, *record.lq))


def unpack(data: bytes) -> Record:
    """Turn the bytes of `pack` into the record; raises ValueError for other bytes."""
    try:
        (length,) = _HEADER_LENGTH.unpack_from(data)
        place = _HEADER_LENGTH.size + length
        header = json.loads(data[_HEADER_LENGTH.size : place].decode("utf-8", "surrogateescape"))
        name, caption, sizes = header["name"], header["caption"], header["sizes"]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError("a name or caption that is not text")
        pictures = []
        for size in sizes:
            if size < 0:
                raise ValueError(f"a picture of {size} bytes")
            pictures.append(data[place : place + size])
            place += size
        if place != len(data):
            raise ValueError(f"{len(data)} bytes, its header counts {place}")
        return Record(name=name, hq=pictures[0], lq=tuple(pictures[1:]), caption=caption)
    except (struct.error, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError("not a record") from error


def shard_name(number: int, count: int, suffix: str = ".arrayrecord") -> str:
    """Give the file name of a shard, numbered from 0, or with ".json" that of its own manifest."""
    return f"shard-{number:05}-of-{count:05}{suffix}"


def digest(names: Iterable[str]) -> str:
    """Give a short text that changes with any name or their order."""
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:32]


@dataclass(frozen=True)
class _WholeFile:
    """What the reader asks for beside a file's name, so that it need not open all shards to count their records."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


def _refuse_unfinished(folder: Path | str, done: int, count: int) -> NoReturn:
    what = f"only {done} of {count} shards are written" if done < count else f"no {MANIFEST} there"
    raise InputError(f"{folder}: {what}, run `faithdiff shards` again to finish it")


def _check_file(path: Path, size: int) -> None:
    actual = require_file(path, "shard")
    if actual != size:
        raise InputError(f"{path}: {actual:,} bytes, {size:,} were written; the shard is cut short or replaced")
