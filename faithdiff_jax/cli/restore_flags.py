"""The flags of `faithdiff restore`: files and devices here, everything else from the fields of `RestoreOptions`."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli import describe
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.inference.options import WHOLE_NUMBERS, RestoreOptions

FORMATS = ("png", "jpg", "webp", "tif")
PARSERS: dict[Any, Callable[[str], Any]] = {
    int: types.integer,
    float: types.number,
    str: str,
    WHOLE_NUMBERS: types.wholes,
}
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", WHOLE_NUMBERS: "N,N,..."}


def add_flags(parser: Parser, options: type[RestoreOptions] = RestoreOptions) -> None:
    """The command's flags: files and devices here, everything else from the fields of `options`."""
    add = parser.add_argument
    add(
        "--model",
        type=types.path,
        metavar="DIR",
        help="model directory, from faithdiff convert; else the small one included",
    )
    add(
        "--preset",
        type=types.nonempty,
        metavar="NAME",
        help="one of the model's presets of the options below; the small one has faithful and detailed",
    )
    add(
        "--lora",
        type=types.weighted_file,
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="LoRA for SDXL to add to the model, such as style.safetensors=0.8; may be repeated",
    )
    add(
        "--input", type=types.path, required=True, metavar="PATH", help="a picture (JPEG, PNG, WebP, TIFF), or a folder"
    )
    add("--output", type=types.output_folder, required=True, metavar="DIR", help="folder for the results")
    add("--format", choices=FORMATS, default="png", help="of the results; webp and tif are lossless too")
    add("--overwrite", action="store_true", help="do pictures again whose result exists")
    add("--retry-failed", action="store_true", help="do pictures again that could not be restored before")
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
    describe.add_flags(parser)
    add("--dtype", choices=types.DTYPES, default="auto", help="auto: bfloat16, on CPU float32")
    add(
        "--quantized",
        choices=types.EIGHT_BITS,
        help="hold the kernels of UNet and text encoders in 8 bits: half the memory of bfloat16",
    )
    add(
        "--mesh",
        type=types.mesh,
        metavar="DATAxFSDP",
        help="spread over devices: batch over both, parameters over the second",
    )
    add(
        "--profile",
        type=types.output_folder,
        metavar="DIR",
        help="folder for a profile of the restoring, which TensorBoard and xprof show",
    )
    add("--cache", default="~/.cache/faithdiff-jax", metavar="DIR", help="for compiled programs; '' for none")
    group = parser.add_argument_group(
        "options of a restoration",
        "A model directory has defaults of its own; those named here are the published ones.",
    )
    for field in dataclasses.fields(options):
        about = field.metadata["about"]
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        flag = about.flag or f"--{field.name.replace('_', '-')}"
        if about.kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=field.name, action=action, default=argparse.SUPPRESS, help=about.help)
            continue
        limits = f"; {about.range}" if about.kind is not str else ""
        group.add_argument(
            flag,
            dest=field.name,
            type=PARSERS[about.kind],
            choices=about.among or None,
            metavar=None if about.among else METAVARS[about.kind],
            default=argparse.SUPPRESS,
            help=f"{about.help}{limits}{default}",
        )
