"""A folder of photographs or pairs packed into ArrayRecord shards, for many hosts and slow or remote disks.

Files go in as they are. An interrupted run is continued by the same call, and gives the same bytes as one that was not.
"""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from faithdiff_jax.data.decode import header_size
from faithdiff_jax.data.shards import MANIFEST, WRITER_OPTIONS, Manifest, Shard, digest, pack
from faithdiff_jax.data.sources import Record, Source, check_pair_size
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import printable
from faithdiff_jax.files.writing import replacing

LARGEST_SHARD = 1 << 30  # records


def make_shards(source: Source, kind: str, output: Path, records_per_shard: int = 1000) -> Manifest:
    """Write the shards of a source that are not there yet, and return the manifest of them all.

    Each shard takes `records_per_shard` records of the source, fewer where some are left out: those whose pictures
    have no readable header, or are not 1:4. A shard gets its name when it is complete.

    Raises:
        InputError: `output` holds shards of other inputs, or cannot be written.
    """
    if not 1 <= records_per_shard <= LARGEST_SHARD:
        raise InputError(f"records per shard {records_per_shard}: must be from 1 to {LARGEST_SHARD:,}")
    names = digest(os.path.relpath(source.name(index), source.folder) for index in range(len(source)))
    fresh = Manifest(kind, len(source), records_per_shard, names, fingerprint=source.fingerprint())
    manifest = _begun(output, fresh)
    first = len(manifest.shards) * records_per_shard
    with tqdm(total=len(source), initial=min(first, len(source)), unit="records", disable=None) as progress:
        for start in range(first, len(source), records_per_shard):
            indices = range(start, min(start + records_per_shard, len(source)))
            manifest = _add_shard(source, indices, output, manifest, progress)
    return manifest


def _begun(output: Path, fresh: Manifest) -> Manifest:
    """Give the manifest to continue: the one of an earlier run on the same inputs, or the fresh one."""
    if not os.path.lexists(output / MANIFEST):
        return fresh
    earlier = Manifest.load(output)
    expected = replace(fresh, fingerprint=fresh.fingerprint if earlier.fingerprint else "")
    if replace(earlier, shards=(), left_out=()) != expected:
        raise InputError(f"{output}: holds shards of other inputs or of another size, name an empty folder")
    return earlier


def _add_shard(source: Source, indices: range, output: Path, manifest: Manifest, progress: "tqdm[Any]") -> Manifest:
    """Write one shard, then note it in the manifest."""
    target = output / f"shard-{len(manifest.shards):05}-of-{manifest.shard_count:05}.arrayrecord"
    records = captions = 0
    left_out = []
    # The name comes before the entry: a run stopped in between writes this shard once more, to the same bytes.
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
    shard = Shard(target.name, records, captions, target.stat().st_size)
    manifest = replace(manifest, shards=(*manifest.shards, shard), left_out=(*manifest.left_out, *left_out))
    manifest.save(output)
    return manifest


def _checked(record: Record) -> Record:
    hq_size = header_size(io.BytesIO(record.hq), record.name)
    for lq in record.lq:
        check_pair_size(hq_size, header_size(io.BytesIO(lq), record.name), record.name)
    return record
