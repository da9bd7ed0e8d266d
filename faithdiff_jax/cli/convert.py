"""`faithdiff convert`: published weights or a training run to a model directory, and back to PyTorch."""

import argparse
from pathlib import Path

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.progress import tensor_bar
from faithdiff_jax.config import from_dict, override
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions

DESCRIPTION = """Convert published FaithDiff weights to a model directory (--sdxl, --vae, --faithdiff, --output), a
training run to a model directory (--run, --output), weights of Real-ESRGAN, BSRGAN or BSRNet to a model directory
(--rrdbnet, --output), a model directory back to the published PyTorch layout (--to-torch, --output), or a model
directory of an earlier version to this one's format (--upgrade, --output)."""
SOURCES = ("sdxl", "run", "rrdbnet", "to-torch", "upgrade")
"""What is converted: exactly one of these flags is given."""
TO_MODEL = ("sdxl", "run", "upgrade")
OPTIONS = {
    "vae": ("sdxl",),
    "faithdiff": ("sdxl",),
    "unet": ("sdxl",),
    "text-encoder": ("sdxl",),
    "controlnet": ("sdxl",),
    "variant": ("sdxl",),
    "seed": ("sdxl",),
    "step": ("run",),
    "no-ema": ("run",),
    "share": TO_MODEL,
    "default": TO_MODEL,
    "allow-nonfinite": (*TO_MODEL, "rrdbnet"),
}
"""Flag -> the sources that it goes with."""
REPO = "a folder, or a Hugging Face repository id (owner/name)"


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    parser.add_argument("--sdxl", "--sd21", metavar="DIR_OR_REPO", help=f"SDXL, or SD 2.1, in diffusers format: {REPO}")
    parser.add_argument(
        "--vae",
        metavar="PATH_OR_REPO",
        help=f"the VAE, at the root or in vae/: {REPO}; or a single file that holds one (default: the one in --sdxl)",
    )
    parser.add_argument(
        "--faithdiff",
        metavar="FILE_OR_REPO",
        help="FaithDiff's weights: a file, owner/name or owner/name/file (default: none; the model is made ready for "
        "training, with the VAE's encoder as LQ encoder and an initial aligner)",
    )
    parser.add_argument(
        "--unet",
        metavar="FILE",
        help="a single file that holds the UNet to start training from, such as a fine-tuned SDXL checkpoint (default: "
        "the one in --sdxl)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="FILE",
        help="a single file that holds the text encoders, named as OpenCLIP or the original code names them (default: "
        "those in --sdxl)",
    )
    parser.add_argument(
        "--controlnet",
        metavar="PATH_OR_REPO",
        help="a ControlNet or ControlNet-XS for the UNet, as diffusers writes it, to restore with or to train further: "
        "a file, a folder, owner/name or owner/name/file",
    )
    parser.add_argument(
        "--variant", metavar="NAME", help="weight files to prefer, such as fp16 (default: full precision)"
    )
    parser.add_argument("--seed", type=types.whole(0), help="of the initial aligner, without --faithdiff (default: 0)")
    parser.add_argument("--run", metavar="RUN_DIR", type=types.place, help="the training run whose model to write")
    parser.add_argument("--step", metavar="N", type=types.whole(0), help="the run's checkpoint (default: the newest)")
    parser.add_argument(
        "--no-ema", action="store_true", help="the run's parameters themselves, where it keeps an average of them too"
    )
    parser.add_argument(
        "--rrdbnet",
        metavar="FILE",
        type=types.path,
        help="weights of Real-ESRGAN, BSRGAN or BSRNet: .pth, .safetensors, or ncnn's .param with its .bin beside it",
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
    parser.add_argument(
        "--share",
        metavar="MODEL_DIR",
        type=types.path,
        help="a model directory on the same disk: files that are equal to one of its, as text encoders and VAE of a "
        "model trained from it, become hard links and take no room",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="write parameters that are NaN or infinite, too")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        required=True,
        help="the model directory to make, or with --to-torch the .safetensors or .bin file (.pth for an RRDBNet)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Convert, in the direction that the flags say."""
    _check(args)
    defaults = override({}, args.default)
    from_dict(RestoreOptions, defaults, "--default")  # refuses what no model can do
    # Imported late: --help and a wrong flag need not wait for JAX.
    from faithdiff_jax.baselines.rrdbnet_weights import convert_rrdbnet, is_rrdbnet, rrdbnet_to_torch
    from faithdiff_jax.training.export import export_run
    from faithdiff_jax.weights import sharing
    from faithdiff_jax.weights.from_torch import Published, convert
    from faithdiff_jax.weights.to_torch import to_torch
    from faithdiff_jax.weights.upgrade import upgrade

    if args.share is not None:
        sharing.check_can_share(args.output, args.share)
    if args.to_torch is not None:
        back = rrdbnet_to_torch if is_rrdbnet(args.to_torch) else to_torch
        back(args.to_torch, args.output, tensor_bar)
    elif args.rrdbnet is not None:
        found = convert_rrdbnet(args.rrdbnet, args.output, allow_nonfinite=args.allow_nonfinite, track=tensor_bar)
        print(f"{found.blocks} blocks of {found.channels} channels, scale {found.scale}")
    elif args.upgrade is not None:
        upgrade(args.upgrade, args.output, defaults=defaults, allow_nonfinite=args.allow_nonfinite, track=tensor_bar)
    elif args.run is not None:
        saved = export_run(
            args.run,
            args.output,
            ema=not args.no_ema,
            step=args.step,
            defaults=defaults,
            allow_nonfinite=args.allow_nonfinite,
            track=tensor_bar,
        )
        note = {"ema": "averaged parameters"}.get(saved.kind, "parameters" if args.no_ema else "no EMA: parameters")
        print(f"step {saved.step}, {note}")
    else:
        published = Published(
            sdxl=args.sdxl,
            vae=args.vae,
            faithdiff=args.faithdiff,
            unet=args.unet,
            text_encoder=args.text_encoder,
            controlnet=args.controlnet,
            variant=args.variant,
            seed=args.seed or 0,
        )
        convert(published, args.output, defaults=defaults, allow_nonfinite=args.allow_nonfinite, track=tensor_bar)
    if args.share is not None:
        shared = sharing.share_files(args.output, args.share)
        print(f"{shared / 1e9:.2f} GB of it are those of {args.share}")
    print(f"wrote {args.output}")


def _check(args: argparse.Namespace) -> None:
    values = {flag: getattr(args, flag.replace("-", "_")) for flag in (*SOURCES, *OPTIONS)}
    given = [flag for flag, value in values.items() if not (value is None or value is False or value == [])]
    sources = [flag for flag in given if flag in SOURCES]
    if len(sources) != 1:
        found = f", not {' and '.join(f'--{flag}' for flag in sources)}" if sources else ""
        raise InputError(f"one of {', '.join(f'--{flag}' for flag in SOURCES)} is needed{found}")
    for flag in given:
        if flag in OPTIONS and sources[0] not in OPTIONS[flag]:
            raise InputError(f"--{flag} goes with {' or '.join(f'--{source}' for source in OPTIONS[flag])} only")
