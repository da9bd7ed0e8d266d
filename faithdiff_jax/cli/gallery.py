"""`faithdiff gallery`: a page, or a sheet, to compare the results of several methods by eye."""

import argparse
import sys
from typing import TYPE_CHECKING

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, nearest, report_faults
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics.names import metric_info
from faithdiff_jax.files.images import output_format, save_image
from faithdiff_jax.files.reading import printable

if TYPE_CHECKING:
    from faithdiff_jax.evaluation.comparison import Comparison
    from faithdiff_jax.evaluation.measured import Measured

DESCRIPTION = """Put the results of several methods on one HTML page that needs no network (--output): a slider between
any two of them, all beside one another, zoom that keeps the place, metrics to sort by. Or on a sheet as papers print
them (--sheet): a picture with a marked place, and that place enlarged from every method. Pictures belong together
by their names: 0801_out.png and 0801x4.jpg belong to 0801.png."""
SHEET_ROWS = 6


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    types.add_methods(parser, "a method and the folder of its results; once for each, ours last")
    add("--input", type=types.folder, metavar="DIR", help="the low-quality pictures; they are shown enlarged too")
    add("--references", type=types.folder, metavar="DIR", help="the true pictures")
    add("--output", type=types.path, metavar="FILE", help="the page to write, an .html file")
    _add_sheet(parser)
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


def _add_sheet(parser: Parser) -> None:
    add = parser.add_argument_group("sheet").add_argument
    add("--sheet", type=types.path, metavar="FILE", help="the sheet to write, a .png or another picture")
    add(
        "--picture",
        action="append",
        metavar="NAME",
        type=types.nonempty,
        default=[],
        help=f"a picture on the sheet, without suffix; once for each (default: the first {SHEET_ROWS})",
    )
    add(
        "--crop",
        type=_crop,
        action="append",
        metavar="X,Y,W,H",
        help="the place to enlarge, in pixels; once for all, or once for each --picture (default: where the methods "
        "differ most)",
    )
    add("--crop-size", type=types.whole(8, 4096), metavar="PIXELS", default=96, help="side of a place that is chosen")
    add("--enlarge", choices=["lanczos", "nearest"], default="lanczos", help="how the place is enlarged")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and the sheet; pictures that cannot be read are listed at the end."""
    from faithdiff_jax.evaluation.comparison import compare
    from faithdiff_jax.evaluation.gallery import check_output
    from faithdiff_jax.evaluation.measured import measure

    if not (arguments.output or arguments.sheet):
        raise InputError("nothing to write: give --output for a page, --sheet for a sheet, or both")
    if arguments.output:
        check_output(arguments.output, arguments.beside)
    for flag in ("picture", "crop"):
        if getattr(arguments, flag) and not arguments.sheet:
            raise InputError(f"--{flag}: is for --sheet, which is not given")
    if arguments.sheet:
        output_format(arguments.sheet)
    methods = types.by_name(arguments.method)
    comparison = compare(methods, inputs=arguments.input, references=arguments.references, ending=arguments.ending)
    metrics = arguments.metrics
    if metrics is None:
        metrics = ["psnr", "ssim"] if arguments.references else []
    measured = measure(comparison, metrics, arguments.protocol)
    for note in (*comparison.missing, *measured.notes):
        print(printable(note), file=sys.stderr)
    # The sheet first: what it is asked for may not be there.
    faults = _write_sheet(arguments, comparison, measured) if arguments.sheet else []
    if arguments.output:
        faults = _write_page(arguments, comparison, measured)
    return report_faults(faults, sum(map(len, comparison.files.values())), "pictures could not be read")


def _write_page(arguments: argparse.Namespace, comparison: "Comparison", measured: "Measured") -> list[str]:
    from faithdiff_jax.evaluation.gallery import GalleryOptions, write_gallery

    options = GalleryOptions(
        title=arguments.title,
        largest_side=arguments.largest_side,
        quality=arguments.quality,
        beside=arguments.beside,
    )
    faults = write_gallery(arguments.output, comparison, measured, options)
    print(f"{arguments.output}: {len(comparison.names)} pictures, {len(comparison.columns)} columns")
    return faults


def _write_sheet(arguments: argparse.Namespace, comparison: "Comparison", measured: "Measured") -> list[str]:
    from faithdiff_jax.evaluation.sheets import Crop, draw_sheet

    names = arguments.picture or comparison.names[:SHEET_ROWS]
    for name in names:
        if name not in comparison.names:
            raise InputError(f"--picture {name}: no method has it{nearest(name, comparison.names)}")
    crops = [Crop(*numbers) for numbers in arguments.crop] if arguments.crop else arguments.crop_size
    sheet, faults = draw_sheet(comparison, measured, names, crops, arguments.enlarge)
    save_image(arguments.sheet, sheet)
    print(f"{arguments.sheet}: {len(names)} pictures, {len(comparison.columns)} columns")
    return faults


def _crop(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: must be X,Y,W,H, such as 200,120,96,96")
    return tuple(types.whole(0, 10**6)(number) for number in numbers)


def _metrics(text: str) -> list[str]:
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    try:
        for name in names:
            metric_info(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys(names))
