"""U-Net (Ronneberger 2015) with batch norm and same-size convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import ConvUnit, SegmentationNetwork, UpConvUnit, normalized, pool_layer


def double_conv(in_channels: int, out_channels: int, activation: str) -> nn.Sequential:
    """Two `ConvUnit`s: (B, in, H, W) -> (B, out, H, W)."""
    return nn.Sequential(
        ConvUnit(in_channels, out_channels, activation), ConvUnit(out_channels, out_channels, activation)
    )


class Encoder(nn.Module):
    """Levels of two convolutions each, halved in between: (B, 3, H, W) -> h1 ... hn, level k at 1/2^(k-1)."""

    def __init__(self, widths: list[int], activation: str, pool: str):
        super().__init__()
        self.levels = nn.ModuleList(
            double_conv(narrow, wide, activation) for narrow, wide in zip([3, *widths], widths, strict=False)
        )
        self.pool = pool_layer(pool)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.levels[0](normalized(image))]
        for level in self.levels[1:]:  # pyright: ignore[reportGeneralTypeIssues]
            features.append(level(self.pool(features[-1])))
        return features


class Decoder(nn.Module):
    """The decoder of a U-Net: h1 ... hn of the given widths -> (B, widths[0], H, W)."""

    def __init__(self, widths: list[int], activation: str):
        super().__init__()
        self.ups = nn.ModuleList(
            UpConvUnit(wide, narrow, 2, activation) for narrow, wide in zip(widths, widths[1:], strict=False)
        )
        self.merges = nn.ModuleList(double_conv(2 * width, width, activation) for width in widths[:-1])

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for level in reversed(range(len(self.ups))):
            x = self.merges[level](torch.cat([features[level], self.ups[level](x)], dim=1))
        return x


class UNet(SegmentationNetwork):
    """U-Net of five levels, widths w, 2w, 4w, 8w, 16w.

    Args:
        classes: output channels.
        width: channels w of the finest level.
        activation: of the encoder (`ACTIVATIONS`). decoder_activation: of the decoder.
        pool: `max` or `maxblur`.
        dropout: probability of dropping a channel of the coarsest features before the decoder.
    """

    stride = 16

    def __init__(
        self,
        classes: int,
        width: int = 32,
        activation: str = "relu",
        decoder_activation: str = "relu",
        pool: str = "max",
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.bottleneck_channels = widths[-1]
        self.encoder = Encoder(widths, activation, pool)
        self.dropout = nn.Dropout2d(dropout)
        self.decoder = Decoder(widths, decoder_activation)
        self.head = nn.Conv2d(width, classes, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        return self.head(self.decoder([*skips, self.dropout(deepest)]))
