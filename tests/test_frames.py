"""The frames of a video as a folder: their order, one size and noise, and colours smoothed over neighbours."""

import pathlib
import shutil
import types

import numpy as np
import pytest
from converted import loaded
from folder_runs import enlarged, opened, records, restore, write
from PIL import Image
from test_pipeline import photograph

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.files import images
from faithdiff_jax.files.listing import natural_order
from faithdiff_jax.inference.color import adain
from faithdiff_jax.inference.frames import Colors, colors_of, smoothing_tint
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.restoration import Request, restore_all
from faithdiff_jax.weights.model_directory import ModelDirectory

COUNT = 12
BRIGHTNESS = np.random.default_rng(0).uniform(0.6, 1.0, COUNT)  # of a static picture: flicker


@pytest.fixture
def requests(monkeypatch) -> list[Request]:
    """What a model that only enlarges, and takes on the wanted colours, was asked for."""
    seen = []

    def restore_all(model, requests, options):
        seen.extend(requests)
        return [
            types.SimpleNamespace(image=images.to_uint8(one.tint(images.to_float(enlarged(one.image)))), seconds={})
            for one in requests
        ]

    model = types.SimpleNamespace(config=ModelDirectory.open(SMALL_MODEL).config)
    monkeypatch.setattr("faithdiff_jax.cli.restore.load_model", lambda *given: model)
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", restore_all)
    return seen


def flickering(folder: pathlib.Path) -> pathlib.Path:
    """frame1.png to frame12.png."""
    folder.mkdir()
    for number, brightness in enumerate(BRIGHTNESS, 1):
        Image.fromarray((photograph(20, 24) * brightness).astype(np.uint8)).save(folder / f"frame{number}.png")
    return folder


def mean_levels(folder: pathlib.Path) -> np.ndarray:
    return np.array([np.asarray(opened(folder / f"frame{number}.png")).mean() for number in range(1, COUNT + 1)])


def jumps(levels: np.ndarray) -> float:
    """From frame to frame, on average."""
    return float(np.abs(np.diff(levels)).mean())


def test_numbers_in_names_are_numbers():
    names = ["b2", "a10.png", "a9.png", "a09b12", "a09b3", "a", "01", "1"]
    assert sorted(names, key=natural_order) == ["01", "1", "a", "a9.png", "a09b3", "a09b12", "a10.png", "b2"]


@pytest.mark.parametrize("radius", [0, 1, 4])
@pytest.mark.parametrize("period", [2, 3, 7])
def test_flicker_is_left_as_far_as_the_filter_says(radius, period):
    places = np.arange(-radius, radius + 1)
    flicker = np.cos(2 * np.pi * places / period)
    around = [Colors(np.array([0.1 + 0.2 * one]), np.array([0.3 + 0.1 * one])) for one in flicker]
    tint = smoothing_tint(around)
    n = radius + 1
    left = (np.sin(np.pi * n / period) / (n * np.sin(np.pi / period))) ** 2
    own, deviation = 0.1 + 0.2, 0.3 + 0.1
    assert 0 <= left <= 1
    np.testing.assert_allclose(tint(np.array([own])), 0.1 + 0.2 * left, rtol=1e-6)
    np.testing.assert_allclose(tint.gain * deviation, 0.3 + 0.1 * left, rtol=1e-6)


def test_a_steady_change_of_light_stays_and_the_ends_have_fewer_neighbours():
    ramp = [Colors(np.array([0.01 * i]), np.array([0.2])) for i in range(5)]
    np.testing.assert_allclose(smoothing_tint(ramp)(np.array([0.02])), 0.02, atol=1e-7)
    first = smoothing_tint([None, ramp[0], ramp[1]])  # weights 1 and 1/2
    np.testing.assert_allclose(first(np.array([0.0])), 0.01 / 3, atol=1e-7)
    with pytest.raises(ValueError, match="itself in its middle"):
        smoothing_tint([ramp[0], None, ramp[1]])


def test_a_flickering_video_flickers_less(requests, tmp_path):
    frames, out = flickering(tmp_path / "in"), tmp_path / "out"
    assert restore("--input", frames, "--output", out, "--frames", "--batch", 2) == 0
    before, after = mean_levels(frames), mean_levels(out)
    assert jumps(after) < 0.3 * jumps(before)
    assert abs(after.mean() - before.mean()) < 0.02 * before.mean()
    assert {one.seed for one in requests} == {42}  # one noise for all
    np.testing.assert_allclose([one.image.mean() for one in requests], before)  # in the order of their numbers
    assert {record["frames"] for record in records(out)} == {4}
    assert restore("--input", frames, "--output", tmp_path / "own", "--frames", 0) == 0
    np.testing.assert_allclose(mean_levels(tmp_path / "own"), before, atol=1)


def test_a_run_taken_up_in_the_middle_gives_the_same_frames(requests, tmp_path, capsys):
    frames, whole, resumed = flickering(tmp_path / "in"), tmp_path / "whole", tmp_path / "resumed"
    (frames / "frame7.png").write_text("no picture")
    assert restore("--input", frames, "--output", whole, "--frames", 3) == 2
    shutil.copytree(whole, resumed)
    for number in (4, 5, 8, 9, 12):
        (resumed / f"frame{number}.png").unlink()
    requests.clear()
    assert restore("--input", frames, "--output", resumed, "--frames", 3) == 2
    assert len(requests) == 5
    for path in whole.glob("*.png"):
        assert path.read_bytes() == (resumed / path.name).read_bytes()
    capsys.readouterr()
    assert restore("--input", frames, "--output", resumed, "--frames", 2) == 2
    assert "11 of these were made with another model or other options" in capsys.readouterr().out


def test_what_are_no_frames_is_refused(requests, tmp_path, capsys):
    frames, flags = flickering(tmp_path / "in"), ["--output", tmp_path / "out", "--frames"]
    write(frames, frame11=(20, 25))
    assert restore("--input", frames, *flags) == 2
    said = capsys.readouterr().err
    assert "--frames: frame10.png 24x20 and frame11.png 25x20 pixels, all frames must be of one size" in said
    assert restore("--input", frames / "frame1.png", *flags) == 2
    assert "frame1.png is a file, a folder of frames is needed" in capsys.readouterr().err
    assert restore("--input", frames, "--caption", "a", "--attribute", "a", *flags) == 2
    assert "--frames and --attribute: give one of them" in capsys.readouterr().err
    assert restore("--input", frames, *flags, "-1") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fix", ["adain", "wavelet"])
@pytest.mark.parametrize("stream_above", [2**24, 1])
def test_the_colour_fix_lends_the_colours_that_are_wanted(fix, stream_above):
    """The model's own picture, without any fix, is the start of both."""
    model, image = loaded(), photograph(24, 20)
    options = RestoreOptions(steps=1, scale=2, color_fix=fix, stream_above=stream_above, wavelet_levels=1, seed=1)
    tint = smoothing_tint([None, colors_of(image), colors_of((image * 0.7).astype(np.uint8))])
    plain, tinted = (
        images.to_float(np.asarray(restore_all(model, [Request(image=image, tint=one)], options)[0].image))
        for one in (None, tint)
    )
    wanted = tint(plain) if fix == "wavelet" else np.asarray(adain(plain[None], tint(plain)[None]))[0]
    differences = [np.abs(np.mean(x - tinted, axis=(0, 1))).max() for x in (plain, wanted)]
    assert differences[0] > 0.02
    assert differences[1] < 0.2 * differences[0]
