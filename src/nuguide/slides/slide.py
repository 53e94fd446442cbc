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
                " if its drive is connected, copy the slide again from its source"
            ) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        image = np.full((height, width, 3), 255, np.uint8)
        image[first_row - top : last_row - top, first_column - left : last_column - left] = pixels
        return image

    @abstractmethod
    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The same for a window inside the level."""

    def thumbnail(self, max_px: int) -> np.ndarray:
        """The whole slide as (h, w, 3) uint8 whose longer side is `max_px`, or the slide's own where that is less."""
        height, width = self.size_px
        reduced = max(1.0, max(self.size_px) / max_px)
        size = max(1, round(height / reduced)), max(1, round(width / reduced))
        level = max(index for index, level in enumerate(self.levels) if max(level.size_px) >= max(size))
        rows, columns = (Axis(old, new, old / new) for old, new in zip(self.levels[level].size_px, size, strict=True))
        return read_resized(lambda *window: self.read(level, *window), rows, columns, (0, 0, *size))

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
