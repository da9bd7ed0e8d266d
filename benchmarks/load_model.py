"""Loading a model of random parameters: an Orbax directory, as before format 2, against safetensors, in one run.

    python benchmarks/load_model.py FOLDER [--preset medium|sdxl|CONFIG.yaml] [--dtype float32|float16] [--repeat 3]

FOLDER gets the parameters twice (2.3 GB for medium, 28 GB for sdxl in float32) and is emptied again at the end. Every
load is in a process of its own; the system's file cache stays as it is.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from faithdiff_jax.config import load
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents

TOKENIZERS = pathlib.Path(__file__).parent.parent / "configs" / "tiny"
MEDIUM = FaithDiffConfig(
    unet=UNetConfig(
        channels=(128, 256, 512),
        heads=(2, 4, 8),
        transformer_depth=(0, 2, 6),
        mid_transformer_depth=6,
        context_dim=1024,
        pooled_dim=512,
    ),
    text_encoders=(
        TextEncoderConfig(width=512, layers=6, heads=8, mlp_width=2048),
        TextEncoderConfig(width=512, layers=6, heads=8, mlp_width=2048, projection=512),
    ),
)
PRESETS = {"medium": MEDIUM, "sdxl": FaithDiffConfig()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--preset", default="medium", help="medium, sdxl or a YAML file of the architecture")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", choices=("orbax", "safetensors"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = PRESETS[args.preset] if args.preset in PRESETS else load(FaithDiffConfig, args.preset)
    if args.child:
        seconds = {"orbax": load_orbax, "safetensors": load_safetensors}[args.child](args.folder / args.child, config)
        peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
        print(seconds, int(peak) / 2**20)
        return
    args.folder.mkdir(parents=True)
    try:
        measure(args, config)
    finally:
        shutil.rmtree(args.folder)


def measure(args: argparse.Namespace, config: FaithDiffConfig) -> None:
    for name, write in (("orbax", write_orbax), ("safetensors", write_safetensors)):
        start = time.perf_counter()
        write(args.folder / name, config, np.dtype(args.dtype))
        print(f"{name}: written in {time.perf_counter() - start:.1f} s, random numbers included", flush=True)
    size = sum(path.stat().st_size for path in (args.folder / "safetensors").glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB, {args.dtype}")
    best = {}
    for _ in range(args.repeat):
        for name in ("orbax", "safetensors"):
            command = [sys.executable, __file__, str(args.folder), "--preset", args.preset, "--child", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, peak = map(float, done.stdout.split())
            best[name] = min(best.get(name, seconds), seconds)
            print(f"{name}: {seconds:.2f} s, at most {peak:.2f} GiB", flush=True)
    print(f"safetensors takes {best['safetensors'] / best['orbax']:.2f} of Orbax's time (the best of each)")


def random_arrays(config: FaithDiffConfig, part: str, dtype: np.dtype):
    rng = np.random.default_rng(0)
    for path, shape in part_shapes(config, part).items():
        yield path, rng.standard_normal(shape, np.float32).astype(dtype)


def write_safetensors(folder: pathlib.Path, config: FaithDiffConfig, dtype: np.dtype) -> None:
    parts = {
        part: Contents(
            {path: (dtype, shape) for path, shape in part_shapes(config, part).items()},
            random_arrays(config, part, dtype),
        )
        for part in part_names(config)
    }
    ModelDirectory.write(folder, config, parts, tokenizers=TOKENIZERS, provenance={})


def write_orbax(folder: pathlib.Path, config: FaithDiffConfig, dtype: np.dtype) -> None:
    """As format 1 was written, a gigabyte at a time."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        for part in part_names(config):
            group: dict[str, np.ndarray] = {}
            for path, array in random_arrays(config, part, dtype):
                group[path] = array
                if sum(kept.nbytes for kept in group.values()) > 2**30:
                    ocp.partial.save((folder / part).absolute(), group)
                    group = {}
            if group:
                ocp.partial.save((folder / part).absolute(), group)
            ocp.partial.finalize((folder / part).absolute())


def load_safetensors(folder: pathlib.Path, config: FaithDiffConfig) -> float:
    """Seconds; the shapes are traced before."""
    for part in part_names(config):
        part_shapes(config, part)
    jax.devices()
    start = time.perf_counter()
    model = ModelDirectory.open(folder)
    jax.block_until_ready([model.load(part) for part in part_names(config)])
    return time.perf_counter() - start


def load_orbax(folder: pathlib.Path, config: FaithDiffConfig) -> float:
    """Seconds, read as format 1 was."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start = time.perf_counter()
    context = ocp.Context()
    context.memory.read_concurrent_bytes = 2**30
    with context:
        for part in part_names(config):
            leaves = ocp.metadata((folder / part).absolute()).metadata
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in leaves.items()
            }
            jax.block_until_ready(ocp.load((folder / part).absolute(), wanted))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
