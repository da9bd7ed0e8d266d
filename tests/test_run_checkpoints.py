"""Checkpoints: bit-identical on any mesh, whole or absent however a save ends, refused by name if they do not fit."""

import json
import logging
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import simulated
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from faithdiff_jax.errors import InputError
from faithdiff_jax.training import checksums
from faithdiff_jax.training.checkpoints import Checkpoints
from faithdiff_jax.training.config import CheckpointConfig
from faithdiff_jax.training.saved_checkpoints import load_saved, saved_specs, saved_steps, verify

SHAPES = {"unet.conv_in.kernel": (3, 3, 8, 16), "unet.conv_in.bias": (16,), "alignment.proj.kernel": (24, 64)}
DATA = {"epoch": 1, "position": 2**40, "rng": [1, 2], "share": 0.1}
CONFIG = CheckpointConfig(every=10, latest=2)


def mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "fsdp"))


def sharding(over: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Everything that fsdp divides is split."""
    size = over.shape["fsdp"]
    axes = ["fsdp" if length % size == 0 and axis == len(shape) - 1 else None for axis, length in enumerate(shape)]
    return NamedSharding(over, PartitionSpec(*axes))


def optimizer():
    groups = {
        "unet": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
        "alignment": optax.adamw(optax.cosine_decay_schedule(1, 9)),
    }
    return optax.partition(groups, lambda params: {path: path.split(".")[0] for path in params})


def state(over: Mesh, seed: int = 0) -> dict:
    """A train state of random numbers, in every leaf."""
    rng = np.random.default_rng(seed)
    trained = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    tree = {"step": jnp.int32(0), "trained": trained, "ema": trained, "optimizer": optimizer().init(trained)}
    tree |= {"skipped": jnp.int32(0), "skipped_in_a_row": jnp.int32(0)}

    def fill(leaf):
        values = rng.normal(size=leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else rng.integers(1, 2**30)
        return jax.device_put(jnp.asarray(values, leaf.dtype), sharding(over, leaf.shape))

    return jax.tree.map(fill, tree)


def abstract(tree, over: Mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(over, x.shape)), tree)


def host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_same(got, wanted) -> None:
    """The same tree, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def open_checkpoints(folder):
    """Makes `Checkpoints` that are closed at the end."""
    opened = []

    def make(config: CheckpointConfig = CONFIG, at: pathlib.Path = folder) -> Checkpoints:
        opened.append(Checkpoints(at, config))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def test_resharding(folder, open_checkpoints):
    """8 -> 2 -> 4 devices: the bits, the sharding and the data's position."""
    wanted = host(state(mesh(8)))
    tree = state(mesh(8))
    for step, devices in enumerate((2, 4, 1), 1):
        checkpoints = open_checkpoints()
        checkpoints.save(step, tree, DATA)
        checkpoints.wait()
        tree, data = open_checkpoints().restore(step, abstract(tree, mesh(devices)))
        assert_same(tree, wanted)
        assert data == DATA
        assert jax.tree.leaves(tree)[0].committed
        for leaf in jax.tree.leaves(tree):
            assert leaf.sharding == sharding(mesh(devices), leaf.shape)
    kernel = state(mesh(8))["trained"]["alignment.proj.kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8  # it was split


def test_due(open_checkpoints):
    checkpoints = open_checkpoints()
    assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(every=1, latest=1), [9]),
        (CheckpointConfig(every=1, latest=2), [8, 9]),
        (CheckpointConfig(every=1, latest=2, keep_every=4), [4, 8, 9]),
    ],
)
def test_what_is_kept(folder, open_checkpoints, config, kept):
    checkpoints = open_checkpoints(config)
    assert checkpoints.latest_step() is None
    tree = {"trained": {"a": jnp.arange(4.0)}}
    for step in range(1, 10):
        checkpoints.save(step, tree, {"position": step})
        assert checkpoints.latest_step() == step
    checkpoints.wait()
    assert checkpoints.steps() == saved_steps(folder) == kept
    assert open_checkpoints(config).steps() == kept


