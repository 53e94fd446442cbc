"""What every whole slide offers, whatever reads its file: a pyramid of levels, and windows of them as RGB."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from nuguide.images import DECODER_ERRORS
from nuguide.resample import Axis, read_resized
from nuguide.types import UserError

_PIECE_PX = 256     # of a damaged slide is read at once


@dataclass(frozen=True)
class Level:
    """One resolution of a slide.

    Attributes:
        downsample: pixels of level 0 per pixel of this level.
        size_px: (height, width).
    """

    downsample: float
    size_px: tuple[int, int]


class Slide(ABC):
    """An open slide. Several threads may read it at once.

    All coordinates are relative to the rectangle of the scan that the file declares to hold the slide (OpenSlide's
    bounds), as in QuPath; where it declares none, to the whole scan.

    Attributes:
        path: the file.
        format: what it is, such as "aperio", "ome-tiff" or "png".
        mpp: microns per pixel of level 0 as the file states them, or None.
        objective_power: such as 40, or None.
        levels: finest first; never empty.
        bounds_px: (x, y) of our first pixel in the whole scan.
        notes: a sentence for each thing that the user should know.
    """

    format: str
    mpp: float | None = None
    objective_power: float | None = None
    levels: tuple[Level, ...]
    bounds_px: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of level 0."""
        return self.levels[0].size_px

    def read(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 of a level, white outside the slide and where the file has no pixels.

        Args:
            level: index into `levels`.
            top, left, height, width: in pixels of that level.

        Raises:
            UserError: the file is damaged there, or can no longer be reached. Other places may still be read.
        """
        rows, columns = self.levels[level].size_px
        first_row, last_row = max(top, 0), min(top + height, rows)
        first_column, last_column = max(left, 0), min(left + width, columns)
        inside = (first_row, first_column, last_row - first_row, last_column - first_column)
        if min(inside[2:]) <= 0:
            return np.full((height, width, 3), 255, np.uint8)
        try:
            pixels = self._pixels(level, *inside)
        except (*DECODER_ERRORS, UserError) as error:
            told = " ".join(str(error).split())[:150] or type(error).__name__
            raise UserError(
                f"{self.path}: cannot be read at x {first_column}, y {first_row} of level {level} ({told});"
                " if its drive is connected, copy the slide again from its source,"
                " or leave such places out with --skip-bad-tiles"
            ) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        image = np.full((height, width, 3), 255, np.uint8)
        image[first_row - top : last_row - top, first_column - left : last_column - left] = pixels
        return image

    @abstractmethod
    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The same for a window inside the level."""

    def thumbnail(self, max_px: int, skip_bad: bool = False) -> np.ndarray:
        """The whole slide as (h, w, 3) uint8 whose longer side is `max_px`, or the slide's own where that is less.

        Args:
            skip_bad: what cannot be read is white, instead of a UserError.
        """
        height, width = self.size_px
        reduced = max(1.0, max(self.size_px) / max_px)
        size = max(1, round(height / reduced)), max(1, round(width / reduced))
        level = max(index for index, level in enumerate(self.levels) if max(level.size_px) >= max(size))
        rows, columns = (Axis(old, new, old / new) for old, new in zip(self.levels[level].size_px, size, strict=True))
        read = self._read_what_can_be if skip_bad else self.read
        return read_resized(lambda *window: read(level, *window), rows, columns, (0, 0, *size))

    def _read_what_can_be(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """`read`, but white where that fails, in squares of `_PIECE_PX`."""
        try:
            return self.read(level, top, left, height, width)
        except UserError:
            if max(height, width) <= _PIECE_PX:
                return np.full((height, width, 3), 255, np.uint8)
        image = np.empty((height, width, 3), np.uint8)
        for y in range(0, height, _PIECE_PX):
            for x in range(0, width, _PIECE_PX):
                size = min(_PIECE_PX, height - y), min(_PIECE_PX, width - x)
                image[y : y + size[0], x : x + size[1]] = self._read_what_can_be(level, top + y, left + x, *size)
        return image

    @abstractmethod
    def close(self) -> None:
        """Let go of the file, once nobody reads it any more."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def levels_of(sizes_px: Sequence[tuple[int, int]]) -> tuple[Level, ...]:
    """The levels of a pyramid from their sizes (height, width), finest first.

    Sizes are rounded, mostly down; where a whole number explains both sides, it is the downsample.
    """
    full = sizes_px[0]
    levels = []
    for size in sizes_px:
        downsample = (full[0] / size[0] + full[1] / size[1]) / 2
        whole = round(downsample)
        if whole and all(side // whole <= part <= -(-side // whole) for side, part in zip(full, size, strict=True)):
            downsample = float(whole)
        levels.append(Level(downsample, size))
    return tuple(levels)
