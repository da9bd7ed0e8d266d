"""`faithdiff`: the table of commands, and the dispatch to one of them."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "restore": "restore photographs",
    "convert": "convert weights to a model directory, and back",
    "train": "train a model",
    "caption": "describe pictures with a vision-language model",
    "pairs": "degrade photographs into a fixed paired set",
    "shards": "pack photographs or pairs into ArrayRecord shards",
    "preview": "draw what a degradation does to photographs",
    "autoencoder": "train a small model's autoencoder from the start",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the table; returns its exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        print(f"error: {name!r}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"faithdiff_jax.cli.{name}").main(rest)
    return code
