"""What every command shares: how flags are parsed, and how whatever ends it becomes one line and an exit code."""

import argparse
import contextlib
import difflib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import NoReturn, TextIO

from faithdiff_jax.cli.exit_codes import BAD_INPUT, DONE, INTERRUPTED, READER_GONE
from faithdiff_jax.cli.explain import Terminated, explain, one_line

TRACEBACK = "FAITHDIFF_TRACEBACK"
"""The environment variable that, set to 1, shows where an error comes from."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of every flag that has one and is not a switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default == "" or isinstance(action.default, bool | list)
        return action.help if plain or "default: " in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (no usage in front), and whose flags cannot be abbreviated."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print `error: message` and leave with SystemExit(2)."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if message else ""
        hint = nearest(unknown, self._option_string_actions) if unknown.startswith("--") else ""
        self.exit(BAD_INPUT, f"error: {one_line(message)}{hint} (see --help)\n")


def run(body: Callable[[], int | None]) -> int:
    """Call a command's body and return its exit code, or the one for the error that ended it (see `exit_codes`).

    Every error becomes one line on stderr; with FAITHDIFF_TRACEBACK=1 its traceback comes first.
    """
    _prepare_output()
    try:
        with _sigterm_interrupts():
            return _flushed(body)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)


def trace(error: BaseException) -> None:
    """Print where an error comes from, if that is asked for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)


def report_faults(faults: Sequence[str], attempted: int, what: str) -> int:
    """List the files of a folder that could not be used on stderr, one per line; returns the exit code, 0 if none.

    `what` completes "2 of 5", such as "pictures could not be captioned".
    """
    if not faults:
        return DONE
    print(f"{len(faults)} of {attempted} {what}:", file=sys.stderr)
    for fault in faults:
        print(f"  {one_line(fault)}", file=sys.stderr)
    return BAD_INPUT


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'NAME'?` if one of the names is close to the wrong one, otherwise nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed, which then only asks; pressed again, it interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()
        os.write(2, b"\nfinishing the pictures in hand; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _flushed(body: Callable[[], int | None]) -> int:
    """Call the body, and notice here, not after the last line of Python, that the output cannot be written."""
    try:
        code = body() or DONE
    except SystemExit as end:  # of --help, and of a flag that the parser refuses
        code = end.code if isinstance(end.code, int) else DONE
    sys.stdout.flush()
    return code


def report(error: BaseException) -> int:
    """Say in one line what ended a command, and return its exit code."""
    if isinstance(error, BrokenPipeError) and (_reader_gone(sys.stdout) or _reader_gone(sys.stderr)):
        _silence(sys.stdout)
        _silence(sys.stderr)
        return READER_GONE
    trace(error)
    for stream in (sys.stdout, sys.stderr):  # what was printed so far comes first
        try:
            stream.flush()
        except OSError:
            _silence(stream)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted (SIGTERM)" if isinstance(error, Terminated) else "interrupted", file=sys.stderr)
        return INTERRUPTED
    code, line = explain(error)
    print(f"error: {line}", file=sys.stderr)
    return code


def _prepare_output() -> None:
    """Let no character that the terminal's encoding lacks, and no closed stream, end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _reader_gone(stream: TextIO) -> bool:
    """Whether the stream is a pipe that nobody reads: other pipes may break too, and those are faults."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file, as in tests
        return False


def _silence(stream: TextIO) -> None:
    """Throw away what the stream still holds: Python would try to write it at exit, and complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that temporary files are removed; a second one ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
