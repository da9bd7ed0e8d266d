"""Weak scaling of restoring: as many pictures, or tiles of one picture, as there are devices; 1, 2, 4 and 8 simulated.

    python benchmarks/scaling.py --plot docs/scaling.svg

Simulated devices share the cores of this machine, so time says next to nothing. What a device has to do is read from
the optimised program instead: arithmetic, what it sends to others (by ring algorithms), and the memory that it takes.
The small model, one step, with XLA's own attention and convolutions: what is chosen on a CPU goes through heads in a
loop, which counts once and would gather them, and needs less arithmetic for larger batches.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from devices import simulated

DEVICES = (1, 2, 4, 8)
MESHES = ("data", "fsdp")  # axes: copies of the parameters, or the parameters spread
SIDE = 16  # of a tile, and of a picture of one tile, in latent pixels
ROUNDS = 3
COLOURS = ("#c8102e", "#1f5fa8", "#2e8b57", "#b8860b", "#666666")


def programs(model: Any, count: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (program, its arguments), each for `count` pictures or tiles."""
    import numpy as np

    from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_and_complete
    from faithdiff_jax.inference.options import RestoreOptions

    config, rng = model.config, np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def sampling(pictures: int, width: int, tile: int) -> tuple[Any, tuple[Any, ...]]:
        options = RestoreOptions(steps=1, guidance=1.0, batch=count, tile=tile, overlap=1.0)
        latents = (pictures, SIDE, width, config.vae.latent_channels)
        context, pooled = model.encode_text(["a photograph"] * pictures)
        inputs = SamplingInputs(
            features=normal(*latents[:3], config.feature_channels),
            text=Text.of(np.asarray(context), np.asarray(pooled)),
            noise=normal(*latents),
            start=normal(*latents),
        )
        return model.programs.sample, (model.denoiser_params, *plan_and_complete(inputs, options, config))

    pixels = SIDE * config.vae.factor
    names = [name for name in model.params if name.startswith("text_encoder")]
    return {
        "denoiser, a picture each": sampling(count, SIDE, SIDE),
        "denoiser, a tile each": sampling(1, SIDE * count, SIDE),
        "LQ encoder": (model.programs.encode_lq, (model.params["lq_encoder"], normal(count, pixels, pixels, 3))),
        "decoder": (
            model.programs.decode,
            (model.params["vae"], normal(count, SIDE, SIDE, config.vae.latent_channels)),
        ),
        "text encoders": (
            model.programs.encode_text,
            ([model.params[name] for name in names], model.tokenizers(["a photograph"] * count)),
        ),
    }


def measure(count: int, axis: str) -> list[dict[str, Any]]:
    """What the child does, in a process with so many devices."""
    import jax

    from faithdiff_jax import SMALL_MODEL
    from faithdiff_jax.inference.inputs import SamplingPlan
    from faithdiff_jax.inference.pipeline import FaithDiff
    from faithdiff_jax.models.attention import use_implementation
    from faithdiff_jax.models.convolution import use_algorithm
    from faithdiff_jax.planning.hlo import traffic
    from faithdiff_jax.sharding import make_mesh

    sides = {"data": count, "fsdp": 1} if axis == "data" else {"data": 1, "fsdp": count}
    model = FaithDiff.load(SMALL_MODEL, mesh=make_mesh(**sides))
    rows = []
    for name, (program, arguments) in programs(model, count).items():
        with use_implementation("xla"), use_algorithm("direct"):
            compiled = program.lower(*arguments).compile()
        memory, collectives = compiled.memory_analysis(), traffic(compiled.as_text()).collectives
        arrays = [argument for argument in arguments if not isinstance(argument, SamplingPlan)]
        times = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - begin)
        rows.append(
            {
                "program": name,
                "devices": count,
                "mesh": axis,
                "flops": compiled.cost_analysis()["flops"],
                "sent": sum(collective.sent for collective in collectives),
                "kinds": sorted({collective.kind for collective in collectives}),
                "arguments": memory.argument_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
                "seconds": min(times[1:]),
            }
        )
    return rows


def in_process(count: int, axis: str) -> list[dict[str, Any]]:
    environment = os.environ | simulated(count)
    command = [sys.executable, __file__, "--child", str(count), axis]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; of one device the plain figures, of more the ratio to it where that says more."""
    lines = [
        "| program, mesh | devices | MFLOP a device | to one | MB sent | MB arguments | MB temporary | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = f"{row['program']}, {row['mesh']}"
        one = first.setdefault(name, row)
        lines.append(
            f"| {name if row is one else ''} | {row['devices']} | {row['flops'] / 1e6:,.1f} "
            f"| {row['flops'] / one['flops']:.3f} | {row['sent'] / 1e6:.2f} | {row['arguments'] / 1e6:.2f} "
            f"| {row['temporary'] / 1e6:.2f} | {row['seconds'] / one['seconds'] / row['devices']:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Two panels, as SVG: arithmetic of a device over that of one alone, and what it sends."""
    width, height, left, bottom, key = 340, 300, 60, 50, 220
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + key} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{2 * width + key}" height="{height}" fill="white"/>',
    ]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(f"{row['program']}, {row['mesh']}", []).append(row)
    panels = {
        "arithmetic of a device, one alone = 1": lambda row, one: row["flops"] / one["flops"],
        "MB that a device sends": lambda row, one: row["sent"] / 1e6,
    }
    for number, (title, value) in enumerate(panels.items()):
        high = 1.1 * max(value(row, each[0]) for each in series.values() for row in each) or 1.0
        x0 = number * width + left
        parts.append(f'<path d="M{x0} 20V{height - bottom}H{x0 + width - left - 20}" fill="none" stroke="black"/>')
        parts.append(f'<text x="{x0}" y="14">{title}</text>')

        def place(row: dict[str, Any], y: float, x0: float = x0, high: float = high) -> tuple[float, float]:
            across = DEVICES.index(row["devices"]) / (len(DEVICES) - 1)
            return x0 + 10 + across * (width - left - 50), height - bottom - y / high * (height - bottom - 30)

        for tick in range(5):
            y = height - bottom - tick / 4 * (height - bottom - 30)
            parts.append(f'<text x="{x0 - 34}" y="{y + 4:.1f}">{high * tick / 4:.2f}</text>')
        for row in next(iter(series.values())):
            parts.append(f'<text x="{place(row, 0)[0] - 3:.1f}" y="{height - bottom + 16}">{row["devices"]}</text>')
        parts.append(f'<text x="{x0 + 90}" y="{height - 12}">devices</text>')
        for i, each in enumerate(series.values()):
            points = [place(row, value(row, each[0])) for row in each]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            dash = ' stroke-dasharray="5 3"' if each[0]["mesh"] == "fsdp" else ""
            colour = COLOURS[i % (len(series) // 2) % len(COLOURS)]
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"{dash}/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
            if number == 0:
                parts.append(f'<text x="{2 * width + 10}" y="{30 + 18 * i}" fill="{colour}">{list(series)[i]}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--plot", type=pathlib.Path, help="SVG to write")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(int(given.child[0]), given.child[1])))
        return
    found = [in_process(count, axis) for axis in MESHES for count in DEVICES]
    names = [row["program"] for row in found[0]]
    rows = [row for axis in MESHES for name in names for each in found for row in each
            if (row["program"], row["mesh"]) == (name, axis)]  # fmt: skip
    print(table(rows))
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
