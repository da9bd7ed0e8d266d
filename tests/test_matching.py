"""Restored pictures and references are paired by name: as methods write them, and never two ways at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.matching import match_names

REFERENCES = ["0801.png", "0802.png", "0810.png"]


def stems(*endings):
    return [f"{name.removesuffix('.png')}{ending}" for name, ending in zip(REFERENCES, endings, strict=True)]


@pytest.mark.parametrize(
    "ending",
    [
        ".png", ".jpg", "x4.png", "_x4.webp", "_out.png", "x4_out.png", "_SR.png", "_0.png", "_rlt.png", "-output.tif",
        "_RealESRGAN_x4plus.png", "_StableSR-v2.png", " restored.png",
    ],
)  # fmt: skip
def test_names_as_methods_write_them(ending):
    found = match_names(stems(ending, ending, ending), REFERENCES)
    assert found.pairs == dict(zip(REFERENCES, stems(ending, ending, ending), strict=True))
    assert not found.doubt
    assert not found.ours_left
    assert not found.theirs_left


def test_both_sides_may_have_endings():
    """RealSR's and DRealSR's own names."""
    found = match_names(["Canon_001_LR4.png", "Canon_002_LR4.png"], ["Canon_001_HR.png", "Canon_002_HR.png"])
    assert found.pairs["Canon_002_HR.png"] == "Canon_002_LR4.png"
    found = match_names(["DSC_1412_x4_out.png", "DSC_1599_x4_out.png"], ["DSC_1412_x1.png", "DSC_1599_x1.png"])
    assert found.pairs["DSC_1412_x1.png"] == "DSC_1412_x4_out.png"
    assert found.rule == ("_x4_out", "_x1")


def test_leftovers_of_both_sides_are_named():
    found = match_names(["0801.png", "grid.png"], REFERENCES)
    assert found.pairs == {"0801.png": "0801.png"}
    assert found.ours_left == ["grid.png"]
    assert found.theirs_left == ["0802.png", "0810.png"]


def test_numbers_are_not_prefixes():
    assert match_names(["10.png", "1.png"], ["1.png", "10.png"]).pairs == {"1.png": "1.png", "10.png": "10.png"}
    assert not match_names(["08010.png"], REFERENCES).pairs


def test_a_method_that_numbers_its_results_is_not_taken_for_another_picture():
    """img_0 is also the name of a picture: only the whole folder says what _0 means."""
    found = match_names(["img_0.png", "img_0_0.png"], ["img.png", "img_0.png"])
    assert found.pairs == {"img.png": "img_0.png", "img_0.png": "img_0_0.png"}


def test_what_can_be_read_in_two_ways_is_not_paired():
    found = match_names(["img_0.png"], ["img.png", "img_0.png"])
    assert not found.pairs
    assert "names can be read in 2 ways" in found.doubt
    assert found.ours_left == ["img_0.png"]
    assert match_names(["img_0.png"], ["img.png", "img_0.png"], "_0").pairs == {"img.png": "img_0.png"}
    assert match_names(["img_0.png"], ["img.png", "img_0.png"], "").pairs == {"img_0.png": "img_0.png"}


def test_names_that_are_there_as_they_are_go_before_other_versions():
    found = match_names(["a.png", "b.png", "a_0.png", "b_0.png"], ["a.png", "b.png"])
    assert found.pairs == {"a.png": "a.png", "b.png": "b.png"}
    assert found.ours_left == ["a_0.png", "b_0.png"]


def test_a_word_that_is_not_an_ending_makes_no_pair():
    assert not match_names(["dog_park.png"], ["dog.png"]).pairs


def test_files_that_share_a_name_are_left_out():
    found = match_names(["a.png", "a.jpg", "b.png"], ["a.png", "b.png"])
    assert found.pairs == {"b.png": "b.png"}
    assert found.ours_left == ["a.jpg", "a.png"]
    assert found.theirs_left == ["a.png"]


def test_one_letter_in_two_spellings_of_unicode_is_one():
    assert match_names(["cafe\u0301.png"], ["caf\u00e9.png"]).pairs == {"caf\u00e9.png": "cafe\u0301.png"}


def test_an_ending_that_nothing_has_is_refused():
    with pytest.raises(InputError, match="ending '_x': no picture's name ends in it"):
        match_names(["a.png"], ["a.png"], "_x")


PART = st.sampled_from(["a", "b", "1", "10", "_0", "_1", "x4", "_out", "_HR", "_LR4", " ", ".", "é", "\ud800", "_x2"])
NAME = st.lists(PART, min_size=1, max_size=5).map("".join).map(lambda stem: f"{stem}.png")
NAMES = st.lists(NAME, max_size=8, unique=True)


@given(NAMES, NAMES)
def test_nonsense_is_paired_once_each_by_one_rule(ours, theirs):
    found = match_names(ours, theirs)
    assert len(set(found.pairs.values())) == len(found.pairs)
    assert sorted([*found.pairs.values(), *found.ours_left]) == sorted(set(ours))
    assert sorted([*found.pairs, *found.theirs_left]) == sorted(set(theirs))
    behind, others = found.rule
    for reference, restored in found.pairs.items():
        left, right = (name.removesuffix(".png") for name in (restored, reference))
        assert left.endswith(behind)
        assert right.endswith(others)
        assert left[: len(left) - len(behind)] == right[: len(right) - len(others)]


@given(st.lists(NAME, min_size=1, max_size=8, unique=True), st.sampled_from(["", "_out", "x4", "x4_out", "_0"]))
def test_a_complete_folder_is_paired_rightly_or_not_at_all(theirs, ending):
    """Whatever the pictures are called: one that gets a partner gets its own."""
    ours = {f"{name.removesuffix('.png')}{ending}.png": name for name in theirs}
    for reference, restored in match_names(ours, theirs).pairs.items():
        assert ours[restored] == reference
