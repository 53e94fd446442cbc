"""Nuclei copied beside others in training patches: neighbors that touch, of which it is known where each one ends."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .stain import DENSITY

COUNT = (2, 12)                 # copies that are tried
AREA_PX = (30, 900)             # of what is copied: 7.5 to 225 square microns at 0.5 microns per pixel
APART_PX = 2                    # of what is copied, the least distance to any other nucleus
AROUND_PX = 3                   # what is cut out with it on every side
RESIZED = (0.8, 1.25)
OVERLAP = (0.0, 0.25)           # share of a copy that lies on other nuclei
HIDDEN = 0.4                    # share of a nucleus, at most, that copies may take from it


@dataclass(frozen=True)
class Cutting:
    """A nucleus cut out: mask, (h, w) bool, density, (h, w, 3) float32, and beside, (3,), the density next to it."""

    mask: np.ndarray
    density: np.ndarray
    beside: np.ndarray


def crowded(
    image_rgb: np.ndarray, labels: np.ndarray, rng: np.random.Generator, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The patch with some of its nuclei copied, turned, resized and pushed up to others until they touch or overlap.

    Copied are nuclei that stand alone: whoever outlined them, they are one each, while where touching ones part is
    often a guess. A copy lies above its neighbors and owns what they share, and it hides them or, as in a thick
    section, darkens them.

    Args:
        image_rgb: (H, W, 3) uint8. labels: (H, W) int32, 0 background, of the same pixels; may hold `types.IGNORED`.
        first: what the copies are numbered from; above all labels.

    Returns:
        The two, changed, of the same shapes and dtypes.
    """
    cuttings = standing_alone(image_rgb, labels)
    if not cuttings:
        return image_rgb, labels
    density, labels = DENSITY[image_rgb], labels.copy()
    count = int(rng.integers(*COUNT, endpoint=True))
    whole = np.bincount(np.maximum(labels, 0).ravel(), minlength=first + count)
    visible = whole.copy()
    for number in range(first, first + count):
        copy = varied(cuttings[rng.integers(len(cuttings))], rng)
        window = placed(labels, copy.mask, rng)
        if window is None:
            continue
        taken = np.bincount(labels[window][copy.mask], minlength=len(whole))
        taken[0] = 0
        if ((visible - taken < (1 - HIDDEN) * whole) & (taken > 0)).any():
            continue
        visible -= taken
        whole[number] = visible[number] = np.count_nonzero(copy.mask)
        labels[window][copy.mask] = number
        overlay(density[window], copy, rng)
    return np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8), labels


def standing_alone(image_rgb: np.ndarray, labels: np.ndarray) -> list[Cutting]:
    """The nuclei of a patch that touch neither another one, nor what is ignored, nor the border of the patch."""
    present = np.where(labels < 0, labels.max() + 1, labels).astype(np.float32)   # ignored is one nucleus more
    square = np.ones((2 * APART_PX + 1, 2 * APART_PX + 1), np.uint8)
    highest = cv2.dilate(present, square)
    lowest = cv2.erode(np.where(present > 0, present, np.float32(2**24)), square)
    touching = (present > 0) & ((highest != present) | (lowest != present))
    crowd = np.unique(np.concatenate([labels[touching], labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))
    pieces, stats = cv2.connectedComponentsWithStats((~np.isin(labels, crowd) & (labels > 0)).astype(np.uint8))[1:3]
    cuttings = []
    for piece, (left, top, width, height, area) in enumerate(stats[1:], start=1):
        if not AREA_PX[0] <= area <= AREA_PX[1]:
            continue
        window = (slice(max(top - AROUND_PX, 0), top + height + AROUND_PX),
                  slice(max(left - AROUND_PX, 0), left + width + AROUND_PX))
        mask, density = pieces[window] == piece, DENSITY[image_rgb[window]]
        beside = density[(labels[window] == 0) & ~cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)]
        cuttings.append(Cutting(mask, density, np.median(beside, 0) if len(beside) else np.zeros(3, np.float32)))
    return cuttings


def varied(nucleus: Cutting, rng: np.random.Generator) -> Cutting:
    """The nucleus turned by any angle, perhaps mirrored, and resized."""
    height, width = nucleus.mask.shape
    zoom, turn, flip = rng.uniform(*RESIZED), rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    side = int(np.ceil(zoom * np.hypot(height, width)))
    line = (np.arange(side, dtype=np.float32) - (side - 1) / 2) / np.float32(zoom)
    u, v = np.meshgrid(line * np.float32(flip), line)
    x = (np.cos(turn) * u - np.sin(turn) * v + (width - 1) / 2).astype(np.float32)
    y = (np.sin(turn) * u + np.cos(turn) * v + (height - 1) / 2).astype(np.float32)
    soft = cv2.remap(nucleus.mask.astype(np.float32), x, y, cv2.INTER_LINEAR, borderValue=0)
    density = cv2.remap(nucleus.density, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return Cutting(soft > 0.5, density, nucleus.beside)


def placed(labels: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """Where a copy comes to lie: pushed away from some nucleus until no more of it overlaps than drawn for it.

    None where it would leave the patch or cover ignored pixels.
    """
    numbers = np.unique(labels[labels > 0])
    y, x = np.nonzero(labels == rng.choice(numbers))
    share, turn, size = rng.uniform(*OVERLAP), rng.uniform(0, 2 * np.pi), np.count_nonzero(mask)
    for far in range(max(labels.shape)):
        top, left = (round(middle.mean() + far * step - side / 2) for middle, step, side in
                     zip((y, x), (np.sin(turn), np.cos(turn)), mask.shape, strict=True))
        window = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        if top < 0 or left < 0 or window[0].stop > labels.shape[0] or window[1].stop > labels.shape[1]:
            return None
        under = labels[window][mask]
        if (under < 0).any():
            return None
        if np.count_nonzero(under) <= share * size:
            return window
    return None


def overlay(density: np.ndarray, copy: Cutting, rng: np.random.Generator) -> None:
    """Lay a copy over the densities (h, w, 3) float32, in place; half of the copies let show what is below them.

    Half bring a thin rim of what was around them, as touching cells have their membranes between their nuclei.
    """
    mask = copy.mask.astype(np.float32)
    rim = cv2.dilate(mask, np.ones((3, 3))) if rng.random() < 0.5 else mask
    alpha = cv2.GaussianBlur(rim, (0, 0), rng.uniform(0.5, 1.0))[..., None]
    sheer = max(rng.uniform(-1, 1), 0)
    density += alpha * (copy.density + sheer * (density - copy.beside) - density)
    np.maximum(density, 0, out=density)
