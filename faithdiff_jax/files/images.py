"""Files to uint8 pictures to float arrays in [-1, 1], and back; upscaling, padding and cropping."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.places import is_remote, place
from faithdiff_jax.files.reading import require_file
from faithdiff_jax.files.writing import replacing

MIN_SIDE = 2  # a picture one pixel wide has no neighbours to restore from
MIN_TARGET_SIDE = 8  # one latent pixel
MAX_PIXELS = 2**27  # 134 million, of a file that is read: larger headers are taken for decompression bombs
MAX_TARGET_PIXELS = 2**28  # 268 million, 16,384 x 16,384, of an upscaled or restored picture: 3 GB as float32

TEXT_KEY = "faithdiff"  # of the text in a PNG file that says how it was made

_FORMATS = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
_SAVE_OPTIONS: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 95, "subsampling": "4:4:4"},
    "PNG": {},
    "TIFF": {"compression": "tiff_adobe_deflate"},
    "WEBP": {"lossless": True, "exact": True},  # exact: colours under transparent pixels stay
}
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A picture read from a file, upright, at eight bits.

    `rgb` is (H, W, 3) uint8; `alpha` is (H, W) uint8 or None, and the colours are not multiplied by it. `gray` says
    that the file holds tones only (three equal channels here). `icc_profile` fits what `save_image` would write.
    `notes` holds one short sentence for each thing that was done to the file's contents.
    """

    rgb: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"] | None
    gray: bool
    icc_profile: bytes | None
    notes: tuple[str, ...]


