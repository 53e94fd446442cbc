"""U-Net3+ (Huang 2020) and eU-Net3+ (Swain 2024): every encoder level reaches every decoder level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ConvUnit, SegmentationNetwork, UpConvUnit
from .unet import Encoder


class UNet3Plus(SegmentationNetwork):
    """Five levels joined by full-scale skips.

    Decoder level i takes five maps at its own resolution: the encoder levels finer than it, max pooled; its own
    encoder level; and the decoder levels coarser than it (at the bottom, the encoder's), enlarged bilinearly. Each
    passes a 3x3 convolution to `width` channels; together they pass one more, 5 `width` -> 5 `width`.

    With `activation="glu"` and `pool="maxblur"` this is eU-Net3+. GLU doubles what each encoder convolution makes;
    `match_width=True` narrows the encoder by sqrt(2), for a GLU encoder of about as many parameters as the ReLU one.

    Args:
        classes: output channels.
        width: channels w of the finest level (the encoder's are w, 2w, 4w, 8w, 16w) and of each skip.
        activation: of the encoder (`ACTIVATIONS`). decoder_activation: of the decoder.
        pool: between encoder levels, `max` or `maxblur`.
        dropout: probability of dropping a channel of the coarsest features before the decoder.
        merged: channels of each decoder level; 5 `width`, as published, where not given. The convolutions that make
            them are more than half of all multiplications, so fewer channels make a faster network.
        deep_supervision: in training mode, `decode` returns a list: the logits, then those of decoder levels 2..4 and
            of the bottom, each enlarged to full size.
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
        match_width: bool = False,
        merged: int | None = None,
        deep_supervision: bool = False,
    ):
        super().__init__()
        base = round(width / 2**0.5) if match_width else width
        widths = [base * 2**level for level in range(5)]
        merged = 5 * width if merged is None else merged
        self.bottleneck_channels = widths[-1]
        self.encoder = Encoder(widths, activation, pool)
        self.dropout = nn.Dropout2d(dropout)
        self.skips = nn.ModuleList()
        for target in range(4):
            row = nn.ModuleList()
            for source in range(5):
                if source <= target:
                    row.append(ConvUnit(widths[source], width, decoder_activation))
                else:
                    channels = widths[4] if source == 4 else merged
                    row.append(UpConvUnit(channels, width, 2 ** (source - target), decoder_activation))
            self.skips.append(row)
        self.merges = nn.ModuleList(ConvUnit(5 * width, merged, decoder_activation) for _ in range(4))
        self.head = nn.Conv2d(merged, classes, 3, padding=1)
        self.side_heads = nn.ModuleList(
            nn.Conv2d(channels, classes, 3, padding=1)
            for channels in ([merged] * 3 + [widths[4]] if deep_supervision else [])
        )

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor:
        *encoded, deepest = features
        maps = [*encoded, self.dropout(deepest)]           # becomes the decoder's from the coarse end
        finer: list[list[Tensor]] = [[]]                   # at each level, the encoder's finer ones pooled to its size
        for level in encoded[:-1]:
            finer.append([F.max_pool2d(x, 2) for x in [*finer[-1], level]])
        for target in reversed(range(4)):
            sources = [*finer[target], encoded[target], *maps[target + 1 :]]
            parts = [skip(x) for skip, x in zip(self.skips[target], sources, strict=True)]  # pyright: ignore
            maps[target] = self.merges[target](torch.cat(parts, dim=1))
        logits = self.head(maps[0])
        if not (self.training and len(self.side_heads)):
            return logits
        sides = [head(x) for head, x in zip(self.side_heads, maps[1:], strict=True)]
        size = logits.shape[-2:]
        return [logits, *(F.interpolate(s, size, mode="bilinear", align_corners=False) for s in sides)]  # pyright: ignore[reportReturnType]


def unet3plus(classes: int, width: int = 32, **options) -> UNet3Plus:
    """U-Net3+ as published, but for its width (64 there)."""
    return UNet3Plus(classes, width, **options)


def eunet3plus(classes: int, width: int = 32, **options) -> UNet3Plus:
    """eU-Net3+: U-Net3+ with GLU in the encoder, max-blur pooling and dropout 0.3 before the decoder."""
    recipe = {"activation": "glu", "pool": "maxblur", "dropout": 0.3}
    return UNet3Plus(classes, width, **(recipe | options))
