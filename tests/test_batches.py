"""Several pictures at once: each is what it is alone, whatever is restored beside it."""

import dataclasses
from typing import Any

import jax
import pytest
from converted import loaded, published_and_converted
from test_pipeline import levels_apart, photograph

from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.inputs import plan_and_complete
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.programs import Programs
from faithdiff_jax.inference.restoration import Request, pictures_together, restore_all
from faithdiff_jax.sharding import make_mesh

SIZES = ((20, 27), (32, 30), (40, 20), (17, 32))  # the third is padded to another size
CAPTIONS = ("the cat", "", "a cat sat", "the the")
SEEDS = (1, 2, 3, 4)
STAGES = ("encode_lq", "moments", "encode_text", "decode")


def placed_batches(monkeypatch: pytest.MonkeyPatch, programs: Programs, name: str) -> list[tuple[int, int]]:
    """Of what a program gives from now on, how many pictures there are and how many of them each device has."""
    program, seen = getattr(programs, name), []

    def spied(*arguments: Any) -> Any:
        given = program(*arguments)
        first = jax.tree.leaves(given)[0]
        seen.append((first.shape[0], first.sharding.shard_shape(first.shape)[0]))
        return given

    monkeypatch.setattr(programs, name, spied)
    return seen


@pytest.mark.parametrize(
    "given",
    [{"batch": 4}, {"batch": 8, "tile": 6}, {"batch": 4, "sampler": "ddpm", "start": "noise"}],
    ids=str,
)
def test_a_picture_is_the_same_alone_and_in_a_batch(given):
    model, pictures = loaded(), [photograph(*size) for size in SIZES]
    options = {"steps": 2, "multiple": 64, "scale": 2, "color_fix": "none", **given}
    together = model.restore(pictures, CAPTIONS, seeds=SEEDS, **options)
    assert [picture.shape for picture in together] == [(2 * height, 2 * width, 3) for height, width in SIZES]
    for picture, caption, seed, restored in zip(pictures, CAPTIONS, SEEDS, together, strict=True):
        largest, share = levels_apart(restored, model.restore(picture, caption, seed=seed, **options))
        assert largest <= 1  # of 255: another program rounds otherwise
        assert share < 0.01
    assert levels_apart(together[0], model.restore(pictures[0], CAPTIONS[0], seed=2, **options))[0] > 1


def test_a_batch_on_eight_devices(monkeypatch):
    pictures = [photograph(*size) for size in SIZES]
    options = {"steps": 2, "multiple": 64, "batch": 4, "scale": 2, "sampler": "ddpm", "color_fix": "none"}
    spread = FaithDiff.load(published_and_converted()[1], mesh=make_mesh(data=4, fsdp=2))
    seen = {name: placed_batches(monkeypatch, spread.programs, name) for name in STAGES}
    together = spread.restore(pictures, CAPTIONS, seeds=SEEDS, **options)
    for i, restored in enumerate(together):
        alone = loaded().restore(pictures[i], CAPTIONS[i], seed=SEEDS[i], **options)
        largest, share = levels_apart(restored, alone)
        assert largest <= 1
        assert share < 0.01
    for name in STAGES:
        each = 2 if name == "encode_text" else 1  # caption and negative caption, which two devices or eight share
        assert set(seen[name]) == {(4 * each, 1), (each, 1)}, name  # three pictures and one


def test_how_many_pictures_go_together():
    config = loaded().config
    options = RestoreOptions(tile=64, batch=8)
    assert pictures_together(options, config, (512, 512)) == 8
    assert pictures_together(options, config, (512, 768)) == 4  # two tiles each
    assert pictures_together(options, config, (2048, 2048)) == 1
    mixing = dataclasses.replace(config, alignment=dataclasses.replace(config.alignment, mixing="batch"))
    assert pictures_together(options, mixing, (512, 512)) == 1


def test_three_pictures_fill_a_batch_of_four_and_each_has_its_own_size(monkeypatch):
    model, seen = loaded(), []

    def complete(inputs, options, config, sizes):
        plan, complete = plan_and_complete(inputs, options, config, sizes)
        seen.append((inputs.noise.shape[0], plan.tile_batch, complete.time_ids[0, :, :2].tolist()))
        return plan, complete

    monkeypatch.setattr("faithdiff_jax.inference.inputs.plan_and_complete", complete)
    requests = [Request(image=photograph(*size)) for size in (SIZES[0], SIZES[1], SIZES[3])]
    restored = restore_all(model, requests, RestoreOptions(steps=2, multiple=64, batch=4, color_fix="none"))
    assert seen == [(4, 1, [[40, 56], [64, 64], [40, 64], [40, 64]])]
    assert all(set(one.seconds) == {"encode", "denoise", "decode"} for one in restored)


@pytest.mark.parametrize(
    ("captions", "given", "message"),
    [
        (["a"], {}, r"^1 captions, 2 seeds: must be as many as pictures, 2$"),
        ("", {"seeds": [1, 2, 3]}, r"^2 captions, 3 seeds: must be as many as pictures, 2$"),
        ("", {"seeds": [1, -1]}, "seed is -1: must be a whole number from 0"),
        ("", {"noise": {}}, "noise or on_step is given: must be for one picture"),
        ("", {"batch": 0}, "batch is 0: must be a whole number from 1 to 1024"),
    ],
)
def test_lists_that_do_not_fit_are_refused(captions, given, message):
    with pytest.raises(InputError, match=message):
        loaded().restore([photograph(16, 16)] * 2, captions, **given)
    with pytest.raises(InputError, match="seeds is a list: must be None for one picture"):
        loaded().restore(photograph(16, 16), "a", seeds=[1])


def test_no_pictures_are_no_pictures():
    assert loaded().restore([]) == []
