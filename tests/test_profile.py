"""Profiles that can be read, and the names that operations have in them."""

import jax
import numpy as np
from converted import loaded, published_and_converted
from PIL import Image
from test_pipeline import photograph

from faithdiff_jax.cli.exit_codes import BAD_INPUT, DONE
from faithdiff_jax.cli.main import main
from faithdiff_jax.training import profile


def traced(folder):
    return list(folder.rglob("*.xplane.pb"))


def test_operations_have_the_names_of_their_parts():
    model = loaded()
    width = model.config.vae.channels[-1]
    context, pooled = model.encode_text(["the cat"])
    latents, features = np.zeros((1, 8, 8, 4), np.float32), np.zeros((1, 8, 8, width), np.float32)
    params = {name: model.params[name] for name in ("unet", "alignment")}
    ids = np.zeros((1, 6), np.float32)
    program = model.programs.predict_noise.lower(params, latents, np.array([500]), features, context, pooled, ids)
    text = program.as_text(debug_info=True)
    for name in ("down_blocks.0", "down_blocks.1/", "mid_block", "up_blocks.0", "attention", "aligner"):
        assert name in text, name
    assert "decoder" in model.programs.decode.lower(model.params["vae"], latents).as_text(debug_info=True)


def test_restoring_writes_a_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph(16, 16)).save("a.png")
    model = str(published_and_converted()[1])
    words = ["--model", model, "--input", "a.png", "--output", "out", "--steps", "1", "--cache", ""]
    assert main(["restore", *words, "--profile", "profile"]) == DONE
    assert len(traced(tmp_path / "profile")) == 1
    assert (tmp_path / "out" / "a.png").is_file()


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (["restore", "--input", "a", "--output", "b"], ["train", "--config", "a", "--model", "b"]):
        assert main([*command, "--profile", str(tmp_path / "file")]) == BAD_INPUT
        assert "is a file, name a folder" in capsys.readouterr().err


def test_a_few_steps_are_traced(tmp_path):
    steps = profile.Profile(tmp_path / "profile")
    for number in range(1, 8):
        steps.before()
        assert bool(traced(tmp_path / "profile")) == (number > profile.LAST)
        steps.after(jax.numpy.zeros(3))
    steps.close()
    assert len(traced(tmp_path / "profile")) == 1


def test_fewer_steps_than_that_and_none_at_all(tmp_path):
    steps = profile.Profile(tmp_path / "profile")
    for _ in range(3):
        steps.before()
        steps.after(None)
    steps.close()
    assert len(traced(tmp_path / "profile")) == 1
    nothing = profile.Profile(None)
    nothing.before()
    nothing.after(None)
    nothing.close()