def test_a_step_is_saved_once(open_checkpoints):
    """The save at the end may be one that was due."""
    checkpoints = open_checkpoints()
    tree = state(mesh(2))
    checkpoints.save(10, tree, DATA)
    checkpoints.save(10, state(mesh(2), seed=1), {})
    assert_same(checkpoints.restore(10, abstract(tree, mesh(2)))[0], tree)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_state_may_be_donated_while_it_is_written(open_checkpoints, devices):
    checkpoints = open_checkpoints(CheckpointConfig(every=1, latest=100))
    tree = {"trained": {"a": jax.device_put(jnp.ones((64, 8192)), sharding(mesh(devices), (64, 8192)))}}
    step = jax.jit(lambda t: jax.tree.map(lambda a: a * 2, t), donate_argnums=0)
    wanted = {}
    for i in range(6):
        wanted[i] = float(tree["trained"]["a"][0, 0])
        checkpoints.save(i, tree, DATA)
        between = step(tree)
        tree = step(between)
        jax.block_until_ready(tree)
        assert between["trained"]["a"].is_deleted()
    checkpoints.wait()
    for i, value in wanted.items():
        array = checkpoints.restore(i, abstract(tree, mesh(devices)))[0]["trained"]["a"]
        assert np.array_equal(array, np.full((64, 8192), value, np.float32)), i


def test_misfits_are_named(open_checkpoints):
    checkpoints = open_checkpoints()
    tree = state(mesh(2))
    checkpoints.save(10, tree, DATA)
    wanted = abstract(tree, mesh(2))
    wanted["trained"] |= {"unet.new": wanted["trained"]["unet.conv_in.bias"]}
    wanted["trained"]["alignment.proj.kernel"] = jax.ShapeDtypeStruct((24, 32), jnp.float32)
    wanted["step"] = jax.ShapeDtypeStruct((), jnp.float32)
    del wanted["skipped"]
    checkpoints.wait()
    with pytest.raises(InputError, match="10: does not fit this configuration") as caught:
        checkpoints.restore(10, wanted)
    for fault in (
        "missing trained/unet.new",
        "unknown skipped",
        "trained/alignment.proj.kernel is float32 (24, 64), wanted float32 (24, 32)",
        "step is int32 (), wanted float32 ()",
    ):
        assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    without_average = abstract(tree, mesh(2))
    del without_average["ema"]
    with pytest.raises(InputError, match=r"unknown ema/alignment\.proj\.kernel"):
        checkpoints.restore(10, without_average)


