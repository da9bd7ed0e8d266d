"""Records in ArrayRecord shards: their bytes, the manifest beside them, and the source that reads them.

A shard holds records one by one, for random access, and as they are: pictures are compressed already. The manifest
`shards.json` says what there is, so that a missing or short shard is found at the start and not a day later.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource

from faithdiff_jax.data.sources import Record
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import write_text

MANIFEST = "shards.json"
WRITER_OPTIONS = "group_size:1,uncompressed"
_FORMAT = "faithdiff-jax shards, version 1"
_HEADER_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Shard:
    """One finished shard: its file's name, its records, how many of them have a caption, and the file's bytes."""

    file: str
    records: int
    captions: int
    bytes: int


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
    format: str = field(default=_FORMAT)

    @property
    def shard_count(self) -> int:
        """How many shards there are once all are written."""
        return -(-self.inputs // self.inputs_per_shard)

    def save(self, folder: Path) -> None:
        """Write the manifest into the folder, whole or not at all."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest; one that is missing, broken or of another format raises InputError."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            manifest = cls(**{**content, "shards": shards, "left_out": tuple(content["left_out"])})
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no {MANIFEST} there, so not a folder that make_shards wrote") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not a manifest that make_shards wrote") from error
        if manifest.format != _FORMAT:
            raise InputError(f"{path}: its format is {manifest.format!r}, this program reads {_FORMAT!r}")
        return manifest


class ShardSource:
    """The records of a folder that `make_shards` wrote.

    Raises InputError if the folder is unfinished, or a shard missing or cut short.
    """

    def __init__(self, folder: Path | str):
        root = Path(folder)
        manifest = Manifest.load(root)
        if len(manifest.shards) < manifest.shard_count:
            done = f"{len(manifest.shards)} of {manifest.shard_count} shards"
            raise InputError(f"{folder}: only {done} are written, run make_shards again to finish it")
        for shard in manifest.shards:
            _check_file(root / shard.file, shard.bytes)
        self.folder = os.fspath(folder)
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
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.name(index)}: the shard is damaged ({reason})") from error
        return replace(record, name=f"{self.name(index)} ({record.name})")

    def name(self, index: int) -> str:
        """Give the folder and the record's number; its own name would have to be read."""
        return f"{self.folder}, record {index}"


def pack(record: Record) -> bytes:
    """Turn a record into bytes: the length of a JSON header, the header, then the encoded pictures one by one."""
    sizes = [len(record.hq), *map(len, record.lq)]
    header = json.dumps({"name": record.name, "caption": record.caption, "sizes": sizes}, ensure_ascii=False)
    encoded = header.encode("utf-8")
    return b"".join((_HEADER_LENGTH.pack(len(encoded)), encoded, record.hq, *record.lq))


def unpack(data: bytes) -> Record:
    """Turn the bytes of `pack` into the record; raises ValueError for other bytes."""
    try:
        (length,) = _HEADER_LENGTH.unpack_from(data)
        place = _HEADER_LENGTH.size + length
        header = json.loads(data[_HEADER_LENGTH.size : place])
        pictures = []
        for size in header["sizes"]:
            pictures.append(data[place : place + size])
            place += size
        if place != len(data):
            raise ValueError(f"{len(data)} bytes, its header counts {place}")
        return Record(name=header["name"], hq=pictures[0], lq=tuple(pictures[1:]), caption=header["caption"])
    except (struct.error, KeyError, TypeError, IndexError) as error:
        raise ValueError("not a record") from error


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


def _check_file(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: the shard is missing or cannot be read ({error.strerror})") from error
    if actual != size:
        raise InputError(f"{path}: {actual:,} bytes, {size:,} were written; the shard is cut short or replaced")
