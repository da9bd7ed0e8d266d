"""One sample: flip, crop, degradation, resize back up, caption and time numbers, against the same done by hand."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from pictures import coordinates, encode
from PIL import Image

from faithdiff_jax.data import samples
from faithdiff_jax.data.degradation.config import BlurConfig, FinalSincConfig, JpegConfig, NoiseConfig, ResizeConfig
from faithdiff_jax.data.degradation.degrade import LEVELS, DegradationConfig
from faithdiff_jax.data.samples import UPSCALING, SampleConfig, make_sample
from faithdiff_jax.data.sources import Record
from faithdiff_jax.errors import InputError

_NO_BLUR, _NO_JPEG = BlurConfig(probability=0.0), JpegConfig(probability=0.0, quality=(100, 100))
_KEEP = ResizeConfig(up=0.0, down=0.0, keep=1.0, scale=(1.0, 1.0))
_NO_NOISE = NoiseConfig(probability=0.0, gaussian_sigma=(0.0, 0.0), poisson_scale=(0.0, 0.0))
# Nothing but the mean of every 4 x 4 pixels, so that what comes out can be computed by hand.
IDENTITY = DegradationConfig(
    resize_modes=("area",),
    blur1=_NO_BLUR,
    resize1=_KEEP,
    noise1=_NO_NOISE,
    jpeg1=_NO_JPEG,
    blur2=_NO_BLUR,
    resize2=_KEEP,
    noise2=_NO_NOISE,
    jpeg2=_NO_JPEG,
    final_sinc=FinalSincConfig(probability=0.0),
)
CUT = SampleConfig(crop=16, degradation=IDENTITY)


def expected_crops(picture, time_ids, size):
    """The crop at the place that the time numbers name, of the picture and of its mirror image."""
    top, left = (int(value) for value in time_ids[2:4])
    return [image[top : top + size, left : left + size] for image in (picture, picture[:, ::-1])]


def upscalings(lq, size):
    return [
        np.asarray(Image.fromarray(np.ascontiguousarray(lq)).resize((size, size), mode)) for mode in UPSCALING.values()
    ]


def test_of_several_crops_the_one_with_most_edges_is_taken(rng):
    picture = np.full((64, 64, 3), 90, np.uint8)
    picture[32:] = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    record = Record(name="x", hq=encode(picture))
    tops = {
        crops: [make_sample(record, rng, dataclasses.replace(CUT, crops=crops)).time_ids[2] for _ in range(60)]
        for crops in (1, 8)
    }
    assert min(tops[8]) >= 24 > min(tops[1])


def test_only_the_filters_named_enlarge(rng):
    hq, lq = coordinates(16, 16), coordinates(4, 4) * np.uint8(37)
    record = Record(name="x", hq=encode(hq), lq=(encode(lq),))
    config = dataclasses.replace(CUT, flip=False, upscaling=("bicubic",))
    expected = upscalings(lq, 16)[2]
    assert all(np.array_equal(make_sample(record, rng, config).lq, expected) for _ in range(20))


def test_levels_are_drawn_by_their_shares(rng, monkeypatch):
    met = Counter()

    def noted(image, rng, config):
        met[config] += 1
        return image[::4, ::4]

    monkeypatch.setattr(samples, "degrade", noted)
    record, count = Record(name="x", hq=encode(coordinates(16, 16))), 400
    for shares, others in (({"I": 0.25, "III": 0.5}, 0.25), ({"I": 0.5, "III": 0.5}, 0)):
        met.clear()
        config = dataclasses.replace(CUT, levels=shares)
        for _ in range(count):
            make_sample(record, rng, config)
        for degradation, share in ((LEVELS["I"], shares["I"]), (LEVELS["III"], shares["III"]), (IDENTITY, others)):
            assert abs(met[degradation] / count - share) < 0.1 * (share > 0) + 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": {"IV": 0.5}}, "levels has 'IV': must be of I, II, III"),
        ({"levels": {"I": 0.6, "II": 0.6}}, "must be shares from 0 to 1, together at most 1"),
        ({"levels": {"I": -0.5}}, "must be shares from 0 to 1"),
        ({"levels": {"I": math.nan}}, "must be shares from 0 to 1"),
        ({"crops": 0}, "crops is 0"),
        ({"upscaling": ()}, "must be one or more of nearest, bilinear, bicubic"),
        ({"upscaling": ("lanczos",)}, "must be one or more of nearest, bilinear, bicubic"),
    ],
)
def test_samples_that_cannot_be(changes, message):
    with pytest.raises((InputError, ValueError), match=message):
        SampleConfig(**changes)


def test_crops_of_a_pair_lie_at_the_same_place(rng):
    # Scattered values, or the three filters would round to the same pixels.
    hq, lq = coordinates(80, 96), coordinates(20, 24) * np.uint8(37)
    record = Record(name="x", hq=encode(hq), lq=(encode(lq),))
    modes, flips, places = Counter(), Counter(), set()
    for _ in range(200):
        sample = make_sample(record, rng, CUT)
        assert sample.time_ids.tolist()[:2] == [80, 96]
        assert sample.time_ids.tolist()[4:] == [16, 16]
        top, left = sample.time_ids[2:4].astype(int)
        assert top % 4 == left % 4 == 0
        places.add((top, left))
        flipped = int(np.array_equal(sample.hq, expected_crops(hq, sample.time_ids, 16)[1]))
        assert np.array_equal(sample.hq, expected_crops(hq, sample.time_ids, 16)[flipped])
        small = expected_crops(lq, sample.time_ids / 4, 4)[flipped]
        matches = [np.array_equal(sample.lq, wanted) for wanted in upscalings(small, 16)]
        assert sum(matches) == 1
        modes[matches.index(True)] += 1
        flips[flipped] += 1
    assert {place[0] for place in places} == set(range(0, 65, 4))
    assert {place[1] for place in places} == set(range(0, 81, 4))
    assert abs(flips[1] - 100) <= 4 * math.sqrt(200 / 4)
    assert all(abs(modes[mode] - 200 / 3) <= 4 * math.sqrt(200 * 2 / 9) for mode in range(3))


def test_the_degraded_crop_of_a_photograph_is_that_of_its_crop(rng):
    hq = coordinates(70, 91)
    record = Record(name="x", hq=encode(hq))
    for _ in range(50):
        sample = make_sample(record, rng, CUT)
        assert any(np.array_equal(sample.hq, crop) for crop in expected_crops(hq, sample.time_ids, 16))
        means = sample.hq.reshape(4, 4, 4, 4, 3).mean((1, 3)).round().astype(np.uint8)
        assert min(np.abs(sample.lq.astype(int) - wanted).max() for wanted in upscalings(means, 16)) <= 1
    top, left = np.array([make_sample(record, rng, CUT).time_ids[2:4] for _ in range(400)]).max(0)
    assert (top, left) == (70 - 16, 91 - 16)


def test_without_flips_and_dropout(rng):
    hq = coordinates(40, 40)
    record = Record(name="x", hq=encode(hq), caption="The image features a cat.")
    settings = SampleConfig(crop=16, flip=False, caption_dropout=0.0, degradation=IDENTITY)
    for _ in range(20):
        sample = make_sample(record, rng, settings)
        assert np.array_equal(sample.hq, expected_crops(hq, sample.time_ids, 16)[0])
        assert sample.caption == "A cat.."


def test_captions_are_dropped_as_often_as_stated(rng):
    record = Record(name="x", hq=encode(coordinates(16, 16)), caption="The image features a cat.")
    dropped = sum(make_sample(record, rng, CUT).caption == "" for _ in range(1000))
    assert abs(dropped - 200) <= 4 * math.sqrt(1000 * 0.2 * 0.8)


@pytest.mark.parametrize("shape", [(12, 40), (40, 8), (8, 12), (4, 4)])
def test_pictures_smaller_than_the_crop_are_continued_by_their_mirror_image(shape, rng):
    hq, lq = coordinates(*shape), coordinates(shape[0] // 4, shape[1] // 4)
    pair = Record(name="x", hq=encode(hq), lq=(encode(lq),))

    def padded(image, size):
        padding = [(0, max(0, size - side)) for side in image.shape[:2]]
        return np.pad(image, (*padding, (0, 0)), mode="reflect")

    for record in (pair, Record(name="x", hq=encode(hq))):
        sample = make_sample(record, rng, SampleConfig(crop=16, flip=False, degradation=IDENTITY))
        assert sample.time_ids.tolist()[:2] == list(shape)
        assert np.array_equal(sample.hq, expected_crops(padded(hq, 16), sample.time_ids, 16)[0])
        if record.lq:
            small = expected_crops(padded(lq, 4), sample.time_ids / 4, 4)[0]
            assert any(np.array_equal(sample.lq, wanted) for wanted in upscalings(small, 16))


def test_the_shorter_side_is_drawn_from_its_range(rng):
    photo = Record(name="x", hq=encode(coordinates(100, 150)))
    pair = Record(name="x", hq=encode(coordinates(120, 120)), lq=(encode(coordinates(30, 30)),))
    settings = SampleConfig(crop=16, degradation=IDENTITY)
    sizes = {tuple(make_sample(photo, rng, settings, (64, 96)).time_ids[:2]) for _ in range(200)}
    assert {height for height, _ in sizes} == set(range(64, 97, 4))
    assert all(abs(width - 1.5 * height) <= 2 and width % 4 == 0 for height, width in sizes)
    whole = SampleConfig(crop=64, flip=False, degradation=IDENTITY)
    sample = make_sample(pair, rng, whole, (64, 64))
    resized = [
        np.asarray(Image.fromarray(coordinates(side, side)).resize((target, target), Image.Resampling.BICUBIC))
        for side, target in ((120, 64), (30, 16))
    ]
    assert np.array_equal(sample.hq, resized[0])
    assert any(np.array_equal(sample.lq, wanted) for wanted in upscalings(resized[1], 64))


def test_one_of_several_lq_pictures_is_taken(rng):
    choices = tuple(encode(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200))
    record = Record(name="x", hq=encode(coordinates(16, 16)), lq=choices)
    taken = Counter(int(make_sample(record, rng, CUT).lq[0, 0, 0]) for _ in range(200))
    assert taken.keys() == {10, 200}
    assert abs(taken[10] - 100) <= 4 * math.sqrt(200 / 4)


def test_a_pair_that_does_not_fit_is_a_bad_record(rng):
    record = Record(name="a.png", hq=encode(coordinates(20, 20)), lq=(encode(coordinates(5, 4)),))
    with pytest.raises(InputError, match=r"LQ picture of a\.png: LQ 4x5, HQ 20x20"):
        make_sample(record, rng, CUT)
