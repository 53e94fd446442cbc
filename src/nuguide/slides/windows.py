"""The label map of a slide, which never is in memory as a whole: any window of it, and its pyramid tile by tile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator

import numpy as np

from .parts import PartStore

KEPT_PARTS = 12         # of 32 MB each at most: a walk in squares comes back to those around it


class LabelWindows:
    """Windows of the label map of a slide in fine pixels, put together from the parts that reach into them.

    A nucleus keeps its number of the slide (see `PartStore.all`). A part may reach beyond the core of its region by
    the halo, so the regions around a window have a say in it too. Where two have the same pixel the first has it.

    Args:
        store: the parts. kept: how many label maps stay in memory, the latest asked for.

    Attributes:
        size: (height, width) of the label map. nuclei: how many there are.
    """

    def __init__(self, store: PartStore, kept: int = KEPT_PARTS):
        self.store, self._most = store, kept
        self.size = store.layout.fine_px
        counts = np.array([store.count(region) for region in store.layout.regions], np.int64)
        self.nuclei = int(counts.sum())
        self._numbers = np.flatnonzero(counts)
        self._first = np.cumsum(counts) - counts
        windows = [store.layout.regions[number].window for number in self._numbers]
        boxes = [(window.top, window.left, window.bottom, window.right) for window in windows]
        self._boxes = np.array(boxes, np.int64).reshape(-1, 4) * store.layout.fine
        self._kept: OrderedDict[int, tuple[int, int, np.ndarray]] = OrderedDict()

    def window(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """(bottom - top, right - left) int32 of the slide, 0 beyond its borders and where no nucleus is."""
        result = np.zeros((bottom - top, right - left), np.int32)
        for number in self._reaching(top, left, bottom, right).tolist():
            part_top, part_left, labels = self._labels(number)
            height, width = labels.shape
            y0, y1 = max(top, part_top), min(bottom, part_top + height)
            x0, x1 = max(left, part_left), min(right, part_left + width)
            if y0 >= y1 or x0 >= x1:
                continue
            found = labels[y0 - part_top : y1 - part_top, x0 - part_left : x1 - part_left]
            place = result[y0 - top : y1 - top, x0 - left : x1 - left]
            np.add(found, self._first[number], out=place, where=(found > 0) & (place == 0), casting="unsafe")
        return result

    def _reaching(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """Numbers of the regions with nuclei whose windows meet a rectangle of fine pixels, ascending."""
        boxes = self._boxes
        meets = (boxes[:, 0] < bottom) & (boxes[:, 1] < right) & (boxes[:, 2] > top) & (boxes[:, 3] > left)
        return self._numbers[meets]

    def _labels(self, number: int) -> tuple[int, int, np.ndarray]:
        """Top, left and label map of a part."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self._kept[number] = self.store.labels(self.store.layout.regions[number])
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return self._kept[number]

    def sizes(self, tile_px: int) -> list[tuple[int, int]]:
        """(height, width) of the levels of the pyramid, each half of the one before, down to one that is one tile."""
        sizes = [self.size]
        while max(sizes[-1]) > tile_px:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
        return sizes

    def pyramid(self, tile_px: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Level, row, column and (tile_px, tile_px) int32 of every tile with nuclei, at all levels of `sizes`.

        A level takes the first of every 2 x 2 pixels of the one below. The tiles of a level come square by square, so
        that those that share parts come together, and a tile comes after the four that it is made of: one row of four
        tiles a level is in memory. Beyond the borders of the slide tiles are 0.

        Args:
            tile_px: even.
        """
        yield from self._tiles(len(self.sizes(tile_px)) - 1, 0, 0, tile_px)

    def _tiles(
        self, level: int, row: int, column: int, tile_px: int
    ) -> Generator[tuple[int, int, int, np.ndarray], None, np.ndarray | None]:
        """Yields a tile after all below it, and returns it, None where it has no nuclei."""
        side = tile_px << level
        top, left = row * side, column * side
        if not len(self._reaching(top, left, top + side, left + side)):
            return None
        if level == 0:
            tile = self.window(top, left, top + side, left + side)
        else:
            tile, half = np.zeros((tile_px, tile_px), np.int32), tile_px // 2
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                below = yield from self._tiles(level - 1, 2 * row + i, 2 * column + j, tile_px)
                if below is not None:
                    tile[i * half : (i + 1) * half, j * half : (j + 1) * half] = below[::2, ::2]
        if not tile.any():
            return None
        yield level, row, column, tile
        return tile
