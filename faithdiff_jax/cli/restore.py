"""`faithdiff restore`: restore a photograph, or a folder of them.

flags -> RestoreOptions, checked against the model -> files, captions, outputs still to do
each picture -> FaithDiff.restore -> PNG or another format, whole or not at all
restored, input, original -> NAME_compare.png, if asked for
maps of words of the caption -> NAME_attribution_WORD.png, if asked for
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli import describe
from faithdiff_jax.cli.command import Parser, report_faults, trace
from faithdiff_jax.cli.exit_codes import DONE
from faithdiff_jax.cli.explain import explain
from faithdiff_jax.cli.progress import log_above_the_bar, say
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.attribution import attribution_sheet
from faithdiff_jax.evaluation.pictures import comparison
from faithdiff_jax.files import images as images_
from faithdiff_jax.files.captions import find_caption, read_caption, trim_caption
from faithdiff_jax.files.listing import PICTURE_SUFFIXES, list_images
from faithdiff_jax.inference.options import WHOLE_NUMBERS, RestoreOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.weights.model_directory import ModelDirectory

FORMATS = ("png", "jpg", "webp", "tif")
PARSERS: dict[Any, Callable[[str], Any]] = {
    int: types.integer,
    float: types.number,
    str: str,
    WHOLE_NUMBERS: types.wholes,
}
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", WHOLE_NUMBERS: "N,N,..."}


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture: where it is, where its result goes, and where a comparison and the maps of words would go."""

    source: pathlib.Path
    target: pathlib.Path
    sheet: pathlib.Path
    maps: dict[str, pathlib.Path]


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser("Restore a photograph, or every photograph of a folder.")
    add_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Restore every picture that has no output yet; bad ones are listed at the end; the exit code is the worst."""
    _check_companions(arguments)
    options, stored = _options(arguments)
    if arguments.attribute:
        options.check_attribution()
    mesh = _mesh(arguments.mesh)
    _check_words(arguments, stored)
    loras = _loras(arguments, stored)
    jobs = plan_jobs(arguments.input, arguments.output, arguments.format, arguments.attribute)
    todo = [job for job in jobs if arguments.overwrite or not os.path.lexists(job.target)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} already done, skipped (--overwrite does them again)")
    if not todo:
        return DONE

    if len(jobs) == 1:  # a bad picture need not wait for the model
        image = images_.load_image(todo[0].source).rgb
        options.padded_size(stored.config, *image.shape[:2])
    faults, code = [], DONE
    with log_above_the_bar():
        with _made(arguments.output):
            made = describe.captions_for([job.source for job in todo], arguments)
            model = _load_model(stored, arguments, mesh, loras)
        with _profiled(arguments.profile), tqdm(todo, unit="picture", disable=len(todo) == 1) as bar:
            for job in bar:
                try:
                    _restore_one(model, job, options, arguments, made.get(job.source))
                except BrokenPipeError:  # whoever read our output has gone
                    raise
                except Exception as error:  # no reason to stop, whatever it is
                    if len(jobs) == 1:
                        raise
                    trace(error)
                    its_code, line = explain(error)
                    code = max(code, its_code)  # bad input goes before a failed run
                    faults.append(line if str(job.source) in line else f"{job.source}: {line}")
                else:
                    say(f"{job.source} -> {job.target}")
    report_faults(faults, len(todo), "pictures could not be restored")
    return code


@contextlib.contextmanager
def _made(folder: pathlib.Path) -> Iterator[None]:
    """A folder that is made before work that takes long, and taken away if that fails and it was not there."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):  # somebody put something in
                folder.rmdir()
        raise


def _restore_one(
    model: "FaithDiff",
    job: Job,
    options: RestoreOptions,
    arguments: argparse.Namespace,
    made: str | InputError | None,
) -> None:
    if isinstance(made, InputError):
        raise made
    picture = images_.load_image(job.source)
    images_.output_format(job.target, alpha=picture.alpha is not None)
    notes = list(picture.notes)
    caption = arguments.caption
    if made is not None:
        caption = made
        notes.append(f"described as {caption!r}")
    if arguments.captions is not None:
        found = find_caption(job.source, arguments.captions)
        if found is None:
            caption = ""
            notes.append("no caption found, restored without one")
        else:
            caption = read_caption(found) if arguments.keep_captions else trim_caption(read_caption(found))
    words = _words_of(model, caption, arguments.attribute, notes)
    maps: dict[str, np.ndarray] = {}
    if words:
        restored, maps = model.attribute(picture.rgb, caption, words, options)
    else:
        restored = model.restore(picture.rgb, caption, options)
    alpha = None
    if picture.alpha is not None:
        alpha = images_.upscale(picture.alpha, options.scale)
        notes.append("alpha upscaled with Lanczos")
    if picture.gray:
        notes.append("written as gray")
    if arguments.compare:
        reference = _reference(job.source, restored.shape, arguments.references)
        images_.save_image(job.sheet, comparison(picture.rgb, restored, reference), icc_profile=picture.icc_profile)
    for word, attribution in maps.items():
        images_.save_image(job.maps[word], attribution_sheet(restored, word, attribution))
    images_.save_image(job.target, restored, alpha=alpha, gray=picture.gray, icc_profile=picture.icc_profile)
    for note in notes:
        say(f"{job.source}: {note}")


