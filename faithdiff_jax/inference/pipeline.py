"""FaithDiff as one object: the array-level steps of restoring a photograph, and `restore`, which runs them all.

    picture -> upscale, pad -> LQ features, start latent \
    caption -> token ids -> context, pooled               > sample -> decode -> crop -> colour fix -> picture

Each step is a jitted pure function of (parameters, arrays); modules are merged inside it. Images are (B, H, W, 3) in
[-1, 1], latents (B, H/8, W/8, 4) for SDXL's VAE: the factor and the channels come from the configuration.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, UInt8

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images as images_
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference.denoise import SamplingInputs, Text, check_noise, noise_shapes, plan_sampling
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.inference.progress import long_task
from faithdiff_jax.inference.tiling import fade_tiles
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import Params, numbered, part_names, part_shapes
from faithdiff_jax.sharding import batch_sharding, parameter_sharding
from faithdiff_jax.weights.hub import local_folder
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import CONFIG

MODEL_FILE = re.compile(r"config\.yaml|\w+\.safetensors|tokenizer(_\d+)?/[^/]+")

AnyArray = Array | np.ndarray
Images = Float[AnyArray, "b H W rgb"]
Latents = Float[AnyArray, "b h w c"]


class FaithDiff:
    """A loaded model.

    Attributes:
        config: the architecture.
        params: part name ("unet", "alignment", "lq_encoder", "vae", "text_encoder", "text_encoder_2") -> pytree.
        defaults: the options that `restore` and `sample` start from.
        programs: the jitted functions of (params, arrays) behind every call.
        mesh: device mesh, or None for the default device.
    """

    def __init__(
        self,
        config: FaithDiffConfig,
        params: Mapping[str, Params],
        tokenizers: Tokenizers | None = None,
        *,
        defaults: RestoreOptions | None = None,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        """Take parameters as they are; `load` reads them from a model directory.

        `dtype` is what the networks compute in; norm statistics, softmax and the sampler stay in float32. Without
        `defaults`, they are the published options.
        """
        self.config = config
        self.mesh = mesh
        self.defaults = defaults or RestoreOptions()
        self.params = dict(params)
        self.dtype = jnp.dtype(dtype)
        self._tokenizers = tokenizers
        self.programs = _programs(config, self.dtype, mesh)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | ModelDirectory, *, dtype: Any = None, mesh: Mesh | None = None
    ) -> "FaithDiff":
        """Read a model directory that `faithdiff convert` or a training run wrote, and its own default options.

        Args:
            path: the model directory, which may be open already.
            dtype: what to hold and compute in; None for bfloat16 on GPU and TPU, float32 on CPU.
            mesh: devices to spread over (see `sharding.make_mesh`); None for the default device.

        Raises:
            InputError: not a model directory, or one whose parameters do not fit its configuration.
        """
        stored = path if isinstance(path, ModelDirectory) else ModelDirectory.open(pathlib.Path(path))
        config = stored.config
        defaults = default_options(stored)
        dtype = jnp.dtype(dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16))
        params = {}
        with long_task(f"reading the model {stored.path}"):
            for part in part_names(config):
                sharding = None
                if mesh is not None:
                    shapes = part_shapes(config, part)
                    sharding = {name: parameter_sharding(mesh, shape) for name, shape in shapes.items()}
                params[part] = stored.load(part, dtype=dtype, sharding=sharding)
            tokenizers = Tokenizers.load(stored.tokenizers)
        return cls(config, params, tokenizers, defaults=defaults, dtype=dtype, mesh=mesh)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, dtype: Any = None, mesh: Mesh | None = None
    ) -> "FaithDiff":
        """`load` a model directory, or a Hugging Face repository that holds one ("owner/name"), fetched if need be.

        Raises:
            InputError: neither a folder nor a repository that can be reached, or what `load` refuses.
        """
        return cls.load(local_folder(os.fspath(name), _model_files), dtype=dtype, mesh=mesh)

    def encode_lq(self, images: Images, *, vae_tile: int | None = None) -> Float[AnyArray, "b h w f"]:
        """LQ features: (B, H, W, 3) in [-1, 1], sides multiples of 8 -> (B, H/8, W/8, 512).

        Like `encode` and `decode`, works in tiles of `vae_tile` image pixels where a side is longer; None for the
        model's default, 1,024 as published.
        """
        return self._in_tiles(lambda x: self.programs.encode_lq(self.params["lq_encoder"], x), images, vae_tile)

    def encode(self, images: Images, noise: Latents, *, vae_tile: int | None = None) -> Float[Array, "b h w c"]:
        """VAE sample, scaled: (B, H, W, 3) in [-1, 1] and standard normal (B, H/8, W/8, 4) -> (B, H/8, W/8, 4)."""
        moments = self._in_tiles(lambda x: self.programs.moments(self.params["vae"], x), images, vae_tile)
        return self.programs.draw(self.params["vae"], moments, noise)

    def decode(self, latents: Latents, *, vae_tile: int | None = None) -> Images:
        """Scaled latents (B, h, w, 4) -> images (B, 8h, 8w, 3), about [-1, 1]."""
        decode = lambda x: self.programs.decode(self.params["vae"], x)  # noqa: E731
        return self._in_tiles(decode, latents, vae_tile, encode=False)

    def encode_text(self, captions: Sequence[str]) -> tuple[Float[Array, "b m d"], Float[Array, "b p"]]:
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
        latents: Latents,
        timesteps: Num[AnyArray, " b"],
        features: Float[AnyArray, "b h w f"],
        context: Float[AnyArray, "b m d"],
        pooled: Float[AnyArray, "b p"] | None = None,
        time_ids: Float[AnyArray, "b 6"] | None = None,
    ) -> Float[Array, "b h w c"]:
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
        features: Float[AnyArray, "b h w f"],
        context: Float[AnyArray, "b m d"],
        pooled: Float[AnyArray, "b p"] | None,
        negative_context: Float[AnyArray, "b n d"] | None,
        negative_pooled: Float[AnyArray, "b p"] | None,
        noise: Latents,
        options: RestoreOptions | None = None,
        **keywords: Any,
    ) -> Float[Array, "b h w c"]:
        """The whole denoising loop in one jitted program.

        Args:
            features: (B, h, w, 512), from `encode_lq`.
            context: (B, M, 2048), any M.
            pooled: (B, 1280).
            negative_context: (B, N, 2048); not needed, and not used, at guidance 1 or less.
            negative_pooled: (B, 1280).
            noise: (B, h, w, 4), standard normal.
            options: the model's defaults if None; `steps`, `guidance`, `guidance_rescale`, `sampler`, `tile`,
                `overlap` and `tile_batch` are read.
            keywords: single options to replace, such as `steps=10`; and
                `start`: (B, h, w, 4), scaled latent of the LQ image (`encode`) to start from, None for pure noise;
                `image_size`: (H, W) in pixels of the whole padded picture, 8 times the latents' by default;
                `step_noise`: (steps, B, h, w, 4), standard normal, for "ddpm".

        Returns:
            (B, h, w, 4), float32, scaled.

        Raises:
            InputError: a value outside its range, or an array that is missing.
        """
        start, image_size, step_noise = (keywords.pop(name, None) for name in ("start", "image_size", "step_noise"))
        options = (options or self.defaults).replace(**keywords)
        options.check_against(self.config)
        _, height, width, _ = noise.shape
        plan = plan_sampling(options, self.config.schedule, height, width)
        if not plan.sampler.needs_step_noise:
            step_noise = None
        elif step_noise is None:
            raise InputError(
                f"step_noise is None: sampler {options.sampler!r} needs (steps, B, h, w, c) standard normal noise"
            )
        factor = self.config.vae.factor
        size = image_size or (height * factor, width * factor)
        target = options.tile * factor
        inputs = SamplingInputs(
            features=features,
            text=_text(context, pooled),
            negative=self._negative(options.guidance, pooled, negative_context, negative_pooled),
            noise=noise,
            start=start,
            step_noise=step_noise,
            time_ids=np.array([(*size, *corner, target, target) for corner in plan.corners], np.float32),
            guidance=np.float32(options.guidance),
            rescale=np.float32(options.guidance_rescale) if options.guidance_rescale > 0 else None,
        )
        return self.programs.sample(self._denoiser_params, plan, inputs)

    def restore(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        caption: str = "",
        options: RestoreOptions | None = None,
        *,
        noise: Mapping[str, AnyArray] | None = None,
        **replacements: Any,
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Restore one picture (section "Restoring one image" of the published pipeline).

        Args:
            image: (h, w, 3), of any size.
            caption: what the picture shows; used as it is.
            options: every choice there is; the model's defaults if None.
            noise: instead of the seed, standard normal arrays: "start" (1, H/8, W/8, 4), "encode" of the same shape
                for the "lr" start, "steps" (steps, 1, H/8, W/8, 4) for the "ddpm" sampler. The same seed gives the
                same picture on one device or eight.
            replacements: single options to replace, such as `steps=10`.

        Returns:
            (round(h * scale), round(w * scale), 3).

        Raises:
            InputError: an unknown option, a value outside its range, a picture too small or large for the scale, or
                noise that is missing or of another shape.
        """
        options = (options or self.defaults).replace(**replacements)
        options.check_against(self.config)
        size = options.padded_size(self.config, *image.shape[:2])
        upscaled = images_.upscale(image, options.scale)
        height, width = upscaled.shape[:2]
        padding = [(0, whole - side) for whole, side in zip(size, (height, width), strict=True)]
        padded = images_.to_float(np.pad(upscaled, [*padding, (0, 0)], mode="edge"))[None]
        shapes = noise_shapes(options, self.config, size)
        if noise is None:
            noise = self._draw(shapes, options.seed)
        check_noise(noise, options, shapes)

        context, pooled = self.encode_text([caption, options.negative_caption])
        start = None
        if options.start == "lr":
            start = self.encode(padded, noise["encode"], vae_tile=options.vae_tile)
        latents = self.sample(
            self.encode_lq(padded, vae_tile=options.vae_tile),
            context[:1],
            pooled[:1],
            context[1:],
            pooled[1:],
            noise["start"],
            options,
            image_size=size,
            start=start,
            step_noise=noise.get("steps"),
        )
        decoded = np.asarray(self.decode(latents, vae_tile=options.vae_tile))[0]
        restored = images_.to_uint8(images_.crop(decoded, height, width))
        # As published, colours are fixed on the picture at eight bits, against the upscaled input.
        ours, theirs = (images_.to_float(picture)[None] for picture in (restored, upscaled))
        fixed = self.programs.fix_color(ours, theirs, options.color_fix, options.wavelet_levels)
        return images_.to_uint8(np.asarray(fixed)[0])

    @property
    def _denoiser_params(self) -> Params:
        return {"unet": self.params["unet"], "alignment": self.params["alignment"]}

    def _negative(self, guidance: float, pooled: Any, negative_context: Any, negative_pooled: Any) -> Text | None:
        """The other side of the guidance, None where there is no guidance; InputError for what is missing."""
        if guidance > 1 and negative_context is None:
            raise InputError(f"guidance is {guidance}: above 1 it needs negative_context and negative_pooled")
        if self.config.unet.pooled_dim is not None and (pooled is None or (guidance > 1 and negative_pooled is None)):
            raise InputError("pooled or negative_pooled is None: this model's added embedding needs pooled texts")
        return _text(negative_context, negative_pooled) if guidance > 1 else None

    def _draw(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        return {name: self.programs.normal(jax.random.fold_in(key, i), shapes[name]) for i, name in enumerate(shapes)}

    def _in_tiles(
        self, apply: Callable[[AnyArray], AnyArray], array: AnyArray, vae_tile: int | None, *, encode: bool = True
    ) -> AnyArray:
        """Run an encoder or the decoder, over cross-faded tiles on the host if the array is larger than one tile."""
        factor, vae_tile = self.config.vae.factor, vae_tile or self.defaults.vae_tile
        if vae_tile % (4 * factor):
            raise InputError(f"vae_tile is {vae_tile}: must be a multiple of {4 * factor} for this model")
        tile, out_tile = (vae_tile, vae_tile // factor) if encode else (vae_tile // factor, vae_tile)
        sides = array.shape[1:3]
        if encode and any(side % factor for side in sides):
            raise InputError(f"images are {sides[0]}x{sides[1]}: both sides must be multiples of {factor}")
        if max(sides) <= tile:
            if self.mesh is not None:
                array = jax.device_put(array, batch_sharding(self.mesh, array.shape[0]))
            return apply(array)
        return fade_tiles(lambda part: np.asarray(apply(part)), np.asarray(array), tile=tile, out_tile=out_tile)


def default_options(stored: ModelDirectory) -> RestoreOptions:
    """A model directory's own default options: the published ones, with what `restore:` in its config.yaml says.

    Raises:
        InputError: an unknown option, or a value outside its range.
    """
    return from_dict(RestoreOptions, stored.defaults, f"{stored.path / CONFIG}: restore")


def _model_files(names: Collection[str]) -> list[str]:
    """What of a repository is fetched: the files of a model directory."""
    return [name for name in names if MODEL_FILE.fullmatch(name)]


def _text(context: AnyArray, pooled: AnyArray | None) -> Text:
    return Text(context=jnp.asarray(context), pooled=None if pooled is None else jnp.asarray(pooled))


@functools.lru_cache(maxsize=8)
def _programs(config: FaithDiffConfig, dtype: Any, mesh: Mesh | None) -> Programs:
    """Models of one architecture share their programs, and what these have compiled."""
    return Programs(config, dtype=dtype, mesh=mesh)
