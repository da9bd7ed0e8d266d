"""What `accelerator.py` measures of this project; each function is one part, in a process of its own."""

import argparse
import contextlib
import functools
import glob
import gzip
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_step
from accelerator import Emit
from accelerator_case import BATCHES, CROP, GUIDANCE, PARITY_STEPS, SIDES, STEPS, case, training_options
from paired import measure, our_config, our_parameters

from faithdiff_jax.inference.inputs import SamplingInputs, Text, plan_and_complete
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.models.attention import use_implementation
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Networks, Params, part_shapes, unflatten
from faithdiff_jax.planning import flops

PARTS = ("unet", "alignment", "lq_encoder", "vae")
SLOWEST = 5


def rate(options: argparse.Namespace, emit: Emit) -> None:
    """TFLOP/s of a large product in bfloat16, and in float32 as the parity part computes it."""
    emit("device", jax.devices()[0].device_kind)
    side = 8192 if options.size == "sdxl" else 256
    for dtype, precision in ((jnp.bfloat16, "default"), (jnp.float32, "highest")):
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        with jax.default_matmul_precision(precision):
            product = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
        seconds, _ = measure(lambda product=product, x=x: product(x, x).block_until_ready(), 10)
        emit("TFLOP/s", 2 * side**3 / min(seconds) / 1e12, f"matrix product, {jnp.dtype(dtype).name}")


def parity(options: argparse.Namespace, emit: Emit) -> None:
    """Errors against what PyTorch's process left, for each precision and each attention."""
    wanted = np.load(options.output / "parity.npz")
    config = our_config(options.size)
    kinds = [("float32", None, "highest")]
    kinds += [("bfloat16", name, "default") for name in attentions(options)]
    params = {part: unflatten(dict(our_parameters(config, part))) for part in PARTS[:3]}
    for dtype, implementation, precision in kinds:
        label = f"ours, {dtype}" + (f", {implementation} attention" if implementation else "")
        with guarded(emit, label), attending(implementation), jax.default_matmul_precision(precision):
            model = with_own_programs(FaithDiff(config, placed(params, dtype), dtype=dtype))
            x = case(options.size, 1, SIDES[options.size]["parity"])
            features = model.encode_lq(x["images"])
            arrays = x["latents"], x["timesteps"], features, x["context"], x["pooled"], x["time_ids"]
            emit("largest relative error, one evaluation", error(model.predict_noise(*arrays), wanted["one"]), label)
            latents = sample(model, x, features, steps=PARITY_STEPS)
            emit(f"largest relative error, {PARITY_STEPS} steps", error(latents, wanted["steps"]), label)


def restore(options: argparse.Namespace, emit: Emit) -> None:
    """Seconds, memory and utilisation of whole restorations, each attention, and the kernels that take longest."""
    config, side = our_config(options.size), SIDES[options.size]["restore"]
    dtype = jnp.bfloat16 if options.device != "cpu" else jnp.float32
    params = {part: random_parameters(config, part, dtype) for part in PARTS}
    peak = matrix_rate(options)
    for implementation in attentions(options):
        with guarded(emit, implementation), attending(implementation):
            model = with_own_programs(FaithDiff(config, params, dtype=dtype))
            x = case(options.size, 2, side)
            features = model.encode_lq(x["images"])
            arrays = x["latents"], x["timesteps"], features, x["context"], x["pooled"], x["time_ids"]
            evaluate = functools.partial(lambda call, arrays: call(*arrays).block_until_ready(), model.predict_noise)
            seconds, _ = measure(lambda evaluate=evaluate, arrays=arrays: evaluate(arrays), 5)
            emit("seconds an evaluation of two", statistics.median(seconds), f"ours, {implementation} attention")
    model = FaithDiff(config, params, dtype=dtype)
    for batch in BATCHES[options.size]:
        label = f"ours, {jnp.dtype(dtype).name}, batch {batch}"
        with guarded(emit, label):
            x = case(options.size, batch, side)
            begin = time.perf_counter()
            whole(model, x)
            emit("seconds of the first, with compiling", time.perf_counter() - begin, label)
            seconds, _ = measure(lambda x=x: whole(model, x), 3)
            emit("seconds a picture", statistics.median(seconds) / batch, label)
            emit("peak memory so far, GiB", peak_memory(options) / 2**30, label)
            work = restoration_flops(config, side)
            emit("TFLOP a picture", work / 1e12, label)
            emit("utilisation of the matrix rate", work * batch / statistics.median(seconds) / peak / 1e12, label)
    with guarded(emit, "profile"):
        x = case(options.size, 2, side)
        features = model.encode_lq(x["images"])
        arrays = x["latents"], x["timesteps"], features, x["context"], x["pooled"], x["time_ids"]
        for place, (name, milliseconds, part) in enumerate(
            slowest_kernels(lambda: model.predict_noise(*arrays).block_until_ready(), options.output / "profile")
        ):
            emit(f"kernel {place + 1}: {name}", f"{milliseconds:.2f} ms, {100 * part:.0f} %", "ours, one evaluation")


