"""Describe a folder of photographs: `python caption.py --help`. Installed, the same command is `faithdiff caption`."""

from faithdiff_jax.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("caption", prog="caption.py"))
