"""Validation on a folder of photographs, with a tiny random model."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import skimage.data
from converted import loaded, published_and_converted
from pictures import write, write_caption
from PIL import Image

from faithdiff_jax.data.degradation.degrade import LEVELS, degrade
from faithdiff_jax.data.pairs import image_generator
from faithdiff_jax.errors import InputError
from faithdiff_jax.evaluation.metrics import METRICS, make_metric
from faithdiff_jax.files.sheets import GAP, LINE
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.inference import pipeline
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.sharding import make_mesh
from faithdiff_jax.training.config import VALIDATION_SCALE, ValidationConfig
from faithdiff_jax.training.validation import LARGEST_SIDE, Validation

CROP = 64
OPTIONS = {"count": 2, "crop": CROP}


def photograph(name: str, height=CROP, width=CROP) -> np.ndarray:
    return np.ascontiguousarray(getattr(skimage.data, name)()[100 : 100 + height, 100 : 100 + width])


@pytest.fixture
def photos(tmp_path):
    """Two photographs, a caption for one, and a third that the count leaves out and that cannot be read."""
    write(tmp_path / "a.png", photograph("astronaut"))
    write(tmp_path / "b.png", photograph("coffee", 70, 80))
    (tmp_path / "c.png").write_bytes(b"no picture")
    write_caption(tmp_path / "b.json", "The image features a cat. It sat. It slept.")
    return tmp_path


def tokenizers() -> Tokenizers:
    _, folder = published_and_converted()
    return Tokenizers.load([folder / "tokenizer", folder / "tokenizer_2"])


def validation(photos, mesh=None, restore=None, **options) -> Validation:
    how = RestoreOptions(**{"scale": VALIDATION_SCALE, "steps": 2, **(restore or {})})
    config = ValidationConfig(photos=photos and str(photos), restore=how, **{**OPTIONS, **options})
    return Validation(config, loaded().config, tokenizers(), dtype=np.float32, mesh=mesh)


def test_scores_are_those_of_restoring_each_picture(photos):
    model, hq = loaded(), photograph("astronaut")
    scores, picture = validation(photos, count=1).run(model.params)
    rng = image_generator(0, "a.png")
    lq = degrade(hq, rng, LEVELS["II"])
    noise = {part: rng.standard_normal((1, 8, 8, 4), np.float32) for part in ("start", "encode")}
    restored = model.restore(lq, "", scale=VALIDATION_SCALE, steps=2, guidance=5.0, noise=noise)
    assert scores.keys() == {"psnr", "ssim", "gmsd", "sharpness"}
    for name, score in scores.items():
        assert score == make_metric(name, "paper")(restored, hq)

    assert picture.shape == (CROP + LINE, 3 * CROP + 2 * GAP, 3)
    enlarged = np.array(Image.fromarray(lq).resize((CROP, CROP), Image.Resampling.BICUBIC))
    for place, shown in enumerate((enlarged, restored, hq)):
        left = place * (CROP + GAP)
        np.testing.assert_array_equal(picture[LINE:, left : left + CROP], shown)


def test_means_and_one_row_for_each_picture(photos, tmp_path):
    params = loaded().params
    both, picture = validation(photos).run(params)
    first, first_row = validation(photos, count=1).run(params)
    (photos / "a.png").unlink()
    second, second_row = validation(photos, count=1).run(params)
    for name, score in both.items():
        assert score == pytest.approx((first[name] + second[name]) / 2)
    height = CROP + LINE
    assert picture.shape == (2 * height + GAP, 3 * CROP + 2 * GAP, 3)
    np.testing.assert_array_equal(picture[:height], first_row)
    np.testing.assert_array_equal(picture[height + GAP :], second_row)  # whatever lies before it in the folder


def test_real_pictures_are_measured_without_reference(photos, tmp_path, monkeypatch):
    """Two folders of them beside the photographs; the same file is restored with the same noise in each."""
    monkeypatch.setattr("faithdiff_jax.evaluation.metrics.niqe.BLOCK", 32)
    for folder in ("phones", "scans"):
        write(tmp_path / folder / "low.png", photograph("chelsea", 16, 20))
    (photos / "c.png").unlink()
    real = (str(tmp_path / "phones"), str(tmp_path / "scans"))
    metrics, params = ("psnr", "niqe"), loaded().params
    monkeypatch.setitem(METRICS, "niqe", dataclasses.replace(METRICS["niqe"], smallest_side=64))
    scores, picture = validation(photos, real=real, metrics=metrics, count=1).run(params)
    assert scores.keys() == {"psnr", "niqe", "phones/niqe", "scans/niqe"}
    assert scores["phones/niqe"] == scores["scans/niqe"] != scores["niqe"]
    height = CROP + LINE
    assert picture.shape == (3 * height + 2 * GAP, 3 * CROP + 2 * GAP, 3)

    alone, row = validation(None, real=real[1:], metrics=metrics, count=1).run(params)
    assert alone == {"scans/niqe": scores["scans/niqe"]}
    low = np.ascontiguousarray(photograph("chelsea", 16, 20)[:, 2:18])
    noise = validation(None, real=real[1:], metrics=metrics)._cases[0].noise
    restored = loaded().restore(low, "", scale=VALIDATION_SCALE, steps=2, noise=noise)
    assert scores["scans/niqe"] == make_metric("niqe")(restored)
    np.testing.assert_array_equal(row[LINE:, CROP + GAP :], restored)
    np.testing.assert_array_equal(picture[2 * (height + GAP) + LINE :, CROP + GAP : 2 * CROP + GAP], restored)


@pytest.mark.parametrize(("options", "message"), [
    ({"metrics": ("psnr", "psnrr")}, "no metric 'psnrr'; did you mean psnr"),
    ({"metrics": ("niqe",)}, r"validation\.metrics: pictures of 64x64 pixels are too small"),
    ({"metrics": ("fid",)}, r"validation\.metrics: fid compares folders"),
    ({"protocol": "papr"}, r"validation\.protocol: no protocol 'papr'; did you mean paper\?"),
    ({"real": ("no/such",)}, "no/such: no such folder"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_once(photos, options, message):
    with pytest.raises(InputError, match=message):
        validation(photos, **options)


def test_folders_of_one_name_are_refused(photos, tmp_path):
    for folder in ("one/low", "two/low"):
        write(tmp_path / folder / "a.png", photograph("chelsea", 20, 20))
    with pytest.raises(InputError, match=r"validation\.real: two folders are called low"):
        validation(None, real=(str(tmp_path / "one/low"), str(tmp_path / "two/low")))
    write(tmp_path / "one/low/a.png", photograph("chelsea", 15, 20))
    with pytest.raises(InputError, match=r"validation\.real: \S*a\.png: 20x15 pixels, each side must have at least 16"):
        validation(None, real=(str(tmp_path / "one/low"),))
    with pytest.raises(ValueError, match="photos is missing: a validation needs photos or real"):
        ValidationConfig()


def test_every_run_is_the_same_but_for_the_parameters(photos):
    checks, params = validation(photos), loaded().params
    once, again = checks.run(params), checks.run(params)
    assert once[0] == again[0]
    np.testing.assert_array_equal(once[1], again[1])
    assert validation(photos).run(params)[0] == once[0]

    moved = dict(params) | {"unet": jax.tree.map(lambda x: 1.1 * x, params["unet"])}
    assert checks.run(moved)[0] != once[0]
    for change in ({"seed": 1}, {"level": "III"}, {"restore": {"guidance": 1.0}}):
        assert validation(photos, **change).run(params)[0] != once[0]


def test_nothing_compiles_again_and_no_parameters_are_kept(photos, caplog):
    checks = validation(photos)
    programs = checks._model.programs
    sizes = {name: program.shapes_kept for name, program in vars(programs).items()}
    compiled = []
    with caplog.at_level("INFO", logger="faithdiff_jax"):
        for scale in (1.0, 1.1, 1.2):
            params = jax.tree.map(lambda x, scale=scale: scale * x, loaded().params)
            checks.run(params)
            compiled.append({name: program.shapes_kept for name, program in vars(programs).items()})
            del params
            assert checks._model.params == {}
    assert compiled[0] == compiled[1] == compiled[2]
    assert all(compiled[0][name] - sizes[name] <= 1 for name in sizes)  # one size of picture, one program
    assert len(caplog.messages) == len(set(caplog.messages))  # and it is said once
    assert validation(photos)._model.programs is programs  # another run of the same architecture has them too
    assert pipeline._programs.cache_info().currsize >= 1


def test_captions_are_used(photos):
    params = loaded().params
    checks = validation(photos)
    assert [case.caption for case in checks._cases] == ["", "A cat. It sat."]  # trimmed as in training
    with_caption = checks.run(params)[0]
    (photos / "b.json").write_text(json.dumps({"caption": ""}))
    assert validation(photos).run(params)[0] != with_caption


def test_a_mesh_changes_nothing(photos):
    mesh = make_mesh(data=2, fsdp=4)
    model = pipeline.FaithDiff.load(published_and_converted()[1], mesh=mesh)
    scores, picture = validation(photos, mesh=mesh, count=1).run(model.params)
    expected, _ = validation(photos, count=1).run(loaded().params)
    assert scores == pytest.approx(expected, rel=1e-3)
    assert isinstance(picture, np.ndarray)


def test_a_huge_picture_is_scaled_down(photos, monkeypatch):
    monkeypatch.setattr("faithdiff_jax.training.validation.LARGEST_SIDE", 100)
    assert LARGEST_SIDE > 100
    _, picture = validation(photos).run(loaded().params)
    assert max(picture.shape) == 100


def test_what_cannot_be_validated_is_refused_at_once(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, options, message in (
        (tmp_path / "nowhere", {}, "nowhere: no such folder"),
        (tmp_path / "empty", {}, "empty: no pictures"),
        (photos, {"count": 3}, r"validation.photos: \S*/c.png: not a picture"),
        (photos, {"crop": 72}, r"validation.photos: \S*/a.png: 64x64 pixels, each side must have at least 72"),
        (photos, {"crop": 60}, "validation.crop is 60: must be a multiple of 8, and at least 32"),
        (photos, {"crop": 24}, "validation.crop is 24: must be a multiple of 8, and at least 32"),
        (photos, {"restore": {"steps": 1001}}, "validation.restore: steps is 1001: must be between 1 and 1000"),
    ):
        with pytest.raises(InputError, match=message):
            validation(folder, **options)


def test_the_published_architecture_takes_the_default_crop(photos):
    """Nothing of the model is made before the photographs are found to be too small."""
    with pytest.raises(InputError, match="each side must have at least 512"):
        Validation(ValidationConfig(photos=str(photos)), FaithDiffConfig(), tokenizers(), dtype=np.float32, mesh=None)
