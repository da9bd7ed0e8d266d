"""The paper's comparisons at a small size, for real: every row trained on the same pictures in the same order.

    python examples/tiny/training_photos.py --photographs PHOTOGRAPHS --output WORK/photos
    python benchmarks/ablations.py WORK                     # what is there is not done again
    python benchmarks/ablations.py WORK --tables 5 6
    python benchmarks/ablations.py WORK --only-evaluate --keep --page docs

WORK/base_*                 what all rows start from: the small model's autoencoder and text encoders, and a UNet that
                            has learnt the photographs and has seen no LQ picture
WORK/models/ROW-SEED        each row, once for each seed, in float16
WORK/validation, WORK/test  pairs at level II: of each photograph the 128x128 with most edges
WORK/figures_test.csv       a line for each row, seed and test picture

What trains, and how fast in proportion, is read in the configurations of the full size that ROWS names. A row's
seed decides what is drawn in its parameters, its order of pictures and its noise, alike for all rows. The parameters of
a run are one vector here, with a rate for each number: AdamW as in `training.optimizer`, in a program that all rows of
one architecture share, and that compiles in half the time.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ablation_rows import ROWS, Budget
from jax.flatten_util import ravel_pytree
from PIL import Image

from faithdiff_jax import SMALL_MODEL, FaithDiff
from faithdiff_jax.baselines.restorer import Bicubic, FaithDiffRestorer
from faithdiff_jax.config import load
from faithdiff_jax.data.mixture import SourceConfig
from faithdiff_jax.evaluation.ablations import (
    BICUBIC,
    FIGURES,
    METRICS,
    kept_table,
    kept_tables,
    keys_of,
    markdown,
    write_figures,
)
from faithdiff_jax.evaluation.configuration import MODEL, load_table
from faithdiff_jax.evaluation.measuring import Metrics
from faithdiff_jax.evaluation.methods import Method
from faithdiff_jax.evaluation.plots import of_comparison, svg
from faithdiff_jax.evaluation.protocols import find_protocol
from faithdiff_jax.evaluation.results import Results
from faithdiff_jax.evaluation.runner import Evaluation
from faithdiff_jax.evaluation.testsets import open_set
from faithdiff_jax.files.writing import write_text
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names
from faithdiff_jax.training.config import TrainConfig, load_train_config
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.parameters import model_shapes
from faithdiff_jax.training.preparation import load_tokenizers, open_loader
from faithdiff_jax.training.run_directory import model_config
from faithdiff_jax.training.step import TrainStep, draw
from faithdiff_jax.weights.initialisation import fresh_params, fresh_part, write_model
from faithdiff_jax.weights.model_directory import ModelDirectory

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent / "configs"
CROPS, SIDE = 16, 128
"""Of each photograph for training, so many places of so many pixels a side: decoding whole ones takes longer."""
TRAINABLE = ("alignment", "lq_encoder", "unet")
TOLD = (SIDE, SIDE, 0, 0, 512, 512)
"""The sizes that the UNet is told: those of a test picture, always."""
DEFAULTS = {"scale": 4.0, "multiple": 16, "steps": 10, "guidance": 1.0, "color_fix": "adain"}
COMPARED = {"steps": 4}
"""Of restoring, where models are compared: on the validation photographs 1, 2, 4 and 10 steps give the same."""
NO_PHOTOS = "data.sources=[{photos: none}]"
TABLES = (5, 6, 8, 10, 11, 12)


@dataclasses.dataclass
class Program:
    """The compiled step of an architecture."""

    shapes: Mapping[str, tuple[int, ...]]
    run: Callable[..., Any]
    initial: Callable[[jax.Array], Any]


@functools.cache
def program(model: FaithDiffConfig, budget: Budget) -> Program:
    """One for all rows that differ in what is frozen only."""
    config = load_train_config("tiny/stage2", [NO_PHOTOS, f"batch={budget.batch}"])
    step = TrainStep(config, model, {}, None)
    shapes = {path: shape for path, shape in model_shapes(model).items() if path.startswith(TRAINABLE)}
    _, unravel = ravel_pytree({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(1e-2))
    latent = (*(budget.crop // model.vae.factor,) * 2, model.vae.latent_channels)

    def run(vector, moments, frozen, batch, seed, number, share, rates):
        draws = draw(seed, number, jnp.arange(budget.batch), latent, model.schedule.train_steps, config.noise_offset)
        loss, gradient = jax.value_and_grad(lambda v: step.loss(unravel(v), frozen, batch, draws)[0])(vector)
        updates, moments = adam.update(jnp.where(rates > 0, gradient, 0), moments, vector)
        return vector - share * rates * updates, moments, loss

    return Program(shapes, jax.jit(run, donate_argnums=(0, 1)), adam.init)


def vector_of(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> np.ndarray:
    """As `ravel_pytree` has them: by path, sorted."""
    return np.concatenate([np.ravel(np.asarray(arrays[path], np.float32)) for path in sorted(shapes)])


def arrays_of(vector: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The inverse."""
    ends = np.cumsum([int(np.prod(shapes[path])) for path in sorted(shapes)])
    parts = np.split(vector, ends[:-1])
    return {path: part.reshape(shapes[path]) for path, part in zip(sorted(shapes), parts, strict=True)}


