"""FaithDiff's aligner in PyTorch, with the published parameter names: the oracle for ours."""

import torch
from torch import nn


class ConditionEmbedding(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv_in = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, features):
        return self.conv_out(nn.functional.silu(self.conv_in(self.norm_in(features))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        # batch_first stays False although the tokens come as (B, HW, width): each position attends over the batch.
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens):
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(tokens))
        return tokens + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class TorchAligner(nn.Module):
    """The published aligner; `state_dict` has the names that FaithDiff.bin gives them."""

    def __init__(
        self,
        feature_channels: int = 512,
        hidden_channels: int = 320,
        *,
        layers: int = 2,
        heads: int = 8,
        groups: int = 32,
    ):
        super().__init__()
        width = 2 * hidden_channels
        self.condition_embedding = ConditionEmbedding(feature_channels, hidden_channels, groups)
        self.information_transformer_layes = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.spatial_ch_projs = nn.Linear(width, hidden_channels)
        nn.init.zeros_(self.spatial_ch_projs.weight)
        nn.init.zeros_(self.spatial_ch_projs.bias)

    def forward(self, hidden, features):
        """(B, hidden, h, w), (B, features, h, w) -> (B, hidden, h, w)."""
        batch, channels, height, width = hidden.shape
        tokens = torch.cat([hidden, self.condition_embedding(features)], dim=1).flatten(2).transpose(1, 2)
        update = self.spatial_ch_projs(self.information_transformer_layes(tokens))
        return hidden + update.transpose(1, 2).reshape(batch, channels, height, width)
