"""The colors of stains, and bringing images from different scanners to one exposure."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

# Optical density of hematoxylin, eosin and residual in red, green and blue (Ruifrok and Johnston, Anal Quant Cytol
# Histol 23, 2001, in the digits of scikit-image), rows of unit length
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)

DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # natural optical density of an 8-bit value

BRIGHT = 240.0            # where the brightest parts of a well exposed slide lie, of 255
MOST_GAIN = 2.5


def exposed(image_rgb: np.ndarray) -> np.ndarray:
    """The image made as bright as a well exposed slide: one gain for all channels, so that colors stay.

    Args:
        image_rgb: (H, W, 3) uint8.

    Returns:
        (H, W, 3) uint8; the image itself where nothing has to change.
    """
    return brightened(image_rgb, exposure_gain(image_rgb))


def restained(
    image_rgb: np.ndarray, amounts: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0)
) -> np.ndarray:
    """The image with the amount of each stain of `STAINS` times `amounts`, and `base` more of it everywhere.

    Optical density is -ln((I + 1) / 256); the change of stain amounts is one linear map of it, since
    OD = amounts @ STAINS.

    Args:
        image_rgb: (H, W, 3) uint8. amounts: a factor for hematoxylin, eosin and residual. base: in optical density.

    Returns:
        (H, W, 3) uint8.
    """
    matrix = np.linalg.inv(STAINS) @ np.diag(amounts) @ STAINS
    density = cv2.transform(DENSITY[image_rgb], np.column_stack([matrix.T, base @ STAINS]).astype(np.float32))
    return np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)


def exposure_gain(image_rgb: np.ndarray) -> float:
    """The factor that brings the 99.5th percentile of the brightest channel of an image (H, W, 3) uint8 to 240.

    It lies between 1 and 2.5: a dark camera is made up for, a bright one is left alone.
    """
    bright = max(np.percentile(image_rgb[..., channel], 99.5) for channel in range(3))
    return float(min(max(BRIGHT / max(bright, 1.0), 1.0), MOST_GAIN))


def brightened(image_rgb: np.ndarray, gain: float) -> np.ndarray:
    """The image (H, W, 3) uint8 times a gain; the image itself where that is below 1.02, too little to matter."""
    if gain < 1.02:
        return image_rgb
    return cv2.LUT(image_rgb, np.clip(np.rint(np.arange(256) * gain), 0, 255).astype(np.uint8))
