"""Segmentation networks by name; all share the seam `encode` / `decode`."""

from __future__ import annotations

from .asppunet import ASPPUNet
from .awgunet import AWGUNet
from .blocks import SegmentationNetwork, fold_batch_norm
from .ddunet import DDUNet
from .hovernet import HoVerNet
from .sharpunet import SharpUNet
from .unet import UNet
from .unet3plus import eunet3plus, unet3plus

NETWORKS = {
    "unet": UNet,
    "unet3plus": unet3plus,
    "eunet3plus": eunet3plus,
    "ddunet": DDUNet,
    "awgunet": AWGUNet,
    "asppunet": ASPPUNet,
    "sharpunet": SharpUNet,
    "hovernet": HoVerNet,
}

__all__ = ["NETWORKS", "SegmentationNetwork", "build_network", "fold_batch_norm"]


def build_network(name: str, classes: int, **options) -> SegmentationNetwork:
    """A freshly initialized network; raises ValueError for an unknown name, listing the choices."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}")
    return NETWORKS[name](classes, **options)
