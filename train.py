"""Train FaithDiff, or resume a run: `python train.py --help`. Installed, the same command is `faithdiff train`."""

from faithdiff_jax.cli.main import run_command

if __name__ == "__main__":
    raise SystemExit(run_command("train", prog="train.py"))
