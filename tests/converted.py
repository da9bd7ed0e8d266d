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


def published_and_converted(*, sd21: bool = False, prediction: str = "epsilon") -> tuple[PublishedModels, pathlib.Path]:
    """The torch modules, and the model directory that the converter made of their files."""
    return _converted(sd21, prediction)


def loaded(*, sd21: bool = False, prediction: str = "epsilon") -> FaithDiff:
    """The converted model, loaded."""
    return _loaded(sd21, prediction)


@functools.cache
def _converted(sd21: bool, prediction: str) -> tuple[PublishedModels, pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faithdiff-test-"))
    models = write_published(folder, sd21=sd21, prediction=prediction)
    convert_files(folder / "model", sdxl=models.sdxl, vae=models.vae_folder, faithdiff=models.faithdiff)
    return models, folder / "model"


@functools.cache
def _loaded(sd21: bool, prediction: str) -> FaithDiff:
    return FaithDiff.load(_converted(sd21, prediction)[1])
