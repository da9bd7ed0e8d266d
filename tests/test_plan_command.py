"""`faithdiff plan`, with the CPU's compiler in the place of TPU's, and what it refuses."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from training_case import STAGE_2
from training_runs import MODEL

from benchmarks.targets import TARGETS
from faithdiff_jax import sharding
from faithdiff_jax.cli import plan as command
from faithdiff_jax.cli.exit_codes import BAD_INPUT, DONE, FAILED
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.planning import compiler
from faithdiff_jax.planning.chips import gpus, tpu_slice
from faithdiff_jax.planning.compiler import Layout
from faithdiff_jax.training.batch import check_batch
from faithdiff_jax.training.config import load_train_config, train_config
from faithdiff_jax.training.lowering import PlannedStep, advice, mesh_over

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path):
    """A run and an architecture."""
    run = {"steps": 1000, "batch": 16, "rematerialisation": "none", "data": {"crop": 16}, **STAGE_2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(to_dict(MODEL)))
    return ["--config", tmp_path / "run.yaml", "--model", tmp_path / "model.yaml"]


@pytest.fixture
def on_cpu(monkeypatch):
    """Simulated devices instead of TPU's, and a compiler that says the same of every program."""
    monkeypatch.setattr(compiler, "prepare", lambda: None)
    monkeypatch.setattr(compiler, "slice_devices", lambda topology, count: np.array(jax.devices()[:count]))
    monkeypatch.setattr(compiler, "layout", lambda lowered: Layout(0, 2**30, ""))
    monkeypatch.setattr(command, "_leave", lambda code: None)


def compiled_for_cpu(lowered) -> Layout:
    """What the CPU's compiler says."""
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return Layout(memory.argument_size_in_bytes, memory.temp_size_in_bytes, compiled.as_text())


def call(*arguments) -> int:
    return run_command("plan", [str(argument) for argument in arguments])


