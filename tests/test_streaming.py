"""Pictures that are worked on by parts: the same as at once, but for rounding; and what cannot be done by parts."""

import numpy as np
import pytest
from converted import loaded, published_and_converted
from PIL import Image
from port import normal
from test_pipeline import levels_apart, photograph

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import Cancelled, InputError
from faithdiff_jax.files import spill
from faithdiff_jax.files.images import load_image
from faithdiff_jax.inference.color import adain, adain_levels, level_counts
from faithdiff_jax.models.vae import VAEConfig

# Latents of 26x14 in tiles of 8. Cases share what they compile wherever they can.
OPTIONS = {"scale": 4, "steps": 2, "tile": 8, "vae_tile": 64}
ANCESTRAL = {"sampler": "ddpm", "start": "noise", "guidance_rescale": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        {
            "batch": 4,
            "overlap": 0.8,
            "sampler": "unipc",
            "guidance_end": 0.5,
            "decoder_passes": 1,
            "color_fix": "wavelet",
        },
        ANCESTRAL,
    ],
    ids=["unipc", "ancestral"],
)
def test_the_same_picture_by_parts(given, monkeypatch):
    monkeypatch.setattr(VAEConfig, "decoder_reach", 1)  # so that tiles of 8 are large enough for passes
    model, image, options = loaded(), photograph(52, 28), OPTIONS | given
    whole = model.restore(image, "the cat", **options)
    streamed = model.restore(image, "the cat", stream_above=1, **options)
    assert streamed.shape == whole.shape
    largest, share = levels_apart(streamed, whole)
    assert largest <= 1  # other programs round otherwise
    assert share < 0.01


def test_looking_in_and_stopping(rng):
    model, image, seen = loaded(), photograph(52, 28), []
    noise = {"start": normal(rng, 1, 26, 14, 4), "steps": normal(rng, 2, 1, 26, 14, 4)}
    options = OPTIONS | ANCESTRAL | {"stream_above": 1, "noise": noise}

    def look(step, steps, preview):
        seen.append((step, steps, preview()))
        return step < 2

    with pytest.raises(Cancelled, match=r"^stopped after step 2 of 2, as asked$"):
        model.restore(image, on_step=look, **options)
    assert [each[:2] for each in seen] == [(1, 2), (2, 2)]
    restored = model.restore(image, **options).astype(int)
    away = [np.abs(preview - restored).mean() for _, _, preview in seen]
    assert away[1] < away[0]


def test_rows_are_written_as_they_come(tmp_path):
    """By the command, with alpha: the file holds what Python gives."""
    rgba = np.dstack([photograph(52, 28), photograph(52, 28)[..., 0]])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    flags = ["--model", str(published_and_converted()[1]), "--input", str(tmp_path / "a.png"), "--cache", ""]
    for name, value in (OPTIONS | ANCESTRAL).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    names = {"whole": [], "rows": ["--stream-above", "1", "--compare"]}
    for name, more in names.items():
        assert run_command("restore", [*flags, "--output", str(tmp_path / name), *more]) == 0
    whole, rows = (load_image(tmp_path / name / "a.png") for name in names)
    assert levels_apart(rows.rgb, whole.rgb)[0] <= 1
    np.testing.assert_array_equal(rows.alpha, whole.alpha)
    assert "too large for one" in (tmp_path / "rows" / "manifest.jsonl").read_text()


def test_statistics_of_levels_are_those_of_the_picture(rng):
    ours = rng.integers(0, 256, (31, 57, 3), np.uint8)
    theirs = rng.integers(20, 90, (31, 57, 3), np.uint8)
    table = adain_levels(level_counts(ours), level_counts(theirs))
    signed = [x[None].astype(np.float32) / 127.5 - 1 for x in (ours, theirs)]
    expected = np.clip(np.rint((np.asarray(adain(*signed))[0] + 1) * 127.5), 0, 255)
    found = np.stack([table[channel][ours[..., channel]] for channel in range(3)], axis=-1)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


def test_what_cannot_be_done_by_parts(monkeypatch):
    model, image = loaded(), photograph(16, 16)
    for given, message in (
        (
            {"deepcache_interval": 2},
            "32x32 pixels are more than stream_above, 1: .* deepcache_interval is 2: must be 1",
        ),
        ({"tgate_after": 0.5}, "tgate_after is 0.5: must be 1"),
    ):
        with pytest.raises(InputError, match=message):
            model.restore(image, scale=2, stream_above=1, **given)
    with pytest.raises(InputError, match="attribution: 32x32 pixels are more than stream_above, 1, which have no maps"):
        model.attribute(image, "the cat", ["cat"], scale=2, stream_above=1)
    monkeypatch.setattr(spill, "check_room", lambda size: (_ for _ in ()).throw(InputError(f"no room for {size}")))
    monkeypatch.setattr("faithdiff_jax.inference.streaming.check_room", spill.check_room)
    with pytest.raises(InputError, match=r"^no room for \d+$"):
        model.restore(image, stream_above=1)
