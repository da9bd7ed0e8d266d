"""Published weights -> model directory.

    diffusers folder + VAE folder + FaithDiff.bin -> config, parts -> check -> MODEL_DIR

Tensors go through one by one, and nothing is written before all of them are known to fit.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.writing import refuse_existing
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import numbered, part_names, part_shapes
from faithdiff_jax.weights import hub, open_clip_names, published_baselines, published_configs, rules, single_file
from faithdiff_jax.weights.initialisation import initial_alignment, lq_encoder_from_vae
from faithdiff_jax.weights.keymap import KeyMap, compare
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents
from faithdiff_jax.weights.tensor_files import TensorSource, open_tensors, with_current_vae_names, with_text_model_names
from faithdiff_jax.weights.tokenizer_files import tokenizer_files

FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))
LARGEST_TILE = 2**14
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""(items, what they are, how many) -> the same items, while progress is shown."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model, and where its tensors come from."""

    name: str
    keymap: KeyMap
    source: TensorSource
    origin: str
    """The file, or what else it is made of, for messages and provenance."""
    derived: bool = False
    """Made from another part's source: it fits if that does."""

    def contents(self, track: Track) -> Contents:
        """The part as a model directory holds it."""
        dtypes, entries = self.source.dtypes(), self.keymap.entries
        specs = {entry.path: (dtypes[entry.published[0]], entry.shape) for entry in entries}
        return Contents(specs, track(self.keymap.read(self.source.get), self.name, len(entries)))

    def provenance(self) -> dict[str, Any]:
        """What `config.yaml` says of the part."""
        dtypes = self.source.dtypes()
        used = sorted({dtypes[name].name for name in self.keymap.published_shapes()})
        files = [{"name": file.name, "bytes": file.stat().st_size} for file in self.source.files]
        return {"origin": self.origin, "dtype": ", ".join(used), "files": files}


