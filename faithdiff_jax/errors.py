"""The exceptions that a command turns into a message instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message is one line that names the value and what would be right."""


class RunError(RuntimeError):
    """A run that was begun well cannot go on: the message is one line that says why, and what is left of it."""
