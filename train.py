"""Train FaithDiff: `python train.py --help`. Installed, the same command is `faithdiff-train`."""

from faithdiff_jax.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