def untracked(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """Show nothing."""
    return items


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Published weights: what to convert.

    Attributes:
        sdxl: a diffusers folder or repository id of SDXL or SD 2.1: text encoders, tokenizers, scheduler and the UNet's
            architecture.
        vae: the folder or repository id of the VAE, with its files at the root or under `vae/`; or a file that holds
            one, of `sdxl`'s architecture (see `single_file`); None for `sdxl`'s.
        faithdiff: file or repository of FaithDiff's own weights; None prepares a model for training, with `sdxl`'s
            UNet, the VAE's encoder as LQ encoder and an initial aligner.
        unet: a file that holds a UNet of `sdxl`'s architecture, to take instead of `sdxl`'s; without `faithdiff`.
        text_encoder: a file that holds the text encoders, to take instead of `sdxl`'s (see `open_clip_names`).
        controlnet: file, folder or repository of a ControlNet or ControlNet-XS for `sdxl`'s UNet, as diffusers writes
            it; without `faithdiff`.
        variant: which files to prefer where there are several, such as "fp16"; None for full precision.
        seed: of the initial aligner.
    """

    sdxl: str
    vae: str | None = None
    faithdiff: str | None = None
    unet: str | None = None
    text_encoder: str | None = None
    controlnet: str | None = None
    variant: str | None = None
    seed: int = 0


def convert(
    published: Published,
    output: pathlib.Path | str,
    *,
    defaults: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    track: Track = untracked,
) -> None:
    """Write a model directory from published weights.

    Args:
        published: where the weights are.
        output: the model directory; it must not exist, or be empty.
        defaults: the model's own defaults of restoring, which go into its configuration.
        allow_nonfinite: whether tensors may hold NaN or infinite numbers.
        track: shows progress.

    Raises:
        InputError: anything that is missing, damaged, unsupported or does not fit; every tensor at fault is named.
    """
    sdxl, vae, faithdiff, variant = published.sdxl, published.vae, published.faithdiff, published.variant
    given = {"unet": published.unet, "vae": vae, "text_encoder": published.text_encoder}
    single = {part: pathlib.Path(file) for part, file in given.items() if file and pathlib.Path(file).is_file()}
    for part in ("unet", "text_encoder"):
        if given[part] is not None and part not in single:
            raise InputError(f"{given[part]}: no such file")
    if faithdiff is not None and "unet" in single:
        raise InputError(f"{published.unet}: FaithDiff's weights hold the UNet, leave one of the two out")
    if faithdiff is not None and published.controlnet is not None:
        raise InputError(f"{published.controlnet}: a ControlNet steers SDXL's UNet, not FaithDiff's: leave one out")
    output = pathlib.Path(output)
    refuse_existing(output)
    with_unet = faithdiff is None and "unet" not in single
    weights_of = {"unet": with_unet, "vae": vae is None, "text": "text_encoder" not in single}
    folder = hub.local_folder(sdxl, lambda names: _sdxl_files(names, variant, weights_of))
    other_vae = vae is not None and "vae" not in single
    vae_folder = hub.local_folder(str(vae), lambda names: _vae_files(names, variant)) if other_vae else folder
    vae_folder /= _vae_prefix(hub.file_names(vae_folder))
    encoders = _text_encoders(folder)
    _refuse_incomplete(folder)
    tokenizer_files(folder, numbered("tokenizer", len(encoders)))

    files = dict(single)
    if "vae" not in single:
        files["vae"] = _weights(vae_folder, hub.DIFFUSERS, variant)
    if "text_encoder" in single:
        files |= dict.fromkeys(encoders, single["text_encoder"])
    else:
        files |= {name: _weights(folder / name, hub.TRANSFORMERS, variant) for name in encoders}
    if with_unet:
        files["unet"] = _weights(folder / "unet", hub.DIFFUSERS, variant)
    elif faithdiff is not None:
        files["faithdiff"] = hub.weight_file(faithdiff, hub.FAITHDIFF, variant)
    if published.controlnet is not None:
        files["controlnet"] = hub.weight_file(published.controlnet, hub.DIFFUSERS, variant)
    if variant is not None and not any(f".{variant}." in file.name for file in files.values()):
        raise InputError(f"variant {variant}: none of the weight files found is of it")

    under = {file: single_file.UNDER for file in single.values()}
    sources = {name: open_tensors(file, under.get(file, ())) for name, file in files.items()}
    whole = {"unet": single_file.unet_of, "vae": single_file.vae_of}
    sources |= {part: whole[part](sources[part]) for part in single if part in whole}
    if "text_encoder" in single:
        for i, name in enumerate(encoders):
            sizes = _text_config(folder / name, len(encoders))
            sources[name] = open_clip_names.text_encoder_of(sources[name], i, sizes)
    sources = {
        name: with_text_model_names(source) if name in encoders else with_current_vae_names(source)
        for name, source in sources.items()
    }
    config = _config(folder, vae_folder, encoders, sources, files)
    parts = _parts(config, sources, files, published.seed)
    refuse_misfits(parts)

    provenance = {
        "sources": {"sdxl": sdxl, "vae": vae, "faithdiff": faithdiff}
        | {
            part: str(file)
            for part in ("unet", "text_encoder", "controlnet")
            if (file := getattr(published, part)) is not None
        },
        "variant": variant,
        "parts": {part.name: part.provenance() for part in parts},
    }
    contents = {part.name: part.contents(track) for part in parts}
    ModelDirectory.write(
        output,
        config,
        contents,
        tokenizers=folder,
        provenance=provenance,
        defaults={**_defaults(folder, config), **(defaults or {})},
        allow_nonfinite=allow_nonfinite,
    )


def _defaults(folder: pathlib.Path, config: FaithDiffConfig) -> dict[str, Any]:
    """What the published folder says of restoring: of a UNet that is not told its tile's size, which it is made for."""
    side = published_configs.Settings(folder / "unet" / "config.json").get("sample_size")
    fits = type(side) is int and config.unet.smallest_side <= side <= LARGEST_TILE
    return {"tile": side} if fits and config.unet.pooled_dim is None else {}


def _sdxl_files(names: hub.Names, variant: str | None, weights_of: Mapping[str, bool]) -> list[str]:
    """What is needed of a repository of SDXL or SD 2.1; of unet, vae and text the weights only where wanted."""
    encoders = [name for name in TEXT_ENCODERS if f"{name}/config.json" in names]
    configs = ["scheduler/scheduler_config.json", *(f"{name}/config.json" for name in ("unet", "vae", *encoders))]
    wanted = [name for name in names if name in configs or name.startswith(("tokenizer/", "tokenizer_2/"))]
    folders = dict.fromkeys(encoders, hub.TRANSFORMERS) if weights_of["text"] else {}
    folders |= {part: hub.DIFFUSERS for part in ("unet", "vae") if weights_of[part]}
    for folder, stems in folders.items():
        chosen = hub.choose_weights(names, folder, stems, variant)
        wanted += hub.with_shards(names, chosen) if chosen else []
    return wanted


def _vae_files(names: hub.Names, variant: str | None) -> list[str]:
    """What is needed of a VAE's repository."""
    prefix = _vae_prefix(names)
    chosen = hub.choose_weights(names, prefix, hub.DIFFUSERS, variant)
    return [f"{prefix}/config.json".lstrip("/"), *(hub.with_shards(names, chosen) if chosen else [])]


def _vae_prefix(names: hub.Names) -> str:
    return "vae" if "vae/config.json" in names else ""


def _text_encoders(folder: pathlib.Path) -> list[str]:
    return [name for name in TEXT_ENCODERS if name == TEXT_ENCODERS[0] or (folder / name / "config.json").is_file()]


def _refuse_incomplete(folder: pathlib.Path) -> None:
    wanted = ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: not a diffusers model folder, it has no {', no '.join(missing)}")


def _weights(folder: pathlib.Path, stems: tuple[str, str], variant: str | None) -> pathlib.Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: has no config.json beside its weights")
    chosen = hub.choose_weights(hub.file_names(folder), "", stems, variant)
    if chosen is None:
        wanted = ", ".join(hub.weight_names(stems, None))
        raise InputError(f"{folder}: has no weights (looked for {wanted}, and their fp16 variants)")
    return folder / chosen


def _config(
    folder: pathlib.Path,
    vae_folder: pathlib.Path,
    encoders: list[str],
    sources: Mapping[str, TensorSource],
    files: Mapping[str, pathlib.Path],
) -> FaithDiffConfig:
    faithdiff, controlnet = sources.get("faithdiff"), sources.get("controlnet")
    tensors = {name: len(source.shapes()) for name, source in sources.items()}
    unet = published_configs.unet_config(
        folder / "unet" / "config.json", tensors.get("unet", tensors.get("faithdiff", 0))
    )
    vae = published_configs.vae_config(vae_folder / "config.json", tensors["vae"])
    alignment = AlignmentConfig() if faithdiff is None else published_configs.alignment_config(list(faithdiff.shapes()))
    text = tuple(_text_config(folder / name, len(encoders), tensors[name]) for name in encoders)
    schedule = published_configs.schedule_config(folder / "scheduler" / "scheduler_config.json")
    try:
        lq_encoder = None if faithdiff is None else published_configs.lq_encoder_config(faithdiff.shapes(), vae)
        if controlnet is not None:
            beside = files["controlnet"].with_name("config.json")
            alignment, lq_encoder = published_baselines.steering_config(controlnet.shapes(), beside, unet)
        return FaithDiffConfig(
            unet=unet,
            vae=vae,
            lq_encoder=lq_encoder,
            lq_features=FaithDiffConfig.lq_features if controlnet is None else "hint",
            alignment=alignment,
            text_encoders=text,
            schedule=schedule,
        )
    except ValueError as error:
        raise InputError(f"{folder}: its parts do not go together: {error}") from None


def _text_config(
    folder: pathlib.Path, encoders: int, tensors: int = published_configs.MOST_TENSORS
) -> TextEncoderConfig:
    """The sizes of one of so many text encoders: SDXL conditions on the last layer's input, SD 2.1 on the output."""
    output = "penultimate" if encoders > 1 else "final"
    return published_configs.text_encoder_config(folder / "config.json", tensors, output=output)


def _parts(
    config: FaithDiffConfig, sources: dict[str, TensorSource], files: dict[str, pathlib.Path], seed: int
) -> list[Part]:
    keymaps = {name: KeyMap(rules.of_part(name, config), part_shapes(config, name)) for name in part_names(config)}

    def read(name: str, file: str) -> Part:
        return Part(name, keymaps[name], sources[file], str(files[file]))

    def derive(name: str, source: TensorSource, origin: str) -> Part:
        return Part(name, keymaps[name], source, origin, derived=True)

    parts = [read(name, name) for name in keymaps if name in sources]
    for file in ("faithdiff", "controlnet"):
        if file in sources:
            return parts + [read(name, file) for name in rules.published_parts(config)]
    aligner = initial_alignment(keymaps["alignment"].published_shapes(), seed)
    return [
        *parts,
        derive("lq_encoder", lq_encoder_from_vae(sources["vae"]), "the VAE's encoder"),
        derive("alignment", aligner, f"initialised with seed {seed}"),
    ]


def refuse_misfits(parts: list[Part]) -> None:
    """One InputError for every tensor of every file that is missing, unknown, mis-shaped or of the wrong dtype."""
    by_source: dict[TensorSource, list[Part]] = {}
    for part in parts:
        if not part.derived:
            by_source.setdefault(part.source, []).append(part)
    messages, count = [], 0
    for source, file_parts in by_source.items():
        wanted = {name: shape for part in file_parts for name, shape in part.keymap.published_shapes().items()}
        faults = compare(wanted, source.shapes()) + _dtype_faults(file_parts, source.dtypes())
        if faults:
            count += len(faults)
            messages.append(f"{file_parts[0].origin}: {'; '.join(faults)}")
    if messages:
        tensors = "1 tensor does" if count == 1 else f"{count} tensors do"
        raise InputError(f"{tensors} not fit this architecture: {' | '.join(messages)}")


def _dtype_faults(parts: list[Part], dtypes: dict[str, np.dtype]) -> list[str]:
    faults = []
    for entry in (entry for part in parts for entry in part.keymap.entries):
        found = {name: dtypes[name] for name in entry.published if name in dtypes}
        faults += [
            f"{name} is {dtype.name}, supported are {', '.join(kind.name for kind in FLOATS)}"
            for name, dtype in found.items()
            if dtype not in FLOATS
        ]
        first = next(iter(found), None)
        # The layers of a stack become one array.
        faults += [
            f"{name} is {dtype.name}, {first} {found[first]}"
            for name, dtype in found.items()
            if first is not None and dtype != found[first]
        ]
    return faults
