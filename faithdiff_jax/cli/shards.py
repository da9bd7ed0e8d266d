"""`faithdiff shards`: pack a folder of photographs or pairs into ArrayRecord shards."""

import argparse

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.data.shard_writer import make_shards
from faithdiff_jax.data.sources import PairFolder, PhotoFolder, Source

DESCRIPTION = """Pack a folder of photographs or pairs into a few large files (ArrayRecord shards), which many hosts and
slow or remote disks read faster. Pictures and captions go in as they are. The same command continues a folder of shards
that was interrupted. Many processes share the work where each is told its number."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--photos", type=types.folder, metavar="DIR", help="folder of photographs, at any depth")
    inputs.add_argument(
        "--pairs", type=types.folder, metavar="DIR", help="folder with HR/ and LR/, or HR_crops/ and LR_crops/"
    )
    add = parser.add_argument
    add("--output", type=types.output_place, metavar="DIR", required=True, help="folder to write the shards to")
    add(
        "--captions",
        type=types.folder,
        metavar="DIR",
        help="folder of captions (default: beside the photographs, or where the pairs have them)",
    )
    add("--records-per-shard", type=types.whole(1), default=1000, metavar="N", help="pictures in one shard")
    add("--processes", type=types.whole(1, 2**20), default=1, metavar="N", help="how many processes share the work")
    add("--process-id", type=types.whole(0, 2**20), default=0, metavar="I", help="the number of this one, from 0")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the shards that are missing; pictures that were left out are listed at the end."""
    types.check_process_id(arguments.process_id, arguments.processes)
    if arguments.photos is not None:
        source: Source = PhotoFolder(arguments.photos, arguments.captions)
    else:
        source = PairFolder(arguments.pairs, arguments.captions)
    print(source.summary)
    kind = "pairs" if arguments.photos is None else "photos"
    manifest = make_shards(
        source,
        kind,
        arguments.output,
        arguments.records_per_shard,
        process=arguments.process_id,
        processes=arguments.processes,
    )
    records = sum(shard.records for shard in manifest.shards)
    rest = "" if manifest.is_complete else f" of {manifest.shard_count:,}, the others are other processes' to write"
    print(f"{arguments.output}: {records:,} records in {len(manifest.shards):,} shards{rest}")
    return report_faults(manifest.left_out, manifest.inputs, "records were left out")