def _words_of(model: "FaithDiff", caption: str, words: list[str], notes: list[str]) -> list[str]:
    """Those of the words that a caption has; of the others, a note."""
    found = []
    for word in words:
        try:
            model.tokenizers.positions(caption, word)
        except InputError as error:
            notes.append(f"no map: {error}")
        else:
            found.append(word)
    return found


def _reference(source: pathlib.Path, shape: tuple[int, ...], folder: pathlib.Path | None) -> np.ndarray | None:
    """The true picture of the same stem, if the folder of references has one."""
    found = [] if folder is None else [path for path in list_images(folder) if path.stem == source.stem]
    if not found:
        return None
    reference = images_.load_image(found[0]).rgb
    if reference.shape != shape:
        sizes = f"{reference.shape[1]}x{reference.shape[0]}, the restored picture {shape[1]}x{shape[0]}"
        raise InputError(f"{found[0]}: is {sizes}; they must be of one size (see --scale)")
    return reference


def plan_jobs(source: pathlib.Path, folder: pathlib.Path, suffix: str, words: Sequence[str] = ()) -> list[Job]:
    """One job for every picture, no two of which write to one file, on a file system that ignores case either.

    Inputs that share a stem keep their suffix in the result's name; a name that is still taken is numbered.

    Raises:
        InputError: no pictures, or a folder for the results that is the pictures' own.
    """
    if os.path.isdir(source):
        files = list_images(source)
        if not files:
            known = ", ".join(PICTURE_SUFFIXES)
            raise InputError(f"{source}: holds no pictures (files that end in {known})")
    elif os.path.exists(source):
        files = [source]
    else:
        raise InputError(f"{source}: no such file or folder")
    if os.path.realpath(folder) == os.path.realpath(source if os.path.isdir(source) else source.parent):
        raise InputError(f"--output {folder}: is where the input lies, name another folder")
    stems = Counter(_same_file(file.stem) for file in files)
    alone = [file for file in files if stems[_same_file(file.stem)] == 1]
    taken: set[str] = set()
    targets = {file: _free_name(file.stem, suffix, taken) for file in alone}
    for file in files:
        if file not in targets:
            targets[file] = _free_name(file.name.replace(".", "_"), suffix, taken)
    stem = {file: targets[file].removesuffix(f".{suffix}") for file in files}
    sheets = {file: folder / _free_name(f"{stem[file]}_compare", "png", taken) for file in files}
    maps = {
        file: {word: folder / _free_name(f"{stem[file]}_attribution_{_slug(word)}", "png", taken) for word in words}
        for file in files
    }
    return [Job(file, folder / targets[file], sheets[file], maps[file]) for file in files]


def _slug(word: str) -> str:
    """A word of a caption as part of a file's name: letters and digits, not too many."""
    return re.sub(r"\W+", "_", word).strip("_")[:40] or "word"


def _free_name(stem: str, suffix: str, taken: set[str]) -> str:
    """`stem`.`suffix`, or `stem`_2.`suffix` and so on; marked as taken."""
    name, number = f"{stem}.{suffix}", 1
    while _same_file(name) in taken:
        number += 1
        name = f"{stem}_{number}.{suffix}"
    taken.add(_same_file(name))
    return name


