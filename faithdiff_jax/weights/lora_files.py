"""LoRA files that others have trained on SDXL, added to a model's parameters: W + weight * alpha / rank * up down.

    FILE -> LoRAFile.open: modules of UNet and text encoders, all of them known -> added: parameter -> parameter

Three ways to name tensors are read: that of peft and diffusers (`unet...to_q.lora_A.weight`), that of diffusers before
it used peft (`to_q_lora.down`), and that of kohya's scripts (`lora_unet_..._to_q.lora_down`), which number blocks as
diffusers or as the original code does.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.reading import require_file
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import numbered, part_shapes
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import Entry, KeyMap
from faithdiff_jax.weights.safetensors_format import Tensor, is_finite, shown
from faithdiff_jax.weights.single_file import unet_module
from faithdiff_jax.weights.tensor_files import SafetensorsFile

_ENDS = {
    "down": re.compile(r"(?:\.lora_A(?:\.default)?|\.lora_down|[._]lora\.down)\.weight$"),
    "up": re.compile(r"(?:\.lora_B(?:\.default)?|\.lora_up|[._]lora\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
_PREFIXES = (
    ("unet", re.compile(r"(?:base_model\.model\.)?unet\.|lora_unet_")),
    ("text_encoder_2", re.compile(r"text_encoder_2\.|lora_te2_")),
    ("text_encoder", re.compile(r"text_encoder\.|lora_te1?_")),
)
# What other kinds of adapters call their tensors.
_OTHERS = {"hada": "LoHa", "lokr": "LoKr", "dora": "DoRA", "lora_mid": "LoCon with a core", "diff": "a full difference"}
NAMED_AT_MOST = 5


@dataclasses.dataclass(frozen=True)
class Update:
    """What is added to one published weight.

    Attributes:
        down: name of the factor (rank, in), or (rank, in, height, width).
        up: name of the factor (out, rank), or (out, rank, 1, 1).
        scale: alpha / rank.
    """

    down: str
    up: str
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class LoRAFile:
    """A file of which every tensor is known to belong to the model.

    Attributes:
        source: the file.
        updates: part -> published name of a weight -> what is added to it.
        entries: part -> path of a parameter that has something added -> what it is published as.
    """

    source: SafetensorsFile
    updates: Mapping[str, Mapping[str, Update]]
    entries: Mapping[str, Mapping[str, Entry]]

    @classmethod
    def open(cls, path: pathlib.Path, config: FaithDiffConfig) -> "LoRAFile":
        """Read the names and shapes of a `.safetensors` file, and find what they are for.

        Raises:
            InputError: the file is missing, damaged or no LoRA; an adapter of another kind; or one for another model.
        """
        require_file(path, "LoRA file")
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: a LoRA is read from a .safetensors file")
        source = SafetensorsFile(path)
        parts = ["unet", *numbered("text_encoder", len(config.text_encoders))]
        keymaps = {part: KeyMap(rules.of_part(part), part_shapes(config, part)) for part in parts}
        modules = _modules(source, path)
        updates = _matched(source, path, modules, keymaps, config.unet.resnets_per_level)
        entries = {
            part: {
                entry.path: entry for entry in keymaps[part].entries if any(name in found for name in entry.published)
            }
            for part, found in updates.items()
        }
        return cls(source, updates, entries)

    def added(self, part: str, path: str, array: jax.Array, weight: float = 1.0) -> jax.Array:
        """A parameter with what the LoRA adds to it, in float32, then rounded to its dtype; most stay as they are.

        Args:
            part: the part's name.
            path: the parameter's, dotted.
            array: the parameter, as `ModelDirectory.load` has it.
            weight: of what is added; 1 as trained, 0 for nothing.

        Raises:
            InputError: NaN or infinite numbers in the file, by name.
        """
        entry = self.entries.get(part, {}).get(path)
        return array if entry is None else _added(array, weight * self._difference(part, entry))

    def _difference(self, part: str, entry: Entry) -> np.ndarray:
        """What is added to one parameter of ours at weight 1, float32."""
        found = self.updates[part]
        whole = np.zeros(entry.shape, np.float32)
        for i, name in enumerate(entry.published):
            if name in found:
                target = whole[i] if entry.stacked else whole
                target += entry.layout.to_ours(self._product(found[name], entry.published_shape))
        return whole

    def _product(self, update: Update, shape: tuple[int, ...]) -> Tensor:
        down, up = (self.source.get(name).astype(np.float32) for name in (update.down, update.up))
        for name, array in ((update.down, down), (update.up, up)):
            if not is_finite(array):
                raise InputError(f"{self.source.files[0]}: {shown(name)} has NaN or infinite numbers")
        product: Tensor = update.scale * (up.reshape(up.shape[:2]) @ down.reshape(len(down), -1))
        return product.reshape(shape)


def _added(array: jax.Array, difference: np.ndarray) -> jax.Array:
    """The sum, where the array is and in its dtype; every process adds what its own devices hold."""
    there = jax.make_array_from_callback(array.shape, array.sharding, lambda index: difference[index])
    total: jax.Array = _sum(array, there)
    return total


@jax.jit
def _sum(array: jax.Array, difference: jax.Array) -> jax.Array:
    return (array.astype(np.float32) + difference).astype(array.dtype)


def _modules(source: SafetensorsFile, path: pathlib.Path) -> dict[str, dict[str, str]]:
    """Module, as the file names it -> "down", "up" and "alpha" -> the tensor's name."""
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for name in source.shapes():
        for role, end in _ENDS.items():
            match = end.search(name)
            if match:
                modules.setdefault(name[: match.start()], {})[role] = name
                break
        else:
            unknown.append(name)
    for word, kind in _OTHERS.items():
        if any(word in name.rpartition(".")[0].rpartition(".")[2] + name.rpartition(".")[2] for name in unknown):
            raise InputError(f"{path}: is {kind} ({shown(unknown[0])}), only plain LoRA is supported")
    if unknown or not modules:
        raise InputError(f"{path}: is no LoRA: {_list(unknown) or 'it holds nothing'}")
    halves = [name for name, roles in modules.items() if not {"down", "up"} <= roles.keys()]
    if halves:
        raise InputError(f"{path}: one of two factors is missing of {_list(halves)}")
    return modules


