"""`faithdiff caption`: describe a folder of photographs with a vision-language model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.data.captioning import MODEL, PROMPT, Captioner, Clean, caption_pictures, plan, require_torch
from faithdiff_jax.errors import InputError

DESCRIPTION = """Write a caption for every photograph of a folder, at any depth, as a .json file that training and
restoring read. Photographs that have one already are skipped, so the same command completes a folder that was
interrupted. Needs PyTorch: pip install "faithdiff-jax[caption]"."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("--input", type=types.folder, required=True, metavar="DIR", help="folder of photographs")
    add(
        "--output",
        type=types.output_folder,
        required=True,
        metavar="DIR",
        help="folder to write the captions to, in subfolders like those of the input",
    )
    add(
        "--cleaned",
        type=types.folder,
        metavar="DIR",
        help="describe the pictures of the same names in this folder instead, such as restored ones",
    )
    add(
        "--clean",
        type=types.path,
        metavar="MODEL_DIR",
        help="remove the degradation first, with BSRNet as published or another model of faithdiff convert --rrdbnet",
    )
    add("--model", default=MODEL, metavar="DIR_OR_REPO", help="any image-text-to-text model: a folder or a Hub name")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what the model is asked")
    add("--batch", type=types.whole(1), default=4, metavar="N", help="photographs the model looks at together")
    add("--max-tokens", type=types.whole(1), default=200, metavar="N", help="length at which a caption is cut off")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto uses a GPU if there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto computes in float32 on a CPU, and on a GPU in the precision the weights are stored in",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Caption every photograph that has no caption in the output yet; those that cannot be are listed at the end."""
    if arguments.clean is not None and arguments.cleaned is not None:
        raise InputError("--clean and --cleaned: give one of them")
    clean = None if arguments.clean is None else load_cleaner(arguments.clean)
    todo = plan(arguments.input, arguments.output, arguments.cleaned)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if todo.done:
        total = todo.done + len(todo.jobs) + len(todo.faults)
        print(f"{todo.done} of {total} captioned already, skipped (delete their files to caption them again)")
    faults = list(todo.faults)
    if todo.jobs:
        prepare_library()
        captioner = Captioner.load(
            arguments.model,
            prompt=arguments.prompt,
            max_tokens=arguments.max_tokens,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        faults += caption_pictures(captioner, todo.jobs, arguments.batch, clean)
    return report_faults(faults, len(todo.jobs) + len(todo.faults), "photographs could not be captioned")


def load_cleaner(model_dir: Path) -> Clean:
    """A function that restores a picture at its own size with the RRDBNet of a model directory.

    Raises:
        InputError: not such a directory.
    """
    from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer

    return RRDBNetRestorer.load(model_dir, scale=1).restore


def prepare_library() -> None:
    """Keep transformers' remarks on its own workings back, and its bars where nobody watches them.

    Raises:
        InputError: PyTorch is not installed, on which the library would remark at length.
    """
    require_torch()
    from transformers import logging

    library: Any = logging  # without types
    library.set_verbosity_error()
    if not sys.stderr.isatty():
        library.disable_progress_bar()