def load_image(
    path: str | os.PathLike[str], most_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Picture:
    """Read a JPEG, PNG, WebP or TIFF picture; all of it is decoded.

    Args:
        path: of the file.
        most_pixels: a picture of more is refused before it is decoded.
        formats: Pillow's names of those that are read; None for all that Pillow opens.

    Raises InputError, one line that names the file, if it is missing, not a picture, damaged, too large, with a side
    under `MIN_SIDE` pixels, or stored in a way that does not map to eight bits.
    """
    path = Path(path)
    require_file(path, "picture file")
    # Pillow reports what it shrugs off, such as odd EXIF data, as warnings: they become notes.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # It also warns of large pictures, and refuses larger ones, by limits of its own: one limit of ours suffices.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image, notes, stored = _decode(path, most_pixels, formats)
    notes += [f"the decoder remarked: {_one_line(warning.message)}" for warning in caught]

    if image.mode.startswith("I") or image.mode == "F":
        rgb, alpha = _from_deep_gray(path, image, notes)
        gray = True
    else:
        rgb, alpha = _from_bytes(image, stored, notes)
        # Pillow opens a 16-bit gray PNG with alpha as RGBA; only the stored layout still says that it is gray.
        gray = image.mode in ("1", "L", "LA") or stored.startswith("LA;")
        if image.mode in ("P", "PA"):
            gray = bool((rgb == rgb[..., :1]).all())
    if gray:
        notes.append("gray repeated into three channels")
    if alpha is not None:
        notes.append("alpha kept apart")

    profile = image.info.get("icc_profile") or None
    if profile is not None and not profile_fits(profile, gray):
        notes.append("colour profile dropped, it describes other channels")
        profile = None
    return Picture(rgb, alpha, gray, profile, tuple(notes))


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of a picture file, upright, as far as its first bytes tell; nothing is decoded.

    Raises:
        InputError: missing, or not a picture.
    """
    path = Path(path)
    require_file(path, "picture file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)
    except Exception as error:
        raise InputError(f"{path}: not a picture that can be read ({_one_line(error)})") from error


def output_format(path: str | os.PathLike[str], *, alpha: bool = False) -> str:
    """Pillow's name of the format a path's suffix asks for, so that a bad one is found before the work is done.

    Raises InputError for a suffix that is not written, and for JPEG where `alpha` must be stored.
    """
    path = Path(path)
    name = _FORMATS.get(path.suffix.lower())
    if name is None:
        raise InputError(f"{path}: cannot write {path.suffix or 'no suffix'!r}, use one of {', '.join(_FORMATS)}")
    if alpha and name == "JPEG":
        raise InputError(f"{path}: JPEG cannot store the picture's alpha, use .png, .webp or .tif")
    return name


def save_image(
    path: str | os.PathLike[str],
    rgb: UInt8[np.ndarray, "h w 3"],
    *,
    alpha: UInt8[np.ndarray, "h w"] | None = None,
    gray: bool = False,
    icc_profile: bytes | None = None,
    text: str | None = None,
) -> None:
    """Write (H, W, 3) uint8, with (H, W) uint8 `alpha` if given, in the format of the suffix: whole or not at all.

    `gray` stores the luma (ITU-R 601) as one channel. The profile is left out where it does not fit the channels
    that are stored. JPEG is written at quality 95 without chroma subsampling, everything else without loss. `text` says
    how the picture was made: in PNG a text of the name `TEXT_KEY`, in TIFF the description; others are without.
    Raises ValueError for arrays of another shape or type, InputError if the file cannot be written.
    """
    path = place(path)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb is {rgb.dtype} {rgb.shape}, it must be uint8 (height, width, 3)")
    if alpha is not None and (alpha.dtype != np.uint8 or alpha.shape != rgb.shape[:2]):
        raise ValueError(f"alpha is {alpha.dtype} {alpha.shape}, it must be uint8 {rgb.shape[:2]}")
    name = output_format(path, alpha=alpha is not None)

    image = Image.fromarray(np.ascontiguousarray(rgb))
    if gray:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    options: dict[str, Any] = dict(_SAVE_OPTIONS[name])
    stores_gray = gray and name != "WEBP"  # WebP has no gray
    if icc_profile is not None and profile_fits(icc_profile, stores_gray):
        options["icc_profile"] = icc_profile

    if text is not None and name == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(TEXT_KEY, text)
    elif text is not None and name == "TIFF":
        options["description"] = text

    with picture_file(path) as file:
        try:
            image.save(file, format=name, **options)
        except ValueError as error:  # Pillow's word for sizes that a format cannot hold
            raise InputError(f"{path}: cannot be written ({_one_line(error)})") from error


@contextlib.contextmanager
def picture_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends, in a folder that must be there; or InputError."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, name a file")
    if not is_remote(path) and not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written, {path.parent} is not a folder")
    with replacing(path) as temporary, temporary.open("x+b") as file:
        yield file


def to_float(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """uint8 of any shape to float32 in [-1, 1]: 0 maps to -1 and 255 to 1."""
    if image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype}, it must be uint8")
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(image: npt.ArrayLike) -> UInt8[np.ndarray, "..."]:
    """Float array in [-1, 1] of any shape to uint8: clipped, then rounded to the nearest level.

    Matches the published `round(clip(x / 2 + 0.5, 0, 1) * 255)` bit for bit in float32 (diffusers'
    VaeImageProcessor.postprocess).

    Raises:
        ValueError: NaN or infinity.
    """
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("image holds NaN or infinite values; compute in float32 or bfloat16 instead of float16")
    levels: np.ndarray = np.rint((np.clip(values, -1, 1) + np.float32(1)) * np.float32(127.5))
    return levels.astype(np.uint8)


def target_size(height: int, width: int, scale: float | np.floating[Any]) -> tuple[int, int]:
    """Height and width after `upscale`: each side times the scale, rounded.

    Raises:
        InputError: the scale is not a finite number above 0, a side would come out under `MIN_TARGET_SIDE`, or the
            picture over `MAX_TARGET_PIXELS`.
    """
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale) or not scale > 0:
        raise InputError(f"scale {scale!r}: must be a finite number above 0")
    # Before rounding: a float as large as 1e308 becomes a whole number of 309 digits, or none at all.
    if not height * scale * width * scale <= MAX_TARGET_PIXELS:
        largest = math.floor(math.sqrt(MAX_TARGET_PIXELS / (height * width)) * 100) / 100
        limit = f"at most {MAX_TARGET_PIXELS:,}, a scale of {largest:g}"
        raise InputError(f"scale {scale:g}: turns {width}x{height} into too many pixels, {limit}")
    target_height, target_width = round(height * scale), round(width * scale)
    if min(target_height, target_width) < MIN_TARGET_SIDE:
        sizes = f"{width}x{height} into {target_width}x{target_height}"
        raise InputError(f"scale {scale}: turns {sizes} pixels, each side must come to {MIN_TARGET_SIDE} or more")
    return target_height, target_width


def upscale(
    image: UInt8[np.ndarray, "h w *channels"], scale: float | np.floating[Any]
) -> UInt8[np.ndarray, "H W *channels"]:
    """Resize uint8 (H, W, 3) or (H, W) with Lanczos to the sides of `target_size`.

    Raises:
        InputError: as `target_size`, before anything is allocated.
    """
    height, width = target_size(image.shape[0], image.shape[1], scale)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def pad_to_multiple(image: Shaped[np.ndarray, "h w c"], multiple: int = 8) -> Shaped[np.ndarray, "H W c"]:
    """Repeat the last row and column of (H, W, C) until both sides are multiples of `multiple`."""
    height, width = image.shape[:2]
    return pad(image, height + -height % multiple, width + -width % multiple)


def pad(image: Shaped[np.ndarray, "h w c"], height: int, width: int) -> Shaped[np.ndarray, "{height} {width} c"]:
    """Repeat the last row and column of (H, W, C) up to a height and a width, neither below the image's."""
    return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="edge")


