"""Bringing an image to the size and the numbers that an encoder was trained on."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

MEAN = (123.675, 116.28, 103.53)                        # of RGB 0..255, over ImageNet
STD = (58.395, 57.12, 57.375)


def fitted(image: Tensor, longest: int) -> Tensor:
    """RGB 0..255 (B, 3, H, W) with its longest side brought to `longest`, normalized by `MEAN` and `STD`.

    Resized bilinearly, antialiased where it shrinks; an image that has the size already stays as it is.
    """
    own_height, own_width = image.shape[-2:]
    height, width = fitted_size(own_height, own_width, longest)
    x = image.float()
    if (height, width) != (own_height, own_width):
        shrinks = longest < max(own_height, own_width)
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=shrinks)
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def fitted_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width with the given longest side and, up to rounding, the same aspect ratio."""
    scale = longest / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def padded_to(image: Tensor, height: int, width: int) -> Tensor:
    """A normalized image (B, 3, h, w) with zeros, the mean color, below and on the right: (B, 3, height, width)."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
