"""Stand-ins that several test modules share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nuguide.guides import GUIDES, FrozenGuide
from nuguide.guides.fitting import fitted, padded_to

RADIUS = 4      # how far a pixel can reach in `ByColor`: the blur 1, the erosion 3


class ByColor(nn.Module):
    """Tells nuclei by color, and sees `RADIUS` pixels far: a network of bounded receptive field.

    Logits of nucleus are (162 - red) / 30, blurred by a 3x3 mean with zeros around: 162 lies midway between the red of
    drawn stroma (228) and of drawn nuclei (95). Those of interior are the least of nucleus within 3 pixels, with +inf
    around. So, near the border of a tile inside the image, both differ from what they are with the rest of the image at
    hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 2, H, W) of images (B, 3, H, W), RGB 0..255."""
        nucleus = F.conv2d((162 - image[:, :1]) / 30, self.get_buffer("mean"), padding=1)
        interior = -F.max_pool2d(-nucleus, 7, stride=1, padding=3)
        return torch.cat([nucleus, interior], dim=1)


class ByColorGuided(ByColor):
    """`ByColor` that takes a latent too, and adds the mean of its first channel to every logit."""

    def forward(self, image: Tensor, latent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(image) + latent[:, :1].mean(dim=(2, 3), keepdim=True)


class Brightness(nn.Module):
    """Takes images as SAM does, resized and filled to a square; its latent is the mean of cells of 16 px. Counts."""

    def __init__(self, image_px: int):
        super().__init__()
        self.image_px, self.runs = image_px, 0
        self.mean = nn.Conv2d(3, 3, 16, stride=16, groups=3, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 256)

    def forward(self, image: Tensor) -> Tensor:
        self.runs += 1
        return self.mean(padded_to(fitted(image, self.image_px), self.image_px, self.image_px))


def brightness(image_px: int, scale: str = "region") -> FrozenGuide:
    spec = dataclasses.replace(GUIDES["sam_vit_b"], name="brightness", channels=3)
    return FrozenGuide(Brightness(image_px), spec, "constant", image_px, scale)
