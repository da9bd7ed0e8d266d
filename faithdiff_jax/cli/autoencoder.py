"""`faithdiff autoencoder`: train a model's autoencoder from the start."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from faithdiff_jax.cli.command import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code, 2 for bad input. Bad flags leave with SystemExit(2)."""
    options = _parser().parse_args(argv)
    return run(lambda: _autoencoder(options))


def _parser() -> Parser:
    parser = Parser("Train an autoencoder and write a model directory whose other parts are fresh.")
    parser.add_argument("--config", type=Path, required=True, help="such as configs/tiny/autoencoder.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs to train on")
    parser.add_argument("--held-out", type=Path, help="folder of photographs to judge it by")
    parser.add_argument("--output", type=Path, required=True, help="the model directory to make")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, such as steps=100")
    return parser


def _autoencoder(options: argparse.Namespace) -> None:
    # Imported late: --help and a wrong flag need not wait for JAX.
    from faithdiff_jax.training.autoencoder import make_model

    figures = make_model(
        options.config, options.data, options.output, held_out=options.held_out, overrides=options.overrides
    )
    print(f"wrote {options.output}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
