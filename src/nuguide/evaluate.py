"""The only evaluator: a predictor against annotated images, one row of scores an image, means with intervals."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from .datasets import Dataset
from .export import replacing
from .metrics import score
from .predict import Predictor
from .types import UserError

SHOWN = ("dice", "aji", "pq", "dq", "sq", "f1_50", "iou", "dice_weighted", "iou_weighted")


def evaluate(
    predictor: Predictor, dataset: Dataset, done: Callable[[int], None] = lambda images: None
) -> pd.DataFrame:
    """Scores of every sample at its own size: columns dataset, id, group, and the fields of `metrics.Scores`.

    Args:
        done: called with the number of images scored so far.
    """
    rows = []
    for sample in dataset:
        nuclei = predictor.segment(sample.image_rgb, sample.mpp)
        scores = score(sample.labels, nuclei.labels, sample.ignore)
        rows.append({"dataset": dataset.name, "id": sample.id, "group": sample.group, **asdict(scores)})
        done(len(rows))
    return pd.DataFrame(rows)


def interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[str] | np.ndarray | None = None, seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float]:
    """95% bootstrap interval of the mean over images (percentiles of `draws` resamples).

    Args:
        groups: of each image: whole groups are drawn then, not single images, for images of one organ or patient are
            alike. Of two or three groups the interval says little.
    """
    totals = np.asarray(values, float)
    sizes = np.ones(len(totals))
    if groups is not None:
        group = np.unique(np.asarray(groups), return_inverse=True)[1]
        totals, sizes = np.bincount(group, totals), np.bincount(group)
    picks = np.random.default_rng(seed).integers(len(totals), size=(draws, len(totals)))
    low, high = np.percentile(totals[picks].sum(axis=1) / sizes[picks].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(scores: pd.DataFrame, *, by_group: bool = False) -> pd.DataFrame:
    """One row a metric: mean over images, standard deviation, 95% interval of the mean, n.

    Args:
        by_group: the interval is of whole groups drawn, see `interval`.
    """
    rows = []
    groups = scores["group"].to_numpy() if by_group else None
    for name in SHOWN:
        values = scores[name].to_numpy()
        low, high = interval(values, groups)
        rows.append({"metric": name, "mean": values.mean(), "sd": values.std(ddof=min(1, len(values) - 1)),
                     "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)


def paired(scores: pd.DataFrame, against: pd.DataFrame, *, by_group: bool = False) -> pd.DataFrame:
    """Image by image `scores` minus `against`: one row a metric, its mean with 95% interval, images better and worse.

    Args:
        by_group: the interval is of whole groups drawn, see `interval`.
    Raises:
        ValueError: they are not of the same images.
    """
    keys = ["dataset", "id"]
    both = scores.merge(against, on=keys, suffixes=("", "_against"), validate="one_to_one")
    if not len(both) == len(scores) == len(against):
        raise ValueError(f"{len(scores)} and {len(against)} images, {len(both)} of them the same: not comparable")
    rows = []
    for name in SHOWN:
        difference = (both[name] - both[f"{name}_against"]).to_numpy()
        low, high = interval(difference, both["group"].to_numpy() if by_group else None)
        rows.append({"metric": name, "difference": difference.mean(), "low": low, "high": high,
                     "better": int((difference > 0).sum()), "worse": int((difference < 0).sum()), "n": len(both)})
    return pd.DataFrame(rows)


def write_scores(path: Path, scores: pd.DataFrame, facts: dict) -> Path:
    """Scores as JSON, {"facts": ..., "images": [one row an image]}, numbers to five decimals."""
    document = {
        "facts": facts | {"python": platform.python_version(), "machine": platform.machine()},
        "images": scores.round(5).to_dict("records"),
    }
    text = json.dumps(document, indent=None).replace('{"dataset"', '\n{"dataset"') + "\n"
    with replacing(path) as file:
        file.write(text.encode())
    return path


def read_scores(path: Path) -> pd.DataFrame:
    """The image rows of `write_scores`; UserError where the file is none of its."""
    try:
        return pd.DataFrame(json.loads(path.read_text())["images"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is no file of scores ({error}); make it anew with nuguide evaluate --out") from error
