"""Samples to training patches: drawn on the fly, each a pure function of the seed and its place in the run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentation, augment, degrade, recolor
from .guides import CELLS_PX, FrozenGuide
from .guides.fitting import MEAN
from .instances import CHANNELS, gaps, targets
from .latents import LatentCache, RegionLatents
from .normalize import StainNormalizer
from .resample import resampled_size, resize_image, resize_labels
from .stain import exposed
from .types import IGNORED, Sample

INTERIOR = CHANNELS.index("interior")
MARGIN_PX = 24              # of labels around a patch: a nucleus that it cuts keeps the interior that all of it has
INNER = np.s_[:, MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX]


class Patch(NamedTuple):
    """image (S, S, 3) uint8, RGB; target and weight (2, P, P) float32, and latent (C, h, w), as in `Batch`."""

    image: np.ndarray
    target: np.ndarray
    latent: Tensor | None = None
    weight: np.ndarray | None = None


class Batch(NamedTuple):
    """image (B, 3, S, S) float32, RGB 0..255; target (B, 2, P, P) float32, `instances.CHANNELS`, of its middle,
    `types.IGNORED` where nothing is taught.

    S is P and what the guide sees on both sides. latent is (B, C, h, w) where it was read from a cache, else None.
    weight is (B, 2, P, P), how much each target counts, or None where all count alike.
    """

    image: Tensor
    target: Tensor
    latent: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class Picture:
    """One annotated image at the network's resolution.

    image_rgb is (H, W, 3) uint8, labels (H, W) int32; ignore, (H, W) bool or None, is True where nothing is taught.
    Of a picture that is `semantic_only` the nucleus map is taught, but not which nucleus a pixel belongs to.
    """

    id: str
    group: str
    image_rgb: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray | None = None
    semantic_only: bool = False

    @property
    def taught(self) -> np.ndarray:
        """The labels, `IGNORED` where nothing is taught."""
        return self.labels if self.ignore is None else np.where(self.ignore, IGNORED, self.labels).astype(np.int32)


def picture(
    sample: Sample, mpp: float, exposure: bool = False, stain: StainNormalizer | None = None
) -> Picture:
    """The sample at `mpp` microns per pixel, brought to one exposure and one stain if asked."""
    size = resampled_size(sample.labels.shape, sample.mpp, mpp)  # pyright: ignore[reportArgumentType]
    labels = resize_labels(sample.labels, size).astype(np.int32)
    image = resize_image(sample.image_rgb, size)
    image = exposed(image) if exposure else image
    ignore = None if sample.ignore is None else resize_labels(sample.ignore.astype(np.int32), size) > 0
    return Picture(sample.id, sample.group, image if stain is None else stain.apply(image), labels, ignore)


def resized(drawn: Picture, factor: float) -> Picture:
    """The picture with sides `factor` times as long."""
    size = resampled_size(drawn.labels.shape, factor, 1)  # pyright: ignore[reportArgumentType]
    ignore = None if drawn.ignore is None else resize_labels(drawn.ignore, size)
    return replace(
        drawn, image_rgb=resize_image(drawn.image_rgb, size), labels=resize_labels(drawn.labels, size), ignore=ignore
    )


def drawing_weights(groups: Sequence[str], balance: float) -> np.ndarray:
    """How often to draw each picture, summing to 1: in proportion to its group's size to the power of -`balance`.

    0 draws every picture alike, 1 every group.
    """
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** -balance for group in groups])
    return weights / weights.sum()


def harder(weights: np.ndarray, recent: np.ndarray, power: float) -> np.ndarray:
    """How often to draw each picture, summing to 1: `weights`, more for those of high recent loss.

    Each weight is multiplied by the picture's loss over the mean loss, to the given power, but by no more than 4 and no
    less than 1/4. Pictures whose loss is not known yet (nan) count as the mean.
    """
    known = ~np.isnan(recent)
    mean = recent[known].mean() if known.any() else 0.0
    if mean <= 0:
        return weights
    relative = np.where(known, recent, mean) / mean
    weights = weights * np.clip(relative**power, 1 / 4, 4)
    return weights / weights.sum()


class Patches(Dataset):
    """Patch number i of a run, for any i: the picture and its augmentation are drawn from (seed, i) alone, and from the
    `weights` that the pictures have at the time.

    Args:
        pictures: what to draw from. patch_px: side of a patch.
        how: the augmentation. balance: see `drawing_weights`.
        around: what each image shows beyond its patch on every side, in pixels, for the guide.
        factors: least and greatest factor by which a picture is resized before a patch is drawn from it, evenly on a
            log scale and in place of `how.scale`.
        gap_weight: how much the interior map counts in the gaps between close nuclei; 1 elsewhere.
        guide, cache, pool: with a cache, each patch is cut on a fixed lattice and turned by quarter turns and flips
            only, and its latent, read from the cache, with it; color varies for the network alone.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        patch_px: int,
        how: Augmentation,
        seed: int,
        balance: float = 0.5,
        guide: FrozenGuide | None = None,
        cache: LatentCache | None = None,
        pool: int | None = None,
        around: int = 0,
        factors: tuple[float, float] | None = None,
        gap_weight: float = 1.0,
    ):
        self.pictures, self.patch_px, self.seed, self.around, self.factors = pictures, patch_px, seed, around, factors
        self.how = how if factors is None else replace(how, scale=(1.0, 1.0))
        self.weights = drawing_weights([picture.group for picture in pictures], balance)
        self.cache, self.pool, self.gap_weight = cache, pool, gap_weight
        self.guide = None if cache is None else guide           # what draws ahead, in another process, needs none
        self.fill = MEAN if guide is not None and guide.scale == "region" else None

    def __getitem__(self, index: int) -> Patch:
        number, rng = self._drawn(index)
        drawn = self.pictures[number]
        if self.factors is not None:
            drawn = resized(drawn, math.exp(rng.uniform(*np.log(self.factors))))
        latent = None
        if self.cache is None:
            image, labels = augment(
                drawn.image_rgb, drawn.taught, self.patch_px, rng, self.how, self.around, self.fill, MARGIN_PX
            )
        else:
            assert self.guide is not None
            if self.guide.scale == "region":
                image, labels, latent = self._region_patch(drawn, self.guide, self.cache, rng)
            else:
                image, labels, _ = lattice_patch(drawn, self.patch_px, rng)
                latent = self.cache.latent(self.guide, image, self.pool)
            turns, flip = int(rng.integers(4)), bool(rng.integers(2))
            image, labels = turned(image, turns, flip), turned(labels, turns, flip)
            latent = torch.rot90(latent, turns, (1, 2))
            latent = latent.flip(2) if flip else latent
            image = degrade(recolor(image, rng, self.how), rng, self.how)
        target, weight = targets(labels), None
        if self.gap_weight != 1:
            weight = np.ones_like(target)
            weight[INTERIOR, gaps(labels, target[INTERIOR])] = self.gap_weight
            weight = weight[INNER]
        if drawn.semantic_only:
            target[INTERIOR] = IGNORED
        return Patch(image, target[INNER], latent, weight)

    def _drawn(self, index: int) -> tuple[int, np.random.Generator]:
        """The number of the picture that a patch is drawn from, and what draws the rest of it."""
        rng = np.random.default_rng([self.seed, index])
        return int(rng.choice(len(self.pictures), p=self.weights)), rng

    def picture_of(self, index: int) -> int:
        """The number of the picture that patch `index` is drawn from."""
        return self._drawn(index)[0]

    def _region_patch(
        self, drawn: Picture, guide: FrozenGuide, cache: LatentCache, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """A patch of the lattice, its corner on a cell of the latent, and its part of the regions' latents."""
        image, labels, (top, left) = lattice_patch(drawn, self.patch_px, rng, guide.spec.stride)
        whole = mirrored(drawn.image_rgb, *(max(side, self.patch_px) for side in drawn.labels.shape))
        whole = mirrored(whole, *(-(-side // CELLS_PX) * CELLS_PX for side in whole.shape[:2]))
        known = RegionLatents(whole.shape[:2], guide, lambda region: cache.latent(guide, whole[region.window]))  # pyright: ignore[reportArgumentType]
        return image, labels, known.part(top, left, top + self.patch_px, left + self.patch_px)


def turned(image: np.ndarray, turns: int, flip: bool) -> np.ndarray:
    """An image (H, W, ...) after quarter turns and then, if asked, a flip from left to right."""
    image = np.rot90(image, turns)
    return np.ascontiguousarray(image[:, ::-1] if flip else image)


def lattice_patch(
    drawn: Picture, patch_px: int, rng: np.random.Generator, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A square patch at a multiple of half its side, mirrored where the picture is smaller: image, labels, its corner.

    The labels come with `MARGIN_PX` more on every side, in which a nucleus that the border cuts goes on.

    Args:
        multiple: corners are moved up and left to multiples of this, in pixels.
    """
    corner = []
    for side in drawn.labels.shape:
        places = [*range(0, max(side - patch_px, 0), patch_px // 2), max(side - patch_px, 0)]
        corner.append(places[rng.integers(len(places))] // multiple * multiple)
    window = tuple(slice(start, start + patch_px) for start in corner)
    image = mirrored(drawn.image_rgb[window], patch_px, patch_px)
    wide = tuple(slice(start, start + patch_px + 2 * MARGIN_PX) for start in corner)
    labels = mirrored(drawn.taught, *(max(side, patch_px) for side in drawn.labels.shape))
    labels = np.pad(labels, MARGIN_PX, mode="edge")[wide]
    return image, labels, (corner[0], corner[1])


def mirrored(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image (H, W, ...) made as large as (height, width) by mirroring it at its last row and column."""
    below, right = height - image.shape[0], width - image.shape[1]
    if not below and not right:
        return image
    return np.pad(image, [(0, below), (0, right), *[(0, 0)] * (image.ndim - 2)], mode="symmetric")


def collate(patches: Iterable[Patch]) -> Batch:
    """Patches to one batch, channels last in memory."""
    images, found, latents, weights = zip(*patches, strict=True)
    image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    latent = None if latents[0] is None else torch.stack(latents).float()
    weight = None if weights[0] is None else torch.from_numpy(np.stack(weights))
    return Batch(image, torch.from_numpy(np.stack(found)), latent, weight)
