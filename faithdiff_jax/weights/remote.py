"""Model directories of an object store: parameters are read by slices, so that each machine has a copy of its own."""

import logging
import pathlib
import shutil
from collections.abc import Mapping

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import CACHE, reached
from faithdiff_jax.files.writing import whole
from faithdiff_jax.weights.safetensors_format import FileRecord
from faithdiff_jax.weights.stored_files import CONFIG, verify

log = logging.getLogger("faithdiff_jax")


def fetched(folder: pathlib.Path, files: Mapping[str, FileRecord], digest: str) -> pathlib.Path:
    """The copy on this machine of a remote model directory, fetched if there is none yet.

    Args:
        folder: the remote directory.
        files: what `config.yaml` lists.
        digest: that of `config.yaml`, by which a copy is known: another model at the same place is another copy.

    Returns:
        A folder of the cache.

    Raises:
        InputError: a file is missing, is not what its checksum says, or cannot be reached; or the disk is full.
    """
    copy = pathlib.Path(CACHE).expanduser() / "models" / digest[:32]
    if copy.is_dir():
        return copy
    size = sum(record.bytes for record in files.values())
    log.info("%s: fetching %.1f GB to %s", folder, size / 1e9, copy)
    try:
        with whole(copy, size) as temporary:
            for name in (*files, CONFIG):
                target = temporary / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with reached(folder / name), (folder / name).open("rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 2**24)
            verify(temporary, files)
    except InputError:
        if not copy.is_dir():  # unless another process of this machine was faster
            raise
    return copy
