"""The regions of a slide, computed one after another in bounded memory: read ahead, segment, and keep on disk.

While the network works on a region, the next one is read and the last one is separated into nuclei, measured and
written; none of the three gets more than two regions ahead of the next.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from typing import Protocol

import cv2
import numpy as np
from torch import Tensor

from .confidence import agreement, chance, clarity, features
from .instances import CHANNELS, Separation, enlarge, separate
from .measure import AGREEMENT, COLUMNS, COLUMNS_WITH_FLIPS, measure, outlines
from .predict import (
    CONTEXT_PX,
    MARGIN_PX,
    MIRRORS,
    OVERLAP_PX,
    PHASE_PX,
    TILE_PX,
    Predictor,
    padded,
    resizes,
    sees_regions,
)
from .resample import resampled_size, resize_map
from .slides.layout import REGION_TILES, Layout, Region
from .slides.parts import Part, PartStore
from .tiling import middles, ramp
from .types import Tile, UserError

log = logging.getLogger(__name__)

AHEAD = 2                   # regions read, or waiting to be written, at most
BLOCK_TILES = 2             # side by side, that one pass of the guide serves
CACHED_TILES = 512          # of 1.3 MB each: the last row of tiles of a slide of 450,000 px at 40x
SAMPLE_PX, SAMPLES = 512, 9     # windows from which exposure and stain of a slide are measured
WHITE = 255
BLOCK_PX = 128              # of a damaged slide is left out at once, at least

Place = tuple[int, int]     # row and column of a tile


class Area(Protocol):
    """A part of a slide, in level-0 pixels: tissue, or a region of interest."""

    def covers(self, top: float, left: float, bottom: float, right: float) -> bool:
        """Whether anything of a rectangle may lie in it."""
        ...

    def holds(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Whether points lie in it."""
        ...


class Pixels(Protocol):
    """A slide at the network's resolution; see `slides.grid.Grid`."""

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """A window (h, w, 3) uint8."""
        ...


@dataclass(frozen=True)
class Window:
    """What was read of a slide for one region.

    Attributes:
        image_rgb: (H, W, 3) uint8. prepared_rgb: the same at the exposure and stain that the network wants.
        top, left: where it begins, in grid pixels.
        bad: (top, left, bottom, right) in grid pixels of what could not be read, and is white.
    """

    image_rgb: np.ndarray
    prepared_rgb: np.ndarray
    top: int
    left: int
    bad: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True)
class Step:
    """What one region needs, given those before it in a run: tiles to compute, and tiles to keep for those after it."""

    region: Region
    missing: tuple[Place, ...]
    kept: frozenset[Place]


@dataclass
class Stages:
    """Seconds spent in each stage; with several threads their sum is more than what a clock shows."""

    read: float = 0.0
    network: float = 0.0
    nuclei: float = 0.0
    write: float = 0.0

    def add(self, stage: str, start: float) -> None:
        """Count the time since `start` (of `time.perf_counter`)."""
        setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


