"""The train command's refusals: one line, exit code 2, and nothing read, allocated or written before them."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from tiny import write_tokenizer
from training_runs import STAGE_1, place, write_config

from faithdiff_jax.cli.exit_codes import INTERNAL
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.training.config import load_train_config
from faithdiff_jax.training.run_directory import open_run
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.safetensors_format import record
from faithdiff_jax.weights.stored_files import CONFIG as CONFIG_FILE

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    """Parameters are the first thing that takes memory, on the host or a device."""

    def read(*arguments, **options):
        raise AssertionError("parameters were read")

    monkeypatch.setattr("faithdiff_jax.training.loop.load_parameters", read)


def call(arguments) -> int:
    return run_command("train", [str(argument) for argument in arguments])


def refused(arguments, message: str, capsys, folder) -> None:
    """The command says so in one line, and leaves the folder, and the devices' memory, as they are."""
    before, arrays = contents(folder), jax.live_arrays()
    known = {id(array) for array in arrays}
    assert call(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert contents(folder) == before
    assert not [array for array in jax.live_arrays() if id(array) not in known and array.size > 1]


def contents(folder) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def group(*patterns: str) -> dict:
    return {"parameters": list(patterns), "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 12}, "batch is 12: must be a multiple of accumulation 1 x 8 devices, 8"),
        ({"accumulation": 2}, "batch is 8: must be a multiple of accumulation 2 x 8 devices, 16"),
        ({"accumulation": 3}, "batch is 8: must be a multiple of accumulation, 3"),
        ({"stepps": 3}, "unknown key stepps"),
        ({"optimizer": {"warmup": 1, "beta3": 0.5}}, "unknown key optimizer.beta3"),
        ({"groups": {"a": group("unet.*", "alinement.*")}}, "pattern 'alinement.*' matches no parameter"),
        ({"groups": {"a": group("unet.*"), "b": group("unet.conv_in.*")}}, "unet.conv_in.bias: claimed by a and b"),
        ({"frozen": ["vae.*", "text_encoder*", "unet.conv_out.*"]}, "unet.conv_out.bias: claimed by rest and frozen"),
        ({"frozen": ["text_encoder*"]}, "no group has vae."),
        ({"groups": {"a": group("*")}, "frozen": []}, "the VAE stays frozen"),
        ({"lora": {"rank": 2}}, "claimed by lora and by group 'rest'"),
        (STAGE_1 | {"lora": {"rank": 16}}, "lora.rank is 16: must be below the sides of unet."),
        ({"mesh": {"data": 3, "fsdp": 1}}, "mesh 3 x 1: must multiply to the 8 devices there are"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "mesh -1 x -1: sizes must be at least 1"),
        ({"data.crop": 17}, "crop is 17: must be a positive multiple of"),
        ({"data.crop": 0}, "crop is 0: must be a positive multiple of the scale 4"),
        ({"data.caption_dropout": 2.0}, "data.caption_dropout is 2.0: must be"),
        ({"model": {"unet": {"chanels": [16]}}}, "unknown key unet.chanels"),
        ({"model": {"alignment": {"mixing": "batch"}}}, "model.alignment.group is null"),
        ({"model": {"alignment": {"mixing": "batch", "group": 4}}}, "batch is 8: must be a multiple of"),
        ({"validation": {"photos": "no/such/folder"}}, "no/such/folder: no such folder"),
        ({"validation": {"photos": "PHOTOS", "crop": 512}}, "validation.photos: "),
    ],
)
def test_configurations_that_do_not_fit(changes, message, tmp_path, capsys):
    if "validation" in changes and changes["validation"]["photos"] == "PHOTOS":
        changes = {"validation": changes["validation"] | {"photos": str(place().photos)}}
    refused(place().command(tmp_path / "run", changes), message, capsys, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [("mesh.fdsp=8", "unknown key mesh.fdsp"), ("steps", "'steps': must be key=value"), ("steps=x", "steps")],
)
def test_overrides_that_do_not_fit(override, message, tmp_path, capsys):
    refused(place().command(tmp_path / "run", {}, override), message, capsys, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "no/such.yaml"], "'no/such.yaml': no such file"),
        (["--model", "no/such/model"], "no/such/model: no such model directory"),
        (["--data", "no/such/photos"], "no/such/photos: no such folder"),
        (["--data", ""], "--data: '': must not be empty"),
        (["--resume", "must"], "holds no run to resume"),
        (["--resume", "maybe"], "--resume"),
        (["--stepps", "3"], "--stepps"),
        (["--processes", "2"], "--coordinator, --processes and --process-id go together"),
    ],
)
def test_flags_that_do_not_fit(flags, message, tmp_path, capsys):
    refused(place().command(tmp_path / "run", {}, *flags), message, capsys, tmp_path)


