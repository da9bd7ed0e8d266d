"""Pictures by rows, from top to bottom, for those too large to hold whole: enlarging, and writing to PNG and TIFF."""

import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from faithdiff_jax.files import images
from faithdiff_jax.files.images import TEXT_KEY, Picture, output_format, picture_file, profile_fits

Bands = Iterable[UInt8[np.ndarray, "rows W c"]]
"""Rows of a picture from top to bottom, some at a time."""

_STRIP = 64
"""Rows that are compressed together."""
_REACH = 3
"""Of Lanczos, in pixels of the picture or, where it is made smaller, of the smaller one."""


def upscale_rows(
    image: UInt8[np.ndarray, "h w *channels"], size: tuple[int, int], start: int, stop: int
) -> UInt8[np.ndarray, "rows W *channels"]:
    """The rows from `start` to before `stop` of `images.upscale` to `size`, height and width.

    They are the same for scales that are whole numbers. For others, Pillow's place of a row is a float32, and a value
    in some thousands is one level off.
    """
    (height, width), stride = size, image.shape[0] / size[0]
    # Pillow lets no pixel outside its box count, so the box is larger than what is asked for.
    margin = math.ceil(_REACH * max(1 / stride, 1)) + 1
    top, bottom = max(start - margin, 0), min(stop + margin, height)
    reach = _REACH * max(stride, 1) + 1
    first, last = max(math.floor(top * stride - reach), 0), min(math.ceil(bottom * stride + reach), image.shape[0])
    # Across and then down, as Pillow does with a picture that is enlarged.
    part = Image.fromarray(image[first:last]).resize((width, last - first), Image.Resampling.LANCZOS)
    box = (0, top * stride - first, width, bottom * stride - first)
    rows = part.resize((width, bottom - top), Image.Resampling.LANCZOS, box=box)
    return np.asarray(rows)[start - top : stop - top]


@runtime_checkable
class Rows(Protocol):
    """A picture that comes by rows: its `shape` is (H, W, 3), `bands` gives some rows at a time from top to bottom."""

    shape: tuple[int, int, int]

    def bands(self) -> Bands:
        """As above."""


def save_restored(
    path: str | os.PathLike[str], restored: UInt8[np.ndarray, "h w 3"] | Rows, source: Picture, scale: float, text: str
) -> list[str]:
    """Write a picture that was made of another, larger by `scale`, with alpha, gray and profile of that one.

    Returns:
        A short sentence for each thing that was done.
    """
    how: dict[str, Any] = {"gray": source.gray, "icc_profile": source.icc_profile, "text": text}
    alpha = source.alpha
    if isinstance(restored, np.ndarray):
        images.save_image(path, restored, alpha=None if alpha is None else images.upscale(alpha, scale), **how)
    else:
        size = restored.shape[:2]
        rows = None if alpha is None else functools.partial(upscale_rows, alpha, size)
        save_rows(path, restored.bands(), size, alpha=rows, **how)
    done = {"alpha upscaled with Lanczos": alpha is not None, "written as gray": source.gray}
    return [sentence for sentence, is_done in done.items() if is_done]


