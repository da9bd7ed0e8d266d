"""The autoencoder's training: its loss by hand, that it learns and repeats, and what it writes."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from flax import nnx
from pictures import coordinates, write
from test_initialisation import CONFIG

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.config import load, to_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.parts import flatten, unflatten
from faithdiff_jax.models.vae import VAE, VAEConfig
from faithdiff_jax.training import autoencoder
from faithdiff_jax.training.autoencoder import AutoencoderConfig
from faithdiff_jax.weights.initialisation import fresh_params
from faithdiff_jax.weights.model_directory import ModelDirectory

VAE_CONFIG = CONFIG.vae
RUN = AutoencoderConfig(
    model="model.yaml", tokenizers=".", steps=40, batch=4, crop=16, learning_rate=5e-3, warmup=5, seed=1
)


@pytest.fixture(scope="module")
def photographs():
    """Smooth shades with an edge, of two sizes."""
    rows, columns = np.mgrid[:48, :40]
    first = np.stack([4 * rows, 5 * columns, np.where(rows > columns, 220, 30)], axis=-1)
    return [first.astype(np.uint8), first[::-1, ::-1].swapaxes(0, 1).astype(np.uint8)]


@pytest.fixture(scope="module")
def initial():
    return fresh_params(CONFIG, seed=0)["vae"]


@pytest.fixture(scope="module")
def trained(initial, photographs):
    return autoencoder.train(RUN, VAE_CONFIG, initial, photographs)


class KnownVAE:
    """Answers with given arrays."""

    def __init__(self, moments, decoded):
        self._moments, self._decoded = moments, decoded

    def moments(self, images):
        return self._moments

    def sample(self, moments, noise):
        assert moments is self._moments
        return noise

    def decode(self, latents):
        return self._decoded


def test_the_loss_by_hand(rng):
    images, decoded = (rng.normal(size=(2, 8, 6, 3)).astype(np.float32) for _ in range(2))
    mean, log_variance = (rng.normal(size=(2, 4, 3, 4)).astype(np.float32) for _ in range(2))
    config = AutoencoderConfig(model="", tokenizers="", steps=200, edge_weight=0.3, kl_weight=0.01)
    moments = jnp.concatenate([mean, log_variance], axis=-1)
    loss, squared = autoencoder.autoencoder_loss(config, KnownVAE(moments, decoded), images, jnp.zeros((2, 4, 3, 4)))

    error = decoded - images
    down, across = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    edges = np.abs(down).mean() + np.abs(across).mean()
    # The textbook's: 1/2 (variance + mean^2 - 1 - ln variance).
    divergence = ((np.exp(log_variance) + mean**2 - 1 - log_variance) / 2).mean()
    assert loss == pytest.approx(np.abs(error).mean() + 0.3 * edges + 0.01 * divergence, rel=1e-5)
    assert squared == pytest.approx((error**2).mean(), rel=1e-5)


def test_it_learns(initial, trained, photographs):
    before = np.mean(autoencoder.reconstruction_psnr(VAE_CONFIG, initial, photographs))
    after = np.mean(autoencoder.reconstruction_psnr(VAE_CONFIG, trained, photographs))
    assert after > before + 3
    assert trained.keys() == initial.keys()
    still = [path for path in trained if np.array_equal(trained[path], initial[path])]
    assert still == []


def test_it_repeats(initial, trained, photographs):
    again = autoencoder.train(RUN, VAE_CONFIG, initial, photographs)
    for path, array in trained.items():
        assert np.array_equal(array, again[path]), path


def test_latents_get_unit_variance(trained, photographs):
    scale = autoencoder.latent_scale(RUN, VAE_CONFIG, trained, photographs)
    config = VAEConfig(channels=(8, 16), resnets_per_level=1, norm_groups=8, scaling_factor=scale)
    rng = np.random.default_rng(7)
    crops = autoencoder.random_crops(photographs, 256, RUN.crop, rng)
    vae = nnx.merge(nnx.split(VAE(config, rngs=nnx.Rngs(0)))[0], unflatten(trained))
    noise = rng.standard_normal((256, 8, 8, 4), np.float32)
    latents = vae.encode(jnp.asarray(crops / np.float32(127.5) - 1), jnp.asarray(noise))
    assert np.std(latents) == pytest.approx(1, abs=0.05)


def test_crops_are_parts_of_the_photographs():
    picture = coordinates(40, 30)
    picture[..., 2] = 255
    rng = np.random.default_rng(0)
    crops = autoencoder.random_crops([picture], 200, 8, rng)
    assert crops.shape == (200, 8, 8, 3)
    corners, blues, directions = set(), set(), set()
    for square in crops:
        # The plane of 255 is blue; the two others say, in either order and direction, where each pixel was.
        blue = next(c for c in range(3) if (square[..., c] == 255).all())
        planes = [square[..., c].astype(int) for c in range(3) if c != blue]
        axes = []
        for plane in planes:
            down, across = (np.unique(np.diff(plane, axis=axis)).tolist() for axis in (0, 1))
            assert (down, across) in (([0], [1]), ([0], [-1]), ([1], [0]), ([-1], [0]))
            axes.append(down == [0])
            directions.add((*down, *across))
        assert sorted(axes) == [False, True]
        corners.add(tuple(plane.min() for plane in planes))
        blues.add((blue, *axes))
    assert len(corners) > 100
    assert len(blues) == 6
    # Rows that run upwards come from a quarter turn or two, never from mirroring.
    assert directions == {(0, 1), (0, -1), (1, 0), (-1, 0)}


def test_small_and_damaged_photographs_are_named(tmp_path):
    write(tmp_path / "small.png", coordinates(12, 40))
    with pytest.raises(InputError, match=r"small.png: 40x12 pixels, each side must have at least 16"):
        autoencoder.load_photographs(tmp_path, 16)
    (tmp_path / "small.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"small.png: not a picture"):
        autoencoder.load_photographs(tmp_path, 16)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("steps=0", "steps is 0: must be a whole number from 1 to 10000000"),
        ("warmup=40", "warmup is 40: must be below steps, 40"),
        ("learning_rate=0", "learning_rate is 0.0: must be above 0 and at most 10"),
        ("kl_weight=-1", "kl_weight is -1.0: must be from 0 to 1000000"),
        ("seed=-1", "seed is -1"),
        ("learning_rate=.nan", "learning_rate is nan"),
        ("edge_weight=.inf", "edge_weight is inf"),
        ("batch=1000000", "batch is 1000000"),
        ("stepz=1", "unknown key stepz"),
    ],
)
def test_bad_values_are_named(tmp_path, fault, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(RUN)))
    with pytest.raises(InputError, match=message):
        load(AutoencoderConfig, path, [fault])


def test_a_crop_that_the_levels_do_not_divide(initial, photographs):
    config = AutoencoderConfig(model="", tokenizers="", steps=200, crop=15)
    with pytest.raises(InputError, match="crop is 15: must be a multiple of the VAE's factor, 2"):
        autoencoder.train(config, VAE_CONFIG, initial, photographs)


def test_a_loss_that_is_not_finite_ends_the_training(initial, photographs):
    broken = initial | {"decoder.conv_out.bias": np.full(3, np.nan, np.float32)}
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        autoencoder.train(RUN, VAE_CONFIG, broken, photographs)


@pytest.fixture
def workplace(tmp_path, photographs):
    """A config folder and two folders of photographs."""
    for name in ("tokenizer", "tokenizer_2"):
        tiny.write_tokenizer(tmp_path / "configs" / name)
    (tmp_path / "configs" / "model.yaml").write_text(yaml.safe_dump(to_dict(CONFIG)))
    (tmp_path / "configs" / "run.yaml").write_text(yaml.safe_dump(to_dict(RUN)))
    for i, photograph in enumerate(photographs):
        write(tmp_path / "photos" / f"{i}.png", photograph)
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    paths = {"--config": "configs/run.yaml", "--data": "photos", "--output": "model"}
    return [*(word for flag, path in paths.items() for word in (flag, str(folder / path))), *more]


def test_the_command_writes_a_model(workplace, capsys):
    held_out = "--held-out", str(workplace / "photos")
    assert run_command("autoencoder", command(workplace, *held_out, "steps=6", "warmup=1")) == 0
    config = ModelDirectory.open(workplace / "model").config
    assert config.vae.scaling_factor != CONFIG.vae.scaling_factor
    assert config.unet == CONFIG.unet
    vae = flatten(ModelDirectory.open(workplace / "model").load("vae"))
    initial = fresh_params(CONFIG, RUN.seed)
    assert not np.array_equal(vae["encoder.conv_in.kernel"], initial["vae"]["encoder.conv_in.kernel"])
    for path, array in flatten(ModelDirectory.open(workplace / "model").load("lq_encoder")).items():
        assert np.array_equal(array, vae[f"encoder.{path}"])
    for path, array in flatten(ModelDirectory.open(workplace / "model").load("unet")).items():
        assert np.array_equal(array, initial["unet"][path])
    provenance = yaml.safe_load((workplace / "model" / "config.yaml").read_text())["provenance"]
    assert provenance["autoencoder"]["steps"] == 6
    assert provenance["autoencoder"]["held_out_psnr"] > 5
    assert "held_out_psnr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--output", "photos"), "photos: exists already"),
        (("--config", "configs/none.yaml"), "none.yaml': no such file"),
        (("crop=41",), "each side must have at least 41"),
    ],
)
def test_bad_input_ends_before_the_training(workplace, capsys, monkeypatch, change, message):
    monkeypatch.setattr(autoencoder, "train", lambda *arguments: pytest.fail("the training began"))
    if len(change) == 2:
        change = change[0], str(workplace / change[1])
    assert run_command("autoencoder", command(workplace, *change)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (workplace / "model").exists()
