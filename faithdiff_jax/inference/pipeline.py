"""FaithDiff as one object: the array-level steps of restoring a photograph, and `restore`, which runs them all.

    picture -> upscale, pad -> LQ features, start latent \
    caption -> token ids -> context, pooled               > sample -> decode -> crop -> colour fix -> picture

Each step is a jitted pure function of (parameters, arrays); modules are merged inside it. Images are (B, H, W, 3) in
[-1, 1], latents (B, H/8, W/8, 4) for SDXL's VAE: the factor and the channels come from the configuration.
"""

import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images as images_
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference.color import LEVELS, METHODS, MOST_LEVELS, fix_color
from faithdiff_jax.inference.denoise import SamplingPlan, Text, check_options
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.inference.tiling import fade_tiles, latent_grid
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, numbered, part_names, part_shapes
from faithdiff_jax.sharding import batch_sharding, parameter_sharding
from faithdiff_jax.weights.model_directory import ModelDirectory

log = logging.getLogger("faithdiff_jax")

Array = jax.Array | np.ndarray

STARTS = ("lr", "noise")
VAE_TILE = 1024
"""Side in image pixels above which the encoders and the decoder work in tiles, as published."""


class FaithDiff:
    """A loaded model.

    Attributes:
        config: the architecture.
        params: part name ("unet", "alignment", "lq_encoder", "vae", "text_encoder", "text_encoder_2") -> pytree.
        programs: the jitted functions of (params, arrays) behind every call.
        mesh: device mesh, or None for the default device.
        vae_tile: side in image pixels above which encoders and decoder work in tiles.
    """

    def __init__(
        self,
        config: FaithDiffConfig,
        params: Mapping[str, Params],
        tokenizers: Tokenizers | None = None,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        vae_tile: int = VAE_TILE,
    ):
        """Take parameters as they are; `load` reads them from a model directory.

        `dtype` is what the networks compute in; norm statistics, softmax and the sampler stay in float32.
        """
        if vae_tile % (4 * config.vae.factor):
            raise InputError(f"vae_tile is {vae_tile}: must be a multiple of {4 * config.vae.factor}")
        self.config = config
        self.mesh = mesh
        self.vae_tile = vae_tile
        self.params = dict(params)
        self.dtype = jnp.dtype(dtype)
        self._tokenizers = tokenizers
        self._announced: set[tuple] = set()

        self.programs = _programs(config, self.dtype, mesh)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        vae_tile: int = VAE_TILE,
    ) -> "FaithDiff":
        """Read a model directory that `convert_weights.py` or a training run wrote.

        Args:
            path: the model directory.
            dtype: what to hold and compute in; None for bfloat16 on GPU and TPU, float32 on CPU.
            mesh: devices to spread over (see `sharding.make_mesh`); None for the default device.
            vae_tile: side in image pixels above which encoders and decoder work in tiles.

        Raises:
            InputError: not a model directory, or one whose parameters do not fit its configuration.
        """
        model = ModelDirectory.open(pathlib.Path(path))
        config = model.config
        dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
        params = {}
        for part in part_names(config):
            sharding = None
            if mesh is not None:
                shapes = part_shapes(config, part)
                sharding = {name: parameter_sharding(mesh, shape) for name, shape in shapes.items()}
            params[part] = model.load(part, dtype=dtype, sharding=sharding)
        return cls(config, params, Tokenizers.load(model.tokenizers), dtype=dtype, mesh=mesh, vae_tile=vae_tile)

    def encode_lq(self, images: Array) -> Array:
        """LQ features: (B, H, W, 3) in [-1, 1], sides multiples of 8 -> (B, H/8, W/8, 512)."""
        return self._in_tiles(lambda x: self.programs.encode_lq(self.params["lq_encoder"], x), images, encode=True)

    def encode(self, images: Array, noise: Array) -> jax.Array:
        """VAE sample, scaled: (B, H, W, 3) in [-1, 1] and standard normal (B, H/8, W/8, 4) -> (B, H/8, W/8, 4)."""
        moments = self._in_tiles(lambda x: self.programs.moments(self.params["vae"], x), images, encode=True)
        return self.programs.draw(self.params["vae"], moments, noise)

    def decode(self, latents: Array) -> Array:
        """Scaled latents (B, h, w, 4) -> images (B, 8h, 8w, 3), about [-1, 1]."""
        return self._in_tiles(lambda x: self.programs.decode(self.params["vae"], x), latents, encode=False)

    def encode_text(self, captions: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        """Captions -> context (B, 77, 2048) and pooled (B, 1280), as trained; "" for no caption.

        Raises:
            InputError: the model was made without tokenizers.
        """
        if self._tokenizers is None:
            raise InputError("this model has no tokenizers: load it from a model directory, or pass them in")
        names = numbered("text_encoder", len(self.config.text_encoders))
        return self.programs.encode_text([self.params[name] for name in names], self._tokenizers(list(captions)))

    def predict_noise(
        self,
        latents: Array,
        timesteps: Array,
        features: Array,
        context: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
    ) -> jax.Array:
        """One evaluation of UNet and aligner, for samplers of one's own.

        Args:
            latents: (B, h, w, 4), already divided by sqrt(sigma^2 + 1).
            timesteps: (B,) in 0..999.
            features: (B, h, w, 512), from `encode_lq`.
            context: (B, M, 2048).
            pooled: (B, 1280), or None for a model without added embedding.
            time_ids: (B, 6) height, width, crop top, crop left, target height, target width.

        Returns:
            (B, h, w, 4).
        """
        return self.programs.predict_noise(
            self._denoiser_params, latents, timesteps, features, context, pooled, time_ids
        )

    def sample(
        self,
        features: Array,
        context: Array,
        pooled: Array | None,
        negative_context: Array | None,
        negative_pooled: Array | None,
        noise: Array,
        *,
        steps: int = 20,
        guidance: float = 5.0,
        guidance_rescale: float = 0.0,
        image_size: tuple[int, int] | None = None,
        start: Array | None = None,
        tile: int = 128,
        overlap: float = 0.5,
        tile_batch: int = 1,
        sampler: str = "euler",
        step_noise: Array | None = None,
    ) -> jax.Array:
        """The whole denoising loop in one jitted program.

        Args:
            features: (B, h, w, 512), from `encode_lq`.
            context: (B, M, 2048), any M.
            pooled: (B, 1280).
            negative_context: (B, N, 2048); not needed, and not used, at guidance 1 or less.
            negative_pooled: (B, 1280).
            noise: (B, h, w, 4), standard normal.
            steps: 1 to 1,000.
            guidance: weight of classifier-free guidance, 0 or more; applied above 1 only.
            guidance_rescale: phi in 0..1.
            image_size: (H, W) in pixels of the whole padded picture; 8 times the latents' by default.
            start: (B, h, w, 4), scaled latent of the LQ image (`encode`) for the "lr" start; None for pure noise.
            tile: side of a tile in latent pixels; larger latents are cut up and blended at every step.
            overlap: stride from tile to tile as a fraction of a tile, in (0, 1], as published.
            tile_batch: tiles that go through the UNet together.
            sampler: "euler" or "ddpm".
            step_noise: (steps, B, h, w, 4), standard normal, for "ddpm".

        Returns:
            (B, h, w, 4), float32, scaled.

        Raises:
            InputError: a value outside its range.
        """
        check_options(self.config, steps, guidance, guidance_rescale, tile, overlap, tile_batch, sampler)
        if sampler == "ddpm" and step_noise is None:
            raise InputError("step_noise is None: sampler 'ddpm' needs (steps, B, h, w, c) standard normal noise")
        if guidance > 1 and negative_context is None:
            raise InputError(f"guidance is {guidance}: above 1 it needs negative_context and negative_pooled")
        if self.config.unet.pooled_dim is not None and (pooled is None or (guidance > 1 and negative_pooled is None)):
            raise InputError("pooled or negative_pooled is None: this model's added embedding needs pooled texts")
        negative = None
        if guidance > 1:
            assert negative_context is not None
            negative = _text(negative_context, negative_pooled)
        _, height, width, _ = noise.shape
        factor = self.config.vae.factor
        size = image_size or (height * factor, width * factor)
        corners = latent_grid(height, width, tile, overlap)
        plan = SamplingPlan(
            schedule=self.config.schedule,
            steps=steps,
            sampler=sampler,
            corners=corners,
            tile=(min(tile, height), min(tile, width)),
            tile_batch=min(tile_batch, len(corners)),
        )
        time_ids = np.array([(*size, *corner, tile * factor, tile * factor) for corner in corners], np.float32)
        self._announce("sampler", noise.shape, f"{len(corners)} tiles", f"{steps} steps", guidance > 1)
        return self.programs.sample(
            self._denoiser_params,
            plan,
            features,
            _text(context, pooled),
            negative,
            noise,
            start,
            step_noise if sampler == "ddpm" else None,
            time_ids,
            np.float32(guidance),
            np.float32(guidance_rescale) if guidance_rescale > 0 else None,
        )

    def restore(
        self,
        image: np.ndarray,
        caption: str = "",
        *,
        scale: float = 2,
        steps: int = 20,
        guidance: float = 5.0,
        guidance_rescale: float = 0.0,
        seed: int = 42,
        noise: Mapping[str, Array] | None = None,
        start: str = "lr",
        tile: int = 128,
        overlap: float = 0.5,
        tile_batch: int = 1,
        sampler: str = "euler",
        color_fix: str = "adain",
        wavelet_levels: int = LEVELS,
        negative_caption: str = "",
        multiple: int | None = None,
    ) -> np.ndarray:
        """Restore one picture (section "Restoring one image" of the published pipeline).

        Args:
            image: (h, w, 3) uint8, of any size.
            caption: what the picture shows; used as it is.
            scale: how many times larger each side becomes.
            steps: 1 to 1,000.
            guidance: 0 or more; applied above 1 only.
            guidance_rescale: phi in 0..1.
            seed: of all noise; the same seed gives the same picture on one device or eight.
            noise: instead of the seed, standard normal arrays: "start" (1, H/8, W/8, 4), "encode" of the same shape
                for the "lr" start, "steps" (steps, 1, H/8, W/8, 4) for the "ddpm" sampler.
            start: "lr" from the noised LQ picture, "noise" from noise alone.
            tile: side of a tile in latent pixels.
            overlap: stride fraction of the tiles.
            tile_batch: tiles that go through the UNet together.
            sampler: "euler" or "ddpm".
            color_fix: "adain", "wavelet" or "none".
            wavelet_levels: what is coarser than 2**levels pixels comes from the input, under "wavelet"; 1 to 10.
            negative_caption: what guidance leads away from; published: the empty caption, encoded.
            multiple: pad sides up to a multiple of this many pixels, 8 by default as published. A larger one lets
                pictures of many sizes share a compiled program, at slightly other results.

        Returns:
            (round(h * scale), round(w * scale), 3) uint8.

        Raises:
            InputError: a value outside its range, or a picture too small for the scale.
        """
        if start not in STARTS:
            raise InputError(f"start is {start!r}: must be one of {', '.join(STARTS)}")
        if color_fix not in METHODS:
            raise InputError(f"color_fix is {color_fix!r}: must be one of {', '.join(METHODS)}")
        if not 1 <= wavelet_levels <= MOST_LEVELS:
            raise InputError(f"wavelet_levels is {wavelet_levels}: must be between 1 and {MOST_LEVELS}")
        check_options(self.config, steps, guidance, guidance_rescale, tile, overlap, tile_batch, sampler)
        factor = self.config.vae.factor
        multiple = multiple or factor
        if multiple % factor:
            raise InputError(f"multiple is {multiple}: must be a multiple of {factor}")

        upscaled = images_.upscale(image, scale)
        height, width = upscaled.shape[:2]
        padded = images_.to_float(images_.pad_to_multiple(upscaled, multiple))[None]
        size = padded.shape[1], padded.shape[2]
        noise = noise or self._noise(seed, size, steps, sampler)

        context, pooled = self.encode_text([caption, negative_caption])
        latents = self.sample(
            self.encode_lq(padded),
            context[:1],
            pooled[:1],
            context[1:],
            pooled[1:],
            noise["start"],
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            image_size=size,
            start=self.encode(padded, noise["encode"]) if start == "lr" else None,
            tile=tile,
            overlap=overlap,
            tile_batch=tile_batch,
            sampler=sampler,
            step_noise=noise.get("steps"),
        )
        restored = images_.to_uint8(images_.crop(np.asarray(self.decode(latents)[0]), height, width))
        # As published, colours are fixed on the picture at eight bits, against the upscaled input.
        ours, theirs = (jnp.asarray(images_.to_float(picture)[None]) for picture in (restored, upscaled))
        fixed = fix_color(ours, theirs, color_fix, wavelet_levels)
        return images_.to_uint8(np.asarray(fixed[0]))

    @property
    def _denoiser_params(self) -> Params:
        return {"unet": self.params["unet"], "alignment": self.params["alignment"]}

    def _noise(self, seed: int, size: tuple[int, int], steps: int, sampler: str) -> dict[str, jax.Array]:
        factor = self.config.vae.factor
        shape = (1, size[0] // factor, size[1] // factor, self.config.vae.latent_channels)
        key = jax.random.key(seed)
        noise = {
            name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, name in enumerate(("start", "encode"))
        }
        if sampler == "ddpm":
            noise["steps"] = jax.random.normal(jax.random.fold_in(key, 2), (steps, *shape))
        return noise

    def _in_tiles(self, apply: Callable[[Array], Array], array: Array, *, encode: bool) -> Array:
        """Run an encoder or the decoder, over cross-faded tiles on the host if the array is larger than one tile."""
        factor = self.config.vae.factor
        tile, out_tile = (
            (self.vae_tile, self.vae_tile // factor) if encode else (self.vae_tile // factor, self.vae_tile)
        )
        sides = array.shape[1:3]
        if encode and any(side % factor for side in sides):
            raise InputError(f"images are {sides[0]}x{sides[1]}: both sides must be multiples of {factor}")
        self._announce("encoder" if encode else "decoder", array.shape)
        if max(sides) <= tile:
            if self.mesh is not None:
                array = jax.device_put(array, batch_sharding(self.mesh, array.shape[0]))
            return apply(array)
        return fade_tiles(lambda part: np.asarray(apply(part)), np.asarray(array), tile=tile, out_tile=out_tile)

    def _announce(self, program: str, *shape) -> None:
        if (program, *shape) not in self._announced:
            self._announced.add((program, *shape))
            log.info("compiling the %s for %s (the first of this size)", program, ", ".join(map(str, shape)))


def _text(context: Array, pooled: Array | None) -> Text:
    return Text(context=jnp.asarray(context), pooled=None if pooled is None else jnp.asarray(pooled))


@functools.lru_cache(maxsize=8)
def _programs(config: FaithDiffConfig, dtype: Any, mesh: Mesh | None) -> Programs:
    """Models of one architecture share their programs, and what these have compiled."""
    return Programs(config, dtype=dtype, mesh=mesh)
