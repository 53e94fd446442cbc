"""What may be wrong with a picture or a slide: focus, pen marks, glass, folds, exposure, magnification.

Every limit was chosen on training images, so that about 1% of the sound ones at most are beyond it; how many defects
are found in others, and how many sound images are reported, `benchmarks/quality.py` measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from .resample import resampled_size, resize_image
from .stain import STAINS, exposed
from .tissue import STROKE_UM2, find_ink, large, stained

if TYPE_CHECKING:
    import pandas as pd

FINE_MPP = 0.5                  # where focus is judged
WINDOW_PX, WINDOWS = 256, 9     # of a picture, at `FINE_MPP`, in which it is judged
BLOCK_PX = 128                  # parts of a window that are judged each by itself: a slide may be sharp in places
COARSE_MPP = 2.0                # where all else is seen

LEAST_FOCUS = 0.265             # below, a block is blurred
LEAST_CONTRAST = 2e-4           # variance of optical density smoothed over 2 um; below, there is nothing to judge
MOST_BLURRED = 0.5              # share of the blocks
MOST_INK = 0.02                 # share of the picture
LEAST_TISSUE = 0.05             # share of a picture; slides are mostly glass, so that theirs may be less
LEAST_SLIDE_TISSUE = 0.005
MOST_FOLDED = 0.03              # share of the tissue
LEAST_BRIGHTNESS = 100.0        # of the brightest parts, of 255
USUAL_AREA_UM2 = (14.5, 150.0)  # of the median nucleus, whatever the tissue
TYPICAL_AREA_UM2 = 50.0
LEAST_NUCLEI = 10               # whose median area tells of the magnification

_TEXTURE, _TEXTURE_UM = 0.025, 16.0     # standard deviation of the optical density over so many microns
_FOLD_SMOOTH_UM = 8.0
_FOLD_TIMES = 1.4               # the stain of the tissue around, of hematoxylin and of eosin: two layers or more
_FOLD_UM2 = 1_500.0
_OPAQUE = 0.65                  # optical density in red, where tissue lets light through, over 6 um
_OPAQUE_SMOOTH_UM = 6.0
_STROKE_SHARE = 0.1             # of a picture that is too small to show a whole stroke

_OPTICAL_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
_REST = np.cross(STAINS[0], STAINS[1])
_UNMIX = np.linalg.inv(np.stack([*STAINS[:2], _REST / np.linalg.norm(_REST)]))[:, :2].astype(np.float32)


@dataclass(frozen=True)
class Quality:
    """Numbers about a picture or a slide; None where it cannot be told.

    Attributes:
        tissue_share, ink_share: of the picture. fold_share: of the tissue.
        focus: how fine the structures of hematoxylin are, see `focus`; the median over blocks.
        blurred_share: share of the blocks with structures that are out of focus.
        brightness: of the brightest parts, 0 to 255.
        nuclei: how many were found, None where nobody looked. median_area_um2: of them.
        findings: kind -> a sentence, with a remedy, for each of `KINDS` that is wrong.
    """

    tissue_share: float
    ink_share: float
    fold_share: float
    focus: float | None
    blurred_share: float | None
    brightness: float
    nuclei: int | None = None
    median_area_um2: float | None = None
    findings: dict[str, str] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """The sentences of the findings."""
        return list(self.findings.values())

    def numbers(self) -> dict[str, Any]:
        """What was measured by looking at the picture, as JSON holds it."""
        kept = asdict(self)
        for name in ("nuclei", "median_area_um2", "findings"):
            del kept[name]
        return {name: None if value is None else round(float(value), 4) for name, value in kept.items()}


def inspect(image_rgb: np.ndarray, mpp: float, table: pd.DataFrame | None = None) -> Quality:
    """The quality of a picture.

    Args:
        image_rgb: (H, W, 3) uint8. mpp: its microns per pixel.
        table: the nuclei found in it, one row each with their `area_um2`; without it nothing is said of magnification.
    """
    coarse = resize_image(image_rgb, resampled_size(image_rgb.shape[:2], mpp, max(mpp, COARSE_MPP)))
    area_um2 = None if table is None else table["area_um2"].to_numpy()
    return _judged(coarse, max(mpp, COARSE_MPP), windows_of(image_rgb, mpp), mpp, area_um2, LEAST_TISSUE)


def inspect_slide(
    thumbnail_rgb: np.ndarray, thumbnail_mpp: float, windows: Sequence[np.ndarray], mpp: float, area_um2: np.ndarray
) -> Quality:
    """The quality of a slide.

    Args:
        thumbnail_rgb: (h, w, 3) uint8 of the whole slide. thumbnail_mpp: its microns per pixel.
        windows: (h, w, 3) uint8 each, parts of its tissue at `FINE_MPP` or, where it has no more, its own resolution.
        mpp: microns per pixel of the slide as scanned. area_um2: (n,) of its nuclei.
    """
    return _judged(thumbnail_rgb, thumbnail_mpp, windows, mpp, area_um2, LEAST_SLIDE_TISSUE)


def _judged(
    coarse_rgb: np.ndarray,
    coarse_mpp: float,
    windows: Sequence[np.ndarray],
    mpp: float,
    area_um2: np.ndarray | None,
    least_tissue: float,
) -> Quality:
    brightness = max(float(np.percentile(coarse_rgb[..., channel], 99.5)) for channel in range(3))
    stroke_um2 = min(STROKE_UM2, _STROKE_SHARE * coarse_rgb[..., 0].size * coarse_mpp**2)
    ink = find_ink(coarse_rgb, coarse_mpp, stroke_um2) | opaque(coarse_rgb, coarse_mpp, brightness)
    tissue = (stained(coarse_rgb, coarse_mpp, ink) | textured(coarse_rgb, coarse_mpp)) & ~ink
    values = [value for window in windows for value in focus(window)]
    quality = Quality(
        tissue_share=float(tissue.mean()),
        ink_share=float(ink.mean()),
        fold_share=fold_share(coarse_rgb, coarse_mpp, tissue),
        focus=float(np.median(values)) if values else None,
        blurred_share=float(np.mean(np.array(values) < LEAST_FOCUS)) if values else None,
        brightness=brightness,
        nuclei=None if area_um2 is None else len(area_um2),
        median_area_um2=float(np.median(area_um2)) if area_um2 is not None and len(area_um2) else None,
    )
    return replace(quality, findings=_findings(quality, mpp, least_tissue))


def _findings(quality: Quality, mpp: float, least_tissue: float) -> dict[str, str]:
    """Kind -> sentence of all that is wrong.

    Where there is no tissue no more is said of it: focus and folds are measures of tissue.
    """
    found = {}
    if quality.ink_share > MOST_INK:
        found["pen"] = f"pen marks cover {quality.ink_share:.0%}: leave out what was found under them"
    if quality.brightness < LEAST_BRIGHTNESS:
        found["dark"] = f"the brightest parts have {quality.brightness:.0f} of 255: too dark, scan with more light"
    if quality.tissue_share < least_tissue:
        share = f"{quality.tissue_share:.2%}"
        found["glass"] = f"tissue is {share} of it: check that it is no empty glass, and that the stain is no fainter"
    else:
        found |= _of_tissue(quality)
    if quality.nuclei == 0:
        found["no nuclei"] = "no nuclei were found: check the stain, the focus and --mpp"
    if (likely := likely_mpp(quality, mpp)) is not None:
        found["magnification"] = (
            f"nuclei look too {'large' if likely < mpp else 'small'} for {mpp:.4g} microns per pixel "
            f"(median {quality.median_area_um2:.0f} um2): if the scan is {10 / likely:.3g}x, give --mpp {likely:.4g}"
        )
    return found


def _of_tissue(quality: Quality) -> dict[str, str]:
    found = {}
    if quality.blurred_share is not None and quality.blurred_share > MOST_BLURRED:
        found["blur"] = f"{quality.blurred_share:.0%} of the tissue looked at is out of focus: scan it again"
    if quality.fold_share > MOST_FOLDED:
        found["fold"] = f"folds cover {quality.fold_share:.0%} of the tissue: leave out what was found in them"
    return found


def likely_mpp(quality: Quality, mpp: float) -> float | None:
    """The microns per pixel at which the nuclei would have a usual size; None where they have, or are too few.

    A wrong objective is wrong by a power of two, so it differs from `mpp` by one.
    """
    median, (least, most) = quality.median_area_um2, USUAL_AREA_UM2
    if median is None or (quality.nuclei or 0) < LEAST_NUCLEI or least <= median <= most:
        return None
    octaves = max(1, round(abs(math.log2(TYPICAL_AREA_UM2 / median)) / 2))
    return mpp * 2.0 ** (octaves if median < least else -octaves)


def focus(window_rgb: np.ndarray) -> list[float]:
    """How fine the structures of hematoxylin are in each block of a window that has enough of them.

    Of the optical density in red, where hematoxylin absorbs and eosin does not, it is the energy between Gaussians of
    0.8 and 1.6 px over that between 1.6 and 3.2 px: what defocus takes over what it leaves, so that neither the amount
    of stain nor that of nuclei matters. White noise, as estimated from what is finer than 0.8 px, is taken off first.

    Args:
        window_rgb: (h, w, 3) uint8, at `FINE_MPP`.
    """
    density = _OPTICAL_DENSITY[window_rgb[..., 0]]
    smooth = [density, *(cv2.GaussianBlur(density, (0, 0), sigma) for sigma in (0.8, 1.6, 3.2))]
    bands = [(finer - coarser) ** 2 for finer, coarser in zip(smooth, smooth[1:], strict=False)]
    values = []
    for top in range(0, window_rgb.shape[0], BLOCK_PX):
        for left in range(0, window_rgb.shape[1], BLOCK_PX):
            block = slice(top, top + BLOCK_PX), slice(left, left + BLOCK_PX)
            finest, fine, coarse = (float(band[block].mean()) for band in bands)
            enough = min(smooth[-1][block].shape) >= BLOCK_PX // 4 and smooth[-1][block].var() > LEAST_CONTRAST
            if enough and coarse > 0:
                values.append((fine - _NOISE * finest) / coarse)
    return values


_NOISE = 0.09   # energy of white noise between Gaussians of 0.8 and 1.6 px over that above 0.8 px: 0.056 / 0.627


def windows_of(image_rgb: np.ndarray, mpp: float) -> list[np.ndarray]:
    """Windows (h, w, 3) uint8 spread over a picture (H, W, 3), at `FINE_MPP` or, where it has no more, its own."""
    side = round(WINDOW_PX * max(FINE_MPP / mpp, 1.0))
    rows, columns = (spread(length, side) for length in image_rgb.shape[:2])
    crops = [image_rgb[top : top + side, left : left + side] for top in rows for left in columns]
    return [resize_image(crop, resampled_size(crop.shape[:2], mpp, max(mpp, FINE_MPP))) for crop in crops]


def spread(length: int, side: int) -> list[int]:
    """Where up to 3 windows of a side begin along a length, evenly spread."""
    count = min(max(length // side, 1), round(math.sqrt(WINDOWS)))
    return [round((i + 0.5) * length / count - side / 2) if length > side else 0 for i in range(count)]


def opaque(coarse_rgb: np.ndarray, mpp: float, brightness: float) -> np.ndarray:
    """(h, w) bool, True where less red light passes than through any stained tissue: pens over tissue, dirt.

    Args:
        coarse_rgb: (h, w, 3) uint8. mpp: its microns per pixel. brightness: of its brightest parts.
    """
    red = cv2.GaussianBlur(np.ascontiguousarray(coarse_rgb[..., 0]), (0, 0), max(0.5, _OPAQUE_SMOOTH_UM / mpp))
    return red < brightness * 10**-_OPAQUE


def textured(coarse_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """(h, w) bool, True where density varies: pale stroma without any glass beside it has the color of tinted glass.

    Args:
        coarse_rgb: (h, w, 3) uint8. mpp: its microns per pixel.
    """
    density = _OPTICAL_DENSITY[coarse_rgb[..., 1]]              # in green, where both stains absorb
    side = max(3, round(_TEXTURE_UM / mpp))
    mean, square = cv2.blur(density, (side, side)), cv2.blur(density**2, (side, side))
    return square - mean**2 > _TEXTURE**2


def fold_share(coarse_rgb: np.ndarray, mpp: float, tissue: np.ndarray) -> float:
    """Share of the tissue that is folded: broad bands with both stains much stronger than elsewhere.

    Nuclei that lie close have more hematoxylin, but less eosin; blood has more eosin, but no hematoxylin.

    Args:
        coarse_rgb: (h, w, 3) uint8. mpp: its microns per pixel. tissue: (h, w) bool.
    """
    if tissue.sum() * mpp**2 < _FOLD_UM2:
        return 0.0
    smooth = cv2.GaussianBlur(_stains(exposed(coarse_rgb)), (0, 0), max(0.5, _FOLD_SMOOTH_UM / mpp))
    usual = np.median(smooth[tissue], axis=0)
    times = (smooth / np.maximum(usual, 0.02)).min(2)
    folds = large((times > _FOLD_TIMES) & tissue, _FOLD_UM2 / mpp**2)
    return float(folds.sum() / tissue.sum())


def _stains(image_rgb: np.ndarray) -> np.ndarray:
    """(h, w, 2) float32 optical density of hematoxylin and eosin."""
    return _OPTICAL_DENSITY[image_rgb] @ _UNMIX
