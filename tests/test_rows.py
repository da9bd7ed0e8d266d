"""Pictures by rows: enlarged as at once, and files that hold what those written at once hold."""

import io
import types

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms

from faithdiff_jax.errors import InputError
from faithdiff_jax.files import spill
from faithdiff_jax.files.images import load_image, save_image, upscale
from faithdiff_jax.files.rows import save_rows, upscale_rows
from faithdiff_jax.files.spill import Spill

PHOTOGRAPH = np.ascontiguousarray(skimage.data.astronaut()[40:137, 150:301])


def by_rows(image: np.ndarray, size: tuple[int, int], count: int) -> list[np.ndarray]:
    return [upscale_rows(image, size, row, min(row + count, size[0])) for row in range(0, size[0], count)]


@pytest.mark.parametrize("scale", [1, 2, 4, 1.37, 3.3, 0.61])
def test_rows_are_enlarged_as_the_whole(scale):
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    for image in (PHOTOGRAPH, noise, PHOTOGRAPH[..., 0]):
        whole = upscale(image, scale)
        for count in (7, 32, 1000):
            found = np.concatenate(by_rows(image, whole.shape[:2], count))
            apart = np.abs(found.astype(int) - whole)
            assert apart.max() <= (0 if scale == int(scale) else 1)
            assert (apart > 0).mean() < 5e-3


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize(
    ("suffix", "alpha"),
    [*((name, alpha) for name in ("png", "tif", "webp") for alpha in (False, True)), ("jpg", False)],
)
def test_files_hold_what_those_written_at_once_hold(tmp_path, suffix, gray, alpha):
    rgb = np.repeat(PHOTOGRAPH[..., :1], 3, 2) if gray else PHOTOGRAPH
    over = PHOTOGRAPH[..., 1]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    given = {"gray": gray, "icc_profile": profile, "text": '{"caption": "larger"}' if suffix == "tif" else "größer"}
    bands = (rgb[row : row + 30] for row in range(0, len(rgb), 30))
    rows = (lambda start, stop: over[start:stop]) if alpha else None
    save_rows(tmp_path / f"rows.{suffix}", bands, rgb.shape[:2], alpha=rows, **given)
    save_image(tmp_path / f"whole.{suffix}", rgb, alpha=over if alpha else None, **given)
    ours, theirs = (load_image(tmp_path / f"{name}.{suffix}") for name in ("rows", "whole"))
    np.testing.assert_array_equal(ours.rgb, theirs.rgb)
    assert (ours.alpha is None) == (theirs.alpha is None)
    if alpha:
        np.testing.assert_array_equal(ours.alpha, over)
    assert (ours.gray, ours.icc_profile, ours.notes) == (theirs.gray, theirs.icc_profile, theirs.notes)
    with Image.open(tmp_path / f"rows.{suffix}") as one, Image.open(tmp_path / f"whole.{suffix}") as other:
        assert one.mode == other.mode
        if suffix == "png":
            assert one.text == other.text
        elif suffix == "tif":
            assert one.tag_v2[270] == other.tag_v2[270]


def test_photographs_in_png_are_no_larger_than_pillow_writes_them(tmp_path):
    """Lines are filtered: without, a photograph is half as large again."""
    save_rows(tmp_path / "rows.png", [skimage.data.astronaut()], (512, 512))
    whole = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(whole, "PNG")
    assert (tmp_path / "rows.png").stat().st_size < 1.01 * len(whole.getvalue())


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    def bands():
        yield PHOTOGRAPH
        raise KeyError("mine")

    for suffix in ("png", "tif"):
        with pytest.raises(KeyError, match="mine"):
            save_rows(tmp_path / f"rows.{suffix}", bands(), (2 * len(PHOTOGRAPH), PHOTOGRAPH.shape[1]))
    with pytest.raises(InputError, match="is not a folder"):
        save_rows(tmp_path / "none" / "rows.png", [PHOTOGRAPH], PHOTOGRAPH.shape[:2])
    assert list(tmp_path.iterdir()) == []


def test_a_spill_holds_pieces(rng):
    array = rng.standard_normal((13, 17, 3)).astype(np.float32)
    spilled = Spill(array.shape, np.float32)
    for top, left, height, width in ((0, 0, 5, 17), (5, 0, 8, 9), (5, 9, 8, 8)):
        spilled.write(top, left, array[top : top + height, left : left + width])
    np.testing.assert_array_equal(spilled.read(0, 0, 13, 17), array)
    np.testing.assert_array_equal(spilled.read(3, 7, 6, 4), array[3:9, 7:11])
    spilled.close()


def test_a_spill_without_room(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=10**9))
    with pytest.raises(InputError, match=r"needs 8\.6 GB for the parts of a picture, 1\.0 GB are left; .* TMPDIR$"):
        Spill((2048, 2048, 512), np.float32)
