"""The exceptions that a command turns into a message instead of a traceback, and how a message shows a value."""

SHOWN_AT_MOST = 60


class InputError(ValueError):
    """Something the user gave is wrong: the message is one line that names the value and what would be right."""


class RunError(RuntimeError):
    """A run that was begun well cannot go on: the message is one line that says why, and what is left of it."""


class Cancelled(RunError):
    """Whoever watches a run asked it to stop."""


def shown(value: object) -> str:
    """A value as a message has it: on one line, and short however long it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # integers of thousands of digits, lists a thousand deep, whatever a class does
        return f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_AT_MOST else f"{text[:SHOWN_AT_MOST]}..."
