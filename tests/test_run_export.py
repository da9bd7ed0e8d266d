"""A run's export: what trained comes from the checkpoint, all else bit for bit from the model directory."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from converted import published_and_converted

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.training.checkpoints import Checkpoints
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.export import export_run
from faithdiff_jax.training.run_directory import model_config, open_run
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents
from faithdiff_jax.weights.to_torch import to_torch

main = functools.partial(run_command, "convert")

GROUPS = {"all": {"parameters": ["alignment.*"], "learning_rate": 1e-4}}
DATA = {"steps": 600, "batch": 8, "groups": GROUPS, "frozen": ["vae.*"]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """The tiny model with its UNet in half precision."""
    _, converted = published_and_converted()
    folder = tmp_path_factory.mktemp("base") / "model"
    model = ModelDirectory.open(converted)
    parts = {part: model.contents(part) for part in part_names(model.config)}
    parts["unet"] = Contents.of({path: array.astype(np.float16) for path, array in model.arrays("unet")})
    provenance = {"sources": {"sdxl": "somewhere"}}
    ModelDirectory.write(folder, model.config, parts, tokenizers=converted, provenance=provenance)
    return folder


def part_arrays(folder, part: str) -> dict[str, np.ndarray]:
    return dict(ModelDirectory.open(folder).arrays(part))


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(a: np.ndarray, b: np.ndarray, path: str) -> None:
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


def a_run(tmp_path, model_dir, shapes: dict, *, steps=(10,), ema=True, **changes):
    """A run whose checkpoints hold random parameters of these shapes; {step: {"trained": ..., "ema": ...}}."""
    config = from_dict(TrainConfig, DATA | changes, "test")
    states = {}
    with open_run(tmp_path / "run", config, ModelDirectory.open(model_dir)) as run:
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        for step in steps:
            rng = np.random.default_rng(step)
            kinds = ("trained", "ema") if ema else ("trained",)
            state = {
                kind: {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
                for kind in kinds
            }
            states[step] = jax.tree.map(np.asarray, state)
            optimizer = {"mu": state["trained"], "count": jnp.int32(step)}
            checkpoints.save(step, state | {"step": jnp.int32(step), "optimizer": optimizer}, {"position": step})
        checkpoints.close()
    return tmp_path / "run", states


def alignment(model_dir) -> dict:
    """All of the aligner, and one parameter of the UNet."""
    config = ModelDirectory.open(model_dir).config
    shapes = {f"alignment.{path}": shape for path, shape in part_shapes(config, "alignment").items()}
    return shapes | {"unet.conv_in.kernel": part_shapes(config, "unet")["conv_in.kernel"]}


@pytest.mark.parametrize(("ema", "kind"), [(True, "ema"), (False, "trained")])
def test_export(tmp_path, model_dir, monkeypatch, ema, kind):
    run, states = a_run(tmp_path, model_dir, alignment(model_dir), steps=(10, 20))
    monkeypatch.setattr("faithdiff_jax.training.saved_checkpoints.GROUP_BYTES", 20000)  # several groups
    output = tmp_path / "out" / "model"
    saved = export_run(run, output, ema=ema)
    assert (saved.step, saved.kind) == (20, kind)
    assert ModelDirectory.open(output).config == ModelDirectory.open(model_dir).config
    for part in part_names(ModelDirectory.open(output).config):
        before, after = part_arrays(model_dir, part), part_arrays(output, part)
        assert before.keys() == after.keys()
        for path, array in after.items():
            assert_same(array, states[20][kind].get(f"{part}.{path}", before[path]), f"{part}.{path}")
    assert part_arrays(output, "unet")["conv_in.kernel"].dtype == np.float32
    assert part_arrays(output, "unet")["conv_in.bias"].dtype == np.float16
    old, new = contents(model_dir), contents(output)
    untouched = {name for name in old if name.startswith(("vae", "text", "lq", "tokenizer"))}
    assert len(untouched) > 8
    assert all(new[name] == old[name] for name in untouched)
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    to_torch(output, tmp_path / "back.safetensors")


def test_provenance(tmp_path, model_dir):
    run, _ = a_run(tmp_path, model_dir, alignment(model_dir))
    export_run(run, tmp_path / "model")
    data = yaml.safe_load((tmp_path / "model" / "config.yaml").read_text(encoding="utf-8"))
    assert data["provenance"]["run"] == {
        "directory": str(run),
        "step": 10,
        "parameters": "ema",
        "parts": ["unet", "alignment"],
    }
    before = yaml.safe_load((model_dir / "config.yaml").read_text(encoding="utf-8"))
    assert data["provenance"]["model"] == {"directory": str(model_dir), "provenance": before["provenance"]}


def test_another_step_and_dtype(tmp_path, model_dir):
    run, states = a_run(tmp_path, model_dir, alignment(model_dir), steps=(10, 20))
    export_run(run, tmp_path / "model", step=10, dtype=jnp.bfloat16)
    for path, array in part_arrays(tmp_path / "model", "alignment").items():
        assert_same(array, states[10]["ema"][f"alignment.{path}"].astype(jnp.bfloat16), path)


def test_a_run_without_an_average(tmp_path, model_dir):
    run, states = a_run(tmp_path, model_dir, alignment(model_dir), ema=False)
    assert export_run(run, tmp_path / "model").kind == "trained"
    for path, array in part_arrays(tmp_path / "model", "alignment").items():
        assert_same(array, states[10]["trained"][f"alignment.{path}"], path)
    data = yaml.safe_load((tmp_path / "model" / "config.yaml").read_text(encoding="utf-8"))
    assert data["provenance"]["run"]["parameters"] == "trained (the run keeps no EMA)"


def kernels(model_dir) -> dict[str, tuple[int, ...]]:
    """The kernels of the UNet's attention: plain ones and stacked ones."""
    shapes = part_shapes(ModelDirectory.open(model_dir).config, "unet")
    found = {path: shape for path, shape in shapes.items() if ".attn" in path and ".to_" in path and "kernel" in path}
    assert {len(shape) for shape in found.values()} >= {3}
    return found


