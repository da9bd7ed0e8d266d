"""Published weight files: every format gives the same tensors, and every damaged one a line that says so."""

import builtins
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faithdiff_jax.errors import InputError
from faithdiff_jax.weights import safetensors_format, tensor_files
from faithdiff_jax.weights.safetensors_format import write_tensors
from faithdiff_jax.weights.tensor_files import Renamed, open_tensors, with_current_vae_names, with_text_model_names

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 5), "a.bias": (3,), "scalar": (), "conv": (2, 3, 1, 1)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_holds(source, wanted: dict[str, torch.Tensor]) -> None:
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        array = source.get(name)
        assert array.dtype == source.dtypes()[name] == as_numpy(tensor).dtype
        np.testing.assert_array_equal(array, as_numpy(tensor))
        array[...] = 0  # ours to change, and nobody else sees it
        np.testing.assert_array_equal(source.get(name), as_numpy(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors(DTYPES[dtype]), path)
    assert_holds(open_tensors(path), tensors(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_torch_1.6"])
def test_torch_file(tmp_path, dtype, zipped, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 8)  # so that the file is opened anew
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(DTYPES[dtype]), path, _use_new_zipfile_serialization=zipped)
    assert_holds(open_tensors(path), tensors(DTYPES[dtype]))


def test_torch_file_with_parameters_and_views(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"p": torch.nn.Parameter(torch.ones(3)), "t": torch.arange(6.0).reshape(2, 3).t()}, path)
    source = open_tensors(path)
    np.testing.assert_array_equal(source.get("t"), [[0, 3], [1, 4], [2, 5]])
    assert source.shapes() == {"p": (3,), "t": (3, 2)}


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", safetensors.torch.save_file), ("bin", torch.save)])
def test_shards(tmp_path, suffix, save):
    names = list(tensors())
    files = {name: f"model-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        save({name: tensors()[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / f"model.{suffix}.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    source = open_tensors(index)
    assert {file.name for file in source.files} == set(files.values())
    assert_holds(source, {name: tensors()[name] for name in source.shapes()})

    files["a.bias"] = files["a.weight"]
    index.write_text(json.dumps({"weight_map": {**files, "extra": files["scalar"]}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.bias is not in .*extra is not in .*a\.bias in .* is not in the index"):
        open_tensors(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", r"not JSON \(line 1"),
        ('{"weight_map": 3}', "no weight_map of tensor names"),
        ('{"weight_map": {"a": "../other.bin"}}', r"lists \.\./other\.bin: must be weight files beside it"),
        ('{"weight_map": {"a": "gone.bin"}}', "gone.bin: no such file"),
        (
            '{"weight_map": {"a": "model.safetensors.index.json"}}',
            r"lists model\.safetensors\.index\.json: must be weight",
        ),
        ('{"weight_map": {"a": 3, "b": null}}', "no weight_map of tensor names to file names"),
        ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "occurs twice"),
        ('{"weight_map": {"a": ".."}}', r"lists \.\.: must be"),
        ('{"weight_map": {"a": "/etc/x.bin"}}', "must be weight files beside it"),
        ('{"weight_map": {"a": "x\\u001b[31m.bin"}}', r"lists x\\x1b\[31m\.bin: must be"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "no weight_map of tensor names"),
    ],
)
def test_bad_index(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_tensors(index)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 something else entirely", "not a safetensors file"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + b"\0" * 15, "cut short"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})[:-9], "cut short"),
        (
            header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}) + b"\0" * 16,
            r"\(Error while deserializing",
        ),
        (header({"a": {"dtype": "F32", "shape": [4]}}), "header is of another kind"),
        (header({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}) + b"\0" * 4, "a has dtype F8_E4M3"),
    ],
    ids=["empty", "zip", "tensors_cut", "header_cut", "sizes_disagree", "no_offsets", "eight_bits"],
)
def test_bad_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)


