"""RRDBNet in PyTorch, from the published definition, under the tensor names of both publications."""

import torch
from torch import nn
from torch.nn import functional

REAL_ESRGAN = {
    "body": "body", "dense": "rdb{}", "trunk": "conv_body", "up": "conv_up{}", "hr": "conv_hr",
}  # fmt: skip
BSRGAN = {
    "body": "RRDB_trunk", "dense": "RDB{}", "trunk": "trunk_conv", "up": "upconv{}", "hr": "HRconv",
}  # fmt: skip


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class TorchDenseBlock(nn.Module):
    def __init__(self, channels: int, growth: int):
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", conv(channels + i * growth, channels if i == 4 else growth))

    def forward(self, x):
        x1 = functional.leaky_relu(self.conv1(x), 0.2)
        x2 = functional.leaky_relu(self.conv2(torch.cat((x, x1), 1)), 0.2)
        x3 = functional.leaky_relu(self.conv3(torch.cat((x, x1, x2), 1)), 0.2)
        x4 = functional.leaky_relu(self.conv4(torch.cat((x, x1, x2, x3), 1)), 0.2)
        return x + 0.2 * self.conv5(torch.cat((x, x1, x2, x3, x4), 1))


class TorchRRDB(nn.Module):
    def __init__(self, channels: int, growth: int, name: str):
        super().__init__()
        self.names = [name.format(i) for i in (1, 2, 3)]
        for part in self.names:
            setattr(self, part, TorchDenseBlock(channels, growth))

    def forward(self, x):
        hidden = x
        for part in self.names:
            hidden = getattr(self, part)(hidden)
        return x + 0.2 * hidden


class TorchRRDBNet(nn.Module):
    """`names` is REAL_ESRGAN or BSRGAN; `scale` 4, 2 or 1 with pixel unshuffle, or BSRGAN's 2 with one doubling."""

    def __init__(self, names: dict, *, scale: int = 4, blocks: int = 23, channels: int = 64, growth: int = 32):
        super().__init__()
        self.names, self.scale = names, scale
        self.unshuffle = 4 // scale if names is REAL_ESRGAN else 1
        self.doublings = 1 if names is BSRGAN and scale == 2 else 2
        self.conv_first = conv(3 * self.unshuffle**2, channels)
        self.conv_last = conv(channels, 3)
        body = nn.Sequential(*(TorchRRDB(channels, growth, names["dense"]) for _ in range(blocks)))
        setattr(self, names["body"], body)
        for name in (names["trunk"], names["hr"], *(names["up"].format(i + 1) for i in range(self.doublings))):
            setattr(self, name, conv(channels, channels))

    def forward(self, x):
        if self.unshuffle > 1:
            x = functional.pixel_unshuffle(x, self.unshuffle)
        features = self.conv_first(x)
        features = features + self.part("trunk")(self.part("body")(features))
        for i in range(self.doublings):
            enlarged = functional.interpolate(features, scale_factor=2, mode="nearest")
            features = functional.leaky_relu(getattr(self, self.names["up"].format(i + 1))(enlarged), 0.2)
        return self.conv_last(functional.leaky_relu(self.part("hr")(features), 0.2))

    def part(self, name: str):
        return getattr(self, self.names[name])
