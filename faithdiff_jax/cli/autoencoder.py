"""`faithdiff autoencoder`: train a small model's autoencoder from scratch."""

import argparse

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.config import find_config

DESCRIPTION = """Train an autoencoder from scratch and write a model directory whose other parts are newly initialised:
the first stage of a small model that has no published weights. Training the rest is `faithdiff train`."""


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add(
        "--config",
        required=True,
        metavar="NAME_OR_YAML",
        help="what to train: tiny/autoencoder, or a YAML file like it",
    )
    add("--data", type=types.folder, required=True, metavar="DIR", help="folder of photographs to train on")
    add("--held-out", type=types.folder, metavar="DIR", help="folder of photographs to measure the result with")
    add("--output", type=types.path, required=True, metavar="MODEL_DIR", help="the model directory to write")
    add("overrides", nargs="*", metavar="key=value", help="changes to the configuration, such as steps=100")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Train and write the model directory."""
    config = find_config(arguments.config)

    from faithdiff_jax.training.autoencoder import make_model

    figures = make_model(
        config, arguments.data, arguments.output, held_out=arguments.held_out, overrides=arguments.overrides
    )
    print(f"wrote {arguments.output}: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
