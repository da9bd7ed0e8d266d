"""Where other networks look into a UNet and change what it computes: nothing by default.

    conv_in -> down -> down -> ... -> middle -> up(join) -> ... -> up(join) -> noise

Each method is called with what the UNet has at that place, and gives what it goes on with. Places on the way down are
numbered from 1 by what is kept for the way up, of which 0 is the first convolution's result; joins have the number of
what they take.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from faithdiff_jax.models.layers import Layers
from faithdiff_jax.models.reuse import TextKeysValues, TextSources


class Steering:
    """Of one evaluation: it may hold arrays, and collect them from call to call."""

    def down(
        self, number: int, before: Float[Array, "b _ _ _"], after: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """What a ResNet block with its transformer, or a change of size, makes of `before` is `after`."""
        return after

    def middle(self, before: Float[Array, "b h w c"], after: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What the middle block makes of `before` is `after`."""
        return after

    def join(
        self, number: int, hidden: Float[Array, "b h w c"], skip: Float[Array, "b h w s"]
    ) -> Float[Array, "b h w cs"]:
        """What the next ResNet block of the way up takes: the features so far and those kept on the way down."""
        return jnp.concatenate([hidden, skip], axis=-1)

    def enlarge(self, number: int, hidden: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What is enlarged for the next finer level; `number` is that of the last join."""
        return hidden


UNSTEERED = Steering()


class Steerer(nnx.Module):
    """A network that steers a UNet by LQ features, at every evaluation: what takes the aligner's place in baselines.

    What it needs of the noise level and of the texts comes with what the UNet needs, computed once for all steps.
    """

    def __init__(self, feature_channels: int | None, width: int, *, make: Layers):
        """`feature_channels` are those of the LQ features; None for features that are embedded already, at `width`."""
        self.hint = None if feature_channels is None else make.conv3x3(feature_channels, width, zeros=True)

    @property
    def embedding_dim(self) -> int:
        """Width of its own embedding of timesteps and texts, behind the UNet's."""
        return 0

    def embed(self, features: Float[Array, "b h w f"]) -> Float[Array, "b h w c"]:
        """LQ features (B, h, w, F) -> condition (B, h, w, width); once an image."""
        return features if self.hint is None else self.hint(features)

    def embed_timesteps(self, timesteps: Real[Array, "b"], of_unet: Float[Array, "b e"]) -> Float[Array, "b e2"]:
        """What stands in the place of the UNet's embedding (B, E) of timesteps: it, and the steerer's own behind it."""
        return of_unet

    def embed_added(
        self, pooled: Float[Array, "b p"] | None, time_ids: Real[Array, "b 6"] | None, of_unet: Float[Array, "_ e"]
    ) -> Float[Array, "_ e2"]:
        """The same for the embedding of pooled text and time ids."""
        return of_unet

    def project_text(self, context: Float[Array, "b m d"]) -> TextKeysValues:
        """(B, M, context_dim) -> keys and values for each of its transformers."""
        raise NotImplementedError

    def steer(
        self,
        latents: Float[Array, "b h w z"],
        hidden: Float[Array, "kb h w c"],
        condition: Float[Array, "b h w d"],
        embedding: Float[Array, "kb e"],
        text: TextSources,
    ) -> tuple[Float[Array, "kb h w c"], Steering]:
        """Begin one evaluation.

        Args:
            latents: (B, h, w, z), as the UNet takes them.
            hidden: (k * B, h, w, C), the UNet's `conv_in` of them, for k texts.
            condition: (B, h, w, D), from `embed`.
            embedding: (k * B, E'), sum of `embed_timesteps` and `embed_added`.
            text: what `project_text` gave.

        Returns:
            What the UNet goes on with in the place of `hidden`, and its steering.
        """
        raise NotImplementedError
