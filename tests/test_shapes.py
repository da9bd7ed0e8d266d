"""The checks on array shapes: what a signature does not describe is refused where it enters, not layers below."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.evaluation.metrics import psnr
from faithdiff_jax.models.alignment import Alignment, AlignmentConfig
from faithdiff_jax.models.attention import attention


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: attention(zeros(2, 4, 1, 8), zeros(2, 5, 1, 8), zeros(2, 6, 1, 8)),
        lambda: attention(zeros(2, 4, 1, 8), zeros(1, 5, 1, 8), zeros(1, 5, 1, 8)),
        lambda: schedule.add_noise(schedule.ScheduleConfig(), zeros(2, 4, 4, 4), zeros(2, 4, 4, 3), 1),
        lambda: schedule.add_noise(schedule.ScheduleConfig(), zeros(2, 4, 4, 4), zeros(1, 4, 4, 4), 1),
        lambda: psnr(np.zeros((3, 16, 16), np.uint8), np.zeros((3, 16, 16), np.uint8)),
        lambda: psnr(np.zeros((16, 16, 3), np.float32), np.zeros((16, 16, 3), np.float32)),
    ],
)
def test_wrong_shapes_and_types_are_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_under_tracing_too():
    """A condition of one image for a batch of two is named; JAX itself would refuse a concatenation further down."""
    aligner = nnx.eval_shape(lambda: Alignment(AlignmentConfig(norm_groups=8), 8, 8, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(aligner)
    run = lambda parameters, hidden, condition: nnx.merge(graph, parameters)(hidden, condition)  # noqa: E731
    hidden = jax.ShapeDtypeStruct((2, 4, 4, 8), jnp.bfloat16)
    assert jax.eval_shape(run, parameters, hidden, hidden).shape == hidden.shape
    with pytest.raises(jaxtyping.TypeCheckError, match="condition"):
        jax.eval_shape(run, parameters, hidden, jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.bfloat16))
