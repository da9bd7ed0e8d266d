"""Several models that share files: what is equal to a file of another model directory becomes a hard link to it."""

import os
import pathlib

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import replacing
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import verify


def check_can_share(output: pathlib.Path, other: pathlib.Path) -> None:
    """See beforehand that `output`, which is to be written, may have links to the files of `other`.

    Raises:
        InputError: `other` is no model directory, or is on another disk.
    """
    ModelDirectory.open(other, verify=False)
    there = output.absolute()
    while not there.exists():
        there = there.parent
    if there.stat().st_dev != other.stat().st_dev:
        raise InputError(f"--share {other}: is on another disk than {output}; files can be shared on one disk only")


def share_files(model: pathlib.Path, other: pathlib.Path) -> int:
    """Replace each file of `model` that a file of `other` is equal to by a hard link to that one.

    Files are taken for equal by size and SHA-256, and those of `other` are read to see that they are what they were.
    Both directories stay complete whatever happens to the other: a file is gone when no directory has it any more.

    Args:
        model: a model directory.
        other: another one, on the same disk.

    Returns:
        Bytes that lie on the disk once now and lay there twice.

    Raises:
        InputError: one of the two is no model directory, a file of `other` is damaged, or the disk knows no links.
    """
    ours, theirs = ModelDirectory.open(model, verify=False), ModelDirectory.open(other, verify=False)
    by_content = {record: name for name, record in theirs.files.items()}
    saved = 0
    for name, record in ours.files.items():
        twin = name if theirs.files.get(name) == record else by_content.get(record)
        if twin is None or (theirs.path / twin).samefile(ours.path / name):
            continue
        verify(theirs.path, {twin: record})
        with replacing(ours.path / name) as temporary:
            os.link(theirs.path / twin, temporary)
        saved += record.bytes
    return saved
