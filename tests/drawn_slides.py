"""A drawn slide: disks on a lattice, on every seam and corner between regions, divided into parts by who owns them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from nuguide.measure import measure, outlines
from nuguide.slides.layout import Layout
from nuguide.slides.parts import Part, PartStore
from nuguide.tiling import middles


def small_layout(slide_px: tuple[int, int] = (400, 520), mpp: float = 0.25) -> Layout:
    """2 x 3 regions of a fine grid of 400 x 520 pixels, with seams at multiples of 32, where the disks lie."""
    return Layout(slide_px, mpp, (200, 260), 0.5, 2, 64, 16, 2, 16)


def disks(size: tuple[int, int], pitch: int = 32, radius: int = 14) -> np.ndarray:
    """Label map (H, W) int32 of disks that do not touch, their places jittered by a pixel."""
    rng = np.random.default_rng(0)
    labels = np.zeros(size, np.int32)
    centers = [(x, y) for y in range(0, size[0] + radius, pitch) for x in range(0, size[1] + radius, pitch)]
    for number, center in enumerate(centers, 1):
        x, y = np.array(center) + rng.integers(-1, 2, 2)
        cv2.circle(labels, (int(x), int(y)), int(rng.integers(radius - 2, radius)), number, -1)
    return labels


def divide(labels: np.ndarray, store: PartStore) -> np.ndarray:
    """Give each region the nuclei whose middles lie in its core; the label map with the numbers of the slide.

    Args:
        labels: (H, W) int32 of the fine grid.
    """
    layout, numbered, first = store.layout, np.zeros_like(labels), 0
    ids, y, x = middles(labels)
    for region in layout.regions:
        window = region.window
        mine = ids[window.owns(y // layout.fine, x // layout.fine)]
        new = np.zeros(labels.max() + 1, np.int32)
        new[mine] = np.arange(1, len(mine) + 1)
        top, left = window.top * layout.fine, window.left * layout.fine
        crop = new[labels[top : window.bottom * layout.fine, left : window.right * layout.fine]]
        store.write(region, part_of(crop, top, left, layout))
        numbered += np.where(new[labels] > 0, new[labels] + first, 0)
        first += len(mine)
    return numbered


def part_of(labels: np.ndarray, top: int, left: int, layout: Layout) -> Part:
    """Of a label map whose first pixel is at (top, left) of the fine grid; every pixel is gray, probability 1 / 2."""
    rings = outlines(labels)
    gray, half = np.full((*labels.shape, 3), 128, np.uint8), np.full(labels.shape, 0.5)
    table = measure(labels, gray, layout.fine_mpp, half, rings)
    for axis, start, scale in zip("yx", (top, left), layout.fine_scale, strict=True):
        table[f"centroid_{axis}_px"] = (table[f"centroid_{axis}_px"] + start + 0.5) * scale - 0.5
        table[f"centroid_{axis}_um"] = table[f"centroid_{axis}_px"] * layout.mpp
    return Part(table, [ring + np.array([left, top], np.float32) for ring in rings.values()], labels, top, left)


def drawn_store(folder: Path, layout: Layout | None = None) -> tuple[PartStore, np.ndarray]:
    """The parts of a drawn slide, and its label map."""
    store = PartStore(folder, layout or small_layout())
    folder.mkdir(exist_ok=True)
    return store, divide(disks(store.layout.fine_px), store)
