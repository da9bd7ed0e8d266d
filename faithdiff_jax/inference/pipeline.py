"""FaithDiff as one object: the array-level steps of restoring a photograph, and `restore`, which runs them all.

    picture -> upscale, pad -> LQ features, start latent \
    caption -> token ids -> context, pooled               > sample -> decode -> crop -> colour fix -> picture

Each step is a jitted pure function of (parameters, arrays); modules are merged inside it. Images are (B, H, W, 3) in
[-1, 1], latents (B, H/8, W/8, 4) for SDXL's VAE: the factor and the channels come from the configuration.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Num, UInt8

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import Box, Caption
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference import inputs as inputs_
from faithdiff_jax.inference.attribution import enlarged, word_weights
from faithdiff_jax.inference.inputs import SamplingInputs, Text
from faithdiff_jax.inference.loading import (
    chosen,
    default_options,
    load_parameters,
    model_files,
    open_loras,
    preset_options,
)
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.inference.progress import long_task
from faithdiff_jax.inference.restoration import Request, restore_all
from faithdiff_jax.inference.stepwise import OnStep
from faithdiff_jax.inference.tile_captions import tile_boxes
from faithdiff_jax.inference.tiling import fade_tiles, vae_tiles
from faithdiff_jax.models.backend import default_platform
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.layers import layers_apart
from faithdiff_jax.models.parts import Params, numbered
from faithdiff_jax.models.quantization import check_format
from faithdiff_jax.sharding import batch_sharding
from faithdiff_jax.weights.hub import local_folder
from faithdiff_jax.weights.model_directory import ModelDirectory

AnyArray = Array | np.ndarray
Images = Float[AnyArray, "b H W rgb"]
Latents = Float[AnyArray, "b h w c"]


class FaithDiff:
    """A loaded model.

    Attributes:
        config: the architecture.
        params: part name ("unet", "alignment", "lq_encoder", "vae", "text_encoder", "text_encoder_2") -> pytree.
        defaults: the options that `restore` and `sample` start from.
        presets: name -> options to give them instead, as the model's makers chose; empty for most models.
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
        presets: Mapping[str, RestoreOptions] | None = None,
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
        self.presets = dict(presets or {})
        self.params = dict(params)
        self.dtype = jnp.dtype(dtype)
        self._tokenizers = tokenizers
        self.programs = _programs(config, self.dtype, mesh)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | ModelDirectory,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        loras: Mapping[str, float] | None = None,
        quantized: str | None = None,
        offload: bool = False,
    ) -> "FaithDiff":
        """Read a model directory that `faithdiff convert` or a training run wrote, and its own default options.

        Args:
            path: the model directory, which may be open already.
            dtype: what to hold and compute in; None for bfloat16 on GPU and TPU, float32 on CPU.
            mesh: devices to spread over (see `sharding.make_mesh`); None for the default device.
            loras: LoRA files for SDXL (see `weights.lora_files`), each with the weight at which it is added.
            quantized: "int8" or "fp8" to hold the kernels of UNet and text encoders in 8 bits (`models.quantization`).
            offload: hold what does not denoise (text encoders, VAE, LQ encoder) in the host's memory, and have each on
                the device only while it is at work.

        Raises:
            InputError: not a model directory, or one whose parameters do not fit its configuration; a LoRA that cannot
                be read, or is for another model; 8 bits of another kind; offload with several processes.
        """
        stored = path if isinstance(path, ModelDirectory) else ModelDirectory.open(path)
        defaults, presets = default_options(stored), preset_options(stored)
        dtype = jnp.dtype(dtype or cls.default_dtype())
        if quantized is not None:
            check_format(quantized)
        if offload and jax.process_count() > 1:
            raise InputError("offload is true: must be false where several processes share a model")
        opened = open_loras(loras or {}, stored)
        with long_task(f"reading the model {stored.path}"):
            params = load_parameters(stored, dtype, mesh, opened, quantized, offload=offload)
            tokenizers = Tokenizers.load(stored.tokenizers)
        return cls(stored.config, params, tokenizers, defaults=defaults, presets=presets, dtype=dtype, mesh=mesh)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        loras: Mapping[str, float] | None = None,
        quantized: str | None = None,
        offload: bool = False,
    ) -> "FaithDiff":
        """`load` a model directory, or a Hugging Face repository that holds one ("owner/name"), fetched if need be.

        The other arguments are those of `load`.

        Raises:
            InputError: neither a folder nor a repository that can be reached, or what `load` refuses.
        """
        folder = local_folder(os.fspath(name), model_files)
        return cls.load(folder, dtype=dtype, mesh=mesh, loras=loras, quantized=quantized, offload=offload)

    @staticmethod
    def default_dtype() -> Any:
        """What a model is held and computes in unless another is asked for: bfloat16, on CPU float32."""
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def preset(self, name: str) -> RestoreOptions:
        """The options of one of `presets`, for `restore`; InputError for a name that there is not."""
        return chosen(self.presets, name)

    @property
    def tokenizers(self) -> Tokenizers:
        """One for each text encoder; InputError if the model was made without."""
        if self._tokenizers is None:
            raise InputError("this model has no tokenizers: load it from a model directory, or pass them in")
        return self._tokenizers

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
        names = numbered("text_encoder", len(self.config.text_encoders))
        params = self._as_run([self.params[name] for name in names])
        return self.programs.encode_text(params, self.tokenizers(list(captions)))

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
            self.denoiser_params, latents, timesteps, features, context, pooled, time_ids
        )

    def sample(
        self,
        features: Float[AnyArray, "b h w f"],
        context: Float[AnyArray, "b *tiles m d"],
        pooled: Float[AnyArray, "b *tiles p"] | None,
        negative_context: Float[AnyArray, "b n d"] | None,
        negative_pooled: Float[AnyArray, "b p"] | None,
        noise: Latents,
        options: RestoreOptions | None = None,
        **keywords: Any,
    ) -> Float[Array, "b h w c"]:
        """The whole denoising loop in one jitted program.

        Args:
            features: (B, h, w, 512), from `encode_lq`.
            context: (B, M, 2048), any M; or (B, tiles, M, 2048), of each tile its own.
            pooled: (B, 1280), or (B, tiles, 1280).
            negative_context: (B, N, 2048); not needed, and not used, at guidance 1 or less.
            negative_pooled: (B, 1280).
            noise: (B, h, w, 4), standard normal.
            options: the model's defaults if None; `inputs.SAMPLING` names those that are read.
            keywords: single ones of these to replace, such as `steps=10`; and
                `start`: (B, h, w, 4), scaled latent of the LQ image (`encode`) to start from, None for pure noise;
                `image_size`: (H, W) in pixels of the whole padded picture, 8 times the latents' by default;
                `step_noise`: (steps, B, h, w, 4), standard normal, for "ddpm".

        Returns:
            (B, h, w, 4), float32, scaled.

        Raises:
            InputError: a value outside its range, an option of another step, or an array that is missing.
        """
        start, image_size, step_noise = (keywords.pop(name, None) for name in ("start", "image_size", "step_noise"))
        options = inputs_.sampling_options(options or self.defaults, keywords)
        inputs = SamplingInputs(
            features=features,
            text=Text.of(context, pooled),
            negative=None if negative_context is None else Text.of(negative_context, negative_pooled),
            noise=noise,
            start=start,
            step_noise=step_noise,
        )
        return self.sample_inputs(inputs, options, None if image_size is None else [image_size])[0]

    @overload
    def restore(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        caption: Caption = "",
        options: RestoreOptions | None = None,
        *,
        noise: Mapping[str, AnyArray] | None = None,
        on_step: OnStep | None = None,
        **replacements: Any,
    ) -> UInt8[np.ndarray, "H W 3"]: ...

    @overload
    def restore(
        self,
        image: Sequence[np.ndarray],
        caption: str | Sequence[Caption] = "",
        options: RestoreOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **replacements: Any,
    ) -> list[np.ndarray]: ...

    def restore(
        self,
        image: np.ndarray | Sequence[np.ndarray],
        caption: str | Sequence[Caption] = "",
        options: RestoreOptions | None = None,
        *,
        seeds: Sequence[int] | None = None,
        noise: Mapping[str, AnyArray] | None = None,
        on_step: OnStep | None = None,
        **replacements: Any,
    ) -> np.ndarray | list[np.ndarray]:
        """Restore a picture, or several (section "Restoring one image" of the published pipeline).

        Of several pictures, those of one padded size (see `multiple`) are denoised together, as many as make up the
        option `batch`. Each is the picture that it is alone, to the rounding of another program.

        Args:
            image: (h, w, 3), of any size; or a list of such.
            caption: what the picture shows, used as it is; or a list of what each of its tiles does (see `tile_boxes`).
                Of several pictures, one text for all, or a list with one for each, or with a list for each.
            options: every choice there is; the model's defaults if None.
            seeds: of several pictures, one for each; that of the options for all if None.
            noise: instead of the seed, standard normal arrays: "start" (1, H/8, W/8, 4), "encode" of the same shape
                for the "lr" start, "steps" (steps, 1, H/8, W/8, 4) for the "ddpm" sampler. The same seed gives the
                same picture on one device or eight. For one picture, in one pass.
            on_step: called after every step with the steps done, the steps there are, and a function that decodes the
                picture as the last step sees it; to stop, it returns False. See `stepwise.OnStep`. For one picture.
            replacements: single options to replace, such as `steps=10`.

        Returns:
            (round(h * scale), round(w * scale), 3); or a list of such, in the order of the pictures.

        Raises:
            InputError: an unknown option, a value outside its range, a picture too small or large for the scale, noise
                that is missing or of another shape, or another number of captions or seeds than of pictures.
            Cancelled: `on_step` returned False.
        """
        options = (options or self.defaults).replace(**replacements)
        if isinstance(image, np.ndarray):
            if seeds is not None:
                raise InputError("seeds is a list: must be None for one picture, which has the seed of the options")
            of_tiles: Any = caption  # which `restore_all` checks
            request = Request(image=image, caption=of_tiles, noise=noise)
            return np.asarray(restore_all(self, [request], options, on_step=on_step)[0].image)
        if noise is not None or on_step is not None:
            raise InputError("noise or on_step is given: must be for one picture, not a list")
        captions = [caption] * len(image) if isinstance(caption, str) else list(caption)
        each = [None] * len(image) if seeds is None else [options.replace(seed=seed).seed for seed in seeds]
        if not len(captions) == len(each) == len(image):
            counts = f"{len(captions)} captions, {len(each)} seeds"
            raise InputError(f"{counts}: must be as many as pictures, {len(image)}")
        requests = [
            Request(image=picture, caption=text, seed=seed)
            for picture, text, seed in zip(image, captions, each, strict=True)
        ]
        return [np.asarray(restored.image) for restored in restore_all(self, requests, options)]

    def tile_boxes(
        self, image: UInt8[np.ndarray, "h w 3"], options: RestoreOptions | None = None, **replacements: Any
    ) -> list[Box]:
        """Left, top, right and bottom of what each tile of the UNet shows of a picture, in pixels of (h, w, 3).

        Tiles come from left to right and then down: the order of `restore`'s list of captions. The options are
        `restore`'s too.

        Raises:
            InputError: options that do not restore this picture, or that do it in several passes.
        """
        return tile_boxes((options or self.defaults).replace(**replacements), self.config, image.shape[:2])

    def attribute(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        caption: str,
        words: Sequence[str],
        options: RestoreOptions | None = None,
        *,
        noise: Mapping[str, AnyArray] | None = None,
        **replacements: Any,
    ) -> tuple[UInt8[np.ndarray, "H W 3"], dict[str, Float32[np.ndarray, "H W"]]]:
        """`restore`, and where words of the caption took effect: DAAM (Tang et al. 2023), see `models.attribution`.

        Args:
            image: as for `restore`, like everything but the words.
            words: of the caption; each may be several in a row ("red bus"). Case does not count, and of a word that is
                there more than once all occurrences do.
            caption, options, noise, replacements: see `restore`.

        Returns:
            The picture that `restore` gives, but for rounding (it is another program); and word -> (H, W) float32, what
            part of a pixel's attention went to each token of the word, 0 to 1: the mean over heads, layers and steps.

        Raises:
            InputError: as for `restore`; no words, or one that the caption does not have; or options under which not
                every step attends to the text.
        """
        weights = word_weights(self.tokenizers, caption, words)
        options = (options or self.defaults).replace(**replacements)
        options.check_attribution()
        request = Request(image=image, caption=caption, noise=noise)
        (restored,) = restore_all(self, [request], options, words=weights)
        picture = np.asarray(restored.image)
        large = enlarged(np.asarray(restored.maps)[0], self.config.vae.factor, *picture.shape[:2])
        return picture, dict(zip(words, large, strict=True))

    def sample_inputs(
        self,
        inputs: SamplingInputs,
        options: RestoreOptions,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        words: Float[AnyArray, "b m words"] | None = None,
    ) -> tuple[Float[Array, "b h w c"], Array | None]:
        """`sample`, and the maps (B, h, w, W) of words (B, M, W), or None.

        `image_sizes` are those of the B pictures in pixels, or one of all of them.
        """
        options.check_against(self.config)
        plan, inputs = inputs_.plan_and_complete(inputs, options, self.config, image_sizes)
        if words is None:
            return self.programs.sample(self.denoiser_params, plan, inputs), None
        return self.programs.attribute(self.denoiser_params, plan, inputs, words)

    @property
    def denoiser_params(self) -> Any:
        """Of UNet and aligner, which denoise together; on CPU, layers of large stacks are apart (`layers_apart`)."""
        return self._as_run({"unet": self.params["unet"], "alignment": self.params["alignment"]})

    def _as_run(self, params: Any) -> Any:
        return layers_apart(params) if self.mesh is None and default_platform() == "cpu" else params

    def _in_tiles(
        self, apply: Callable[[AnyArray], AnyArray], array: AnyArray, vae_tile: int | None, *, encode: bool = True
    ) -> AnyArray:
        """Run an encoder or the decoder, over cross-faded tiles on the host if the array is larger than one tile."""
        tile, out_tile = vae_tiles(array.shape[1:3], vae_tile or self.defaults.vae_tile, self.config.vae.factor, encode)
        if max(array.shape[1:3]) <= tile:
            if self.mesh is not None:
                array = jax.device_put(array, batch_sharding(self.mesh, array.shape[0]))
            return apply(array)
        return fade_tiles(lambda part: np.asarray(apply(part)), np.asarray(array), tile=tile, out_tile=out_tile)


@functools.lru_cache(maxsize=8)
def _programs(config: FaithDiffConfig, dtype: Any, mesh: Mesh | None) -> Programs:
    """Models of one architecture share their programs, and what these have compiled."""
    return Programs(config, dtype=dtype, mesh=mesh)
