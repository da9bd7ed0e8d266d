"""Group normalisation, whose statistics can be those of a larger picture than the tile that goes through a network.

    tile -> network under `shared`(None)    -> mean and variance of each norm's groups, in the tile's own part
    tile -> network under `shared`(of all)  -> what the network makes of the tile inside the whole picture

The second also gives the statistics again: each pass over all tiles, with those that the pass before found, makes those
of one norm more exact, whose inputs no longer change; the others come close to it much faster.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from faithdiff_jax.models.backend import setting


class Moments(NamedTuple):
    """Mean and variance of a norm's groups, each (B, groups), in float32."""

    mean: Float[Array | np.ndarray, "b groups"]
    variance: Float[Array | np.ndarray, "b groups"]


@dataclasses.dataclass
class Shared:
    """What all norms that are traced under `sharing` take and give.

    Attributes:
        given: of each norm in the order of the calls, what it normalises by; None for what it finds.
        rows: (h,), 1 in the tile's own part and 0 around it, at the resolution of what goes into the network, or any
            other that divides those inside.
        columns: (w,), the same across.
        found: what each norm found in the tile's own part.
    """

    given: Sequence[Moments] | None
    rows: Float[Array | np.ndarray, " h"]
    columns: Float[Array | np.ndarray, " w"]
    found: list[Moments] = dataclasses.field(default_factory=list)

    def moments(self, grouped: Float[Array, "b h w groups each"]) -> Moments:
        """What the next norm normalises by."""
        height, width = grouped.shape[1:3]
        rows = jnp.repeat(self.rows, height // self.rows.shape[0])
        columns = jnp.repeat(self.columns, width // self.columns.shape[0])
        own = (rows[:, None] * columns[None])[None, :, :, None, None]
        count = jnp.sum(own) * grouped.shape[-1]
        mean = jnp.sum(grouped * own, axis=(1, 2, 4)) / count
        variance = jnp.sum(jnp.square(grouped - mean[:, None, None, :, None]) * own, axis=(1, 2, 4)) / count
        self.found.append(Moments(mean, variance))
        return self.found[-1] if self.given is None else self.given[len(self.found) - 1]


_shared: contextvars.ContextVar[Shared | None] = contextvars.ContextVar("shared_statistics", default=None)


@contextlib.contextmanager
def sharing(shared: Shared) -> Iterator[Shared]:
    """Have the norms of everything traced inside take and give statistics."""
    with setting(_shared, shared):
        yield shared


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm` over (B, H, W, C), but for `sharing`."""

    def __call__(self, x: Float[Array, "*shape"], *, mask: jax.Array | None = None) -> Float[Array, "*shape"]:
        """(B, H, W, C) -> (B, H, W, C)."""
        shared = _shared.get()
        if shared is None:
            plain: jax.Array = super().__call__(x, mask=mask)
            return plain
        assert self.scale is not None
        assert self.bias is not None
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.num_groups, self.group_size)
        mean, variance = (each[:, None, None, :, None] for each in shared.moments(grouped))
        normed = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        scale, bias = (each[...].astype(jnp.float32)[None, None, None] for each in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype if self.dtype is None else self.dtype)
