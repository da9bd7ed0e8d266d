"""Compiled programs in a folder: found by the next process, never taken where they would not fit, and never trusted."""

import hashlib
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converted import loaded, published_and_converted
from jax.experimental.compilation_cache import compilation_cache
from pictures import write
from test_pipeline import photograph

from faithdiff_jax.cli.main import main
from faithdiff_jax.inference import executables
from faithdiff_jax.inference.executables import ENDING, Executables
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.inference.precompile import batch_sizes, model_of_shapes, precompile
from faithdiff_jax.inference.programs import Program, Programs
from faithdiff_jax.models.convolution import use_algorithm
from faithdiff_jax.sharding import batch_sharding, make_mesh
from faithdiff_jax.weights.model_directory import ModelDirectory

OPTIONS = RestoreOptions(steps=1, scale=1, batch=2, vae_tile=64)
TILED = OPTIONS.replace(tile=6)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "cache" / "executables"
    executables.keep_in(place)
    yield place
    executables.keep_in(None)


def doubled(x):
    return 2 * x + jnp.sin(x)


def program(traced=None, identity="one"):
    """`doubled`, which says when it is traced."""

    def counted(x):
        if traced is not None:
            traced.append(x.shape)
        return doubled(x)

    return Program(counted, identity=identity)


def test_parameters_of_another_kind_are_another_program(folder):
    def scaled(params, x):
        return x * sum(jax.tree.leaves(params))

    shared = Program(scaled, identity="one")
    one, half = jnp.ones((), jnp.float32), jnp.full((), 0.5, jnp.bfloat16)
    for params, factor in (({"a": one}, 1), ({"a": [one, one]}, 2), ({"a": half}, 0.5), ({"a": one}, 1)):
        np.testing.assert_array_equal(shared(params, jnp.arange(3.0)), factor * np.arange(3))
    assert len(files(folder)) == 3


def test_on_a_mesh(folder):
    mesh, traced = make_mesh(data=4, fsdp=2), []
    x = jax.device_put(np.arange(16, dtype=np.float32), batch_sharding(mesh, 16))
    first, again = (program(traced)(x) for _ in range(2))
    assert len(traced) == 1
    assert first.sharding == again.sharding
    assert len(again.sharding.device_set) == 8
    np.testing.assert_array_equal(first, again)


def files(folder):
    return sorted(folder.glob(f"*{ENDING}"))


def test_neither_traced_nor_compiled_again(folder):
    x, traced = np.arange(5, dtype=np.float32), []
    first = program(traced)(x)
    again = program(traced)(x)
    assert len(traced) == len(files(folder)) == 1
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(again, doubled(x), rtol=1e-6)
    assert not folder.stat().st_mode & 0o077


