"""Distillation as a run: the command, resuming, the exported model's own defaults, and what is refused."""

import copy

import numpy as np
import pytest
from pictures import coordinates
from training_runs import assert_same_bits, kept_programs, losses, place, saved, stop_at, train

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.weights.model_directory import ModelDirectory

FROZEN = ["vae.*", "text_encoder*", "lq_encoder.*", "unet.*", "alignment.[cb]*"]
# Of the aligner's last layer the teacher has its own copy; the UNet's kernels are both's.
STEPS = {
    "steps": 4,
    "batch": 4,
    "noise_offset": 0,
    "groups": {"last": {"parameters": ["alignment.spatial_ch_projs.*"], "learning_rate": 1e-2}},
    "frozen": FROZEN,
    "lora": {"parameters": ["unet.mid_block.attentions.*.to_q.kernel"], "rank": 2},
    "model": {"schedule": {"spacing": "trailing"}},
    "distill": {"method": "steps", "steps": 1, "teacher_steps": 2, "guidance": 3},
}
GUIDED = {"method": "guidance", "guidance": 3, "guidance_range": [1, 6]}
# The weight's projection is all that trains.
GUIDANCE = STEPS | {
    "steps": 2,
    "groups": {"weight": {"parameters": ["unet.time_embedding.cond_proj.kernel"], "learning_rate": 1e-1}},
    "frozen": ["vae.*", "text_encoder*", "lq_encoder.*", "alignment.*", "unet.[cdmu]*", "unet.*.linear_*"],
    "lora": None,
    "model": {"unet": {"guidance_dim": 8}},
    "distill": GUIDED,
}


@pytest.fixture(scope="module", autouse=True)
def _programs(tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run of four steps that was stopped after two and resumed."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    command = place().command(folder, STEPS)
    assert train(command, devices=1, change=stop_at(2)) == 130
    assert train(command, devices=1) == 0
    return folder


def test_a_run_resumes_bit_for_bit(student, tmp_path):
    assert train(place().command(tmp_path / "run", STEPS), devices=1) == 0
    assert_same_bits(saved(student), saved(tmp_path / "run"))
    assert losses(student) == losses(tmp_path / "run")


def test_the_exported_student_restores_with_its_own_defaults(student, tmp_path):
    assert run_command("convert", ["--run", str(student), "--output", str(tmp_path / "model")]) == 0
    stored = ModelDirectory.open(tmp_path / "model")
    assert stored.defaults == {"steps": 1, "guidance": 1.0, "guidance_rescale": 0.0, "start": "lr"}
    assert stored.config.schedule.spacing == "trailing"
    model = FaithDiff.load(stored)
    picture = coordinates(8, 8)
    plain = model.restore(picture)
    assert np.array_equal(plain, model.restore(picture, steps=1, guidance=1.0, start="lr"))
    assert not np.array_equal(plain, model.restore(picture, steps=2, guidance=1.0, start="lr"))


def test_a_student_that_is_fed_the_weight_needs_no_second_evaluation(tmp_path):
    run = tmp_path / "run"
    assert train(place().command(run, GUIDANCE), devices=1) == 0
    assert run_command("convert", ["--run", str(run), "--output", str(tmp_path / "model")]) == 0
    before = ModelDirectory.open(place().model)
    stored = ModelDirectory.open(tmp_path / "model")
    assert stored.defaults == {"steps": 20, "guidance": 3.0, "guidance_rescale": 0.0, "start": "lr"}
    new = dict(stored.arrays("unet")).keys() - dict(before.arrays("unet")).keys()
    assert new == {"time_embedding.cond_proj.kernel"}
    model = FaithDiff.load(stored)
    model.defaults = model.defaults.replace(steps=1)
    context, pooled = model.encode_text(["cat"])
    arrays = model.encode_lq(np.zeros((1, 16, 16, 3), np.float32)), context, pooled
    noise = np.ones((1, 8, 8, 4), np.float32)
    # No negative caption is asked for, at any weight, and the weight tells.
    low, high = (np.asarray(model.sample(*arrays, None, None, noise, guidance=weight)) for weight in (1.5, 6.0))
    assert np.abs(low - high).max() > 1e-5


REFUSED = {
    "distill.method is 'teach': must be one of guidance, steps": {"distill.method": "teach"},
    "distill.steps is 0: must be a whole number": {"distill.steps": 0},
    "distill.guidance is nan: must be": {"distill.guidance": float("nan")},
    "guidance_range is for method guidance": {"distill.guidance_range": [1, 2]},
    "guidance_range is [3, 2]: must be two rising numbers": {
        "distill": {"method": "guidance", "guidance_range": [3, 2]}
    },
    "guidance is 9: must be in guidance_range, 1 to 8": {
        "distill": {"method": "guidance", "guidance": 9, "guidance_range": [1, 8]}
    },
    "distill.guidance_range and model.unet.guidance_dim go together": {"distill": GUIDED},
    "noise_offset is 0.02: must be 0": {"noise_offset": 0.02},
    "UNet and aligner alone may": {
        "groups": {"all": {"parameters": ["alignment.*", "lq_encoder.*"], "learning_rate": 1e-3}},
        "frozen": ["vae.*", "text_encoder*", "unet.*"],
    },
    "fresh has alignment": {"fresh": ["alignment"]},
    "model changes more than": {"model": {"schedule": {"beta_end": 0.5}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_distilled_is_one_line(message, tmp_path, capsys):
    changes = copy.deepcopy(STEPS | REFUSED[message])
    assert train(place().command(tmp_path / "run", changes), devices=1) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
