"""Nuclei as a network sees them, a nucleus and an interior map, and back from those maps to separate nuclei."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

CHANNELS = ("nucleus", "interior")     # what the two output channels of every network mean
INTERIOR_DEPTH = 0.4                   # share of a nucleus's greatest depth at which its interior begins


def targets(labels: np.ndarray) -> np.ndarray:
    """What a network should predict for a label map (H, W) int: (2, H, W) float32, nucleus and interior, 0 or 1.

    The interior of a nucleus is where the distance to its border, neighbors counting as border, exceeds 0.4 of the
    greatest distance inside it; so every nucleus has one, of about a third of its area, apart from all others.
    """
    apart = labels > 0
    apart[:-1] &= (labels[:-1] == labels[1:]) | (labels[1:] == 0)
    apart[:, :-1] &= (labels[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == 0)
    depth = cv2.distanceTransform(apart.astype(np.uint8), cv2.DIST_L2, 5)
    inside = np.flatnonzero(labels)
    found, index = np.unique(labels.ravel()[inside], return_inverse=True)
    greatest = np.zeros(len(found), np.float32)
    np.maximum.at(greatest, index, depth.ravel()[inside])
    interior = np.zeros(labels.shape, np.float32)
    interior.ravel()[inside] = depth.ravel()[inside] > INTERIOR_DEPTH * greatest[index]
    return np.stack([(labels > 0).astype(np.float32), interior])
