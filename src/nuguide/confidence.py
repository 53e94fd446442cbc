"""How far a found nucleus can be trusted: the chance that an annotator drew it too, and whether mirror images agree.

The chance is a logistic model on `FEATURES`, which were chosen among eighteen by how well a fit foretells the nuclei of
an organ or slide that it has not seen. The mean of the nucleus map over a nucleus is no such chance: it says how sure
the network is of the pixels, and is high where two nuclei are taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .metrics import best_overlap

# clarity: standard deviation of the interior map over the nucleus, near 0.5 where inside and rim are told apart
# concavity: log(1.01 - solidity), high where a nucleus is indented, as two that were taken for one are
# oddity: log(area / `USUAL_UM2`)^2, of nuclei that are very small or large
FEATURES: tuple[str, ...] = ("clarity", "concavity", "oddity")
INTERCEPT = "intercept"
USUAL_UM2 = 33.0            # a disk 6.5 microns across
LEAST_PER_FEATURE = 10      # matched nuclei, and others, for each feature (Peduzzi et al., J Clin Epidemiol 49, 1996)
RIDGE = 1.0                 # keeps coefficients finite where a feature divides the two wholly


def clarity(labels: np.ndarray, interior: np.ndarray) -> np.ndarray:
    """(n,) standard deviation of the interior map over each nucleus, that of label i + 1 at i, up to the greatest.

    Args:
        labels: (H, W) int. interior: (H, W) float, the map that they were found in, at the network's resolution.
    """
    held = np.flatnonzero(labels)
    number = labels.ravel()[held] - 1
    nuclei = int(labels.max(initial=0))
    values = interior.ravel()[held].astype(np.float64)
    area_px = np.maximum(np.bincount(number, minlength=nuclei), 1)
    mean, of_squares = (np.bincount(number, power, minlength=nuclei) / area_px for power in (values, values**2))
    return np.sqrt(np.maximum(of_squares - mean**2, 0))


def features(table: pd.DataFrame, clear: np.ndarray) -> np.ndarray:
    """(n, features) float64 of `FEATURES`, a row for each of the table.

    Args:
        table: of `measure.measure`. clear: (n,) `clarity` of the same nuclei.
    """
    concavity = np.log(1.01 - table["solidity"].to_numpy().clip(0, 1))
    oddity = np.log(table["area_um2"].to_numpy() / USUAL_UM2) ** 2
    return np.column_stack([clear, concavity, oddity])


def chance(values: np.ndarray, coefficients: Mapping[str, float]) -> np.ndarray:
    """(n,) float64, 0..1, the chance of nuclei with these features (n, features) that an annotator drew them."""
    slopes = np.array([coefficients[name] for name in FEATURES])
    return 1 / (1 + np.exp(-(values @ slopes + coefficients[INTERCEPT])))


def checked(coefficients: Mapping[str, float]) -> None:
    """Raises ValueError where coefficients, as a model's file states them, are not those of `fit`."""
    if not isinstance(coefficients, dict) or (coefficients and set(coefficients) != {INTERCEPT, *FEATURES}):
        raise ValueError(f"confidence needs {', '.join([INTERCEPT, *FEATURES])} and nothing else, or nothing at all")
    if not all(type(value) in (int, float) and np.isfinite(value) for value in coefficients.values()):
        raise ValueError("confidence needs finite numbers")


def fit(values: np.ndarray, matched: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> dict[str, float]:
    """The coefficients under which what happened is likeliest; none where too few nuclei are matched, or too many.

    Iteratively reweighted least squares (McCullagh and Nelder, Generalized Linear Models, 2nd edition, 2.5), on
    standardized features.

    Args:
        values: (n, features). matched: (n,) bool, whether an annotator drew it. weights: (n,) how much each counts;
            they are brought to a mean of 1.
        ridge: penalty on half the squared coefficients of the standardized features; the intercept is free.
    """
    if min(matched.sum(), (~matched).sum()) < LEAST_PER_FEATURE * len(FEATURES):
        return {}
    weights = weights / weights.mean()
    middle = np.average(values, axis=0, weights=weights)
    spread = np.sqrt(np.average((values - middle) ** 2, axis=0, weights=weights)) + 1e-12
    design = np.column_stack([np.ones(len(values)), (values - middle) / spread])
    penalty = ridge * np.diag([0.0] + [1.0] * values.shape[1])
    found = np.zeros(design.shape[1])
    for _ in range(100):
        expected = 1 / (1 + np.exp(-design @ found))
        slope = design.T @ (weights * (matched - expected)) - penalty @ found
        curvature = (design * (weights * expected * (1 - expected))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, slope)
        found += step
        if np.abs(step).max() < 1e-9:
            break
    slopes = found[1:] / spread
    numbers = [found[0] - slopes @ middle, *slopes]
    return {name: round(float(number), 6) for name, number in zip((INTERCEPT, *FEATURES), numbers, strict=True)}


def agreement(labels: np.ndarray, views: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) mean over the views of the IoU of a nucleus with the nucleus of that view that it overlaps best.

    1 where all views show the same nucleus, 0 where no other shows anything there.

    Args:
        labels: (H, W) int; label i + 1 is at i, up to the greatest. views: label maps of the same size, each of one
            mirror image alone, turned back.
    """
    total = np.zeros(int(labels.max(initial=0)))
    for view in views:
        ids, overlap = best_overlap(view, labels)
        total[ids - 1] += overlap
    return total / len(views)


class Bin(NamedTuple):
    """Of the nuclei in one bin: how many, their mean probability, and the share of them that was matched."""

    nuclei: int
    probability: float
    matched: float


def reliability(probability: np.ndarray, matched: np.ndarray, bins: int = 10) -> list[Bin]:
    """The nuclei in bins of equal count, by rising probability; fewer bins where there are fewer nuclei."""
    order = np.argsort(probability, kind="stable")
    return [
        Bin(len(some), float(probability[some].mean()), float(matched[some].mean()))
        for some in np.array_split(order, bins)
        if len(some)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: |mean probability - share matched| over the bins, weighted by their nuclei."""
    return sum(one.nuclei * abs(one.probability - one.matched) for one in bins) / sum(one.nuclei for one in bins)