def crop(image: Shaped[np.ndarray, "H W c"], height: int, width: int) -> Shaped[np.ndarray, "{height} {width} c"]:
    """The top left (height, width, C) of an (H, W, C) array, undoing `pad`; ValueError if it is larger."""
    if not (0 < height <= image.shape[0] and 0 < width <= image.shape[1]):
        raise ValueError(f"crop to {height}x{width} does not lie inside {image.shape[0]}x{image.shape[1]}")
    return image[:height, :width]


def _decode(path: Path, most_pixels: int, formats: tuple[str, ...] | None) -> tuple[Image.Image, list[str], str]:
    """The first frame, decoded and upright; notes; and Pillow's name of the stored layout, such as "RGB;16B"."""
    notes = []
    try:
        with path.open("rb") as file, Image.open(file, formats=formats) as image:
            _check_size(path, image, most_pixels)
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                notes.append(f"first of {frames} frames")
            stored = _stored_layout(image)
            # TIFF is turned while it is decoded, and PNG may hold its EXIF data after the pixels: ask both times.
            orientation = _orientation(image)
            image.load()
            # Decoding a PNG skips the checksums of its pixels; verifying, which needs a fresh look, does not.
            file.seek(0)
            Image.open(file, formats=formats).verify()
            turn = _UPRIGHT.get(_orientation(image))
            if turn is not None or orientation in _UPRIGHT:
                notes.append("turned upright by its EXIF orientation")
            return image.copy() if turn is None else image.transpose(turn), notes, stored
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large, at most {most_pixels:,} pixels are read") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not a picture that can be read, give a JPEG, PNG, WebP or TIFF file") from error
    except Exception as error:  # decoders meet damage with errors of every kind, and none of them is ours
        raise InputError(f"{path}: damaged or unreadable ({_one_line(error)}), give a complete picture") from error


def _check_size(path: Path, image: Image.Image, most_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{path}: {width}x{height} pixels, each side must have at least {MIN_SIDE}")
    if width * height > most_pixels:
        raise InputError(f"{path}: {width}x{height} pixels, at most {most_pixels:,} are read")


def _stored_layout(image: Image.Image) -> str:
    """Pillow's raw mode of the first block of data, or "" where a format does not tell."""
    blocks = getattr(image, "tile", None)
    if not blocks:
        return ""
    arguments = blocks[0][3]
    layout = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return layout if isinstance(layout, str) else ""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # unreadable EXIF data is no reason to refuse a picture
        return 1


def _from_bytes(image: Image.Image, stored: str, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB and alpha of a picture that Pillow holds with eight bits a channel."""
    if ";16" in stored:
        # Pillow keeps the high byte of each value, and a transparent colour of 16 bits then matches nothing.
        notes.append("16-bit channels read at 8 bits")
        image.info.pop("transparency", None)
    if image.mode in ("P", "PA"):
        notes.append("palette expanded to RGB")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "RGBa", "RGBX"):
        notes.append(f"{image.mode} converted to RGB")
    if image.has_transparency_data:
        rgba = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
    return np.array(image.convert("RGB")), None


def _from_deep_gray(path: Path, image: Image.Image, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB and alpha of a one-channel picture of 16-bit or 32-bit integers, or of floats in [0, 1]."""
    values = np.array(image).astype(np.float64)
    if image.mode == "F":
        limit, name = 1, "float gray"
    else:
        limit, name = 65535, "16-bit gray"
    # Written so that NaN fails too.
    if not (values.min() >= 0 and values.max() <= limit):
        raise InputError(f"{path}: {name} from {values.min():g} to {values.max():g}, values must lie in 0..{limit}")
    notes.append(f"{name} scaled to 8 bits")
    gray = np.rint(values * (255 / limit)).astype(np.uint8)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(values == transparent, 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2), alpha


def profile_fits(profile: bytes, gray: bool) -> bool:
    """Whether an ICC profile's header names the colour space (bytes 16 to 19) of gray or RGB data."""
    return profile[16:20] == (b"GRAY" if gray else b"RGB ")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
