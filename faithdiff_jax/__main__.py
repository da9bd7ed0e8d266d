"""`python -m faithdiff_jax COMMAND ...`, the same as `faithdiff COMMAND ...`."""

from faithdiff_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
