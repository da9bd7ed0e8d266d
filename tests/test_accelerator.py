"""The benchmark for accelerators: whole at a tiny size, and what it makes of parts that fail, hang or say nonsense."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest
from devices import simulated

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"

# A stand-in for the measurements: one figure, then what the part's name says.
CHILD = """
import json, sys, time
part, who = sys.argv[sys.argv.index("--child") + 1].split("/")
print("what a library prints")
print(json.dumps({"part": part, "who": who, "what": "seconds", "value": 0.5}), flush=True)
if part == "rate":
    sys.exit("no such device")
if part == "parity":
    time.sleep(60)
"""


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    return accelerator


def figures(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_part_that_fails_costs_its_own_figures_alone(accelerator, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    monkeypatch.setattr(accelerator, "__file__", str(child))
    options, report = argparse.Namespace(output=tmp_path, device="cpu"), accelerator.Report(tmp_path)
    for part, seconds in (("rate", 20), ("parity", 1), ("restore", 20)):
        accelerator.run_task(part, "ours", options, report, seconds=seconds)
        assert figures(tmp_path)[-1]["part"] == part, "each is there before the next begins"
    found = figures(tmp_path)
    assert [figure["value"] for figure in found if "value" in figure] == [0.5] * 3
    failed = {figure["part"]: figure["failed"] for figure in found if "failed" in figure}
    assert failed == {"rate": "exit code 1: no such device", "parity": "stopped after its 1 s"}
    assert report.failed
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in ("## restore", "| ours | seconds | 0.5 |", "| ours | failed | stopped after its 1 s |"):
        assert line in text


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_are_none(accelerator, monkeypatch, capsys, tmp_path, minutes):
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--output", str(tmp_path / "x"), "--minutes", minutes])
    with pytest.raises(SystemExit) as ended:
        accelerator.main()
    assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_everything_at_a_tiny_size(tmp_path):
    """Every part of both frameworks, as on an accelerator but for the size; float32 agrees, and losses do."""
    command = [sys.executable, BENCHMARKS / "accelerator.py", "--size", "tiny", "--device", "cpu"]
    subprocess.run([*command, "--minutes", "30", "--output", tmp_path], check=True, env=os.environ | simulated(1))
    found = figures(tmp_path)
    assert not [figure for figure in found if figure.get("what") == "failed" or "failed" in figure]
    values = {(figure["part"], figure["who"], figure["what"]): figure["value"] for figure in found}
    for what in ("one evaluation", "2 steps"):
        assert values["parity", "ours, float32", f"largest relative error, {what}"] < 1e-5
        errors = [
            values["parity", f"ours, bfloat16, {name} attention", f"largest relative error, {what}"]
            for name in ("heads", "xla")
        ]
        assert all(1e-4 < error < 0.1 for error in errors)
        assert errors[0] != errors[1], "the second attention was not run"
    losses = [values["train", who, "loss of the first step"] for who in ("ours", "torch")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert {part for part, _, _ in values} == {"rate", "parity", "restore", "train", "memory"}
    assert 0 < values["restore", "ours, float32, batch 1", "utilisation of the matrix rate"] < 2
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("kernel ") == 5
