"""The training step of each baseline against PyTorch's: the loss, and the gradient of every tensor that trains.

What follows from gradients (clipping, AdamW, averages) is the same for all models: `test_parity_training` has it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity
from torch_baselines import TrainedControlNet
from torch_training import to_ours, to_published, train
from training_case import make_batch, make_step, train_config

STAGE = {
    "groups": {"rest": {"parameters": ["alignment.*", "lq_encoder.*"], "learning_rate": 1e-3}},
    "frozen": ["unet.*", "vae.*", "text_encoder*"],
}
LIMIT = 1e-4
# Of the model's largest gradient, what rounding may leave of a tensor's.
FLOOR = 1e-7
KINK = 1e-5  # see test_parity_training
BATCH = 2


@pytest.mark.parametrize("make", [TrainedControlNet])
def test_every_gradient(make):
    model = make((16, 32))
    config = train_config(STAGE, batch=BATCH, rematerialisation="none")
    batch = make_batch(0, BATCH)
    _, (record,) = train(model, config, [batch], 1)
    assert record.smallest_error > KINK, "choose another seed: this one is too near the kink of L1"

    step = make_step(config, model.config)
    arrays = to_ours(model)
    trained = {path: jnp.asarray(array) for path, array in arrays.items() if path in step.labels}
    frozen = {path: jnp.asarray(array) for path, array in arrays.items() if path not in step.labels}
    gradients, seen = jax.jit(step.gradients)(trained, frozen, batch, jnp.zeros((), jnp.int32))
    assert_parity(np.mean(seen["losses"]), record.loss, 1e-5)
    ours = to_published(model.config, jax.device_get(gradients))
    assert ours.keys() == record.gradients.keys()
    most = max(largest(gradient) for gradient in record.gradients.values())
    for path, gradient in record.gradients.items():
        error = largest(ours[path] - gradient)
        assert error <= LIMIT * largest(gradient) + FLOOR * most, f"{path}: {error / largest(gradient):.1e}"
        assert largest(gradient) > 1e-6 * most, f"{path}: hardly a gradient"


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())
