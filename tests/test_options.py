"""The options of a restoration: ranges, replacements, what a model allows, defaults, and nonsense."""

import dataclasses
import math
import typing
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig

FIELDS = dataclasses.fields(RestoreOptions)
NUMBERS = [field for field in FIELDS if field.metadata["about"].kind in (int, float)]


def test_every_option_says_what_it_is():
    hints = typing.get_type_hints(RestoreOptions)
    for field in FIELDS:
        about = field.metadata["about"]
        assert hints[field.name] in (about.kind, about.kind | None)
        assert about.help
        assert about.kind in (str, bool) or math.isfinite(about.within.high)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_have_closed_ranges(field):
    about = field.metadata["about"]
    low, high = about.within.low, about.within.high
    for value in (1e-300 if about.within.above else about.kind(low), about.kind(high)):
        assert getattr(RestoreOptions(**{field.name: value}), field.name) == value
    outside = math.nextafter(low, -math.inf) if about.kind is float else int(low) - 1
    beyond = math.nextafter(high, math.inf) if about.kind is float else int(high) + 1
    below = 0.0 if about.within.above else outside
    for value in (below, beyond, math.nan, math.inf, -math.inf, True, "1", None if field.default is not None else b"1"):
        with pytest.raises(InputError, match=f"^{field.name} is .*: must be (a whole number )?(above|from) "):
            RestoreOptions(**{field.name: value})


def test_numbers_of_other_libraries_become_plain_ones():
    options = RestoreOptions(steps=np.int64(3), scale=np.float32(1.5), guidance=2, overlap=Fraction(1, 2))
    assert (options.steps, options.scale, options.guidance, options.overlap) == (3, 1.5, 2.0, 0.5)
    assert [type(value) for value in (options.steps, options.scale, options.guidance)] == [int, float, float]
    assert hash(options) == hash(RestoreOptions(steps=3, scale=1.5, guidance=2.0))


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as caught:
        RestoreOptions(steps=0, guidance=math.nan, sampler="plms", negative_caption="\ud800")
    assert str(caught.value).split("; ") == [
        "steps is 0: must be a whole number from 1 to 100000",
        "guidance is nan: must be from 0 to 100",
        "sampler is 'plms': must be one of euler, ddpm, dpmpp_2m, unipc",
        "negative_caption is '\\ud800': must be text",
    ]


def test_replacements():
    options = RestoreOptions(steps=7).replace(guidance=1)
    assert (options.steps, options.guidance) == (7, 1.0)
    with pytest.raises(InputError, match=r"^unknown option stepz, tiles \(known: scale, progressive, steps, "):
        options.replace(stepz=1, tiles=2)


def test_what_a_model_allows():
    config = FaithDiffConfig()
    RestoreOptions(steps=1000, tile=4, multiple=64, vae_tile=96).check_against(config)
    with pytest.raises(InputError) as caught:
        RestoreOptions(steps=1001, tile=3, multiple=12, vae_tile=100).check_against(config)
    assert str(caught.value).split("; ") == [
        "steps is 1001: must be between 1 and 1000 for this model",
        "tile is 3 latent pixels: must be at least 4 for this model",
        "vae_tile is 100: must be a multiple of 32 for this model",
        "multiple is 12: must be a multiple of 8 for this model",
    ]


def test_sizes():
    config = FaithDiffConfig()
    assert RestoreOptions().padded_size(config, 43, 51) == (88, 104)
    assert RestoreOptions(scale=1.5, multiple=64).padded_size(config, 43, 51) == (64, 128)
    assert RestoreOptions(scale=32).padded_size(config, 512, 512) == (16384, 16384)
    with pytest.raises(InputError, match=r"^scale is 32: turns 600x512 into 19200x16384 pixels, at most 268,435,456 "):
        RestoreOptions(scale=32).padded_size(config, 512, 600)
    for (height, width), multiple, scale in (
        ((512, 600), None, 29.54),
        ((512, 600), 256, 29.44),
        ((4096, 9000), None, 2.69),
    ):
        options = RestoreOptions(scale=32, multiple=multiple)
        with pytest.raises(InputError, match=rf"^scale is 32: .* are restored; a scale of {scale} fits$"):
            options.padded_size(config, height, width)
        options.replace(scale=scale).padded_size(config, height, width)
    with pytest.raises(InputError, match=r"^tile is 16 and overlap 0.5: cut 2048x2048 latent pixels into 65,025 tiles"):
        RestoreOptions(scale=32, tile=16).padded_size(config, 512, 512)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=3),
    st.complex_numbers(), st.just(10**6000), st.just(-(2**63)), st.lists(st.integers(), max_size=2), st.fractions(),
    st.decimals(), st.sampled_from(["euler", "ddpm", "lr", "noise", "adain", "wavelet", "none"]), st.builds(object),
    st.just(np.float32("nan")), st.just(np.zeros((3, 3))), st.just(float),
)  # fmt: skip
NAMES = st.sampled_from([field.name for field in FIELDS])


@settings(max_examples=200)
@given(st.dictionaries(NAMES, ANYTHING))
def test_nonsense_is_an_input_error_or_a_valid_option(values):
    try:
        options = RestoreOptions(**values)
        hash(options)
        options.check_against(FaithDiffConfig())
        options.padded_size(FaithDiffConfig(), 100, 100)
        message = None
    except InputError as error:
        message = str(error)
    if message is not None:
        assert "\n" not in message
        assert len(message) < 200 * (len(values) + 1)
        assert any(name in message for name in values)
