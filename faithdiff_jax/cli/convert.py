"""`convert_weights.py`: published weights or a training run to a model directory, and back to PyTorch."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faithdiff_jax.cli.command import Parser, run

DESCRIPTION = """Convert published FaithDiff weights to a model directory (--sdxl, --vae, --faithdiff, --output), a
training run to a model directory (--run, --output), a model directory back to the published PyTorch layout
(--to-torch, --output), or a model directory of an earlier version to this one's format (--upgrade, --output)."""
SOURCES = ("sdxl", "run", "to-torch", "upgrade")
"""What is converted: exactly one of these flags is given."""
TO_MODEL = ("sdxl", "run", "upgrade")
OPTIONS = {
    "vae": ("sdxl",),
    "faithdiff": ("sdxl",),
    "variant": ("sdxl",),
    "seed": ("sdxl",),
    "step": ("run",),
    "no-ema": ("run",),
    "default": TO_MODEL,
    "allow-nonfinite": TO_MODEL,
}
"""Flag -> the sources that it goes with."""
REPO = "a folder, or a Hugging Face repository id (owner/name)"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code, 2 for bad input. Bad flags leave with SystemExit(2)."""
    parser = _parser()
    args = parser.parse_args(argv)
    values = {flag: flag.replace("-", "_") for flag in (*SOURCES, *OPTIONS)}
    given = [flag for flag, name in values.items() if getattr(args, name) != parser.get_default(name)]
    sources = [flag for flag in given if flag in SOURCES]
    if len(sources) != 1:
        found = f", not {' and '.join(f'--{flag}' for flag in sources)}" if sources else ""
        parser.error(f"one of {', '.join(f'--{flag}' for flag in SOURCES)} is needed{found}")
    for flag in given:
        if flag in OPTIONS and sources[0] not in OPTIONS[flag]:
            parser.error(f"--{flag} goes with {' or '.join(f'--{source}' for source in OPTIONS[flag])} only")
    return run(lambda: _convert(args))


def _parser() -> Parser:
    parser = Parser(DESCRIPTION)
    parser.add_argument("--sdxl", metavar="DIR_OR_REPO", help=f"SDXL in diffusers format: {REPO}")
    parser.add_argument(
        "--vae", metavar="DIR_OR_REPO", help=f"the VAE, at the root or in vae/: {REPO} (default: the one in --sdxl)"
    )
    parser.add_argument(
        "--faithdiff",
        metavar="FILE_OR_REPO",
        help="FaithDiff's weights: a file, owner/name or owner/name/file (default: none; the model is made ready for "
        "training, with the VAE's encoder as LQ encoder and an initial aligner)",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="weight files to prefer, such as fp16 (default: full precision)"
    )
    parser.add_argument("--seed", type=_whole, help="of the initial aligner, without --faithdiff (default: 0)")
    parser.add_argument("--run", metavar="RUN_DIR", type=Path, help="the training run whose model to write")
    parser.add_argument("--step", metavar="N", type=_whole, help="the run's checkpoint (default: the newest)")
    parser.add_argument(
        "--no-ema", action="store_true", help="the run's parameters themselves, where it keeps an average of them too"
    )
    parser.add_argument("--to-torch", metavar="MODEL_DIR", type=Path, help="the model directory to convert back")
    parser.add_argument(
        "--upgrade", metavar="MODEL_DIR", type=Path, help="the model directory of an earlier version to convert"
    )
    parser.add_argument(
        "--default",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a default of restoring that the model is to have, such as guidance=1.0; may be repeated",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="write parameters that are NaN or infinite, too")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        required=True,
        help="the model directory to make, or with --to-torch the .safetensors or .bin file",
    )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _convert(args: argparse.Namespace) -> None:
    # Imported late: --help and a wrong flag need not wait for JAX.
    from faithdiff_jax.config import override
    from faithdiff_jax.training.export import export_run
    from faithdiff_jax.weights.from_torch import Published, convert
    from faithdiff_jax.weights.to_torch import to_torch
    from faithdiff_jax.weights.upgrade import upgrade

    defaults = override({}, args.default)
    if args.to_torch is not None:
        to_torch(args.to_torch, args.output, _bar)
    elif args.upgrade is not None:
        upgrade(args.upgrade, args.output, defaults=defaults, allow_nonfinite=args.allow_nonfinite, track=_bar)
    elif args.run is not None:
        saved = export_run(
            args.run,
            args.output,
            ema=not args.no_ema,
            step=args.step,
            defaults=defaults,
            allow_nonfinite=args.allow_nonfinite,
            track=_bar,
        )
        note = {"ema": "averaged parameters"}.get(saved.kind, "parameters" if args.no_ema else "no EMA: parameters")
        print(f"step {saved.step}, {note}")
    else:
        published = Published(
            sdxl=args.sdxl, vae=args.vae, faithdiff=args.faithdiff, variant=args.variant, seed=args.seed or 0
        )
        convert(published, args.output, defaults=defaults, allow_nonfinite=args.allow_nonfinite, track=_bar)
    print(f"wrote {args.output}")


def _bar(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(items, desc=what, total=count, unit="tensor", disable=None)
