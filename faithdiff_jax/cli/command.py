"""What our commands share: bad flags and bad input end in one line on stderr and exit code 2, never in a traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from faithdiff_jax.errors import InputError, RunError

SOME_FILES_BAD = 1
CANNOT_GO_ON = 1
BAD_INPUT = 2
INTERRUPTED = 130


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (no usage in front), and whose flags cannot be abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print `error: message` and leave with SystemExit(2)."""
        self.exit(BAD_INPUT, f"error: {_one_line(message)} (see --help)\n")


def run(body: Callable[[], int | None]) -> int:
    """Call a command's body and return its exit code.

    0 or what the body returns; 2 after printing an InputError's line, 1 after a RunError's; 130 when interrupted by
    Ctrl-C.
    """
    try:
        return body() or 0
    except InputError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except RunError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return CANNOT_GO_ON
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _one_line(message: str) -> str:
    return " ".join(message.split())