def entry(start, end, *, dtype="U8", shape=None) -> dict:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE_HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "invalid offset"),
    "gap": ({"a": entry(0, 4), "b": entry(5, 9)}, 9, "invalid offset"),
    "bytes_at_the_end": ({"a": entry(0, 4)}, 9, "not fully covered"),
    "beyond_the_file": ({"a": entry(0, 2**60)}, 4, "cut short"),
    "huge_count": ({"a": entry(0, 4, shape=[2**62, 2**62])}, 4, "overflow"),
    "negative": ({"a": entry(-4, 0, shape=[4])}, 4, "invalid"),
    "boolean_size": ({"a": entry(0, 1, shape=[True])}, 1, "of another kind"),
    "fraction": ({"a": entry(0, 4, shape=[4.0])}, 4, "of another kind"),
    "no_number": ({"a": {"dtype": "U8", "shape": "x", "data_offsets": "ab"}}, 4, "of another kind"),
    "infinity": (b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 4]}}', 4, "Infinity is not a number"),
    "twice": (b'{"a": {}, "a": {}}', 4, "'a' occurs twice"),
    "deep": (b'{"a":' + b"[" * 100_000, 4, "nested too deep"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", 4, "5,000 digits"),
    "control": ({"\x1b[31m": entry(0, 4, dtype="F8_E4M3")}, 4, r"\\x1b\[31m has dtype"),
    "not_utf8": (b'{"\xff": {}}', 4, "not UTF-8"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_safetensors(tmp_path, case):
    entries, size, message = HOSTILE_HEADERS[case]
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(InputError, match=message) as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def opened_or_one_line(path) -> None:
    """Everything that the file says it holds can be read; or InputError, in one printable line that names it."""
    message = str(path)
    try:
        source = open_tensors(path)
        for name, shape in source.shapes().items():
            assert source.get(name).shape == shape
    except InputError as error:
        message = str(error)
    assert message.startswith(str(path.parent))
    assert message.isprintable()


@settings(max_examples=200)
@given(data=st.data())
def test_nonsense_in_a_header(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "nonsense.safetensors"
    entries = {"a": entry(0, 4), "b": entry(4, 12, dtype="F32", shape=[2, 1])}
    if data.draw(st.booleans()):
        entries[data.draw(st.sampled_from("abc"))] = data.draw(NONSENSE)
    else:
        node = entries[data.draw(st.sampled_from("ab"))]
        node[data.draw(st.sampled_from(sorted(node)))] = data.draw(NONSENSE)
    text = json.dumps(entries).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + bytes(12))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, 4 * len(content)))])
    opened_or_one_line(path)


@settings(max_examples=100)
@given(index=NONSENSE | st.fixed_dictionaries({"weight_map": NONSENSE | st.dictionaries(st.text(), st.text())}))
def test_nonsense_in_an_index(tmp_path_factory, index):
    path = tmp_path_factory.getbasetemp() / "nonsense.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    opened_or_one_line(path)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]),
    size=st.integers(0, 200_000),
    value=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e4, -1e-4]),
    at=st.floats(0, 1, exclude_max=True),
)
def test_infinite_and_nan_are_seen_wherever_they_are(dtype, size, value, at):
    array = np.ones(size, dtype)
    if size:
        array[int(at * size)] = value
    assert safetensors_format.is_finite(array) == bool(np.isfinite(array).all())


