"""Fresh model directories: complete, repeatable, starting as stated; and the small model's files fit each other."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from faithdiff_jax.config import load
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.tokenizers import Tokenizers
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.clip import TextEncoderConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.parts import flatten, part_names, part_shapes
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAEConfig
from faithdiff_jax.weights import initialisation, safetensors_format
from faithdiff_jax.weights.model_directory import ModelDirectory

REPOSITORY = Path(__file__).parent.parent
END = tiny.TOKENIZER_VOCAB_SIZE - 1
TEXT = TextEncoderConfig(
    vocab_size=tiny.TOKENIZER_VOCAB_SIZE, width=8, layers=2, heads=2, mlp_width=8, projection=8, end_token=END
)
CONFIG = FaithDiffConfig(
    unet=UNetConfig(
        channels=(16, 32),
        resnets_per_level=1,
        transformer_depth=(0, 1),
        mid_transformer_depth=1,
        heads=(2, 2),
        context_dim=16,
        pooled_dim=8,
        time_id_dim=8,
        norm_groups=8,
    ),
    vae=VAEConfig(channels=(8, 16), resnets_per_level=1, norm_groups=8),
    alignment=AlignmentConfig(heads=2, norm_groups=8),
    text_encoders=(TEXT, TEXT),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("tokenizer", "tokenizer_2"):
        tiny.write_tokenizer(folder / name)
    return folder


@pytest.fixture(scope="module")
def params():
    return initialisation.fresh_params(CONFIG, seed=3)


@pytest.fixture(scope="module")
def model(tokenizers, tmp_path_factory):
    output = tmp_path_factory.mktemp("fresh") / "model"
    initialisation.write_model(CONFIG, initialisation.fresh_params(CONFIG, seed=3), tokenizers, output, {"seed": 3})
    return output


def test_a_fresh_model_is_whole(model, params):
    assert ModelDirectory.open(model).config == CONFIG
    for part in part_names(CONFIG):
        stored = flatten(ModelDirectory.open(model).load(part))
        assert stored.keys() == params[part].keys()
        for path, array in params[part].items():
            assert array.dtype == np.float32
            assert np.array_equal(stored[path], array), path
    ids = Tokenizers.load([model / "tokenizer", model / "tokenizer_2"])(["the cat"])
    assert [row[0, 3] for row in ids] == [END, END]


def test_the_lq_encoder_is_the_vae_encoder(params):
    assert params["lq_encoder"]
    for path, array in params["lq_encoder"].items():
        assert np.array_equal(array, params["vae"][f"encoder.{path}"]), path


def test_what_starts_at_zero(params):
    def zero_kernels(part):
        return {
            re.sub(r"\.\d+\.", ".i.", path)
            for path, array in params[part].items()
            if path.endswith("kernel") and not array.any()
        }

    levels = "down_blocks.i", "up_blocks.i", "mid_block"
    assert zero_kernels("unet") == {
        "conv_out.kernel",
        *(f"{level}.resnets.i.conv2.kernel" for level in levels),
        *(f"{level}.attentions.i.proj_out.kernel" for level in levels),
        *(f"{level}.attentions.i.blocks.ff.proj_out.kernel" for level in levels),
    }
    halves = "encoder", "decoder"
    assert zero_kernels("vae") == {
        "encoder.down_blocks.i.resnets.i.conv2.kernel",
        "decoder.up_blocks.i.resnets.i.conv2.kernel",
        *(f"{half}.mid_block.resnets.i.conv2.kernel" for half in halves),
        *(f"{half}.mid_block.attention.to_out.kernel" for half in halves),
    }
    assert zero_kernels("alignment") == {"condition_embedding.conv_out.kernel", "spatial_ch_projs.kernel"}
    assert not zero_kernels("text_encoder")


def test_latents_start_with_little_noise(params):
    bias = params["vae"]["quant_conv.bias"]
    assert bias.tolist() == [0.0] * 4 + [-6.0] * 4


def test_token_embeddings_have_unit_variance(params):
    first, second = (params[name]["token_embedding.embedding"] for name in ("text_encoder", "text_encoder_2"))
    assert np.std(first) == pytest.approx(1, abs=0.05)
    assert not np.array_equal(first, second)


def test_the_seed_decides(params):
    again, other = initialisation.fresh_params(CONFIG, seed=3), initialisation.fresh_params(CONFIG, seed=4)
    kernels = {
        "unet": "conv_in.kernel",
        "vae": "encoder.conv_in.kernel",
        "alignment": "condition_embedding.conv_in.kernel",
        "text_encoder": "token_embedding.embedding",
    }
    for part, arrays in params.items():
        assert all(np.array_equal(array, again[part][path]) for path, array in arrays.items())
    for part, path in kernels.items():
        assert not np.array_equal(params[part][path], other[part][path]), part


def test_an_existing_output_is_left_alone(params, tokenizers, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        initialisation.write_model(CONFIG, params, tokenizers, tmp_path / "model", {})
    assert (tmp_path / "model" / "mine").read_text() == "mine"


def test_a_failure_leaves_nothing(params, tokenizers, tmp_path, monkeypatch):
    def full_disk(path, specs, arrays):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_format, "write_tensors", full_disk)
    with pytest.raises(InputError, match=r"model: cannot be written \(No space left on device\)"):
        initialisation.write_model(CONFIG, params, tokenizers, tmp_path / "model", {})
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_do_not_fit(tokenizers, tmp_path):
    larger = dataclasses.replace(TEXT, vocab_size=END + 10, end_token=END + 9)
    config = dataclasses.replace(CONFIG, text_encoders=(TEXT, larger))
    with pytest.raises(InputError, match=f"tokenizer_2: .* vocab_size, {END + 10}, and end_token, {END + 9}"):
        initialisation.check_tokenizers(config, tokenizers)
    with pytest.raises(InputError, match="no such tokenizer folder"):
        initialisation.check_tokenizers(CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["missing part", "missing tensor", "shape"])
def test_parameters_that_are_not_the_architectures(params, tokenizers, tmp_path, fault):
    wrong = {part: dict(arrays) for part, arrays in params.items()}
    if fault == "missing part":
        del wrong["vae"]
    elif fault == "missing tensor":
        del wrong["vae"]["quant_conv.bias"]
    else:
        wrong["vae"]["quant_conv.bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="vae"):
        initialisation.write_model(CONFIG, wrong, tokenizers, tmp_path / "model", {})
    assert list(tmp_path.iterdir()) == []


def test_the_small_model_fits_its_limits():
    """16 MB as float16, tokenizers that fit, every caption's word one token; it predicts the clean latent."""
    folder = REPOSITORY / "configs" / "tiny"
    config = load(FaithDiffConfig, folder / "model.yaml")
    initialisation.check_tokenizers(config, folder)
    numbers = sum(math.prod(shape) for part in part_names(config) for shape in part_shapes(config, part).values())
    assert 2 * numbers < 15_000_000
    assert config.schedule.prediction == "sample"
    caption = "A close-up of a tabby cat. Its green eyes look to the side."
    for ids in Tokenizers.load([folder / "tokenizer", folder / "tokenizer_2"])([caption]):
        words = re.findall(r"\w+|[^\w\s]", caption)
        assert ids[0, len(words) + 1] == config.text_encoders[0].end_token
        assert config.text_encoders[0].end_token not in ids[0, : len(words) + 1]