def test_a_training(files, on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(compiler, "layout", compiled_for_cpu)
    assert call(*files, "--topology", "v5e:2x4", "--json", "mesh.data=2", "mesh.fsdp=4") == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["chips"] == 8
    assert plan["fits"]
    assert set(plan["bytes_held"]) == {"trained", "optimizer", "ema", "frozen", "batch"}
    # AdamW has two moments for every parameter; its counters are a few bytes.
    assert 0 <= plan["bytes_held"]["optimizer"] - 2 * plan["bytes_held"]["trained"] < 64
    assert plan["bytes_held"]["ema"] == plan["bytes_held"]["trained"]
    assert plan["all_flops"] == plan["model_flops"] > 0
    kinds = {collective["kind"] for collective in plan["collectives"]}
    assert "all-reduce" in kinds  # of gradients
    assert plan["repeats"] == 1000


def test_split_parameters_take_less(files, on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 1)
    held = {}
    for fsdp in (1, 8):
        mesh = f"mesh.data={8 // fsdp}", f"mesh.fsdp={fsdp}"
        call(*files, "--topology", "v5e:2x4", "--json", *mesh)
        plan = json.loads(capsys.readouterr().out)
        held[fsdp] = plan["bytes_held"]["trained"]
    assert held[8] < held[1] / 4


def test_gpus_are_planned_on_their_stand_in_and_what_is_repeated_is_counted(files, on_cpu, capsys):
    assert call(*files, "--gpu", "rtx4090:1", "mesh.data=1", "mesh.fsdp=1", "rematerialisation=full") == DONE
    out = capsys.readouterr().out
    assert "Memory and traffic are those of v5p:2x2x1" in out
    assert "GiB of 22.4: fits" in out
    again = re.search(r"and (\d+)% computed again", out)
    assert again is not None
    assert 10 < int(again[1]) < 50


def test_a_restoration(files, on_cpu, capsys):
    model = files[2:]
    assert call("--restore", "64x48", *model, "--topology", "v5e:2x2", "--json", "steps=2") == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["chips"] == 1
    assert not plan["collectives"]
    assert set(plan["bytes_held"]) == {"parameters", "inputs"}
    assert call("--restore", "64x48", *files, "--json", "steps=4") == DONE
    assert json.loads(capsys.readouterr().out)["flops"] == pytest.approx(2 * plan["model_flops"], rel=0.2)


def test_a_restoration_without_size_conditioning(files, on_cpu, capsys):
    """As of SD 2.1: neither pooled text nor sizes."""
    model = yaml.safe_load(files[3].read_text())
    model["unet"]["pooled_dim"] = None
    files[3].write_text(yaml.safe_dump(model))
    assert call("--restore", "64x48", *files[2:], "--topology", "v5e:2x2", "--json", "steps=2") == DONE
    assert json.loads(capsys.readouterr().out)["model_flops"] > 0


def test_a_restoration_by_parts(files, on_cpu, capsys):
    """Of a picture that streams, one chunk of tiles; the arithmetic of all is that of the picture at once."""
    model = ["--restore", "128x128", *files[2:]]
    cut = ["tile=32", "guidance=1", "steps=2"]
    assert call(*model, "--topology", "v5e:2x2", "--json", *cut, "stream_above=1") == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["title"].startswith("one of 18 runs for a picture of 128x128")
    assert set(plan["bytes_held"]) == {"parameters", "inputs", "latents"}
    found = {}
    for above in ("1", "99999"):
        assert call(*model, "--json", *cut, f"stream_above={above}") == DONE
        found[above] = json.loads(capsys.readouterr().out)["flops"]
    assert found["1"] == pytest.approx(18 * plan["model_flops"])
    assert found["1"] == pytest.approx(found["99999"], rel=0.2)
    assert call(*model, "--json", *cut, "--tile-captions") == DONE
    assert 1 < json.loads(capsys.readouterr().out)["flops"] / found["99999"] < 1.2


def test_what_does_not_fit_ends_with_advice_and_exit_code_1(files, on_cpu, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(command, "_leave", codes.append)
    monkeypatch.setattr(compiler, "layout", lambda lowered: Layout(0, 20 * 2**30, ""))
    call(*files, "--topology", "v5e:2x4", "mesh.data=8", "mesh.fsdp=1", "rematerialisation=full")
    assert codes == [FAILED]
    assert "Change first: accumulation=2" in capsys.readouterr().out


def test_counting_needs_no_compiler(files, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("the compiler was asked")

    monkeypatch.setattr(compiler, "layout", refuse)
    assert call(*files) == DONE
    assert "TFLOP a step of 16" in capsys.readouterr().out


def test_every_setting_that_divides_is_tried(files):
    config = PlannedStep.of(train_config(yaml.safe_load(files[1].read_text()) | data(), "run"), MODEL)
    found = list(command.settings(config.config, config.model, 8))
    meshes = {(settings[0], settings[1]) for settings in found}
    assert meshes == {(f"mesh.data={8 // fsdp}", f"mesh.fsdp={fsdp}") for fsdp in (1, 2, 4, 8)}
    assert {settings[2] for settings in found} == {"accumulation=1", "accumulation=2"}  # 16 samples, 8 chips
    assert len(found) == 4 * 2 * 3


def data() -> dict:
    return {"data": {"crop": 16, "sources": [{"photos": "none"}]}}


def test_the_search_lists_the_fastest_that_fits_first(files, on_cpu, monkeypatch, capsys):
    def planned(arguments, **options):
        seconds, fits = (3.0, True) if "accumulation=2" in arguments else (1.0, "rematerialisation=full" in arguments)
        figures = {
            "fits": fits, "bytes_held": {"trained": 2**30}, "bytes_temporary": 2**30, "utilisation": [0.1, 0.2],
            "seconds_overlapped": seconds / 2, "seconds_one_by_one": seconds,
        }  # fmt: skip
        return subprocess.CompletedProcess(arguments, 0, json.dumps(figures), "")

    monkeypatch.setattr(command.subprocess, "run", planned)
    assert call(*files, "--topology", "v5e:2x4", "--search") == DONE
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "accumulation=1 rematerialisation=full" in lines[0]
    assert "yes" in lines[0]
    assert "no" in lines[-1].split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:9x9x9"], "v5e has 2 axes"),
        (["--gpu", "h100:5"], "the number must be one of"),
        (["--topology", "v5e:2x4", "mesh.data=3"], "must multiply to 8 chips"),
        (["--topology", "v5e:2x4", "batch=12"], "must be a multiple of accumulation 1 x 8 devices"),
        (["--search"], "--search: is for --config with --topology or --gpu"),
        (["steps=0"], "steps is 0"),
    ],
)
def test_bad_input_of_a_training(files, on_cpu, capsys, arguments, message):
    assert call(*files, *arguments) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--restore", "1024"], "must be WIDTHxHEIGHT in pixels"),
        (["--restore", "0x64"], "must be WIDTHxHEIGHT in pixels"),
        (["--restore", "99999x64"], "up to 16384"),
        (["--restore", "1023x64"], "sides must be multiples of the VAE's 8"),
        (["--restore", "64x64", "steps=0"], "steps is 0"),
        (["--config", "stage2", "--tile-captions"], "--tile-captions: is for --restore"),
        (["--restore", "64x64", "step=3"], "step"),
        ([], "one of --config, --restore is needed"),
        (["--restore", "64x64", "--config", "stage2", "--search", "--gpu", "h100:1"], "--search: is for --config with"),
    ],
)
def test_bad_input_of_a_restoration(capsys, arguments, message):
    assert call(*arguments) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_libtpu(files, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call(*files, "--topology", "v5e:2x4") == BAD_INPUT
    assert "libtpu, TPU's compiler, is not installed" in capsys.readouterr().err


def test_the_mesh_is_the_runs():
    config = train_config({"steps": 1000, "batch": 16, **STAGE_2, **data()}, "run")
    devices = np.array(jax.devices()[:8])
    assert mesh_over(config, devices).devices.shape == (1, 8)
    for sides in ({"data": 3, "fsdp": -1}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}):
        with pytest.raises(InputError, match="must multiply to 8 chips"):
            mesh_over(train_config({"steps": 1000, "batch": 16, "mesh": sides, **STAGE_2, **data()}, "run"), devices)


