"""Nuclei as a network sees them, a nucleus and an interior map, and back from those maps to separate nuclei."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .resample import resize_labels, resize_map
from .runs import pieces_of, runs_of
from .types import IGNORED

CHANNELS = ("nucleus", "interior")     # what the two output channels of every network mean
INTERIOR_DEPTH = 0.4                   # share of a nucleus's greatest depth at which its interior begins
GAP_PX = 3


def targets(labels: np.ndarray) -> np.ndarray:
    """What a network should predict for a label map (H, W) int: (2, H, W) float32, nucleus and interior, 0 or 1.

    The interior of a nucleus is where the distance to its border, neighbors counting as border, exceeds 0.4 of the
    greatest distance inside it; so every nucleus has one, of about a third of its area, apart from all others. Where
    the label is `IGNORED` so are both targets; what is seen of a nucleus beside it ends there.
    """
    apart = labels > 0
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        touch = (labels[one] != labels[other]) & (labels[one] > 0) & (labels[other] > 0)
        apart[one] &= ~touch                                          # on both sides, so that no side is preferred
        apart[other] &= ~touch
    depth = cv2.distanceTransform(apart.astype(np.uint8), cv2.DIST_L2, 5)
    inside = np.flatnonzero(labels > 0)
    found, index = np.unique(labels.ravel()[inside], return_inverse=True)
    greatest = np.zeros(len(found), np.float32)
    np.maximum.at(greatest, index, depth.ravel()[inside])
    greatest[greatest == 0] = -1                                      # all border: then all of it is interior
    interior = np.zeros(labels.shape, np.float32)
    interior.ravel()[inside] = depth.ravel()[inside] > INTERIOR_DEPTH * greatest[index]
    both = np.stack([(labels > 0).astype(np.float32), interior])
    both[:, labels == IGNORED] = IGNORED
    return both


def gaps(labels: np.ndarray, interior: np.ndarray) -> np.ndarray:
    """Where (H, W) bool two nuclei of a label map (H, W) int lie within 3 px, outside the interiors of both.

    The pixels that keep neighbors apart: few, so that a loss over all pixels hardly sees them (Ronneberger 2015).
    """
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * GAP_PX + 1, 2 * GAP_PX + 1))
    ids = np.maximum(labels, 0).astype(np.float32)                    # float32 is exact below 2^24
    highest = cv2.dilate(ids, disk)
    lowest = cv2.erode(np.where(ids > 0, ids, np.float32(np.inf)), disk)
    return (highest > lowest) & (interior <= 0)


@dataclass(frozen=True)
class Separation:
    """How probability maps become nuclei; areas and lengths are physical, so they hold at any resolution.

    Attributes:
        nucleus: probability from which a pixel is nucleus. interior: probability from which it can seed one.
        min_area_um2: smaller nuclei are dropped. min_seed_um2: smaller seeds are.
        max_hole_um2: smaller holes are filled.
        reach_um: how far a nucleus may grow from its seed at each level; it bounds how far away a pixel can matter.
    """

    nucleus: float = 0.5
    interior: float = 0.5
    min_area_um2: float = 8.0
    min_seed_um2: float = 1.0
    max_hole_um2: float = 15.0
    reach_um: float = 16.0


LEVELS = (0.3, 0.15)     # of the interior map, flooded one after another before the rest of the nucleus
EIGHT, FOUR = np.ones((3, 3), np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def separate(nucleus: np.ndarray, interior: np.ndarray, mpp: float, how: Separation | None = None) -> np.ndarray:
    """Label map of the nuclei in two probability maps.

    Each connected piece of interior seeds a nucleus; seeds flood the nucleus map in steps of one pixel, first where
    the interior map is high, then lower, then everywhere: a watershed of few levels. Where two floods meet in the same
    step the seed that lies higher in the image wins, so the outcome of a nucleus depends on its surroundings alone and
    not on what else the image holds. A piece of nucleus without interior is one nucleus.

    Args:
        nucleus, interior: (H, W) float, 0..1. mpp: microns per pixel.

    Returns:
        (H, W) int32; 0 is background, nuclei are numbered from 1, by the top of their seeds, each in one 8-connected
        piece.
    """
    how = how or Separation()
    pixel_um2 = mpp * mpp
    mask = without_holes(nucleus >= how.nucleus, how.max_hole_um2 / pixel_um2)
    core = mask & (interior >= how.interior)
    pieces, stats = connected(core, 8)
    core &= (stats[:, cv2.CC_STAT_AREA] >= how.min_seed_um2 / pixel_um2)[pieces]
    bodies, stats = connected(mask, 8)
    seeded = np.zeros(len(stats), bool)
    seeded[bodies[core]] = True
    core |= mask & ~seeded[bodies]
    labels = ranked_pieces(core)
    steps = round(how.reach_um / mpp)
    for level in LEVELS:
        flood(labels, mask & (interior >= level), steps)
    flood(labels, mask, steps)
    found = labels.astype(np.int32)
    large = np.bincount(found.ravel()) >= how.min_area_um2 / pixel_um2
    large[0] = False
    number = np.cumsum(large[::-1], dtype=np.int32)[::-1] * large      # ranks fall from top to bottom, ids rise
    return number[found]


def connected(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """The connected pieces of a mask (H, W) bool, numbered from 1: (H, W) int32, and (n + 1, 5) `cv2.CC_STAT_*`."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=connectivity)
    return pieces, stats


