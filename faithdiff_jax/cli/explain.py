"""What a person is told of an error: one line that names what is wrong and what would help, and an exit code."""

import errno
import re
from collections.abc import Mapping

from faithdiff_jax.cli.exit_codes import BAD_INPUT, FAILED, INTERNAL
from faithdiff_jax.errors import InputError, RunError

LONGEST = 1000
"""Characters of a line; of a longer one, as a path of thousands makes, the middle is left out."""

NO_MEMORY = "a smaller picture, tile, crop or batch needs less"

# What the file system says of a path that was given: bad input.
_PATHS: Mapping[int, str] = {
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the name is too long for the file system, use a shorter one",
    errno.ENOTDIR: "goes through a file as if it were a folder",
    errno.EISDIR: "is a folder, a file is needed",
    errno.EEXIST: "exists already",
    errno.ENOTEMPTY: "is a folder that is not empty",
    errno.EACCES: "permission denied, see its owner and mode",
    errno.EPERM: "not permitted, see its owner and mode",
    errno.EROFS: "lies on a read-only file system, use another folder",
    errno.ELOOP: "is a symbolic link that leads back to itself",
    errno.EINVAL: "is not a file that can be used",
}
# What no other input would mend: the run failed.
_MACHINE: Mapping[int, str] = {
    errno.ENOSPC: "no space left on the disk, free some and run the command again",
    errno.EDQUOT: "the disk quota is used up, free some space and run the command again",
    errno.EIO: "the disk reports a fault",
    errno.ENOMEM: f"not enough memory; {NO_MEMORY}",
    errno.EMFILE: "too many open files, raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
}

_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""How messages of JAX begin where another process of the run is gone."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error that ended a command."""
    code, text = _explain(error)
    return code, one_line(text)


def one_line(text: str) -> str:
    """The text on one line of at most LONGEST characters, with control characters and the like escaped.

    Names of files and of tensors reach the terminal: they must not move its cursor or colour it.
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", text.strip())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    return printable(line)


def printable(text: str) -> str:
    """The text with every character that is not printable as a backslash escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _explain(error: BaseException) -> tuple[int, str]:
    match error:
        case InputError():
            # Written where the file is known, of an error that is not the file's.
            cause = error.__cause__ or error.__context__
            return FAILED if isinstance(cause, OSError) and cause.errno in _MACHINE else BAD_INPUT, str(error)
        case RunError():
            return FAILED, str(error)
        case _ if _out_of_memory(error):
            return FAILED, f"not enough memory{_detail(error)}; {NO_MEMORY}"
        case ModuleNotFoundError(name=str(name)):
            return FAILED, f"the Python package {name.partition('.')[0]!r} is not installed"
        case RecursionError():
            return BAD_INPUT, "something given is nested too deep to be read"
        case ConnectionError() | TimeoutError():
            return FAILED, f"the connection failed{_detail(error)}"
        case OSError():
            return _explain_os_error(error)
        case UnicodeEncodeError(object=str(text)):
            return BAD_INPUT, f"{text!r}: cannot be written as {error.encoding}, use other characters"
        case ValueError() if "embedded null" in str(error):
            return BAD_INPUT, "a path has a null character in it"
        case RuntimeError() if str(error).startswith(("Unable to initialize backend", "Unknown backend")):
            return BAD_INPUT, f"JAX finds no such device, see JAX_PLATFORMS{_detail(error)}"
        case RuntimeError() if str(error).startswith(_LOST) or "closed by peer" in str(error):
            return FAILED, f"a process of this run was lost{_detail(error)}"
        case _:
            text = f"internal error: {type(error).__name__}{_detail(error)}"
            return INTERNAL, f"{text}; please report it (FAITHDIFF_TRACEBACK=1 shows where it comes from)"


def _explain_os_error(error: OSError) -> tuple[int, str]:
    names = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    subject = f"{names[-1]}: " if names else ""
    number = error.errno or 0
    if number in _MACHINE:
        return FAILED, subject + _MACHINE[number]
    if number in _PATHS:
        return BAD_INPUT, subject + _PATHS[number]
    return BAD_INPUT, subject + (error.strerror or str(error) or type(error).__name__)


def _out_of_memory(error: BaseException) -> bool:
    """Whether NumPy, JAX, OpenCV or PyTorch had no memory left, told without importing any of them."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return (isinstance(error, RuntimeError) and text.startswith("RESOURCE_EXHAUSTED")) or any(
        phrase in text for phrase in ("can't allocate memory", "Insufficient memory")
    )


def _detail(error: BaseException) -> str:
    """`: ` and what the error says, its first paragraph: the rest is for programmers."""
    text = str(error).strip().partition("\n\n")[0]
    return f": {text}" if text else ""
