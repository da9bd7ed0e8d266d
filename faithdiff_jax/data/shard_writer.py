"""A folder of photographs or pairs packed into ArrayRecord shards, for many hosts and slow or remote disks.

Files go in as they are. An interrupted run is continued by the same call, and gives the same bytes as one that was not.
"""

import io
import os
from dataclasses import replace
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from faithdiff_jax.data.decode import header_size
from faithdiff_jax.data.shards import MANIFEST, WRITER_OPTIONS, Manifest, Shard, digest, pack
from faithdiff_jax.data.sources import Record, Source, check_pair_size
from faithdiff_jax.errors import InputError


def make_shards(source: Source, kind: str, output: Path, records_per_shard: int = 1000) -> Manifest:
    """Write the shards of a source that are not there yet, and return the manifest of them all.

    Each shard takes `records_per_shard` records of the source, fewer where some are left out: those whose pictures
    have no readable header, or are not 1:4. A shard gets its name when it is complete. Raises InputError if `output`
    holds shards of other inputs, or cannot be written.
    """
    if records_per_shard < 1:
        raise InputError(f"records per shard {records_per_shard}: must be at least 1")
    names = digest(os.path.relpath(source.name(index), source.folder) for index in range(len(source)))
    try:
        output.mkdir(parents=True, exist_ok=True)
        manifest = _begun(output, Manifest(kind, len(source), records_per_shard, names))
        first = len(manifest.shards) * records_per_shard
        with tqdm(total=len(source), initial=min(first, len(source)), unit="records", disable=None) as progress:
            for start in range(first, len(source), records_per_shard):
                indices = range(start, min(start + records_per_shard, len(source)))
                manifest = _add_shard(source, indices, output, manifest, progress)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from error
    return manifest


def _begun(output: Path, fresh: Manifest) -> Manifest:
    """Give the manifest to continue: the one of an earlier run on the same inputs, or the fresh one."""
    if not (output / MANIFEST).exists():
        return fresh
    earlier = Manifest.load(output)
    if replace(earlier, shards=(), left_out=()) != fresh:
        raise InputError(f"{output}: holds shards of other inputs or of another size, name an empty folder")
    return earlier


def _add_shard(source: Source, indices: range, output: Path, manifest: Manifest, progress: tqdm) -> Manifest:
    """Write one shard under a temporary name, then name it and note it in the manifest."""
    target = output / f"shard-{len(manifest.shards):05}-of-{manifest.shard_count:05}.arrayrecord"
    temporary = output / f".{target.name}.partial"
    records = captions = 0
    left_out = []
    writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
    try:
        for index in indices:
            try:
                record = _checked(source[index])
            except InputError as error:
                left_out.append(str(error))
            else:
                # Relative, so that the bytes do not depend on where the folder lies.
                writer.write(pack(replace(record, name=os.path.relpath(record.name, source.folder))))
                records += 1
                captions += bool(record.caption)
            progress.update()
    finally:
        writer.close()
    # The name comes before the entry: a run stopped in between writes this shard once more, to the same bytes.
    os.replace(temporary, target)
    shard = Shard(target.name, records, captions, target.stat().st_size)
    manifest = replace(manifest, shards=(*manifest.shards, shard), left_out=(*manifest.left_out, *left_out))
    manifest.save(output)
    return manifest


def _checked(record: Record) -> Record:
    hq_size = header_size(io.BytesIO(record.hq), record.name)
    for lq in record.lq:
        check_pair_size(hq_size, header_size(io.BytesIO(lq), record.name), record.name)
    return record
