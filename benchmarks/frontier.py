"""What a second buys: for samplers, steps and options, time against how close the picture is to that of 20 Euler steps.

    python benchmarks/photograph_crops.py PHOTOS WORK/crops --split validation --side 256
    python benchmarks/frontier.py WORK/crops --plot docs/frontier.svg

Each crop is degraded at level II, a quarter of the size, and restored under every setting from the same seed, with its
file's name as caption. PSNR and LPIPS (needs the extra `evaluate`) are to the picture of 20 Euler steps, and to the
original. Time is that of denoising alone, the median of rounds in which the setting and 20 steps take turns, 20 steps =
1. The last column is what the published model would compute for a picture of 1024x1024, counted, 20 steps = 1.
"""

import argparse
import dataclasses
import html
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_model import SCALE, cases

from faithdiff_jax import SMALL_MODEL, FaithDiff, FaithDiffConfig, RestoreOptions
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.measuring import Metrics, measure
from faithdiff_jax.evaluation.protocols import Protocol
from faithdiff_jax.inference.evaluations import Evaluation, plan_evaluations
from faithdiff_jax.models.parts import Networks, part_shapes, unflatten
from faithdiff_jax.models.reuse import Reuse
from faithdiff_jax.planning import flops

METRICS = ("psnr", "lpips")
REFERENCE = "euler, 20 steps"
SETTINGS = {
    REFERENCE: {},
    "euler, 20 steps, another seed": {"seed": 7},
    **{f"euler, {steps} steps": {"steps": steps} for steps in (10, 7, 5, 3)},
    **{f"dpmpp_2m, {steps} steps": {"steps": steps, "sampler": "dpmpp_2m"} for steps in (10, 7, 5, 3)},
    **{f"unipc, {steps} steps": {"steps": steps, "sampler": "unipc"} for steps in (10, 5)},
    "dpmpp_2m, karras, 7 steps": {"steps": 7, "sampler": "dpmpp_2m", "sigma_spacing": "karras"},
    "guidance to 0.5": {"guidance_end": 0.5},
    "guidance from 0.25 to 0.75": {"guidance_start": 0.25, "guidance_end": 0.75},
    **{f"DeepCache, interval {n}": {"deepcache_interval": n} for n in (2, 4)},
    "DeepCache, interval 4, 2 levels": {"deepcache_interval": 4, "deepcache_levels": 2},
    **{f"T-GATE after {after}": {"tgate_after": after} for after in (0.5, 0.25)},
    "dpmpp_2m, 10 steps, guidance to 0.5": {"steps": 10, "sampler": "dpmpp_2m", "guidance_end": 0.5},
    "dpmpp_2m, 10 steps, DeepCache 2": {"steps": 10, "sampler": "dpmpp_2m", "deepcache_interval": 2},
    "DeepCache 2, guidance to 0.5": {"deepcache_interval": 2, "guidance_end": 0.5},
}
"""Of RestoreOptions, by the name of the row."""


@dataclasses.dataclass
class Row:
    """What was found of one setting; figures are means over pictures."""

    name: str
    evaluations: int
    time: float
    psnr: float
    lpips: float
    true_psnr: float
    true_lpips: float
    full_size: float

    def __str__(self) -> str:
        closeness = " | " if self.name == REFERENCE else f"{self.psnr:.1f} | {self.lpips:.3f}"
        figures = f"{closeness} | {self.true_psnr:.2f} | {self.true_lpips:.3f}"
        return f"| {self.name} | {self.evaluations} | {self.time:.2f} | {figures} | {self.full_size:.2f} |"