def train(options: argparse.Namespace, emit: Emit) -> None:
    """One step of stage 2, by `train_step.py`."""
    found = train_step.ours(training_options(options))
    second = statistics.median(found["seconds"])
    emit("loss of the first step", found["loss"])
    emit("seconds a step", second)
    emit(f"pictures of {CROP[options.size]} a second", training_options(options).batch / second)
    emit("utilisation of the matrix rate", found["flops"] / second / matrix_rate(options) / 1e12)
    emit("peak memory, GiB", found.get("peak memory", peak_memory(options)) / 2**30)
    emit("seconds of compiling", found["compile"])


def memory(options: argparse.Namespace, emit: Emit) -> None:
    """What the compiler assigns, without running anything."""
    config = our_config(options.size)
    dtype = jnp.bfloat16 if options.device != "cpu" else jnp.float32
    shapes = {
        part: unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in part_shapes(config, part).items()})
        for part in PARTS
    }
    model = FaithDiff(config, shapes, dtype=dtype)
    for side in SIDES[options.size]["memory"]:
        label = f"ours, {side}x{side}"
        with guarded(emit, label):
            x = case(options.size, 1, side)
            features = np.zeros((*x["latents"].shape[:3], config.feature_channels), np.float32)
            inputs = SamplingInputs(
                features=features,
                text=Text.of(x["context"], x["pooled"]),
                negative=Text.of(x["negative"], x["pooled"]),
                noise=x["latents"],
                start=x["latents"],
            )
            plan, inputs = plan_and_complete(inputs, RestoreOptions(steps=STEPS, guidance=GUIDANCE), config)
            denoiser = {name: shapes[name] for name in ("unet", "alignment")}
            assigned = model.programs.sample.lower(denoiser, plan, inputs).compile().memory_analysis()
            emit("parameters and inputs, GiB", assigned.argument_size_in_bytes / 2**30, label)
            emit("temporary, GiB", assigned.temp_size_in_bytes / 2**30, label)


def whole(model: FaithDiff, x: dict[str, np.ndarray]) -> np.ndarray:
    """A restoration from pictures to pictures, on the host again at the end."""
    features = model.encode_lq(x["images"])
    start = model.encode(x["images"], x["latents"])
    return np.asarray(model.decode(sample(model, x, features, steps=STEPS, start=start)))


def sample(model: FaithDiff, x: dict[str, np.ndarray], features: Any, **keywords: Any) -> jax.Array:
    """`FaithDiff.sample` with guidance, one tile."""
    texts = x["context"], x["pooled"], x["negative"], x["pooled"]
    tile = max(x["latents"].shape[1:3])
    return model.sample(features, *texts, x["latents"], guidance=GUIDANCE, tile=tile, **keywords)


