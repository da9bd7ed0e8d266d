"""Convert published weights to a model directory and back; `--help` says how."""

import sys

from faithdiff_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
