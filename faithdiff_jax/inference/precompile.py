"""Everything that restoring pictures of some sizes compiles, compiled and kept, without a picture or the weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from faithdiff_jax.files.captions import Caption
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference import executables
from faithdiff_jax.inference.loading import DENOISING, shaped_parameters
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.restoration import Request, pictures_together, restore_all
from faithdiff_jax.inference.tile_captions import tile_boxes
from faithdiff_jax.models.parts import part_names
from faithdiff_jax.sharding import parameter_sharding
from faithdiff_jax.weights.model_directory import ModelDirectory


def model_of_shapes(
    stored: ModelDirectory,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantized: str | None = None,
    offload: bool = False,
) -> FaithDiff:
    """What `FaithDiff.load` gives, with shapes for parameters: for `precompile`, and for nothing else."""
    dtype = jnp.dtype(dtype or FaithDiff.default_dtype())

    def on_mesh(shape: tuple[int, ...], of: DTypeLike) -> jax.ShapeDtypeStruct:
        sharding: Sharding | None = None if mesh is None else parameter_sharding(mesh, shape)
        return jax.ShapeDtypeStruct(shape, of, sharding=sharding)

    params = {}
    for part in part_names(stored.config):
        shaped = jax.ShapeDtypeStruct if offload and part not in DENOISING else on_mesh
        params[part] = shaped_parameters(stored.config, part, dtype, shaped, quantized)
    return FaithDiff(stored.config, params, Tokenizers.load(stored.tokenizers), dtype=dtype, mesh=mesh)


def precompile(
    model: FaithDiff, sizes: Sequence[tuple[int, int]], options: RestoreOptions, *, tile_captions: bool = False
) -> None:
    """Compile what restoring pictures of these heights and widths takes, alone and in every batch that may come up.

    It is what `executables.keep_in` keeps that another process finds. With `tile_captions`, for pictures of which each
    tile has a caption of its own.

    Raises:
        InputError: options that the model cannot take, or a size that is too large for them.
    """
    with executables.only_compile():
        for height, width in dict.fromkeys(sizes):
            most = pictures_together(options, model.config, options.padded_size(model.config, height, width))
            caption: Caption = ""
            if tile_captions:  # no two of them the same, which would be encoded once
                caption = list(map(str, range(len(tile_boxes(options, model.config, (height, width))))))
            picture = Request(image=np.zeros((height, width, 3), np.uint8), caption=caption)
            for count in batch_sizes(most):
                restore_all(model, [picture] * count, options)


def batch_sizes(most: int) -> list[int]:
    """One number of pictures for each program of a batch of up to `most`: 1, 2, 4, ..., `most`."""
    return [min(1 << power, most) for power in range((most - 1).bit_length() + 1)]
