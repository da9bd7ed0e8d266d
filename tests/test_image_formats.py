"""Every kind of file that is read: it comes out as eight-bit RGB, what was done is said, and bad files are named."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faithdiff_jax.data.decode import decode
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import images as image_module
from faithdiff_jax.files.images import MAX_PIXELS, load_image, save_image


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return skimage.data.astronaut()[40:131, 150:283]


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file by hand, for layouts that Pillow does not write."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(path, values: np.ndarray, color: int, extra: bytes = b""):
    """Write (H, W, C) uint16 as PNG of a colour type (0 gray, 2 RGB, 4 gray and alpha, 6 RGBA)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(png(values.shape[1], values.shape[0], 16, color, rows, extra))
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_is_remembered(tmp_path, photo, mode):
    original = Image.fromarray(photo).convert("L")
    original.convert(mode).save(tmp_path / "a.png")
    picture = load_image(tmp_path / "a.png")
    assert picture.gray
    assert (picture.alpha is not None) == (mode == "LA")
    assert "gray repeated into three channels" in picture.notes
    expected = np.asarray(original.convert("1").convert("L") if mode == "1" else original)
    for channel in range(3):
        np.testing.assert_array_equal(picture.rgb[..., channel], expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_deep_gray_is_scaled_not_clipped(tmp_path, rng, name):
    values = rng.integers(0, 65536, (17, 23), dtype=np.uint16)
    values[0, :4] = 0, 128, 129, 65535
    Image.fromarray(values).save(tmp_path / name)
    picture = load_image(tmp_path / name)
    np.testing.assert_array_equal(picture.rgb[..., 1], np.rint(values / 257))
    assert picture.rgb[0, :4, 0].tolist() == [0, 0, 1, 255]
    assert picture.gray
    assert "16-bit gray scaled to 8 bits" in picture.notes


def test_big_endian_and_32_bit_gray(tmp_path, rng):
    values = rng.integers(0, 65536, (17, 23), dtype=np.uint16)
    expected = np.rint(values / 257)
    Image.fromarray(values).convert("I").save(tmp_path / "a.tif")
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif").rgb[..., 2], expected)
    Image.frombytes("I;16B", (23, 17), values.astype(">u2").tobytes()).save(tmp_path / "b.tif")
    np.testing.assert_array_equal(load_image(tmp_path / "b.tif").rgb[..., 0], expected)
    Image.fromarray(values.astype(np.int32) + 100_000).save(tmp_path / "c.tif")
    with pytest.raises(InputError, match=r"c\.tif: 16-bit gray from .* values must lie in 0\.\.65535"):
        load_image(tmp_path / "c.tif")


def test_deep_gray_with_a_transparent_level(tmp_path, rng):
    values = rng.integers(0, 65536, (5, 7, 1), dtype=np.uint16)
    values[2, 3] = 41_234
    picture = load_image(png16(tmp_path / "a.png", values, 0, chunk(b"tRNS", struct.pack(">H", 41_234))))
    np.testing.assert_array_equal(picture.alpha, np.where(values[..., 0] == 41_234, 0, 255))


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colour_is_said_to_lose_bits(tmp_path, rng, color, channels):
    values = rng.integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    extra = chunk(b"tRNS", struct.pack(">3H", *values[0, 0])) if color == 2 else b""
    picture = load_image(png16(tmp_path / "a.png", values, color, extra))
    assert "16-bit channels read at 8 bits" in picture.notes
    assert np.abs(picture.rgb.astype(float) - values[..., : 3 if channels > 2 else 1] / 257).max() <= 1
    assert picture.gray == (color == 4)
    assert (picture.alpha is None) == (color == 2)


def test_float_gray(tmp_path, rng):
    values = rng.uniform(0, 1, (9, 11)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    picture = load_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.rgb[..., 0], np.rint(values.astype(np.float64) * 255))
    assert picture.notes[0] == "float gray scaled to 8 bits"
    for bad in (-0.1, 1.5, np.nan):
        values[3, 4] = bad
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match=r"a\.tif: float gray .* must lie in 0\.\.1"):
            load_image(tmp_path / "a.tif")


def test_palette_and_its_transparency(tmp_path, photo):
    indexed = Image.fromarray(photo).quantize(32)
    indexed.save(tmp_path / "a.png")
    picture = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.rgb, indexed.convert("RGB"))
    assert picture.notes == ("palette expanded to RGB",)
    assert not picture.gray

    indexed.save(tmp_path / "b.png", transparency=bytes(range(32)))
    picture = load_image(tmp_path / "b.png")
    np.testing.assert_array_equal(picture.rgb, indexed.convert("RGB"))
    np.testing.assert_array_equal(picture.alpha, np.asarray(indexed))
    assert picture.notes == ("palette expanded to RGB", "alpha kept apart")

    Image.fromarray(photo).convert("L").quantize(16).save(tmp_path / "c.gif")
    assert load_image(tmp_path / "c.gif").gray


