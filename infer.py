"""Restore photographs: `python infer.py --help`. Installed, the same command is `faithdiff restore`."""

from faithdiff_jax.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("restore", prog="infer.py"))