def _same_file(name: str) -> str:
    """Equal for names that some file system takes for one: of other case, or other Unicode composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _options(arguments: argparse.Namespace) -> tuple[RestoreOptions, "ModelDirectory"]:
    """The model's defaults with the flags that were given, checked against the model; and the model, opened."""
    from faithdiff_jax.inference.loading import chosen, default_options, preset_options
    from faithdiff_jax.weights.model_directory import ModelDirectory

    names = [field.name for field in dataclasses.fields(RestoreOptions)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    RestoreOptions(**given)  # flags out of their range are told before anything is read
    stored = ModelDirectory.open(arguments.model or SMALL_MODEL)
    preset = arguments.preset
    options = default_options(stored) if preset is None else chosen(preset_options(stored), preset)
    options = options.replace(**given)
    options.check_against(stored.config)
    return options, stored


def _check_companions(arguments: argparse.Namespace) -> None:
    """Flags that need another one, or exclude it."""
    if arguments.references is not None and not arguments.compare:
        raise InputError("--references: is for --compare, which is not given")
    if arguments.captions is not None and arguments.caption:
        raise InputError("--caption and --captions: give one of them")
    describe.check(arguments)
    if arguments.attribute and not (arguments.captions or arguments.caption or arguments.caption_from):
        raise InputError("--attribute: is for words of a caption, give --caption, --captions or --caption-from")


def _check_words(arguments: argparse.Namespace, stored: "ModelDirectory") -> None:
    """Words to attribute to must be in the one caption of all pictures: told before the model is read."""
    if arguments.attribute and arguments.caption:
        from faithdiff_jax.files.tokenizers import Tokenizers

        tokenizers = Tokenizers.load(stored.tokenizers)
        for word in arguments.attribute:
            tokenizers.positions(arguments.caption, word)


def _loras(arguments: argparse.Namespace, stored: "ModelDirectory") -> dict[str, float]:
    """LoRA files and their weights; that they are for this model is seen before the model is read."""
    loras = dict(arguments.lora)
    if len(loras) < len(arguments.lora):
        raise InputError("--lora: a file is given twice, give it once, with the sum of the weights")
    if loras:
        from faithdiff_jax.inference.loading import open_loras

        open_loras(loras, stored)
    return loras


def _mesh(sides: tuple[int, int] | None) -> "Mesh | None":
    """The mesh of devices; that the sides fit them is checked before anything is read."""
    if sides is None:
        return None
    from faithdiff_jax.sharding import make_mesh

    return make_mesh(data=sides[0], fsdp=sides[1])


def _profiled(folder: pathlib.Path | None) -> contextlib.AbstractContextManager[None]:
    """A profile of what is done inside, compiling included, if there is a folder for it."""
    if folder is None:
        return contextlib.nullcontext()
    import jax

    folder.mkdir(parents=True, exist_ok=True)
    return jax.profiler.trace(str(folder))


def _load_model(
    stored: "ModelDirectory", arguments: argparse.Namespace, mesh: "Mesh | None", loras: dict[str, float]
) -> "FaithDiff":
    import jax

    from faithdiff_jax.inference.pipeline import FaithDiff

    if arguments.cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(arguments.cache).expanduser()))
        # JAX's own second leaves out most programs of a small model, which a folder of sizes compiles by the dozen.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    return FaithDiff.load(stored, dtype=dtype, mesh=mesh, loras=loras, quantized=arguments.quantized)


def add_flags(parser: Parser, options: type[RestoreOptions] = RestoreOptions) -> None:
    """The command's flags: files and devices here, everything else from the fields of `options`."""
    add = parser.add_argument
    add(
        "--model",
        type=types.path,
        metavar="DIR",
        help="model directory, from faithdiff convert; else the small one included",
    )
    add(
        "--preset",
        type=types.nonempty,
        metavar="NAME",
        help="one of the model's presets of the options below; the small one has faithful and detailed",
    )
    add(
        "--lora",
        type=types.weighted_file,
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="LoRA for SDXL to add to the model, such as style.safetensors=0.8; may be repeated",
    )
    add(
        "--input", type=types.path, required=True, metavar="PATH", help="a picture (JPEG, PNG, WebP, TIFF), or a folder"
    )
    add("--output", type=types.output_folder, required=True, metavar="DIR", help="folder for the results")
    add("--format", choices=FORMATS, default="png", help="of the results; webp and tif are lossless too")
    add("--overwrite", action="store_true", help="do pictures again whose result exists")
    add("--compare", action="store_true", help="also write NAME_compare.png: input, bicubic, restored, and original")
    add(
        "--references",
        type=types.folder,
        metavar="DIR",
        help="folder with the originals, named as the inputs, for --compare",
    )
    add("--caption", default="", metavar="TEXT", help="what the picture shows, used as it is")
    add(
        "--captions",
        type=types.folder,
        metavar="DIR",
        help="folder with a .json (key caption) or .txt for each picture",
    )
    add("--keep-captions", action="store_true", help="use caption files as they are, without the published trimming")
    add(
        "--attribute",
        type=types.nonempty,
        action="append",
        default=[],
        metavar="WORD",
        help="also write NAME_attribution_WORD.png: where this word of the caption took effect; may be repeated",
    )
    describe.add_flags(parser)
    add("--dtype", choices=types.DTYPES, default="auto", help="auto: bfloat16, on CPU float32")
    add(
        "--quantized",
        choices=types.EIGHT_BITS,
        help="hold the kernels of UNet and text encoders in 8 bits: half the memory of bfloat16",
    )
    add(
        "--mesh",
        type=types.mesh,
        metavar="DATAxFSDP",
        help="spread over devices: batch over both, parameters over the second",
    )
    add(
        "--profile",
        type=types.output_folder,
        metavar="DIR",
        help="folder for a profile of the restoring, which TensorBoard and xprof show",
    )
    add("--cache", default="~/.cache/faithdiff-jax", metavar="DIR", help="for compiled programs; '' for none")
    group = parser.add_argument_group(
        "options of a restoration",
        "A model directory has defaults of its own; those named here are the published ones.",
    )
    for field in dataclasses.fields(options):
        about = field.metadata["about"]
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        limits = f"; {about.range}" if about.kind is not str else ""
        group.add_argument(
            about.flag or f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=PARSERS[about.kind],
            choices=about.among or None,
            metavar=None if about.among else METAVARS[about.kind],
            default=argparse.SUPPRESS,
            help=f"{about.help}{limits}{default}",
        )