def rates_of(config: TrainConfig, shapes: Mapping[str, Any], budget: Budget) -> np.ndarray:
    """The learning rate of every number of the vector: a multiple of the full size's, 0 where it is frozen."""
    labels = assign_groups(config, shapes)
    rate = {path: config.groups[group].learning_rate * budget.faster for path, group in labels.items()}
    own = {path: shape for path, shape in shapes.items() if path.startswith(TRAINABLE)}
    return vector_of({path: np.full(shape, rate.get(path, 0.0)) for path, shape in own.items()}, own)


class Data:
    """Batches for a seed, the same for all rows."""

    def __init__(self, work: pathlib.Path, budget: Budget):
        self.folder, self.budget = work / "crops", budget
        self._kept: dict[tuple[str, int], list[dict[str, np.ndarray]]] = {}
        if not self.folder.exists():
            self._cut(work / "photos" / "train" / "photos")

    def _cut(self, photos: pathlib.Path) -> None:
        made = self.folder.with_suffix(".part")
        made.mkdir(exist_ok=True)
        paths = sorted(path for path in photos.iterdir() if path.suffix in (".jpg", ".png"))
        for number, path in enumerate(paths):
            picture, rng = np.asarray(Image.open(path).convert("RGB")), np.random.default_rng(number)
            for crop in range(CROPS):
                top, left = (int(rng.integers(side - SIDE + 1)) for side in picture.shape[:2])
                square = picture[top : top + SIDE, left : left + SIDE]
                Image.fromarray(square).save(made / f"{path.stem}-{crop:02}.png", compress_level=1)
        made.rename(self.folder)

    def batches(self, model: ModelDirectory, seed: int, steps: int) -> list[dict[str, np.ndarray]]:
        """The first so many."""
        key = (str(model.path.name).partition("-")[0], seed)
        kept = self._kept.setdefault(key, [])
        if len(kept) < steps:
            changes = [f"batch={self.budget.batch}", f"data.crop={self.budget.crop}", f"seed={seed}"]
            config = load_train_config("tiny/stage2", [*changes, NO_PHOTOS])
            sources = (SourceConfig(photos=str(self.folder)),)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
            iterator = iter(open_loader(config, load_tokenizers(model.config, model.path)))
            kept[:] = []
            for _ in range(steps):
                batch = {name: array for name, array in next(iterator).items() if name != "index"}
                batch["time_ids"] = np.broadcast_to(np.float32(TOLD), batch["time_ids"].shape)
                kept.append(batch)
        return kept[:steps]


