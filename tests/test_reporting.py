"""What a run writes of itself, read back from its files."""

import contextlib
import json
import math
import re
import struct
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from faithdiff_jax.errors import InputError
from faithdiff_jax.training import reporting as watch_module
from faithdiff_jax.training.config import WatchConfig
from faithdiff_jax.training.reporting import Watch, timed
from faithdiff_jax.training.run_log import steps_logged

PICTURE = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)


def watch(folder, *, first=0, steps=100, is_main=True, flops=2e12, **config):
    return Watch(
        WatchConfig(**{"every": 5, **config}),
        folder,
        steps=steps,
        first_step=first,
        batch=8,
        flops_per_step=flops,
        devices=4,
        is_main=is_main,
    )


def metrics(loss=0.5, **more):
    return {
        "loss": loss,
        "gradient_norm": 2 * loss,
        "gradient_norm/unet": loss,
        "learning_rate/unet": 1e-5,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "losses": np.full(4, loss, np.float32),
        "timesteps": np.array([0, 99, 100, 999], np.int32),
        **more,
    }


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def events(folder) -> list:
    """Every event of the folder in TensorBoard's order; its record format is length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def scalars(folder) -> dict[str, dict[int, float]]:
    """Tag -> step -> value as TensorBoard shows them: a START event purges its step and all after it."""
    shown: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.session_log.status:
            shown = {tag: {s: v for s, v in values.items() if s < event.step} for tag, values in shown.items()}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_an_interval_is_written_with_its_means(tmp_path):
    with watch(tmp_path) as run:
        for step in range(1, 11):
            run.update(step, metrics(loss=step, **{"learning_rate/unet": step * 1e-5}))
        written = lines(tmp_path)  # before the end: nothing waits to be flushed
    assert [line["step"] for line in written] == [5, 10]
    assert written == lines(tmp_path)
    first, second = written
    assert (first["loss"], second["loss"]) == (3, 8)
    assert (second["gradient_norm"], second["gradient_norm/unet"]) == (16, 8)
    assert second["learning_rate/unet"] == pytest.approx(1e-4)
    assert (second["skipped"], second["skipped_in_a_row"]) == (0, 0)
    assert second["images_per_second"] > 0
    shown = scalars(tmp_path)
    assert shown["loss"] == {5: 3, 10: 8}
    assert shown.keys() == (first.keys() | second.keys()) - {"step"}
    assert shown["gradient_norm/unet"] == {5: 3, 10: 8}


def test_loss_by_timestep(tmp_path):
    with watch(tmp_path, every=2) as run:
        for step, losses in ((1, [1.0, 3.0, 5.0, 7.0]), (2, [2.0, 2.0, math.nan, 9.0])):
            run.update(step, metrics(losses=np.array(losses, np.float32)))
    (line,) = lines(tmp_path)
    buckets = {name: value for name, value in line.items() if name.startswith("loss_by_timestep/")}
    assert buckets == {
        "loss_by_timestep/000-099": 2.0,  # of 1, 3, 2 and 2
        "loss_by_timestep/100-199": 5.0,
        "loss_by_timestep/900-999": 8.0,
    }


def test_steps_that_were_left_out_do_not_spoil_the_means(tmp_path):
    with watch(tmp_path, every=3) as run:
        run.update(1, metrics(loss=1.0))
        run.update(2, metrics(loss=math.nan, gradient_norm=math.inf, skipped=1, skipped_in_a_row=1))
        run.update(3, metrics(loss=3.0, skipped=1))
        for step in (4, 5, 6):
            run.update(step, metrics(loss=math.nan, skipped=step - 2, skipped_in_a_row=step - 3))
    first, second = lines(tmp_path)
    assert (first["loss"], first["gradient_norm"], first["skipped"], first["skipped_in_a_row"]) == (2, 4, 1, 0)
    assert "loss" not in second
    assert (second["skipped"], second["skipped_in_a_row"]) == (4, 3)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_rates_leave_out_the_first_step_and_pauses(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch_module.time, "perf_counter", lambda: clock.now)
    with watch(tmp_path, peak_tflops=5.0) as run:
        for step in range(1, 11):
            clock.now += 600 if step == 1 else 2  # the first compiles
            if step in (3, 5, 6):
                with run.pause():
                    clock.now += 100
            run.update(step, metrics())
    for line in lines(tmp_path):
        assert line["images_per_second"] == pytest.approx(4)  # 8 in 2 seconds
        assert line["mfu"] == pytest.approx(0.05)  # 1e12 FLOPs a second of 4 devices times 5e12


def test_no_utilisation_without_a_known_peak(tmp_path):
    for name, config, flops in (("device", {}, 2e12), ("model", {"peak_tflops": 5.0}, None)):
        with watch(tmp_path / name, flops=flops, **config) as run:
            for step in range(1, 6):
                run.update(step, metrics())
        assert "mfu" not in lines(tmp_path / name)[0]


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    with watch(tmp_path) as run:
        for step in range(1, 14):
            run.update(step, metrics(loss=1.0))
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 13]  # what was left is written at the end
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 15, "lo')  # killed while it wrote
    with watch(tmp_path, first=10) as run:
        for step in range(11, 16):
            run.update(step, metrics(loss=2.0))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 1), (10, 1), (15, 2)]
    assert scalars(tmp_path)["loss"] == {5: 1, 10: 1, 15: 2}


def test_a_run_that_starts_over_keeps_the_old_log_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with watch(tmp_path) as run:
            for step in range(1, 6):
                run.update(step, metrics(loss=loss))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 3)]
    for number, loss in ((1, 1), (2, 2)):
        (line,) = (tmp_path / f"metrics-{number}.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["loss"] == loss
    assert scalars(tmp_path)["loss"] == {5: 3}


def test_checkpoints_are_noted(tmp_path):
    assert steps_logged(tmp_path) == (0, False)
    with watch(tmp_path) as run:
        for step in range(1, 6):
            run.update(step, metrics())
        assert steps_logged(tmp_path) == (5, False)
        run.saved(4)
    assert steps_logged(tmp_path) == (5, True)
    with watch(tmp_path, first=4):
        assert steps_logged(tmp_path) == (4, True)
    (tmp_path / "metrics.jsonl").write_text('[\n{"step": "x"}\n{"step": [1]}\n\xff\n{"loss": 1}\n' + "[" * 100_000)
    assert steps_logged(tmp_path) == (0, False)


def test_what_takes_long_says_so(monkeypatch, caplog):
    caplog.set_level("INFO", "faithdiff_jax")
    monkeypatch.setattr(watch_module, "STILL_EVERY", 0.01)
    with timed("thinking"):
        while len(caplog.records) < 3:
            time.sleep(0.01)
    first, second, *_, last = [record.getMessage() for record in caplog.records]
    assert first == "thinking"
    assert re.fullmatch(r"thinking: \d+ s so far", second)
    assert re.fullmatch(r"thinking: done in \d+\.\d s", last)


def test_the_last_interval_is_written_though_it_is_short(tmp_path):
    with watch(tmp_path, steps=7) as run:
        for step in range(1, 8):
            run.update(step, metrics(loss=step))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 3), (7, 6.5)]


def test_validation_is_written_everywhere(tmp_path, capsys):
    with watch(tmp_path) as run:
        run.validation(40, {"psnr": 21.5, "ssim": 0.6, "sharpness": math.inf}, PICTURE)
    assert lines(tmp_path) == [{"step": 40, "validation/psnr": 21.5, "validation/ssim": 0.6}]
    assert scalars(tmp_path)["validation/psnr"] == {40: 21.5}
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "validation" / "00000040.png")), PICTURE)
    (image,) = [value.image for event in events(tmp_path) for value in event.summary.value if value.HasField("image")]
    assert (image.height, image.width) == (12, 20)
    assert "psnr 21.5" in capsys.readouterr().out


def test_the_bar_shows_what_matters(tmp_path, capsys):
    with watch(tmp_path, first=50, peak_tflops=5.0) as run:
        for step in range(51, 101):
            run.update(step, metrics(loss=0.25, skipped=3, **{"learning_rate/encoder": 5e-6}))
    shown = capsys.readouterr().err
    for text in ("100/100", "loss=0.2500", "rate=1.0e-05,5.0e-06", "skipped=3", "images/s=", "MFU="):
        assert text in shown


def test_other_processes_are_silent(tmp_path, capsys):
    with watch(tmp_path / "run", is_main=False) as run:
        for step in range(1, 11):
            run.update(step, metrics())
        run.validation(10, {"psnr": 20.0}, PICTURE)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_steps_come_in_order(tmp_path):
    with watch(tmp_path, first=10, steps=12) as run:
        for step in (10, 13):
            with pytest.raises(ValueError, match=f"step is {step}: must be from 11 to 12"):
                run.update(step, metrics())
        run.update(11, metrics())
        with pytest.raises(ValueError, match="step is 11: must be from 12 to 12"):
            run.update(11, metrics())


def test_tensorboard_can_be_left_out(tmp_path):
    with watch(tmp_path, tensorboard=False) as run:
        run.validation(1, {"psnr": 20.0}, PICTURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "validation"]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*: the run's log cannot be written"), watch(tmp_path / "file"):
        pass


@pytest.mark.parametrize("part", ["_log", "_events"])
def test_a_full_disk_ends_with_one_line(tmp_path, part):
    """/dev/full takes no byte: as on a full disk, the error comes where the writing is, and at closing once more."""
    full = open("/dev/full", "w" if part == "_log" else "wb")  # noqa: SIM115

    def train():
        with watch(tmp_path) as run:
            holder, name = (run, "_log") if part == "_log" else (run._events._records, "_writer")
            getattr(holder, name).close()
            setattr(holder, name, full)
            for step in range(1, 6):
                run.update(step, metrics())

    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        train()
    with contextlib.suppress(OSError):
        full.close()


class FakeWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.axes = [], [], [], []

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            log=self.logged.append,
            finish=lambda exit_code: self.finished.append(exit_code),
            define_metric=lambda name, step_metric: self.axes.append((name, step_metric)),
        )

    def Image(self, picture):
        return ("image", picture.shape)


def test_wandb_gets_the_same_and_goes_on_with_its_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with watch(tmp_path, wandb_project="photos") as run:
        for step in range(1, 6):
            run.update(step, metrics())
        run.validation(5, {"psnr": 20.0}, PICTURE)
    assert wandb.logged[:2] == lines(tmp_path)
    assert wandb.logged[2] == {"step": 5, "validation/pictures": ("image", PICTURE.shape)}
    assert wandb.axes == [("*", "step")]

    with pytest.raises(ZeroDivisionError), watch(tmp_path, first=5, wandb_project="photos"):
        raise ZeroDivisionError
    with watch(tmp_path, wandb_project="photos"):  # from the start: another run
        pass
    assert wandb.finished == [0, 1, 0]
    assert [options["project"] for options in wandb.started] == ["photos"] * 3
    first, resumed, new = (options["id"] for options in wandb.started)
    assert first == resumed != new
    assert wandb.started[1]["resume"] == "allow"


def test_wandb_is_asked_for_only_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with watch(tmp_path):
        pass
    with pytest.raises(InputError, match=r"watch.wandb_project is 'photos': needs the package wandb"):
        watch(tmp_path, wandb_project="photos")
