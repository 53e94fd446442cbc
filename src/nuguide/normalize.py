"""Stain normalization: images brought to the colors that were measured over the training part.

Everything works on natural optical density, -ln((value + 1) / 256), in which stains add up (Beer and Lambert's law): a
pixel's density is amounts @ stains, with one row of red, green and blue a stain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cv2
import numpy as np

from .stain import DENSITY, STAINS, brightened, exposed, exposure_gain
from .types import UserError

SAMPLE = 30_000             # pixels of an image that its stains are estimated from, on a regular grid
LEAST_TISSUE = 100          # pixels of the sample
LEAST_DENSITY = 0.15        # of tissue, mean of the channels
MOST_RED = 2.0              # density of tissue in red, a value of 34; darker is ink, or too dark to have a color
LEAST_ANGLE = 10.0          # degrees between two stains; below, the image shows one stain and its noise
MOST_ANGLE = 40.0           # degrees between a stain and Ruifrok and Johnston's; beyond, it is no stain
LEAST_AMOUNT = 0.05         # of a stain that is there at all
MOST_SCALE = 2.5            # by which amounts and spreads are changed; more would show the camera's noise
BAND = 1 << 20              # pixels that are changed at once

MACENKO_PERCENT = 1.0       # of pixels beyond the outermost angles that count
AMOUNT_PERCENT = 99.0       # of pixels below the amount that stands for a stain's strength
SPARSITY = 0.1              # lambda of Vahadane's factorization
ROUNDS = 100                # of it at most
SETTLED = 1e-4              # change of the stains in a round at which it ends


@dataclass(frozen=True)
class Method:
    """One kind of normalization.

    Attributes:
        measure: an image (H, W, 3) uint8 -> its colors, a row of numbers for each of `rows`, or None where it shows too
            little tissue or no two stains.
        change: (image (H, W, 3) uint8, its colors, the target's) -> the image with the target's colors.
        merge: colors of many images (N, rows, columns) -> those of them all.
        rows: names of the rows, as they are saved. columns: how many numbers each has.
    """

    measure: Callable[[np.ndarray], np.ndarray | None]
    change: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    merge: Callable[[np.ndarray], np.ndarray]
    rows: tuple[str, ...]
    columns: int


class StainNormalizer:
    """Brings images to the stain colors and strengths of those it was fitted to.

    Every image is brought to one exposure first (`stain.exposed`): the gray of a dim camera would pass for a stain.

    Args:
        name: "macenko" or "vahadane", which bring two stains and their strengths to the target's, or "reinhard", which
            matches mean and spread of the colors of tissue.
        target: what `fit` measures; `from_dict` gives it again.

    Raises ValueError for an unknown name.
    """

    def __init__(self, name: str, target: np.ndarray | None = None):
        if name not in METHODS:
            raise ValueError(f"unknown stain normalization {name!r}; choose from {', '.join(METHODS)}")
        self.name = name
        self.target = target

    def fit(self, images: Iterable[np.ndarray]) -> StainNormalizer:
        """Takes the median over images (H, W, 3) uint8 of what is measured in each as the target; returns itself.

        One image at a time is held. Images without enough tissue do not count.

        Raises UserError where no image counts.
        """
        measured = [METHODS[self.name].measure(exposed(image)) for image in images]
        counted = [colors for colors in measured if colors is not None]
        if not counted:
            raise UserError(
                f"none of {len(measured)} images shows enough stained tissue to fit {self.name} to; "
                "train without stain normalization"
            )
        self.target = METHODS[self.name].merge(np.stack(counted))
        return self

    def apply(self, image_rgb: np.ndarray) -> np.ndarray:
        """The image (H, W, 3) uint8 with the target's colors; see `change_for`."""
        return self.change_for(image_rgb)(image_rgb) if image_rgb.size else image_rgb

    def change_for(self, sample_rgb: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What brings any part of an image to the target's colors, the image's own being measured in a sample of it.

        Where they cannot be measured it changes nothing: that is so for images that are blank, black, of one color, of
        one stain, or covered with ink, and a guess would do more harm than none. Raises ValueError before `fit`.

        Args:
            sample_rgb: (H, W, 3) uint8.
        """
        if self.target is None:
            raise ValueError("this stain normalizer has no target yet; fit it to the training images first")
        method, target, gain = METHODS[self.name], self.target, exposure_gain(sample_rgb)
        colors = method.measure(brightened(sample_rgb, gain))
        if colors is None:
            return lambda image_rgb: image_rgb
        return lambda image_rgb: method.change(brightened(image_rgb, gain), colors, target)

    def to_dict(self) -> dict:
        """The normalizer in plain JSON values, such as {"name": "reinhard", "mean": [...], "spread": [...]}."""
        if self.target is None:
            raise ValueError("this stain normalizer has no target yet; fit it to the training images first")
        rows = zip(METHODS[self.name].rows, self.target.tolist(), strict=True)
        return {"name": self.name, **dict(rows)}

    @classmethod
    def from_dict(cls, stored: dict) -> StainNormalizer:
        """What `to_dict` made; ValueError where it is something else."""
        if not isinstance(stored, dict):
            raise ValueError(f"a stain normalization is an object with a name, not {stored!r}")
        normalizer = cls(str(stored.get("name")))
        method = METHODS[normalizer.name]
        try:
            target = np.array([stored[row] for row in method.rows], np.float64)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"the stain normalization {normalizer.name} needs {', '.join(method.rows)}") from error
        if target.shape != (len(method.rows), method.columns) or not np.isfinite(target).all():
            raise ValueError(f"each of {', '.join(method.rows)} has {method.columns} numbers, but they are {target}")
        normalizer.target = target
        return normalizer


def sampled(image_rgb: np.ndarray) -> np.ndarray:
    """(n, 3) uint8, about `SAMPLE` pixels of an image (H, W, 3) on a regular grid, all of a small one."""
    height, width = image_rgb.shape[:2]
    step = max(int(np.ceil(np.sqrt(height * width / SAMPLE))), 1)
    return image_rgb[step // 2 :: step, step // 2 :: step].reshape(-1, 3)


def is_tissue(density: np.ndarray) -> np.ndarray:
    """(n,) bool: which of n densities (n, 3) are stained tissue, neither glass nor ink.

    Both stains absorb green the most, and red the less. Blue and green ink absorb red far more than green; black ink
    and dirt absorb all colors alike; over tissue, ink is darker than tissue is.
    """
    red, green, _ = density.T
    darkest, lightest = density.max(1), density.min(1)
    colored = (green >= 0.75 * red) & (lightest <= 0.8 * darkest)
    return colored & (density.mean(1) >= LEAST_DENSITY) & (red <= MOST_RED)


def tissue_density(image_rgb: np.ndarray) -> np.ndarray | None:
    """(n, 3) densities of a sample of an image's tissue, or None where it shows less than `LEAST_TISSUE` pixels."""
    density = DENSITY[sampled(image_rgb)]
    density = density[is_tissue(density)]
    return density if len(density) >= LEAST_TISSUE else None


def measure_macenko(image_rgb: np.ndarray) -> np.ndarray | None:
    """Two stains by the outermost directions of density in the plane that holds most of it.

    Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009: the plane is that of
    the two largest singular vectors, the stains are its 1st and 99th percentile of angle. Here the plane goes through
    the origin, as mixtures of two stains do, and tissue is what has a mean density of 0.15: to ask it of every channel
    would leave out eosin, which hardly absorbs red.

    Returns:
        (2, 4): hematoxylin and eosin, each the unit vector of its density and its strength (99th percentile of the
        amount), or None where the image does not show two stains.
    """
    density = tissue_density(image_rgb)
    if density is None:
        return None
    return with_strength(outermost(density), density)


def outermost(density: np.ndarray) -> np.ndarray:
    """(2, 3) the directions of the outermost of n densities (n, 3), unit length."""
    plane = np.linalg.eigh(density.T.astype(np.float64) @ density)[1][:, :0:-1]  # the largest first
    plane[:, 0] *= np.sign(plane[:, 0].sum()) or 1.0  # so that all angles lie around 0
    across = density @ plane
    angles = np.percentile(np.arctan2(across[:, 1], across[:, 0]), [MACENKO_PERCENT, 100 - MACENKO_PERCENT])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T


def measure_vahadane(image_rgb: np.ndarray) -> np.ndarray | None:
    """Two stains by sparse non-negative factorization of density, as `measure_macenko` returns them.

    Vahadane et al., Structure-preserving color normalization and sparse stain separation for histological images, IEEE
    TMI 35, 2016, equation 4: the least |density - amounts @ stains|^2 / 2 + lambda sum(amounts), with all at least 0
    and stains at most of unit length; lambda is 0.1. Solved by turns from the stains of Ruifrok and Johnston, so that
    the result depends on the image alone: amounts exactly (`sparse_amounts`), then one stain after the other exactly,
    as in Mairal et al., Online learning for matrix factorization and sparse coding, JMLR 11, 2010, algorithm 2.
    """
    density = tissue_density(image_rgb)
    if density is None:
        return None
    density = density.astype(np.float64)
    stains = STAINS[:2]
    for _ in range(ROUNDS):
        amounts = sparse_amounts(density, stains)
        gram, seen = amounts.T @ amounts, amounts.T @ density
        if gram.diagonal().min() < 1e-6:                        # one of the stains is nowhere
            return None
        before, stains = stains, stains.copy()
        for one in (0, 1):
            best = np.maximum(stains[one] + (seen[one] - gram[one] @ stains) / gram[one, one], 0)
            stains[one] = best / max(np.linalg.norm(best), 1.0)
        if np.abs(stains - before).max() < SETTLED:
            break
    return with_strength(stains, density)


def sparse_amounts(density: np.ndarray, stains: np.ndarray) -> np.ndarray:
    """(n, 2) the amounts >= 0 that minimize |density - amounts @ stains|^2 / 2 + `SPARSITY` sum(amounts).

    Exact: where the free solution is negative in one stain, the best has none of it, and of the other what it alone
    explains.
    """
    gram = stains @ stains.T
    explained = density @ stains.T - SPARSITY
    amounts = explained @ np.linalg.inv(gram)
    alone = np.maximum(explained, 0)
    for one, other in ((0, 1), (1, 0)):
        negative = amounts[:, one] < 0
        amounts[negative, other] = alone[negative, other]
    return np.maximum(amounts, 0)


def with_strength(stains: np.ndarray, density: np.ndarray) -> np.ndarray | None:
    """(2, 4) hematoxylin, then eosin, each with its strength.

    Hematoxylin is the one that absorbs more red. None where (2, 3) `stains` are hardly two, or one of them is far from
    every published color of its kind.
    """
    stains = np.maximum(stains, 0)
    length = np.linalg.norm(stains, axis=1, keepdims=True)
    if length.min() < 1e-6:
        return None
    stains = stains / length
    stains = stains[np.argsort(-stains[:, 0])]
    if np.degrees(np.arccos(min(stains[0] @ stains[1], 1.0))) < LEAST_ANGLE:
        return None
    if np.degrees(np.arccos(np.clip((stains * STAINS[:2]).sum(1).min(), -1, 1))) > MOST_ANGLE:
        return None
    strength = np.percentile(density @ np.linalg.pinv(stains), AMOUNT_PERCENT, axis=0)
    return np.column_stack([stains, strength]) if strength.min() >= LEAST_AMOUNT else None


def merge_stains(measured: np.ndarray) -> np.ndarray:
    """The median of (N, 2, 4) stains and strengths, the stains at unit length again."""
    merged = np.median(measured, axis=0)
    merged[:, :3] /= np.linalg.norm(merged[:, :3], axis=1, keepdims=True)
    return merged


def change_stains(image_rgb: np.ndarray, colors: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The image with each stain in the target's color and strength.

    What neither stain explains (the part of density at right angles to both: ink, pigment) stays, so the change is one
    3 x 3 matrix on density, and glass stays glass.
    """
    scale = np.clip(target[:, 3] / colors[:, 3], 1 / MOST_SCALE, MOST_SCALE)
    before, after = (np.vstack([stains, unit(np.cross(*stains))]) for stains in (colors[:, :3], target[:, :3]))
    matrix = np.linalg.inv(before) @ np.diag([*scale, 1.0]) @ after

    def change(band: np.ndarray) -> np.ndarray:
        density = cv2.transform(DENSITY[band], np.ascontiguousarray(matrix.T, np.float32))
        # values below 0 are light of more than 255, so that the exponential stays finite
        return 256 * cv2.exp(np.minimum(-density, 1.0, out=density)) - 1

    return in_bands(image_rgb, change)


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1."""
    return vector / np.linalg.norm(vector)


def measure_reinhard(image_rgb: np.ndarray) -> np.ndarray | None:
    """(2, 3): mean and spread (standard deviation) of L*, a* and b* of tissue, or None where it hardly varies.

    Reinhard et al., Color transfer between images, IEEE Computer Graphics and Applications 21, 2001, equations 10 and
    11, in CIELAB instead of their l-alpha-beta, as is usual for slides, and over tissue instead of all pixels, so that
    an image with much glass is not taken for a pale one.
    """
    pixels = sampled(image_rgb)
    pixels = pixels[is_tissue(DENSITY[pixels])]
    if len(pixels) < LEAST_TISSUE:
        return None
    lab = to_lab(pixels[None])[0]
    mean, spread = lab.mean(0, dtype=np.float64), lab.std(0, dtype=np.float64)
    return np.stack([mean, spread]) if spread.min() >= 0.5 else None


def change_colors(image_rgb: np.ndarray, colors: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The image with the target's mean and spread of L*, a* and b*; the paler a pixel, the less, so glass stays."""
    scale = np.clip(target[1] / colors[1], 1 / MOST_SCALE, MOST_SCALE)
    shift = target[0] - colors[0] * scale
    matrix = np.column_stack([np.diag(scale - 1), shift]).astype(np.float32)

    def change(band: np.ndarray) -> np.ndarray:
        lab = to_lab(band)
        share = np.minimum(DENSITY[band].mean(2) / LEAST_DENSITY, 1)
        lab += share[..., None] * cv2.transform(lab, matrix)
        lab[..., 0] = np.clip(lab[..., 0], 0, 100)
        return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB) * 255

    return in_bands(image_rgb, change)


def merge_colors(measured: np.ndarray) -> np.ndarray:
    """The median of (N, 2, 3) means and spreads."""
    return np.median(measured, axis=0)


def to_lab(image_rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 CIELAB of (H, W, 3) uint8: L* 0..100, a* and b* about -100..100."""
    return cv2.cvtColor(image_rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def in_bands(image_rgb: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 of a change of colors (any float, rounded here) that is made a band of rows at a time."""
    rows = max(BAND // image_rgb.shape[1], 1)
    changed = np.empty_like(image_rgb)
    for top in range(0, image_rgb.shape[0], rows):
        values = change(image_rgb[top : top + rows])
        changed[top : top + rows] = np.clip(np.rint(values, out=values), 0, 255, out=values)
    return changed


METHODS: dict[str, Method] = {
    "macenko": Method(measure_macenko, change_stains, merge_stains, ("hematoxylin", "eosin"), 4),
    "reinhard": Method(measure_reinhard, change_colors, merge_colors, ("mean", "spread"), 3),
    "vahadane": Method(measure_vahadane, change_stains, merge_stains, ("hematoxylin", "eosin"), 4),
}
