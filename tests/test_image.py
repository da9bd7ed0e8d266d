"""Writing, listing, scaling and padding: what is written comes back, and a failed write changes nothing."""

import os

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms

from faithdiff_jax.errors import InputError
from faithdiff_jax.files.images import (
    crop,
    load_image,
    output_format,
    pad_to_multiple,
    save_image,
    to_float,
    to_uint8,
    upscale,
)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return skimage.data.astronaut()[40:131, 150:283]


@pytest.fixture(scope="module")
def mask(photo) -> np.ndarray:
    return np.add.outer(np.arange(photo.shape[0]), np.arange(photo.shape[1])).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.WEBP", "a.tif", "a.tiff"])
def test_lossless_files_come_back_equal(tmp_path, photo, mask, name):
    save_image(tmp_path / name, photo)
    picture = load_image(str(tmp_path / name))
    np.testing.assert_array_equal(picture.rgb, photo)
    assert picture.rgb.dtype == np.uint8
    assert (picture.alpha, picture.gray, picture.icc_profile, picture.notes) == (None, False, None, ())

    save_image(tmp_path / name, photo, alpha=mask)
    picture = load_image(tmp_path / name)
    np.testing.assert_array_equal(picture.rgb, photo)
    np.testing.assert_array_equal(picture.alpha, mask)
    assert picture.notes == ("alpha kept apart",)


def test_jpeg_is_written_with_all_its_chroma(tmp_path, photo):
    save_image(tmp_path / "a.jpg", photo)
    Image.fromarray(photo).save(tmp_path / "b.jpg", quality=95, subsampling=0)
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg").rgb, load_image(tmp_path / "b.jpg").rgb)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.format == "JPEG"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_gray_is_written_as_gray(tmp_path, photo, suffix):
    path = tmp_path / f"a{suffix}"
    save_image(path, photo, gray=True)
    with Image.open(path) as stored:
        assert stored.mode == ("RGB" if suffix == ".webp" else "L")
        assert np.abs(np.asarray(stored.convert("L")).astype(int) - Image.fromarray(photo).convert("L")).mean() < 2


def test_colour_profiles_stay_where_they_fit(tmp_path, photo):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        save_image(tmp_path / name, photo, icc_profile=profile)
        assert load_image(tmp_path / name).icc_profile == profile
    save_image(tmp_path / "a.png", photo, gray=True, icc_profile=profile)
    assert load_image(tmp_path / "a.png").icc_profile is None


def test_two_pixels_are_enough(tmp_path):
    save_image(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert load_image(tmp_path / "a.png").rgb.shape == (2, 2, 3)


def test_a_failed_write_leaves_everything_as_it_was(tmp_path, photo, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail_halfway(self, file, **options):
        file.write(b"half")
        raise OSError("no space\nleft")

    monkeypatch.setattr(Image.Image, "save", fail_halfway)
    with pytest.raises(InputError, match=r"a\.png: cannot be written \(no space left\)"):
        save_image(path, photo)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.png"]

    def interrupted(self, file, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_image(path, photo)
    assert os.listdir(tmp_path) == ["a.png"]


def test_saving_replaces_and_keeps_the_usual_permissions(tmp_path, photo):
    (tmp_path / "plain").touch()
    for picture in (photo, photo[::-1]):
        save_image(tmp_path / "a.png", picture)
        np.testing.assert_array_equal(load_image(tmp_path / "a.png").rgb, picture)
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["a.png", "plain"]


@pytest.mark.usefixtures("unchecked")
def test_places_that_cannot_be_written_are_named(tmp_path, photo, mask):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"folder\.png: is a folder"):
        save_image(tmp_path / "folder.png", photo)
    for parent in ("missing", "file"):
        with pytest.raises(InputError, match=f"{parent} is not a folder"):
            save_image(tmp_path / parent / "a.png", photo)
    for name in ("a", "a.xyz", "a.gif"):
        with pytest.raises(InputError, match=r"use one of .*\.png"):
            save_image(tmp_path / name, photo)
    with pytest.raises(InputError, match=r"JPEG cannot store the picture's alpha"):
        output_format("a.jpg", alpha=True)
    with pytest.raises(InputError, match=r"a\.webp: cannot be written"):
        save_image(tmp_path / "a.webp", np.zeros((8, 20_000, 3), np.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        save_image(tmp_path / "a.png", photo.astype(np.float32))
    with pytest.raises(ValueError, match="alpha is"):
        save_image(tmp_path / "a.png", photo, alpha=mask[1:])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


@pytest.mark.usefixtures("unchecked")
def test_every_level_comes_back():
    levels = np.arange(256, dtype=np.uint8)
    values = to_float(levels)
    assert values.dtype == np.float32
    assert (values[0], values[255]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(values), levels)
    with pytest.raises(ValueError, match="float32"):
        to_float(values)


def test_rounding_is_the_published_one(rng):
    values = rng.uniform(-1.2, 1.2, 200_000).astype(np.float32)
    values[:511] = np.arange(511, dtype=np.float32) / 255 - 1  # halves between levels among them
    published = ((values / np.float32(2) + np.float32(0.5)).clip(0, 1) * np.float32(255)).round().astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(values), published)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            to_uint8(np.float32([0, bad]))


def test_upscale_is_pillows_lanczos(photo, mask):
    for picture in (photo, mask):
        resized = upscale(picture, 2.3)
        expected = Image.fromarray(picture).resize((round(133 * 2.3), round(91 * 2.3)), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(resized, expected)
        assert resized.dtype == np.uint8
        assert resized.flags.writeable
        np.testing.assert_array_equal(upscale(picture, 1), picture)
    assert upscale(photo[:2, :2], 4).shape == (8, 8, 3)
    assert upscale(photo, np.float32(0.5)).shape == (46, 66, 3)


@pytest.mark.parametrize("scale", [0, -2, float("nan"), float("inf"), "4", True, None, 0.05, 179, 1e9, 1e308])
@pytest.mark.usefixtures("unchecked")
def test_upscale_refuses_bad_scales(photo, scale):
    with pytest.raises(InputError, match=r"^scale "):
        upscale(photo, scale)


def test_padding_repeats_the_edge_and_is_undone(photo):
    padded = pad_to_multiple(photo)
    assert padded.shape == (96, 136, 3)
    np.testing.assert_array_equal(padded[91:, :133], np.repeat(photo[-1:], 5, axis=0))
    np.testing.assert_array_equal(padded[:91, 133:], np.repeat(photo[:, -1:], 3, axis=1))
    assert (padded[91:, 133:] == photo[-1, -1]).all()
    np.testing.assert_array_equal(crop(padded, 91, 133), photo)
    np.testing.assert_array_equal(pad_to_multiple(padded), padded)
    assert pad_to_multiple(photo, 64).shape == (128, 192, 3)
    for size in ((97, 10), (10, 0)):
        with pytest.raises(ValueError, match="does not lie inside 96x136"):
            crop(padded, *size)
