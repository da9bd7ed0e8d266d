"""Three training steps against PyTorch's: losses, every gradient, every parameter, at 1e-4 of each tensor's largest.

Noise, timesteps and VAE samples are given. PyTorch computes in float64, ours in float32.

Adam divides a gradient by its own size, so that of a gradient which is rounding alone it makes a full step in a random
direction, and the next gradients then differ. So there are two kinds of settings. With an epsilon of the size of the
gradients the step is smooth: the change of every element is held to 1e-4 of its tensor's largest change, after one and
after three steps. With the published epsilon this holds for one step, where a gradient is at least `DETERMINED` of its
tensor's largest; later steps are held to 1e-4 of the tensor's largest value, and elements that were ever less
determined to the sum of the rates. (`test_optimizer` compares AdamW itself, on equal gradients down to exact zeros.)
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from parity import assert_parity
from torch_training import Record, TorchModel, to_ours, to_published, train
from training_case import BATCH, STAGE_1, STAGE_2, make_batch, make_step, model_config, start, train_config

STEPS = 3
LIMIT = 1e-4
# Mathematically zero gradients: of the model's largest gradient, what rounding may leave of them.
FLOOR = 1e-7
DETERMINED = 0.03
# A float32 parameter near one is rounded by this much at most, each step.
ROUNDING = 2**-24
# Every error of every prediction must be at least so far from zero, where the sign that is L1's gradient jumps: ten
# times what our predictions differ from PyTorch's.
KINK = 1e-5

SMOOTH, PUBLISHED = 1e-4, 1e-8
ONE, TWO = (16,), (16, 32)  # widths of the UNet's levels
# What shifts all channels of a norm's group alike, or all of a softmax's scores, changes nothing.
WITHOUT_EFFECT = {
    "denoise_encoder.down_blocks.0.resnets.0.conv1.bias",  # before a norm of as many groups as channels
    "denoise_encoder.mid_block.resnets.1.conv2.bias",  # before the aligner's norm, which is such a one
    "denoise_encoder.mid_block.attentions.0.to_k.bias",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    stage: dict
    widths: tuple[int, ...]
    mixing: str
    group: int | None
    warmup: int
    epsilon: float

    @property
    def attending(self) -> int:
        """Samples that the aligner of PyTorch is called with at once."""
        return 1 if self.mixing == "none" else self.group or BATCH


SETTINGS = {
    "stage 1": Setting(STAGE_1, ONE, "none", None, 0, PUBLISHED),
    "stage 1, the batch mixed": Setting(STAGE_1, ONE, "batch", BATCH, 1, SMOOTH),
    "stage 2": Setting(STAGE_2, TWO, "none", None, 0, SMOOTH),
    "stage 2, half of the batch mixed": Setting(STAGE_2, ONE, "batch", BATCH // 2, 0, PUBLISHED),
}


@dataclasses.dataclass(frozen=True)
class Ours:
    """By published name what PyTorch's Record has."""

    metrics: list[dict[str, Any]]
    gradients: dict[str, np.ndarray]
    """Of the first step, before they were clipped."""
    parameters: list[dict[str, np.ndarray]]


@functools.cache
def torch_model(widths: tuple[int, ...]) -> TorchModel:
    return TorchModel(widths)


@functools.cache
def steps(name: str) -> tuple[dict[str, np.ndarray], list[Record], Ours]:
    """Initial parameters, PyTorch's steps and ours."""
    setting = SETTINGS[name]
    config = train_config(
        setting.stage,
        steps=4,
        ema=None,
        rematerialisation="none",
        optimizer={"warmup": setting.warmup, "clip": 0.25, "epsilon": setting.epsilon},
    )
    batches = [make_batch(seed) for seed in range(STEPS)]
    torch_one = torch_model(setting.widths)
    initial, records = train(torch_one, config, batches, setting.attending)

    step = make_step(config, model_config(setting.mixing, setting.group, setting.widths))
    published = functools.partial(to_published, torch_one)
    state, frozen = start(step, to_ours(torch_one))
    metrics, parameters, gradients = [], [], {}
    for batch in batches:
        state, values = step.run(state, frozen, batch)
        metrics.append(jax.device_get(values))
        parameters.append(published(jax.device_get(state["trained"])))
        if not gradients:
            # Adam's first moment is then (1 - beta1) times the clipped gradient.
            norm, optimizer = metrics[0]["gradient_norm"], config.optimizer
            scale = max(norm, optimizer.clip) / optimizer.clip / (1 - optimizer.beta1)
            gradients = published({path: scale * array for path, array in moments(state["optimizer"]).items()})
    return initial, records, Ours(metrics, gradients, parameters)


