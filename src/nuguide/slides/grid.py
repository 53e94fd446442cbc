"""A slide at the resolution that a model wants, read window by window."""

from __future__ import annotations

import numpy as np

from nuguide.resample import Axis, read_resized, resampled_size
from nuguide.slides.slide import Level, Slide

_LEVEL_SLACK = 1.01        # a level that is 1% coarser than asked for is as good as one that is exact
_SIZE_SLACK = 0.005        # a level whose sides differ more from what its downsample says shows something else


class Grid:
    """A slide resampled to `target_mpp`: any window of it equals the same crop of the whole, bit for bit.

    Attributes:
        shape: (height, width) of the whole, in pixels of the grid.
        scale: (y, x) pixels of level 0 per pixel of the grid; borders lie on borders.
        level: the level that is read: the coarsest that is no coarser than `target_mpp`.
        mpp: microns per pixel of level 0, as given.
        target_mpp: microns per pixel of the grid.
    """

    def __init__(self, slide: Slide, mpp: float, target_mpp: float) -> None:
        self.shape = resampled_size(slide.size_px, mpp, target_mpp)
        self.mpp, self.target_mpp = mpp, target_mpp
        height, width = slide.size_px
        self.scale = height / self.shape[0], width / self.shape[1]
        self.level = max(
            index
            for index, level in enumerate(slide.levels)
            if index == 0 or (mpp * level.downsample <= target_mpp * _LEVEL_SLACK and _consistent(slide, level))
        )
        self._slide = slide
        level = slide.levels[self.level]
        self._rows, self._columns = (
            Axis(old, new, scale / level.downsample)
            for old, new, scale in zip(level.size_px, self.shape, self.scale, strict=True)
        )

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """(bottom - top, right - left, 3) uint8: a window inside the grid, in its pixels.

        Area means where the slide shrinks, cubic interpolation where it grows, the slide's own pixels where it does
        neither. At most a block of about 1500 x 1500 pixels of the slide is held at once.

        Raises:
            ValueError: the window is empty or not inside the grid.
            UserError: the slide cannot be read there.
        """
        if not (0 <= top < bottom <= self.shape[0] and 0 <= left < right <= self.shape[1]):
            raise ValueError(f"no window of a grid of {self.shape}: rows {top} to {bottom}, columns {left} to {right}")
        return read_resized(self._read_level, self._rows, self._columns, (top, left, bottom, right))

    def _read_level(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self._slide.read(self.level, top, left, height, width)

    def describe(self) -> str:
        """Such as "level 0 (0.2527 mpp), reduced 1.98 times to 0.5 microns per pixel"."""
        level_mpp = self.mpp * self._slide.levels[self.level].downsample
        factor = self.target_mpp / level_mpp
        if abs(factor - 1) < 0.0005:
            change = "as it is,"
        else:
            change = f"reduced {factor:.3g} times to" if factor > 1 else f"enlarged {1 / factor:.3g} times to"
        return f"level {self.level} ({level_mpp:.4g} mpp), {change} {self.target_mpp:.4g} microns per pixel"


def _consistent(slide: Slide, level: Level) -> bool:
    """Whether both sides of a level are what its downsample says, to a pixel or half a percent."""
    return all(
        abs(full / level.downsample - side) <= max(1.0, _SIZE_SLACK * side)
        for full, side in zip(slide.size_px, level.size_px, strict=True)
    )
