"""DAAM in PyTorch, written from the paper and its published code: the oracle for our attribution maps.

Every head of every layer, at every call of the UNet, is enlarged by itself; then they are summed.
"""

import contextlib

import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional
from torch_pipeline import grid, tile_weights


class Recorder:
    """Attends as diffusers does, one head after the other, and keeps what each head gave to each token of the text."""

    def __init__(self):
        self.calls = []
        """For each call of the UNet, for each head of each layer: (tokens, pixels)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)[0]  # (1, n, c) -> (heads, n, d)  # noqa: E731
        q, k, v = (
            heads(attn.to_q(hidden_states)),
            heads(attn.to_k(encoder_hidden_states)),
            heads(attn.to_v(encoder_hidden_states)),
        )
        probabilities = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        self.calls[-1] += list(probabilities.transpose(1, 2))
        return attn.to_out[0]((probabilities @ v).transpose(0, 1).flatten(1)[None])


@contextlib.contextmanager
def recorded(unet: UNet2DConditionModel):
    """Record the cross-attention on the way down and up; that in the middle is left out, as published."""
    recorder, before = Recorder(), dict(unet.attn_processors)
    theirs = {
        name: recorder if "attn2" in name and name.startswith(("down", "up")) else processor
        for name, processor in before.items()
    }
    unet.set_attn_processor(theirs)
    handle = unet.register_forward_pre_hook(lambda module, args: recorder.calls.append([]))
    try:
        yield recorder
    finally:
        handle.remove()
        unet.set_attn_processor(before)


def enlarged(heads, height: int, width: int) -> torch.Tensor:
    """Maps of heads (tokens, pixels), of several resolutions, each enlarged: (heads, tokens, height, width)."""
    result = []
    for one in heads:
        reduction = next(f for f in (1, 2, 4, 8) if -(-height // f) * -(-width // f) == one.shape[1])
        small = one.unflatten(1, (-(-height // reduction), -1))[None]
        result.append(functional.interpolate(small, size=(height, width), mode="bicubic", align_corners=False)[0])
    return torch.stack(result)


def blended(per_tile, height: int, width: int, tile: int, overlap: float) -> torch.Tensor:
    """Maps (tokens, h, w) of the tiles of one step, averaged as the latents are: (tokens, height, width)."""
    corners, tile_height, tile_width = grid(height, width, tile, overlap)
    weights = tile_weights(tile_height, tile_width)
    total, count = torch.zeros(len(per_tile[0]), height, width).double(), torch.zeros(height, width).double()
    for (top, left), found in zip(corners, per_tile, strict=True):
        here = (..., slice(top, top + tile_height), slice(left, left + tile_width))
        total[here] += found * weights
        count[here] += weights
    return total / count