def test_lora_is_merged(tmp_path, model_dir):
    adapted = kernels(model_dir)
    shapes = alignment(model_dir)
    for path, (*stack, inputs, outputs) in adapted.items():
        shapes |= {f"lora.unet.{path}.a": (*stack, inputs, 2), f"lora.unet.{path}.b": (*stack, 2, outputs)}
    run, states = a_run(tmp_path, model_dir, shapes, lora={"rank": 2, "alpha": 3.0})
    export_run(run, tmp_path / "model")
    before, after = part_arrays(model_dir, "unet"), part_arrays(tmp_path / "model", "unet")
    assert before.keys() == after.keys()
    ema = states[10]["ema"]
    for path, array in after.items():
        if path in adapted:
            a, b = (ema[f"lora.unet.{path}.{side}"].astype(np.float64) for side in "ab")
            wanted = before[path].astype(np.float64) + 3.0 / 2 * np.einsum("...ir,...ro->...io", a, b)
            assert array.dtype == np.float32
            assert np.abs(array - wanted).max() <= 1e-6 * np.abs(wanted).max(), path
            assert np.abs(array - before[path]).max() > 0.1
        else:
            assert_same(array, ema.get(f"unet.{path}", before[path]), path)


def test_overrides_and_fresh_parts(tmp_path, model_dir):
    """Another aligner, which trained but for one bias, and a new LQ encoder that never trained."""
    changes = {"model": {"alignment": {"layers": 1}}, "fresh": ["alignment", "lq_encoder"]}
    config = model_config(from_dict(TrainConfig, DATA | changes, "test"), ModelDirectory.open(model_dir))
    shapes = part_shapes(config, "alignment")
    frozen = next(path for path in shapes if path.endswith("bias"))
    trained = {f"alignment.{path}": shape for path, shape in shapes.items() if path != frozen}
    run, states = a_run(tmp_path, model_dir, trained, **changes)
    export_run(run, tmp_path / "model")
    assert ModelDirectory.open(tmp_path / "model").config == config != ModelDirectory.open(model_dir).config
    after = part_arrays(tmp_path / "model", "alignment")
    assert {path: array.shape for path, array in after.items()} == shapes
    for path, array in after.items():
        if path != frozen:
            assert_same(array, states[10]["ema"][f"alignment.{path}"], path)
    vae = part_arrays(model_dir, "vae")
    for path, array in part_arrays(tmp_path / "model", "lq_encoder").items():
        assert_same(array, vae[f"encoder.{path}"], path)
    FaithDiff.load(tmp_path / "model")


def refused(message: str, run, output, **options) -> None:
    before = sorted(output.parent.rglob("*")) if output.parent.exists() else None
    with pytest.raises(InputError, match=message) as caught:
        export_run(run, output, **options)
    assert "\n" not in str(caught.value)
    assert (sorted(output.parent.rglob("*")) if output.parent.exists() else None) == before


