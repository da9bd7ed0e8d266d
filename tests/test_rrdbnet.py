"""RRDBNet: its output is PyTorch's, for every size, scale and naming; and so it is through windows and strips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import assert_parity, nchw, nhwc, relative_error
from port import call, port
from torch_rrdbnet import BSRGAN, REAL_ESRGAN, TorchRRDBNet

from faithdiff_jax.baselines import super_resolution
from faithdiff_jax.baselines.rrdbnet import RRDBNet, RRDBNetConfig
from faithdiff_jax.baselines.rrdbnet_weights import NAMES
from faithdiff_jax.baselines.super_resolution import RRDBNetRestorer, Span, spans
from faithdiff_jax.errors import InputError
from faithdiff_jax.sharding import make_mesh

SMALL = {"blocks": 2, "channels": 12, "growth": 6}
PICTURES = np.random.default_rng(0).random((2, 18, 26, 3), np.float32)


def torch_network(names, scale=4):
    """Weights large enough that every convolution counts: the published initialisation makes a tenth of them."""
    torch.manual_seed(0)
    network = TorchRRDBNet(names, scale=scale, **SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.15)
    return network.eval()


def ours(network, names, config):
    return port(lambda: RRDBNet(config, rngs=nnx.Rngs(0)), NAMES[names], network.state_dict())


def expected(network, pictures):
    with torch.inference_mode():
        return nhwc(network(nchw(pictures)))


@pytest.mark.parametrize(
    ("names", "published", "scale", "sizes"),
    [
        ("real-esrgan", REAL_ESRGAN, 4, {}),
        ("real-esrgan", REAL_ESRGAN, 2, {"unshuffle": 2}),
        ("bsrgan", BSRGAN, 4, {}),
        ("bsrgan", BSRGAN, 2, {"doublings": 1}),
    ],
)
def test_output_is_pytorchs(names, published, scale, sizes):
    network = torch_network(published, scale)
    config = RRDBNetConfig(**SMALL, **sizes)
    assert config.scale == scale
    pictures = PICTURES[:, 1:, 1:] if config.unshuffle == 1 else PICTURES
    assert_parity(call(ours(network, names, config), pictures), expected(network, pictures), 1e-5)


@pytest.fixture(scope="module")
def networks():
    network = torch_network(REAL_ESRGAN)
    module = ours(network, "real-esrgan", RRDBNetConfig(**SMALL))
    return network, nnx.to_pure_dict(nnx.state(module, nnx.Param))


def restorer(params, **options):
    return RRDBNetRestorer(RRDBNetConfig(**SMALL), params, **options)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (64, 61)])
def test_padding_does_not_change_a_picture(networks, height, width):
    network, params = networks
    picture = np.random.default_rng(1).random((height, width, 3), np.float32)
    assert_parity(restorer(params).enlarge(picture), expected(network, picture[None])[0], 1e-5)


def test_windows_give_every_pixel_once_and_far_from_their_edges():
    for side in (5, 192, 193, 320, 1000):
        found = list(spans(side, 192))
        assert [span.first for span in found] == [0, *(span.last for span in found[:-1])]
        assert found[-1].last == side
        for span in found:
            assert span.stop - span.start == min(side, 192)
            assert span.start == 0 or span.first - span.start >= 64
            assert span.stop == side or span.stop - span.last >= 64


@pytest.fixture(scope="module")
def large(networks):
    """A picture of several windows, and what the network makes of the whole."""
    network, _ = networks
    picture = np.random.default_rng(2).random((200, 70, 3), np.float32)
    return picture, expected(network, picture[None])[0]


def test_windows_make_the_whole_picture(networks, large):
    """This network sees 32 features far, so that windows which share 128 pixels leave no trace."""
    _, params = networks
    picture, whole = large
    assert_parity(restorer(params, tile=192).enlarge(picture), whole, 1e-5)


def test_windows_that_share_too_little_are_seen(networks, large, monkeypatch):
    _, params = networks
    picture, whole = large
    few = {200: [Span(0, 192, 0, 191), Span(8, 200, 191, 200)], 70: [Span(0, 70, 0, 70)]}
    monkeypatch.setattr(super_resolution, "spans", lambda side, tile: few[side])
    assert relative_error(restorer(params, tile=192).enlarge(picture), whole) > 1e-3


def test_windows_are_shared_out_among_devices(networks, large):
    _, params = networks
    picture, whole = large
    assert jax.device_count() > 1
    assert_parity(restorer(params, tile=192, mesh=make_mesh()).enlarge(picture), whole, 1e-5)


def test_bfloat16_is_near(networks):
    network, params = networks
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    picture = PICTURES[0]
    output = restorer(rounded, dtype=jnp.bfloat16).enlarge(picture)
    assert output.dtype == np.float32
    assert 1e-4 < relative_error(output, expected(network, picture[None])[0]) < 3e-2


def test_restored_pictures_are_clipped_and_rounded(networks):
    network, params = networks
    picture = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    output = expected(network, picture[None] / np.float32(255))[0]
    assert output.min() < 0 < 1 < output.max()
    found = restorer(params).restore(picture, "not read")
    assert np.abs(found - np.clip(output, 0, 1) * 255).max() <= 0.5 + 1e-2
    assert restorer(params, scale=1).restore(picture).shape == (9, 11, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"blocks": 0}, "blocks is 0: must be a whole number from 1"),
        ({"unshuffle": 3}, "unshuffle is 3: must be 1, 2 or 4"),
        ({"unshuffle": 4, "doublings": 1}, "unshuffle is 4: must be"),
        ({"channels": 10**9}, "channels is 1000000000: must be"),
    ],
)
def test_sizes_that_no_network_has(sizes, message):
    with pytest.raises(InputError, match=message):
        RRDBNetConfig(**sizes)


@pytest.mark.parametrize("tile", [0, 128, 200])
def test_a_window_has_room_for_what_it_shares(networks, tile):
    with pytest.raises(InputError, match=f"tile is {tile}: must be a multiple of 64, and at least 192"):
        restorer(networks[1], tile=tile)


def test_pictures_too_large_are_refused_before_they_are_made(networks):
    with pytest.raises(InputError, match="too many pixels"):
        restorer(networks[1]).restore(np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)))
