"""How commands end: exit codes, one line for whatever ends them, and no import of JAX before it is needed."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from faithdiff_jax import __version__
from faithdiff_jax.cli import command, exit_codes
from faithdiff_jax.cli.explain import Terminated, explain, one_line
from faithdiff_jax.cli.main import COMMANDS, main, run_command
from faithdiff_jax.errors import InputError, RunError

REPOSITORY = pathlib.Path(__file__).parent.parent


def raised(error: BaseException) -> int:
    def body() -> None:
        raise error

    return command.run(body)


def full_disk(wrapped: bool) -> BaseException:
    error = OSError(errno.ENOSPC, "No space left on device", "/x/y.png")
    if not wrapped:
        return error
    try:
        try:
            raise error
        except OSError:
            raise InputError("/x/y.png: cannot be written") from None
    except InputError as caught:
        return caught


class XlaRuntimeError(RuntimeError):
    """JAX's, by its name and message."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("--x 3: must be 4"), 2, "--x 3: must be 4"),
        (RunError("the loss is nan"), 1, "the loss is nan"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2, "the name is too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: goes through a file"),
        (OSError("image file is truncated"), 2, "image file is truncated"),
        (full_disk(wrapped=False), 1, "/x/y.png: no space left on the disk"),
        (full_disk(wrapped=True), 1, "/x/y.png: cannot be written"),
        (MemoryError(), 1, "not enough memory; a smaller picture, tile, crop or batch needs less"),
        (XlaRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n\nmore"), 1, "Out of memory alloc"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "'torch' is not installed"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 2, "cannot be written as utf-8"),
        (ValueError("embedded null byte"), 2, "a null character"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "the connection failed: [Errno 32] Broken pipe"),
        (RuntimeError("UNKNOWN: Gloo failed: Connection closed by peer"), 1, "a process of this run was lost: UNKNOWN"),
        (TypeError("'NoneType' is not iterable"), 70, "internal error: TypeError: 'NoneType' is not iterable; please"),
    ],
)
def test_every_error_is_one_line_and_a_code(error, code, message, capsys):
    assert raised(error) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < 1200


def test_interruptions(capsys):
    assert raised(KeyboardInterrupt()) == exit_codes.INTERRUPTED == 130
    assert raised(Terminated()) == 130
    assert capsys.readouterr().err == "interrupted\ninterrupted (SIGTERM)\n"


def test_a_traceback_only_if_asked_for(monkeypatch, capsys):
    monkeypatch.setenv(command.TRACEBACK, "1")
    assert raised(TypeError("oops")) == exit_codes.INTERNAL
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("error: internal error: TypeError: oops")


def test_control_characters_reach_no_terminal(capsys):
    assert one_line("a\x1b[2J\x07 \u202etxt.exe\n  next") == "a\\x1b[2J\\x07 \\u202etxt.exe next"
    assert one_line("two  blanks, é, \udcff") == "two  blanks, é, \\udcff"
    assert raised(InputError("\x1b[31mred\x9b")) == 2
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert "\x9b" not in said


def test_codes_of_bodies():
    assert command.run(lambda: None) == 0
    assert command.run(lambda: 5) == 5


def test_bad_files_of_a_folder_are_listed(capsys):
    assert command.report_faults([], 3, "pictures could not be used") == 0
    assert command.report_faults(["a.png: broken", "b\n.png: empty"], 3, "pictures could not be used") == 2
    assert capsys.readouterr().err == "2 of 3 pictures could not be used:\n  a.png: broken\n  b .png: empty\n"


def test_help_and_version(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("usage: faithdiff COMMAND") == 3
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"faithdiff {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(name, capsys):
    assert run_command(name, ["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: faithdiff {name} ")


def test_a_wrong_command_names_the_nearest(capsys):
    assert main(["restroe"]) == 2
    assert capsys.readouterr().err == "error: no command 'restroe'; did you mean 'restore'? (see faithdiff --help)\n"
    assert main(["x\x1b"]) == 2
    assert "the commands are restore, convert" in capsys.readouterr().err


def test_a_wrong_flag_names_the_nearest(capsys):
    assert main(["pairs", "--input", ".", "--output", "x", "--level", "I", "--sede", "3"]) == 2
    assert "unrecognized arguments: --sede 3; did you mean '--seed'? (see --help)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], *([name, flag] for name in COMMANDS for flag in ("--help", "--nope"))])
def test_help_and_wrong_flags_import_no_jax(words):
    code = (
        "import sys; from faithdiff_jax.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    script = f"set -o pipefail; {line}"
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, cwd=REPOSITORY, env=os.environ | environment, check=False
    )


PYTHON = f"'{sys.executable}'"


def test_a_closed_pipe_ends_quietly():
    # The reader is gone before anything is written.
    ended = shell(f"(sleep 0.3; {PYTHON} -m faithdiff_jax restore --help) | true")
    assert ended.returncode in (0, exit_codes.READER_GONE)
    assert ended.stderr == b""
    body = "lambda: print(*range(10**6), sep=chr(10))"
    many = f"import sys; from faithdiff_jax.cli.command import run; sys.exit(run({body}))"
    ended = shell(f'{PYTHON} -c "{many}" | head -1')
    assert (ended.returncode, ended.stdout, ended.stderr) == (exit_codes.READER_GONE, b"0\n", b"")


def test_a_full_disk_behind_stdout():
    ended = shell(f"{PYTHON} -m faithdiff_jax --help > /dev/full")
    assert ended.returncode == exit_codes.FAILED
    assert ended.stderr.startswith(b"error: no space left on the disk")
    assert ended.stderr.count(b"\n") == 1


def test_closed_streams_and_names_that_no_encoding_has():
    assert shell(f"{PYTHON} -m faithdiff_jax --version >&- 2>&-").returncode == 0
    code = "from faithdiff_jax.cli.command import run; run(lambda: print('caf\\xe9 \\udcff'))"
    ended = shell(f'{PYTHON} -c "{code}"', PYTHONIOENCODING="ascii:strict")
    assert (ended.returncode, ended.stdout) == (0, b"caf\\xe9 \\udcff\n")


def test_sigterm_ends_with_a_word():
    code = (
        "import time; from faithdiff_jax.cli.command import run; import sys\n"
        "def body():\n    print('begun', flush=True)\n    time.sleep(60)\n"
        "sys.exit(run(body))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "interrupted (SIGTERM)\n")


def test_sigterm_while_train_imports():
    code = (
        "import builtins, os, signal, sys\n"
        "real = builtins.__import__\n"
        "def hook(name, *rest):\n"
        "    if name == 'jax':\n        builtins.__import__ = real\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = hook\n"
        "from faithdiff_jax.cli.main import main; sys.exit(main())"
    )
    words = ["train", "--config", "tiny/stage2", "--model", "none", "--output", "none"]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ended.returncode, ended.stderr) == (130, "interrupted (SIGTERM)\n")


def test_the_handler_before_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    assert command.run(lambda: None) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_codes_are_told():
    assert explain(InputError("x")) == (exit_codes.BAD_INPUT, "x")
