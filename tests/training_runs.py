"""A model and a run as small as they can be, and ways to start, stop and look at runs.

As a program, `python training_runs.py SECONDS DEVICES ...` is `train.py ...`, see `start_process`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import skimage.data
import yaml
from devices import simulated
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh
from orbax.checkpoint import v1 as ocp
from pictures import write, write_caption
from tiny import TOKENIZER_VOCAB_SIZE, write_tokenizer

import faithdiff_jax.sharding
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.loader import BatchIterator, DataConfig
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.training.config import CheckpointConfig, MeshConfig, TrainConfig, WatchConfig
from faithdiff_jax.training.saved_checkpoints import load_saved, saved_specs, saved_steps
from faithdiff_jax.training.step import TrainStep
from faithdiff_jax.weights.initialisation import fresh_part, write_model

main = functools.partial(run_command, "train")

SMALLEST_SPLIT = 256
END_TOKEN = TOKENIZER_VOCAB_SIZE - 1
TEXT = TextEncoderConfig(
    vocab_size=TOKENIZER_VOCAB_SIZE, width=8, layers=1, heads=1, mlp_width=8, projection=8, end_token=END_TOKEN
)
MODEL = FaithDiffConfig(
    unet=UNetConfig(
        channels=(16,),
        resnets_per_level=1,
        transformer_depth=(0,),
        mid_transformer_depth=1,
        heads=(1,),
        context_dim=16,
        pooled_dim=8,
        time_id_dim=8,
        norm_groups=8,
    ),
    vae=VAEConfig(channels=(8, 16), resnets_per_level=1, norm_groups=8),
    alignment=AlignmentConfig(layers=1, heads=2, norm_groups=8),
    text_encoders=(TEXT, TEXT),
)
CONFIG: dict[str, Any] = {
    "steps": 6,
    "batch": 8,
    "groups": {
        "lq_encoder": {"parameters": ["lq_encoder.*"], "learning_rate": 1e-3},
        "rest": {"parameters": ["alignment.*", "unet.*"], "learning_rate": 2e-3},
    },
    "frozen": ["vae.*", "text_encoder*"],
    "optimizer": {"warmup": 1},
    "ema": {"decay": 0.9},
    "dtype": "float32",
    "rematerialisation": "none",
    "data": {"crop": 16},
    "checkpoint": {"every": 2, "latest": 10},
    "watch": {"every": 1},
}
STAGE_1 = {
    "steps": 4,  # the last layer moves in the second, what feeds it in the third, the rest in the fourth
    "groups": {"alignment": {"parameters": ["alignment.*"], "learning_rate": 1e-2}},
    "frozen": ["unet.*", "lq_encoder.*", "vae.*", "text_encoder*"],
}
LORA = {
    "steps": 2,
    "groups": {"alignment": {"parameters": ["alignment.*"], "learning_rate": 1e-2}},
    "frozen": ["unet.*", "lq_encoder.*", "vae.*", "text_encoder*"],
    "lora": {"rank": 2, "alpha": 3.0, "learning_rate": 5e-2},
}

Change = Callable[[int, dict[str, np.ndarray]], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a model and photographs to train on."""

    folder: Path
    model: Path
    photos: Path

    def command(self, output: Path, changes: Mapping[str, Any] | None = None, *more: object) -> list[str]:
        """The arguments of a run with `CONFIG`, but for what is changed."""
        config = write_config(output.with_name(f"{output.name}.yaml"), changes)
        fixed = ["--config", config, "--model", self.model, "--data", self.photos, "--output", output]
        return [str(argument) for argument in [*fixed, *more]]


_STEPS: dict[str, Any] = {}


@functools.cache
def place() -> Place:
    """One for all tests of a process."""
    folder = Path(tempfile.mkdtemp(prefix="faithdiff-runs-"))
    return Place(folder, write_the_model(folder), write_photos(folder / "photos"))


def write_the_model(folder: Path) -> Path:
    """A model directory of arbitrary numbers, whose LQ encoder and aligner start as a training run's do."""
    rng = np.random.default_rng(0)
    params = {
        part: {path: _start(path, shape, rng) for path, shape in part_shapes(MODEL, part).items()}
        for part in part_names(MODEL)
    }
    for part in ("lq_encoder", "alignment"):
        params[part] = fresh_part(MODEL, part, params.__getitem__, seed=0)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / "tokenizers" / name)
    write_model(MODEL, params, folder / "tokenizers", folder / "model", {})
    return folder / "model"


