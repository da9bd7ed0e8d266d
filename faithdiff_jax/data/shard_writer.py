"""Pack a folder of photographs or pairs into ArrayRecord shards, for many hosts and slow or remote disks.

    python -m faithdiff_jax.data.shard_writer --photos FOLDER --output FOLDER
    python -m faithdiff_jax.data.shard_writer --pairs FOLDER --output FOLDER

Files go in as they are. An interrupted run is continued by the same command, and gives the same bytes as one that
was not.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from faithdiff_jax.cli.command import Parser, run
from faithdiff_jax.data.decode import header_size
from faithdiff_jax.data.shards import MANIFEST, WRITER_OPTIONS, Manifest, Shard, digest, pack
from faithdiff_jax.data.sources import PairFolder, PhotoFolder, Record, Source, check_pair_size
from faithdiff_jax.errors import InputError

SOME_LEFT_OUT = 1


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 if records were left out, 2 for bad input."""
    parser = Parser(__doc__.partition("\n")[0])
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--photos", type=Path, metavar="FOLDER", help="HQ photographs, at any depth")
    inputs.add_argument("--pairs", type=Path, metavar="FOLDER", help="HR_crops/ and LR_crops/, or HR/ and LR/")
    parser.add_argument("--captions", type=Path, metavar="FOLDER", help="captions, if not where the layout has them")
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="where the shards go")
    parser.add_argument("--records-per-shard", type=int, metavar="N", default=1000, help="pictures in a shard")
    flags = parser.parse_args(arguments)

    def body() -> int:
        if flags.photos is not None:
            source: Source = PhotoFolder(flags.photos, flags.captions)
        else:
            source = PairFolder(flags.pairs, flags.captions)
        print(source.summary)
        manifest = make_shards(
            source, "pairs" if flags.photos is None else "photos", flags.output, flags.records_per_shard
        )
        for line in manifest.left_out:
            print(f"left out: {line}", file=sys.stderr)
        records = sum(shard.records for shard in manifest.shards)
        print(f"{flags.output}: {records:,} records in {len(manifest.shards):,} shards")
        return SOME_LEFT_OUT if manifest.left_out else 0

    return run(body)


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


if __name__ == "__main__":
    sys.exit(main())
