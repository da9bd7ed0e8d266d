"""Model directories: what is stored comes back, in any dtype and on any devices; a damaged one says what is wrong."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, numbered, part_names, part_shapes
from faithdiff_jax.models.unet import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import model_directory

CONFIG = FaithDiffConfig(
    unet=UNetConfig(
        channels=(16, 32),
        resnets_per_level=1,
        transformer_depth=(0, 2),
        mid_transformer_depth=1,
        heads=(2, 2),
        context_dim=8,
        pooled_dim=None,
        norm_groups=8,
    ),
    vae=VAEConfig(channels=(8, 32), resnets_per_level=1, norm_groups=8),
    text_encoders=(TextEncoderConfig(vocab_size=20, width=8, layers=2, heads=2, mlp_width=8, end_token=19),),
)


def arrays(part: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in part_shapes(CONFIG, part).items()}


@pytest.fixture(scope="module")
def stored_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "model"
    folder.mkdir()
    for part in part_names(CONFIG):
        model_directory.save_part(folder, part, arrays(part).items())
    (folder / "tokenizer").mkdir()
    model_directory.write_config(folder, CONFIG, {"sources": {"sdxl": "somewhere"}})
    return folder


@pytest.fixture
def model(stored_model, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stored_model, tmp_path / "model")


def test_names():
    assert part_names(FaithDiffConfig()) == (
        *("unet", "alignment", "lq_encoder", "vae"),
        *("text_encoder", "text_encoder_2"),
    )
    assert numbered("tokenizer", 1) == ("tokenizer",)


def test_config_comes_back(stored_model):
    assert model_directory.read_config(stored_model) == CONFIG
    assert model_directory.read_config(str(stored_model)) == CONFIG
    data = yaml.safe_load((stored_model / "config.yaml").read_text(encoding="utf-8"))
    assert data["provenance"] == {"sources": {"sdxl": "somewhere"}}


@pytest.mark.parametrize("part", part_names(CONFIG))
def test_parameters_come_back(stored_model, part):
    loaded = flatten(model_directory.load_params(stored_model, part))
    wanted = arrays(part)
    assert loaded.keys() == wanted.keys()
    for path, array in wanted.items():
        assert isinstance(loaded[path], jax.Array)
        np.testing.assert_array_equal(loaded[path], array)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [None, jnp.bfloat16, jnp.float32])
def test_dtypes(tmp_path, stored, wanted):
    given = arrays("alignment", stored)
    model_directory.save_part(tmp_path, "alignment", given.items())
    loaded = flatten(model_directory.load_params(tmp_path, "alignment", config=CONFIG, dtype=wanted))
    for path, array in given.items():
        expected = array.astype(wanted or stored)
        assert loaded[path].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(loaded[path]), expected)
    assert model_directory.stored(tmp_path, "alignment")["blocks.0.ln_1.bias"] == (np.dtype(stored), (32,))


def test_sharding(stored_model):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "x"))
    shapes = part_shapes(CONFIG, "alignment")
    shardings = {path: split if len(shape) == 2 else whole for path, shape in shapes.items()}
    one = flatten(model_directory.load_params(stored_model, "alignment", sharding=whole))
    each = flatten(model_directory.load_params(stored_model, "alignment", dtype=jnp.bfloat16, sharding=shardings))
    for path, array in arrays("alignment").items():
        assert one[path].sharding == whole
        assert each[path].sharding == shardings[path]
        np.testing.assert_array_equal(one[path], array)
        np.testing.assert_array_equal(each[path], array.astype(ml_dtypes.bfloat16))


def test_saving_and_reading_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(model_directory, "GROUP_BYTES", 20_000)
    given = arrays("alignment")
    model_directory.save_part(tmp_path, "alignment", iter(given.items()))
    assert len(list((tmp_path / "params/alignment/state").glob("ocdbt.process_*"))) > 3
    paths = list(given)[::-1]
    read = list(model_directory.load_arrays(tmp_path, "alignment", paths))
    assert [path for path, _ in read] == paths
    for path, array in read:
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, given[path])
    loaded = flatten(model_directory.load_params(tmp_path, "alignment", config=CONFIG))
    for path, array in given.items():
        np.testing.assert_array_equal(loaded[path], array)


def test_not_a_model_directory(tmp_path):
    with pytest.raises(InputError, match="no such model directory"):
        model_directory.read_config(tmp_path / "gone")
    with pytest.raises(InputError, match=r"not a model directory, it has no config\.yaml"):
        model_directory.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this version reads format 1"),
        ({"format": None}, "format is None"),
        ({"model": None}, "has no model section"),
        ({"extra": 1}, r"unknown key extra \(known there: format, model, sizes, checksums, provenance\)"),
        ({"model": {"unet": {"chanels": [1]}}}, r"unknown key unet\.chanels"),
        ({"model": {"alignment": {"mixing": "some"}}}, "mixing is 'some': must be one of"),
    ],
)
def test_bad_config(model, change, message):
    path = model / "config.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8")) | change
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        model_directory.read_config(model)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_parts_are_all_named(model):
    shutil.rmtree(model / "params/vae")
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(InputError, match=r"incomplete, it has no params/vae, tokenizer$"):
        model_directory.read_config(model)


def test_parameters_of_another_architecture(model):
    wider = dataclasses.replace(CONFIG, alignment=dataclasses.replace(CONFIG.alignment, layers=3))
    with pytest.raises(
        InputError, match=r"does not fit config\.yaml: missing blocks\.2\.c_fc\.bias \(64,\); .*"
    ) as caught:
        model_directory.load_params(model, "alignment", config=wider)
    assert str(caught.value).count("missing") == 12
    shutil.rmtree(model / "params/alignment")
    other = arrays("alignment") | {"blocks.0.ln_1.bias": np.zeros(3, np.float32), "more": np.zeros(1, np.float32)}
    del other["blocks.1.ln_2.scale"]
    model_directory.save_part(model, "alignment", other.items())
    with pytest.raises(InputError) as caught:
        model_directory.load_params(model, "alignment", config=CONFIG)
    for fault in (
        "missing blocks.1.ln_2.scale (32,)",
        "unknown more (1,)",
        "mis-shaped blocks.0.ln_1.bias (3,), wanted",
    ):
        assert fault in str(caught.value)


def data_files(model):
    return sorted((model / "params/alignment/state").glob("**/d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_an_incomplete_copy(model, change):
    change(data_files(model)[-1])
    with pytest.raises(InputError, match=r"model: incomplete, params/alignment has \d+ of \d+ bytes$"):
        model_directory.read_config(model)


def test_small_models_are_held_to_their_checksums(model, monkeypatch):
    tokenizer = model / "tokenizer"
    model_directory.write_config(model, CONFIG, {})
    model_directory.read_config(model)
    file = data_files(model)[-1]
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(InputError, match=r"model: params/alignment was changed or is damaged: its checksum is not"):
        model_directory.read_config(model)
    file.write_bytes(whole)
    model_directory.read_config(model)
    (tokenizer / "more.json").write_text("{}")
    with pytest.raises(InputError, match=r"model: tokenizer was changed or is damaged"):
        model_directory.read_config(model)

    monkeypatch.setattr(model_directory, "CHECKED_BYTES", 1)
    model_directory.write_config(model, CONFIG, {})
    assert "checksums" not in (model / "config.yaml").read_text()


# Of the many arrays Orbax reads at once the first to fail is reported; the others' failures are lost in its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["emptied", "overwritten", "cut"])
def test_damaged_parameters(model, damage):
    folder = model / "params/alignment"
    if damage == "emptied":
        shutil.rmtree(folder)
        folder.mkdir()
    for path in data_files(model)[-1:]:
        size = path.stat().st_size
        path.write_bytes(b"x" * size if damage == "overwritten" else path.read_bytes()[: size // 2])
    with pytest.raises(InputError, match=r"params/alignment: cannot be read, convert the weights again \(") as caught:
        model_directory.load_params(model, "alignment", config=CONFIG)
    assert "\n" not in str(caught.value)


def test_unknown_part():
    with pytest.raises(InputError, match="part is 'decoder': must be one of unet, alignment"):
        part_shapes(CONFIG, "decoder")


def test_sizes_that_do_not_go_together():
    odd = dataclasses.replace(CONFIG, alignment=dataclasses.replace(CONFIG.alignment, heads=5))
    with pytest.raises(InputError, match="alignment: heads is 5: must divide"):
        part_shapes(odd, "alignment")
