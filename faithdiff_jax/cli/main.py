"""`faithdiff COMMAND ...`, also `python -m faithdiff_jax COMMAND ...`: the table of commands, and the way to each.

A command is a module with two functions: `build_parser() -> Parser` and `run(arguments) -> int | None`, which returns
an exit code (see `exit_codes`) or nothing for 0. Modules import JAX inside `run` only, so that help and a wrong
flag come at once. A new command is a module and a line here.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from faithdiff_jax import __version__
from faithdiff_jax.cli import command
from faithdiff_jax.cli.exit_codes import DONE
from faithdiff_jax.errors import InputError


class Command(NamedTuple):
    """Where a command is, and what it does in a few words."""

    module: str
    summary: str


COMMANDS = {
    "restore": Command("faithdiff_jax.cli.restore", "restore a photograph, or a folder of them"),
    "convert": Command("faithdiff_jax.cli.convert", "make a model directory of published weights or of a run"),
    "compile": Command("faithdiff_jax.cli.compile", "compile beforehand what restoring pictures of some sizes takes"),
    "serve": Command("faithdiff_jax.cli.serve", "restore photographs for others: an HTTP API and a page"),
    "train": Command("faithdiff_jax.cli.train", "train a model, or resume a run"),
    "caption": Command("faithdiff_jax.cli.caption", "describe photographs with a vision-language model"),
    "pairs": Command("faithdiff_jax.cli.pairs", "degrade photographs into a fixed set of training pairs"),
    "shards": Command("faithdiff_jax.cli.shards", "pack photographs or pairs into a few large files"),
    "preview": Command("faithdiff_jax.cli.preview", "show on a sheet what a degradation does to photographs"),
    "testset": Command("faithdiff_jax.cli.testset", "make a test set, or see that one lies as it must"),
    "evaluate": Command("faithdiff_jax.cli.evaluate", "measure restored pictures and write tables"),
    "gallery": Command("faithdiff_jax.cli.gallery", "compare the results of several methods on an HTML page"),
    "ocr": Command("faithdiff_jax.cli.ocr", "count the words that can be read in restored pictures of text"),
    "plan": Command("faithdiff_jax.cli.plan", "say what a training or a restoration takes of TPUs or GPUs"),
    "autoencoder": Command("faithdiff_jax.cli.autoencoder", "train the autoencoder of a small model from scratch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return command.run(lambda: _dispatch(words))


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command of the table, which calls itself `prog`; as `main` otherwise."""
    words = list(sys.argv[1:] if argv is None else argv)
    return command.run(lambda: _run(name, words, prog or f"faithdiff {name}"))


def _dispatch(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE
    if words[0] == "--version":
        print(f"faithdiff {__version__}")
        return DONE
    if words[0] not in COMMANDS:
        hint = command.nearest(words[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise InputError(f"no command {words[0]!r}{hint} (see faithdiff --help)")
    return _run(words[0], words[1:], f"faithdiff {words[0]}")


def _run(name: str, words: list[str], prog: str) -> int | None:
    module = importlib.import_module(COMMANDS[name].module)
    parser: command.Parser = module.build_parser()
    parser.prog = prog
    code: int | None = module.run(parser.parse_intermixed_args(words))
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        (
            "usage: faithdiff COMMAND [options]",
            "",
            "FaithDiff: restore photographs with a diffusion model, and train it, in JAX.",
            "",
            *(f"  {name:<{width}}  {entry.summary}" for name, entry in COMMANDS.items()),
            "",
            "faithdiff COMMAND --help describes a command, faithdiff --version names the version.",
            "A command ends with 0 if all was done, 1 if a run failed, 2 for bad input, 130 if it was interrupted.",
        )
    )