def lay_out(slide_px: tuple[int, int], mpp: float, predictor: Predictor) -> Layout:
    """How a slide of that size (H, W) and microns per pixel is divided for a predictor."""
    tile_px = max(predictor.tile_px // PHASE_PX, 2) * PHASE_PX
    overlap_px = min(-(-predictor.overlap_px // PHASE_PX), tile_px // PHASE_PX - 1) * PHASE_PX
    # regions of one size, whatever the tiles: about 1,900 px, REGION_TILES of the default tiles
    region_tiles = max(1, round(REGION_TILES * (TILE_PX - OVERLAP_PX) / (tile_px - overlap_px)))
    fine = 2 if mpp < 0.75 * predictor.spec.mpp else 1
    grid_px = resampled_size(slide_px, mpp, predictor.spec.mpp)
    return Layout(slide_px, mpp, grid_px, predictor.spec.mpp, fine, tile_px, overlap_px, region_tiles)


@dataclass
class SlideRegions:
    """Turns regions of one slide into parts.

    Whatever has been done before or is done elsewhere, a region gives the same part: tiles stand at fixed places, their
    maps are rounded to fp16 whether they are kept for a neighbor or not, and nothing else is shared.

    Attributes:
        pixels: the slide at the network's resolution. layout: of the slide. areas: nuclei whose middle lies in all of
            these are kept; tiles that touch none of one are not computed.
        predictor: the model. skip_bad: take what cannot be read for white, and note it, instead of raising.
    """

    pixels: Pixels
    layout: Layout
    predictor: Predictor
    areas: Sequence[Area] = ()
    skip_bad: bool = False
    stages: Stages = field(default_factory=Stages)
    tiles_done: int = 0

    def __post_init__(self) -> None:
        self._kept: dict[Place, np.ndarray] = {}

    @property
    def views(self) -> int:
        """How many maps there are of each place: 1, or with flips those of the mirror images, too."""
        return len(MIRRORS) if self.predictor.flips else 1

    @cached_property
    def wanted(self) -> tuple[Region, ...]:
        """The regions in which there is something to do."""
        return tuple(region for region in self.layout.regions if self._covered(region.window))

    def _covered(self, rectangle: Tile) -> bool:
        return all(area.covers(*self.layout.level0(rectangle)) for area in self.areas)

    @cached_property
    def active(self) -> frozenset[Place]:
        """(row, column) of the tiles that wanted regions need; the others hold nothing of the areas."""
        asked = {place for region in self.wanted for place in region.tiles}
        return frozenset(place for place in asked if self._covered(self.layout.tile(*place)))

    @cached_property
    def prepare(self) -> Callable[[np.ndarray], np.ndarray]:
        """What the network's input has to undergo, as measured once for the slide in windows spread over its tissue."""
        if self.predictor.stain is None and not self.predictor.spec.exposure:
            return lambda image_rgb: image_rgb
        some = self.wanted[:: max(1, len(self.wanted) // SAMPLES)][:SAMPLES]
        windows = []
        for region in some:
            core = region.window
            top = (core.core_top + core.core_bottom - SAMPLE_PX) // 2
            left = (core.core_left + core.core_right - SAMPLE_PX) // 2
            height, width = self.layout.grid_px
            box = (max(top, 0), max(left, 0), min(top + SAMPLE_PX, height), min(left + SAMPLE_PX, width))
            windows.append(self._pixels(*box)[0])
        side = max(max(window.shape[:2]) for window in windows)
        sample = np.vstack([self._filled_up(window, side) for window in windows])
        return self.predictor.preparation(sample)

    @staticmethod
    def _filled_up(window: np.ndarray, side: int) -> np.ndarray:
        below, right = side - window.shape[0], side - window.shape[1]
        return np.pad(window, ((0, below), (0, right), (0, 0)), mode="edge")

    def run(self, regions: Sequence[Region], store: PartStore, done: Callable[[Region, int], None]) -> None:
        """Compute regions and keep their parts.

        Args:
            regions: of `wanted`, those still to do.
            done: called, in this thread, with each region whose part is on disk and the number of its nuclei.

        Raises:
            UserError: the slide cannot be read, or the part not be written; parts that are done stay.
            MemoryError: a tile does not fit into memory.
        """
        self._kept.clear()
        with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "finish") as finishing:
            waiting: deque[tuple[Step, Future[Window]]] = deque()
            ending: deque[tuple[Region, Future[int]]] = deque()
            remaining = self.steps(regions)
            try:
                waiting.extend((step, reading.submit(self.read, step)) for step in islice(remaining, AHEAD))
                while waiting:
                    step, window = waiting.popleft()
                    image = window.result()
                    waiting.extend((one, reading.submit(self.read, one)) for one in islice(remaining, 1))
                    maps = self.maps(step, image)
                    ending.append((step.region, finishing.submit(self._finish, step.region, image, maps, store)))
                    while len(ending) > AHEAD or (ending and not waiting):
                        finished, count = ending.popleft()
                        done(finished, count.result())
            finally:
                for _, future in waiting:               # but what the network has done is finished and kept
                    future.cancel()

    def steps(self, regions: Sequence[Region]) -> Iterator[Step]:
        """What each of these regions, one after another, has to compute and to keep.

        A tile is kept until the last region that needs it, as long as there is room.
        """
        users = Counter(place for region in regions for place in region.tiles if place in self.active)
        kept: set[Place] = set()
        for region in regions:
            places = [place for place in region.tiles if place in self.active]
            missing = tuple(place for place in places if place not in kept)
            users.subtract(places)
            kept.difference_update(place for place in places if not users[place])
            again = [place for place in missing if users[place]]
            kept.update(again[: CACHED_TILES // self.views - len(kept)])
            yield Step(region, missing, frozenset(kept))

    def _finish(self, region: Region, window: Window, maps: np.ndarray, store: PartStore) -> int:
        start = time.perf_counter()
        part = self.part(region, window, maps)
        self.stages.add("nuclei", start)
        start = time.perf_counter()
        store.write(region, part)
        self.stages.add("write", start)
        return len(part)

    def read(self, step: Step) -> Window:
        """The pixels that a region needs: its window, and its missing tiles with the context that the guide sees.

        Raises:
            UserError: they cannot be read, and `skip_bad` is not set.
        """
        start = time.perf_counter()
        guide = self.predictor.guide
        around = 0 if guide is None or resizes(guide) else CONTEXT_PX
        window, tiles = step.region.window, [self.layout.tile(*place) for place in step.missing]
        height, width = self.layout.grid_px
        # tiles have to start at multiples of PHASE_PX of what they are cut from
        top = max(min([window.top, *(tile.top - around for tile in tiles)]), 0) // PHASE_PX * PHASE_PX
        left = max(min([window.left, *(tile.left - around for tile in tiles)]), 0) // PHASE_PX * PHASE_PX
        bottom = min(max([window.bottom, *(tile.bottom + around for tile in tiles)]), height)
        right = min(max([window.right, *(tile.right + around for tile in tiles)]), width)
        image, bad = self._pixels(top, left, bottom, right)
        seen = Window(image, self.prepare(image), top, left, tuple(bad))
        self.stages.add("read", start)
        return seen

    def _pixels(
        self, top: int, left: int, bottom: int, right: int
    ) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
        """A window of the slide, and what of it could not be read and is white, in blocks (top, left, bottom, right).

        Blocks lie at fixed places of the grid and are read whole, so that neighboring regions that both fail see the
        same.
        """
        try:
            return self.pixels.read(top, left, bottom, right), []
        except UserError as error:
            if not self.skip_bad:
                raise
            log.info("%s: read piece by piece", error)
        image, bad = np.full((bottom - top, right - left, 3), WHITE, np.uint8), []
        height, width = self.layout.grid_px
        for block_top in range(top // BLOCK_PX * BLOCK_PX, bottom, BLOCK_PX):
            for block_left in range(left // BLOCK_PX * BLOCK_PX, right, BLOCK_PX):
                box = block_top, block_left, min(block_top + BLOCK_PX, height), min(block_left + BLOCK_PX, width)
                try:
                    block = self.pixels.read(*box)
                except UserError:
                    bad.append(box)
                else:
                    rows, columns = slice(max(box[0], top), box[2]), slice(max(box[1], left), box[3])
                    part = block[rows.start - box[0] :, columns.start - box[1] :]
                    place = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                    place[...] = part[: place.shape[0], : place.shape[1]]
        return image, bad

    def maps(self, step: Step, window: Window) -> np.ndarray:
        """Probabilities (`views`, 2, h, w) float32 of a region's window; 0 where no tile was computed."""
        start = time.perf_counter()
        known = self._kept | dict(self._computed(step.missing, window))
        box = step.region.window
        total = np.zeros((self.views, len(CHANNELS), box.bottom - box.top, box.right - box.left), np.float32)
        weights = np.zeros(total.shape[2:], np.float32)
        for place in step.region.tiles:
            if place in self.active:
                self._add(self.layout.tile(*place), known[place], box, total, weights)
        total /= np.maximum(weights, 1e-12)
        self._kept = {place: known[place] for place in step.kept}
        self.tiles_done += len(step.missing)
        self.stages.add("network", start)
        return total

    def _computed(
        self, places: Sequence[Place], window: Window
    ) -> Iterator[tuple[Place, np.ndarray]]:
        """The maps of tiles as fp16; those at the slide's border may be of another size, and go by themselves."""
        latent_of = self._latents_in(window)
        for _, group in groupby(places, key=lambda place: self._tile_size(place)):
            some = list(group)
            tiles = [shifted(self.layout.tile(*place), window.top, window.left) for place in some]
            maps = self.predictor.tile_maps(window.prepared_rgb, tiles, latent_of)
            for place, values in zip(some, maps, strict=True):
                yield place, values.astype(np.float16)

    def _latents_in(self, window: Window) -> Callable[[Tile], Tensor] | None:
        """What gives the latent of a tile in the pixels of a window; None where each tile is to ask for its own."""
        of_slide = self._latent_of
        if of_slide is not None:
            return lambda tile: of_slide(shifted(tile, -window.top, -window.left))
        guide = self.predictor.guide
        if guide is None or resizes(guide) or self.predictor.flips:
            return None
        known: dict[Tile, Tensor] = {}

        def part(tile: Tile) -> Tensor:
            place = shifted(tile, -window.top, -window.left)
            block = self._block(place.top // self.layout.stride_px, place.left // self.layout.stride_px)
            if block not in known:
                known[block] = self._block_latent(block, window)
            latent = known[block]
            stride = -(-(block.bottom - block.top) // PHASE_PX) * PHASE_PX // latent.shape[2]
            rows, columns = (
                slice((start - first) // stride, (start - first + -(-(stop - start) // PHASE_PX) * PHASE_PX) // stride)
                for start, stop, first in ((place.top, place.bottom, block.top), (place.left, place.right, block.left))
            )
            return latent[:, :, rows, columns]

        return part

    def _block(self, row: int, column: int) -> Tile:
        """The rectangle around the active tiles that share a pass of the guide with a tile, in grid pixels.

        Blocks lie at fixed places, among the tiles of a row that a region computes anew where those before it are done.
        A pass over more tiles would save more time, and take gigabytes.
        """
        side = self.layout.region_tiles
        block = max(column - 1, 0) // side
        first = block * side + (block > 0)
        first += (column - first) // BLOCK_TILES * BLOCK_TILES
        columns = range(first, min(first + BLOCK_TILES, (block + 1) * side + 1))
        tiles = [self.layout.tile(row, j) for j in columns if (row, j) in self.active]
        start, end = tiles[0], tiles[-1]
        return Tile(start.top, start.left, end.bottom, end.right, start.top, start.left, end.bottom, end.right)

    def _block_latent(self, block: Tile, window: Window) -> Tensor:
        """The guide's latent (1, C, h, w) of a block, whose pixels are read where the window does not hold them."""
        height, width = self.layout.grid_px
        box = (
            max(block.top - CONTEXT_PX, 0), max(block.left - CONTEXT_PX, 0),
            min(block.bottom + CONTEXT_PX, height), min(block.right + CONTEXT_PX, width),
        )
        bottom, right = (window.top + window.image_rgb.shape[0], window.left + window.image_rgb.shape[1])
        if window.top <= box[0] and window.left <= box[1] and box[2] <= bottom and box[3] <= right:
            return self.predictor.latent(window.prepared_rgb, shifted(block, window.top, window.left))
        return self.predictor.latent(self.prepare(self._pixels(*box)[0]), shifted(block, box[0], box[1]))

    @cached_property
    def _latent_of(self) -> Callable[[Tile], Tensor] | None:
        """What gives the latent of a tile where the guide sees regions, which lie at fixed places of the slide too."""
        if not sees_regions(self.predictor.guide):
            return None
        height, width = self.layout.grid_px
        shape = -(-height // PHASE_PX) * PHASE_PX, -(-width // PHASE_PX) * PHASE_PX

        def pixels(region: Tile) -> np.ndarray:
            seen, _ = self._pixels(region.top, region.left, min(region.bottom, height), min(region.right, width))
            return padded(self.prepare(seen), PHASE_PX)

        return self.predictor.region_latents(shape, pixels)

    def _tile_size(self, place: Place) -> tuple[int, int]:
        tile = self.layout.tile(*place)
        return tile.bottom - tile.top, tile.right - tile.left

    def _add(self, tile: Tile, values: np.ndarray, box: Tile, total: np.ndarray, weights: np.ndarray) -> None:
        """Add what a tile says of a window to sums and weights, as `tiling.blend` does for a whole image."""
        overlap = self.layout.overlap_px
        margin = min(MARGIN_PX, overlap // 4)
        height, width = self.layout.grid_px
        top, bottom = max(tile.top, box.top), min(tile.bottom, box.bottom)
        left, right = max(tile.left, box.left), min(tile.right, box.right)
        inside = slice(top - tile.top, bottom - tile.top), slice(left - tile.left, right - tile.left)
        rows = ramp(tile.top, tile.bottom, height, overlap, margin)[inside[0]]
        columns = ramp(tile.left, tile.right, width, overlap, margin)[inside[1]]
        weight = rows[:, None] * columns
        here = slice(top - box.top, bottom - box.top), slice(left - box.left, right - box.left)
        total[..., *here] += values[..., *inside] * weight
        weights[here] += weight

    def part(self, region: Region, window: Window, maps: np.ndarray) -> Part:
        """The nuclei that a region owns, measured."""
        box = shifted(region.window, window.top, window.left)
        image_rgb = window.image_rgb[box.window]
        separation, confidence = self.predictor.separation, self.predictor.spec.confidence
        part = nuclei_of(maps, image_rgb, region.window, self.layout, separation, self.areas, confidence)
        part = part.above(self.predictor.min_probability)
        if not window.bad:
            return part
        bad = np.rint(np.array(window.bad) * np.tile(self.layout.grid_scale, 2)).astype(int).tolist()
        return replace(part, facts={"bad": bad})


def nuclei_of(
    views: np.ndarray,
    image_rgb: np.ndarray,
    box: Tile,
    layout: Layout,
    separation: Separation,
    areas: Sequence[Area],
    confidence: Mapping[str, float],
) -> Part:
    """The nuclei in the maps of a region's window whose middle lies in its core and in all areas.

    Args:
        views: (V, 2, h, w) float32 and image_rgb: (h, w, 3) uint8, both of the window `box`, in grid pixels. The nuclei
            are those of the mean view; where there are several, the table says how far these agree, too.
        confidence: of `ModelSpec`.
    """
    nucleus, interior = views.mean(0) if len(views) > 1 else views[0]
    labels = separate(nucleus, interior, layout.grid_mpp, separation)
    ids, y, x = middles(labels)
    y, x = y + box.top, x + box.left
    own = box.owns(y, x)
    for area in areas:
        scale_y, scale_x = layout.grid_scale
        own[own] = area.holds((y[own] + 0.5) * scale_y, (x[own] + 0.5) * scale_x)
    if not own.any():
        return Part.empty(COLUMNS if len(views) == 1 else COLUMNS_WITH_FLIPS)
    size = labels.shape[0] * layout.fine, labels.shape[1] * layout.fine
    # neighbors that others own are enlarged too, for they bound ours, and only then left out
    fine = enlarge(labels, nucleus, size, separation.nucleus)
    place = np.flatnonzero(fine)
    found = fine.ravel()[place]
    present = np.zeros(labels.max() + 1, bool)      # one that is small may have no pixel at that size
    present[found] = True
    number = np.zeros(len(present), np.int32)
    number[ids[own]] = 1
    number *= present
    index = np.flatnonzero(number) - 1
    number = np.cumsum(number, dtype=np.int32) * number
    fine = np.zeros(size, np.int32)
    fine.ravel()[place] = number[found]
    rings = outlines(fine)
    enlarged_rgb = cv2.resize(image_rgb, size[::-1], interpolation=cv2.INTER_NEAREST)
    table = measure(fine, enlarged_rgb, layout.fine_mpp, resize_map(nucleus, size), rings)
    if confidence:
        table["probability"] = chance(features(table, clarity(labels, interior)[index]), confidence)
    if len(views) > 1:
        alone = [separate(*maps, layout.grid_mpp, separation) for maps in views]  # pyright: ignore[reportCallIssue]
        table[AGREEMENT] = agreement(labels, alone)[index]
    top, left = box.top * layout.fine, box.left * layout.fine
    fine_y, fine_x = layout.fine_scale
    for axis, start, scale in (("x", left, fine_x), ("y", top, fine_y)):
        pixels = (table[f"centroid_{axis}_px"] + start + 0.5) * scale - 0.5
        table[f"centroid_{axis}_px"] = pixels
        table[f"centroid_{axis}_um"] = pixels * layout.mpp
    origin = np.array([left, top], np.float32)
    return Part(table, [ring + origin for ring in rings.values()], fine, top, left)


def shifted(tile: Tile, top: int, left: int) -> Tile:
    """A tile in the pixels of a window that begins at (top, left)."""
    rows = tile.top - top, tile.bottom - top
    columns = tile.left - left, tile.right - left
    return Tile(rows[0], columns[0], rows[1], columns[1], rows[0], columns[0], rows[1], columns[1])