def moments(optimizer: Any) -> dict[str, np.ndarray]:
    """The first moments of all groups."""
    groups = jax.tree.leaves(optimizer, is_leaf=lambda node: hasattr(node, "mu"))
    named = [group.mu for group in groups if hasattr(group, "mu")]
    return {path: np.asarray(array) for mu in named for path, array in mu.items() if isinstance(array, jax.Array)}


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())


@pytest.mark.parametrize("name", SETTINGS)
def test_losses(name):
    _, records, ours = steps(name)
    for record, metrics in zip(records, ours.metrics, strict=True):
        assert record.smallest_error > KINK, "choose another seed: this one is too near the kink of L1"
        assert_parity(metrics["loss"], record.loss, 1e-5)
        assert_parity(np.mean(metrics["losses"]), record.loss, 1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_gradient(name):
    _, records, ours = steps(name)
    reference = records[0].gradients
    assert ours.gradients.keys() == reference.keys()
    most = max(map(largest, reference.values()))
    for path, gradient in reference.items():
        error = largest(ours.gradients[path] - gradient)
        assert error <= LIMIT * largest(gradient) + FLOOR * most, f"{path}: {error / largest(gradient):.1e}"
    zero = {path for path, gradient in reference.items() if largest(gradient) < 1e-12 * most}
    assert zero == (WITHOUT_EFFECT & reference.keys())
    assert all(largest(gradient) > 1e-5 * most for path, gradient in reference.items() if path not in zero)


@pytest.mark.parametrize("name", SETTINGS)
def test_norms_and_rates(name):
    _, records, ours = steps(name)
    groups = SETTINGS[name].stage["groups"]
    for record, metrics in zip(records, ours.metrics, strict=True):
        assert record.norm > 0.25, "the clip must bite"
        assert_parity(metrics["gradient_norm"], record.norm)
        for group, rate in zip(groups, record.rates, strict=True):
            np.testing.assert_allclose(metrics[f"learning_rate/{group}"], rate, rtol=1e-6, atol=1e-12)
    squares = sum(ours.metrics[0][f"gradient_norm/{group}"] ** 2 for group in groups)
    assert_parity(squares**0.5, records[0].norm, 1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter(name):
    initial, records, ours = steps(name)
    smooth = SETTINGS[name].epsilon == SMOOTH
    reach, determined = 0.0, {path: np.ones(array.shape, bool) for path, array in initial.items()}
    for number, (record, parameters) in enumerate(zip(records, ours.parameters, strict=True), 1):
        reach += max(record.rates)
        assert parameters.keys() == initial.keys()
        for path, before in initial.items():
            change = record.parameters[path] - before
            error = np.abs(parameters[path] - record.parameters[path])
            rounding = number * ROUNDING * max(1, largest(before))
            gradient = np.abs(record.gradients[path])
            determined[path] &= (gradient >= DETERMINED * gradient.max()) & (path not in WITHOUT_EFFECT)
            compared = determined[path] | (smooth and path not in WITHOUT_EFFECT)
            scale = largest(change if smooth or number == 1 else before)
            worst = np.max(error, where=compared, initial=0)
            assert worst <= LIMIT * scale + rounding, f"{path}, step {number}: {worst / scale:.1e}"
            assert (error <= reach + rounding).all(), f"{path}, step {number}"
        if number == 1:
            share = np.mean(np.concatenate([where.ravel() for where in determined.values()]))
            assert share > 0.6, "too little is compared"
    for path in initial.keys() - WITHOUT_EFFECT:
        assert largest(records[-1].parameters[path] - initial[path]) > 1e-5, f"{path} hardly changed"


def test_warm_up_begins_at_zero():
    """The first step of a warm-up changes nothing, to the bit, but for Adam's moments."""
    initial, records, ours = steps("stage 1, the batch mixed")
    assert records[0].rates == (0,)
    for path, before in initial.items():
        np.testing.assert_array_equal(ours.parameters[0][path], before.astype(np.float32))


def test_what_is_mixed_tells():
    """The published attention over the batch is no small thing: the three mixings' losses are far apart."""
    losses = {name: records[0].loss for name, (_, records, _) in ((n, steps(n)) for n in SETTINGS)}
    assert abs(losses["stage 1"] - losses["stage 1, the batch mixed"]) > 1e-3
    assert abs(losses["stage 2, half of the batch mixed"] - losses["stage 1, the batch mixed"]) > 1e-3
