"""Train the small model that this repository ships, from photographs to a model directory, in the paper's order.

    python examples/tiny/train_small_model.py --work small_model_runs --output small_model

photographs -> autoencoder -> base (UNet and text encoders) -> stage 1 (aligner) -> stage 2 (all three) and its end
-> the same with losses in pictures, twice -> float16

Each stage is a command of its own, printed before it runs; what is done already is not done again, and a stage that was
stopped goes on. `--quick` takes a few steps of each, to try the chain.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from faithdiff_jax.models.encoder_half import sinusoidal_embedding
from faithdiff_jax.models.parts import part_names
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.weights.initialisation import write_model
from faithdiff_jax.weights.model_directory import ModelDirectory

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
FAITHFUL = {"guidance": 1.0, "color_fix": "wavelet", "wavelet_levels": 2}
DETAILED = {"guidance": 5.0, "color_fix": "wavelet", "wavelet_levels": 4}
PRESETS = {"faithful": FAITHFUL, "detailed": DETAILED}
DEFAULTS = {"scale": 4.0, "steps": 1, "multiple": 8, **FAITHFUL, "presets": PRESETS}
PHOTOGRAPH = (1365, 2048, 400, 600, 96, 96)
"""Height, width, place and size of a crop, as most that was trained on has them."""
STAGES = ("base", "stage1", "stage2", "finish", "sharpen", "polish")
QUICK = {"autoencoder": ["steps=3", "warmup=1"], "stage": ["steps=3", "optimizer.warmup=1"]}


def main() -> None:
    """Train, stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for photographs, runs and models")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the model directory to make")
    parser.add_argument("--photographs", type=pathlib.Path, help="a folder that has them already, as gathered")
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    options = parser.parse_args()
    work, configs = options.work, ROOT / "configs" / "tiny"
    few = QUICK if options.quick else {"autoencoder": [], "stage": []}

    photos = work / "photos"
    if not photos.exists():
        gathered = work / "photographs"
        given = [] if options.photographs is None else ["--from", options.photographs]
        run(HERE / "gather_photographs.py", "--output", gathered, *given)
        run(HERE / "training_photos.py", "--photographs", gathered, "--output", photos)
    model = work / "autoencoder"
    if not model.exists():
        command = ["-m", "faithdiff_jax", "autoencoder", "--config", configs / "autoencoder.yaml"]
        # Whole pictures go through the autoencoder's attention: the photographs for validation are too large for that.
        data = ["--data", photos / "train", "--held-out", photos / "example"]
        run(*command, *data, "--output", model, *few["autoencoder"])
    recipe = {"recipe": "examples/tiny/train_small_model.py", **provenance(model)}
    for stage in STAGES:
        result = work / stage
        if not result.exists():
            data = ["--model", model, "--data", photos / "train"]
            output = ["--output", work / f"run_{stage}"]
            run(ROOT / "train.py", "--config", configs / f"{stage}.yaml", *data, *output, *few["stage"])
            run(ROOT / "convert_weights.py", "--run", work / f"run_{stage}", "--output", result)
        recipe[stage] = {"steps": provenance(result)["run"]["step"]}
        model = result
    halve(model, options.output, recipe)
    print(f"wrote {options.output}")


def run(*arguments: object) -> None:
    """Run a Python command of this repository, and stop where it fails."""
    command = [sys.executable, *map(str, arguments)]
    print("$", shlex.join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def provenance(model: pathlib.Path) -> dict:
    """Where a model directory says that it is from."""
    return ModelDirectory.open(model).provenance


def halve(model: pathlib.Path, output: pathlib.Path, recipe: dict) -> None:
    """Write the model again with its parameters in float16, and with the whole recipe as its provenance."""
    stored = ModelDirectory.open(model)
    params = {part: dict(stored.arrays(part)) for part in part_names(stored.config)}
    params["unet"] = without_sizes(stored.config.unet, params["unet"])
    params = {part: {path: array.astype(np.float16) for path, array in params[part].items()} for part in params}
    write_model(stored.config, params, model, output, recipe, DEFAULTS)


def without_sizes(config: UNetConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The UNet's parameters with the six time numbers held at a photograph's, whatever it is given.

    The drawn pictures and textures are 512x512, and from the size the UNet learnt to tell them from photographs, which
    are larger: a photograph of 512x512 it would take for one of them.
    """
    kernel, bias = "add_embedding.linear_1.kernel", "add_embedding.linear_1.bias"
    ids = np.asarray(sinusoidal_embedding(jnp.float32(PHOTOGRAPH), config.time_id_dim)).ravel()
    sizes, weights = params[kernel][-len(ids) :], params[kernel].copy()
    weights[-len(ids) :] = 0
    return params | {kernel: weights, bias: params[bias] + ids @ sizes}


if __name__ == "__main__":
    main()
