"""The text encoder against transformers, on tiny random models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from parity import assert_parity

from faithdiff_jax.models.clip import TextEncoder, TextEncoderConfig

END = 58
TINY = TextEncoderConfig(
    vocab_size=END + 1, width=24, layers=3, heads=4, mlp_width=40, positions=13, end_token=END, activation="quick_gelu"
)
KINDS = {
    "quick_gelu": TINY,
    "quick_gelu_final": dataclasses.replace(TINY, output="final"),
    "gelu_projected": dataclasses.replace(TINY, activation="gelu", projection=20),
    "gelu_final": dataclasses.replace(TINY, activation="gelu", output="final"),
    "one_layer": dataclasses.replace(TINY, layers=1),
}


def torch_encoder(config: TextEncoderConfig, eos_token_id: int):
    """A transformers model of the same sizes with every parameter random, norms and biases included."""
    torch_config = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        projection_dim=config.projection or 8,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=eos_token_id,
    )
    with_projection = config.projection is not None
    model_class = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    model = model_class(torch_config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            # Small embeddings make the first layer norm's epsilon count; elsewhere values stay near one.
            scale = 0.01 if "embedding" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(values * scale + ("norm" in name and name.endswith("weight")))
    return model


def copy_weights(model, encoder: TextEncoder) -> None:
    """Set our parameters from a transformers model's."""
    found = {name.removeprefix("text_model."): tensor.numpy() for name, tensor in model.state_dict().items()}

    def take(name: str) -> np.ndarray:
        """One tensor, or those of all layers stacked; linear kernels are transposed."""
        if not name.startswith("encoder.layers."):
            tensor = found.pop(name)
            return tensor.T if name == "text_projection.weight" else tensor
        names = [name.replace("*", str(index)) for index in range(encoder.config.layers)]
        tensor = np.stack([found.pop(name) for name in names])
        return tensor.swapaxes(1, 2) if tensor.ndim == 3 else tensor

    for name in ("token_embedding", "position_embedding"):
        getattr(encoder, name).embedding[...] = take(f"embeddings.{name}.weight")
    for name in ("layer_norm1", "layer_norm2"):
        part = getattr(encoder.blocks, name)
        part.scale[...] = take(f"encoder.layers.*.{name}.weight")
        part.bias[...] = take(f"encoder.layers.*.{name}.bias")
    places = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), "self_attn") | dict.fromkeys(
        ("fc1", "fc2"), "mlp"
    )
    for name, place in places.items():
        part = getattr(encoder.blocks, name)
        part.kernel[...] = take(f"encoder.layers.*.{place}.{name}.weight")
        part.bias[...] = take(f"encoder.layers.*.{place}.{name}.bias")
    encoder.final_layer_norm.scale[...] = take("final_layer_norm.weight")
    encoder.final_layer_norm.bias[...] = take("final_layer_norm.bias")
    if encoder.text_projection is not None:
        encoder.text_projection.kernel[...] = take("text_projection.weight")
    found.pop("embeddings.position_ids", None)
    assert not found, f"not copied: {sorted(found)}"


def captions(rng: np.random.Generator, length: int = 13) -> np.ndarray:
    """Rows that end early, late, and at once; padded with the end token or with 0, as the two tokenizers do."""
    ids = rng.integers(1, END, (4, length))
    for row, end, padding in ((0, 5, END), (1, 3, 0), (2, length - 1, END), (3, 1, 0)):
        ids[row, end:] = padding
        ids[row, end] = END
    return ids


def jitted(encoder: TextEncoder, token_ids) -> tuple[jax.Array, jax.Array]:
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(token_ids))


def both(config: TextEncoderConfig, token_ids: np.ndarray, eos_token_id: int = END):
    """(ours, theirs): hidden and pooled of each."""
    model = torch_encoder(config, eos_token_id)
    encoder = TextEncoder(config, rngs=nnx.Rngs(0))
    copy_weights(model, encoder)
    with torch.no_grad():
        result = model(torch.from_numpy(token_ids), output_hidden_states=True)
    hidden = result.hidden_states[-2] if config.output == "penultimate" else result.last_hidden_state
    pooled = result.pooler_output if config.projection is None else result.text_embeds
    return jitted(encoder, token_ids), (hidden.numpy(), pooled.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_matches_transformers(kind, rng):
    (hidden, pooled), (their_hidden, their_pooled) = both(KINDS[kind], captions(rng))
    assert_parity(hidden, their_hidden)
    assert_parity(pooled, their_pooled)


def test_matches_transformers_on_short_rows(rng):
    ours, theirs = both(TINY, captions(rng, length=7))
    assert_parity(ours[0], theirs[0])
    assert_parity(ours[1], theirs[1])


def test_pools_where_configs_with_end_token_2_do(rng):
    """Published SDXL folders state `eos_token_id` 2, for which transformers pools at the largest id."""
    ours, theirs = both(KINDS["gelu_projected"], captions(rng), eos_token_id=2)
    assert_parity(ours[1], theirs[1])


def test_pools_at_the_first_end_token(rng):
    """What follows the first end token changes neither the pooled state nor any state before it."""
    encoder = TextEncoder(dataclasses.replace(TINY, output="final"), rngs=nnx.Rngs(0))
    ids = captions(rng)[:1]
    other = ids.copy()
    other[:, 6:] = [[3, END, 4, 5, END, 6, 7]]
    hidden, pooled = jitted(encoder, ids)
    other_hidden, other_pooled = jitted(encoder, other)
    np.testing.assert_allclose(pooled, hidden[:, 5], atol=1e-6)
    np.testing.assert_allclose(pooled, other_pooled, atol=1e-6)
    np.testing.assert_allclose(hidden[:, :6], other_hidden[:, :6], atol=1e-6)
    assert np.abs(hidden[:, 6:] - other_hidden[:, 6:]).max() > 1e-2


def test_layers_are_stacked_and_differ():
    encoder = TextEncoder(TINY, rngs=nnx.Rngs(0))
    kernel = encoder.blocks.fc1.kernel[...]
    assert kernel.shape == (TINY.layers, TINY.width, TINY.mlp_width)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_computes_in_bfloat16_near_float32(rng):
    ids = captions(rng)
    exact = jitted(TextEncoder(TINY, rngs=nnx.Rngs(0)), ids)
    half = jitted(TextEncoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), ids)
    assert [part.dtype for part in half] == [jnp.bfloat16, jnp.bfloat16]
    for ours, reference in zip(half, exact, strict=True):
        assert_parity(ours.astype(jnp.float32), reference, limit=3e-2)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="14 tokens a caption, the text encoder has 13 positions"):
        TextEncoder(TINY, rngs=nnx.Rngs(0))(jnp.zeros((1, 14), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0: must be a whole number from 1 to 256"),
        ({"projection": 0}, "projection is 0: must be a whole number from 1 to 65536"),
        ({"heads": 5}, r"width is 24: must be a multiple of heads, 5"),
        ({"activation": "relu"}, "activation is 'relu': must be one of quick_gelu, gelu"),
        ({"output": "last"}, "output is 'last': must be one of penultimate, final"),
        ({"end_token": 59}, r"end_token is 59: must be in 0\.\.58"),
    ],
)
def test_config_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