def test_a_step_that_is_not_there(folder, open_checkpoints):
    checkpoints = open_checkpoints()
    tree = {"a": jnp.arange(4.0)}
    checkpoints.save(10, tree, DATA)
    checkpoints.wait()
    with pytest.raises(InputError, match=r"has no checkpoint of step 7 \(there: 10\)"):
        checkpoints.restore(7, abstract(tree, mesh(1)))
    with pytest.raises(InputError, match=r"has no checkpoint of step 7 \(there: none\)"):
        saved_specs(folder.parent / "gone", 7)


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def halve(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def index_of(step: pathlib.Path, pattern: str) -> pathlib.Path:
    return next(path for path in sorted(step.glob(pattern)) if path.is_file())


def flip(path: pathlib.Path, place: float) -> None:
    """Change one bit of one byte; `place` is from 0 for the first to 1 for the last."""
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(bytes(data))


def cut_last(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# What happens to a step's folder -> the file that the message names.
DAMAGE = {
    "arrays cut": (lambda step: halve(largest(step)), "ocdbt.process_0/d/"),
    "arrays' last byte cut": (lambda step: cut_last(largest(step)), "ocdbt.process_0/d/"),
    "arrays' first byte changed": (lambda step: flip(largest(step), 0), "ocdbt.process_0/d/"),
    "arrays' middle byte changed": (lambda step: flip(largest(step), 0.5), "ocdbt.process_0/d/"),
    "arrays' last byte changed": (lambda step: flip(largest(step), 1), "ocdbt.process_0/d/"),
    "arrays gone": (lambda step: largest(step).unlink(), "ocdbt.process_0/d/"),
    "arrays' metadata cut": (lambda step: halve(step / "state" / "_METADATA"), "state/_METADATA"),
    "shardings gone": (lambda step: (step / "state" / "_sharding").unlink(), "state/_sharding"),
    "shardings changed": (lambda step: flip(step / "state" / "_sharding", 0.5), "state/_sharding"),
    "index gone": (lambda step: shutil.rmtree(step / "state" / "d"), "state/d/"),
    "index changed": (lambda step: flip(index_of(step, "state/d/*"), 0.9), "state/d/"),
    "orbax's manifest gone": (lambda step: (step / "state" / "manifest.ocdbt").unlink(), "state/manifest.ocdbt"),
    "orbax's manifest cut": (lambda step: halve(step / "state" / "manifest.ocdbt"), "state/manifest.ocdbt"),
    "metadata gone": (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA"),
    "metadata's first byte changed": (lambda step: flip(step / "_CHECKPOINT_METADATA", 0), "_CHECKPOINT_METADATA"),
    "metadata's key changed": (lambda step: flip(step / "_CHECKPOINT_METADATA", 0.3), "_CHECKPOINT_METADATA"),
    "metadata's last byte changed": (lambda step: flip(step / "_CHECKPOINT_METADATA", 1), "_CHECKPOINT_METADATA"),
    "state gone": (lambda step: shutil.rmtree(step / "state"), "state/"),
    "a file too many": (lambda step: (step / "state" / "d" / "notes.txt").write_text("x"), "state/d/notes.txt"),
    "a link": (lambda step: (step / "state" / "link").symlink_to("/dev/zero"), "state/link"),
    "a pipe": (lambda step: os.mkfifo(step / "state" / "pipe"), "state/pipe"),
    "checksums gone": (lambda step: (step / "checksums.json").unlink(), "checksums.json"),
    "checksums cut": (lambda step: halve(step / "checksums.json"), "checksums.json"),
    "checksums nested": (lambda step: (step / "checksums.json").write_text("[" * 100_000), "checksums.json"),
    "checksums of another kind": (lambda step: (step / "checksums.json").write_text('{"a": 1}'), "checksums.json"),
}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A folder with checkpoints of steps 1, 2 and 3, and their states."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(every=1, latest=3))
    trees = {step: state(mesh(2), seed=step) for step in (1, 2, 3)}
    for step, tree in trees.items():
        checkpoints.save(step, tree, {"position": step})
    checkpoints.close()
    return folder, trees


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(folder, three_steps, damage):
    """By whoever reads it: a run that opens the folder and resumes, and an export."""
    shutil.copytree(three_steps[0], folder)
    trees = three_steps[1]
    wanted = abstract(trees[1], mesh(4))
    inflict, file = DAMAGE[damage]

    def resume(step: int):
        checkpoints = Checkpoints(folder, CheckpointConfig(every=1, latest=3))
        try:
            return checkpoints.restore(step, wanted)
        finally:
            checkpoints.close()

    inflict(folder / "3")
    for read in (lambda: resume(3), lambda: verify(folder, 3)):
        with pytest.raises(InputError, match=rf"^{folder}/3: damaged \(.*step 2 is whole, remove 3 to") as caught:
            read()
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    inflict(folder / "2")
    with pytest.raises(InputError, match=r"checkpoints/3: damaged \(.*step 1 is whole"):
        verify(folder, 3)
    shutil.rmtree(folder / "3")
    shutil.rmtree(folder / "2")
    tree, data = resume(1)
    assert_same(tree, trees[1])
    assert data == {"position": 1}
    inflict(folder / "1")
    with pytest.raises(InputError, match="no older one is whole"):
        resume(1)


def without_checksums(step: pathlib.Path) -> None:
    """As versions before checksums wrote it."""
    (step / "checksums.json").unlink()
    metadata = json.loads((step / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
    del metadata["custom_metadata"]["checksums"]
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata), encoding="utf-8")


def test_a_checkpoint_of_an_earlier_version(folder, three_steps, caplog):
    """It is read, with one line that says what is not checked; what is cut off is found out all the same."""
    shutil.copytree(three_steps[0], folder)
    for step in (2, 3):
        without_checksums(folder / str(step))
    checkpoints = Checkpoints(folder, CheckpointConfig(every=1, latest=3))
    tree, data = checkpoints.restore(3, abstract(three_steps[1][3], mesh(4)))
    checkpoints.close()
    assert_same(tree, three_steps[1][3])
    assert data == {"position": 3}
    (record,) = [record for record in caplog.records if record.name == "faithdiff_jax"]
    assert record.levelno == logging.WARNING
    assert f"{folder}/3: an earlier version wrote it without checksums" in record.getMessage()
    halve(largest(folder / "3"))
    with pytest.raises(InputError, match=r"checkpoints/3: damaged \(.* of .* bytes.*step 2 is whole"):
        load_state_of(folder, 3, three_steps[1][3])


def test_a_run_killed_before_the_checksums_were_complete(folder, three_steps):
    """Orbax's own late files are in no checksum then; all others are."""
    shutil.copytree(three_steps[0], folder)
    manifest = folder / "3" / "checksums.json"
    complete = json.loads(manifest.read_text(encoding="utf-8"))
    late = {name: complete.pop(name) for name in ("_CHECKPOINT_METADATA", "commit_success.txt")}
    assert len(complete) > 5
    assert all(late.values())
    manifest.write_text(json.dumps(complete), encoding="utf-8")
    (folder / "3" / ".0123.tmp").write_text("half of it")
    assert_same(load_state_of(folder, 3, three_steps[1][3])[0], three_steps[1][3])
    flip(largest(folder / "3"), 0.5)
    with pytest.raises(InputError, match="step 2 is whole"):
        load_state_of(folder, 3, three_steps[1][3])


def load_state_of(folder, step, tree):
    checkpoints = Checkpoints(folder, CheckpointConfig(every=1, latest=3))
    try:
        return checkpoints.restore(step, abstract(tree, mesh(1)))
    finally:
        checkpoints.close()


def test_a_save_does_not_wait_for_the_checksums(folder, open_checkpoints, monkeypatch):
    """They are made in the thread that writes, from what lies on the disk, before the checkpoint gets its name."""
    written, go_on = [], threading.Event()
    plain = checksums.write_checksums

    def slow(path):
        assert go_on.wait(60)
        written.append((path.name, threading.current_thread() is threading.main_thread()))
        plain(path)

    monkeypatch.setattr(checksums, "write_checksums", slow)
    checkpoints = open_checkpoints()
    checkpoints.save(10, state(mesh(2)), DATA)
    assert checkpoints.finished() is None
    assert not (folder / "10").exists()
    go_on.set()
    checkpoints.wait()
    assert checkpoints.finished() == 10
    assert checkpoints.finished() is None
    assert written == [("10.orbax-checkpoint-tmp", False)]
    assert (folder / "10" / "checksums.json").is_file()


def test_what_the_devices_raise_is_no_damage(open_checkpoints, monkeypatch):
    checkpoints = open_checkpoints()
    tree = {"a": jnp.arange(4.0)}
    checkpoints.save(10, tree, DATA)
    checkpoints.wait()

    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr("orbax.checkpoint.v1.load", out_of_memory)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(10, abstract(tree, mesh(1)))


def test_some_arrays_on_the_host(folder, open_checkpoints, monkeypatch):
    checkpoints = open_checkpoints()
    tree = state(mesh(8))
    checkpoints.save(10, tree, DATA)
    checkpoints.wait()
    monkeypatch.setattr("faithdiff_jax.training.saved_checkpoints.GROUP_BYTES", 7000)  # two groups and more
    names = ["ema/unet.conv_in.bias", "trained/alignment.proj.kernel", "trained/unet.conv_in.kernel", "step"]
    loaded = list(load_saved(folder, 10, names))
    assert [name for name, _ in loaded] == names
    wanted = [tree["ema"]["unet.conv_in.bias"], tree["trained"]["alignment.proj.kernel"]]
    wanted += [tree["trained"]["unet.conv_in.kernel"], tree["step"]]
    for (name, array), leaf in zip(loaded, wanted, strict=True):
        assert isinstance(array, np.ndarray), name
        assert array.dtype == leaf.dtype
        assert np.array_equal(array, leaf), name
    assert saved_specs(folder, 10)["trained/alignment.proj.kernel"] == (np.dtype(np.float32), (24, 64))
    assert any("mu" in name and spec[0] == jnp.bfloat16 for name, spec in saved_specs(folder, 10).items())


def test_quiet(folder, capfd, caplog):
    """Nothing of Orbax is printed or logged, and what others log through absl still is."""
    level = logging.getLogger("absl").level
    caplog.set_level(logging.INFO)
    checkpoints = Checkpoints(folder, CONFIG)
    checkpoints.save(10, state(mesh(8)), DATA)
    logging.getLogger("absl").error("of somebody else")
    checkpoints.wait()
    checkpoints.restore(10, abstract(state(mesh(8)), mesh(2)))
    checkpoints.close()
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == ["of somebody else"]
    assert logging.getLogger("absl").filters == []
    assert logging.getLogger("absl").level == level
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    assert capfd.readouterr() == ("", "")


def test_the_folder_vanishes(folder):
    checkpoints = Checkpoints(folder, CONFIG)
    checkpoints.save(10, state(mesh(1)), DATA)
    checkpoints.wait()
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=rf"{folder}: a checkpoint cannot be written \(the folder has vanished\)"):
        checkpoints.save(20, state(mesh(1)), DATA)
    checkpoints.close()
    assert not folder.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file/checkpoints: cannot be written to"):
        Checkpoints(tmp_path / "file" / "checkpoints", CONFIG)
    assert logging.getLogger("absl").filters == []


def test_a_full_disk(folder):
    """A write that fails in the middle: one line, and the checkpoint before it stays."""
    tree = {"trained": {"a": jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)}}
    checkpoints = Checkpoints(folder, CONFIG)
    checkpoints.save(10, tree, DATA)
    checkpoints.wait()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
        for step in (20, 30):
            checkpoints.save(step, tree, DATA)
            with pytest.raises(InputError) as caught:
                checkpoints.wait()
            assert str(caught.value) == (
                f"{folder}: a checkpoint cannot be written (File too large); step 10 is intact"
            )
            assert [path.name for path in folder.iterdir()] == ["10"]  # what was cut short takes no space
        # It is told at the next save, too, or where somebody asks.
        checkpoints.save(40, tree, DATA)
        with pytest.raises(InputError, match="File too large"):
            checkpoints.save(50, tree, DATA)
        assert checkpoints.finished() == 10
        checkpoints.save(40, tree, DATA)
        with pytest.raises(InputError, match="File too large"):
            until_finished(checkpoints)
        assert [path.name for path in folder.iterdir()] == ["10"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.steps() == saved_steps(folder) == [10]
    assert_same(checkpoints.restore(10, abstract(tree, mesh(1)))[0], tree)
    checkpoints.save(50, tree, DATA)
    checkpoints.close()
    assert saved_steps(folder) == [10, 50]


def until_finished(checkpoints: Checkpoints) -> None:
    while checkpoints.finished() is None:
        time.sleep(0.01)


LOOP = """
import sys
import jax, jax.numpy as jnp
from faithdiff_jax.training.checkpoints import Checkpoints
from faithdiff_jax.training.config import CheckpointConfig
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(every=1, latest=3))
step = checkpoints.latest_step() or 0
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
wanted = {"trained": {"a": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=place)}}
if step:
    state, data = checkpoints.restore(step, wanted)
    assert data == {"position": step}
    assert (state["trained"]["a"] == step).all()
while True:
    print("saving", flush=True)
    step += 1
    checkpoints.save(step, {"trained": {"a": jnp.full((256, 1024), step, jnp.float32)}}, {"position": step})
"""


def test_killed_in_the_middle_of_saves(folder, open_checkpoints):
    """Whatever the moment, the newest checkpoint and those before it are whole, and the next process goes on."""
    rng = random.Random(0)
    last, unfinished = 0, 0
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], stdout=subprocess.PIPE, text=True) as process:
            try:
                for _ in range(6):
                    assert process.stdout.readline() == "saving\n"
                time.sleep(rng.random() / 10)
                while attempt % 2 and not list(folder.glob("*tmp*")):
                    pass
            finally:
                process.kill()
                process.wait()
        unfinished += any(not path.name.isdecimal() for path in folder.iterdir())
        steps = saved_steps(folder)
        assert len(steps) >= 3
        assert steps[-1] > last
        last = steps[-1]
        # An older one may have been on its way out.
        for step in steps[-3:]:
            ((_, array),) = load_saved(folder, step, ["trained/a"])
            assert np.array_equal(array, np.full((256, 1024), step, np.float32))
    assert unfinished, "no save was hit: the test proves nothing"
    open_checkpoints()
    assert all(path.name.isdecimal() for path in folder.iterdir())


