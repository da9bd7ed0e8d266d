"""The training step of each baseline against PyTorch's: the loss, and the gradient of every tensor that trains.

What follows from gradients (clipping, AdamW, averages) is the same for all models: `test_parity_training` has it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_parity, nchw, nhwc
from port import normal
from torch_baselines import TrainedControlNet, TrainedControlNetXS, TrainedSFT
from torch_training import to_ours, to_published, train
from training_case import POOLED, TEXT_WIDTH, make_batch, make_step, train_config

from faithdiff_jax.models.parts import Networks, unflatten

STAGE = {
    "groups": {"rest": {"parameters": ["alignment.*", "lq_encoder.*"], "learning_rate": 1e-3}},
    "frozen": ["unet.*", "vae.*", "text_encoder*"],
}
LIMIT = 1e-4
# Of the model's largest gradient, what rounding may leave of a tensor's.
FLOOR = 1e-7
KINK = 1e-5  # see test_parity_training
# Before a norm of as many groups as channels; keys of a softmax.
WITHOUT_EFFECT = {
    "denoise_encoder.down_blocks.0.resnets.0.conv1.bias",
    "denoise_encoder.mid_block.attentions.0.to_k.bias",
}
BATCH = 2


def narrow_xs():
    return TrainedControlNetXS(levels=1)


@functools.cache
def networks(make):
    """PyTorch's model, and its parameters as ours."""
    model = make()
    return model, to_ours(model)


@pytest.mark.parametrize("make", [TrainedControlNetXS, TrainedSFT])
def test_the_prediction(rng, make):
    """Of a model whose network is converted in no other test."""
    model, arrays = networks(make)
    # Sides whose halves are even: ControlNet-XS in PyTorch knows no others.
    latents, pictures = normal(rng, 2, 8, 12, 4), rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    text, timesteps = [normal(rng, 2, 5, 2 * TEXT_WIDTH), normal(rng, 2, POOLED)], np.array([901, 3])
    time_ids = rng.uniform(0, 99, (2, 6)).astype(np.float32)
    context, pooled, ids = (torch.from_numpy(array).double() for array in (*text, time_ids))
    given = {"encoder_hidden_states": context, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    with torch.no_grad():
        inputs = nchw(latents).double(), torch.from_numpy(timesteps), nchw(pictures).double()
        expected = model.predict(*inputs, given, 1)
    parts, ours = unflatten(arrays), Networks(model.config, jnp.float32)

    @jax.jit
    def predict(parts, pictures, latents, timesteps, *arrays):
        denoiser = ours.denoiser({part: parts[part] for part in ("unet", "alignment")})
        return denoiser(latents, timesteps, ours.lq_encoder(parts["lq_encoder"])(pictures), *arrays)

    assert_parity(predict(parts, pictures, latents, timesteps, *text, time_ids), nhwc(expected))


@pytest.mark.parametrize("make", [TrainedControlNet, narrow_xs, TrainedSFT])
def test_every_gradient(make):
    model, arrays = networks(make)
    config = train_config(STAGE, batch=BATCH, rematerialisation="none")
    batch = make_batch(0, BATCH)
    _, (record,) = train(model, config, [batch], 1)
    assert record.smallest_error > KINK, "choose another seed: this one is too near the kink of L1"

    step = make_step(config, model.config)
    trained = {path: jnp.asarray(array) for path, array in arrays.items() if path in step.labels}
    frozen = {path: jnp.asarray(array) for path, array in arrays.items() if path not in step.labels}
    gradients, seen = jax.jit(step.gradients)(trained, frozen, batch, jnp.zeros((), jnp.int32))
    assert_parity(np.mean(seen["losses"]), record.loss, 1e-5)
    ours = to_published(model, jax.device_get(gradients))
    assert ours.keys() == record.gradients.keys()
    most = max(largest(gradient) for gradient in record.gradients.values())
    for path, gradient in record.gradients.items():
        error = largest(ours[path] - gradient)
        assert error <= LIMIT * largest(gradient) + FLOOR * most, f"{path}: {error / largest(gradient):.1e}"
    without = {path for path, gradient in record.gradients.items() if largest(gradient) < 1e-6 * most}
    assert without == (WITHOUT_EFFECT & ours.keys())


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())
