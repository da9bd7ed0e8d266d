"""Model directories of format 1, written here as version 0.1.0 wrote them, in the format of today."""

import functools
import hashlib
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp
from tiny import TOKENIZER_VOCAB_SIZE, write_tokenizer

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import part_names, part_shapes
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import upgrade as upgrade_module
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.upgrade import upgrade

MODEL = FaithDiffConfig(
    unet=UNetConfig(
        channels=(8,),
        resnets_per_level=1,
        transformer_depth=(0,),
        mid_transformer_depth=1,
        heads=(1,),
        context_dim=8,
        pooled_dim=None,
        norm_groups=4,
    ),
    vae=VAEConfig(channels=(8,), resnets_per_level=1, norm_groups=4),
    alignment=AlignmentConfig(layers=1, heads=1, norm_groups=4),
    text_encoders=(
        TextEncoderConfig(
            vocab_size=TOKENIZER_VOCAB_SIZE, width=8, layers=1, heads=1, mlp_width=8, end_token=TOKENIZER_VOCAB_SIZE - 1
        ),
    ),
)
# As published: halves, with the VAE in float32; bfloat16 is what runs could export.
DTYPES = {"vae": np.dtype(np.float32), "alignment": np.dtype(jnp.bfloat16)}
PROVENANCE = {"package": "faithdiff-jax 0.1.0", "sources": {"sdxl": "somewhere"}}


@functools.cache
def arrays(part: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    dtype = DTYPES.get(part, np.dtype(np.float16))
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in part_shapes(MODEL, part).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A small model of version 0.1.0, with its checksums."""
    folder = tmp_path_factory.mktemp("old") / "model"
    write_tokenizer(folder / "tokenizer")
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        for part in part_names(MODEL):
            ocp.save((folder / "params" / part).absolute(), dict(arrays(part)))
    for marker in folder.glob("params/*/commit_success.txt"):
        marker.unlink()
    parts = part_names(MODEL)
    data = {
        "format": 1,
        "model": to_dict(MODEL),
        "sizes": {part: sum(path.stat().st_size for path in files(folder / "params" / part)) for part in parts},
        "checksums": {f"params/{part}": checksum(folder / "params" / part) for part in parts}
        | {"tokenizer": checksum(folder / "tokenizer")},
        "provenance": PROVENANCE,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


@pytest.fixture
def old(written, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "old")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksum(folder: Path) -> str:
    """Version 0.1.0's: over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for path in files(folder):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def change_config(old: Path, **changes: object) -> None:
    """Replace sections of config.yaml; None removes one."""
    data = yaml.safe_load((old / "config.yaml").read_text(encoding="utf-8")) | changes
    text = yaml.safe_dump({key: value for key, value in data.items() if value is not None})
    (old / "config.yaml").write_text(text, encoding="utf-8")


def test_parameters_stay_bit_for_bit(written, tmp_path, monkeypatch):
    monkeypatch.setattr(upgrade_module, "GROUP_BYTES", 2000)  # several groups
    upgrade(written, tmp_path / "new", defaults={"guidance": 1.5})
    model = ModelDirectory.open(tmp_path / "new", verify=True)
    assert model.config == MODEL
    assert model.defaults == {"guidance": 1.5}
    digest = hashlib.sha256((written / "config.yaml").read_bytes()).hexdigest()
    assert model.provenance == PROVENANCE | {"upgraded_from": {"format": 1, "digest": digest}}
    for part in part_names(MODEL):
        found = dict(model.arrays(part))
        assert found.keys() == arrays(part).keys()
        for path, array in arrays(part).items():
            assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
            assert found[path].tobytes() == array.tobytes(), f"{part}.{path}"
    for file in files(written / "tokenizer"):
        assert (tmp_path / "new" / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_command(written, tmp_path, capsys):
    command = ["--upgrade", written, "--output", tmp_path / "new", "--default", "scale=2"]
    assert run_command("convert", list(map(str, command))) == 0
    assert "wrote" in capsys.readouterr().out
    assert ModelDirectory.open(tmp_path / "new").defaults == {"scale": 2}
    command[1] = tmp_path / "new"
    assert run_command("convert", list(map(str, [*command[:3], tmp_path / "newer"]))) == 2
    assert "must be of a model directory of format 1, its format is 2" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


def flip(old: Path) -> None:
    """Change the last byte of the UNet's largest file, which Orbax does not notice."""
    largest = max(files(old / "params" / "unet"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)


def cut(old: Path) -> None:
    """As a copy that broke off, of a model too large for checksums."""
    change_config(old, checksums=None)
    largest = max(files(old / "params" / "unet"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def remove(old: Path, name: str) -> None:
    change_config(old, checksums=None)
    shutil.rmtree(old / name)


def garble(old: Path) -> None:
    change_config(old, checksums=None)
    (metadata,) = (old / "params" / "unet").rglob("_METADATA")
    metadata.write_bytes(b"\xff" + metadata.read_bytes()[1:])


def resize(old: Path) -> None:
    model = to_dict(MODEL)
    change_config(old, model=model | {"unet": model["unet"] | {"resnets_per_level": 2}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"params/unet was changed or is damaged: its checksum is not the one in config\.yaml"),
        (cut, r"is incomplete: params/unet has \d+ bytes of \d+"),
        (garble, r"params/unet: cannot be read \("),
        (resize, r"params/unet: does not fit config\.yaml: missing "),
        (functools.partial(remove, name="params/vae"), r"is incomplete: params/vae has 0 bytes of"),
        (functools.partial(remove, name="tokenizer"), r"tokenizer"),
        (functools.partial(change_config, format=3), "its format is 3"),
        (functools.partial(change_config, model=None), "must be of a model directory of format 1"),
        (lambda old: (old / "config.yaml").unlink(), r"config\.yaml"),
    ],
    ids=["flip", "cut", "garble", "resize", "no part", "no tokenizer", "format", "no model", "no config"],
)
def test_what_is_damaged_or_incomplete_is_named_in_one_line(old, tmp_path, damage, message):
    damage(old)
    with pytest.raises(InputError, match=message) as caught:
        upgrade(old, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_existing_output_is_left_alone(written, tmp_path):
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        upgrade(written, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
