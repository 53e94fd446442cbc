"""DDU-Net (Mahbod 2022): one encoder, a decoder for the nuclei and another for how deep inside them a pixel lies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import SegmentationNetwork
from .unet import Decoder, Encoder


class DDUNet(SegmentationNetwork):
    """DDU-Net: the encoder of a U-Net and one whole decoder for each output channel.

        h1 ... h5 = encoder(image);   logits_c = head_c(decoder_c(h1 ... h5))

    Source: Mahbod et al., "A dual decoder U-Net-based model for nuclei instance segmentation in hematoxylin and
    eosin-stained histological images", Frontiers in Medicine 2022, doi 10.3389/fmed.2022.978146.

    Interpretation: the published second decoder regresses the distance of a pixel to its nucleus's border. Ours
    predicts the second of our channels, the interior: that distance over its greatest in the nucleus, cut at 0.4
    (`instances.targets`). The published watershed of both maps is `instances.separate`. Levels, widths and batch norm
    are those of `UNet`. All heads are one convolution of as many groups. The paper's second network, which tells types
    of nuclei apart, is left out.

    Args:
        classes: output channels, each with its decoder; two are the published network.
        width: channels w of the finest level; the levels have w, 2w, 4w, 8w, 16w.
        activation: of the encoder (`ACTIVATIONS`). decoder_activation: of the decoders.
        pool: `max` or `maxblur`.
        dropout: probability of dropping a channel of the coarsest features before the decoders.
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
        self.decoders = nn.ModuleList(Decoder(widths, decoder_activation) for _ in range(classes))
        self.head = nn.Conv2d(classes * width, classes, 1, groups=classes)

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        shared = [*skips, self.dropout(deepest)]
        return self.head(torch.cat([decoder(shared) for decoder in self.decoders], dim=1))
