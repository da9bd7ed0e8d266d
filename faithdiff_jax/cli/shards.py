"""`faithdiff shards`: pack a folder of photographs or pairs into ArrayRecord shards."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from faithdiff_jax.cli.command import SOME_FILES_BAD, Parser, run
from faithdiff_jax.data.shard_writer import make_shards
from faithdiff_jax.data.sources import PairFolder, PhotoFolder, Source


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 if records were left out, 2 for bad input."""
    options = _parser().parse_args(argv)
    return run(lambda: _shards(options))


def _parser() -> Parser:
    parser = Parser("Pack a folder of photographs or pairs into ArrayRecord shards, for many hosts and slow disks.")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--photos", type=Path, metavar="FOLDER", help="HQ photographs, at any depth")
    inputs.add_argument("--pairs", type=Path, metavar="FOLDER", help="HR_crops/ and LR_crops/, or HR/ and LR/")
    parser.add_argument("--captions", type=Path, metavar="FOLDER", help="captions, if not where the layout has them")
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True, help="where the shards go")
    parser.add_argument("--records-per-shard", type=int, metavar="N", default=1000, help="pictures in a shard")
    return parser


def _shards(options: argparse.Namespace) -> int:
    if options.photos is not None:
        source: Source = PhotoFolder(options.photos, options.captions)
    else:
        source = PairFolder(options.pairs, options.captions)
    print(source.summary)
    kind = "pairs" if options.photos is None else "photos"
    manifest = make_shards(source, kind, options.output, options.records_per_shard)
    for line in manifest.left_out:
        print(f"left out: {line}", file=sys.stderr)
    records = sum(shard.records for shard in manifest.shards)
    print(f"{options.output}: {records:,} records in {len(manifest.shards):,} shards")
    return SOME_FILES_BAD if manifest.left_out else 0