def restoration_flops(config: FaithDiffConfig, side: int) -> float:
    """Matrix FLOPs of one picture: both encoders, the decoder and twice as many evaluations as steps."""
    networks = Networks(config, jnp.dtype(jnp.float32))
    params = {
        part: unflatten(
            {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in part_shapes(config, part).items()}
        )
        for part in PARTS
    }
    latent = side // config.vae.factor

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    image, latents = array(1, side, side, 3), array(1, latent, latent, config.vae.latent_channels)
    features = array(1, latent, latent, config.feature_channels)
    text = array(1, 77, config.unet.context_dim), array(1, config.unet.pooled_dim or 1)
    one = flops.count(
        lambda p, *arrays: networks.denoiser(p)(*arrays),
        {name: params[name] for name in ("unet", "alignment")},
        *(latents, array(1), features, *text, array(1, 6)),
    )
    ends = flops.count(lambda p, x: networks.lq_encoder(p)(x), params["lq_encoder"], image)
    ends += flops.count(lambda p, x: networks.vae(p).moments(x), params["vae"], image)
    ends += flops.count(lambda p, x: networks.vae(p).decode(x), params["vae"], latents)
    return 2 * STEPS * one + ends


def slowest_kernels(call: Any, folder: pathlib.Path) -> list[tuple[str, float, float]]:
    """Name, milliseconds and part of the whole of the kernels that take longest in a call, from a profile of it."""
    call()
    with jax.profiler.trace(str(folder)):
        call()
    newest = max(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True), key=lambda name: pathlib.Path(name).stat())
    with gzip.open(newest) as file:
        events = json.load(file)["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "/device:" in event["args"].get("name", "")
    }
    spent: dict[str, float] = {}
    for event in events:
        is_kernel = event.get("pid") in devices or "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and is_kernel:
            spent[event["name"]] = spent.get(event["name"], 0.0) + event["dur"] / 1e3
    total = sum(spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1])[:SLOWEST]
    return [(name, milliseconds, milliseconds / total) for name, milliseconds in longest]


def attentions(options: argparse.Namespace) -> tuple[str, ...]:
    """Those worth comparing on a device, the one that is chosen there first."""
    return {"cuda": ("cudnn", "xla"), "tpu": ("splash", "xla"), "cpu": ("heads", "xla")}[options.device]


@contextlib.contextmanager
def attending(implementation: str | None) -> Iterator[None]:
    """One attention for what is traced inside, or the choice that the model makes."""
    with contextlib.nullcontext() if implementation is None else use_implementation(implementation):
        yield


@contextlib.contextmanager
def guarded(emit: Emit, label: str) -> Iterator[None]:
    """What fails inside is a line of the report; the next measurement is made."""
    try:
        yield
    except Exception as error:  # whatever a device may raise
        emit("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300], label)


def with_own_programs(model: FaithDiff) -> FaithDiff:
    """Models of one architecture share what was compiled first, whatever attention that has; this one does not."""
    model.programs = Programs(model.config, dtype=model.dtype)
    return model


def placed(params: dict[str, Params], dtype: str) -> dict[str, Params]:
    """Parameters in the dtype to compute in."""
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), params)


def random_parameters(config: FaithDiffConfig, part: str, dtype: Any) -> Params:
    """Random numbers drawn on the device, of a size that keeps activations near one."""
    drawn = {}
    for number, (path, shape) in enumerate(part_shapes(config, part).items()):
        scale = float(np.prod(shape[:-1])) ** -0.5 if path.endswith("kernel") else 0.1
        drawn[path] = _normal(number, shape, jnp.dtype(dtype).name) * jnp.asarray(scale, dtype)
        if path.endswith("scale"):
            drawn[path] = drawn[path] + 1
    return unflatten(drawn)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def error(ours: Any, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def matrix_rate(options: argparse.Namespace) -> float:
    """TFLOP/s that the rate part measured for bfloat16; measured now if it did not."""
    found: list[float] = []

    def note(what: str, value: Any, label: str = "") -> None:
        if what == "TFLOP/s" and "bfloat16" in label:
            found.append(value)

    lines = (options.output / "figures.jsonl").read_text(encoding="utf-8").splitlines()
    for figure in map(json.loads, lines):
        if figure["part"] == "rate" and "value" in figure:
            note(figure["what"], figure["value"], figure["who"])
    if not found:
        rate(options, note)
    return found[0]


def peak_memory(options: argparse.Namespace) -> int:
    """Of the device, in bytes; of this process on a CPU."""
    if options.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statistics_ = jax.local_devices()[0].memory_stats() or {}
    return int(statistics_.get("peak_bytes_in_use", 0))
