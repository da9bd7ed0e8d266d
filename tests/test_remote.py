"""Paths of an object store: everything a run reads and writes, on a stand-in that the real clients talk to."""

import sys
from pathlib import Path

import gcs
import pytest
from training_runs import STAGE_1, assert_same_bits, main, place, saved, stop_at, train, write_config

pytest.importorskip("gcsfs")  # the extra `gcs`
pytest.importorskip("google.cloud.storage")

import fsspec

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.shards import ShardSource
from faithdiff_jax.data.sources import PhotoFolder
from faithdiff_jax.errors import InputError
from faithdiff_jax.files import places
from faithdiff_jax.training.saved_checkpoints import saved_steps
from faithdiff_jax.weights.model_directory import ModelDirectory

BUCKET = f"gs://{gcs.BUCKET}"
CHANGES = STAGE_1 | {"checkpoint": {"every": 2, "latest": 1}, "watch": {"every": 1, "tensorboard": True}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The bucket, with a model and shards in it; the clients keep the address they first had."""
    with gcs.served() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment(store).items():
            patch.setenv(name, value)
        patch.setattr("faithdiff_jax.weights.remote.CACHE", str(tmp_path_factory.mktemp("cache")))
        for file in place().model.rglob("*"):
            if file.is_file():
                store.put((gcs.BUCKET, f"model/{file.relative_to(place().model).as_posix()}"), file.read_bytes())
        yield store
        fsspec.filesystem("gcs").clear_instance_cache()


@pytest.fixture(autouse=True)
def no_listings_kept():
    fsspec.filesystem("gcs").invalidate_cache()


@pytest.fixture(scope="module")
def shards(store, tmp_path_factory):
    """The photographs, packed here and there; and what one command says of each."""
    here = tmp_path_factory.mktemp("shards")
    for output in (here, f"{BUCKET}/shards"):
        flags = ["--photos", str(place().photos), "--output", str(output), "--records-per-shard", "4"]
        assert run_command("shards", flags) == 0
    return here


def command(folder: Path, output: object, shards: object, model: object, **changes) -> list[str]:
    config = write_config(folder / "run.yaml", CHANGES | {"data.sources": [{"shards": str(shards)}]} | changes)
    return ["--config", str(config), "--model", str(model), "--output", str(output)]


def test_shards_are_written_to_and_read_from_a_bucket(store, shards):
    names = sorted(path.name for path in shards.iterdir())
    assert [name.removeprefix("shards/") for name in store.names("shards/")] == names
    for name in names:
        assert store.objects[gcs.BUCKET, f"shards/{name}"] == (shards / name).read_bytes()
    here, there = ShardSource(shards), ShardSource(f"{BUCKET}/shards")
    assert len(there) == len(here) == 11
    assert (there[7].hq, there[7].caption) == (here[7].hq, here[7].caption)
    assert there.fingerprint() == here.fingerprint()
    key = gcs.BUCKET, "shards/shard-00001-of-00003.arrayrecord"
    whole = store.objects[key]
    store.put(key, whole[:-100])
    fsspec.filesystem("gcs").invalidate_cache()
    with pytest.raises(InputError, match=r"gs://bucket/shards/shard-00001-of-00003\.arrayrecord: .* cut short"):
        ShardSource(f"{BUCKET}/shards")
    store.put(key, whole)


def test_a_run_in_a_bucket_is_stopped_resumed_and_exported_like_one_of_this_machine(store, shards, tmp_path, capsys):
    validation = {"photos": str(place().photos), "every": 4, "count": 1, "crop": 32, "restore": {"steps": 1}}
    here = tmp_path / "run"
    assert train(command(tmp_path, here, shards, place().model, validation=validation), devices=1) == 0
    there = command(tmp_path, f"{BUCKET}/runs/a", f"{BUCKET}/shards", f"{BUCKET}/model", validation=validation)
    assert train(there, devices=1, change=stop_at(3)) == 130
    # What a save that was cut short leaves: no word that it is whole.
    store.put((gcs.BUCKET, "runs/a/checkpoints/4/state/d/part"), b"half")
    fsspec.filesystem("gcs").invalidate_cache()
    assert train([*there, "--resume", "must"], devices=1) == 0, capsys.readouterr().err
    run = places.place(f"{BUCKET}/runs/a")
    assert saved_steps(run / "checkpoints") == saved_steps(here / "checkpoints") == [4]
    assert_same_bits(saved(run, 4), saved(here, 4))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [line.count('"loss"') for line in lines].count(1) == 4
    kinds = {name.split("/")[2] for name in store.names("runs/a/")}
    assert kinds == {"config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "validation"}
    assert store.objects[gcs.BUCKET, "runs/a/validation/00000004.png"].startswith(b"\x89PNG")

    for source, target in ((run, "there"), (here, "here")):
        assert run_command("convert", ["--run", str(source), "--output", str(tmp_path / target)]) == 0
    ours, theirs = (ModelDirectory.open(tmp_path / name) for name in ("there", "here"))
    for part in ("alignment", "unet"):
        assert_same_bits(dict(ours.arrays(part)), dict(theirs.arrays(part)))

    name = next(name for name in store.names("runs/a/checkpoints/4/state") if "/d/" in name)
    data = bytearray(store.objects[gcs.BUCKET, name])
    data[len(data) // 2] ^= 1
    store.put((gcs.BUCKET, name), bytes(data))
    fsspec.filesystem("gcs").invalidate_cache()
    assert run_command("convert", ["--run", str(run), "--output", str(tmp_path / "damaged")]) == 2
    assert "is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


def test_a_model_is_fetched_once_and_checked(store, tmp_path, monkeypatch):
    monkeypatch.setattr("faithdiff_jax.weights.remote.CACHE", str(tmp_path))
    model = ModelDirectory.open(f"{BUCKET}/model")
    assert model.path.parent == tmp_path / "models"
    assert str(model.source) == f"{BUCKET}/model"
    assert_same_bits(dict(model.arrays("unet")), dict(ModelDirectory.open(place().model).arrays("unet")))
    key = gcs.BUCKET, "model/unet.safetensors"
    whole = store.objects[key]
    store.put(key, bytes(len(whole)))
    ModelDirectory.open(f"{BUCKET}/model")  # the copy is still what it was
    monkeypatch.setattr("faithdiff_jax.weights.remote.CACHE", str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"unet\.safetensors"):
        ModelDirectory.open(f"{BUCKET}/model")
    assert not list((tmp_path / "other" / "models").iterdir())
    store.put(key, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "gs://none/run"}, "gs://none: no such file, or no such bucket"),
        ({"model": "gs://none/model"}, "gs://none: no such file, or no such bucket"),
        ({"model": f"{BUCKET}/other"}, f"{BUCKET}/other: no such model directory"),
        ({"shards": f"{BUCKET}/other"}, f"{BUCKET}/other: no shards.json there"),
        ({"shards": "gs://none/shards"}, "gs://none: no such file, or no such bucket"),
        ({"output": "s3://bucket/run"}, "s3://bucket/run: of remote paths only gs://BUCKET/NAME is supported"),
        ({"output": "gs://"}, "gs://: of remote paths only gs://BUCKET/NAME is supported"),
    ],
)
def test_what_cannot_be_reached_is_one_line(store, shards, tmp_path, capsys, changes, message):
    given = {"output": tmp_path / "run", "shards": shards, "model": place().model} | changes
    assert main(command(tmp_path, **given)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert not (tmp_path / "run").exists()


def test_packages_that_are_missing_are_named(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        InputError, match=r'gs://bucket/model: needs the package gcsfs: pip install "faithdiff-jax\[gcs\]"'
    ):
        ModelDirectory.open(f"{BUCKET}/model")


def test_photographs_are_read_from_this_machine_only(store, tmp_path, capsys):
    with pytest.raises(InputError, match="pack them with `faithdiff shards`"):
        PhotoFolder(f"{BUCKET}/photos")
    assert run_command("restore", ["--input", str(place().photos), "--output", f"{BUCKET}/restored"]) == 2
    assert "only a path of this machine" in capsys.readouterr().err
