"""A folder of photographs or pairs packed into ArrayRecord shards, for many hosts and slow or remote disks.

Files go in as they are. An interrupted run is continued by the same call, and gives the same bytes as one that was not.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from faithdiff_jax.data.decode import header_size
from faithdiff_jax.data.shards import MANIFEST, NOTES, WRITER_OPTIONS, Manifest, Shard, digest, pack, shard_name
from faithdiff_jax.data.sources import Record, Source, check_pair_size
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import file_size, require_reachable
from faithdiff_jax.files.reading import printable
from faithdiff_jax.files.writing import replacing

LARGEST_SHARD = 1 << 30  # records


def make_shards(
    source: Source, kind: str, output: Path, records_per_shard: int = 1000, *, process: int = 0, processes: int = 1
) -> Manifest:
    """Write the shards of a source that are not there yet, and return the manifest of all that are there then.

    Each shard takes `records_per_shard` records of the source, fewer where some are left out: those whose pictures
    have no readable header, or are not 1:4. A shard gets its name when it is complete, and then a manifest of its own.
    Of `processes` that share the work, on one machine or many, each writes every `processes`-th shard from `process`
    on; whichever finds all shards there at its end writes the manifest of them all. How many processes there are may
    change from one run to the next.

    Raises:
        InputError: `output` holds shards of other inputs, or cannot be written.
    """
    if not 1 <= records_per_shard <= LARGEST_SHARD:
        raise InputError(f"records per shard {records_per_shard}: must be from 1 to {LARGEST_SHARD:,}")
    require_reachable(output)
    names = digest(os.path.relpath(source.name(index), source.folder) for index in range(len(source)))
    fresh = Manifest(kind, len(source), records_per_shard, names, fingerprint=source.fingerprint())
    # Of all shards, or by an earlier version of the first few: these have none of their own.
    whole = _earlier(output, MANIFEST, fresh) or fresh
    if whole.is_complete:
        return whole
    first, done = len(whole.shards), _noted(output, fresh)
    wanted = [n for n in range(process, fresh.shard_count, processes) if n >= first and n not in done]
    _write(source, output, fresh, wanted)
    notes = [note for number, note in sorted(_noted(output, fresh).items()) if number >= first]
    shards = (*whole.shards, *(shard for note in notes for shard in note.shards))
    left_out = (*whole.left_out, *(line for note in notes for line in note.left_out))
    whole = replace(whole, shards=shards, left_out=left_out)
    if whole.is_complete:
        whole.save(output)  # by two processes, if they end at once: it is the same
    return whole


def _noted(output: Path, fresh: Manifest) -> dict[int, Manifest]:
    """Shard number -> its own manifest, of all that are there."""
    notes = {}
    for path in output.glob(NOTES):
        note = _earlier(output, path.name, fresh)
        number = int(path.name.split("-")[1])
        if note is None or not note.shards or path.name != shard_name(number, fresh.shard_count, ".json"):
            raise InputError(f"{path}: not the manifest of one of {fresh.shard_count} shards, name an empty folder")
        notes[number] = note
    return notes


def _earlier(output: Path, name: str, fresh: Manifest) -> Manifest | None:
    """Give a manifest that an earlier run on the same inputs left, or another process."""
    if not (output / name).exists():
        return None
    earlier = Manifest.load(output, name)
    expected = replace(fresh, fingerprint=fresh.fingerprint if earlier.fingerprint else "")
    if replace(earlier, shards=(), left_out=()) != expected:
        raise InputError(f"{output}: holds shards of other inputs or of another size, name an empty folder")
    return earlier


def _write(source: Source, output: Path, fresh: Manifest, numbers: Sequence[int]) -> None:
    size = fresh.inputs_per_shard
    ranges = [range(number * size, min((number + 1) * size, len(source))) for number in numbers]
    with tqdm(total=sum(map(len, ranges)), unit="records", disable=None) as progress:
        for number, indices in zip(numbers, ranges, strict=True):
            _write_shard(source, indices, output, number, fresh, progress)


def _write_shard(
    source: Source, indices: range, output: Path, number: int, fresh: Manifest, progress: "tqdm[Any]"
) -> None:
    """Write one shard, then its own manifest."""
    target = output / shard_name(number, fresh.shard_count)
    records = captions = 0
    left_out = []
    # The name comes before the manifest: a run stopped in between writes this shard once more, to the same bytes.
    with replacing(target) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            for index in indices:
                try:
                    record = _checked(source[index])
                except InputError as error:
                    left_out.append(printable(error))
                else:
                    # Relative, so that the bytes do not depend on where the folder lies.
                    writer.write(pack(replace(record, name=os.path.relpath(record.name, source.folder))))
                    records += 1
                    captions += bool(record.caption)
                progress.update()
        finally:
            writer.close()
    shard = Shard(target.name, records, captions, file_size(target))
    note = replace(fresh, shards=(shard,), left_out=tuple(left_out))
    note.save(output, shard_name(number, fresh.shard_count, ".json"))


def _checked(record: Record) -> Record:
    hq_size = header_size(io.BytesIO(record.hq), record.name)
    for lq in record.lq:
        check_pair_size(hq_size, header_size(io.BytesIO(lq), record.name), record.name)
    return record