def _matched(
    source: SafetensorsFile,
    path: pathlib.Path,
    modules: Mapping[str, Mapping[str, str]],
    keymaps: Mapping[str, KeyMap],
    resnets_per_level: int,
) -> dict[str, dict[str, Update]]:
    """Part -> published name of a weight -> its update; every module must have a place, and fit there."""
    shapes, alphas = source.shapes(), _Alphas(path)
    known = {part: keymap.published_shapes() for part, keymap in keymaps.items()}
    by_letters = {
        part: {_letters(name.removesuffix(".weight")): name for name in names} for part, names in known.items()
    }
    updates: dict[str, dict[str, Update]] = {}
    strangers, misfits = [], []
    for module, roles in modules.items():
        part, inner = _part_of(module)
        weight = by_letters.get(part, {}).get(_letters(_place(part, inner, resnets_per_level)))
        if weight is None:
            strangers.append(module)
            continue
        down, up = shapes[roles["down"]], shapes[roles["up"]]
        outputs, *rest = known[part][weight]
        plain = (down[1:] == tuple(rest) or down[1:] == (*rest, 1, 1)) and up[2:] in ((), (1, 1))
        if len(down) < 2 or len(up) < 2 or not down[0] or down[0] != up[1] or up[0] != outputs or not plain:
            misfits.append(f"{shown(module)} {down} and {up}, for a weight {known[part][weight]}")
            continue
        alpha = float(source.get(roles["alpha"]).reshape(-1)[0]) if "alpha" in roles else None
        scale = alphas.scale(part, inner, down[0]) if alpha is None else alpha / down[0]
        if not math.isfinite(scale):
            raise InputError(f"{path}: alpha of {shown(module)} is {alpha}")
        updates.setdefault(part, {})[weight] = Update(roles["down"], roles["up"], scale)
    if strangers:
        raise InputError(f"{path}: is for another model: this one has no {_list(strangers)}")
    if misfits:
        raise InputError(f"{path}: is for a model of other sizes: {_list(misfits)}")
    return updates


def _part_of(module: str) -> tuple[str, str]:
    for part, prefix in _PREFIXES:
        match = prefix.match(module)
        if match:
            return part, module[match.end() :]
    return "", module


def _place(part: str, inner: str, resnets_per_level: int) -> str:
    """A module's published name, letter for letter but for the separators."""
    inner = inner.replace(".processor.", ".")  # of diffusers before peft
    inner += ".0" if inner.endswith("to_out") else ""
    if part.startswith("text_encoder"):
        return inner if inner.startswith("text_") else f"text_model.{inner}"
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)_(\d+)(?:_(\d))?_(.+)", inner)
    if match is None:
        if re.match(r"(time_embed|label_emb|out)_\d", inner):
            return unet_module(re.sub(r"_(?=\d)", ".", inner), resnets_per_level) or inner
        return inner
    block = ".".join(piece for piece in match.groups()[:3] if piece is not None)
    rest = re.sub(r"^(in_layers|emb_layers|out_layers)_(\d)", r"\1.\2", match[4])
    return unet_module(f"{block}.{rest}", resnets_per_level) or inner


def _letters(name: str) -> str:
    """A name as kohya's scripts write it, where all separators look alike."""
    return name.replace(".", "_")


class _Alphas:
    """The alpha that peft keeps beside the tensors, in the file's metadata; its own default is the rank."""

    def __init__(self, path: pathlib.Path):
        with safetensors.safe_open(path, "np") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path}: its lora_adapter_metadata is not a JSON object")
        self._found: dict[str, Any] = found
        self._path = path

    def scale(self, part: str, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) where the file says so (rsLoRA)."""
        alpha = self._found.get(f"{part}.lora_alpha", rank)
        patterns = self._found.get(f"{part}.alpha_pattern") or {}
        for end, other in patterns.items() if isinstance(patterns, dict) else ():
            if module == end or module.endswith(f".{end}"):
                alpha = other
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise InputError(f"{self._path}: lora_alpha {shown(str(alpha))} in its metadata is no number")
        return alpha / (math.sqrt(rank) if self._found.get(f"{part}.use_rslora") is True else rank)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(shown(name) for name in names[:NAMED_AT_MOST]) + more
