"""Flags that commands share which load a model and restore with it: those of the model, and those made of options."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli import arguments as types
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.about import WHOLE_NUMBERS
from faithdiff_jax.inference.options import RestoreOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.weights.model_directory import ModelDirectory

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", WHOLE_NUMBERS: "N,N,..."}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model, what is added to it, and how it is held; for `load_model`."""
    add = parser.add_argument
    add(
        "--model",
        type=types.place,
        metavar="DIR",
        help="model directory, from faithdiff convert; else the small one included",
    )
    add(
        "--lora",
        type=types.weighted_file,
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="LoRA for SDXL to add to the model, such as style.safetensors=0.8; may be repeated",
    )
    add("--dtype", choices=types.DTYPES, default="auto", help="auto: bfloat16, on CPU float32")
    add(
        "--quantized",
        choices=types.EIGHT_BITS,
        help="hold the kernels of UNet and text encoders in 8 bits: half the memory of bfloat16",
    )
    add(
        "--offload",
        action="store_true",
        help="hold text encoders, VAE and LQ encoder in the host's memory, and on the device only while they work",
    )
    add(
        "--mesh",
        type=types.mesh,
        metavar="DATAxFSDP",
        help="spread over devices: batch over both, parameters over the second",
    )
    add("--cache", default="~/.cache/faithdiff-jax", metavar="DIR", help="for compiled programs; '' for none")


def add_preset_flag(parser: argparse.ArgumentParser) -> None:
    """Which of the model's own choices of options is meant; for `model_options`."""
    parser.add_argument(
        "--preset",
        type=types.nonempty,
        metavar="NAME",
        help="one of the model's presets of the options below; the small one has faithful and detailed",
    )


def add_option_flags(group: argparse._ActionsContainer, options: type, names: Collection[str] | None = None) -> None:
    """A flag for each field of a class of options, or for those of these names; nothing is put where none is given."""
    for field in dataclasses.fields(options):
        if names is not None and field.name not in names:
            continue
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
            type=types.READERS[about.kind],
            choices=about.among or None,
            metavar=None if about.among else METAVARS[about.kind],
            default=argparse.SUPPRESS,
            help=f"{about.help}{limits}{default}",
        )


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Of the fields of a class of options, those whose flags were given."""
    names = [field.name for field in dataclasses.fields(options)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def model_options(arguments: argparse.Namespace) -> tuple[RestoreOptions, "ModelDirectory"]:
    """The model's defaults with the flags that were given, checked against the model; and the model, opened."""
    from faithdiff_jax.inference.loading import chosen, default_options, preset_options
    from faithdiff_jax.weights.model_directory import ModelDirectory

    given = given_options(arguments, RestoreOptions)
    RestoreOptions(**given)  # flags out of their range are told before anything is read
    stored = ModelDirectory.open(arguments.model or SMALL_MODEL)
    preset = arguments.preset
    options = default_options(stored) if preset is None else chosen(preset_options(stored), preset)
    options = options.replace(**given)
    options.check_against(stored.config)
    return options, stored


def lora_files(arguments: argparse.Namespace, stored: "ModelDirectory") -> dict[str, float]:
    """LoRA files and their weights; that they are for this model is seen before the model is read."""
    loras = dict(arguments.lora)
    if len(loras) < len(arguments.lora):
        raise InputError("--lora: a file is given twice, give it once, with the sum of the weights")
    if loras:
        from faithdiff_jax.inference.loading import open_loras

        open_loras(loras, stored)
    return loras


def mesh_of(sides: tuple[int, int] | None) -> "Mesh | None":
    """The mesh of devices; that the sides fit them is checked before anything is read."""
    if sides is None:
        return None
    from faithdiff_jax.sharding import make_mesh

    return make_mesh(data=sides[0], fsdp=sides[1])


def load_model(
    stored: "ModelDirectory", arguments: argparse.Namespace, mesh: "Mesh | None", loras: dict[str, float]
) -> "FaithDiff":
    """The model as the flags of `add_model_flags` ask for it."""
    from faithdiff_jax.inference.pipeline import FaithDiff

    use_cache(arguments.cache)
    return FaithDiff.load(stored, mesh=mesh, loras=loras, **held_as(arguments))


def held_as(arguments: argparse.Namespace) -> dict[str, Any]:
    """How parameters are held, as `FaithDiff.load` takes it."""
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    return {"dtype": dtype, "quantized": arguments.quantized, "offload": arguments.offload}


def use_cache(folder: str) -> None:
    """Keep compiled programs in a folder, and take them from there; "" for not at all."""
    import jax

    from faithdiff_jax.inference import executables

    path = pathlib.Path(folder).expanduser()
    executables.keep_in(path / "executables" if folder else None)
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(path))
        # JAX's own second leaves out what is compiled operation by operation.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
