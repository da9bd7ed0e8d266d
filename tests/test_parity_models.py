"""UNet, VAE, LQ encoder, aligner and their assembly against PyTorch, float32, odd and non-square sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import assert_parity, nchw, nhwc, relative_error
from port import call, normal, port
from published import VAE_CHANNELS, lq_encoder, randomise, unet_sd21, unet_sdxl, vae
from torch_aligner import TorchAligner

from faithdiff_jax.models.alignment import Alignment, AlignmentConfig
from faithdiff_jax.models.faithdiff import FaithDiffModel
from faithdiff_jax.models.unet import UNet
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import VAE, FeatureEncoder, VAEConfig
from faithdiff_jax.weights import rules

SDXL = UNetConfig(
    channels=(16, 16, 32),
    resnets_per_level=1,
    transformer_depth=(0, 2, 3),
    mid_transformer_depth=3,
    heads=(1, 2, 4),
    context_dim=40,
    pooled_dim=20,
    time_id_dim=8,
    norm_groups=8,
)
SD21 = UNetConfig(
    channels=(16, 16, 32, 32),
    resnets_per_level=1,
    transformer_depth=(1, 1, 1, 0),
    mid_transformer_depth=1,
    heads=(1, 2, 4, 4),
    context_dim=16,
    pooled_dim=None,
    norm_groups=8,
)
VAE_CONFIG = VAEConfig(channels=VAE_CHANNELS, resnets_per_level=1, norm_groups=8)


def random(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    randomise(module)
    return module.eval()


def aligner_pair(config: AlignmentConfig):
    torch_aligner = random(TorchAligner(32, 16, layers=config.layers))
    build = lambda: Alignment(config, 32, 16, rngs=nnx.Rngs(0))  # noqa: E731
    return torch_aligner, port(build, rules.ALIGNMENT, torch_aligner.state_dict())


def align(aligner, hidden, features):
    return call(aligner, hidden, call(aligner, features, method="embed"))


@pytest.mark.parametrize(("height", "width"), [(7, 9), (8, 12), (5, 1)])
def test_sdxl_unet(rng, height, width):
    reference = random(unet_sdxl(40))
    ours = port(lambda: UNet(SDXL, rngs=nnx.Rngs(0)), rules.UNET, reference.state_dict())
    latents, context, pooled = normal(rng, 2, height, width, 4), normal(rng, 2, 5, 40), normal(rng, 2, 20)
    time_ids = rng.uniform(0, 2048, (2, 6)).astype(np.float32)
    timesteps = np.array([951, 1])
    with torch.no_grad():
        added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
        expected = reference(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context), None, None, None,
                             None, added).sample  # fmt: skip
    assert_parity(call(ours, latents, timesteps, context, pooled, time_ids), nhwc(expected))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_bfloat16_stays_near_float32(rng, dtype):
    """Parameters and inputs in bfloat16, with the compute type stated and without."""
    reference = random(unet_sdxl(40))
    exact = port(lambda: UNet(SDXL, rngs=nnx.Rngs(0)), rules.UNET, reference.state_dict())
    parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.to_pure_dict(nnx.state(exact)))
    build = lambda: UNet(SDXL, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=jnp.bfloat16)  # noqa: E731
    half = nnx.merge(nnx.split(nnx.eval_shape(build))[0], parameters)
    arrays = normal(rng, 1, 8, 8, 4), np.array([951]), normal(rng, 1, 5, 40), normal(rng, 1, 20), normal(rng, 1, 6)
    inputs = [jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays]
    predicted = call(half, *inputs)
    assert predicted.dtype == jnp.bfloat16
    # About 8 bits of mantissa through some forty layers.
    assert relative_error(predicted.astype(jnp.float32), call(exact, *arrays)) < 0.1


def test_sd21_unet(rng):
    reference = random(unet_sd21(16))
    ours = port(lambda: UNet(SD21, rngs=nnx.Rngs(0)), rules.UNET, reference.state_dict())
    latents, context, timesteps = normal(rng, 2, 11, 6, 4), normal(rng, 2, 7, 16), np.array([500, 20])
    with torch.no_grad():
        expected = reference(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context)).sample
    assert_parity(call(ours, latents, timesteps, context), nhwc(expected))


def test_vae_encodes_samples_and_decodes(rng):
    reference = random(vae())
    ours = port(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0)), rules.VAE, reference.state_dict())
    images, noise = rng.uniform(-1, 1, (2, 40, 56, 3)).astype(np.float32), normal(rng, 2, 5, 7, 4)
    latents = normal(rng, 2, 5, 7, 4)
    with torch.no_grad():
        distribution = reference.encode(nchw(images)).latent_dist
        sampled = (distribution.mean + distribution.std * nchw(noise)) * 0.13025
        decoded = reference.decode(nchw(latents) / 0.13025).sample
    assert_parity(call(ours, images, method="moments"), nhwc(distribution.parameters))
    assert_parity(call(ours, images, noise, method="encode"), nhwc(sampled))
    assert_parity(call(ours, latents, method="decode"), nhwc(decoded))


def test_vae_clips_the_log_variance(rng):
    ours = nnx.eval_shape(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(0)))  # sampling needs no parameters
    moments = np.zeros((1, 1, 2, 8), np.float32)
    moments[0, 0, :, 4:] = np.array([[100.0], [-100.0]])
    sampled = np.asarray(ours.sample(jnp.asarray(moments), jnp.ones((1, 1, 2, 4)))) / 0.13025
    np.testing.assert_allclose(sampled[0, 0, :, 0], [np.exp(10.0), np.exp(-15.0)], rtol=1e-5)


def test_lq_encoder_gives_penultimate_features(rng):
    reference = random(lq_encoder())
    ours = port(lambda: FeatureEncoder(VAE_CONFIG.encoder, rngs=nnx.Rngs(0)), rules.LQ_ENCODER, reference.state_dict())
    images = rng.uniform(-1, 1, (1, 48, 40, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference(nchw(images))
    assert_parity(call(ours, images), nhwc(expected))


def test_aligner_mixing_batch_is_the_published_attention_over_samples(rng):
    reference, ours = aligner_pair(AlignmentConfig(mixing="batch"))
    hidden, features = normal(rng, 3, 6, 5, 16), normal(rng, 3, 6, 5, 32)
    with torch.no_grad():
        expected = nhwc(reference(nchw(hidden), nchw(features)))
    assert_parity(align(ours, hidden, features), expected)
    # What makes it worth naming: a sample's result depends on its neighbours.
    with torch.no_grad():
        alone = nhwc(reference(nchw(hidden[:1]), nchw(features[:1])))
    assert relative_error(expected[:1], alone) > 1e-2


def test_aligner_mixing_batch_in_groups(rng):
    reference, ours = aligner_pair(AlignmentConfig(mixing="batch", group=2))
    hidden, features = normal(rng, 4, 3, 5, 16), normal(rng, 4, 3, 5, 32)
    with torch.no_grad():
        expected = [nhwc(reference(nchw(hidden[i : i + 2]), nchw(features[i : i + 2]))) for i in (0, 2)]
    assert_parity(align(ours, hidden, features), np.concatenate(expected))
    with pytest.raises(ValueError, match="group is 2: must divide the batch, 3"):
        align(ours, hidden[:3], features[:3])


def test_aligner_mixing_none_is_the_published_result_of_each_image_alone(rng):
    reference, ours = aligner_pair(AlignmentConfig())
    hidden, features = normal(rng, 3, 6, 5, 16), normal(rng, 3, 6, 5, 32)
    with torch.no_grad():
        alone = [nhwc(reference(nchw(hidden[i : i + 1]), nchw(features[i : i + 1]))) for i in range(3)]
    assert_parity(align(ours, hidden, features), np.concatenate(alone))


@pytest.mark.parametrize("mixing", ["none", "spatial"])
def test_aligner_is_independent_of_the_batch(rng, mixing):
    _, ours = aligner_pair(AlignmentConfig(mixing=mixing))
    hidden, features = normal(rng, 2, 6, 5, 16), normal(rng, 2, 6, 5, 32)
    together = align(ours, hidden, features)
    for i in range(2):
        alone = align(ours, hidden[i : i + 1], features[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < 1e-6


def test_aligner_mixing_spatial_attends_over_the_positions_of_an_image(rng):
    """Positions of one image are to spatial what the samples of a batch are to the published attention."""
    reference, ours = aligner_pair(AlignmentConfig(mixing="spatial"))
    tokens = normal(rng, 2, 30, 32)
    for published, block in zip(reference.information_transformer_layes, ours.blocks, strict=True):
        with torch.no_grad():
            # (positions, images, width) is what torch's attention takes when its axes are not exchanged.
            expected = published(torch.from_numpy(tokens).transpose(0, 1)).transpose(0, 1)
        tokens = np.array(call(block, tokens, mixing="spatial", group=1))
        assert_parity(tokens, expected.numpy())


def test_a_fresh_aligner_changes_nothing(rng):
    aligner = Alignment(AlignmentConfig(), 32, 16, rngs=nnx.Rngs(0))
    hidden = normal(rng, 1, 4, 4, 16)
    np.testing.assert_array_equal(align(aligner, hidden, normal(rng, 1, 4, 4, 32)), hidden)


def test_faithdiff_assembled(rng):
    unet, aligner, encoder = random(unet_sdxl(40)), random(TorchAligner(32, 16)), random(lq_encoder())
    state = {f"denoise_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state |= aligner.state_dict() | unet.state_dict()
    build = lambda: FaithDiffModel(SDXL, AlignmentConfig(mixing="batch"), VAE_CONFIG.encoder, rngs=nnx.Rngs(0))  # noqa: E731
    ours = port(build, rules.FAITHDIFF, state)
    images, latents = rng.uniform(-1, 1, (2, 40, 56, 3)).astype(np.float32), normal(rng, 2, 5, 7, 4)
    context, pooled, time_ids = normal(rng, 2, 5, 40), normal(rng, 2, 20), rng.uniform(0, 999, (2, 6))
    time_ids, timesteps = time_ids.astype(np.float32), np.array([951, 1])
    with torch.no_grad():
        features = encoder(nchw(images))
        hook = unet.conv_in.register_forward_hook(lambda module, args, hidden: aligner(hidden, features))
        added = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
        expected = unet(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(context),
                        added_cond_kwargs=added).sample  # fmt: skip
        hook.remove()
    assert_parity(call(ours, latents, timesteps, images, context, pooled, time_ids), nhwc(expected))
