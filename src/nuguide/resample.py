"""Images, labels and probabilities between resolutions, stated in microns per pixel (mpp)."""

from __future__ import annotations

import cv2
import numpy as np


def resampled_size(shape: tuple[int, int], mpp: float, target_mpp: float) -> tuple[int, int]:
    """(height, width) of an image of `shape` pixels at `mpp` once it is at `target_mpp`, at least one pixel.

    Sides are rounded to whole pixels; all resizing maps the image's borders onto each other, so rounding stretches an
    image by less than half a pixel over its whole side and shifts nothing.
    """
    if not (mpp > 0 and target_mpp > 0):
        raise ValueError(f"microns per pixel must be positive, not {mpp} and {target_mpp}")
    return max(1, round(shape[0] * mpp / target_mpp)), max(1, round(shape[1] * mpp / target_mpp))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8 at `size` (height, width): area means where it shrinks, else cubic."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (H, W) float32 at `size`, linear."""
    return values if values.shape == size else cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map (H, W) at `size` by the nearest pixel, its type kept."""
    if labels.shape == size:
        return labels
    rows = nearest_index(labels.shape[0], size[0])
    columns = nearest_index(labels.shape[1], size[1])
    return labels[rows[:, None], columns[None, :]]


def nearest_index(old: int, new: int) -> np.ndarray:
    """For each of `new` pixel centers, the nearest of `old` when both span the same length."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.intp), old - 1)
