"""`caption.py` and `faithdiff-caption`: describe a folder of pictures with a vision-language model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from faithdiff_jax.cli.command import SOME_FILES_BAD, Parser, run
from faithdiff_jax.data.captioning import MODEL, PROMPT, Captioner, caption_pictures, plan, require_torch
from faithdiff_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if every picture has a caption, 1 if some could not be captioned, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    return run(lambda: caption(arguments))


def caption(arguments: argparse.Namespace) -> int:
    """Caption every picture that has no caption in the output yet; those that cannot be are listed at the end."""
    todo = plan(arguments.input, arguments.output, arguments.cleaned)
    _make_folder(arguments.output)
    if todo.done:
        total = todo.done + len(todo.jobs) + len(todo.faults)
        print(f"{todo.done} of {total} already captioned, skipped (delete their files to do them again)")
    faults = list(todo.faults)
    if todo.jobs:
        require_torch()  # before transformers, which would remark on its absence at length
        _quieten_library()
        captioner = Captioner.load(
            arguments.model,
            prompt=arguments.prompt,
            max_tokens=arguments.max_tokens,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        faults += caption_pictures(captioner, todo.jobs, arguments.batch)
    if faults:
        print(f"{len(faults)} of {len(todo.jobs) + len(todo.faults)} could not be captioned:", file=sys.stderr)
        print("\n".join(faults), file=sys.stderr)
    return SOME_FILES_BAD if faults else 0


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made a folder ({error.strerror})") from error


def _quieten_library() -> None:
    """Keep the library's remarks on its own workings back, and its bars where nobody watches them."""
    from transformers import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def _parser() -> Parser:
    parser = Parser("Write a caption for every picture of a folder, at any depth; run again, it goes on.")
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="folder of pictures")
    add("--output", type=Path, required=True, metavar="DIR", help="for a .json a picture, in the folders of the input")
    add(
        "--cleaned",
        type=Path,
        metavar="DIR",
        help="look at the pictures of the same names there instead; one that is missing is an error of that picture",
    )
    add("--model", default=MODEL, metavar="DIR_OR_REPO", help="any image-text-to-text model, by folder or name")
    add("--prompt", default=PROMPT, metavar="TEXT", help="what the model is asked")
    add("--batch", type=_positive, default=4, metavar="N", help="pictures that go through the model together")
    add("--max-tokens", type=_positive, default=200, metavar="N", help="where a caption is cut off")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: on a GPU as the weights are stored, on CPU float32",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
