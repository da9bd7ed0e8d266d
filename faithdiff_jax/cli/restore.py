"""`faithdiff restore`: restore a photograph, or a folder of them.

flags -> RestoreOptions, checked against the model -> files, captions, outputs still to do
jobs (see `jobs`) -> batches of one padded size, read, restored and written (see `folder_run`)
"""

import argparse
import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from faithdiff_jax.cli import describe, frames
from faithdiff_jax.cli.command import Parser, report_faults
from faithdiff_jax.cli.jobs import Job, plan_jobs
from faithdiff_jax.cli.option_flags import load_model, lora_files, mesh_of, model_options
from faithdiff_jax.cli.progress import log_above_the_bar
from faithdiff_jax.cli.restore_flags import add_flags
from faithdiff_jax.cli.restore_records import choose
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images as images_
from faithdiff_jax.files import manifest
from faithdiff_jax.files.captions import find_caption
from faithdiff_jax.files.writing import remove_unfinished
from faithdiff_jax.inference.making import Making
from faithdiff_jax.inference.options import RestoreOptions

if TYPE_CHECKING:
    from faithdiff_jax.weights.model_directory import ModelDirectory


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser("Restore a photograph, or every photograph of a folder.")
    add_flags(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Restore every picture that has no output yet; bad ones are listed at the end; the exit code is the worst."""
    _check_companions(arguments)
    options, stored = model_options(arguments)
    if arguments.attribute:
        options.check_attribution()
    if arguments.tile_captions:
        options.check_tile_captions()
    mesh = mesh_of(arguments.mesh)
    _check_words(arguments, stored)
    loras = lora_files(arguments, stored)
    seeds = _seeds(arguments, options)
    jobs = plan_jobs(arguments.input, arguments.output, arguments.format, arguments.attribute, seeds)
    if arguments.frames is not None:
        jobs = frames.ordered(jobs)
    with log_above_the_bar(), _made(arguments.output), _manifest(arguments) as kept:
        if not arguments.shared:
            remove_unfinished(arguments.output)
        making = Making(options, stored.digest, loras, arguments.dtype, arguments.quantized, arguments.frames)
        todo, left_out = choose(jobs, kept, making, arguments)
        code = report_faults(left_out, len(jobs), "results failed before and are left out (--retry-failed)")
        if not todo:
            return code
        if arguments.captions is not None and len(jobs) > 1:
            _check_captions(arguments.captions, jobs)
        if len(jobs) == 1:  # a bad picture need not wait for the model
            image = images_.load_image(todo[0].source).rgb
            options.padded_size(stored.config, *image.shape[:2])
        from faithdiff_jax.inference.tile_captions import tile_boxes

        boxes = functools.partial(tile_boxes, options, stored.config)
        made = describe.captions_for(list(dict.fromkeys(job.source for job in todo)), arguments, boxes)
        model = load_model(stored, arguments, mesh, loras)

        from faithdiff_jax.cli.folder_run import FolderRun

        work = FolderRun(model, making, kept, arguments, made, list(dict.fromkeys(job.source for job in jobs)))
        try:
            with _profiled(arguments.profile):
                work.restore(todo, alone=len(jobs) == 1)
        finally:
            report_faults(work.faults, len(todo), "pictures could not be restored")
    return max(code, work.code)


def _manifest(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[manifest.Manifest]:
    return manifest.opened(arguments.output, shared=arguments.shared)


def _seeds(arguments: argparse.Namespace, options: RestoreOptions) -> Sequence[int]:
    """The seeds that every picture is restored with."""
    if arguments.seeds is None:
        return [options.seed]
    if hasattr(arguments, "seed"):
        raise InputError("--seed and --seeds: give one of them")
    for number, seed in enumerate(arguments.seeds):
        options.replace(seed=seed)
        if seed in arguments.seeds[:number]:
            raise InputError(f"--seeds: {seed} is given twice, give each seed once")
    seeds: Sequence[int] = arguments.seeds
    return seeds


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


def _check_companions(arguments: argparse.Namespace) -> None:
    """Flags that need another one, or exclude it."""
    if arguments.references is not None and not arguments.compare:
        raise InputError("--references: is for --compare, which is not given")
    if arguments.captions is not None and arguments.caption:
        raise InputError("--caption and --captions: give one of them")
    if arguments.shared and arguments.overwrite:
        raise InputError("--shared and --overwrite: give one of them, no process knows what another has done again")
    describe.check(arguments)
    frames.check(arguments)
    if arguments.attribute and not (arguments.captions or arguments.caption or arguments.caption_from):
        raise InputError("--attribute: is for words of a caption, give --caption, --captions or --caption-from")


def _check_captions(folder: pathlib.Path, jobs: Sequence[Job]) -> None:
    """InputError for a folder that has a caption for none of the pictures: it must be that of others."""
    if not any(find_caption(job.source, folder) for job in jobs):
        wanted = f"{jobs[0].source.stem}.json or {jobs[0].source.stem}.txt, for instance"
        raise InputError(f"--captions {folder}: has a caption for none of the pictures ({wanted})")


def _check_words(arguments: argparse.Namespace, stored: "ModelDirectory") -> None:
    """Words to attribute to must be in the one caption of all pictures: told before the model is read."""
    if arguments.attribute and arguments.caption:
        from faithdiff_jax.files.tokenizers import Tokenizers

        tokenizers = Tokenizers.load(stored.tokenizers)
        for word in arguments.attribute:
            tokenizers.positions(arguments.caption, word)


def _profiled(folder: pathlib.Path | None) -> contextlib.AbstractContextManager[None]:
    """A profile of what is done inside, compiling included, if there is a folder for it."""
    if folder is None:
        return contextlib.nullcontext()
    import jax

    from faithdiff_jax.training.profile import settings

    folder.mkdir(parents=True, exist_ok=True)
    return jax.profiler.trace(str(folder), profiler_options=settings())
