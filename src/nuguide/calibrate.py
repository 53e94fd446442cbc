"""After training: the ranges that 8-bit convolutions need, and the thresholds that separate nuclei best."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import checkpoint
from .batches import Picture
from .guides import FrozenGuide
from .instances import Separation, separate
from .metrics import aji, dice, panoptic_quality
from .networks.int8 import InputRanges, Ranges
from .predict import Predictor

# thresholds of nucleus and interior, and least areas in square microns, that are tried
GRID = {"nucleus": (0.4, 0.5, 0.6, 0.7), "interior": (0.4, 0.5, 0.6), "min_area_um2": (8.0, 14.0)}


def calibrate(
    folder: Path, train: Sequence[Picture], val: Sequence[Picture], guide: FrozenGuide | None, at_most: int = 48
) -> Path:
    """Note in a model's folder its activation ranges, measured on pictures it was trained on, and its `Separation`.

    The separation is `best_separation` of the validation pictures.

    Args:
        guide: the model's, for its weights may lie anywhere; it is changed in place.
        at_most: so many training pictures, evenly spaced, are used for the ranges.
    """
    model, _, spec = checkpoint.load(folder, guide)
    predictor = Predictor(*checkpoint.load(folder, guide), device="cpu", precision="fp32")
    ranges = input_ranges(predictor, train[:: -(-len(train) // at_most)])
    separation = best_separation(predictor, val)
    return checkpoint.save(folder, model, dataclasses.replace(spec, int8_ranges=ranges, separation=separation))


def input_ranges(predictor: Predictor, pictures: Sequence[Picture]) -> Ranges:
    """The least and greatest input of every convolution on the pictures, to four decimals."""
    with torch.inference_mode(), InputRanges(predictor.model) as seen:
        for drawn in pictures:
            side = 2 * predictor.spec.tile_px
            predictor.probabilities(drawn.image_rgb[:side, :side])
    return {name: (round(low, 4), round(high, 4)) for name, (low, high) in seen.ranges.items()}


def best_separation(predictor: Predictor, pictures: Sequence[Picture]) -> dict[str, float]:
    """The options of `GRID` with the highest mean of Dice, AJI and PQ over the pictures, at the model's resolution.

    Every data set counts alike, however many pictures it has: what suits the largest may lose the nuclei of another.
    """
    maps = [predictor.probabilities(drawn.image_rgb) for drawn in pictures]
    best: tuple[float, dict[str, float]] = (-1.0, {})
    for values in itertools.product(*GRID.values()):
        options = dict(zip(GRID, values, strict=True))
        how = Separation(**options)
        scores: dict[str, list[float]] = {}
        for drawn, (nucleus, interior) in zip(pictures, maps, strict=True):
            found = separate(nucleus, interior, predictor.spec.mpp, how)
            scores.setdefault(drawn.group.partition("/")[0], []).append(quality(drawn, found))
        mean = float(np.mean([np.mean(of_set) for of_set in scores.values()]))
        best = max(best, (mean, options), key=lambda pair: pair[0])
    return best[1]


def quality(drawn: Picture, found: np.ndarray) -> float:
    """Mean of Dice, AJI and PQ of a label map against a picture's own."""
    truth, ignore = drawn.labels, drawn.ignore
    return (
        dice(truth, found, ignore) + aji(truth, found, ignore) + panoptic_quality(truth, found, ignore).pq
    ) / 3