def test_refused(tmp_path, model_dir):
    shapes = alignment(model_dir)
    run, _ = a_run(tmp_path, model_dir, shapes, steps=(10, 20))
    output = tmp_path / "out" / "model"
    refused("no such run directory", tmp_path / "gone", output)
    refused("not a run directory", model_dir.parent, output)
    refused(r"has no checkpoint of step 15 \(there: 10, 20\)", run, output, step=15)
    refused("exists already", run, model_dir)
    (run / "checkpoints" / "20" / "state" / "manifest.ocdbt").unlink()
    refused("20: damaged", run, output)
    largest = max((run / "checkpoints" / "10").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(b"")
    output.parent.mkdir()
    refused("10: damaged", run, output, step=10)
    shutil.rmtree(run / "checkpoints")
    refused("has no checkpoint yet", run, output)


def test_another_model_directory_is_refused(tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    run, _ = a_run(tmp_path, model, alignment(model_dir))
    with (model / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("\n")
    refused("is not what .*/run started from", run, tmp_path / "out")
    shutil.rmtree(model)
    refused("no such model directory", run, tmp_path / "out")


def test_the_model_directory_was_upgraded_in_its_place(tmp_path, model_dir):
    model = shutil.copytree(model_dir, tmp_path / "model")
    run, _ = a_run(tmp_path, model, alignment(model_dir))
    file = model / "config.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    data["provenance"]["upgraded_from"] = {"format": 1, "digest": ModelDirectory.open(model).digest}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    export_run(run, tmp_path / "out")
    assert (tmp_path / "out" / "unet.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.new.kernel": (2, 2)}, r"unknown unet\.new\.kernel \(2, 2\)"),
        ({"lora.unet.conv_in.kernel.a": (2, 2)}, r"unknown lora\.unet\.conv_in\.kernel\.a"),
        ({"unet.conv_in.kernel": (2, 2)}, r"unet: mis-shaped conv_in\.kernel \(2, 2\), wanted \(3, 3, 4, 16\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, model_dir, change, message):
    run, _ = a_run(tmp_path, model_dir, alignment(model_dir) | change)
    refused(message, run, tmp_path / "out")


def test_parameters_that_are_not_finite_are_named(tmp_path, model_dir):
    run, states = a_run(tmp_path, model_dir, alignment(model_dir))
    names = sorted(states[10]["ema"])[:7]
    spoilt = {kind: dict(arrays) for kind, arrays in states[10].items()}
    for name in names:
        spoilt["ema"][name] = spoilt["ema"][name] * np.float32(np.nan)
    config = from_dict(TrainConfig, DATA, "test")
    checkpoints = Checkpoints(run / "checkpoints", config.checkpoint)
    checkpoints.save(20, jax.tree.map(jnp.asarray, spoilt) | {"step": jnp.int32(20)}, {"position": 20})
    checkpoints.close()
    refused(rf"not written, NaN or infinite are {names[0]}, {names[1]}", run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", ema=False).kind == "trained"


def test_an_aligner_of_another_size_that_is_not_fresh(tmp_path, model_dir):
    run, _ = a_run(tmp_path, model_dir, {"unet.conv_in.bias": (16,)}, model={"alignment": {"layers": 3}})
    refused("alignment: m", run, tmp_path / "out")


def test_command(tmp_path, model_dir, capsys):
    run, _ = a_run(tmp_path, model_dir, alignment(model_dir), steps=(10, 20))
    arguments = ["--run", str(run), "--output"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"step 20, averaged parameters\nwrote {tmp_path / 'a'}\n"
    (tmp_path / "elsewhere").mkdir()
    arguments[1] = str(tmp_path / "elsewhere" / ".." / run.relative_to(tmp_path))
    assert main([*arguments, str(tmp_path / "b"), "--no-ema", "--step", "10"]) == 0
    assert capsys.readouterr().out == f"step 10, parameters\nwrote {tmp_path / 'b'}\n"
    assert part_arrays(tmp_path / "a", "alignment").keys() == part_arrays(tmp_path / "b", "alignment").keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run=gone"], "gone: no such run directory"),
        (["--run=gone", "--seed=1"], "--seed goes with --sdxl only"),
        (
            ["--run=gone", "--to-torch=m"],
            "one of --sdxl, --run, --rrdbnet, --to-torch, --upgrade is needed, not --run and --to-torch",
        ),
        (["--to-torch=m", "--no-ema"], "--no-ema goes with --run only"),
        (["--sdxl=s", "--step=3"], "--step goes with --run only"),
        (["--run=gone", "--step=-3"], "'-3': must be a whole number, 0 or more"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, capsys):
    try:
        code = main([*arguments, "--output=no/such/folder"])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
