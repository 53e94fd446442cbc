"""Torn edges and debris drawn into training patches: what lies on glass is stained, but mostly no nucleus."""

from __future__ import annotations

import cv2
import numpy as np

from .stain import DENSITY
from .types import IGNORED

TISSUE_LEFT = (0.3, 0.9)        # of a patch with what it shows around, the share that is not torn away
COUNT = 6                       # pieces of debris, at most
RADIUS_PX = (3.0, 16.0)         # 1.5 to 8 microns at 0.5 microns per pixel: from smaller than a nucleus to larger
LEAST_OF_NUCLEUS = 0.5          # of a nucleus that is torn, what must be left of it to be taught


def littered(
    image_rgb: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Tissue torn along a random line, the rest bare glass with pieces of stained debris on it.

    Debris has colors of the patch, of nuclei and of what is beside them, but ragged outlines and no texture of
    chromatin; it is background.
    What is torn away is background too; of a nucleus more than half of which is torn away, the rest is not taught.

    Args:
        image_rgb: (H, W, 3) uint8. labels: (H, W) int32, 0 background, of the same pixels.

    Returns:
        The two, changed, of the same shapes and dtypes; labels may hold `types.IGNORED`.
    """
    size = labels.shape
    field = smooth(size, rng, int(rng.integers(2, 5))) + 0.15 * smooth(size, rng, 24)
    torn = field > np.quantile(field, rng.uniform(*TISSUE_LEFT))
    glass = np.float32(rng.uniform(222, 248) + rng.uniform(-4, 4, 3))
    bare = cv2.GaussianBlur(torn.astype(np.float32), (0, 0), rng.uniform(0.7, 1.5))[..., None]
    colors = DENSITY[cv2.blur(image_rgb, (3, 3))].reshape(-1, 3)    # pyright: ignore
    density = np.zeros((*size, 3), np.float32)
    solid = np.zeros(size, bool)
    places = np.argwhere(torn)
    for _ in range(rng.integers(1, COUNT + 1) if len(places) else 0):
        outline, thickness = piece(size, places[rng.integers(len(places))], rng)
        density = np.maximum(density, thickness[..., None] * colors[rng.integers(len(colors))])
        solid |= outline > 0.5
    image = (1 - bare) * image_rgb + bare * glass
    image = np.clip(np.rint(image * np.exp(-density)), 0, 255).astype(np.uint8)
    return image, np.where(solid, 0, kept(labels, torn)).astype(labels.dtype)


def piece(size: tuple[int, ...], center: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One piece of debris, (H, W) float32 each: where it lies, in 0..1, and how thick it is there, about 1."""
    radius, turn = rng.uniform(*RADIUS_PX), rng.uniform(0, np.pi)
    y, x = (np.arange(side, dtype=np.float32) - place for side, place in zip(size, center, strict=True))
    along, across = np.cos(turn) * x + np.sin(turn) * y[:, None], np.cos(turn) * y[:, None] - np.sin(turn) * x
    stretch = rng.uniform(1, 2.2)
    distance = np.hypot(along / stretch, across * stretch**0.5) / radius
    ragged = rng.uniform(0.2, 0.6) * smooth(size, rng, int(max(size) / radius))
    outline = cv2.GaussianBlur((distance + ragged < 1).astype(np.float32), (0, 0), rng.uniform(0.6, 2.0))
    foam = 1 + rng.uniform(0.1, 0.5) * smooth(size, rng, int(max(size) / rng.uniform(2, 8)))
    return outline, outline * np.maximum(foam, 0) * np.float32(rng.uniform(0.4, 1.1))


def smooth(size: tuple[int, ...], rng: np.random.Generator, cells: int) -> np.ndarray:
    """Noise of about zero mean and unit spread that changes over the `cells`-th part of the larger side; float32."""
    height, width = (max(2, round(cells * side / max(size))) for side in size)
    coarse = rng.standard_normal((height, width), np.float32)
    return cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)


def kept(labels: np.ndarray, torn: np.ndarray) -> np.ndarray:
    """The labels without what is torn away; what is left of a nucleus that lost too much of it is `IGNORED`."""
    inside = np.maximum(labels, 0)
    before, after = np.bincount(inside.ravel()), np.bincount(inside[~torn], minlength=inside.max() + 1)
    lost = after < LEAST_OF_NUCLEUS * before
    lost[0] = False
    return np.where(torn, 0, np.where(lost[inside], IGNORED, labels))
