"""Restore photographs: `python infer.py --help`. Installed, the same command is `faithdiff-infer`."""

from faithdiff_jax.cli.restore import main

if __name__ == "__main__":
    raise SystemExit(main())