@pytest.mark.parametrize(
    ("changes", "mesh", "held", "temporary", "wanted"),
    [
        ({"rematerialisation": "none"}, (1, 8), 1, 2, "rematerialisation=full"),
        ({"rematerialisation": "full"}, (1, 8), 1, 2, "accumulation=2"),
        ({"rematerialisation": "full"}, (8, 1), 2, 1, "mesh.data=1 mesh.fsdp=8"),
        ({"rematerialisation": "full", "batch": 8}, (1, 8), 2, 1, "optimizer.momentum_dtype=int8"),
    ],
)
def test_what_is_advised(changes, mesh, held, temporary, wanted):
    config = train_config({"steps": 1000, "batch": 16, **STAGE_2, **data(), **changes}, "run")
    assert wanted in advice(config, mesh, held, temporary)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_tpus_own_compiler(files):
    arguments = [
        str(argument) for argument in (*files, "--topology", "v5e:2x4", "--json", "mesh.data=2", "mesh.fsdp=4")
    ]
    command = [sys.executable, "-m", "faithdiff_jax", "plan", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["bytes_temporary"] > 0
    assert plan["memory_bytes_moved"] > 0
    assert {collective["kind"] for collective in plan["collectives"]} >= {"all-reduce"}


def test_presets_go_with_the_machines_they_are_for():
    assert TARGETS.keys() == {path.stem for path in (REPOSITORY / "configs" / "targets").glob("*.yaml")}
    for name, (flag, machine) in TARGETS.items():
        config = load_train_config(f"targets/{name}")
        target = gpus(machine) if flag == "--gpu" else tpu_slice(machine)
        mesh_over(config, np.empty(target.count, object))
        check_batch(config, FaithDiffConfig(), target.count, 1)
