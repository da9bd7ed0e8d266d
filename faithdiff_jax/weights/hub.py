"""Find published files: in a local folder, or in a Hugging Face repository, of which only what is needed is fetched.

DIR_OR_REPO + what is wanted of its file names -> local folder
file names + variant -> the one weight file (or index of shards) to read
"""

import contextlib
import fnmatch
import logging
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, place
from faithdiff_jax.weights.tensor_files import TORCH_SUFFIXES

Names = Collection[str]
"""Files of a folder or repository, relative to it, with forward slashes."""

DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = ("model", "pytorch_model")
FAITHDIFF = ("FaithDiff", "FaithDiff")
"""What weight files are called: the stem of .safetensors and that of .bin."""

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(given: str, wanted: Callable[[Names], list[str]]) -> pathlib.Path:
    """The folder `given`; where there is none, the files of the repository `given` that `wanted` picks by name.

    Raises:
        InputError: neither a folder, nor a repository that can be reached or was fetched before.
    """
    folder = place(given)
    if is_remote(given) or folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{given}: is a file; a folder or a repository id is needed")
    if not REPO_ID.fullmatch(given):
        raise InputError(f"{given}: no such folder (and a Hugging Face repository id is owner/name)")
    return _fetch(given, wanted)


def model_folder(given: str | os.PathLike[str]) -> pathlib.Path:
    """A model directory: the folder `given`, or the files of one that is the repository `given`, fetched.

    Raises:
        InputError: as `local_folder`.
    """
    return local_folder(os.fspath(given), _model_files)


def _model_files(names: Names) -> list[str]:
    """What belongs to a model directory, as `ModelDirectory.write` makes it."""
    return [name for name in names if fnmatch.fnmatchcase(name, "*.safetensors") and "/" not in name] + [
        name for name in names if name in ("config.yaml", "README.md") or re.match(r"tokenizer(_[0-9]+)?/", name)
    ]


def weight_file(given: str, stems: tuple[str, str], variant: str | None) -> pathlib.Path:
    """Weights of one network: a local file or folder, or `owner/name`, or `owner/name/file` of a repository.

    In a folder or repository it is a file of these `stems`, such as `FaithDiff.safetensors`, `FaithDiff.bin` or an
    index of such, or else the only weight file there is. A `config.json` beside it is fetched as well.

    Raises:
        InputError: nothing of the kind, or more than one weight file to choose from.
    """
    path = pathlib.Path(given)
    if path.is_file():
        return path
    if path.is_dir():
        return path / _weight_name(file_names(path), stems, variant, given)
    owner, _, rest = given.partition("/")
    name, _, file = rest.partition("/")
    if not REPO_ID.fullmatch(f"{owner}/{name}"):
        raise InputError(f"{given}: no such file (and a repository id is owner/name, or owner/name/file)")

    def chosen(names: Names) -> str:
        if file and file not in names:
            raise InputError(f"{given}: the repository {owner}/{name} has no file {file}")
        return file or _weight_name(names, stems, variant, given)

    folder = _fetch(
        f"{owner}/{name}",
        lambda names: [*with_shards(names, chosen(names)), *(name for name in names if name == "config.json")],
    )
    return folder / chosen(file_names(folder))


def file_names(folder: pathlib.Path) -> list[str]:
    """The files of a folder and of the folders in it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()
    )


def weight_names(stems: tuple[str, str], variant: str | None) -> list[str]:
    """What the weights of a model may be called, in the order they are tried."""
    candidates = []
    for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
        if variant is None:
            candidates += [f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"]
        else:
            # diffusers and transformers put the variant into an index's name in different places.
            candidates += [f"{stem}.{variant}.{suffix}", f"{stem}.{suffix}.index.{variant}.json"]
            candidates += [f"{stem}.{variant}.{suffix}.index.json"]
    return candidates


def choose_weights(names: Names, folder: str, stems: tuple[str, str], variant: str | None) -> str | None:
    """The weight file of `folder` ("" for the root) among `names`, or None.

    The variant asked for comes first, then full precision, then fp16; safetensors before `.bin`.
    """
    prefix = f"{folder}/" if folder else ""
    for kind in dict.fromkeys((variant, None, "fp16")):
        for name in weight_names(stems, kind):
            if prefix + name in names:
                return prefix + name
    return None


def with_shards(names: Names, chosen: str) -> list[str]:
    """`chosen`, and if it is an index the files that belong to it by their names."""
    if not chosen.endswith(".json"):
        return [chosen]
    folder, _, index = chosen.rpartition("/")
    parts = [part for part in index.split(".") if part not in ("index", "json")]
    suffixes = [part for part in parts if part == "safetensors" or f".{part}" in TORCH_SUFFIXES]
    stem = ".".join(part for part in parts if part not in suffixes)
    shard = f"{folder}/{stem}-*.{suffixes[0]}" if folder else f"{stem}-*.{suffixes[0]}"
    return [chosen, *fnmatch.filter(names, shard)]


def _weight_name(names: Names, stems: tuple[str, str], variant: str | None, given: str) -> str:
    chosen = choose_weights(names, "", stems, variant)
    if chosen is not None:
        return chosen
    weights = [name for name in names if pathlib.PurePath(name).suffix in (".safetensors", *TORCH_SUFFIXES)]
    if len(weights) != 1:
        found = f"holds {', '.join(weights)}: name one of them" if weights else "holds no weight file"
        raise InputError(f"{given}: has no {stems[0]}.safetensors or {stems[1]}.bin, and {found}")
    return weights[0]


def _fetch(repo: str, wanted: Callable[[Names], list[str]]) -> pathlib.Path:
    """Download what `wanted` picks of a repository; without a connection, what is there of an earlier download."""
    import huggingface_hub

    print(f"{repo}: nothing of that name here, asking Hugging Face for a repository")
    # What goes wrong here comes as exceptions of three libraries without a common ancestor.
    with _no_retry_notices():
        try:
            names = huggingface_hub.list_repo_files(repo)
        except Exception as error:
            try:
                return pathlib.Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
            except Exception:
                raise InputError(
                    f"{repo}: no such folder or file here, and as a Hugging Face repository: {_reason(error)}"
                ) from None
        chosen = wanted(names)
        try:
            return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=chosen))
        except Exception as error:
            raise InputError(f"{repo}: could not be fetched: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its terms must be accepted on its page first, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is none of that name (or it is private: log in with `hf auth login`)"
    return f"it cannot be reached ({(str(error) or type(error).__name__).strip().splitlines()[0]})"


@contextlib.contextmanager
def _no_retry_notices() -> Iterator[None]:
    """The client reports each retry of a failed request; the error at the end says it all."""
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
