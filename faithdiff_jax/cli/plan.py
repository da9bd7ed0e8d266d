"""`faithdiff plan`: what a training step or a restoration takes of chips that are not here."""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from faithdiff_jax.cli import arguments as types
from faithdiff_jax.cli.command import Parser
from faithdiff_jax.cli.exit_codes import DONE, FAILED
from faithdiff_jax.errors import InputError

if TYPE_CHECKING:
    from faithdiff_jax.planning.chips import Target
    from faithdiff_jax.planning.plan import Plan
    from faithdiff_jax.training.config import TrainConfig

DESCRIPTION = """Say what a training step, or a restoration, takes of TPUs or GPUs that are not here: memory,
arithmetic, traffic, and by a model of the chips time. The program is compiled by TPU's own compiler (pip install
"faithdiff-jax[tpu]"), up to where every buffer has its place; that takes minutes at full size. Without --topology and
--gpu, nothing is compiled, and parameters and FLOPs are counted."""

MOST_ACCUMULATION = 64


def build_parser() -> Parser:
    """Describe the flags."""
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add(
        "--config",
        metavar="NAME_OR_YAML",
        type=types.nonempty,
        help="a training: a configuration as for faithdiff train",
    )
    add(
        "--restore",
        metavar="WIDTHxHEIGHT",
        type=types.pixels,
        help="the restoration of a picture of so many pixels, on one chip; with --config, by the model that it trains",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--topology", metavar="CHIP:SIDES", type=types.nonempty, help="TPUs: v5e:4x4, v6e:2x4, v5p:2x2x1"
    )
    where.add_argument("--gpu", metavar="KIND:COUNT", type=types.nonempty, help="GPUs: h100:8, a100:1, rtx4090:1")
    add(
        "--model",
        metavar="YAML",
        type=types.path,
        help="another architecture than the published one, as configs/models",
    )
    add("--quantized", choices=types.EIGHT_BITS, help="with --restore: hold kernels in 8 bits")
    add("--tile-captions", action="store_true", help="with --restore: a caption for each tile")
    add(
        "--search",
        action="store_true",
        help="try meshes, accumulation and rematerialisation, and list them, the fastest that fits first",
    )
    add("--json", action="store_true", help="print the figures as JSON, on one line")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes: of the configuration, such as accumulation=4 mesh.fsdp=16; with --restore of the options of "
        "restoring, such as steps=20 batch=4",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Plan and print."""
    from faithdiff_jax.planning import compiler
    from faithdiff_jax.planning.chips import gpus, tpu_slice

    if arguments.config is None and arguments.restore is None:
        raise InputError("one of --config, --restore is needed")
    target = None
    if arguments.topology is not None:
        target = tpu_slice(arguments.topology)
    elif arguments.gpu is not None:
        target = gpus(arguments.gpu)
    if arguments.quantized is not None and arguments.restore is None:
        raise InputError("--quantized: is for --restore")
    if arguments.tile_captions and arguments.restore is None:
        raise InputError("--tile-captions: is for --restore")
    if arguments.search and (target is None or arguments.restore is not None):
        raise InputError("--search: is for --config with --topology or --gpu")
    if target is None:
        return _count(arguments)
    compiler.prepare()
    if arguments.search:
        return _search(arguments, target)
    plan = _training(arguments, target) if arguments.restore is None else _restoration(arguments, target)
    print(plan.json() if arguments.json else "\n".join(plan.lines()))
    sys.stdout.flush()
    _leave(DONE if plan.fits else FAILED)
    return DONE


def _leave(code: int) -> None:
    """End the process: the compiler is still at work on the machine code, and cannot be told to stop."""
    os._exit(code)


def _count(arguments: argparse.Namespace) -> int:
    """Parameters and FLOPs, without a compiler."""
    if arguments.restore is not None:
        planned = _planned_restoration(arguments)
        figures = {"flops": planned.flops() * planned.runs}
        lines = [f"arithmetic            {figures['flops'] / 1e12:,.2f} TFLOP a picture"]
    else:
        step = _planned_step(arguments, arguments.overrides)
        parameters = sum(math.prod(shape) for shape in step.trained.values())
        figures = {"trained_parameters": parameters, "model_flops": step.model_flops()}
        lines = [
            f"parameters that train {parameters / 1e6:,.1f} M",
            f"arithmetic            {figures['model_flops'] / 1e12:,.1f} TFLOP a step of {step.config.batch}",
        ]
    print(json.dumps(figures) if arguments.json else "\n".join(lines))
    return DONE


def _planned_step(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    from faithdiff_jax.config import load
    from faithdiff_jax.models.config import FaithDiffConfig
    from faithdiff_jax.training.config import load_train_config
    from faithdiff_jax.training.lowering import PlannedStep

    # A run needs data; a plan does not look at it.
    config = load_train_config(arguments.config, ["data.sources=[{photos: none}]", *overrides])
    return PlannedStep.of(config, None if arguments.model is None else load(FaithDiffConfig, arguments.model))


def _planned_restoration(arguments: argparse.Namespace) -> Any:
    from faithdiff_jax.config import load, override
    from faithdiff_jax.inference.lowering import PlannedRestoration
    from faithdiff_jax.inference.options import RestoreOptions
    from faithdiff_jax.models.config import FaithDiffConfig

    options = RestoreOptions().replace(**override({}, arguments.overrides))
    if arguments.config is not None:
        model = _planned_step(arguments, ()).model
    else:
        model = FaithDiffConfig() if arguments.model is None else load(FaithDiffConfig, arguments.model)
    width, height = arguments.restore
    if width % model.vae.factor or height % model.vae.factor:
        raise InputError(f"--restore {width}x{height}: sides must be multiples of the VAE's {model.vae.factor}")
    return PlannedRestoration(
        model,
        options,
        (height, width),
        quantized=arguments.quantized,
        tile_captions=arguments.tile_captions,
    )


def _training(arguments: argparse.Namespace, target: "Target") -> "Plan":
    from faithdiff_jax.planning import compiler
    from faithdiff_jax.planning.hlo import traffic
    from faithdiff_jax.planning.plan import Plan
    from faithdiff_jax.training.lowering import advice, mesh_over

    step = _planned_step(arguments, arguments.overrides)
    config = step.config
    mesh = mesh_over(config, compiler.slice_devices(target.topology, target.count))
    lowered, held = step.lower(mesh)
    laid_out = compiler.layout(lowered)
    data, fsdp = mesh.devices.shape
    title = (
        f"{arguments.config} on {target.name}: mesh {data} x {fsdp}, batch {config.batch} in {config.accumulation} "
        f"rounds, rematerialisation {config.rematerialisation}"
        + (", its copies to the host not counted" if config.rematerialisation == "offload" else "")
    )
    plan = Plan(
        title=title,
        target=target,
        held=held,
        temporary=laid_out.beside(held),
        model_flops=step.model_flops(),
        all_flops=step.all_flops(),
        traffic=traffic(laid_out.text),
        repeats=config.steps,
    )
    return plan if plan.fits else plan.with_advice(advice(config, (data, fsdp), sum(held.values()), plan.temporary))


def _restoration(arguments: argparse.Namespace, target: "Target") -> "Plan":
    from dataclasses import replace

    from faithdiff_jax.planning import compiler
    from faithdiff_jax.planning.hlo import traffic
    from faithdiff_jax.planning.plan import Plan

    planned = _planned_restoration(arguments)
    lowered, held = planned.lower(compiler.slice_devices(target.topology, target.count)[0])
    laid_out = compiler.layout(lowered)
    count = planned.flops()
    width, height = arguments.restore
    part = f"one of {planned.runs:,} runs for " if planned.streams else ""
    plan = Plan(
        title=f"{part}a picture of {width}x{height} on one chip of {target.name}: {planned.options.steps} steps, "
        f"{len(planned.plan.corners)} tiles, {planned.plan.tile_batch} at a time, {planned.dtype.__name__}"
        + (f", kernels in {planned.quantized}" if planned.quantized else "")
        + (", a caption for each tile" if planned.tile_captions else ""),
        target=replace(target, count=1),
        held=held,
        temporary=laid_out.beside({name: size for name, size in held.items() if name != "latents"}),
        model_flops=count,
        all_flops=count,
        traffic=traffic(laid_out.text),
    )
    smaller = f"batch={planned.plan.tile_batch // 2}" if planned.plan.tile_batch > 1 else "a smaller tile, tile=64"
    return plan if plan.fits else plan.with_advice(smaller)


def _search(arguments: argparse.Namespace, target: "Target") -> int:
    """Plan every setting that divides, each in a process of its own, and list them."""
    from faithdiff_jax.planning.plan import GIB

    step = _planned_step(arguments, arguments.overrides)
    found: list[tuple[dict[str, Any], str]] = []
    tried = list(settings(step.config, step.model, target.count))
    if not tried:
        raise InputError(f"--search: batch {step.config.batch} divides over {target.count} chips in no way")
    for number, changes in enumerate(tried, 1):
        name = " ".join(changes)
        print(f"{number} of {len(tried)}: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "faithdiff_jax", "plan", "--config", arguments.config, "--json"]
        command += ["--gpu", arguments.gpu] if target.is_gpu else ["--topology", arguments.topology]
        command += [] if arguments.model is None else ["--model", str(arguments.model)]
        done = subprocess.run([*command, *arguments.overrides, *changes], capture_output=True, text=True, check=False)
        if done.stdout.startswith("{"):
            found.append((json.loads(done.stdout), name))
        else:
            print(f"  {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}", file=sys.stderr)
    found.sort(key=lambda plan: (not plan[0]["fits"], plan[0]["seconds_one_by_one"]))
    if arguments.json:
        print(json.dumps([plan | {"changes": name} for plan, name in found]))
    else:
        print(f"{'GiB':>7} {'fits':>5} {'seconds':>16}  {'utilisation':>12}  changes")
        for plan, name in found:
            memory = (sum(plan["bytes_held"].values()) + plan["bytes_temporary"]) / GIB
            seconds = f"{plan['seconds_overlapped']:.3g} to {plan['seconds_one_by_one']:.3g}"
            part = "{:.0%} to {:.0%}".format(*plan["utilisation"])
            print(f"{memory:7.2f} {'yes' if plan['fits'] else 'no':>5} {seconds:>16}  {part:>12}  {name}")
    return DONE if any(plan["fits"] for plan, _ in found) else FAILED


def settings(config: "TrainConfig", model: Any, count: int) -> Iterator[Sequence[str]]:
    """Every mesh of so many chips, accumulation and rematerialisation that the batch divides over.

    Without "offload", whose copies to the host the model of time does not see.
    """
    import dataclasses

    from faithdiff_jax.training.batch import check_batch
    from faithdiff_jax.training.config import REMATERIALISATIONS

    meshes = [(count // fsdp, fsdp) for fsdp in range(1, count + 1) if count % fsdp == 0]
    rounds = [2**i for i in range(MOST_ACCUMULATION.bit_length()) if 2**i <= MOST_ACCUMULATION]
    policies = [policy for policy in REMATERIALISATIONS if policy != "offload"]
    for (data, fsdp), accumulation, kept in itertools.product(meshes, rounds, policies):
        try:
            changed = dataclasses.replace(config, accumulation=accumulation, rematerialisation=kept)
            check_batch(changed, model, count, 1)
        except (InputError, ValueError):  # the batch does not divide
            continue
        yield (
            f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"accumulation={accumulation}", f"rematerialisation={kept}",
        )  # fmt: skip
