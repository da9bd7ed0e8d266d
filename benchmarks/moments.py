"""AdamW with moments of float32 and of 8 bits: the small model's losses, and the optimiser's bytes.

    python benchmarks/moments.py --steps 300

Both runs have the same data, noise and start: their losses differ by the moments alone. A few minutes each.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np

from faithdiff_jax.training.config import load_train_config
from faithdiff_jax.training.loop import train
from faithdiff_jax.training.saved_checkpoints import saved_specs

ROOT = pathlib.Path(__file__).parents[1]
INTERVALS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=300)
    flags = parser.parse_args()
    last = flags.steps // INTERVALS
    print(f"{'moments':10}{'bytes a parameter':>18}  mean loss of each {last} steps, largest difference of a step")
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for moments in ("float32", "int8"):
            run = pathlib.Path(folder) / moments
            changes = [
                f"data.sources=[{{photos: {ROOT / 'examples' / 'originals'}}}]", f"steps={flags.steps}",
                "data.crop=64", "optimizer.warmup=20", f"optimizer.momentum_dtype={moments}", "ema=null",
                "watch.every=1", "watch.tensorboard=false", f"checkpoint.every={flags.steps}",
            ]  # fmt: skip
            train(load_train_config("tiny/stage2", changes), ROOT / "faithdiff_jax" / "small_model", run)
            losses = losses_of(run)
            reference = losses if reference is None else reference
            means = "  ".join(f"{part.mean():.4f}" for part in np.split(losses[: last * INTERVALS], INTERVALS))
            difference = np.abs(losses - reference).max()
            print(f"{moments:10}{optimizer_bytes(run, flags.steps):18.2f}  {means}  {difference:.4f}", flush=True)


def losses_of(run: pathlib.Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


def optimizer_bytes(run: pathlib.Path, step: int) -> float:
    """Of the optimiser's state, for each parameter that trains."""
    specs = saved_specs(run / "checkpoints", step)
    trained = sum(np.prod(shape) for name, (_, shape) in specs.items() if name.startswith("trained/"))
    held = sum(dtype.itemsize * np.prod(shape) for name, (dtype, shape) in specs.items() if name.startswith("optim"))
    return held / trained


if __name__ == "__main__":
    main()
