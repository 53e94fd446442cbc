"""Sharp U-Net (Zunair and Ben Hamza 2021): a U-Net whose skips are sharpened."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unet import UNet


class Sharpen(nn.Module):
    """Eight times each pixel less its eight neighbors, channel by channel: (B, C, H, W), the same shape out.

    The border is repeated, so a constant map gives 0 everywhere.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        kernel = -torch.ones(1, 1, 3, 3)
        kernel[..., 1, 1] = 8
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), groups=channels)


class SharpUNet(UNet):
    """Sharp U-Net: decoder level i takes Sharpen(h_i) where the U-Net takes h_i, for h1 ... h4.

    Source: Zunair, Ben Hamza, "Sharp U-Net: Depthwise Convolutional Network for Biomedical Image Segmentation",
    Computers in Biology and Medicine 2021, arXiv 2107.12461. The filter is fixed: as many parameters as the U-Net.

    Interpretation: the kernel is the Laplacian of eight neighbors; the border is repeated; the encoder and the decoder
    are those of `UNet`, with batch norm. A guide reaches h5 only, which is not sharpened.

    Args:
        classes, width and the others: of `UNet`.
    """

    def __init__(self, classes: int, width: int = 32, **options):
        super().__init__(classes, width, **options)
        self.sharpen = Sharpen()

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        return super().decode([*map(self.sharpen, skips), deepest])