def evaluation(config: FaithDiffConfig, latent: int, kind: Evaluation, levels: int) -> tuple[Callable[..., Any], list]:
    """One step's pass through UNet and aligner: a function of ({unet, alignment}, arrays), and the shapes of these.

    `levels` are the finest ones that DeepCache always evaluates, 0 without it.
    """
    networks = Networks(config, jnp.dtype(jnp.float32))
    params = {
        part: unflatten(
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in part_shapes(config, part).items()}
        )
        for part in ("unet", "alignment")
    }
    sides, x = 2 if kind.guided else 1, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    latents, condition = x(1, latent, latent, config.unet.in_channels), x(1, latent, latent, config.unet.channels[0])
    embedding, context = x(sides, config.unet.embedding_dim), x(sides, 77, config.unet.context_dim)

    def run(params, latents, condition, embedding, text, deep):
        return networks.denoiser(params).evaluate(latents, embedding, condition, text, None, Reuse(levels, deep)).noise

    text = jax.eval_shape(lambda p, c: networks.denoiser(p).unet.project_text(c), params, context)
    kept = jax.eval_shape(
        lambda *given: networks.denoiser(given[0]).evaluate(
            given[1], given[3], given[2], given[4], None, Reuse(levels, None, True)
        ),
        *(params, latents, condition, embedding, text),
    )
    taken = kept.attended if kind.frozen else text
    return run, [params, latents, condition, embedding, taken, kept.deep if kind.shallow else None]


def evaluation_flops(config: FaithDiffConfig, latent: int, kind: Evaluation, levels: int) -> float:
    """Of one step's passes through UNet and aligner, from shapes alone: nothing is computed."""
    run, arguments = evaluation(config, latent, kind, levels)
    return flops.count(run, *arguments)


