"""Images, labels and probabilities between resolutions, stated in microns per pixel (mpp)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.sparse import csr_array

CUBIC = -0.75              # the parameter of the kernel in cv2.INTER_CUBIC
WEIGHT_BITS = 13           # weights are multiples of 2^-13, ...
_BETWEEN_BITS = 2          # ... values between the two axes of 2^-2: every sum is then exact in float32
_MOST_PARTS = 4            # of the side of a pixel that labels are brought to
_BLOCK_PX = 1500           # side of what is read at once
_STRIP_PX = 64             # rows that are resized at once: floats that stay in the processor's cache, twice as fast


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
    """A label map (H, W) at `size`, its type kept: the label of most of a new pixel, where it grows of the nearest.

    Of labels that have as much of a new pixel, its upper left one and its lower right one are taken by turns, like the
    colors of a chessboard: so nuclei neither move nor grow.
    """
    if labels.shape == size:
        return labels
    rows, columns = (
        [nearest_index(old, new, part, parts) for part in range(parts)]
        for old, new, parts in zip(labels.shape, size, _parts(labels.shape, size), strict=True)
    )
    votes = [labels[row[:, None], column[None, :]] for row in rows for column in columns]
    if len(votes) == 1:
        return votes[0]
    even = np.add.outer(np.arange(size[0]), np.arange(size[1])) % 2 == 0
    most, second = (_majority(order) for order in (votes, votes[::-1]))
    return np.where(even, most, second)


def _parts(old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """Into how many parts a new pixel is divided along each axis, each of which has a vote."""
    return [min(math.ceil(before / after), _MOST_PARTS) for before, after in zip(old, new, strict=True)]


def _majority(votes: list[np.ndarray]) -> np.ndarray:
    """Of equally shaped arrays the value that most have, place by place; of several the first."""
    best, most = votes[0], np.zeros(votes[0].shape, np.uint8)
    for candidate in votes:
        count = np.sum([candidate == other for other in votes], axis=0, dtype=np.uint8)
        best = np.where(count > most, candidate, best)
        most = np.maximum(count, most)
    return best


def nearest_index(old: int, new: int, part: int = 0, parts: int = 1) -> np.ndarray:
    """For each of `new` pixels the one of `old` that holds its center, when both span the same length.

    Args:
        part, parts: of which part of a new pixel the center is meant.
    """
    place = (np.arange(new) + (part + 0.5) / parts) * old / new
    return np.minimum(place.astype(np.intp), old - 1)


@dataclass(frozen=True)
class Axis:
    """How one side of an image is resized: pixel i of `new` shows the old pixels from i * scale to (i + 1) * scale.

    Attributes:
        old: pixels there are; beyond the last one it is repeated.
        new: pixels there will be.
        scale: old pixels per new pixel; old / new where the borders are mapped onto each other.
    """

    old: int
    new: int
    scale: float

    @property
    def whole(self) -> int:
        """The scale where it is a whole number and every new pixel has all its old pixels, else 0."""
        return int(self.scale) if self.scale == int(self.scale) and self.new * self.scale <= self.old else 0


def axis_weights(axis: Axis, start: int, stop: int, shrinks: bool) -> tuple[int, csr_array]:
    """What old pixels bring to the new pixels `start` to `stop` of an axis.

    Returns the first old pixel that is needed, and weights (stop - start, old pixels needed) as float32: whole numbers
    that add up to 2^13 in each row. They depend on the new pixel alone, never on `start` or `stop`.

    Args:
        shrinks: the mean over the area of the new pixel; else cubic interpolation between centers.
    """
    index = np.arange(start, stop, dtype=np.float64)[:, None]
    if shrinks:
        low, high = index * axis.scale, (index + 1) * axis.scale
        taps = np.floor(low) + np.arange(math.ceil(axis.scale) + 1)
        weights = np.clip(np.minimum(high, taps + 1) - np.maximum(low, taps), 0, None)
    else:
        center = (index + 0.5) * axis.scale - 0.5
        taps = np.floor(center) + np.arange(-1, 3)
        weights = _cubic(np.abs(center - taps))
    exact = np.rint(weights / weights.sum(1, keepdims=True) * 2**WEIGHT_BITS)
    largest = exact.argmax(1)
    exact[np.arange(len(exact)), largest] += 2**WEIGHT_BITS - exact.sum(1)  # so that a flat color stays what it is
    columns = np.clip(taps, 0, axis.old - 1).astype(np.int32)
    first = int(columns.min())
    indptr = np.arange(len(index) + 1, dtype=np.int32) * taps.shape[1]
    shape = (len(index), int(columns.max()) + 1 - first)
    matrix = csr_array((exact.ravel().astype(np.float32), (columns - first).ravel(), indptr), shape=shape)
    matrix.eliminate_zeros()
    return first, matrix


def read_resized(
    read: Callable[[int, int, int, int], np.ndarray],
    rows: Axis,
    columns: Axis,
    window: tuple[int, int, int, int],
) -> np.ndarray:
    """A window of an image at another size, of which no more is read at once than a block of about 1500 x 1500 pixels.

    Area means where both sides shrink, else cubic; as `resize_image` to within a gray level. A pixel depends on its
    place in the whole alone: sums are of whole numbers below 2^24, so no order of adding changes them.

    Args:
        read: (top, left, height, width) in old pixels, inside the image -> (height, width, 3) uint8.
        window: (top, left, bottom, right) in new pixels, inside the new image.

    Returns:
        (bottom - top, right - left, 3) uint8.
    """
    top, left, bottom, right = window
    if rows.scale == columns.scale == 1 and rows.new <= rows.old and columns.new <= columns.old:
        return read(top, left, bottom - top, right - left)
    image = np.empty((bottom - top, right - left, 3), np.uint8)
    high, wide = (max(1, int(_BLOCK_PX / axis.scale)) for axis in (rows, columns))
    for y in range(top, bottom, high):
        for x in range(left, right, wide):
            block = (y, x, min(y + high, bottom), min(x + wide, right))
            image[y - top : block[2] - top, x - left : block[3] - left] = _read_block(read, rows, columns, block)
    return image


def _read_block(
    read: Callable[[int, int, int, int], np.ndarray], rows: Axis, columns: Axis, block: tuple[int, int, int, int]
) -> np.ndarray:
    top, left, bottom, right = block
    down, across = rows.whole, columns.whole
    if down and across:  # every new pixel is the mean of a cell of its own, which OpenCV rounds alike anywhere
        cells = read(top * down, left * across, (bottom - top) * down, (right - left) * across)
        return cv2.resize(cells, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    shrinks = rows.scale >= 1 and columns.scale >= 1
    first_row, by_row = axis_weights(rows, top, bottom, shrinks)
    first_column, by_column = axis_weights(columns, left, right, shrinks)
    old = read(first_row, first_column, _shape(by_row)[1], _shape(by_column)[1])
    return _weighted(old, by_row, by_column)


def _weighted(image: np.ndarray, by_row: csr_array, by_column: csr_array) -> np.ndarray:
    """(H, W, 3) uint8 -> (rows of `by_row`, rows of `by_column`, 3) uint8."""
    width = image.shape[1]
    result = np.empty((_shape(by_row)[0], _shape(by_column)[0], 3), np.uint8)
    for start in range(0, len(result), _STRIP_PX):
        part = by_row[start : start + _STRIP_PX]
        first, last = part.indices.min(), part.indices.max()
        weights = csr_array((part.data, part.indices - first, part.indptr), shape=(_shape(part)[0], last + 1 - first))
        between = weights @ image[first : last + 1].reshape(-1, width * 3).astype(np.float32)
        between *= 2.0 ** (_BETWEEN_BITS - WEIGHT_BITS)
        turned = np.rint(between, out=between).reshape(-1, width, 3).swapaxes(0, 1).reshape(width, -1)
        strip = by_column @ turned
        strip *= 2.0 ** -(_BETWEEN_BITS + WEIGHT_BITS)
        np.clip(np.rint(strip, out=strip), 0, 255, out=strip)
        result[start : start + _STRIP_PX] = strip.reshape(len(strip), -1, 3).swapaxes(0, 1)
    return result


def _shape(matrix: csr_array) -> tuple[int, int]:
    rows, columns = matrix.shape  # pyright: ignore[reportGeneralTypeIssues]  SciPy declares that it may be None
    return rows, columns


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE TASSP 29:1153, 1981) at distances from 0 to 2."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    return np.where(distance <= 1, near, far)
