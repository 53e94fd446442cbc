"""An image as overlapping tiles and back: probabilities blended smoothly, every nucleus owned by exactly one tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np

from .types import Tile


def cover(shape: tuple[int, int], tile_px: int, overlap_px: int, multiple: int = 1) -> list[Tile]:
    """Tiles of one size, but for those cut by the image's border, that cover an image, in rows from the top left.

    As few tiles as will do, no side longer than `tile_px`, neighbors sharing at least `overlap_px`; they are made only
    as large as that takes, so little is computed twice. Cores end in the middle of the overlaps.

    Args:
        shape: (H, W) of the image.
        multiple: tiles start at multiples of this and end at them or at the image's border. A network that halves its
            maps k times gives a pixel the same answer from any tile only if the tile starts at a multiple of 2^k.

    Raises:
        ValueError: the overlap leaves a tile nothing of its own.
    """
    if overlap_px < 0 or tile_px // multiple <= -(-overlap_px // multiple):
        raise ValueError(f"tiles of {tile_px} px cannot overlap by {overlap_px} px in multiples of {multiple} px")
    rows, columns = (spans(side, tile_px // multiple * multiple, overlap_px, multiple) for side in shape)
    return [
        Tile(top, left, bottom, right, core_top, core_left, core_bottom, core_right)
        for top, bottom, core_top, core_bottom in rows
        for left, right, core_left, core_right in columns
    ]


def spans(side: int, tile: int, overlap: int, multiple: int) -> list[tuple[int, int, int, int]]:
    """(start, stop, core start, core stop) of each tile along one side."""
    whole, shared = (-(-value // multiple) * multiple for value in (side, overlap))
    count = max(1, math.ceil((whole - shared) / (tile - shared)))
    length = -(-math.ceil((whole + (count - 1) * shared) / count) // multiple) * multiple
    starts = [round(i * (whole - length) / max(count - 1, 1) / multiple) * multiple for i in range(count)]
    stops = [min(start + length, side) for start in starts]
    cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops, strict=False)), side]
    return list(zip(starts, stops, cuts, cuts[1:], strict=False))


def regions(shape: tuple[int, int], side_px: int, multiple: int) -> list[Tile]:
    """As few squares as cover an image, each of the whole side where the image is so large, in rows from the top left.

    They spread evenly; cores end near the middle of what two share, at multiples of `multiple`.

    Args:
        shape: (H, W) of the image. side_px: a multiple of `multiple`.
    """
    rows, columns = ([*_whole_spans(side, side_px, multiple)] for side in shape)
    return [
        Tile(top, left, bottom, right, core_top, core_left, core_bottom, core_right)
        for top, bottom, core_top, core_bottom in rows
        for left, right, core_left, core_right in columns
    ]


def _whole_spans(side: int, length: int, multiple: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop, core start, core stop) of each region along one side."""
    count = max(1, math.ceil(side / length))
    spare = max(-(-side // multiple) * multiple - length, 0)
    starts = [round(i * spare / max(count - 1, 1) / multiple) * multiple for i in range(count)]
    cuts = [0, *((start + before + length) // 2 // multiple * multiple for before, start in pairwise(starts)), side]
    for start, (core_start, core_stop) in zip(starts, pairwise(cuts), strict=True):
        yield start, min(start + length, side), core_start, core_stop


def ramp(start: int, stop: int, side: int, overlap_px: int, margin_px: int) -> np.ndarray:
    """Weight of each pixel of a tile along one side: (stop - start,) float32.

    Zero for `margin_px` from a border inside the image, where the tile lacks context, then rising linearly until
    `margin_px` before the overlap ends, then 1. A border of the image has no ramp.
    """
    distance = np.arange(stop - start, dtype=np.float32) + 0.5
    weight = np.ones(stop - start, np.float32)
    width = max(overlap_px - 2 * margin_px, 1)
    if start > 0:
        weight = np.minimum(weight, np.clip((distance - margin_px) / width, 0, 1))
    if stop < side:
        weight = np.minimum(weight, np.clip((distance[::-1] - margin_px) / width, 0, 1))
    return weight


def blend(
    shape: tuple[int, int], tiles: Iterable[tuple[Tile, np.ndarray]], channels: int, overlap_px: int, margin_px: int
) -> np.ndarray:
    """Maps of an image from the maps of its tiles: weighted means where tiles overlap.

    With `margin_px` at least the radius of the receptive field of what made the maps, the result is the map of the
    whole image up to rounding.

    Args:
        tiles: of `cover` with this overlap, each with its map (channels, tile height, tile width) float.
        margin_px: 0, or below half the overlap.

    Returns:
        (channels, H, W) float32.

    Raises:
        ValueError: the margins leave nothing of the overlap.
    """
    if margin_px > 0 and 2 * margin_px >= overlap_px:
        raise ValueError(f"a margin of {margin_px} px leaves nothing of an overlap of {overlap_px} px")
    total = np.zeros((channels, *shape), np.float32)
    weights = np.zeros(shape, np.float32)
    for tile, values in tiles:
        rows = ramp(tile.top, tile.bottom, shape[0], overlap_px, margin_px)
        columns = ramp(tile.left, tile.right, shape[1], overlap_px, margin_px)
        weight = rows[:, None] * columns
        total[:, *tile.window] += values * weight
        weights[tile.window] += weight
    total /= weights
    return total


def gather(
    shape: tuple[int, int], tile_px: int, halo_px: int, label: Callable[[Tile], np.ndarray]
) -> tuple[np.ndarray, list[int]]:
    """A label map of an image from the label maps of its tiles, each nucleus taken from the one tile that owns it.

    A tile owns a nucleus when its core holds the middle of the nucleus's bounding box. Every nucleus that is smaller
    than the halo lies whole in its owner, and what other tiles see of it is left out.

    Args:
        tile_px: side of a tile with its halo. halo_px: how far a tile reaches beyond its core.
        label: the label map (tile height, tile width) int32 of a tile.

    Returns:
        labels (H, W) int32, numbered from 1 tile by tile, and how many nuclei each tile owned.
    """
    tiles = cover(shape, tile_px, 2 * halo_px)
    if len(tiles) == 1:
        labels = label(tiles[0])
        return labels, [int(labels.max(initial=0))]
    result = np.zeros(shape, np.int32)
    owned: list[int] = []
    for tile in tiles:
        found = label(tile)
        keep = np.zeros(found.max(initial=0) + 1, np.int32)
        ids, y, x = middles(found)
        mine = ids[tile.owns(y + tile.top, x + tile.left)]
        keep[mine] = np.arange(1, len(mine) + 1) + sum(owned)
        owned.append(len(mine))
        target = result[tile.window]
        np.copyto(target, keep[found], where=(target == 0))
    return result, owned


def middles(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, y, x) of the middle of each label's bounding box, in pixels of the label map, rounded down."""
    y, x = np.nonzero(labels)
    value = labels[y, x]
    count = labels.max(initial=0) + 1
    box = []
    for place in (y, x):
        low, high = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
        np.minimum.at(low, value, place)
        np.maximum.at(high, value, place)
        box.append((low, high))
    ids = np.flatnonzero(box[0][1] >= 0)
    return ids, *((low[ids] + high[ids]) // 2 for low, high in box)


def batches(tiles: Iterable[Tile], size: int) -> Iterator[list[Tile]]:
    """The tiles in lists of up to `size`."""
    waiting: list[Tile] = []
    for tile in tiles:
        waiting.append(tile)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
