"""After training: the ranges that 8-bit convolutions need, the thresholds that separate nuclei best, and how far to
trust what they find."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import checkpoint
from .batches import Picture
from .confidence import clarity, features, fit
from .guides import FrozenGuide
from .instances import Separation, enlarge, separate
from .measure import measure
from .metrics import aji, best_overlap, dice, panoptic_quality
from .networks.int8 import InputRanges, Ranges
from .predict import DEFAULT_MPP, Predictor
from .resample import resize_map

# thresholds of nucleus and interior, and least areas in square microns, that are tried
GRID = {"nucleus": (0.4, 0.5, 0.6, 0.7), "interior": (0.4, 0.5, 0.6), "min_area_um2": (8.0, 14.0)}
AIM = 0.5                   # the nucleus threshold that training aims at
LEVEL = 0.002               # scores that differ by no more are taken for equal: a few images decide between them


def calibrate(
    folder: Path, train: Sequence[Picture], val: Sequence[Picture], guide: FrozenGuide | None, at_most: int = 48
) -> Path:
    """Note in a model's folder its activation ranges, measured on pictures it was trained on, and its `Separation`.

    The separation is `best_separation` of the validation pictures, and so is the `confidence` in what it finds fitted.

    Args:
        guide: the model's, for its weights may lie anywhere; it is changed in place.
        at_most: so many training pictures, evenly spaced, are used for the ranges.
    """
    model, _, spec = checkpoint.load(folder, guide)
    predictor = Predictor(*checkpoint.load(folder, guide), device="cpu", precision="fp32")
    ranges = input_ranges(predictor, train[:: -(-len(train) // at_most)])
    separation = best_separation(predictor, val)
    predictor.separation = Separation(**separation)
    trust = confidence_of(val, [judged(predictor, drawn, predictor.probabilities(drawn.image_rgb)) for drawn in val])
    spec = dataclasses.replace(spec, int8_ranges=ranges, separation=separation, confidence=trust)
    return checkpoint.save(folder, model, spec)


def input_ranges(predictor: Predictor, pictures: Sequence[Picture]) -> Ranges:
    """The least and greatest input of every convolution on the pictures, to four decimals."""
    with torch.inference_mode(), InputRanges(predictor.model) as seen:
        for drawn in pictures:
            side = 2 * predictor.spec.tile_px
            predictor.probabilities(drawn.image_rgb[:side, :side])
    return {name: (round(low, 4), round(high, 4)) for name, (low, high) in seen.ranges.items()}


def best_separation(predictor: Predictor, pictures: Sequence[Picture]) -> dict[str, float]:
    """The options of `GRID` with the highest mean of Dice, AJI and PQ over the pictures, at the model's resolution;
    of those that are `LEVEL` with the highest, the best one of those whose nucleus threshold is nearest to `AIM`.

    Every data set counts alike, however many pictures it has: what suits the largest may lose the nuclei of another.
    """
    maps = [predictor.probabilities(drawn.image_rgb) for drawn in pictures]
    tried: list[tuple[float, dict[str, float]]] = []
    for values in itertools.product(*GRID.values()):
        options = dict(zip(GRID, values, strict=True))
        how = Separation(**options)
        scores: dict[str, list[float]] = {}
        for drawn, (nucleus, interior) in zip(pictures, maps, strict=True):
            found = separate(nucleus, interior, predictor.spec.mpp, how)
            scores.setdefault(drawn.group.partition("/")[0], []).append(quality(drawn, found))
        tried.append((float(np.mean([np.mean(of_set) for of_set in scores.values()])), options))
    highest = max(score for score, _ in tried)
    level = [(-abs(options["nucleus"] - AIM), score, options) for score, options in tried if score >= highest - LEVEL]
    return max(level, key=lambda one: one[:2])[2]


def quality(drawn: Picture, found: np.ndarray) -> float:
    """Mean of Dice, AJI and PQ of a label map against a picture's own."""
    truth, ignore = drawn.labels, drawn.ignore
    return (
        dice(truth, found, ignore) + aji(truth, found, ignore) + panoptic_quality(truth, found, ignore).pq
    ) / 3


class Judged(NamedTuple):
    """The nuclei found in a picture: `confidence.features` (n, features), and whether an annotator drew them (n,)."""

    features: np.ndarray
    matched: np.ndarray


def judged(predictor: Predictor, drawn: Picture, maps: np.ndarray) -> Judged:
    """What is found in the maps (2, H, W) of a picture, measured as in a 40x scan; a match has an IoU above 0.5."""
    labels = predictor.label(*maps)
    times = max(1, round(predictor.spec.mpp / DEFAULT_MPP))
    size = (times * labels.shape[0], times * labels.shape[1])
    fine = enlarge(labels, maps[0], size, predictor.separation.nucleus)
    image_rgb = drawn.image_rgb.repeat(times, 0).repeat(times, 1)
    table = measure(fine, image_rgb, predictor.spec.mpp / times, resize_map(maps[0], size))
    values = features(table, clarity(labels, maps[1])[table["id"].to_numpy() - 1])
    scored, iou = best_overlap(drawn.labels, labels, drawn.ignore)
    _, row, place = np.intersect1d(table["id"].to_numpy(), scored, return_indices=True)
    return Judged(values[row], iou[place] > 0.5)


def confidence_of(pictures: Sequence[Picture], found: Sequence[Judged]) -> dict[str, float]:
    """The coefficients of `ModelSpec.confidence` from what was found in each picture; every data set counts alike."""
    sets = np.repeat([drawn.group.partition("/")[0] for drawn in pictures], [len(one.matched) for one in found])
    _, number, size = np.unique(sets, return_inverse=True, return_counts=True)
    values, matched = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return fit(values, matched, 1 / size[number])
