"""Caption a folder of pictures: `python caption.py --help`. Installed, the same command is `faithdiff-caption`."""

from faithdiff_jax.cli.caption import main

if __name__ == "__main__":
    raise SystemExit(main())