def test_what_jaxs_own_cache_has_is_kept_whole(folder, tmp_path):
    """A program that was read from there, written down and read again, lacks functions on CPU."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before, x = [getattr(jax.config, name) for name in names], np.ones((64, 64), np.float32)
    function = lambda x: jax.lax.scan(lambda c, k: (jax.nn.softmax(jnp.exp(c) * k[None]), c.sum()), x, x)  # noqa: E731
    try:
        for name, value in zip(names, (str(tmp_path / "jax"), 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        executables.keep_in(None)
        expected, _ = Program(function, identity="one")(x)
        assert list((tmp_path / "jax").iterdir())
        executables.keep_in(folder)
        for _ in range(2):
            found, _ = Program(function, identity="one")(x)
            np.testing.assert_array_equal(found, expected)
        assert len(files(folder)) == 1
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "other",
    [
        lambda: program(identity="two")(np.ones(5, np.float32)),
        lambda: program()(np.ones(6, np.float32)),
        lambda: program()(np.ones(5, np.float16)),
        lambda: program()(jax.device_put(np.ones(5, np.float32), jax.devices()[1])),
    ],
    ids=["identity", "shape", "dtype", "device"],
)
def test_what_is_another_program(folder, other):
    program()(np.ones(5, np.float32))
    other()
    assert len(files(folder)) == 2


def test_what_is_forced_while_tracing_is_another_program(folder):
    program()(np.ones(5, np.float32))
    with use_algorithm("direct"):
        program()(np.ones(5, np.float32))
    assert len(files(folder)) == 2


@pytest.mark.parametrize("version", ["9.9.9", None])
def test_another_version_is_another_program(folder, monkeypatch, version):
    program()(np.ones(5, np.float32))
    executables._environment.cache_clear()
    if version is not None:
        monkeypatch.setattr(jax, "__version__", version)
    program()(np.ones(5, np.float32))
    executables._environment.cache_clear()
    assert len(files(folder)) == (1 if version is None else 2)


def damage(path, how):
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif how == "cut":
        path.write_bytes(content[:-10])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.chmod(0o666)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "writable by all"])
def test_damaged_files_are_compiled_again(folder, how):
    x, traced = np.arange(5, dtype=np.float32), []
    program(traced)(x)
    (path,) = files(folder)
    damage(path, how)
    np.testing.assert_allclose(program(traced)(x), doubled(x), rtol=1e-6)
    assert len(traced) == 2
    program(traced)(x)  # it was written anew
    assert len(traced) == 2


def test_a_folder_that_others_may_write_to_is_not_read(folder):
    x, traced = np.arange(5, dtype=np.float32), []
    program(traced)(x)
    folder.chmod(0o777)
    program(traced)(x)
    assert len(traced) == 2


def test_a_folder_that_cannot_be_written_to_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    executables.keep_in(tmp_path / "file" / "executables")
    try:
        with caplog.at_level("WARNING"):
            for size in (3, 4):
                np.testing.assert_allclose(program()(np.ones(size, np.float32)), doubled(np.ones(size)), rtol=1e-6)
    finally:
        executables.keep_in(None)
    assert [record.message.split(":")[0] for record in caplog.records] == ["compiled programs are not kept"]


def test_a_program_of_another_machine_is_compiled_again(folder):
    """A file in the right place whose machine code this runtime refuses."""
    store = Executables(folder)
    folder.mkdir(parents=True)
    payload = pickle.dumps((b"no executable", None, None, [0]))
    (folder / ("key" + ENDING)).write_bytes(hashlib.sha256(payload).digest() + payload)
    assert store.load("key") is None
    payload = pickle.dumps((b"no executable", None, None, [10**6]))  # a device that is not there
    (folder / ("key" + ENDING)).write_bytes(hashlib.sha256(payload).digest() + payload)
    assert store.load("key") is None


@pytest.mark.parametrize(("options", "caption"), [(OPTIONS, "the cat"), (TILED, ["the cat", "a tail"])])
def test_all_that_restoring_takes_is_compiled_beforehand(folder, monkeypatch, options, caption):
    """Alone and in a batch, in tiles of the encoders: nothing is traced, and pictures are those without a folder."""
    stored, pictures = ModelDirectory.open(published_and_converted()[1]), [photograph(16, 72), photograph(16, 72)]
    blank, model = model_of_shapes(stored), FaithDiff.load(stored)
    blank.programs, model.programs = Programs(blank.config), Programs(model.config)  # with nothing compiled in them
    precompile(blank, [(16, 72)], options, tile_captions=isinstance(caption, list))
    kept = len(files(folder))
    with monkeypatch.context() as patch:
        patch.setattr(Program, "_jit", lambda self: pytest.fail(f"{self.function.__name__} was traced"))
        found = model.restore(pictures, [caption] * 2, options, seeds=[0, 1])
    assert len(files(folder)) == kept >= 8
    executables.keep_in(None)
    for ours, wanted in zip(found, loaded().restore(pictures, [caption] * 2, options, seeds=[0, 1]), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_batches_that_are_compiled():
    assert {most: batch_sizes(most) for most in (1, 2, 3, 4, 6)} == {
        1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6]
    }  # fmt: skip


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")  # JAX's own is left as it is
    write(tmp_path / "in" / "a.png", photograph(16, 24))
    model = str(published_and_converted()[1])
    flags = ["--model", model, "--steps", "1", "--scale", "1", "--cache", "cache"]
    try:
        assert main(["compile", *flags, "--input", "in"]) == 0
        out = capsys.readouterr().out.splitlines()[-1]
        count = len(files(tmp_path / "cache" / "executables"))
        assert out == f"{count} programs compiled, 0 were there: {os.path.join('cache', 'executables')}"
        assert main(["compile", *flags, "--size", "24x16"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("0 programs compiled, ")
    finally:
        executables.keep_in(None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "24"], "argument --size: '24': must be WIDTHxHEIGHT in pixels, up to 16384, as 1024x1024"),
        (["--size", "16384x16384", "--scale", "4"], "scale is 4: turns 16384x16384 into 65536x65536 pixels, at most"),
        (["--size", "24x16", "--cache", ""], "--cache is empty: must be the folder for compiled programs"),
        (["--input", "."], "--input .: has no pictures"),
        (["--size", "24x16", "--steps", "0"], "steps is 0: must be"),
        (
            ["--size", "24x16", "--tile-captions", "--progressive"],
            "progressive is true: takes one caption for a picture",
        ),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compile", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
