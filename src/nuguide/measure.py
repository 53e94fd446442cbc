"""What each nucleus of a label map is like: its outline, place, size, shape and stain.

Frame: x runs right, y down, and the center of the first pixel is (0, 0), so that pixel covers -0.5 to 0.5. Microns are
pixels times microns per pixel, from the same origin.
"""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd

from .runs import Runs, runs_of
from .stain import STAINS

COLUMNS = (
    "id",
    "centroid_x_px",
    "centroid_y_px",
    "centroid_x_um",
    "centroid_y_um",
    "area_um2",
    "perimeter_um",
    "eccentricity",
    "solidity",
    "hematoxylin_od",
    "eosin_od",
    "probability",
)
AGREEMENT = "agreement"  # a further column, where mirror images were segmented too; see `confidence.agreement`
COLUMNS_WITH_FLIPS = (*COLUMNS, AGREEMENT)

_OPTICAL_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


def measure(
    labels: np.ndarray,
    image_rgb: np.ndarray,
    mpp: float,
    probability: np.ndarray,
    rings: dict[int, np.ndarray] | None = None,
) -> pd.DataFrame:
    """One row a nucleus, ordered by id, with `COLUMNS`: id int64, everything else float64.

    * centroid: mean of the pixel centers, in the frame of this module. Area: all pixels of the label.
    * perimeter: length of the outline times pi (1 + sqrt 2) / 8 = 0.948, which takes off the mean excess of a path that
      can only turn by 45 degrees (Kulpa, CGIP 6, 1977): within 3% for disks of a radius of 6 px or more.
    * eccentricity: of the ellipse with the same second moments, each pixel a unit square (its own variance, 1/12,
      included, so that a single pixel has 0): 0 for a disk, towards 1 for a line.
    * solidity: area inside the outline over the area of its convex hull.
    * hematoxylin_od, eosin_od: mean optical density, -log10(max(value, 1) / 255), unmixed with `STAINS`; the
      third color is what is left over, at right angles to both. Unmixing is linear and not clipped, so a mean can be
      slightly below 0.
    * probability: mean over the nucleus, or what the caller knows better; see `confidence`.

    Args:
        labels: (H, W) of any integer type; 0 is background.
        image_rgb: (H, W, 3) uint8.
        mpp: microns per pixel.
        probability: (H, W) float of 0..1 or uint8 of 0..255, or (n,) one value a nucleus in the order of their ids.
        rings: `outlines(labels)`, where the caller has them already.

    Raises:
        ValueError: where shapes or types do not fit together.
    """
    probability = np.asarray(probability)
    _check(labels, image_rgb, mpp)
    runs = runs_of(labels)
    if probability.shape not in (labels.shape, runs.ids.shape):
        raise ValueError(
            f"probability has shape {probability.shape}: it is a map of {labels.shape} or {len(runs.ids)} numbers"
        )
    rings = _outlines(labels, runs) if rings is None else rings
    if list(rings) != runs.ids.tolist():
        raise ValueError(f"{len(rings)} outlines for {len(runs.ids)} nuclei: give outlines(labels) of the same labels")
    area_px, center_x, center_y, eccentricity = _moments(runs)
    length_px, solidity = _ring_shapes(rings)
    hematoxylin, eosin = _stains(image_rgb, runs).T
    if probability.shape == labels.shape:
        scale = 255 if probability.dtype == np.uint8 else 1
        probability = runs.mean(probability.ravel()[runs.pixels]) / scale
    columns = (
        *(runs.ids, center_x, center_y, center_x * mpp, center_y * mpp),
        *(area_px * mpp**2, length_px * mpp, eccentricity, solidity),
        *(hematoxylin, eosin, probability),
    )
    types = [np.int64] + [np.float64] * (len(COLUMNS) - 1)
    return pd.DataFrame({name: column.astype(kind) for name, column, kind in zip(COLUMNS, columns, types, strict=True)})


def renumbered(table: pd.DataFrame, labels: np.ndarray, kept: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """A table and its label map with some of the nuclei alone, numbered from 1 in the same order.

    Args:
        table: as `measure` makes it. labels: (H, W) of an integer type, with its ids. kept: (n,) bool, of its rows.
    """
    ids = table["id"].to_numpy()
    number = np.zeros(int(ids.max(initial=0)) + 1, labels.dtype)
    number[ids[kept]] = np.arange(1, kept.sum() + 1)
    rest = table.loc[kept].reset_index(drop=True)
    rest["id"] = np.arange(1, len(rest) + 1)
    return rest, number[labels]


def outlines(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The outline of each nucleus, ordered by id: (N, 2) float32 of x, y in the frame of this module.

    A ring runs through the middles of the pixel edges that divide the nucleus from what is not it; its first point is
    not repeated. It is simple (never touches itself), has 4 points or more, and holds the pixel centers of the nucleus
    and no others. Pixels that touch at a corner belong together; of a label in several fragments the largest is
    outlined, and holes are filled.

    Args:
        labels: (H, W) of any integer type; 0 is background.
    """
    return _outlines(labels, runs_of(labels))


def _moments(runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Area in pixels, center x and y, eccentricity of each nucleus, from closed sums over its runs."""
    length = (runs.stop - runs.start).astype(np.float64)
    area_px = runs.total(length)
    middle_x = (runs.start + runs.stop - 1) / 2
    center_x, center_y = runs.total(length * middle_x) / area_px, runs.total(length * runs.row) / area_px
    offset_x, offset_y = middle_x - center_x[runs.nucleus], runs.row - center_y[runs.nucleus]
    run_variance = (length**2 - 1) / 12  # of length pixel centers, one apart
    xx = runs.total(length * (offset_x**2 + run_variance)) / area_px + 1 / 12
    yy = runs.total(length * offset_y**2) / area_px + 1 / 12
    xy = runs.total(length * offset_x * offset_y) / area_px
    mean, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    eccentricity = np.sqrt(2 * spread / (mean + spread))  # 1 - minor / major, of the variances mean +- spread
    return area_px, center_x, center_y, eccentricity


def _stains(image_rgb: np.ndarray, runs: Runs) -> np.ndarray:
    """(n, 2) mean optical density of hematoxylin and eosin. The mean is taken first: unmixing is linear."""
    stains = STAINS[:2]
    rest = np.cross(*stains)
    unmix = np.linalg.inv(np.stack([*stains, rest / np.linalg.norm(rest)]))[:, :2]
    values = image_rgb.reshape(-1, 3)[runs.pixels]
    density = [runs.mean(_OPTICAL_DENSITY[values[:, color]]) for color in range(3)]
    return np.stack(density, axis=1) @ unmix


_TURNS = 8  # directions by 45 degrees: 0 east, 2 south (y runs down), 4 west, 6 north
_STEP = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)])
_DIRECTION = np.zeros((3, 3), np.int64)  # of a step, at [dy, dx]
_DIRECTION[_STEP[:, 1], _STEP[:, 0]] = np.arange(_TURNS)


