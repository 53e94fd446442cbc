"""Where a slide has tissue: glass, dust and the ink of pens are left out before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from nuguide.export import OUTLINE_RGB
from nuguide.instances import without_holes
from nuguide.slides.slide import Slide

TISSUE_MPP = 8.0
MAX_THUMBNAIL_PX = 4096

# Saturation is (max - min) / max of red, green and blue over those of glass: it depends neither on the exposure nor on
# the lamp. That of glass is below 0.02, of fat and pale eosin 0.04 to 0.1, of most tissue 0.2 to 0.5.
SATURATION = (0.03, 0.045)
_CONTRAST = 0.03                # between tissue and glass on average: below, there is one of them alone
_GLASS_SATURATION = 0.1         # of glass before it is divided by itself, under a yellow lamp
_GLASS_SHARE = 0.005            # of the slide, at least, to take its color for that of glass
_SMOOTH_UM = 6.0
_INK_SMOOTH_UM = 12.0
_SPECK_UM2 = 2_500.0            # 50 x 50 um
_HOLE_UM2 = 100_000.0           # 0.3 x 0.3 mm: lumens and fat
_MARGIN_UM = 25.0
_STROKE_UM2 = 20_000.0          # less ink than this is a pigment or a stain artifact
_INK_MARGIN_UM = 30.0           # where the ink runs out its color is no longer told from a stain's
_INK_VALUE = 0.35


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


def find_tissue(thumbnail_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool, True on tissue and up to 25 um around it.

    What is more saturated than Otsu's threshold (IEEE TSMC 9:62, 1979), which is held between those of glass and of
    pale tissue; without pen marks; holes filled and specks dropped by their area. Glass that reaches the border of the
    slide is no hole, however little of it there is.

    Args:
        thumbnail_rgb: (h, w, 3) uint8.
        mpp: its microns per pixel, about 8.
    """
    smooth = cv2.GaussianBlur(thumbnail_rgb, (0, 0), max(0.5, _SMOOTH_UM / mpp)).astype(np.float32)
    saturation = _saturation(smooth / _glass(smooth))
    ink = find_ink(thumbnail_rgb, mpp)
    colored = (saturation > _threshold(saturation[~ink])) & ~ink
    colored = without_holes(_large(colored, _SPECK_UM2 / mpp**2), _HOLE_UM2 / mpp**2)
    return _dilated(colored, _MARGIN_UM / mpp) & ~ink


def find_ink(thumbnail_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool, True on strokes of green, blue, red or black pens and up to 30 um around them.

    Hematoxylin and eosin let red through best or blue, and green least. Ink differs from them: green and cyan let
    green through better than red; red and blue ink are purer than any stain; black ink is dark without a color.
    """
    smooth = cv2.GaussianBlur(thumbnail_rgb, (0, 0), max(0.5, _INK_SMOOTH_UM / mpp)).astype(np.float32) / 255
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV))  # hue in degrees
    green = (hue > 70) & (hue <= 190) & (saturation > 0.15)
    blue = (hue > 190) & (hue <= 240) & (saturation > 0.55)
    red = ((hue > 345) | (hue < 15)) & (saturation > 0.75)
    black = (value < _INK_VALUE) & (saturation < 0.25) & (value > 0)
    core = _large(green | blue | red | black, _STROKE_UM2 / mpp**2)
    return _dilated(core, _INK_MARGIN_UM / mpp)


def picture(thumbnail_rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The thumbnail (h, w, 3) uint8 with the outline of the mask drawn on it."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(thumbnail_rgb.copy(), contours, -1, OUTLINE_RGB, 1)


def _saturation(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 from 0 to 1 of an image (H, W, 3) float32; 0 where it is black."""
    brightest = image.max(2)
    return (brightest - image.min(2)) / np.maximum(brightest, 1 / 255)


def _glass(image: np.ndarray) -> np.ndarray:
    """(3,) float32, the color of glass from 0 to 255: that of what is bright and pale; white where nothing is."""
    brightness = image.max(2)
    bright = (brightness > 0.9 * brightness.max()) & (_saturation(image) < _GLASS_SATURATION)
    if bright.mean() < _GLASS_SHARE:
        return np.full(3, 255, np.float32)
    return np.maximum(np.median(image[bright], axis=0), 1).astype(np.float32)


def _threshold(saturation: np.ndarray) -> float:
    """What divides glass from tissue. Where all is the one or the other, Otsu's threshold would divide noise."""
    least, most = SATURATION
    if not saturation.size:
        return most
    levels = np.clip(saturation * 255, 0, 255).astype(np.uint8).reshape(1, -1)
    otsu, above = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    above = above.ravel() > 0
    if not above.any() or above.all():
        return most
    if saturation[above].mean() - saturation[~above].mean() < _CONTRAST:
        return most
    return float(np.clip(otsu / 255, least, most))


def _large(mask: np.ndarray, least_px: float) -> np.ndarray:
    """The parts of a mask that have at least so many pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = np.asarray(stats)[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return keep[np.asarray(labels, np.intp)] if count > 1 else np.zeros(mask.shape, bool)


def _dilated(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """True up to `radius_px` around the mask."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5) <= radius_px if mask.any() else mask
