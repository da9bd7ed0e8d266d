"""What each way to bring a low-quality picture into SDXL takes: parameters, arithmetic, memory, time.

    python benchmarks/comparisons.py                              # parameters and arithmetic at full size
    python benchmarks/comparisons.py --topology v5e:2x2           # memory, too, by TPU's compiler; ten minutes a row
    python benchmarks/comparisons.py --time                       # of one evaluation on this machine, at a small size

Each prints a Markdown table. At full size nothing is computed or held: shapes are traced. Memory to restore is that of
one chip of the topology; to train, that of a chip of `TRAINING`'s, with ten samples and a quarter of the state. Time is
that of the small model's UNet with random parameters and latents of 64x64, of one evaluation of both sides of the
guidance; the variants take turns, and the figure is the median of the rounds, FaithDiff = 1.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.config import find_config, load
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.controlnet_xs import ControlNetXSConfig
from faithdiff_jax.models.parts import Networks, part_shapes, unflatten
from faithdiff_jax.training.config import load_train_config
from faithdiff_jax.training.lowering import PlannedStep
from faithdiff_jax.weights.model_directory import ModelDirectory

CONFIGS = {
    "FaithDiff": ("stage2", None),
    "FaithDiff without aligner": ("ablations/without_alignment", None),
    "ControlNet": ("baselines/controlnet", None),
    "ControlNet-XS": ("baselines/controlnet_xs", None),
    "ControlNet with SFT": ("baselines/sft", None),
    "FaithDiff on SD 2.1": ("stage2", "models/sd21"),
}
"""What trains, and on which model: SDXL, with the changes of the configuration, where none is named."""
TRAINING = ("--topology", "v5p:2x2x1", "batch=40", "accumulation=1", "mesh.data=1", "mesh.fsdp=4")
PICTURE = "1024x1024"
XS_OF_SMALL = ControlNetXSConfig(channels=(8, 16, 32), heads=(1, 1, 2))
KINDS = {
    "FaithDiff": AlignmentConfig(heads=4, norm_groups=16),
    "ControlNet": AlignmentConfig(kind="controlnet"),
    "ControlNet-XS": AlignmentConfig(kind="controlnet_xs", xs=XS_OF_SMALL),
    "ControlNet with SFT": AlignmentConfig(kind="sft"),
}
ROUNDS = 15


def plan(*arguments: str) -> dict[str, Any]:
    """The figures that `faithdiff plan` prints; a process of its own, which the compiler needs."""
    command = [sys.executable, "-m", "faithdiff_jax", "plan", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def count(model: FaithDiffConfig, *parts: str) -> float:
    """Millions of parameters of some parts."""
    return sum(math.prod(shape) for part in parts for shape in part_shapes(model, part).values()) / 1e6


def full_size(topology: str | None) -> None:
    """The table of parameters and arithmetic, and of memory where a topology is given."""
    columns = ["beside the UNet, M", "trained, M", "training, TFLOP a sample", "restoring, TFLOP a picture"]
    columns += ["restoring, GiB", "training, GiB"] * (topology is not None)
    print("| |" + "".join(f" {column} |" for column in columns))
    print("|---|" + "---|" * len(columns))
    for name, (config, on) in CONFIGS.items():
        model = None if on is None else find_config(on)
        what = ["--config", config, *([] if model is None else ["--model", str(model)])]
        architecture = None if model is None else load(FaithDiffConfig, model)
        step = PlannedStep.of(load_train_config(config, ["data.sources=[{photos: none}]"]), architecture)
        training, picture = plan(*what, "batch=1"), ("--restore", PICTURE, *what, "steps=20", "guidance=5")
        restoring = plan(*picture)
        figures = [
            f"{count(step.model, 'alignment', 'lq_encoder'):,.1f}",
            f"{training['trained_parameters'] / 1e6:,.1f}",
            f"{training['model_flops'] / 1e12:.2f}",
            f"{restoring['flops'] / 1e12:.1f}",
        ]
        if topology is not None:
            compiled = plan(*picture, "--topology", topology), plan(*what, *TRAINING)
            memory = [sum(found["bytes_held"].values()) + found["bytes_temporary"] for found in compiled]
            figures += [f"{size / 2**30:.2f}" for size in memory]
        print(f"| {name} |" + "".join(f" {figure} |" for figure in figures), flush=True)


def small_size() -> None:
    """The table of times of one evaluation."""
    small = ModelDirectory.open(SMALL_MODEL).config
    runs = {name: evaluation(dataclasses.replace(small, alignment=kind)) for name, kind in KINDS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - begin)
    print("| | time of one evaluation | parameters beside the UNet's, its own = 1 |")
    print("|---|---|---|")
    for name, kind in KINDS.items():
        share = statistics.median(own / first for own, first in zip(times[name], times["FaithDiff"], strict=True))
        model = dataclasses.replace(small, alignment=kind)
        print(f"| {name} | {share:.2f} | {count(model, 'alignment') / count(model, 'unet'):.2f} |")


def evaluation(model: FaithDiffConfig) -> Any:
    """A compiled evaluation of one latent under two texts, of random parameters."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    params = {
        part: unflatten({path: 0.05 * normal(*shape) for path, shape in part_shapes(model, part).items()})
        for part in ("unet", "alignment")
    }
    networks, unet = Networks(model, jnp.float32), model.unet
    context, pooled, time_ids = normal(2, 77, unet.context_dim), normal(2, unet.pooled_dim or 1), normal(2, 6)

    @jax.jit
    def prepare(params: Any, features: Any) -> Any:
        denoiser = networks.denoiser(params)
        embedding = denoiser.embed_timesteps(jnp.full(2, 500)) + denoiser.embed_added(pooled, time_ids)
        return embedding, denoiser.alignment.embed(features), denoiser.project_text(context)

    @jax.jit
    def evaluate(params: Any, latents: Any, prepared: Any) -> Any:
        embedding, condition, text = prepared
        return networks.denoiser(params).denoise(latents, embedding, condition, text)

    latents, prepared = normal(1, 64, 64, unet.in_channels), prepare(params, normal(1, 64, 64, model.feature_channels))
    jax.block_until_ready(evaluate(params, latents, prepared))
    return lambda: evaluate(params, latents, prepared)


def main() -> None:
    """Print the table that the flags say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="TPUs whose compiler lays out memory, such as v5e:2x2")
    parser.add_argument("--time", action="store_true", help="time one evaluation at a small size instead")
    arguments = parser.parse_args()
    if arguments.time:
        small_size()
    else:
        full_size(arguments.topology)


if __name__ == "__main__":
    main()
