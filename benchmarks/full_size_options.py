"""What options that spare evaluations take at the published size: seconds of each kind of evaluation, and of 20 steps.

    python benchmarks/full_size_options.py
    python benchmarks/full_size_options.py --latent 32 --repeats 3 --settings "DeepCache" "T-GATE"

Every kind of evaluation that the settings of `frontier.py` consist of is compiled and timed by itself: aligner and UNet
with 2.57 billion random parameters, float32 on CPU, one picture. What 20 steps take is the sum over their evaluations,
20 Euler steps with guidance = 1, beside the same for the arithmetic. The last line is the plain evaluation with the
kernels in 8 bits. Needs 14 GiB.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from frontier import REFERENCE, SETTINGS, evaluation, evaluation_flops
from paired import our_config, our_parameters

from faithdiff_jax.inference.evaluations import Evaluation, plan_evaluations
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.layers import layers_apart
from faithdiff_jax.models.parts import Params, flatten, unflatten
from faithdiff_jax.models.quantization import is_quantized, quantize

GUIDANCE = 5.0
Kind = tuple[Evaluation, int]
"""An evaluation, and of a shallow one the finest levels, which are evaluated."""


class Times:
    """Seconds and FLOPs of every kind of evaluation, measured when first asked for."""

    def __init__(self, config: FaithDiffConfig, latent: int, repeats: int, params: Params):
        self.config, self.latent, self.repeats, self.params = config, latent, repeats, params
        self.known: dict[Kind, tuple[float, float]] = {}

    def of(self, kind: Kind) -> tuple[float, float]:
        """Of an evaluation, and so many levels that are always evaluated."""
        if kind not in self.known:
            run, (_, *arrays) = evaluation(self.config, self.latent, *kind)
            self.known[kind] = self.seconds(run, arrays), evaluation_flops(self.config, self.latent, *kind)
            print(f"{kind}: {self.known[kind][0]:.2f} s, {self.known[kind][1] / 1e12:.2f} TFLOP", flush=True)
        return self.known[kind]

    def seconds(self, run, shapes: list) -> float:
        """The median of calls after one to warm up, on random arrays."""
        rng = np.random.default_rng(0)
        arrays = jax.tree.map(lambda shape: jnp.asarray(rng.standard_normal(shape.shape, np.float32)), shapes)
        params = layers_apart(self.params)
        program = jax.jit(run).lower(params, *arrays).compile()
        found = []
        for _ in range(self.repeats + 1):
            begin = time.perf_counter()
            jax.block_until_ready(program(params, *arrays))
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])


def kinds(options: RestoreOptions) -> list[Kind]:
    """One for each step, without what a step keeps for later ones: that is no arithmetic."""
    plain = [dataclasses.replace(each, keep_attended=False) for each in plan_evaluations(options)]
    return [(each, options.deepcache_levels if each.shallow else 0) for each in plain]


def in_eight_bits(unet: Params) -> Params:
    """The UNet with its large kernels in int8."""
    flat = flatten(unet)
    return unflatten(
        {path: quantize(x, "int8") if is_quantized("unet", path, x.shape) else x for path, x in flat.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", default="sdxl", help="of paired.SIZES")
    parser.add_argument("--settings", nargs="*", help="rows whose names contain one of these")
    given = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    config = our_config(given.size)
    params = {
        part: unflatten({path: jnp.asarray(array) for path, array in our_parameters(config, part)})
        for part in ("unet", "alignment")
    }
    times = Times(config, given.latent, given.repeats, params)
    rows = {}
    for name, changes in SETTINGS.items():
        if "seed" not in name and (not given.settings or name == REFERENCE or any(w in name for w in given.settings)):
            options = RestoreOptions(steps=20, guidance=GUIDANCE).replace(**changes)
            rows[name] = [sum(figures) for figures in zip(*map(times.of, kinds(options)), strict=True)]
    whole = rows[REFERENCE]
    print(f"\n{REFERENCE}, {8 * given.latent}x{8 * given.latent}: {whole[0]:.0f} s, {whole[1] / 1e12:.0f} TFLOP\n")
    print("| | time | arithmetic |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row[0] / whole[0]:.2f} | {row[1] / whole[1]:.2f} |")

    kind = Evaluation(guided=True), 0
    times.params = {**params, "unet": in_eight_bits(params["unet"])}
    run, (_, *arrays) = evaluation(config, given.latent, *kind)
    print(f"\nint8: {times.seconds(run, arrays) / times.of(kind)[0]:.2f} of the time of an evaluation in float32")


if __name__ == "__main__":
    main()
