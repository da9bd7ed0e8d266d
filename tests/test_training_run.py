"""Whole runs of a tiny model: stopped, killed, moved to other devices, starved and poisoned, and what they leave."""

import functools
import json
import shutil
import signal
import socket
import time

import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import (
    LORA,
    MODEL,
    STAGE_1,
    assert_same_bits,
    finish,
    kept_programs,
    losses,
    place,
    position,
    saved,
    start_process,
    stop_at,
    train,
)

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.data.workers import WorkerError
from faithdiff_jax.files.images import load_image
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.training import loop
from faithdiff_jax.training.checkpoints import UNFINISHED
from faithdiff_jax.training.parameters import inference_params, model_shapes
from faithdiff_jax.training.run_directory import read_run
from faithdiff_jax.training.saved_checkpoints import saved_steps
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents

convert = functools.partial(run_command, "convert")

STEPS = 6
# Losses are about 1, and sums over devices come in another order: what six steps of AdamW make of float32 rounding.
SAME_LOSS = 1e-4


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(autouse=True)
def _keep_programs(programs):
    with kept_programs(programs):
        yield


@pytest.fixture
def start():
    """`start_process`, whose processes do not outlive the test."""
    started = []

    def begin(*arguments, **options):
        started.append(start_process(*arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    """A run of stage 2 that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with kept_programs(programs):
        assert train(place().command(run)) == 0
    return run


@pytest.fixture(scope="module")
def stage_1(programs, tmp_path_factory):
    """A run of stage 1 with a validation at its end."""
    run = tmp_path_factory.mktemp("stage-1") / "run"
    validation = {"photos": str(place().photos), "every": 4, "count": 2, "crop": 32, "restore": {"steps": 1}}
    with kept_programs(programs):
        assert train(place().command(run, STAGE_1 | {"validation": validation}), devices=1) == 0
    return run


def model_arrays(folder) -> dict[str, np.ndarray]:
    """Dotted path, part first -> array, of a model directory."""
    return {
        f"{part}.{path}": array
        for part in part_names(MODEL)
        for path, array in ModelDirectory.open(folder).arrays(part, part_shapes(MODEL, part))
    }


def moved(folder) -> set[str]:
    """The parameters of a model directory that are not, bit for bit, those that the runs start from."""
    before, after = model_arrays(place().model), model_arrays(folder)
    assert before.keys() == after.keys()
    return {path for path, array in after.items() if array.tobytes() != before[path].tobytes()}


def export(run, output) -> None:
    assert convert(["--run", str(run), "--output", str(output)]) == 0


def predicted(model: FaithDiff, *, features: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(5)
    shapes = (1, 6, 10, 4), (1, 6, 10, 16), (1, 77, 16), (1, 8)
    latents, lq, context, pooled = (rng.standard_normal(shape, np.float32) for shape in shapes)
    time_ids = np.array([[12, 20, 0, 0, 12, 20]], np.float32)
    return np.asarray(model.predict_noise(latents, np.array([500]), features * lq, context, pooled, time_ids))


def assert_equal_runs(ours, theirs) -> None:
    """Everything of the last checkpoint and every reported loss, to the last bit."""
    assert saved_steps(ours / "checkpoints")[-1] == saved_steps(theirs / "checkpoints")[-1] == STEPS
    assert_same_bits(saved(ours), saved(theirs))
    assert position(ours, STEPS) == position(theirs, STEPS)
    assert losses(ours) == losses(theirs)
    assert list(losses(ours)) == list(range(1, STEPS + 1))


def assert_equal_losses(ours, theirs) -> None:
    """The same steps, and their losses to float32 rounding."""
    found, wanted = losses(ours), losses(theirs)
    assert list(found) == list(wanted) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - wanted[step]) for step in wanted) < SAME_LOSS
    # The data of another step, or its noise, would be seen.
    assert min(abs(wanted[step] - wanted[step + 1]) for step in range(1, STEPS)) > 10 * SAME_LOSS


def error_line(captured) -> str:
    """The only error, which comes last; the bar is above it."""
    *above, last = captured.err.strip().splitlines()
    assert last.startswith("error: ")
    assert not any("rror" in line for line in above)
    return last


def test_what_a_run_leaves(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", ".lock"
    }  # fmt: skip
    assert saved_steps(whole / "checkpoints") == [2, 4, 6]
    (events,) = (whole / "tensorboard").iterdir()
    written = events.read_bytes()
    for name in (b"loss", b"gradient_norm/rest", b"learning_rate/lq_encoder", b"images_per_second"):
        assert written.count(name) >= STEPS - 1
    assert all(np.isfinite(loss) for loss in losses(whole).values())
    state = saved(whole)
    trained = {path for path in model_shapes(MODEL) if path.startswith(("lq_encoder.", "alignment.", "unet."))}
    assert {name.removeprefix("trained/") for name in state if name.startswith("trained/")} == trained
    assert {name.removeprefix("ema/") for name in state if name.startswith("ema/")} == trained
    assert not any("vae." in name or "text_encoder" in name for name in state)
    assert state["step"] == STEPS
    assert state["skipped"] == 0


def test_a_run_that_is_done_is_left(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(place().command(whole)) == 0
    assert "6 steps done" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_stopped_and_resumed(tmp_path, whole, capsys):
    run = tmp_path / "run"
    arguments = place().command(run, {"checkpoint.every": 5})
    for last in (1, 4):
        assert train(arguments, change=stop_at(last)) == 130
        assert f"stopped after step {last} of 6; the same command resumes the run from there" in capsys.readouterr().out
        assert saved_steps(run / "checkpoints")[-1] == last
    assert train(arguments) == 0
    assert "resumed at step 4 of 6" in capsys.readouterr().out
    assert_equal_runs(run, whole)


def test_a_profile(tmp_path, whole):
    folder = tmp_path / "profile"
    assert train(place().command(tmp_path / "run", None, "--profile", folder)) == 0
    assert len(list(folder.rglob("*.xplane.pb"))) == 1
    assert_equal_runs(tmp_path / "run", whole)


def test_killed_at_any_moment(tmp_path, whole, programs, start):
    """While a checkpoint is written, and some time into a step; then told to stop; then left alone."""
    run = tmp_path / "run"
    arguments = place().command(run, {"checkpoint": {"every": 1, "latest": 2}})
    rng = np.random.default_rng()
    for waiting_for in ("checkpoint", "step"):
        process = start(arguments, devices=8, use=2, cache=programs, seconds=0.5)
        wait_for(waiting_for, run, process)
        time.sleep(rng.uniform(0, 0.02 if waiting_for == "checkpoint" else 0.6))
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    process = start(arguments, devices=8, use=2, cache=programs, seconds=0.5)
    wait_for("step", run, process)
    process.terminate()
    code, out, err = finish(process)
    assert (code, "Traceback" in err) == (130, False)
    assert "the same command resumes the run from there" in out
    code, out, err = finish(start(arguments, devices=8, use=2, cache=programs))
    assert code == 0, err
    assert "resumed at step" in out
    assert_equal_runs(run, whole)
    assert not list((run / "checkpoints").glob(UNFINISHED))


def wait_for(what: str, run, process) -> None:
    """Until the process begins to write a checkpoint, or reports a step."""
    log, unfinished = run / "metrics.jsonl", set((run / "checkpoints").glob(UNFINISHED))
    lines = None
    end = time.monotonic() + 600
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if what == "checkpoint" and set((run / "checkpoints").glob(UNFINISHED)) - unfinished:
            return
        # What is there at first may be of steps that are dropped.
        count = log.read_text(encoding="utf-8").count("\n") if log.exists() else 0
        if what == "step" and lines is not None and count > lines:
            return
        lines = count if lines is None else min(lines, count)
        time.sleep(0.002)
    raise AssertionError(f"no {what} in time")


def test_eight_devices_then_two_then_four(tmp_path, whole):
    run = tmp_path / "run"
    assert train(place().command(run, {"mesh": {"data": 2, "fsdp": 4}}), devices=8, change=stop_at(2)) == 130
    assert train(place().command(run, {"mesh": {"data": 1, "fsdp": 2}}), devices=2, change=stop_at(4)) == 130
    assert train(place().command(run, {"mesh": {"data": 2, "fsdp": 2}}), devices=4) == 0
    assert_equal_losses(run, whole)


def test_a_step_is_in_the_log_before_it_is_saved(tmp_path, monkeypatch):
    """Killed in between, a run would go on behind the step, and the log would never have it."""
    run, plain, logged = tmp_path / "run", loop._Run._save, {}

    def save(self, step, *arguments):
        logged[step] = max(losses(run))
        plain(self, step, *arguments)

    monkeypatch.setattr(loop._Run, "_save", save)
    assert train(place().command(run)) == 0
    assert logged == {2: 2, 4: 4, 6: 6}


def test_two_processes(tmp_path, whole, programs, start, capsys):
    """One is told to stop: both save the same step and end; one process goes on from there."""
    run = tmp_path / "run"
    arguments = place().command(run, {"mesh": {"data": 2, "fsdp": 2}})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    several = ["--coordinator", address, "--processes", "2", "--process-id"]
    options = {"devices": 2, "use": 4, "cache": programs, "seconds": 1.5}
    processes = [start([*arguments, *several, i], **options) for i in range(2)]
    wait_for("step", run, processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [130, 130], ended
    last = saved_steps(run / "checkpoints")[-1]
    assert 2 <= last < 6
    assert [f"stopped after step {last} of 6" in out for _, out, _ in ended] == [True, False]

    assert train(place().command(run)) == 0
    assert f"resumed at step {last} of 6" in capsys.readouterr().out
    assert_equal_losses(run, whole)


def test_a_dry_run_does_all_but_the_steps(tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*place().command(run, STAGE_1), "--dry-run"], devices=1) == 0
    out = capsys.readouterr().out
    for found in ("devices: 1 of cpu", "train in 1 groups", "data: the first batch of", "GiB a device", "TFLOP a step"):
        assert found in out
    assert out.splitlines()[-1].startswith("nothing was written")
    assert not run.exists()


def test_a_dry_run_finds_what_a_run_would(tmp_path, capsys):
    assert train([*place().command(tmp_path / "run", {"batch": 3, "mesh": {"data": 2}}), "--dry-run"], devices=2) == 2
    assert "batch is 3: must be a multiple of" in capsys.readouterr().err


def test_stage_1_moves_the_aligner_alone(tmp_path, stage_1):
    export(stage_1, tmp_path / "model")
    aligner = {path for path in model_shapes(MODEL) if path.startswith("alignment.")}
    assert moved(tmp_path / "model") == aligner
    before, after = (FaithDiff.load(path) for path in (place().model, tmp_path / "model"))
    assert np.array_equal(predicted(before), predicted(before, features=0.0))
    assert np.abs(predicted(after) - predicted(after, features=0.0)).max() > 1e-3


def test_stage_2_moves_encoder_aligner_and_unet(tmp_path, whole):
    export(whole, tmp_path / "model")
    parts = ("lq_encoder.", "alignment.", "unet.")
    assert moved(tmp_path / "model") == {path for path in model_shapes(MODEL) if path.startswith(parts)}


def test_validation(stage_1):
    (picture,) = (stage_1 / "validation").iterdir()
    assert picture.name == "00000004.png"
    assert load_image(picture).rgb.shape[1] >= 3 * 32
    lines = [json.loads(line) for line in (stage_1 / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (scores,) = (line for line in lines if "validation/psnr" in line)
    assert scores["step"] == 4
    assert np.isfinite(scores["validation/psnr"])
    assert 0 < scores["validation/ssim"] < 1
    (events,) = (stage_1 / "tensorboard").iterdir()
    for name in (b"validation/psnr", b"validation/ssim", b"validation/pictures"):
        assert name in events.read_bytes()


def test_lora_is_exported_as_it_was_trained(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    assert train(place().command(run, LORA), devices=1) == 0
    export(run, model)
    changed = moved(model)
    assert {path for path in changed if path.startswith("unet.")} == {
        path for path in model_shapes(MODEL) if path.startswith("unet.") and ".attn" in path and "to_" in path
        and path.endswith("kernel") and "to_out" not in path
    } | {path for path in changed if "to_out" in path and path.endswith("kernel")}  # fmt: skip
    config = read_run(run).config
    average = {name: jnp.asarray(array) for name, array in saved(run).items() if name.startswith("ema/")}
    average = {name.removeprefix("ema/"): array for name, array in average.items()}
    assert any(path.startswith("lora.") for path in average)
    frozen = {path: jnp.asarray(array) for path, array in model_arrays(place().model).items() if path not in average}
    ours = predicted(FaithDiff(MODEL, inference_params(config, {"trained": {}, "ema": average}, frozen)))
    theirs = predicted(FaithDiff.load(model))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()

    plain = {path: array for path, array in average.items() if not path.startswith("lora.")}
    without = predicted(FaithDiff(MODEL, inference_params(config, {"trained": {}, "ema": plain}, frozen)))
    assert np.abs(ours - without).max() > 1e-3 * np.abs(ours).max()

    assert convert(["--to-torch", str(model), "--output", str(tmp_path / "back.safetensors")]) == 0
    assert (tmp_path / "back.safetensors").stat().st_size > 1000


def test_steps_that_are_not_finite(tmp_path, capsys):
    """One is left out and counted, two in a row end the run, and it can go on from where it was good."""
    run = tmp_path / "run"
    arguments = place().command(run, {"stop_after_bad_steps": 2, "checkpoint.every": 1})

    def poison(step, batch):
        if step == 2:
            batch["hq"][3] = np.inf
        if step > 3:
            batch["lq"][0, 0, 0, 0] = np.nan

    assert train(arguments, change=poison) == 1
    assert "2 times in a row" in error_line(capsys.readouterr())
    states = {step: saved(run, step) for step in saved_steps(run / "checkpoints")}
    assert list(states) == [1, 2, 3, 4, 5]
    assert [int(state["step"]) for state in states.values()] == [1, 2, 3, 4, 5]
    assert [int(state["skipped"]) for state in states.values()] == [0, 1, 1, 2, 3]
    assert [int(state["skipped_in_a_row"]) for state in states.values()] == [0, 1, 0, 1, 2]
    learned = {step: {name: array for name, array in state.items() if "/" in name} for step, state in states.items()}
    assert learned[1].keys() > {"trained/unet.conv_in.kernel", "ema/unet.conv_in.kernel"}
    for step, same in ((2, 1), (4, 3), (5, 3)):
        assert_same_bits(learned[step], learned[same])
    assert any(array.tobytes() != learned[1][name].tobytes() for name, array in learned[3].items())

    assert train(arguments) == 0
    assert saved(run)["skipped"] == 3
    assert saved(run)["skipped_in_a_row"] == 0


def test_photographs_that_vanish(tmp_path, whole, capsys):
    photos = shutil.copytree(place().photos, tmp_path / "photos")
    run = tmp_path / "run"
    arguments = place().command(run, {"checkpoint.every": 100}, "--data", photos)

    def vanish(step, batch):
        if step == 3:
            photos.rename(tmp_path / "elsewhere")

    assert train(arguments, change=vanish) == 2
    assert f"{photos}" in error_line(capsys.readouterr())
    assert saved_steps(run / "checkpoints") == [3]
    assert list(losses(run)) == [1, 2, 3]
    assert train(arguments) == 2
    assert error_line(capsys.readouterr()).endswith("no such folder")
    (tmp_path / "elsewhere").rename(photos)

    def die(step, batch):
        if step == 5:
            raise WorkerError("data: a worker died")

    assert train(arguments, change=die) == 1
    assert error_line(capsys.readouterr()) == "error: data: a worker died"
    assert saved_steps(run / "checkpoints") == [3, 4]
    assert train(arguments) == 0
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_checkpoints_that_are_gone(tmp_path, whole, capsys, resume):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    log = (run / "metrics.jsonl").read_bytes()
    assert train(place().command(run, {}, "--resume", resume)) == 2
    assert "its run took 6 steps and its checkpoints are gone" in error_line(capsys.readouterr())
    assert (run / "metrics.jsonl").read_bytes() == log
    assert not any((run / "checkpoints").iterdir())


def test_a_byte_that_changed(tmp_path, whole, capsys):
    """Neither a run nor an export takes a checkpoint whose data is not what was written."""
    run = shutil.copytree(whole, tmp_path / "run")
    files = [path for path in (run / "checkpoints" / "6" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    largest.write_bytes(bytes(data))
    commands = (
        lambda: train(place().command(run)),
        lambda: convert(["--run", str(run), "--output", str(tmp_path / "model")]),
    )
    for command in commands:
        assert command() == 2
        error = error_line(capsys.readouterr())
        assert f"checkpoints/6: damaged (state/ocdbt.process_0/d/{largest.name} is not what was written)" in error
        assert "step 4 is whole, remove 6 to resume from it" in error
    assert not (tmp_path / "model").exists()
    shutil.rmtree(run / "checkpoints" / "6")
    assert train(place().command(run)) == 0
    assert_equal_runs(run, whole)


def test_told_to_stop_before_the_first_step(tmp_path, monkeypatch, capsys):
    """Signals interrupt the long work at the start, where nothing has been done that could be lost."""

    def told(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("faithdiff_jax.training.loop.load_parameters", told)
    before = signal.getsignal(signal.SIGTERM)
    assert train(place().command(tmp_path / "run")) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert train(place().command(tmp_path / "run", {}), change=stop_at(1)) == 130


def test_a_model_that_is_not_finite(tmp_path, capsys):
    """No step would make it good: the run does not begin, and what holds a NaN is named."""
    model, good = tmp_path / "model", ModelDirectory.open(place().model)
    contents = {part: good.contents(part) for part in part_names(MODEL)}
    unet = dict(good.arrays("unet"))
    unet["conv_in.bias"] = unet["conv_in.bias"] * np.float32(np.nan)
    contents["unet"] = Contents.of(unet)
    ModelDirectory.write(model, MODEL, contents, tokenizers=good.path, provenance={}, allow_nonfinite=True)
    assert train(place().command(tmp_path / "run", {}, "--model", model)) == 2
    assert error_line(capsys.readouterr()).endswith(f"{model}: NaN or infinite values in unet.conv_in.bias")
    assert saved_steps(tmp_path / "run" / "checkpoints") == []


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, capsys, monkeypatch):
    """However it came about: the run ends, and what it saved before is there to resume from."""
    run, plain = tmp_path / "run", loop.not_finite
    monkeypatch.setattr(loop, "not_finite", lambda leaves: plain(spoilt(leaves) if leaves["step"] == 4 else leaves))

    def spoilt(leaves):
        return leaves | {"trained/unet.conv_in.bias": jnp.full(16, jnp.nan)}

    assert train(place().command(run)) == 1
    assert "step 4: NaN or infinite values in trained/unet.conv_in.bias" in error_line(capsys.readouterr())
    assert saved_steps(run / "checkpoints") == [2]


def test_a_second_run_in_the_same_directory(tmp_path, whole, capsys):
    run = tmp_path / "run"
    arguments = place().command(run)
    codes = []

    def second(step, batch):
        if step == 2 and not codes:
            codes.append("begun")
            codes.append(train(arguments))

    assert train(arguments, change=second) == 0
    assert codes == ["begun", 2]
    assert "another run (process" in capsys.readouterr().err
    assert_equal_runs(run, whole)