TWO = """
import sys, os, json
import jax, jax.numpy as jnp, numpy as np
address, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, rank)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from faithdiff_jax.training.checkpoints import Checkpoints
from faithdiff_jax.training.config import CheckpointConfig
mesh = Mesh(np.array(jax.devices()).reshape(1, 4), ("data", "fsdp"))
place = NamedSharding(mesh, PartitionSpec("fsdp"))
whole = np.arange(64, dtype=np.float32).reshape(16, 4)
array = jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])
checkpoints = Checkpoints(folder, CheckpointConfig(every=1, latest=2))
for step in (1, 2, 3):
    checkpoints.save(step, {"trained": {"a": array * step}}, {"position": step})
checkpoints.wait()
assert checkpoints.steps() == [2, 3], checkpoints.steps()
wanted = {"trained": {"a": jax.ShapeDtypeStruct(whole.shape, np.float32, sharding=place)}}
state, data = checkpoints.restore(3, wanted)
assert data == {"position": 3}
for shard in state["trained"]["a"].addressable_shards:
    assert np.array_equal(shard.data, 3 * whole[shard.index])
checkpoints.close()
print("good")
"""


def test_two_processes(folder, open_checkpoints):
    """Each writes and reads its own pieces; one process can read them all afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | simulated(2)
    arguments = [sys.executable, "-c", TWO, address]
    processes = [
        subprocess.Popen(
            [*arguments, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert out.endswith("good\n"), err[-2000:]
    finally:
        for process in processes:
            process.kill()
    whole = np.arange(64, dtype=np.float32).reshape(16, 4)
    wanted = {"trained": {"a": jax.ShapeDtypeStruct((16, 4), np.float32, sharding=sharding(mesh(2), (16, 4)))}}
    assert np.array_equal(open_checkpoints().restore(2, wanted)[0]["trained"]["a"], 2 * whole)
    assert json.loads((folder / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["data"] == {"position": 3}
    assert re.search("process_1", " ".join(str(path) for path in folder.rglob("*")))
