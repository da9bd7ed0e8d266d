"""The one exception a command turns into a message instead of a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: the message is one line that names the value and what would be right."""
