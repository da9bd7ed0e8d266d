"""Every choice of a restoration, in one place.

To add one, add a field to `RestoreOptions`, and the code that uses it. Its flag, its help and its checks on the command
line, `restore(..., name=value)` and the model's own defaults (`restore:` in its `config.yaml`) follow from the field.

Nothing here imports JAX, so that help and wrong flags need not wait for it.
"""

import dataclasses
import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from faithdiff_jax.diffusion.names import SAMPLERS
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.captions import is_unicode
from faithdiff_jax.files.images import MAX_TARGET_PIXELS
from faithdiff_jax.inference.grid import count_tiles

if TYPE_CHECKING:
    from faithdiff_jax.models.config import FaithDiffConfig

STARTS = ("lr", "noise")
COLOR_FIXES = ("adain", "wavelet", "none")
WAVELET_LEVELS, MOST_WAVELET_LEVELS = 5, 10  # of the published fix, and of any
MOST_TILES = 2**14  # of a picture; twice what the largest one has with tiles of 128 and a factor of 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of an option: its type, its range, what it is for."""

    kind: type
    """int, float or str; None is taken too where it is the default."""
    help: str
    """For people, with the unit; the range and the default are added to it."""
    least: float = -math.inf
    above: float = -math.inf
    """An open bound, in place of `least`."""
    most: float = math.inf
    among: tuple[str, ...] = ()
    """The values there are; for strings."""
    flag: str | None = None
    """On the command line, where it is not --name-with-hyphens."""

    @property
    def range(self) -> str:
        """The range in words: "a whole number between 1 and 10"."""
        if self.kind is str:
            return f"one of {', '.join(self.among)}" if self.among else "text"
        kind = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.above):
            return f"{kind} above {self.above:g}" + (f" and at most {self.most:g}" if self.most < math.inf else "")
        if math.isfinite(self.least):
            upper = f"{self.most:.10g}"
            return (
                f"{kind} between {self.least:g} and {upper}"
                if self.most < math.inf
                else f"{kind}, {self.least:g} or more"
            )
        return kind

    def accepted(self, value: Any) -> Any:
        """The value as a plain int, float or str; ValueError for another type or one out of range."""
        if self.kind is str:
            if not isinstance(value, str) or (self.among and value not in self.among) or not is_unicode(value):
                raise ValueError
            return str(value)
        if isinstance(value, bool) or not isinstance(value, Integral if self.kind is int else Real):
            raise ValueError
        try:
            number = self.kind(value)
        except OverflowError:
            raise ValueError from None
        if not (self.least <= number <= self.most and number > self.above):  # false for NaN
            raise ValueError
        return number


def option(default: Any, help: str, *, kind: type | None = None, **limits: Any) -> Any:
    """A field of `RestoreOptions`.

    Args:
        default: the published one.
        help: what it is for.
        kind: of the value; the default's by default.
        limits: the other fields of `About`.
    """
    about = About(kind=kind or type(default), help=help, **limits)
    return dataclasses.field(default=default, metadata={"about": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Every choice of a restoration; the defaults are the published ones.

    Raises:
        InputError: values of another type or out of their range, all of them at once.
    """

    scale: float = option(2.0, "how many times larger each side becomes", above=0, most=32)
    steps: int = option(20, "denoising steps", least=1, most=100_000)
    guidance: float = option(5.0, "weight of the caption; 1 or less for none", least=0, most=100)
    guidance_rescale: float = option(0.0, "against overexposure at high guidance", least=0, most=1)
    seed: int = option(42, "of all noise", least=0, most=2**32 - 1)
    sampler: str = option("euler", "deterministic (euler) or ancestral (ddpm)", among=SAMPLERS)
    start: str = option("lr", "start from the noised input or from noise alone", among=STARTS)
    negative_caption: str = option("", "what guidance leads away from")
    tile: int = option(128, "side of a tile in latent pixels (8 image pixels each for SDXL)", least=1, most=2**14)
    overlap: float = option(0.5, "stride from tile to tile as a fraction of a tile, as published", least=1 / 16, most=1)
    tile_batch: int = option(1, "tiles that go through the UNet together", least=1, most=1024)
    vae_tile: int = option(
        1024, "side in image pixels above which encoders and decoder work in tiles", least=64, most=2**14
    )
    multiple: int | None = option(
        None,
        "pad sides to a multiple of this many pixels (default: the VAE's factor, 8 for SDXL); with a larger one, "
        "pictures of many sizes share their compiled programs, at slightly other results",
        kind=int,
        least=1,
        most=2048,
    )
    color_fix: str = option("adain", "how the restored picture takes on the input's colours", among=COLOR_FIXES)
    wavelet_levels: int = option(
        WAVELET_LEVELS,
        "under wavelet, what is coarser than 2^N pixels is the input's",
        least=1,
        most=MOST_WAVELET_LEVELS,
    )

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            about, value = field.metadata["about"], getattr(self, field.name)
            if value is None and field.default is None:
                continue
            try:
                object.__setattr__(self, field.name, about.accepted(value))
            except ValueError:
                faults.append(f"{field.name} is {_shown(value)}: must be {about.range}")
        _refuse(faults)

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
        faults = {
            f"steps is {self.steps}: must be between 1 and {limit} for this model": self.steps > limit,
            f"tile is {self.tile} latent pixels: must be at least {smallest} for this model": self.tile < smallest,
            # A quarter of a tile is what neighbours share, in latent pixels too.
            f"vae_tile is {self.vae_tile}: must be a multiple of {4 * factor} for this model": self.vae_tile
            % (4 * factor),
            f"multiple is {self.multiple}: must be a multiple of {factor} for this model": (self.multiple or factor)
            % factor,
        }
        _refuse([message for message, wrong in faults.items() if wrong])

    def padded_size(self, config: "FaithDiffConfig", height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels at which a picture of height x width is restored, before the padding is cut off.

        Raises:
            InputError: more pixels than `MAX_TARGET_PIXELS`, or more tiles than `MOST_TILES`.
        """
        multiple = self.multiple or config.vae.factor
        target = [round(side * self.scale) for side in (height, width)]
        padded_height, padded_width = (side + -side % multiple for side in target)
        if padded_height * padded_width > MAX_TARGET_PIXELS:
            sizes = f"{width}x{height} into {target[1]}x{target[0]} pixels, at most {MAX_TARGET_PIXELS:,}"
            raise InputError(f"scale is {self.scale:g}: turns {sizes} are restored")
        self.check_tiles(padded_height // config.vae.factor, padded_width // config.vae.factor)
        return padded_height, padded_width

    def check_tiles(self, height: int, width: int) -> None:
        """InputError if latents of height x width would be cut into more than `MOST_TILES`."""
        tiles = count_tiles(height, width, self.tile, self.overlap)
        if tiles > MOST_TILES:
            raise InputError(
                f"tile is {self.tile} and overlap {self.overlap:g}: cut {width}x{height} latent pixels into {tiles:,} "
                f"tiles, at most {MOST_TILES:,} are worked on; give larger ones"
            )


def _refuse(faults: list[str]) -> None:
    if faults:
        raise InputError("; ".join(faults))


def _shown(value: Any) -> str:
    """A value as a message names it: on one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of more digits than Python writes out
        text = f"a {type(value).__name__}"
    text = text.encode("unicode_escape").decode() if not is_unicode(text) else text
    return text if len(text) <= 60 else f"{text[:57]}..."
