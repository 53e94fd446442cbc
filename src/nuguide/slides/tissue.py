"""Where a slide has tissue: glass, dust and the ink of pens are left out before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from nuguide.export import OUTLINE_RGB
from nuguide.slides.slide import Slide
from nuguide.tissue import find_tissue

TISSUE_MPP = 8.0
MAX_THUMBNAIL_PX = 4096


@dataclass(frozen=True)
class Tissue:
    """Where a slide has tissue; all coordinates are pixels of its level 0.

    Attributes:
        mask: (h, w) bool, which spans the slide border to border.
        size_px: (height, width) of level 0.
        mpp: microns per pixel of level 0.
    """

    mask: np.ndarray
    size_px: tuple[int, int]
    mpp: float

    @property
    def area_mm2(self) -> float:
        """Area of the mask."""
        height, width = self.size_px
        return float(self.mask.mean()) * height * width * (self.mpp / 1000) ** 2

    def covers(self, top: float, left: float, bottom: float, right: float) -> bool:
        """Whether there is any tissue in a rectangle."""
        (y, x), (last_y, last_x) = self._cells(top, left, math.floor), self._cells(bottom, right, math.ceil)
        return bool(self.mask[max(y, 0) : max(last_y, 0), max(x, 0) : max(last_x, 0)].any())

    def holds(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """(n,) bool, whether points (n,) lie on tissue; None outside the slide does."""
        rows, columns = (
            np.floor(np.asarray(place) * cells / side).astype(np.intp)
            for place, cells, side in zip((y, x), self.mask.shape, self.size_px, strict=True)
        )
        inside = (rows >= 0) & (rows < self.mask.shape[0]) & (columns >= 0) & (columns < self.mask.shape[1])
        found = np.zeros(rows.shape, bool)
        found[inside] = self.mask[rows[inside], columns[inside]]
        return found

    def _cells(self, y: float, x: float, whole: Callable[[float], int]) -> tuple[int, int]:
        height, width = self.size_px
        return whole(y * self.mask.shape[0] / height), whole(x * self.mask.shape[1] / width)


def slide_tissue(slide: Slide, mpp: float, skip_bad: bool = False) -> tuple[Tissue, np.ndarray]:
    """The tissue of a slide, and the thumbnail (h, w, 3) uint8 that it was found on: 8 um per pixel, 4096 px at most.

    Args:
        mpp: microns per pixel of level 0. skip_bad: take what cannot be read for glass.
    """
    longest = max(slide.size_px)
    side_px = min(MAX_THUMBNAIL_PX, max(1, math.ceil(longest * mpp / TISSUE_MPP)))
    thumbnail = slide.thumbnail(side_px, skip_bad)
    mask = find_tissue(thumbnail, mpp * longest / max(thumbnail.shape))
    return Tissue(mask, slide.size_px, mpp), thumbnail


def picture(thumbnail_rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The thumbnail (h, w, 3) uint8 with the outline of the mask drawn on it."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(thumbnail_rgb.copy(), contours, -1, OUTLINE_RGB, 1)