def test_a_transparent_colour_becomes_alpha(tmp_path, photo):
    colour = tuple(int(value) for value in photo[4, 5])
    Image.fromarray(photo).save(tmp_path / "a.png", transparency=colour)
    picture = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.alpha == 0, (photo == colour).all(axis=2))


def test_cmyk_is_converted_and_its_profile_dropped(tmp_path, photo):
    fake = b"\0" * 16 + b"CMYK" + b"\0" * 108
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=fake, quality=95)
    picture = load_image(tmp_path / "a.jpg")
    assert picture.notes == ("CMYK converted to RGB", "colour profile dropped, it describes other channels")
    assert picture.icc_profile is None
    assert np.abs(picture.rgb.astype(int) - photo).mean() < 8


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_are_converted(tmp_path, photo, mode):
    converted = Image.fromarray(photo).convert(mode)
    converted.save(tmp_path / "a.tif")
    picture = load_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.rgb, converted.convert("RGB"))
    assert picture.notes[0] == f"{mode} converted to RGB"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_is_taken(tmp_path, photo, name):
    frames = [Image.fromarray(np.roll(photo, 9 * i, axis=1)) for i in range(4)]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    picture = load_image(tmp_path / name)
    assert picture.notes[0] == "first of 4 frames"
    assert np.abs(picture.rgb.astype(int) - photo).mean() < (8 if name == "a.gif" else 1e-9)


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, photo, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    picture = load_image(tmp_path / name)
    np.testing.assert_array_equal(picture.rgb, UPRIGHT[orientation](photo))
    assert picture.notes == (("turned upright by its EXIF orientation",) if orientation > 1 else ())


def test_deep_gray_is_turned_too(tmp_path):
    values = np.arange(15, dtype=np.uint16).reshape(3, 5) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png").rgb[..., 0], np.rot90(values // 257, -1))


def test_unreadable_exif_is_no_reason_to_stop(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert load_image(tmp_path / "a.jpg").rgb.shape == photo.shape


def refused(path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


def test_what_is_no_picture_is_named(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "is a folder")
    for content in (b"", b"hello", bytes(5000), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        refused(tmp_path / "a.png", "picture")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.gif"])
def test_truncated_files_are_refused(tmp_path, photo, name):
    path = tmp_path / name
    Image.fromarray(photo).save(path)
    content = path.read_bytes()
    for part in (0.2, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * part)])
        refused(path)


def test_damaged_data_is_refused(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "damaged")


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (20_000, 8_000), (60_000, 60_000)])
def test_size_is_judged_by_the_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, 8, 0, b""))
    # The first is under our limit, though over the size from which Pillow warns: only its missing data is wrong.
    refused(path, f"{MAX_PIXELS:,}" if width * height > MAX_PIXELS else "damaged")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (50, 1), (0, 5)])
def test_slivers_are_refused(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 8, 0, b"\0" * (height * (width + 1))))
    refused(path, *(["at least 2"] if width else []))


def test_what_the_decoder_remarks_is_passed_on(tmp_path, photo, monkeypatch):
    def remark(image):
        warnings.warn("odd\ndata", UserWarning, stacklevel=1)
        return 1

    save_image(tmp_path / "a.png", photo)
    monkeypatch.setattr(image_module, "_orientation", remark)
    assert "the decoder remarked: odd data" in load_image(tmp_path / "a.png").notes


@pytest.fixture(scope="module")
def encoded():
    """A small picture in every format that is written, and more."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8))
    files = {}
    for name in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"):
        file = io.BytesIO()
        picture.save(file, name)
        files[name] = file.getvalue()
    return files


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_a_picture_or_one_line(encoded, tmp_path_factory, data):
    content = bytearray(encoded[data.draw(st.sampled_from(sorted(encoded)))])
    changes = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        content[place] = value
    del content[data.draw(st.integers(1, len(content))) :]
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    path.write_bytes(content)
    for read in (lambda: load_image(path).rgb, lambda: decode(bytes(content), "a.png")):
        try:
            rgb, message = read(), ""
        except InputError as error:
            rgb, message = np.zeros((2, 2, 3), np.uint8), str(error)
        assert "\n" not in message
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
