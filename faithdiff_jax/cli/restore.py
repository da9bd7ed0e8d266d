"""`infer.py` and `faithdiff-infer`: restore a photograph, or a folder of them.

files -> captions, outputs still to do -> FaithDiff.restore, one by one -> PNG or another format, whole or not at all
restored, input, original -> NAME_compare.png, if asked for
"""

import argparse
import contextlib
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.command import BAD_INPUT, Parser, run
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.pictures import comparison
from faithdiff_jax.files import images as images_
from faithdiff_jax.files.captions import find_caption, read_caption, trim_caption
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_images

FORMATS = ("png", "jpg", "webp", "tif")
SEEDS = 2**32
# What suits the small model: it was trained for four times the size and on small crops, and knows few words.
SMALL_MODEL_DEFAULTS = {"scale": 4.0, "guidance": 1.0, "color_fix": "wavelet", "wavelet_levels": 2}
DEFAULTS = {"scale": 2.0, "guidance": 5.0, "color_fix": "adain", "wavelet_levels": 5}  # as published


def main(argv: list[str] | None = None) -> int:
    """Parse, restore, report; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    defaults = DEFAULTS
    if arguments.model is None:
        arguments.model, defaults = str(SMALL_MODEL), SMALL_MODEL_DEFAULTS
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return run(lambda: restore_all(arguments))


def restore_all(arguments: argparse.Namespace) -> int:
    """Restore every picture that has no output yet; bad ones are listed at the end and make the exit code 2."""
    _check(arguments)
    jobs = _jobs(pathlib.Path(arguments.input), pathlib.Path(arguments.output), arguments.format)
    todo = [job for job in jobs if arguments.overwrite or not job[1].exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} already done, skipped (--overwrite does them again)")
    if not todo:
        return 0

    if len(jobs) == 1:
        images_.load_image(todo[0][0])  # a bad picture need not wait for the model
    model = _load_model(arguments)
    folder = pathlib.Path(arguments.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder ({error.strerror})") from None

    faults = []
    with _log_above_the_bar(), tqdm(todo, unit="picture", disable=len(todo) == 1) as bar:
        for source, target in bar:
            try:
                _restore_one(model, source, target, arguments)
                tqdm.write(f"{source} -> {target}")
            except InputError as error:
                if len(jobs) == 1:
                    raise
                faults.append(str(error))
    if faults:
        tqdm.write(f"{len(faults)} of {len(todo)} could not be restored:")
        for fault in faults:
            tqdm.write(f"  {fault}")
        return BAD_INPUT
    return 0


def _restore_one(model, source: pathlib.Path, target: pathlib.Path, arguments: argparse.Namespace) -> None:
    picture = images_.load_image(source)
    notes = list(picture.notes)
    caption = arguments.caption
    if arguments.captions is not None:
        found = find_caption(source, pathlib.Path(arguments.captions))
        if found is None:
            caption = ""
            notes.append("no caption found, restored without one")
        else:
            caption = read_caption(found) if arguments.keep_captions else trim_caption(read_caption(found))
    images_.output_format(target, alpha=picture.alpha is not None)
    restored = model.restore(
        picture.rgb,
        caption,
        scale=arguments.scale,
        steps=arguments.steps,
        guidance=arguments.guidance,
        guidance_rescale=arguments.guidance_rescale,
        seed=arguments.seed,
        start=arguments.start,
        tile=arguments.tile,
        overlap=arguments.overlap,
        tile_batch=arguments.tile_batch,
        sampler=arguments.sampler,
        color_fix=arguments.color_fix,
        wavelet_levels=arguments.wavelet_levels,
        negative_caption=arguments.negative_caption,
        multiple=arguments.multiple,
    )
    alpha = None
    if picture.alpha is not None:
        alpha = images_.upscale(picture.alpha, arguments.scale)
        notes.append("alpha upscaled with Lanczos")
    if picture.gray:
        notes.append("written as gray")
    if arguments.compare:
        reference = _reference(source, restored.shape, arguments.references)
        sheet = target.with_name(f"{target.stem}_compare.png")
        images_.save_image(sheet, comparison(picture.rgb, restored, reference), icc_profile=picture.icc_profile)
    images_.save_image(target, restored, alpha=alpha, gray=picture.gray, icc_profile=picture.icc_profile)
    for note in notes:
        tqdm.write(f"{source}: {note}")


def _reference(source: pathlib.Path, shape: tuple[int, ...], folder: str | None) -> np.ndarray | None:
    """The true picture of the same stem, if the folder of references has one."""
    found = [] if folder is None else [path for path in list_images(folder) if path.stem == source.stem]
    if not found:
        return None
    reference = images_.load_image(found[0]).rgb
    if reference.shape != shape:
        sizes = f"{reference.shape[1]}x{reference.shape[0]}, the restored picture {shape[1]}x{shape[0]}"
        raise InputError(f"{found[0]}: is {sizes}; they must be of one size (see --scale)")
    return reference


def _jobs(source: pathlib.Path, folder: pathlib.Path, suffix: str) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """(input, output) of every picture; inputs that share a stem keep their suffix in the output's name."""
    if source.is_dir():
        files = list_images(source)
        if not files:
            known = ", ".join(PICTURE_SUFFIXES)
            raise InputError(f"{source}: holds no pictures (files that end in {known})")
    elif source.exists():
        files = [source]
    else:
        raise InputError(f"{source}: no such file or folder")
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise InputError(f"--output {folder}: is where the input lies, name another folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file, name a folder")
    stems = Counter(file.stem for file in files)
    names = [file.stem if stems[file.stem] == 1 else file.name.replace(".", "_") for file in files]
    return [(file, folder / f"{name}.{suffix}") for file, name in zip(files, names, strict=True)]


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be refused before the model is read."""
    from faithdiff_jax.inference.denoise import check_options
    from faithdiff_jax.weights.model_directory import ModelDirectory

    if not 0 <= arguments.seed < SEEDS:
        raise InputError(f"--seed {arguments.seed}: must be between 0 and {SEEDS - 1}")
    if not 0 < arguments.scale < float("inf"):
        raise InputError(f"--scale {arguments.scale}: must be a number above 0")
    if arguments.references is not None:
        if not arguments.compare:
            raise InputError("--references: is for --compare, which is not given")
        list_images(arguments.references)
    if arguments.captions is not None:
        if arguments.caption:
            raise InputError("--caption and --captions: give one of them")
        if not pathlib.Path(arguments.captions).is_dir():
            raise InputError(f"--captions {arguments.captions}: no such folder")
    check_options(
        ModelDirectory.open(arguments.model).config,
        arguments.steps,
        arguments.guidance,
        arguments.guidance_rescale,
        arguments.tile,
        arguments.overlap,
        arguments.tile_batch,
        arguments.sampler,
    )


def _load_model(arguments: argparse.Namespace):
    import jax

    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.sharding import make_mesh

    if arguments.cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(arguments.cache).expanduser()))
    mesh = None
    if arguments.mesh:
        data, _, fsdp = arguments.mesh.partition("x")
        if not (data.isdigit() and fsdp.isdigit()):
            raise InputError(f"--mesh {arguments.mesh}: must be DATAxFSDP, such as 4x2")
        mesh = make_mesh(data=int(data), fsdp=int(fsdp))
    dtype = None if arguments.dtype == "auto" else np.dtype(arguments.dtype)
    return FaithDiff.load(arguments.model, dtype=dtype, mesh=mesh, vae_tile=arguments.vae_tile)


@contextlib.contextmanager
def _log_above_the_bar() -> Iterator[None]:
    """Show what the package logs, such as when it compiles, while pictures are restored."""
    log = logging.getLogger("faithdiff_jax")
    before = log.handlers, log.propagate, log.level
    log.handlers, log.propagate = [_BarHandler()], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


class _BarHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def _parser() -> Parser:
    parser = Parser("Restore a photograph, or every photograph of a folder.")
    add = parser.add_argument
    add("--model", metavar="DIR", help="model directory, from convert_weights.py; without it, the small one included")
    add("--input", required=True, metavar="PATH", help="a picture (JPEG, PNG, WebP, TIFF) or a folder of them")
    add("--output", required=True, metavar="DIR", help="folder for the results")
    add("--format", choices=FORMATS, default="png", help="of the results; webp and tif are lossless too")
    add("--overwrite", action="store_true", help="do pictures again whose result exists")
    add("--scale", type=float, help="how many times larger each side becomes: 2, or 4 with the small model")
    add("--compare", action="store_true", help="also write NAME_compare.png: input, bicubic, restored, and original")
    add("--references", metavar="DIR", help="folder with the originals, of the inputs' names, for --compare")
    add("--caption", default="", metavar="TEXT", help="what the picture shows, used as it is")
    add("--captions", metavar="DIR", help="folder with a .json (key caption) or .txt for each picture")
    add("--keep-captions", action="store_true", help="use caption files as they are, without the published trimming")
    add("--negative-caption", default="", metavar="TEXT", help="what guidance leads away from")
    add("--steps", type=int, default=20, help="denoising steps, 1 to 1000")
    add("--guidance", type=float, help="weight of the caption, 1 or less for none: 5, or 1 with the small model")
    add("--guidance-rescale", type=float, default=0.0, help="0 to 1, against overexposure at high guidance")
    add("--sampler", choices=("euler", "ddpm"), default="euler", help="deterministic, or ancestral")
    add("--start", choices=("lr", "noise"), default="lr", help="start from the noised input or from noise alone")
    add("--color-fix", choices=("adain", "wavelet", "none"), help="colours of the input: adain; small model: wavelet")
    levels = "coarser than 2^N pixels is the input's, 1 to 10: 5; small model: 2"
    add("--wavelet-levels", type=int, choices=range(1, 11), metavar="N", help=levels)
    add("--seed", type=int, default=42, help="of all noise")
    add("--tile", type=int, default=128, help="side of a tile in latent pixels (8 image pixels each for SDXL)")
    add("--overlap", type=float, default=0.5, help="stride of the tiles as a fraction of a tile, as published")
    add("--tile-batch", type=int, default=1, help="tiles that go through the UNet together")
    add("--vae-tile", type=int, default=1024, help="image pixels above which encoders and decoder work in tiles")
    add("--multiple", type=int, default=8, help="pad sides to a multiple of this; larger means fewer compilations")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16, on CPU float32")
    add("--mesh", metavar="DATAxFSDP", help="spread over devices: batch over both, parameters over the second")
    add("--cache", default="~/.cache/faithdiff-jax", metavar="DIR", help="for compiled programs; '' for none")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