def save_rows(
    path: str | os.PathLike[str],
    bands: Bands,
    size: tuple[int, int],
    *,
    alpha: Callable[[int, int], UInt8[np.ndarray, "rows W"]] | None = None,
    gray: bool = False,
    icc_profile: bytes | None = None,
    text: str | None = None,
) -> None:
    """`images.save_image` of a picture that comes by rows: PNG and TIFF are written as they come.

    JPEG and WebP are written from all of it, as there are no writers by rows for them.

    Args:
        path: where to.
        bands: (rows, W, 3) uint8 from top to bottom, some rows at a time.
        size: height and width of all of it.
        alpha: gives the rows of the alpha from one to before another.
        gray: see `images.save_image`, like `icc_profile` and `text`.
        icc_profile: see there.
        text: see there; in TIFF, ASCII.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    name, (height, width) = output_format(path, alpha=alpha is not None), size
    if name not in ("PNG", "TIFF"):
        rgb, whole_alpha = np.concatenate(list(bands)), None if alpha is None else alpha(0, height)
        images.save_image(path, rgb, alpha=whole_alpha, gray=gray, icc_profile=icc_profile, text=text)
        return
    channels = (1 if gray else 3) + (alpha is not None)
    profile = icc_profile if icc_profile is not None and profile_fits(icc_profile, gray) else None
    strips = _strips(bands, gray, alpha)
    with picture_file(path) as file:
        write = _write_png if name == "PNG" else _write_tiff
        write(file, strips, (height, width, channels), profile, text)


def _strips(
    bands: Bands, gray: bool, alpha: Callable[[int, int], np.ndarray] | None
) -> Iterator[UInt8[np.ndarray, "rows W c"]]:
    """Strips of `_STRIP` rows each, but for the last, in the channels that are written."""
    row, kept = 0, []
    for band in bands:
        channels = [np.asarray(Image.fromarray(np.ascontiguousarray(band)).convert("L"))] if gray else [band]
        if alpha is not None:
            channels.append(alpha(row, row + len(band)))
        row += len(band)
        kept.append(np.dstack(channels))
        have = sum(map(len, kept))
        if have >= _STRIP:
            together = np.concatenate(kept)
            whole = have - have % _STRIP
            yield from np.split(together[:whole], whole // _STRIP)
            kept = [together[whole:]]
    rest = np.concatenate(kept)
    if len(rest):
        yield rest


def _write_png(
    file: IO[bytes], strips: Bands, shape: tuple[int, int, int], profile: bytes | None, text: str | None
) -> None:
    """Source: the PNG specification (W3C), sections 9 to 11."""
    height, width, channels = shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(b"\x89PNG\r\n\x1a\n")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, 0])
    putchunk(file, b"IHDR", header)
    if profile is not None:
        putchunk(file, b"iCCP", b"ICC Profile\0\0", zlib.compress(profile))
    if text is not None:
        info = PngInfo()
        info.add_text(TEXT_KEY, text)
        for chunk in info.chunks:
            putchunk(file, *chunk[:2])
    packer = zlib.compressobj(memLevel=9, strategy=zlib.Z_FILTERED)  # as Pillow does
    above = np.zeros((1, width * channels), np.uint8)
    for strip in strips:
        lines = strip.reshape(len(strip), -1)
        if packed := packer.compress(_filtered(lines, above, channels)):
            putchunk(file, b"IDAT", packed)
        above = lines[-1:]
    putchunk(file, b"IDAT", packer.flush())
    putchunk(file, b"IEND", b"")


def _filtered(lines: np.ndarray, above: np.ndarray, channels: int) -> bytes:
    """Each line under the filter that leaves the smallest values, as the specification advises (section 12.8)."""
    up = np.concatenate([above, lines[:-1]])
    left, corner = (np.pad(x, ((0, 0), (channels, 0)))[:, :-channels] for x in (lines, up))
    a, b, c = (x.astype(np.int16) for x in (left, up, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    paeth = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))
    mean = ((a + b) // 2).astype(np.uint8)
    found = np.stack([lines, lines - left, lines - up, lines - mean, lines - paeth])
    cost = np.abs(found.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
    best = np.argmin(cost, axis=0)
    chosen = found[best, np.arange(len(lines))]
    return np.concatenate([best.astype(np.uint8)[:, None], chosen], axis=1).tobytes()


def _write_tiff(
    file: IO[bytes], strips: Bands, shape: tuple[int, int, int], profile: bytes | None, text: str | None
) -> None:
    """Compressed strips under the horizontal predictor; BigTIFF where offsets may not fit 32 bits."""
    packed = (zlib.compress(np.diff(strip, axis=1, prepend=strip.dtype.type(0)).tobytes()) for strip in strips)
    with tifffile.TiffWriter(file) as writer:
        writer.write(
            packed,
            shape=shape if shape[2] > 1 else shape[:2],
            dtype=np.uint8,
            photometric="rgb" if shape[2] > 2 else "minisblack",
            planarconfig="contig",
            extrasamples=["unassalpha"] if shape[2] in (2, 4) else None,
            rowsperstrip=_STRIP,
            compression="adobe_deflate",
            predictor=True,
            iccprofile=profile,
            description=text,
            metadata=None,
            software=False,
        )
