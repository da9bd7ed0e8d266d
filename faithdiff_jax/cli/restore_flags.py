"""The flags of `faithdiff restore`: files and devices here, everything else from the fields of `RestoreOptions`."""

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli import describe, frames
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.option_flags import add_model_flags, add_option_flags, add_preset_flag
from faithdiff_jax.inference.options import RestoreOptions

FORMATS = ("png", "jpg", "webp", "tif")


def add_flags(parser: Parser, options: type[RestoreOptions] = RestoreOptions) -> None:
    """The command's flags: files and devices here, everything else from the fields of `options`."""
    add = parser.add_argument
    add_model_flags(parser)
    add_preset_flag(parser)
    add(
        "--input", type=types.path, required=True, metavar="PATH", help="a picture (JPEG, PNG, WebP, TIFF), or a folder"
    )
    add("--output", type=types.output_folder, required=True, metavar="DIR", help="folder for the results")
    add("--format", choices=FORMATS, default="png", help="of the results; webp and tif are lossless too")
    add("--overwrite", action="store_true", help="do pictures again whose result exists")
    add("--retry-failed", action="store_true", help="do pictures again that could not be restored before")
    add(
        "--shared",
        action="store_true",
        help="share the work with every other process that was given this flag and the same folders",
    )
    add(
        "--seeds",
        type=types.wholes,
        metavar="N,N,...",
        help="restore every picture once with each of these seeds, into NAME_seedN",
    )
    add("--compare", action="store_true", help="also write NAME_compare.png: input, bicubic, restored, and original")
    add(
        "--references",
        type=types.folder,
        metavar="DIR",
        help="folder with the originals, named as the inputs, for --compare",
    )
    add("--caption", default="", metavar="TEXT", help="what the picture shows, used as it is")
    add(
        "--captions",
        type=types.folder,
        metavar="DIR",
        help="folder with a .json (key caption) or .txt for each picture",
    )
    add("--keep-captions", action="store_true", help="use caption files as they are, without the published trimming")
    add(
        "--attribute",
        type=types.nonempty,
        action="append",
        default=[],
        metavar="WORD",
        help="also write NAME_attribution_WORD.png: where this word of the caption took effect; may be repeated",
    )
    frames.add_flags(parser)
    describe.add_flags(parser)
    add(
        "--profile",
        type=types.output_folder,
        metavar="DIR",
        help="folder for a profile of the restoring, which TensorBoard and xprof show",
    )
    group = parser.add_argument_group(
        "options of a restoration",
        "A model directory has defaults of its own; those named here are the published ones.",
    )
    add_option_flags(group, options)
