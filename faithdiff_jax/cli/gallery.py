"""`faithdiff gallery`: a page, or a sheet, to compare the results of several methods by eye."""

import argparse
import sys

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import metric_info
from faithdiff_jax.files.reading import printable

DESCRIPTION = """Put the results of several methods on one HTML page that needs no network: a slider between any two of
them, all beside one another, zoom that keeps the place, and metrics to sort by. Pictures belong together that have the
same name, whatever their suffix."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add(
        "--method",
        type=types.named_folder,
        metavar="NAME=DIR",
        action="append",
        required=True,
        help="a method and the folder of its results; once for each, ours last",
    )
    add("--input", type=types.folder, metavar="DIR", help="the low-quality pictures; they are shown enlarged too")
    add("--references", type=types.folder, metavar="DIR", help="the true pictures")
    add("--output", type=types.path, metavar="FILE", required=True, help="the page to write, an .html file")
    add("--title", type=types.nonempty, metavar="TEXT", default="Comparison", help="heads the page")
    add(
        "--metrics",
        type=_metrics,
        metavar="LIST",
        help="metrics to show, with commas; none: without (default: psnr,ssim if there are references)",
    )
    add("--protocol", metavar="NAME_OR_YAML", default="paper", help="how the metrics are defined")
    add(
        "--largest-side",
        type=types.whole(16, 8192),
        metavar="PIXELS",
        default=1024,
        help="larger pictures are shown reduced, and the page says so",
    )
    add(
        "--quality",
        type=types.whole(1, 100),
        metavar="N",
        help="of the pictures' WebP, for smaller pages (default: without loss)",
    )
    add("--beside", action="store_true", help="put the pictures into a folder beside the page, FILE_pictures")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write the page; pictures that cannot be used are listed at the end."""
    from faithdiff_jax.evaluation.comparison import compare
    from faithdiff_jax.evaluation.gallery import GalleryOptions, check_output, write_gallery
    from faithdiff_jax.evaluation.measured import measure

    check_output(arguments.output, arguments.beside)
    methods = types.by_name(arguments.method)
    comparison = compare(methods, inputs=arguments.input, references=arguments.references)
    metrics = arguments.metrics
    if metrics is None:
        metrics = ["psnr", "ssim"] if arguments.references else []
    measured = measure(comparison, metrics, arguments.protocol)
    for note in (*comparison.missing, *measured.notes):
        print(printable(note), file=sys.stderr)
    options = GalleryOptions(
        title=arguments.title,
        largest_side=arguments.largest_side,
        quality=arguments.quality,
        beside=arguments.beside,
    )
    faults = write_gallery(arguments.output, comparison, measured, options)
    print(f"{arguments.output}: {len(comparison.names)} pictures, {len(comparison.columns)} columns")
    return report_faults(faults, sum(map(len, comparison.files.values())), "pictures could not be read")


def _metrics(text: str) -> list[str]:
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    try:
        for name in names:
            metric_info(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(names))
