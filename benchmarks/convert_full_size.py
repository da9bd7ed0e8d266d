"""Convert a checkpoint of full size in the published layout, and back: peak memory, seconds, and every bit compared.

    python benchmarks/convert_full_size.py FOLDER [--dtype float32|float16] [--format bin|safetensors]

FOLDER gets about three times the checkpoint (13.5 GB in float32) and is emptied again at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import published_sdxl

from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_shapes
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import KeyMap
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.rules import FAITHDIFF_PARTS
from faithdiff_jax.weights.safetensors_format import read_header, write_tensors
from faithdiff_jax.weights.tensor_files import TensorSource, open_tensors

# getrusage would count this process too, of which the child begins as a copy; VmHWM (Linux) starts with the program.
CHILD = """
import re, sys
from faithdiff_jax.cli.main import run_command
code = run_command("convert")
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""
RULES = {**FAITHDIFF_PARTS, "vae": rules.VAE, "text_encoder": rules.TEXT_ENCODER, "text_encoder_2": rules.TEXT_ENCODER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        measure(args.folder, np.dtype(args.dtype), args.format)
    finally:
        shutil.rmtree(args.folder)


def measure(folder: Path, dtype: np.dtype, suffix: str) -> None:
    keymaps = {part: KeyMap(RULES[part], part_shapes(FaithDiffConfig(), part)) for part in RULES}
    files = write_published(folder, keymaps, dtype, suffix)
    model, back = folder / "model", folder / "back.safetensors"
    flags = ["--sdxl", folder / "sdxl", "--vae", folder / "vae", "--faithdiff", files["unet"], "--output", model]
    print(f"{sum(path.stat().st_size for path in set(files.values())) / 1e9:.1f} GB, {dtype}, FaithDiff.{suffix}")
    report("to a model directory", flags)
    report("back to PyTorch", ["--to-torch", model, "--output", back])

    sources = {path: open_tensors(path) for path in files.values()}
    returned = open_tensors(back)
    stored = ModelDirectory.open(model)
    count = 0
    for part, keymap in keymaps.items():
        given = sources[files[part]]
        arrays = stored.arrays(part, [entry.path for entry in keymap.entries])
        for entry, (_, array) in zip(keymap.entries, arrays, strict=True):
            for name, tensor in keymap.write(entry, array):
                require_same(name, given, tensor)
                if part in FAITHDIFF_PARTS:
                    require_same(name, given, returned.get(name))
                count += 1
    assert returned.shapes().keys() == sources[files["unet"]].shapes().keys()
    print(f"{count} tensors are the same, bit for bit, there and back")


def require_same(name: str, given: TensorSource, found: np.ndarray) -> None:
    wanted = given.get(name)
    assert (wanted.dtype, wanted.shape) == (found.dtype, found.shape), name
    assert np.array_equal(wanted.reshape(-1).view(np.uint8), found.reshape(-1).view(np.uint8)), name


def report(what: str, flags: list) -> None:
    """Convert in a process of its own and print its time and its largest resident set."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, flags)], check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1])
    print(f"{what}: {time.perf_counter() - start:.0f} s, at most {peak / 2**20:.2f} GiB", flush=True)


def write_published(folder: Path, keymaps: dict[str, KeyMap], dtype: np.dtype, suffix: str) -> dict[str, Path]:
    """Write random weights in the published layout, one tensor at a time; returns the file of each part."""
    vae, sdxl = folder / "vae", folder / "sdxl"
    files = {"vae": vae / "diffusion_pytorch_model.safetensors"}
    files |= {name: sdxl / name / "model.safetensors" for name in ("text_encoder", "text_encoder_2")}
    files |= dict.fromkeys(FAITHDIFF_PARTS, folder / "FaithDiff.safetensors")
    configs = {
        vae / "config.json": published_sdxl.VAE,
        sdxl / "unet/config.json": published_sdxl.UNET,
        sdxl / "text_encoder/config.json": published_sdxl.TEXT_ENCODER,
        sdxl / "text_encoder_2/config.json": published_sdxl.TEXT_ENCODER_2,
        sdxl / "scheduler/scheduler_config.json": published_sdxl.SCHEDULER,
        sdxl / "tokenizer/vocab.json": {},
        sdxl / "tokenizer_2/vocab.json": {},
    }
    for path, data in configs.items():
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(data), encoding="utf-8")
        if path.name == "vocab.json":
            (path.parent / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")

    rng = np.random.default_rng(0)
    for path in dict.fromkeys(files.values()):
        shapes = {}
        for part in (part for part in keymaps if files[part] == path):
            shapes |= keymaps[part].published_shapes()
        specs = {name: (dtype, shape) for name, shape in shapes.items()}
        tensors = ((name, rng.standard_normal(shape, np.float32).astype(dtype)) for name, shape in shapes.items())
        write_tensors(path, specs, tensors)
    if suffix == "bin":
        files |= dict.fromkeys(FAITHDIFF_PARTS, as_torch_file(files["unet"]))
    return files


def as_torch_file(path: Path) -> Path:
    """Rewrite a safetensors file as torch.save does, from mapped memory."""
    import torch

    mapped = np.memmap(path, np.uint8, "c")
    places = read_header(path).items()
    tensors = {
        name: torch.from_numpy(mapped[place.start : place.start + place.size].view(place.dtype).reshape(place.shape))
        for name, place in places
    }
    target = path.with_suffix(".bin")
    torch.save(tensors, target)
    path.unlink()
    return target


if __name__ == "__main__":
    main()
