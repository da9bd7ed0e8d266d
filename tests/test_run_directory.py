"""A run's directory: begun once, continued by the same run only, written by one process at a time."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import yaml
from converted import published_and_converted

from faithdiff_jax.config import from_dict, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names
from faithdiff_jax.training.config import FREE_TO_CHANGE, LoRAConfig, TrainConfig
from faithdiff_jax.training.run_directory import model_config, open_run, read_run
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import CONFIG as CONFIG_FILE

DATA = {
    "steps": 600,
    "batch": 8,
    "groups": {
        "aligner": {"parameters": ["alignment.*"], "learning_rate": 5e-5},
        "unet": {"parameters": ["unet.*"], "learning_rate": 1e-5},
    },
    "frozen": ["vae.*", "text_encoder*", "lq_encoder.*"],
    "model": {"alignment": {"mixing": "batch", "group": 4}},
    "validation": {"photos": "photos"},
}


def config(**changes) -> TrainConfig:
    return from_dict(TrainConfig, DATA | changes, "test")


def write_model_directory(folder: pathlib.Path, **provenance) -> ModelDirectory:
    """As much of a model directory as a run looks at: its files are empty."""
    names = [f"{part}.safetensors" for part in part_names(FaithDiffConfig())]
    files = [*names, "tokenizer/vocab.json", "tokenizer_2/vocab.json"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    record = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    data = {"format": 2, "model": {}, "files": dict.fromkeys(files, record), "provenance": provenance}
    (folder / CONFIG_FILE).write_text(json.dumps(data), encoding="utf-8")
    return ModelDirectory.open(folder)


@pytest.fixture
def model(tmp_path) -> ModelDirectory:
    return write_model_directory(tmp_path / "model")


@pytest.fixture
def run_dir(tmp_path, model) -> pathlib.Path:
    """A run that has ended."""
    open_run(tmp_path / "run", config(), model).close()
    return tmp_path / "run"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, path, *args, **kwargs) -> str:
    """The run is refused in one line and the directory, if there is one, is as before."""
    path = pathlib.Path(path)
    before = contents(path) if path.is_dir() else None
    with pytest.raises(InputError, match=message) as caught:
        open_run(path, *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert (contents(path) if path.is_dir() else None) == before
    return str(caught.value)


def test_begin_and_continue(tmp_path, model):
    path = tmp_path / "runs" / "one"
    with open_run(path, config(), model) as run:
        assert (run.checkpoints, run.validation, run.tensorboard) == tuple(
            path / name for name in ("checkpoints", "validation", "tensorboard")
        )
        data = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        assert data == {
            "format": 1,
            "model": {"directory": str(model.path), "digest": model.digest},
            "config": to_dict(config()),
        }
    before = contents(path)
    with open_run(path, config(), model) as run:
        assert run.run == read_run(path)
        assert run.run.config == config()
    assert contents(path).keys() == before.keys() == {".lock", "config.yaml"}
    assert contents(path)["config.yaml"] == before["config.yaml"]


def add_checkpoint(run_dir, step=10) -> None:
    (run_dir / "checkpoints" / str(step)).mkdir(parents=True)


def log(run_dir, *lines: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def test_resume(tmp_path, model, run_dir):
    refused("has no checkpoint yet to resume from", run_dir, config(), model, resume="must")
    add_checkpoint(run_dir)
    open_run(run_dir, config(), model, resume="must").close()
    refused("holds a run already", run_dir, config(), model, resume="never")
    open_run(tmp_path / "new", config(), model, resume="never").close()
    refused("holds no run to resume", tmp_path / "other", config(), model, resume="must")
    assert not (tmp_path / "other").exists()
    refused("resume is 'maybe': must be one of auto, never, must", run_dir, config(), model, resume="maybe")


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(
    ("lines", "folder"),
    [
        ([{"step": 3}, {"step": 3, "checkpoint": True}], True),  # stopped early, its only checkpoint removed
        ([{"step": 7}], False),  # the folder is made before the first step
        ([{"step": 10}, {"step": 20}, {"step": 2000, "loss": 1.0}], True),  # `every` is 500
    ],
    ids=["noted", "folder gone", "long ago"],
)
def test_checkpoints_that_are_gone(model, run_dir, resume, is_main, lines, folder):
    """Nothing starts over by itself, and the log stays."""
    if folder:
        (run_dir / "checkpoints").mkdir()
    log(run_dir, *lines)
    message = refused("its checkpoints are gone from", run_dir, config(), model, resume=resume, is_main=is_main)
    assert f"took {lines[-1]['step']} steps" in message
    assert "give another --output to start over" in message


def test_a_run_killed_before_its_first_checkpoint_may_start_over(model, run_dir):
    (run_dir / "checkpoints").mkdir()
    log(run_dir, {"step": 499}, {"step": 501})
    refused("has no checkpoint yet to resume from", run_dir, config(), model, resume="must")
    open_run(run_dir, config(), model).close()


def test_a_directory_of_something_else(tmp_path, model):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    refused("not a run's directory, it holds cat.png", other, config(), model)
    refused("its config.yaml is of something else", model.path, config(), model)
    refused("is a file", other / "cat.png", config(), model)


def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path, model):
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").write_text("process 1", encoding="utf-8")
    for name in (".config.yaml.partial", ".0123456789abcdef.tmp"):
        (path / name).write_text("for", encoding="utf-8")
    open_run(path, config(), model, resume="never").close()
    assert read_run(path).config == config()


def test_every_difference_is_named(model, run_dir):
    groups = {"aligner": DATA["groups"]["aligner"] | {"learning_rate": 1e-4}, "lq": {"parameters": ["lq_encoder.*"]}}
    groups["lq"] |= {"learning_rate": 5e-6}
    changed = config(
        steps=700,
        groups=groups,
        lora={"rank": 4},
        model={"alignment": {"mixing": "none"}},
        data={"crop": 256, "workers": 3},
        optimizer={"clip": None},
        watch={"every": 7},
    )
    message = refused("another configuration", run_dir, changed, model)
    for change in (
        "steps was 600, is 700",
        "groups.aligner.learning_rate was 5e-05, is 0.0001",
        "groups.unet was {",
        "groups.lq was absent, is {",
        "lora was null, is {",
        'model.alignment.mixing was "batch", is "none"',
        "model.alignment.group was 4, is absent",
        "data.crop was 512, is 256",
        "optimizer.clip was 1.0, is null",
    ):
        assert change in message
    assert message.count(" was ") == 9


FREE = {
    "mesh": {"fsdp": 1, "data": 2},
    "data": {"workers": 3, "prefetch": 2, "timeout": 60.0, "bad_file_limit": 0.5},
    "checkpoint": {"every": 50, "latest": 3, "keep_every": 100},
    "validation": None,
    "watch": {"every": 7, "tensorboard": False},
    "stop_after_bad_steps": 3,
    "step_timeout": 60.0,
    "rematerialisation": "none",
}


@pytest.mark.parametrize("key", FREE)
def test_what_may_change(model, run_dir, key):
    changed = config(**{key: FREE[key]})
    assert changed != config()
    open_run(run_dir, changed, model).close()
    assert read_run(run_dir).config == changed
    open_run(run_dir, config(), model).close()
    assert read_run(run_dir).config == config()


def test_all_that_may_change_is_tried():
    assert {key.split(".")[0] for key in FREE_TO_CHANGE} == FREE.keys()


def test_a_key_that_begins_like_a_free_one_is_not_free(model, run_dir, monkeypatch):
    monkeypatch.setattr("faithdiff_jax.training.run_directory.FREE_TO_CHANGE", ("step", "data.crops"))
    refused("steps was 600, is 700", run_dir, config(steps=700), model)


def test_another_model(tmp_path, model, run_dir):
    moved = model.path.rename(tmp_path / "moved")
    open_run(run_dir, config(), ModelDirectory.open(moved)).close()
    assert read_run(run_dir).model_dir == moved
    other = write_model_directory(moved, sources="elsewhere")
    refused("moved is another model", run_dir, config(), other)


def test_an_upgraded_model_is_the_same(tmp_path, model, run_dir):
    """A run goes on with what its model directory was upgraded to, and remembers that."""
    upgraded = write_model_directory(tmp_path / "upgraded", upgraded_from={"format": 1, "digest": model.digest})
    open_run(run_dir, config(), upgraded).close()
    assert (read_run(run_dir).model_dir, read_run(run_dir).digest) == (upgraded.path, upgraded.digest)
    refused("model is another model", run_dir, config(), model)
    for number, was in enumerate(({"format": 1, "digest": "0" * 64}, {"format": 1}, {}, "0" * 64, None)):
        other = write_model_directory(tmp_path / str(number), upgraded_from=was)
        refused("is another model", run_dir, config(), other)


def test_options_that_an_earlier_version_had_not(model, run_dir):
    file = run_dir / "config.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    del data["config"]["optimizer"]["clip"], data["config"]["stop_after_bad_steps"]
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    refused("optimizer.clip was 1.0, is 2.0", run_dir, config(optimizer={"clip": 2.0}), model)
    open_run(run_dir, config(), model).close()


def test_another_format(model, run_dir):
    file = run_dir / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("format: 1", "format: 2"), encoding="utf-8")
    refused("format is 2, this version reads format 1", run_dir, config(), model)
    file.write_text(text.replace("digest", "digits"), encoding="utf-8")
    refused("damaged", run_dir, config(), model)
    file.write_text(text.replace("noise_offset", "offset"), encoding="utf-8")
    refused("unknown key offset", run_dir, config(), model)


def test_read_run_refuses_others(tmp_path):
    with pytest.raises(InputError, match="no such run directory"):
        read_run(tmp_path / "gone")
    with pytest.raises(InputError, match=r"not a run directory, it has no config\.yaml"):
        read_run(tmp_path)


def test_a_second_run_is_refused(model, run_dir):
    with open_run(run_dir, config(), model):
        message = refused("another run", run_dir, config(), model)
        assert f"process {os.getpid()} on " in message
    open_run(run_dir, config(), model).close()


def test_a_refused_run_lets_go_of_the_lock(model, run_dir, monkeypatch):
    def fail(*args):
        raise InputError("full")

    monkeypatch.setattr("faithdiff_jax.training.run_directory._write_config", fail)
    with pytest.raises(InputError, match="full"):
        open_run(run_dir, config(mesh={"data": 2}), model)
    monkeypatch.undo()
    open_run(run_dir, config(), model).close()


def test_other_processes_check_without_writing(tmp_path, model, run_dir):
    """They need no lock, whether the main process has begun or not."""
    add_checkpoint(run_dir)
    before = contents(run_dir)
    refused("steps was", run_dir, config(steps=700), model, is_main=False)
    with open_run(run_dir, config(), model):
        for resume in ("auto", "must", "never"):  # by now the main process may have written it
            open_run(run_dir, config(mesh={"data": 2}), model, resume=resume, is_main=False).close()
        refused("another run", run_dir, config(), model)
    assert contents(run_dir)["config.yaml"] == before["config.yaml"]
    open_run(tmp_path / "new", config(), model, is_main=False).close()
    assert not (tmp_path / "new").exists()
    refused("holds no run", tmp_path / "new", config(), model, resume="must", is_main=False)


HOLD = """
import sys, subprocess, time
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.run_directory import open_run, read_run
from faithdiff_jax.weights.model_directory import ModelDirectory
run = open_run(sys.argv[1], read_run(sys.argv[1]).config, ModelDirectory.open(sys.argv[2]))
subprocess.Popen(["sleep", "10"], stdout=subprocess.DEVNULL)  # outlives the run, and must not keep its lock
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_run_leaves_nothing_that_blocks(model, run_dir):
    arguments = [sys.executable, "-c", HOLD, str(run_dir), str(model.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            message = refused("another run", run_dir, config(), model)
            assert f"process {process.pid} on " in message
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    open_run(run_dir, config(), model).close()


def test_a_directory_that_cannot_be_written(tmp_path, model):
    (tmp_path / "file").write_bytes(b"")
    refused(re.escape("file/run: cannot be written to"), tmp_path / "file" / "run", config(), model)


def test_model_config():
    model = ModelDirectory.open(published_and_converted()[1])
    base = model.config
    assert model_config(config(model={}), model) == base
    changed = model_config(config(model={"vae": {"scaling_factor": 0.5}}), model)
    assert changed == dataclasses.replace(base, vae=dataclasses.replace(base.vae, scaling_factor=0.5))
    changed = model_config(config(model={"alignment": {"mixing": "batch", "group": 4}}), model)
    assert changed == dataclasses.replace(base, alignment=dataclasses.replace(base.alignment, mixing="batch", group=4))
    with pytest.raises(InputError, match=r"model: unknown key alignment\.mixin "):
        model_config(config(model={"alignment": {"mixin": "batch"}}), model)
    with pytest.raises(InputError, match=r"unet\.context_dim is 7"):
        model_config(config(model={"unet": {"context_dim": 7}}), model)


def test_lora_reads_back(tmp_path, model):
    with_lora = config(lora=to_dict(LoRAConfig(rank=2)), ema=None)
    open_run(tmp_path / "run", with_lora, model).close()
    assert read_run(tmp_path / "run").config == with_lora


def test_validation_as_version_0_1_0_wrote_it(model, run_dir):
    """It had steps and guidance of its own; a run that has them resumes."""
    file = run_dir / "config.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    restore = data["config"]["validation"].pop("restore")
    data["config"]["validation"] |= {"steps": 7, "guidance": 1.5}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    validation = read_run(run_dir).config.validation
    assert (validation.restore.steps, validation.restore.guidance) == (7, 1.5)
    assert validation.restore.scale == restore["scale"] == 4


def test_validation_restores_at_the_scale_of_its_degradation():
    with pytest.raises(InputError, match=r"validation\.restore\.scale is 2: must be 4"):
        config(validation={"photos": "photos", "restore": {"scale": 2}})