def _start(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if path.endswith("scale"):
        return np.ones(shape, np.float32)
    inputs = np.prod(shape[:-1]) if path.endswith("kernel") else 100
    return (rng.standard_normal(shape) / np.sqrt(inputs)).astype(np.float32)


def write_photos(folder: Path) -> Path:
    """Eleven photographs of 72 x 88, which no batch divides, four of them with captions."""
    pictures = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee())
    for number in range(11):
        top, left = 24 * number % 200, 40 * number % 300
        photo = pictures[number % 3][top : top + 72, left : left + 88]
        write(folder / f"{number:02}.png", np.ascontiguousarray(photo))
        if number % 3 == 0:
            write_caption(folder / f"{number:02}.json", f"The image features a cat and the number {number}.")
    return folder


def write_config(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """`CONFIG` with keys replaced as whole; `data.x`, `model_directory.x` and other dotted keys one by one."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in (changes or {}).items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(arguments: Sequence[object], devices: int = 2, change: Change | None = None) -> int:
    """The command in this process, on some of its devices; its exit code.

    `change(step, batch)` sees the batch of every step, the first of which is 1, before it is trained on.
    """
    plain = BatchIterator.__next__

    def changed(batches: BatchIterator) -> dict[str, np.ndarray]:
        batch = plain(batches)
        if change is not None:
            change(batches.get_state()["position"] // len(batch["hq"]), batch)
        return batch

    def mesh(*, data: int, fsdp: int) -> Mesh:
        sizes = data, devices // data if fsdp == -1 else fsdp
        return jax.make_mesh(sizes, ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:devices])

    initialise = TrainStep.__init__

    def once(step: TrainStep, config: TrainConfig, *arguments: Any) -> None:
        """Steps that are alike are traced and compiled once, however many runs there are."""
        initialise(step, config, *arguments)
        others = {"data": DataConfig(), "checkpoint": CheckpointConfig(), "validation": None, "watch": WatchConfig()}
        others |= {"mesh": MeshConfig()}  # the mesh itself is an argument
        alike = dataclasses.replace(config, **others, stop_after_bad_steps=1)
        step.run = _STEPS.setdefault(repr((alike, *arguments)), step.run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__init__", once)
        patch.setattr(faithdiff_jax.sharding, "SMALLEST_SPLIT", SMALLEST_SPLIT)
        patch.setattr("faithdiff_jax.training.preparation.make_mesh", mesh)
        patch.setattr(BatchIterator, "__next__", changed)
        return main([str(argument) for argument in arguments])


def stop_at(last: int) -> Change:
    """The process is told to stop during step `last`, as by a cluster that wants its machine back."""

    def change(step: int, batch: dict[str, np.ndarray]) -> None:
        if step == last:
            signal.raise_signal(signal.SIGTERM)

    return change


def start_process(
    arguments: Sequence[object], *, devices: int, use: int | None = None, cache: Path, seconds: float = 0
) -> subprocess.Popen:
    """The command in a process of its own that has so many devices.

    Args:
        arguments: the command's.
        devices: how many there are.
        use: as many of them as `train` would use, whose runs it then equals to the last bit; None for all.
        cache: a folder of compiled programs.
        seconds: how much longer each step takes.
    """
    environment = os.environ | simulated(devices)
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)]),
    }
    return subprocess.Popen(
        [sys.executable, __file__, str(seconds), str(use or 0), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def finish(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, once the process has ended."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{out}\n{err}") from None
    return process.returncode, out, err


@contextlib.contextmanager
def kept_programs(folder: Path) -> Iterator[None]:
    """Programs compiled inside are kept in a folder, or where the environment says: alike runs compile once."""
    place = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder))
    settings = {"jax_compilation_cache_dir": place, "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, as the run's log has it (`watch.every` is 1)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(found) == len(dict(found)), "a step was reported twice"
    return dict(found)


def saved(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Name -> array of everything in a checkpoint, the newest if no step is given."""
    step = saved_steps(run / "checkpoints")[-1] if step is None else step
    return dict(load_saved(run / "checkpoints", step, saved_specs(run / "checkpoints", step)))


def position(run: Path, step: int) -> Any:
    """The data's position in a checkpoint."""
    return ocp.checkpointables_metadata((run / "checkpoints" / str(step)).absolute()).custom_metadata["data"]


def assert_same_bits(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, array in ours.items() if array.tobytes() != theirs[name].tobytes()]
    assert not different, f"{len(different)} of {len(ours)} arrays differ: {different[:5]}"


def _main(seconds: float, use: int, arguments: Sequence[str]) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if use:
        return train(arguments, devices=use, change=lambda step, batch: time.sleep(seconds))
    faithdiff_jax.sharding.SMALLEST_SPLIT = SMALLEST_SPLIT
    return main(arguments)


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # tensorboardX would import it, for seconds
    raise SystemExit(_main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
