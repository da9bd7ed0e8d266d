"""`faithdiff compile`: compile what restoring pictures of some sizes takes, before there are pictures."""

import argparse

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.option_flags import (
    add_model_flags,
    add_option_flags,
    add_preset_flag,
    held_as,
    mesh_of,
    model_options,
    use_cache,
)
from faithdiff_jax.cli.progress import log_above_the_bar
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions

DESCRIPTION = """Compile what restoring pictures of some sizes takes, and keep it in the folder of compiled programs:
with the same model and options, faithdiff restore then neither traces nor compiles. Neither the weights nor pictures
are read; machine code is for this machine, these devices and this version."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add_model_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--size",
        type=types.pixels,
        action="append",
        metavar="WIDTHxHEIGHT",
        help="of pictures before they are enlarged; may be repeated",
    )
    what.add_argument("--input", type=types.folder, metavar="DIR", help="a folder with pictures of the sizes")
    parser.add_argument("--tile-captions", action="store_true", help="for a caption for each tile")
    add_preset_flag(parser)
    add_option_flags(parser.add_argument_group("options of a restoration", "As for faithdiff restore."), RestoreOptions)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compile; says how many programs are new."""
    from faithdiff_jax.inference import executables
    from faithdiff_jax.inference.precompile import model_of_shapes, precompile

    if not arguments.cache:
        raise InputError("--cache is empty: must be the folder for compiled programs")
    options, stored = model_options(arguments)
    if arguments.tile_captions:
        options.check_tile_captions()
    sizes = _sizes(arguments)
    for size in sizes:
        options.padded_size(stored.config, *size)
    mesh = mesh_of(arguments.mesh)
    use_cache(arguments.cache)
    store = executables.kept()
    if store is None:
        raise InputError("several processes share this computation: compile is for one")
    with log_above_the_bar():
        model = model_of_shapes(stored, mesh=mesh, **held_as(arguments))
        precompile(model, sizes, options, tile_captions=arguments.tile_captions)
    print(f"{store.saved} programs compiled, {store.found} were there: {store.folder}")


def _sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Heights and widths: those that were named, or of the pictures of a folder."""
    from faithdiff_jax.files.images import upright_size
    from faithdiff_jax.files.listing import list_images

    if arguments.size:
        return [(height, width) for width, height in arguments.size]
    sizes = sorted({upright_size(path) for path in list_images(arguments.input)})
    if not sizes:
        raise InputError(f"--input {arguments.input}: has no pictures")
    return sizes