def train(
    stages: Sequence[tuple[TrainConfig, int]],
    model: FaithDiffConfig,
    params: Mapping[str, Mapping[str, np.ndarray]],
    batches: Sequence[Mapping[str, np.ndarray]],
    budget: Budget,
    seed: int,
) -> tuple[dict[str, dict[str, np.ndarray]], list[float]]:
    """Train parameters stage by stage, each with a cosine of its own; the parameters, and the loss of every step."""
    compiled = program(model, budget)
    flat = {f"{part}.{path}": np.asarray(array) for part, arrays in params.items() for path, array in arrays.items()}
    frozen = {path: jnp.asarray(array, jnp.float32) for path, array in flat.items() if path not in compiled.shapes}
    vector = jnp.asarray(vector_of(flat, compiled.shapes))
    losses: list[float] = []
    for config, steps in stages:
        rates = jnp.asarray(rates_of(config, model_shapes(model), budget))
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(budget.warmup, steps // 4), steps)
        moments = compiled.initial(vector)
        for number in range(steps):
            at = len(losses)
            vector, moments, loss = compiled.run(
                vector, moments, frozen, batches[at], np.uint32(seed), np.int32(at), schedule(number + 1), rates
            )
            losses.append(float(loss))
    found = arrays_of(np.asarray(vector), compiled.shapes)
    return {part: {path: found.get(f"{part}.{path}", array) for path, array in arrays.items()}
            for part, arrays in params.items()}, losses  # fmt: skip


def base(work: pathlib.Path, kind: str, data: Data, budget: Budget) -> ModelDirectory:
    """The base of an architecture, trained if it is not there: UNet alone, the aligner silent."""
    path = work / f"base_{kind}"
    if not path.exists():
        small = ModelDirectory.open(SMALL_MODEL)
        model = load(FaithDiffConfig, CONFIGS / "tiny" / f"ablations_{kind}.yaml")
        model = dataclasses.replace(model, vae=small.config.vae, lq_encoder=None)
        params = {part: dict(arrays) for part, arrays in fresh_params(model, 0).items()}
        texts = {"sdxl": {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
                 "sd21": {"text_encoder": "text_encoder"}}[kind]  # fmt: skip
        for part, stored in {"vae": "vae", **texts}.items():
            params[part] = as_float32(small.arrays(stored))
        params["lq_encoder"] = dict(fresh_part(model, "lq_encoder", params.__getitem__, 0))
        fresh = work / f"untrained-{kind}"
        if not fresh.exists():
            write_model(model, params, SMALL_MODEL, fresh, {}, DEFAULTS)
        config = load_train_config("tiny/base", [NO_PHOTOS])
        groups = {"base": dataclasses.replace(config.groups["base"], parameters=("unet.*",), learning_rate=1e-5)}
        config = dataclasses.replace(config, groups=groups, frozen=(*config.frozen, "text_encoder*"))
        batches = data.batches(ModelDirectory.open(fresh), 1000, budget.base_steps)
        params, losses = train([(config, budget.base_steps)], model, params, batches, budget, 1000)
        print(f"base {kind}: loss {np.mean(losses[:50]):.4f} -> {np.mean(losses[-50:]):.4f}", flush=True)
        write_model(model, params, SMALL_MODEL, path, provenance(losses, budget), DEFAULTS)
    return ModelDirectory.open(path)


def as_float32(arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {path: np.asarray(array, np.float32) for path, array in arrays}


def provenance(losses: Sequence[float], budget: Budget) -> dict[str, Any]:
    last = losses[-len(losses) // 4 :]
    return {"recipe": "benchmarks/ablations.py", "steps": len(losses), "batch": budget.batch, "crop": budget.crop,
            "loss": round(float(np.mean(last)), 4)}  # fmt: skip


def train_row(work: pathlib.Path, name: str, seed: int, data: Data, budget: Budget) -> None:
    """Train a row's model directory, if it is not there."""
    path, row = work / "models" / f"{name}-{seed}", ROWS[name]
    if path.exists():
        return
    begin = time.time()
    start = base(work, row.base, data, budget)
    configs = [(load_train_config(config, [*row.small, NO_PHOTOS]), share) for config, share in row.stages]
    model = model_config(configs[-1][0], start)
    params = {part: as_float32(start.arrays(part)) for part in part_names(start.config)}
    for part in {"alignment", *(part for config, _ in configs for part in config.fresh)}:
        params[part] = dict(fresh_part(model, part, params.__getitem__, seed))
    ends = np.rint(np.cumsum([0.0, *(share for _, share in configs)]) * budget.steps).astype(int)
    stages = [(config, int(count)) for (config, _), count in zip(configs, np.diff(ends), strict=True)]
    params, losses = train(stages, model, params, data.batches(start, seed, budget.steps), budget, seed)
    halves = {part: {each: array.astype(np.float16) for each, array in params[part].items()} for part in params}
    write_model(model, halves, start.path, path, provenance(losses, budget), DEFAULTS)
    print(f"{path.name}: loss {np.mean(losses[-30:]):.4f}, {time.time() - begin:.0f} s", flush=True)


def pairs(work: pathlib.Path, split: str) -> pathlib.Path:
    """Photographs of a split, a quarter of the size at level II, made if they are not there."""
    made = work / split
    if not made.exists():
        originals = work / f"{split}_originals"
        for command in (
            [HERE / "photograph_crops.py", work / "photos" / split, originals, "--split", split, "--side", SIDE],
            ["-m", "faithdiff_jax", "pairs", "--input", originals, "--output", made, "--level", "II"],
        ):
            subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return made


def variants(tables: Sequence[int]) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is restored for some tables: name of the figures -> model, and its options that differ."""
    found = {}
    for table in tables:
        config = load_table(f"table{table}")
        for method, changes in config.methods.items():
            # A sweep's options are the paper's; models are compared under options of their own size.
            found[keys_of(config)[method]] = (changes[MODEL], COMPARED) if MODEL in changes else ("full", dict(changes))
    return found


def methods(models: pathlib.Path, wanted: Mapping[str, tuple[str, dict[str, Any]]]) -> Iterator[Method]:
    """Every variant of every seed whose model is there."""

    def restorer(path: pathlib.Path, changes: Mapping[str, Any], scale: float) -> FaithDiffRestorer:
        model = FaithDiff.load(path)
        return FaithDiffRestorer(model, model.defaults.replace(scale=scale, **changes), path.name)

    yield Method(BICUBIC, load=Bicubic, settings={"baseline": BICUBIC})
    for name, (model, changes) in wanted.items():
        for path in sorted(models.glob(f"{model}-?")):
            settings = {"model": ModelDirectory.open(path).digest, **changes}
            load = functools.partial(restorer, path, changes)
            yield Method(f"{name}-{path.name[-1]}", load=load, settings=settings)


def evaluate(work: pathlib.Path, wanted: Mapping[str, tuple[str, dict[str, Any]]], split: str) -> None:
    """Restore and measure what is not measured yet."""
    protocol = find_protocol("paper")
    results = Results(work / f"results_{split}", protocol)
    found = methods(work / "models", wanted)
    Evaluation(results, Metrics.make(METRICS, protocol)).run([open_set(pairs(work, split), split)], list(found))
    write_figures(work / f"figures_{split}.csv", results, split)


def write_page(docs: pathlib.Path) -> None:
    """Write the tables of the documentation's page anew, between the marks that name their commands, and the plots."""
    page = docs / "ablations.md"
    text = page.read_text(encoding="utf-8")
    for number in kept_tables():
        comparison = kept_table(number)
        table = markdown(comparison).partition("\n\n")[2]
        mark = f"<!-- faithdiff evaluate --table {number} -->\n"
        text = re.sub(f"{mark}.*?<!-- end -->", lambda _: f"{mark}{table}<!-- end -->", text, flags=re.DOTALL)  # noqa: B023
        write_text(docs / f"ablations_{number}.svg", svg(*of_comparison(comparison)))
    write_text(page, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path, help="folder that holds photos/, and where everything goes")
    parser.add_argument("--tables", type=int, nargs="*", choices=TABLES, default=TABLES, help="of the paper")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what is measured")
    parser.add_argument("--only-evaluate", action="store_true", help="train nothing")
    parser.add_argument("--keep", action="store_true", help="take figures_test.csv for those that the package keeps")
    parser.add_argument("--page", type=pathlib.Path, help="docs/, whose tables and plots are to be written anew")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = parser.parse_args()
    budget = Budget(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Budget)})
    jax.config.update("jax_compilation_cache_dir", str(given.work.absolute() / "programs"))
    data = Data(given.work, budget)
    wanted = variants(given.tables)
    models = {model for model, _ in wanted.values()}
    for name in () if given.only_evaluate else (name for name in ROWS if name in models):
        for seed in range(given.seeds):
            train_row(given.work, name, seed, data, budget)
        evaluate(given.work, {name: (name, COMPARED)}, given.split)
    evaluate(given.work, wanted, given.split)
    if given.keep:
        write_text(FIGURES, (given.work / "figures_test.csv").read_text(encoding="utf-8"))
    if given.page:
        write_page(given.page)


if __name__ == "__main__":
    main()