def full_size_flops(options: RestoreOptions, known: dict, side: int = 1024) -> float:
    """FLOPs of denoising one picture with the published model's sizes."""
    config = FaithDiffConfig()
    levels = options.deepcache_levels if options.deepcache_interval > 1 else 0
    total = 0.0
    for kind in plan_evaluations(options):
        key = dataclasses.replace(kind, keep_attended=False), levels
        if key not in known:
            known[key] = evaluation_flops(config, side // config.vae.factor, *key)
        total += known[key]
    return total


class Clock:
    """Seconds of denoising one picture, each setting in turns with the reference: of both at once, few are compiled."""

    def __init__(self, model: FaithDiff, reference: RestoreOptions, side: int, rounds: int):
        self.model, self.reference, self.rounds = model, reference, rounds
        config, latent = model.config, side // model.config.vae.factor
        rng = np.random.default_rng(0)
        normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        context, pooled = model.encode_text(["a photograph", ""])
        texts = [(context[i : i + 1], None if pooled is None else pooled[i : i + 1]) for i in range(2)]
        channels = config.vae.latent_channels
        noise, start = normal(1, latent, latent, channels), normal(1, latent, latent, channels)
        self.arrays = (normal(1, latent, latent, config.feature_channels), *texts[0], *texts[1], noise)
        self.start = start if reference.start == "lr" else None

    def seconds(self, options: RestoreOptions) -> tuple[float, float]:
        """Medians of the setting and of the reference."""
        found: list[list[float]] = [[], []]
        for number in range(self.rounds + 1):  # the first may compile
            for seconds, each in zip(found, (options, self.reference), strict=True):
                begin = time.perf_counter()
                jax.block_until_ready(self.model.sample(*self.arrays, each, start=self.start))
                if number:
                    seconds.append(time.perf_counter() - begin)
        return statistics.median(found[0]), statistics.median(found[1])


def means(pictures: list[np.ndarray], references: list[np.ndarray]) -> dict[str, float]:
    metrics = Metrics.make(METRICS, Protocol(name="rgb", metrics=METRICS, ssim="rgb"))
    found = measure(metrics, pictures, references, [{}] * len(pictures))
    return {name: float(np.mean([one.figures.get(name, np.nan) for one in found])) for name in METRICS}


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Time against PSNR to the reference, as SVG; the settings that no faster one comes closer than are joined.

    Dots have numbers, by time, which the list beside the plot explains: names would cover one another.
    """
    rows = sorted((row for row in rows if row.name != REFERENCE and "seed" not in row.name), key=lambda row: row.time)
    right, height, left, bottom = 640, 520, 60, 50
    width = right + 260
    high = max(row.time for row in rows) * 1.05
    low_psnr, high_psnr = min(row.psnr for row in rows) - 1, max(row.psnr for row in rows) + 1

    def place(row: Row) -> tuple[float, float]:
        x = left + row.time / high * (right - left)
        return x, height - bottom - (row.psnr - low_psnr) / (high_psnr - low_psnr) * (height - bottom - 20)

    best = [
        row
        for row in rows
        if not any(other.time < row.time and other.psnr >= row.psnr for other in rows if other != row)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, best))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{height - bottom}H{right}" fill="none" stroke="black"/>',
        f'<polyline points="{line}" fill="none" stroke="#c8102e"/>',
        f'<text x="{(left + right) / 2 - 100}" y="{height - 12}">time of denoising, 20 Euler steps = 1</text>',
        f'<text transform="translate(14 {height / 2 + 100}) rotate(-90)">PSNR to 20 Euler steps, dB</text>',
    ]
    for tick in np.arange(0.2, high, 0.2):
        x = left + tick / high * (right - left)
        parts.append(f'<text x="{x - 8:.1f}" y="{height - bottom + 16}">{tick:.1f}</text>')
    for tick in np.arange(np.ceil(low_psnr / 5) * 5, high_psnr, 5):
        y = height - bottom - (tick - low_psnr) / (high_psnr - low_psnr) * (height - bottom - 20)
        parts.append(f'<text x="{left - 24}" y="{y + 4:.1f}">{tick:.0f}</text>')
    taken: list[tuple[float, float]] = []
    for number, row in enumerate(rows, 1):
        (x, y), colour = place(row), "#c8102e" if row in best else "#666666"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        label = y - 6
        while any(abs(x - other_x) < 16 and abs(label - other_y) < 11 for other_x, other_y in taken):
            label -= 11  # above the number that is there
        taken.append((x, label))
        parts.append(f'<text x="{x - 5:.1f}" y="{label:.1f}" fill="{colour}">{number}</text>')
        parts.append(f'<text x="{right + 20}" y="{16 + 18 * number}" fill="{colour}">{number}</text>')
        name = html.escape(row.name)
        parts.append(f'<text x="{right + 42}" y="{16 + 18 * number}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=SMALL_MODEL)
    parser.add_argument("--level", default="II")
    parser.add_argument("--side", type=int, default=256, help="of a crop, at most; pixels")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="rows whose names contain one of these, and the reference")
    parser.add_argument("--plot", type=pathlib.Path)
    given = parser.parse_args()
    model = FaithDiff.load(given.model)
    defaults = model.defaults.replace(scale=SCALE, guidance=given.guidance, sampler="euler", steps=20)
    settings = {
        name: defaults.replace(**changes)
        for name, changes in SETTINGS.items()
        if not given.only or name == REFERENCE or any(word in name for word in given.only)
    }
    for name, options in list(settings.items()):
        try:
            options.check_against(model.config)
        except InputError as error:  # a model that guides by itself has no guidance to leave out
            print(f"{name}: left out, {error}")
            del settings[name]
    passes = 2 if model.config.unet.guidance_dim is None else 1
    pictures = cases(given.crops, None, given.level, given.side, seeds=1)
    captions = [path.stem.replace("-", " ").replace("_", " ") for path in sorted(given.crops.glob("*.png"))]
    clock = Clock(model, settings[REFERENCE], given.side, given.rounds)
    found, seconds = {}, {}
    for name, options in settings.items():
        found[name] = [
            model.restore(case.low, caption, options) for case, caption in zip(pictures, captions, strict=True)
        ]
        seconds[name] = clock.seconds(options)
        print(f"{name}: {seconds[name][0]:.2f} s, the reference {seconds[name][1]:.2f} s", flush=True)
    known: dict = {}
    whole = full_size_flops(settings[REFERENCE].replace(guidance=5.0), known)
    rows = []
    for name, options in settings.items():
        close, true = means(found[name], found[REFERENCE]), means(found[name], [case.reference for case in pictures])
        rows.append(
            Row(
                name,
                sum(passes if each.guided else 1 for each in plan_evaluations(options)),
                seconds[name][0] / seconds[name][1],
                *close.values(),
                *true.values(),
                full_size_flops(options.replace(guidance=5.0), known) / whole,
            )
        )
    print(f"\n{len(pictures)} pictures of {given.side}x{given.side}, level {given.level}, guidance {given.guidance:g}")
    print(f"20 Euler steps: {seconds[REFERENCE][0]:.2f} s here; full size {whole / 1e12:.0f} TFLOP\n")
    print("| | UNet passes | time | PSNR to 20 steps | LPIPS | PSNR to original | LPIPS | full size |")
    print("|---|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
