"""Model directories that share files on the disk."""

import pathlib
import shutil

import pytest
from converted import published_and_converted

from faithdiff_jax.cli.main import main
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.parts import part_names
from faithdiff_jax.weights import sharing
from faithdiff_jax.weights.model_directory import ModelDirectory
from faithdiff_jax.weights.sharing import check_can_share, share_files


@pytest.fixture
def two(tmp_path):
    """A model directory, and another with a UNet of its own."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(published_and_converted()[1], one)
    stored = ModelDirectory.open(one)
    parts = {part: stored.contents(part) for part in part_names(stored.config)}
    doubled = ((path, 2 * array) for path, array in stored.arrays("unet"))
    parts["unet"] = parts["unet"]._replace(arrays=doubled)
    ModelDirectory.write(other, stored.config, parts, tokenizers=one, provenance={})
    return one, other


def test_what_is_equal_lies_there_once(two):
    one, other = two
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    saved = share_files(other, one)
    files = ModelDirectory.open(other, verify=True).files
    shared = {name for name in files if (one / name).samefile(other / name)}
    assert shared == files.keys() - {"unet.safetensors"}
    assert saved == sum(files[name].bytes for name in shared)
    assert {path: path.read_bytes() for path in before} == before
    assert share_files(other, one) == 0
    shutil.rmtree(one)
    ModelDirectory.open(other, verify=True)


def test_a_damaged_file_is_not_linked_to(two):
    one, other = two
    damaged = bytearray((one / "vae.safetensors").read_bytes())
    damaged[-1] ^= 1
    (one / "vae.safetensors").write_bytes(damaged)
    with pytest.raises(InputError, match=r"vae\.safetensors changed or damaged"):
        share_files(other, one)
    ModelDirectory.open(other, verify=True)


def test_a_disk_without_links(two, monkeypatch):
    one, other = two

    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(sharing.os, "link", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Invalid cross-device link\)"):
        share_files(other, one)
    ModelDirectory.open(other, verify=True)


def test_another_disk_is_refused_beforehand(two, monkeypatch):
    one, other = two
    stat = pathlib.Path.stat

    class Elsewhere:
        st_dev = -1

    monkeypatch.setattr(pathlib.Path, "stat", lambda path, **more: Elsewhere() if path == one else stat(path, **more))
    monkeypatch.setattr(ModelDirectory, "open", lambda *_, **__: None)
    with pytest.raises(InputError, match="is on another disk than"):
        check_can_share(other.parent / "new" / "model", one)


def test_command(tmp_path, capsys):
    published, one = published_and_converted()
    new, flags = tmp_path / "new", ["convert", "--sdxl", str(published.sdxl), "--vae", str(published.vae_folder)]
    assert main([*flags, "--output", str(new), "--share", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert not new.exists()
    assert main([*flags, "--output", str(new), "--share", str(shutil.copytree(one, tmp_path / "one"))]) == 0
    assert "GB of it are those of" in capsys.readouterr().out
    assert (new / "vae.safetensors").samefile(tmp_path / "one" / "vae.safetensors")
    assert not (new / "lq_encoder.safetensors").samefile(tmp_path / "one" / "lq_encoder.safetensors")
    assert main(["convert", "--to-torch", str(one), "--output", "a.bin", "--share", str(one)]) == 2
    assert "--share goes with --sdxl or --run or --upgrade only" in capsys.readouterr().err
