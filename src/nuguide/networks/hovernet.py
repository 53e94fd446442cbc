"""HoVer-Net (Graham 2019): a pre-activated residual encoder, a dense decoder branch for each map."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import KernelUnit, PreActivation, SegmentationNetwork, normalized


class Residual(nn.Module):
    """One bottleneck unit of a residual block: (B, in, H, W) -> (B, 4 narrow, H / stride, W / stride).

    x + W3 . unit3x3 . unit1x1 . before(x), where `before` is batch norm and activation but for the first unit of a
    block, whose input comes activated; there W x, a 1x1 convolution, takes the place of x.
    """

    def __init__(self, in_channels: int, narrow: int, activation: str, first: bool, stride: int = 1):
        super().__init__()
        self.before = nn.Identity() if first else PreActivation(in_channels, activation)
        self.squeeze = KernelUnit(in_channels, narrow, activation, kernel=1)
        self.look = KernelUnit(narrow, narrow, activation, stride=stride)
        self.widen = nn.Conv2d(narrow, 4 * narrow, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, 4 * narrow, 1, stride, bias=False) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.widen(self.look(self.squeeze(self.before(x))))


def residual_block(in_channels: int, narrow: int, units: int, stride: int, activation: str) -> nn.Sequential:
    """`units` residual units, the first with the stride, and an activation: -> (B, 4 narrow, H / s, W / s)."""
    return nn.Sequential(
        Residual(in_channels, narrow, activation, first=True, stride=stride),
        *(Residual(4 * narrow, narrow, activation, first=False) for _ in range(units - 1)),
        PreActivation(4 * narrow, activation),
    )


class Dense(nn.Module):
    """x and what a unit makes of it: (B, C, H, W) -> (B, C + growth, H, W).

    Activation, 1x1 convolution to 2w, 5x5 convolution to `growth` channels in four groups (fewer where the widths are
    no multiples of four).
    """

    def __init__(self, in_channels: int, width: int, growth: int, activation: str):
        super().__init__()
        self.before = PreActivation(in_channels, activation)
        self.squeeze = KernelUnit(in_channels, 2 * width, activation, kernel=1)
        self.look = nn.Conv2d(2 * width, growth, 5, padding=2, groups=gcd(4, 2 * width, growth), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.look(self.squeeze(self.before(x)))], dim=1)


class Branch(nn.Module):
    """One decoder: maps of 4w, 8w, 16w and 16w channels at 1, 1/2, 1/4 and 1/8 -> (B, w, H, W)."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        growth = max(width // 2, 1)
        self.stages = nn.ModuleList()
        for skip_width, units in ((16 * width, 8), (8 * width, 4)):
            entered = skip_width // 4
            dense = [Dense(entered + k * growth, width, growth, activation) for k in range(units)]
            joined = entered + units * growth
            self.stages.append(nn.Sequential(
                nn.Conv2d(skip_width, entered, 5, padding=2, bias=False),
                *dense,
                PreActivation(joined, activation),
                nn.Conv2d(joined, skip_width // 2, 1, bias=False),
            ))
        self.stages.append(KernelUnit(4 * width, width, activation, kernel=5))

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for skip, stage in zip(reversed(features[:-1]), self.stages, strict=True):
            x = stage(F.interpolate(x, scale_factor=2, mode="nearest") + skip)
        return x


class HoVerNet(SegmentationNetwork):
    """HoVer-Net's encoder, and one of its decoder branches for each output channel.

        encoder:  7x7 convolution to w, then residual blocks of 3, 4, 6, 3 units: 4w at 1, 8w at 1/2, 16w at 1/4,
                  32w at 1/8; a 1x1 convolution to 16w. No map is halved before the first block.
        branch:   x2 (nearest), + skip, 5x5 convolution, 8 dense units, 1x1 convolution;  the same with 4;
                  x2, + skip, 5x5 convolution to w
        head:     1x1 convolution for each branch; all of them are one convolution of as many groups

    Source: Graham et al., "HoVer-Net: Simultaneous segmentation and classification of nuclei in multi-tissue histology
    images", Medical Image Analysis 58, 2019, doi 10.1016/j.media.2019.101563. There, `width` is 64.

    Interpretation: the published branches are nuclear pixels, horizontal and vertical distances to the nucleus's
    center, and types. Here the second branch predicts our second channel, the interior, for the same purpose, to tell
    touching nuclei apart; so losses and separation are those of every other network, and what is compared is the
    architecture, not the maps that gave it its name. The type branch is left out. Convolutions keep the size of a map,
    where the published decoder crops; the encoder starts from random weights, the published one from ImageNet's.

    Args:
        classes: output channels, each with its branch. width: channels w of the stem.
        activation: of the encoder (`ACTIVATIONS`). decoder_activation: of the branches.
        dropout: probability of dropping a channel of the coarsest features before the branches.
    """

    stride = 8

    def __init__(
        self,
        classes: int,
        width: int = 32,
        activation: str = "relu",
        decoder_activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.bottleneck_channels = 16 * width
        self.stem = KernelUnit(3, width, activation, kernel=7)
        self.blocks = nn.ModuleList()
        entering = width
        for level, units in enumerate((3, 4, 6, 3)):
            narrow = width * 2**level
            self.blocks.append(residual_block(entering, narrow, units, 2 if level else 1, activation))
            entering = 4 * narrow
        self.bottom = nn.Conv2d(entering, self.bottleneck_channels, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)
        self.branches = nn.ModuleList(Branch(width, decoder_activation) for _ in range(classes))
        self.head = nn.Conv2d(classes * width, classes, 1, groups=classes)

    def encode(self, image: Tensor) -> list[Tensor]:
        x = self.stem(normalized(image))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return [*features[:-1], self.bottom(x)]

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        shared = [*skips, self.dropout(deepest)]
        return self.head(torch.cat([branch(shared) for branch in self.branches], dim=1))
