"""Model directories: what is stored comes back, in any dtype and on any devices; a damaged one says what is wrong."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from faithdiff_jax.errors import InputError
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, numbered, part_names, part_shapes
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import model_directory, safetensors_format
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.stored_files import Contents

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


NAMES = part_names(CONFIG)


@functools.cache
def arrays(part: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in part_shapes(CONFIG, part).items()}


def write(output, tokenizers, changes=None, **options) -> ModelDirectory:
    """Write the model with some parts changed, and open it."""
    parts = {
        part: Contents.of(array) for part, array in ({part: arrays(part) for part in NAMES} | (changes or {})).items()
    }
    options = {"provenance": {"sources": {"sdxl": "somewhere"}}} | options
    ModelDirectory.write(output, CONFIG, parts, tokenizers=tokenizers, **options)
    return ModelDirectory.open(output)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def stored(tokenizers, tmp_path_factory):
    return write(tmp_path_factory.mktemp("stored") / "model", tokenizers, defaults={"guidance": 1.0})


@pytest.fixture
def folder(stored, tmp_path):
    """A copy to damage."""
    return shutil.copytree(stored.path, tmp_path / "model")


def refused(folder, message: str, **options) -> str:
    with pytest.raises(InputError, match=message) as caught:
        ModelDirectory.open(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names():
    assert part_names(FaithDiffConfig()) == (
        *("unet", "alignment", "lq_encoder", "vae"),
        *("text_encoder", "text_encoder_2"),
    )
    assert numbered("tokenizer", 1) == ("tokenizer",)


def test_what_was_written_comes_back(stored, tokenizers):
    assert stored.config == CONFIG
    assert stored.defaults == {"guidance": 1.0}
    assert stored.provenance["sources"] == {"sdxl": "somewhere"}
    files = {path.relative_to(stored.path).as_posix() for path in stored.path.rglob("*") if path.is_file()}
    assert files == {*stored.files, "config.yaml", "README.md"}
    assert {f"{part}.safetensors" for part in NAMES} <= files
    for path in (tokenizers / "tokenizer").iterdir():
        assert (stored.tokenizers[0] / path.name).read_bytes() == path.read_bytes()
    assert ModelDirectory.open(str(stored.path)).digest == stored.digest


def test_the_card_has_front_matter(stored):
    _, front, text = (stored.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-to-image"
    count = sum(array.size for array in arrays("unet").values())
    assert f"| `unet` | {count:,} | float32 |" in text


@pytest.mark.parametrize("part", NAMES)
def test_parameters_come_back(stored, part):
    loaded = flatten(stored.load(part))
    wanted = arrays(part)
    assert loaded.keys() == wanted.keys()
    for path, array in wanted.items():
        assert isinstance(loaded[path], jax.Array)
        np.testing.assert_array_equal(loaded[path], array)
    paths = list(wanted)[::-1]
    read = list(stored.arrays(part, paths))
    assert [path for path, _ in read] == paths
    assert all(np.array_equal(array, wanted[path]) for path, array in read)


def test_the_library_reads_the_files(stored):
    loaded = safetensors.numpy.load_file(stored.path / "alignment.safetensors")
    assert loaded.keys() == arrays("alignment").keys()
    assert all(np.array_equal(loaded[path], array) for path, array in arrays("alignment").items())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", [None, jnp.bfloat16, jnp.float32])
def test_dtypes(tmp_path, tokenizers, dtype, wanted):
    model = write(tmp_path / "model", tokenizers, {"alignment": arrays("alignment", dtype)})
    loaded = flatten(model.load("alignment", dtype=wanted))
    for path, array in arrays("alignment", dtype).items():
        expected = array.astype(wanted or dtype)
        assert loaded[path].dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(loaded[path]), expected)
    assert model.specs("alignment")["blocks.0.ln_1.bias"] == (np.dtype(dtype), (32,))


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_sharding(stored, axis, dtype):
    mesh = jax.make_mesh((4, 2), ("copy", "split"), axis_types=(AxisType.Auto,) * 2)
    whole, split = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), (None,) * (axis or 0) + ("split",)))
    shardings = {
        path: split if axis is not None and len(shape) == 2 else whole
        for path, shape in part_shapes(CONFIG, "alignment").items()
    }
    loaded = flatten(stored.load("alignment", dtype=dtype, sharding=shardings))
    for path, array in arrays("alignment").items():
        assert loaded[path].sharding == shardings[path]
        np.testing.assert_array_equal(loaded[path], array.astype(dtype or np.float32))
    alike = flatten(stored.load("alignment", sharding=whole))
    assert all(array.sharding == whole for array in alike.values())


def test_every_byte_is_read_once_and_only_where_it_is_held(stored, monkeypatch):
    """Eight devices, two of which this process "has": half of each split array is read, copies share a reading."""
    read: list[int] = []

    def counting(path, place, index):
        array = read_slice(path, place, index)
        read.append(array.nbytes)
        return array

    read_slice = safetensors_format.read_slice
    monkeypatch.setattr(safetensors_format, "read_slice", counting)
    mesh = jax.make_mesh((2, 4), ("copy", "split"), axis_types=(AxisType.Auto,) * 2)
    shardings = {
        path: NamedSharding(
            mesh, PartitionSpec(*("split" if n % 4 == 0 and i == axis else None for i, n in enumerate(shape)))
        )
        for path, shape in part_shapes(CONFIG, "unet").items()
        for axis in [int(np.argmax(shape))]
    }
    total = sum(array.nbytes for array in arrays("unet").values())
    stored.load("unet", sharding=shardings)
    assert sum(read) == total
    assert len(read) > 3 * len(shardings)

    # As one of four processes would, whose two devices hold the same quarter.
    read.clear()
    make = jax.make_array_from_callback

    def of_one_process(shape, sharding, callback):
        held = [sharding.devices_indices_map(shape)[device] for device in mesh.devices[:, 1]]
        assert len(held) == 2
        for index in held:
            callback(index)
        return make(
            shape,
            sharding,
            lambda index: np.zeros([len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]),
        )

    monkeypatch.setattr(jax, "make_array_from_callback", of_one_process)
    stored.load("unet", sharding=shardings)
    copied = sum(array.nbytes for path, array in arrays("unet").items() if shardings[path].is_fully_replicated)
    assert sum(read) == (total - copied) / 4 + copied
    assert copied < total / 20


def test_not_a_model_directory(tmp_path):
    refused(tmp_path / "gone", "no such model directory")
    refused(tmp_path, r"not a model directory, it has no config\.yaml")


def test_an_earlier_format_names_the_command(folder):
    (folder / "config.yaml").write_text("format: 1\n", encoding="utf-8")
    refused(folder, r"earlier version \(format 1\); convert it with: faithdiff convert --upgrade \S*model --output")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format is 3, this version reads format 2"),
        ({"format": None}, "format is None"),
        ({"format": True}, "format is True"),
        ({"model": None}, "model is None: must be a mapping"),
        ({"restore": [1]}, r"restore is \[1\]: must be a mapping"),
        ({"provenance": "me"}, "provenance is 'me': must be a mapping"),
        ({"extra": 1}, r"unknown key extra \(known there: format, model, restore, files, provenance\)"),
        ({"model": {"unet": {"chanels": [1]}}}, r"unknown key unet\.chanels"),
        ({"model": {"alignment": {"mixing": "some"}}}, "mixing is 'some': must be one of"),
        ({"files": None}, "files is None: must be a mapping"),
        ({"files": {}}, r"files lists no alignment\.safetensors, no .*no tokenizer/"),
        ({"files": {"../x.safetensors": {}}}, r"files has \.\./x\.safetensors: must be"),
        ({"files": {"tokenizer/..": {}}}, r"files has tokenizer/\.\.: must be"),
        ({"files": {"vae.safetensors": 3}}, r"files\.vae\.safetensors must have bytes and sha256"),
        ({"files": {"vae.safetensors": {"bytes": 1.5, "sha256": "0" * 64}}}, r"must have bytes, 0 or more, and 64"),
        ({"files": {"vae.safetensors": {"bytes": True, "sha256": "0" * 64}}}, r"must have bytes, 0 or more, and 64"),
        ({"files": {"vae.safetensors": {"bytes": 1, "sha256": "x"}}}, r"must have bytes, 0 or more, and 64"),
    ],
)
def test_bad_config(folder, change, message):
    path = folder / "config.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8")) | change
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert refused(folder, message).startswith(f"{path}: ")


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(data=st.data())
def test_nonsense_anywhere_in_the_config_is_one_line(stored, tmp_path_factory, data):
    """One value of config.yaml, however deep, is replaced: the model opens, or InputError names the file."""
    config = yaml.safe_load((stored.path / "config.yaml").read_text(encoding="utf-8"))
    node, key = {"": config}, ""
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 4)):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(NONSENSE)
    folder = tmp_path_factory.mktemp("nonsense") / "model"
    folder.mkdir()
    for path in stored.path.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    message = None
    try:
        ModelDirectory.open(folder)
    except InputError as error:
        message = str(error)
    assert message is None or ("\n" not in message and message.startswith(str(folder)))


def test_missing_files_are_all_named(folder):
    (folder / "vae.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer")
    refused(folder, r"incomplete or altered: has no vae\.safetensors; has no tokenizer/merges\.txt; ")


def test_parameters_of_another_architecture(stored):
    wider = dataclasses.replace(CONFIG, alignment=dataclasses.replace(CONFIG.alignment, layers=3))
    with pytest.raises(InputError, match=r"does not fit config\.yaml: missing blocks\.2\.c_fc\.bias \(64,\)") as caught:
        stored.load("alignment", config=wider)
    assert str(caught.value).count("missing") == 12


def test_parts_that_are_not_the_architectures(tmp_path, tokenizers):
    other = arrays("alignment") | {"blocks.0.ln_1.bias": np.zeros(3, np.float32), "more": np.zeros(1, np.float32)}
    del other["blocks.1.ln_2.scale"]
    with pytest.raises(ValueError, match=r"alignment: does not fit") as caught:
        write(tmp_path / "model", tokenizers, {"alignment": other})
    for fault in (
        "missing blocks.1.ln_2.scale (32,)",
        "unknown more (1,)",
        "mis-shaped blocks.0.ln_1.bias (3,), wanted",
    ):
        assert fault in str(caught.value)
    with pytest.raises(ValueError, match=r"parts are .*more"):
        write(tmp_path / "model", tokenizers, {"more": other})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_named(tmp_path, tokenizers, value):
    spoilt = {path: array.copy() for path, array in arrays("vae").items()}
    spoilt["quant_conv.bias"][3] = spoilt["decoder.conv_in.kernel"][1, 2, 0, 1] = value
    message = r"NaN or infinite are vae\.decoder\.conv_in\.kernel, vae\.quant_conv\.bias \(--allow-nonfinite"
    with pytest.raises(InputError, match=message):
        write(tmp_path / "model", tokenizers, {"vae": spoilt})
    assert list(tmp_path.iterdir()) == []
    model = write(tmp_path / "model", tokenizers, {"vae": spoilt}, allow_nonfinite=True)
    np.testing.assert_array_equal(dict(model.arrays("vae"))["quant_conv.bias"], spoilt["quant_conv.bias"])


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_an_incomplete_copy(folder, change):
    change(folder / "alignment.safetensors")
    refused(folder, r"model: incomplete or altered: (has no alignment|alignment\.safetensors has \d+ of \d+ bytes)")


def flip(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_small_models_are_held_to_their_checksums(folder, monkeypatch):
    flip(folder / "unet.safetensors")
    refused(folder, r"model: unet\.safetensors changed or damaged: the checksum is not the one in config\.yaml")
    ModelDirectory.open(folder, verify=False)
    monkeypatch.setattr(model_directory, "CHECKED_BYTES", 1)
    model = ModelDirectory.open(folder)
    flip(folder / "tokenizer/vocab.json")
    with pytest.raises(InputError, match=r"unet\.safetensors, tokenizer/vocab\.json changed"):
        model.verify()
    refused(folder, "changed or damaged", verify=True)


def test_a_file_more_in_a_tokenizer(folder):
    (folder / "tokenizer" / "more.json").write_text("{}")
    refused(folder, r"tokenizer/more\.json is not listed")
    (folder / "tokenizer" / "more.json").unlink()
    (folder / "README.md").write_text("mine")
    (folder / ".gitattributes").write_text("of the hub")
    ModelDirectory.open(folder)


def test_parameters_damaged_after_opening(folder):
    model = ModelDirectory.open(folder)
    path = folder / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"alignment\.safetensors: cut short"):
        model.load("alignment")


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_only_files_of_a_tokenizer_are_copied(tmp_path, tokenizers, kind):
    copy = shutil.copytree(tokenizers, tmp_path / "tokenizers")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    if kind == "link":
        (copy / "tokenizer" / "added_tokens.json").symlink_to(secret)
    else:
        (copy / "tokenizer" / "added_tokens.json").mkdir()
    with pytest.raises(InputError, match=r"added_tokens\.json is (a link to a file outside|no file)"):
        write(tmp_path / "model", copy)
    assert not (tmp_path / "model").exists()


def test_links_of_the_hubs_cache_are_copied(tmp_path, tokenizers):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(tokenizers / "tokenizer", blobs)
    (snapshot / "tokenizer").mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / "tokenizer" / path.name).symlink_to(f"../../../blobs/{path.name}")
    model = write(tmp_path / "model", snapshot)
    assert not any(path.is_symlink() for path in model.tokenizers[0].iterdir())


def test_unknown_part():
    with pytest.raises(InputError, match="part is 'decoder': must be one of unet, alignment"):
        part_shapes(CONFIG, "decoder")


def test_sizes_that_do_not_go_together():
    odd = dataclasses.replace(CONFIG, alignment=dataclasses.replace(CONFIG.alignment, heads=5))
    with pytest.raises(InputError, match="alignment: heads is 5: must divide"):
        part_shapes(odd, "alignment")
