"""Convert published weights, and back: `python convert_weights.py --help`. Installed, it is `faithdiff convert`."""

from faithdiff_jax.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("convert", prog="convert_weights.py"))