def _bare_edges() -> tuple[np.ndarray, np.ndarray]:
    """For [direction back, direction on] of a border pixel: how many of its edges are bare, and which, in order.

    OpenCV follows a border such that, turning from the way back to the way on, only what is not the nucleus is met.
    """
    count, edges = np.zeros((_TURNS, _TURNS), np.int64), np.zeros((_TURNS, _TURNS, 4), np.int64)
    for back in range(_TURNS):
        for on in range(_TURNS):
            met = [(back - turn) % _TURNS for turn in range(1, (back - on - 1) % _TURNS + 1)]
            bare = [direction for direction in met if direction % 2 == 0]
            count[back, on] = len(bare)
            edges[back, on, : len(bare)] = bare
    return count, edges


_BARE_COUNT, _BARE_EDGES = _bare_edges()


def _outlines(labels: np.ndarray, runs: Runs) -> dict[int, np.ndarray]:
    """Border pixels of one nucleus after another, then their bare edges of all nuclei at once."""
    borders = _borders(labels, runs)
    if not borders:
        return {}
    points = np.concatenate(borders)
    size = np.array([len(border) for border in borders])
    end = np.cumsum(size)
    following, previous = np.arange(1, len(points) + 1), np.arange(-1, len(points) - 1)
    following[end - 1], previous[end - size] = end - size, end - 1
    step = points[following] - points
    on = _DIRECTION[step[:, 1], step[:, 0]]
    step = points[previous] - points
    back = _DIRECTION[step[:, 1], step[:, 0]]
    count = _BARE_COUNT[back, on]
    lone = np.repeat(size == 1, size)
    count[lone] = 4
    source = np.repeat(np.arange(len(points)), count)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    direction = np.where(lone[source], 6 - 2 * nth, _BARE_EDGES[back[source], on[source], nth])
    middles = points[source].astype(np.float32) + _STEP[direction].astype(np.float32) / 2
    cuts = np.cumsum(count)[end - 1][:-1]
    return dict(zip(runs.ids.tolist(), np.split(middles, cuts), strict=True))


def _borders(labels: np.ndarray, runs: Runs) -> list[np.ndarray]:
    """Of each nucleus the border pixels of its largest fragment, (N, 2) int32 of x, y, in order around it."""
    top, left = np.full((2, len(runs.ids)), np.iinfo(np.int64).max)
    bottom, right = np.zeros((2, len(runs.ids)), np.int64)
    np.minimum.at(top, runs.nucleus, runs.row)
    np.maximum.at(bottom, runs.nucleus, runs.row + 1)
    np.minimum.at(left, runs.nucleus, runs.start)
    np.maximum.at(right, runs.nucleus, runs.stop)
    borders = []
    boxes = zip(runs.ids.tolist(), top.tolist(), bottom.tolist(), left.tolist(), right.tolist(), strict=True)
    for id, y0, y1, x0, x1 in boxes:
        mask = (labels[y0:y1, x0:x1] == id).view(np.uint8)
        found = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(x0, y0))[0]
        borders.append((found[0] if len(found) == 1 else max(found, key=_pixels_within))[:, 0])
    return borders


def _pixels_within(border: np.ndarray) -> float:
    """Pixels on and within a border (Pick's theorem)."""
    return cv2.contourArea(border) + len(border) / 2 + 1


def _ring_shapes(rings: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Length in pixels, corrected, and solidity of each ring."""
    length_px, solidity = np.zeros((2, len(rings)))
    for i, ring in enumerate(rings.values()):
        length_px[i] = cv2.arcLength(ring, True)
        solidity[i] = cv2.contourArea(ring) / cv2.contourArea(cv2.convexHull(ring))
    return length_px * (np.pi * (1 + np.sqrt(2)) / 8), solidity


def _check(labels: np.ndarray, image_rgb: np.ndarray, mpp: float) -> None:
    if image_rgb.dtype != np.uint8 or image_rgb.shape != (*labels.shape, 3):
        raise ValueError(f"image is {image_rgb.dtype} of shape {image_rgb.shape}: expected uint8 {(*labels.shape, 3)}")
    if not mpp > 0:
        raise ValueError(f"mpp is {mpp}: microns per pixel are above 0")
