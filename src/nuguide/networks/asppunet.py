"""ASPPU-Net (Wan 2020): a U-Net with atrous spatial pyramid pooling at its bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import KernelUnit
from .unet import UNet


class AtrousPyramid(nn.Module):
    """What lies at several distances around each cell, side by side (Chen 2017): (B, C, H, W), the same shape out.

    One 3x3 convolution to C / 4 channels for each rate, its taps `rate` cells apart; then a 1x1 convolution of all.
    """

    def __init__(self, channels: int, rates: Sequence[int], activation: str):
        super().__init__()
        narrow = max(channels // 4, 1)
        self.branches = nn.ModuleList(KernelUnit(channels, narrow, activation, dilation=rate) for rate in rates)
        self.merge = KernelUnit(narrow * len(rates), channels, activation, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([branch(x) for branch in self.branches], dim=1))


class ASPPUNet(UNet):
    """ASPPU-Net: the decoder of a U-Net starts from AtrousPyramid(h5).

    Source: Wan, Zhao, Feng, Li, Tong, Qin, "Robust nuclei segmentation in histopathology using ASPPU-Net and boundary
    refinement", Neurocomputing 408, 2020, doi 10.1016/j.neucom.2019.08.103.

    Interpretation: we know the network from its abstract, so place, widths and rates are ours. The usual rates, 6, 12
    and 18, are for larger maps: a tile of 256 px has 16 cells here. The pyramid has no branch of global averages, whose
    values would depend on the tile that a cell lies in. In `Guided` the pyramid takes the fused features. The paper's
    splitting at concave points is not part of a network; here the interior map splits nuclei.

    Args:
        classes, width and the others: of `UNet`.
        rates: of the pyramid, in cells of 16 px.
    """

    def __init__(
        self, classes: int, width: int = 32, rates: Sequence[int] = (1, 2, 4, 8), decoder_activation: str = "relu",
        **options,
    ):
        super().__init__(classes, width, decoder_activation=decoder_activation, **options)
        self.pyramid = AtrousPyramid(self.bottleneck_channels, rates, decoder_activation)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        return super().decode([*skips, self.pyramid(deepest)])
