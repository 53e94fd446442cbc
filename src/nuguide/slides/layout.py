"""How a slide is divided: one grid of tiles over the whole slide, regions cut through the middles of tiles.

Three grids lie over each other, border to border. *Level 0* is the slide as scanned. The *grid* is the slide at the
network's resolution. The *fine* grid, the grid enlarged once or twice, is where outlines are drawn.

Tiles stand at fixed places of the grid, whatever region asks for them, so a pixel near a border between two regions
gets the same probability in both. Regions are cut where only one tile speaks. Hence every nucleus that is smaller than
the halo is seen alike by both sides, and owned by exactly one: the one whose core holds the middle of its bounding box.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from ..types import Tile

REGION_TILES = 3        # a region of a 40x slide is then about 3,800 px wide, 1 mm
HALO_PX = 96            # 48 um at 0.5 microns per pixel


@dataclass(frozen=True)
class Region:
    """A rectangle of a slide that is computed, and kept on disk, as one.

    Attributes:
        row, column: its place among the regions. number: in rows from the top left, from 0.
        window: in grid pixels; its core owns nuclei, the whole of it is separated into nuclei.
        tiles: (row, column) of every tile that has a say in the window.
    """

    row: int
    column: int
    number: int
    window: Tile
    tiles: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"region_{self.row:04d}_{self.column:04d}"


@dataclass(frozen=True)
class Layout:
    """A slide's grids, tiles and regions. Sizes are (height, width).

    Attributes:
        slide_px: of level 0. mpp: microns per pixel of level 0.
        grid_px: of the slide at the network's resolution. grid_mpp: that resolution.
        fine: fine pixels per grid pixel, along a side.
        tile_px, overlap_px: of the tiles, in grid pixels.
        region_tiles: tiles per region, along a side. halo_px: how far a window reaches beyond its core.
    """

    slide_px: tuple[int, int]
    mpp: float
    grid_px: tuple[int, int]
    grid_mpp: float
    fine: int
    tile_px: int
    overlap_px: int
    region_tiles: int = REGION_TILES
    halo_px: int = HALO_PX

    def __post_init__(self):
        if not 0 <= self.overlap_px < self.tile_px:
            raise ValueError(f"tiles of {self.tile_px} px cannot overlap by {self.overlap_px} px")

    @property
    def fine_px(self) -> tuple[int, int]:
        """Size of the fine grid."""
        return self.grid_px[0] * self.fine, self.grid_px[1] * self.fine

    @property
    def fine_mpp(self) -> float:
        """Microns per fine pixel, the mean of both axes (they differ by the rounding of the grid's size)."""
        return sum(side * self.mpp / fine for side, fine in zip(self.slide_px, self.fine_px, strict=True)) / 2

    @property
    def fine_scale(self) -> tuple[float, float]:
        """Level-0 pixels per fine pixel, (y, x)."""
        return self.slide_px[0] / self.fine_px[0], self.slide_px[1] / self.fine_px[1]

    @property
    def grid_scale(self) -> tuple[float, float]:
        """Level-0 pixels per grid pixel, (y, x)."""
        return self.slide_px[0] / self.grid_px[0], self.slide_px[1] / self.grid_px[1]

    @property
    def stride_px(self) -> int:
        """From the start of one tile to that of the next."""
        return self.tile_px - self.overlap_px

    @property
    def tile_rows_columns(self) -> tuple[int, int]:
        """How many tiles lie along either side."""
        rows, columns = (max(1, -(-(side - self.overlap_px) // self.stride_px)) for side in self.grid_px)
        return rows, columns

    def tile(self, row: int, column: int) -> Tile:
        """One tile, in grid pixels; its core is all of it, for regions own nuclei, not tiles."""
        (top, bottom), (left, right) = self._span(row, 0), self._span(column, 1)
        return Tile(top, left, bottom, right, top, left, bottom, right)

    def _span(self, index: int, axis: int) -> tuple[int, int]:
        start = index * self.stride_px
        return start, min(start + self.tile_px, self.grid_px[axis])

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """All regions, in rows from the top left; their cores divide the grid."""
        rows, columns = (self._bands(axis) for axis in (0, 1))
        found = []
        for row, (top, core_top, core_bottom, bottom, tile_rows) in enumerate(rows):
            for column, (left, core_left, core_right, right, tile_columns) in enumerate(columns):
                window = Tile(top, left, bottom, right, core_top, core_left, core_bottom, core_right)
                tiles = tuple((i, j) for i in tile_rows for j in tile_columns)
                found.append(Region(row, column, row * len(columns) + column, window, tiles))
        return tuple(found)

    def _bands(self, axis: int) -> list[tuple[int, int, int, int, range]]:
        """Along an axis, of each row of regions: start, core start, core stop, stop, and its rows of tiles."""
        side, tiles = self.grid_px[axis], self.tile_rows_columns[axis]
        count = max(1, -(-(tiles - 1) // self.region_tiles))
        cuts = [0, *(i * self.region_tiles * self.stride_px + self.tile_px // 2 for i in range(1, count)), side]
        bands = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            first, last = max(start - self.halo_px, 0), min(stop + self.halo_px, side)
            spoken = [i for i in range(tiles) if self._span(i, axis)[0] < last and self._span(i, axis)[1] > first]
            bands.append((first, start, stop, last, range(spoken[0], spoken[-1] + 1)))
        return bands

    @cached_property
    def region_rows_columns(self) -> tuple[int, int]:
        """How many regions lie along either side."""
        return len(self._bands(0)), len(self._bands(1))

    def level0(self, rectangle: Tile) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) in level-0 pixels of the core of a rectangle in grid pixels."""
        y, x = self.grid_scale
        return rectangle.core_top * y, rectangle.core_left * x, rectangle.core_bottom * y, rectangle.core_right * x

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Layout:
        """The layout of `to_dict`."""
        pairs = {name: tuple(values[name]) for name in ("slide_px", "grid_px")}
        return cls(**{**values, **pairs})
