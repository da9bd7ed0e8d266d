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
from torch_training import assert_gradients, to_ours
from training_case import POOLED, TEXT_WIDTH

from faithdiff_jax.models.parts import Networks, unflatten

STAGE = {
    "groups": {"rest": {"parameters": ["alignment.*", "lq_encoder.*"], "learning_rate": 1e-3}},
    "frozen": ["unet.*", "vae.*", "text_encoder*"],
}
# Before a norm of as many groups as channels; keys of a softmax.
WITHOUT_EFFECT = {
    "denoise_encoder.down_blocks.0.resnets.0.conv1.bias",
    "denoise_encoder.mid_block.attentions.0.to_k.bias",
}


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


@pytest.mark.parametrize("make", [TrainedControlNet, TrainedControlNetXS, TrainedSFT])
def test_every_gradient(make):
    assert_gradients(*networks(make), STAGE, WITHOUT_EFFECT)
