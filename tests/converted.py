"""One tiny published model, converted and loaded once for all tests of a run."""

import functools
import pathlib
import tempfile

from published import PublishedModels, write_published

from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.weights.from_torch import Published, Track, convert, untracked


def convert_files(output: pathlib.Path, *, track: Track = untracked, **published: object) -> None:
    """`convert` of what `Published` names."""
    paths = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in published.items()}
    convert(Published(**paths), output, track=track)


@functools.cache
def published_and_converted(*, sd21: bool = False) -> tuple[PublishedModels, pathlib.Path]:
    """The torch modules, and the model directory that the converter made of their files."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-test-"))
    models = write_published(folder, sd21=sd21)
    convert_files(folder / "model", sdxl=models.sdxl, vae=models.vae_folder, faithdiff=models.faithdiff)
    return models, folder / "model"


@functools.cache
def loaded(*, sd21: bool = False) -> FaithDiff:
    """The converted model, loaded."""
    return FaithDiff.load(published_and_converted(sd21=sd21)[1])
