"""Every choice of a restoration, in one place.

To add one, add a field to `RestoreOptions`, and the code that uses it. Its flag, its help and its checks on the command
line, `restore(..., name=value)` and the model's own defaults (`restore:` in its `config.yaml`) follow from the field.

Nothing here imports JAX, so that help and wrong flags need not wait for it.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from faithdiff_jax.config import Range
from faithdiff_jax.diffusion.names import MULTISTEP, SAMPLERS, SIGMA_SPACINGS
from faithdiff_jax.errors import InputError, shown
from faithdiff_jax.files.images import MAX_TARGET_PIXELS
from faithdiff_jax.inference.about import MOST_STEPS, WHOLE_NUMBERS, check_each, option
from faithdiff_jax.inference.grid import count_tiles, least_tile

if TYPE_CHECKING:
    from faithdiff_jax.models.config import FaithDiffConfig

STARTS = ("lr", "noise")
COLOR_FIXES = ("adain", "wavelet", "none")
WAVELET_LEVELS, MOST_WAVELET_LEVELS = 5, 10  # of the published fix, and of any
MOST_TILES = 2**14  # of a picture; twice what the largest one has with tiles of 128 and a factor of 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Every choice of a restoration; the defaults are the published ones.

    Raises:
        InputError: values of another type or out of their range, all of them at once.
    """

    scale: float = option(2.0, "how many times larger each side becomes", within=Range(0, 32, above=True))
    progressive: bool = option(
        False, "enlarge in passes of at most 2 instead of at once: 2 and 2 for a scale of 4, each pass restored"
    )
    steps: int = option(20, "denoising steps", within=Range(1, MOST_STEPS))
    guidance: float = option(5.0, "weight of the caption; 1 or less for none", within=Range(0, 100))
    guidance_rescale: float = option(0.0, "against overexposure at high guidance", within=Range(0, 1))
    guidance_start: float = option(0.0, "part of the steps before which there is no guidance", within=Range(0, 1))
    guidance_end: float = option(1.0, "part of the steps after which there is no guidance", within=Range(0, 1))
    deepcache_interval: int = option(
        1, "evaluate the UNet's deep levels at every Nth step only (DeepCache); 1 for every step", within=Range(1, 1000)
    )
    deepcache_levels: int = option(
        1, "under DeepCache, the finest levels, which are evaluated at every step", within=Range(1, 10)
    )
    tgate_after: float = option(
        1.0,
        "part of the steps after which guidance ends and attention to the text is frozen (T-GATE); 1 for never",
        within=Range(0, 1),
    )
    seed: int = option(42, "of all noise", within=Range(0, 2**32 - 1))
    sampler: str = option(
        "euler", "deterministic (euler; in fewer steps dpmpp_2m, unipc) or ancestral (ddpm)", among=SAMPLERS
    )
    sigma_spacing: str = option(
        "default",
        "noise levels: those of the timesteps, or along a curve; not for ddpm",
        among=SIGMA_SPACINGS,
    )
    timesteps: tuple[int, ...] | None = option(
        None,
        "timesteps to visit, in place of steps; the start point is that of the last timestep all the same",
        kind=WHOLE_NUMBERS,
        within=Range(0, MOST_STEPS - 1),
    )
    start: str = option("lr", "start from the noised input or from noise alone", among=STARTS)
    negative_caption: str = option("", "what guidance leads away from")
    tile: int = option(128, "side of a tile in latent pixels (8 image pixels each for SDXL)", within=Range(1, 2**14))
    overlap: float = option(
        0.5, "stride from tile to tile as a fraction of a tile, as published", within=Range(1 / 16, 1)
    )
    batch: int = option(
        1,
        "tiles that go through the UNet together, of one picture or of several of one padded size",
        within=Range(1, 1024),
    )
    vae_tile: int = option(
        1024, "side in image pixels above which encoders and decoder work in tiles", within=Range(64, 2**14)
    )
    decoder_passes: int = option(
        0,
        "passes over all tiles of the decoder that find the statistics of the whole picture for its norms first; 0 for "
        "each tile by its own, as published",
        within=Range(0, 100),
    )
    multiple: int | None = option(
        None,
        "pad sides to a multiple of this many pixels (default: the VAE's factor, 8 for SDXL); with a larger one, "
        "pictures of many sizes share their compiled programs; noise and colours stay those without the padding",
        kind=int,
        within=Range(1, 2048),
    )
    stream_above: int = option(
        2**24,
        "pixels of a result, padding included, above which every stage works on a part of it at a time, in bounded "
        "memory; the same result but for rounding",
        within=Range(1, MAX_TARGET_PIXELS),
    )
    color_fix: str = option("adain", "how the restored picture takes on the input's colours", among=COLOR_FIXES)
    wavelet_levels: int = option(
        WAVELET_LEVELS,
        "under wavelet, what is coarser than 2^N pixels is the input's",
        within=Range(1, MOST_WAVELET_LEVELS),
    )

    def __post_init__(self) -> None:
        faults = check_each(self)
        if not faults and self.sigma_spacing != "default":
            if self.sampler == "ddpm":
                faults.append(f"sigma_spacing is {self.sigma_spacing!r}: must be default for sampler ddpm")
            if self.timesteps is not None:
                faults.append(f"sigma_spacing is {self.sigma_spacing!r}: must be default where timesteps are given")
        if not faults and self.guidance_start > self.guidance_end:
            faults.append(
                f"guidance_end is {self.guidance_end:g}: must be at least guidance_start, {self.guidance_start:g}"
            )
        _refuse(faults)

    @property
    def enlargements(self) -> tuple[float, ...]:
        """The scale of each pass: of one, or, if progressive, of as many as it takes with at most 2 each."""
        passes = [self.scale]
        while self.progressive and passes[-1] > 2:  # halving is exact, so that the last pass ends at the same size
            passes[-1:] = [2.0, passes[-1] / 2]
        return tuple(passes)

    @property
    def evaluated_steps(self) -> int:
        """How many steps there are: `steps`, or as many as `timesteps`."""
        return self.steps if self.timesteps is None else len(self.timesteps)

    def replace(self, **changes: Any) -> "RestoreOptions":
        """A copy with some options changed.

        Raises:
            InputError: an option there is not, or a value that is refused.
        """
        known = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise InputError(f"unknown option {', '.join(unknown)} (known: {', '.join(known)})")
        return dataclasses.replace(self, **changes)

    def check_against(self, config: "FaithDiffConfig") -> None:
        """Refuse what a model cannot do: an InputError names every option concerned, its value and its range."""
        limit, smallest, factor = config.schedule.train_steps, config.unet.smallest_side, config.vae.factor
        highest = self.timesteps[0] if self.timesteps else 0
        levels, in_part = len(config.unet.channels), (self.guidance_start, self.guidance_end) != (0, 1)
        least = least_tile(config.vae.decoder_reach) * factor
        # Those of several steps leave room for one more.
        most = limit - 1 if self.sampler in MULTISTEP and config.schedule.spacing == "leading" else limit
        who = "this model" if most == limit else f"this model and sampler {self.sampler}"
        faults = {
            f"steps is {self.steps}: must be between 1 and {most} for {who}": not self.timesteps and self.steps > most,
            f"timesteps is {shown(self.timesteps)}: must be below {limit} for this model": highest >= limit,
            f"guidance_start is {self.guidance_start:g} and guidance_end {self.guidance_end:g}: must be 0 and 1 for a "
            "model that guides by itself": in_part and config.unet.guidance_dim is not None,
            f"deepcache_levels is {self.deepcache_levels}: must be below {levels}, the levels of this model's UNet": (
                self.deepcache_interval > 1 and self.deepcache_levels >= levels
            ),
            f"deepcache_interval is {self.deepcache_interval} and tgate_after {self.tgate_after:g}: must be 1 for a "
            f"model of alignment.kind {config.alignment.kind!r}": (
                (self.deepcache_interval > 1 or self.tgate_after < 1) and config.alignment.steers
            ),
            f"tile is {self.tile} latent pixels: must be at least {smallest} for this model": self.tile < smallest,
            # A quarter of a tile is what neighbours share, in latent pixels too.
            f"vae_tile is {self.vae_tile}: must be a multiple of {4 * factor} for this model": self.vae_tile
            % (4 * factor),
            f"vae_tile is {self.vae_tile}: must be at least {least} for this model, with decoder_passes": (
                self.decoder_passes > 0 and self.vae_tile < least
            ),
            f"multiple is {self.multiple}: must be a multiple of {factor} for this model": (self.multiple or factor)
            % factor,
        }
        _refuse([message for message, wrong in faults.items() if wrong])

    def check_attribution(self) -> None:
        """InputError if some step leaves attention to the text out, so that nothing can be attributed to words."""
        self._check_no_reuse("attribution: needs all attention to the text at every step")

    def check_tile_captions(self) -> None:
        """InputError if a picture has tiles of several kinds, which no one list of captions fits."""
        if len(self.enlargements) > 1:
            raise InputError("progressive is true: takes one caption for a picture, each pass has tiles of its own")

    def streams(self, size: tuple[int, int]) -> bool:
        """Whether a picture of a padded height and width in pixels is worked on by parts."""
        return size[0] * size[1] > self.stream_above

    def check_streaming(self, size: tuple[int, int]) -> None:
        """InputError if what steps take over from one another would have to be kept for all of a picture."""
        large = f"{size[1]}x{size[0]} pixels are more than stream_above, {self.stream_above:,}"
        self._check_no_reuse(f"{large}: no step of them takes anything over from another")

    def _check_no_reuse(self, why: str) -> None:
        _refuse(
            [f"{why}, deepcache_interval is {self.deepcache_interval}: must be 1"] * (self.deepcache_interval > 1)
            + [f"{why}, tgate_after is {self.tgate_after:g}: must be 1"] * (self.tgate_after < 1)
        )

    def padded_size(self, config: "FaithDiffConfig", height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which a picture of height x width is restored, before the padding is cut off.

        Raises:
            InputError: more pixels than `MAX_TARGET_PIXELS`, or more tiles than `MOST_TILES`.
        """
        multiple = self.multiple or config.vae.factor
        target = [round(side * self.scale) for side in (height, width)]
        padded_height, padded_width = (side + -side % multiple for side in target)
        if padded_height * padded_width > MAX_TARGET_PIXELS:
            sizes = f"{width}x{height} into {target[1]}x{target[0]} pixels, at most {MAX_TARGET_PIXELS:,} are restored"
            raise InputError(f"scale is {self.scale:g}: turns {sizes}{self._what_fits(height, width, multiple)}")
        if self.streams((padded_height, padded_width)):
            self.check_streaming((padded_height, padded_width))
        self.check_tiles(padded_height // config.vae.factor, padded_width // config.vae.factor)
        return padded_height, padded_width

    def _what_fits(self, height: int, width: int, multiple: int) -> str:
        """The largest scale, in hundredths, at which a picture is within the limit with its padding."""
        scale = math.floor(math.sqrt(MAX_TARGET_PIXELS / (height * width)) * 100)
        while scale > 0 and (
            math.prod(math.ceil(round(side * scale / 100) / multiple) * multiple for side in (height, width))
            > MAX_TARGET_PIXELS
        ):
            scale -= 1
        return f"; a scale of {scale / 100:g} fits" if scale else "; none of this size are"

    def count_tiles(self, height: int, width: int) -> int:
        """How many tiles latents of height x width are cut into."""
        return count_tiles(height, width, self.tile, self.overlap)

    def check_tiles(self, height: int, width: int) -> None:
        """InputError if latents of height x width would be cut into more than `MOST_TILES`."""
        tiles = self.count_tiles(height, width)
        if tiles > MOST_TILES:
            raise InputError(
                f"tile is {self.tile} and overlap {self.overlap:g}: cut {width}x{height} latent pixels into {tiles:,} "
                f"tiles, at most {MOST_TILES:,} are worked on; give larger ones"
            )


def _refuse(faults: list[str]) -> None:
    if faults:
        raise InputError("; ".join(faults))