@pytest.mark.parametrize(
    "index", [np.s_[:, :, :], np.s_[1:3, :, :], np.s_[:, 2:4, :], np.s_[1:2, :, 1:3], np.s_[0:0, :, :]]
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_slices(tmp_path, rng, index, dtype):
    array = rng.normal(size=(3, 4, 5)).astype(dtype)
    specs = {"odd": (np.dtype(np.uint8), (3,)), "a": (array.dtype, array.shape), "one": (array.dtype, ())}
    tensors = (("odd", np.zeros(3, np.uint8)), ("a", array), ("one", np.ones((), dtype)))
    path = tmp_path / "model.safetensors"
    found = write_tensors(path, specs, tensors)
    assert found == safetensors_format.record(path)
    places = safetensors_format.read_header(path)
    part = safetensors_format.read_slice(path, places["a"], index)
    np.testing.assert_array_equal(part, array[index])
    assert part.flags.owndata or part.base.base is None
    assert safetensors_format.read_slice(path, places["one"], ()) == 1


class Harmful:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "FaithDiff.bin"
    save({"a": Harmful()}, path)
    with pytest.raises(InputError, match="only plain tensors are loaded"):
        open_tensors(path)
    assert os.listdir() == ["FaithDiff.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds list, a state dict"),
        ({"a": torch.zeros(2), "step": 3}, "step is int"),
        ({"a": {"b": torch.zeros(2)}}, "a is dict"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"a is torch\.complex64"),
        ({"a": torch.eye(2).to_sparse()}, r"a is torch\.float32, torch\.sparse_coo"),
    ],
    ids=["list", "number", "nested", "complex", "sparse"],
)
def test_only_a_state_dict_will_do(tmp_path, content, message):
    path = tmp_path / "model.bin"
    torch.save(content, path)
    with pytest.raises(InputError, match=message):
        open_tensors(path)


@pytest.mark.parametrize("kept", [0, 100, 1000])
def test_truncated_torch_file(tmp_path, kept):
    path = tmp_path / "model.bin"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"not a file of torch\.save, or a damaged one") as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)


def test_torch_file_without_torch(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    torch.save(tensors(), path)
    real_import = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(InputError, match=r"needs PyTorch: pip install 'faithdiff-jax\[torch\]'"):
        open_tensors(path)


def test_unknown_kind_and_missing_file(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"x")
    with pytest.raises(InputError, match=r"weights are \.safetensors, \.bin"):
        open_tensors(tmp_path / "weights.gguf")
    with pytest.raises(InputError, match="no such file"):
        open_tensors(tmp_path / "gone.bin")


def test_old_vae_names(tmp_path):
    old = {f"decoder.mid_block.attentions.0.{name}.weight": torch.zeros(2, 2) for name in ("query", "key", "value")}
    old |= {"decoder.mid_block.attentions.0.proj_attn.bias": torch.zeros(2), "decoder.conv_in.bias": torch.zeros(1)}
    safetensors.torch.save_file(old, tmp_path / "vae.safetensors")
    names = set(with_current_vae_names(open_tensors(tmp_path / "vae.safetensors")).shapes())
    inner = {f"decoder.mid_block.attentions.0.{name}" for name in ("to_q.weight", "to_k.weight", "to_v.weight")}
    assert names == inner | {"decoder.mid_block.attentions.0.to_out.0.bias", "decoder.conv_in.bias"}


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_names(tmp_path, prefix):
    given = {f"{prefix}final_layer_norm.bias": torch.zeros(2), "text_projection.weight": torch.zeros(2)}
    given[f"{prefix}embeddings.position_ids"] = torch.arange(3)
    torch.save(given, tmp_path / "model.bin")
    source = with_text_model_names(open_tensors(tmp_path / "model.bin"))
    assert source.shapes() == {"text_model.final_layer_norm.bias": (2,), "text_projection.weight": (2,)}


def test_two_names_for_one_tensor(tmp_path):
    safetensors.torch.save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds both \S+ and \S+, which are the same"):
        Renamed(open_tensors(tmp_path / "model.safetensors"), lambda name: "same")


def test_written_files_are_those_of_the_library(tmp_path, rng):
    arrays = {
        "wide": rng.normal(size=(3, 4)).astype(np.float32),
        "view": rng.normal(size=(4, 3)).astype(np.float32).T,
        "half": rng.normal(size=5).astype(np.float16),
        "brain": rng.normal(size=(2, 1)).astype(ml_dtypes.bfloat16),
    }
    specs = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    path = tmp_path / "model.safetensors"
    write_tensors(path, specs, arrays.items())
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(as_numpy(loaded[name]), array)
    with pytest.raises(ValueError, match="came where wide"):
        write_tensors(tmp_path / "other", specs, reversed(arrays.items()))
