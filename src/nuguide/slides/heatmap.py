"""A picture of how densely the nuclei of a slide lie."""

from __future__ import annotations

import cv2
import numpy as np

from .parts import PartStore

CELL_UM = 64.0
_SIDE_PX = 1024         # the longer, where there is no thumbnail to lie on
_LEGEND_PX = 150
_LEAST_HEIGHT_PX = 160  # that the legend needs
_FAINT = 0.25           # share of the thumbnail in the mixture
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def density(store: PartStore) -> np.ndarray:
    """Nuclei per mm^2 in cells of about `CELL_UM` that divide the slide: (rows, columns) float64, not smoothed."""
    (height, width), mpp = store.layout.slide_px, store.layout.mpp
    rows, columns = (max(1, round(side * mpp / CELL_UM)) for side in (height, width))
    counts = np.zeros(rows * columns, np.int64)
    for _, _, part in store.all(labels=False):
        y, x = ((part.table[f"centroid_{axis}_px"].to_numpy() + 0.5) for axis in "yx")
        row = (y * rows / height).astype(np.int64).clip(0, rows - 1)
        column = (x * columns / width).astype(np.int64).clip(0, columns - 1)
        counts += np.bincount(row * columns + column, minlength=rows * columns)
    cell_mm2 = height * width * mpp**2 / (rows * columns) / 1e6
    return counts.reshape(rows, columns) / cell_mm2


def heatmap(store: PartStore, thumbnail_rgb: np.ndarray | None = None) -> np.ndarray:
    """The density of nuclei, smoothed over a cell, in colors, with what they mean to the right: (H, W, 3) uint8 RGB.

    The upper left of the picture is the slide, pixel on pixel of the thumbnail, which shines through; without one, the
    slide's longer side has 1024 pixels. Colors end at the densest place, rounded up to 1, 2 or 5 times a power of ten.

    Args:
        thumbnail_rgb: (h, w, 3) uint8 of the whole slide.
    """
    cells = cv2.GaussianBlur(density(store), (0, 0), 1, borderType=cv2.BORDER_REFLECT)
    top = _round(max(float(cells.max()), 1.0), up=True)
    slide_height, slide_width = store.layout.slide_px
    shrunk = _SIDE_PX / max(slide_height, slide_width)
    height, width = max(1, round(slide_height * shrunk)), max(1, round(slide_width * shrunk))
    if thumbnail_rgb is not None:
        height, width = thumbnail_rgb.shape[:2]
    levels = (cells / top * 255).round().astype(np.uint8)
    picture = _colored(cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR))
    if thumbnail_rgb is not None:
        gray = cv2.cvtColor(cv2.cvtColor(thumbnail_rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        picture = cv2.addWeighted(picture, 1 - _FAINT, gray, _FAINT, 0)
    canvas = np.full((max(height, _LEAST_HEIGHT_PX), width + _LEGEND_PX, 3), 255, np.uint8)
    canvas[:height, :width] = picture
    _draw_legend(canvas, width, top)
    _draw_scale_bar(canvas, height, width, slide_width * store.layout.mpp / width)
    return canvas


def _colored(levels: np.ndarray) -> np.ndarray:
    """0..255 in the colors of viridis, whose lightness rises evenly; RGB."""
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _round(value: float, up: bool) -> float:
    """The nearest of 1, 2 and 5 times a power of ten on one side of a value."""
    power = 10.0 ** np.floor(np.log10(value))
    steps = [step * power for step in (1, 2, 5, 10)]
    near = value * (1 - 1e-9 if up else 1 + 1e-9)
    return float(min(step for step in steps if step >= near) if up else max(step for step in steps if step <= near))


def _draw_legend(canvas: np.ndarray, left: int, top_density: float) -> None:
    """A bar of all colors with numbers at its ends and middle."""
    height = min(canvas.shape[0] - 60, 300)
    ramp = np.linspace(255, 0, height).round().astype(np.uint8)
    canvas[40 : 40 + height, left + 12 : left + 32] = _colored(np.tile(ramp[:, None], (1, 20)))
    _write(canvas, "nuclei / mm2", (left + 12, 24))
    for share in (0, 0.5, 1):
        _write(canvas, f"{share * top_density:g}", (left + 40, 45 + round((1 - share) * (height - 1))))


def _draw_scale_bar(canvas: np.ndarray, height: int, width: int, um_per_px: float) -> None:
    """A bar of at most a fifth of the width, in the lower left, with its length."""
    length_um = _round(width * um_per_px / 5, up=False)
    right = 12 + max(1, round(length_um / um_per_px))
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"
    cv2.rectangle(canvas, (6, height - 34), (max(right, 76) + 6, height - 6), (255, 255, 255), -1)
    cv2.rectangle(canvas, (12, height - 14), (right, height - 11), (0, 0, 0), -1)
    _write(canvas, text, (12, height - 19))


def _write(canvas: np.ndarray, text: str, place_xy: tuple[int, int]) -> None:
    cv2.putText(canvas, text, place_xy, _FONT, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
