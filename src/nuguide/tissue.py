"""Where a picture has stained tissue and where pen marks, as colors tell."""

from __future__ import annotations

import cv2
import numpy as np

from .instances import without_holes

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
STROKE_UM2 = 20_000.0           # of ink on a slide; less is a pigment or a stain artifact
_INK_MARGIN_UM = 30.0           # where the ink runs out its color is no longer told from a stain's
_INK_VALUE = 0.35


def find_tissue(thumbnail_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool, True on tissue and up to 25 um around it.

    What is more saturated than Otsu's threshold (IEEE TSMC 9:62, 1979), which is held between those of glass and of
    pale tissue; without pen marks; holes filled and specks dropped by their area. Glass that reaches the border of the
    slide is no hole, however little of it there is.

    Args:
        thumbnail_rgb: (h, w, 3) uint8.
        mpp: its microns per pixel, about 8.
    """
    ink = find_ink(thumbnail_rgb, mpp)
    colored = without_holes(large(stained(thumbnail_rgb, mpp, ink), _SPECK_UM2 / mpp**2), _HOLE_UM2 / mpp**2)
    return _dilated(colored, _MARGIN_UM / mpp) & ~ink


def stained(image_rgb: np.ndarray, mpp: float, ink: np.ndarray) -> np.ndarray:
    """(h, w) bool, True on what is more saturated than glass, pixel by pixel.

    Args:
        image_rgb: (h, w, 3) uint8. mpp: its microns per pixel. ink: (h, w) bool, where pens left nothing to see.
    """
    smooth = cv2.GaussianBlur(image_rgb, (0, 0), max(0.5, _SMOOTH_UM / mpp)).astype(np.float32)
    saturation = _saturation(smooth / _glass(smooth))
    return (saturation > _threshold(saturation[~ink])) & ~ink


def find_ink(image_rgb: np.ndarray, mpp: float, least_um2: float = STROKE_UM2) -> np.ndarray:
    """(h, w) bool, True on strokes of green, blue, red or black pens and up to 30 um around them.

    Hematoxylin and eosin let red through best or blue, and green least. Ink differs from them: green and cyan let
    green through better than red; red and blue ink are purer than any stain; black ink is dark without a color.

    Args:
        image_rgb: (h, w, 3) uint8, such as a thumbnail. mpp: its microns per pixel.
        least_um2: less ink than this is a pigment or a stain artifact.
    """
    smooth = cv2.GaussianBlur(image_rgb, (0, 0), max(0.5, _INK_SMOOTH_UM / mpp)).astype(np.float32) / 255
    hue, saturation, value = cv2.split(cv2.cvtColor(smooth, cv2.COLOR_RGB2HSV))  # hue in degrees
    green = (hue > 70) & (hue <= 190) & (saturation > 0.15)
    blue = (hue > 190) & (hue <= 240) & (saturation > 0.55)
    red = ((hue > 345) | (hue < 15)) & (saturation > 0.75)
    black = (value < _INK_VALUE) & (saturation < 0.25) & (value > 0)
    core = large(green | blue | red | black, least_um2 / mpp**2)
    return _dilated(core, _INK_MARGIN_UM / mpp)


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


def large(mask: np.ndarray, least_px: float) -> np.ndarray:
    """The parts of a mask that have at least so many pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = np.asarray(stats)[:, cv2.CC_STAT_AREA] >= least_px
    keep[0] = False
    return keep[np.asarray(labels, np.intp)] if count > 1 else np.zeros(mask.shape, bool)


def _dilated(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """True up to `radius_px` around the mask."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5) <= radius_px if mask.any() else mask