def without_holes(mask: np.ndarray, max_area_px: float) -> np.ndarray:
    """The mask (H, W) bool with its background pieces under `max_area_px` filled, but for those at the image's border.

    A piece cut by the border may be larger than it looks, so it stays.
    """
    pieces, stats = connected(~mask, 4)
    small = stats[:, cv2.CC_STAT_AREA] < max_area_px
    small[0] = False                                                  # the mask itself
    for edge in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        small[edge] = False
    return mask | small[pieces]


def ranked_pieces(mask: np.ndarray) -> np.ndarray:
    """8-connected pieces of a mask (H, W) bool, numbered from bottom to top, ties from right to left: float32.

    The order of two pieces depends on them alone, never on what else the mask holds. float32 is exact below 2^24.
    """
    pieces, stats = connected(mask, 8)
    top, left, area = (stats[1:, column] for column in (cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT, cv2.CC_STAT_AREA))
    number = np.zeros(len(stats), np.float32)
    number[1 + np.lexsort((area, left, top))] = np.arange(len(top), 0, -1)
    return number[pieces]


def flood(labels: np.ndarray, mask: np.ndarray, steps: int) -> None:
    """Grow labels (H, W) float32, in place, over the unlabeled pixels of the mask: one pixel a step, in near-circles.

    Of several labels that reach a pixel in the same step the largest takes it.
    """
    before, idle = -1, 0
    for step in range(steps):
        free = ((labels == 0) & mask).view(np.uint8)
        remaining = cv2.countNonZero(free)
        idle = idle + 1 if remaining == before else 0
        if remaining == 0 or idle == 2:                 # neither the cross nor the square found anything more
            return
        before = remaining
        cv2.copyTo(cv2.dilate(labels, FOUR if step % 2 == 0 else EIGHT), free, labels)


def enlarge(labels: np.ndarray, nucleus: np.ndarray, size: tuple[int, int], threshold: float) -> np.ndarray:
    """A label map at another size, its outlines following the interpolated probability instead of coarse pixels.

    Args:
        labels: (h, w) int32. nucleus: (h, w) float32, the map that they were made from. size: (H, W) wanted.

    Returns:
        (H, W) uint32, the same numbers, each nucleus in one 8-connected piece; one that would have no pixel at that
        size is missing.
    """
    if labels.shape == size:
        return labels.astype(np.uint32)
    margin = 1e-3
    agreed = np.where(labels > 0, np.maximum(nucleus, threshold + margin), np.minimum(nucleus, threshold - margin))
    mask = resize_map(agreed.astype(np.float32), size) >= threshold
    fine = resize_labels(labels, size).astype(np.float32)
    fine *= mask
    flood(fine, mask, steps=2 * max(1, round(size[0] / labels.shape[0])))
    return largest_pieces(fine.astype(np.int32)).astype(np.uint32)


def largest_pieces(labels: np.ndarray) -> np.ndarray:
    """A label map (H, W) int32 with only the largest 8-connected piece of every nucleus, in place.

    A bridge of one pixel can fall below the threshold between pixels and leave a nucleus in two.
    """
    runs = runs_of(labels)
    piece = pieces_of(runs)
    area = np.bincount(piece, runs.stop - runs.start)
    if len(area) == len(runs.ids):
        return labels
    owner = np.zeros(len(area), np.int64)
    owner[piece] = runs.nucleus
    best = np.full(len(runs.ids), -1)
    order = np.argsort(-area, kind="stable")[::-1]          # the largest last, and of those alike the first
    best[owner[order]] = order
    dropped = best[runs.nucleus] != piece
    labels.ravel()[runs.pixels[np.repeat(dropped, runs.stop - runs.start)]] = 0
    return labels