def test_a_missing_flag(tmp_path, capsys):
    refused(place().command(tmp_path / "run")[:-2], "--output", capsys, tmp_path)


def test_no_photographs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(place().command(tmp_path / "run", {}, "--data", tmp_path / "empty"), "no pictures", capsys, tmp_path)


def test_the_directory_of_something_else(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it", encoding="utf-8")
    refused(place().command(tmp_path / "run"), "not a run's directory, it holds thesis.tex", capsys, tmp_path)
    refused(place().command(tmp_path / "run" / "thesis.tex"), "is a file", capsys, tmp_path)


def test_a_model_directory_as_output(tmp_path, capsys):
    shutil.copytree(place().model, tmp_path / "run")
    refused(place().command(tmp_path / "run"), "its config.yaml is of something else", capsys, tmp_path)


@pytest.fixture
def begun(tmp_path):
    """A run's directory, as one that was stopped before its first step leaves it."""
    config = load_train_config(write_config(tmp_path / "run.yaml"), [f"data.sources=[{{photos: '{place().photos}'}}]"])
    open_run(tmp_path / "run", config, ModelDirectory.open(place().model)).close()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"steps": 9, "dtype": "bfloat16"}, 'steps was 6, is 9; dtype was "float32", is "bfloat16"'),
        ({"optimizer": {"warmup": 2}}, "optimizer.warmup was 1, is 2"),
        ({"data.caption_dropout": 0.5}, "data.caption_dropout was 0.2, is 0.5"),
        (STAGE_1, "groups.lq_encoder"),
    ],
)
def test_a_resume_under_another_configuration(changes, message, begun, tmp_path, capsys):
    refused(place().command(begun, changes), message, capsys, tmp_path)


def test_other_resumes(begun, tmp_path, capsys):
    arguments = place().command(begun)
    refused([*arguments, "--resume", "never"], "holds a run already", capsys, tmp_path)
    refused([*arguments, "--data", place().photos.parent], "data.sources was", capsys, tmp_path)
    model = shutil.copytree(place().model, tmp_path / "model")
    with (model / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("\n")
    refused([*arguments, "--model", model], "is another model", capsys, tmp_path)
    assert call(arguments) == INTERNAL
    assert "parameters were read" in capsys.readouterr().err


def another_model(folder, **encoder) -> Path:
    """The model, with something else said of its first text encoder, and nothing of what its files hold."""
    shutil.copytree(place().model, folder)
    data = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    data["model"]["text_encoders"][0] |= encoder
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"vocab_size": 300, "end_token": 299}, "518 tokens for a vocab_size of 300"),
        ({"end_token": 516 - 1}, "another end_token than 515"),
        ({"positions": 60}, "gives 77 tokens, its text encoder has 60 positions"),
    ],
)
def test_a_tokenizer_of_another_text_encoder(encoder, message, tmp_path, capsys):
    model = another_model(tmp_path / "model", **encoder)
    refused(place().command(tmp_path / "run", {}, "--model", model), message, capsys, tmp_path)


def test_a_model_without_a_tokenizer(tmp_path, capsys):
    model = shutil.copytree(place().model, tmp_path / "model")
    shutil.rmtree(model / "tokenizer_2")
    refused(place().command(tmp_path / "run", {}, "--model", model), "tokenizer_2", capsys, tmp_path)


def test_the_second_tokenizer_is_checked_too(tmp_path, capsys):
    model = another_model(tmp_path / "model")
    shutil.rmtree(model / "tokenizer_2")
    write_tokenizer(model / "tokenizer_2", length=90)
    data = yaml.safe_load((model / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in data["files"]:
        if name.startswith("tokenizer_2/"):
            data["files"][name] = record(model / name)._asdict()
    (model / CONFIG_FILE).write_text(yaml.safe_dump(data), encoding="utf-8")
    refused(place().command(tmp_path / "run", {}, "--model", model), "tokenizer_2: gives 90", capsys, tmp_path)


def test_the_script_as_it_is_called(tmp_path):
    """Nothing that other libraries log or print comes beside the line, late in the checks."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    script = [sys.executable, "train.py", *place().command(tmp_path / "run")]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "0"], "--processes: '0': must be a whole number, from 1"),
        (["--processes", "²"], "must be a whole number"),
        (["--coordinator", "host", "--processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "host:0", "--processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "host:1", "--processes", "2", "--process-id", "2"], "--process-id 2: must be below"),
        (["--coordinator", "host:1", "--processes", "2", "--process-id", "-1"], "--process-id"),
        (["--coordinator", "h:1", "--processes", "2", "--process-id", "1", "--distributed"], "leave them out"),
    ],
)
def test_processes_that_do_not_fit(flags, message, tmp_path, capsys):
    refused(place().command(tmp_path / "run", {}, *flags), message, capsys, tmp_path)
