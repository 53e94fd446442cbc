"""What stands beside the arms: people, and the classical method; scored by the same evaluator."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.measure import label as connected
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed

from ..datasets import Dataset
from ..metrics import score

SMALLEST_UM2, LEAST_APART_UM = 8.0, 2.5


def people(truth: Dataset, other: Dataset) -> pd.DataFrame:
    """One annotator's label maps scored against another's, as `evaluate` scores a model's; images are paired by id."""
    theirs = {id: index for index, id in enumerate(other.ids)}
    rows = []
    for index, id in enumerate(truth.ids):
        sample, second = truth[index], other[theirs[id]]
        scores = score(sample.labels, second.labels, sample.ignore)
        rows.append({"dataset": truth.name, "id": id, "group": sample.group, **asdict(scores)})
    return pd.DataFrame(rows)


def classical(dataset: Dataset) -> pd.DataFrame:
    """Every image segmented by `otsu_watershed` and scored."""
    rows = []
    for sample in dataset:
        scores = score(sample.labels, otsu_watershed(sample.image_rgb, sample.mpp), sample.ignore)
        rows.append({"dataset": dataset.name, "id": sample.id, "group": sample.group, **asdict(scores)})
    return pd.DataFrame(rows)


def otsu_watershed(image_rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Label map (H, W) int32: hematoxylin above Otsu's threshold, divided by a watershed of the distance to the edge.

    Args:
        image_rgb: (H, W, 3) uint8.
        mpp: microns per pixel.
    """
    hematoxylin = ndimage.gaussian_filter(rgb2hed(image_rgb)[..., 0], 0.25 / mpp)
    if np.ptp(hematoxylin) == 0:
        return np.zeros(hematoxylin.shape, np.int32)
    mask = ndimage.binary_fill_holes(hematoxylin > threshold_otsu(hematoxylin))
    mask = remove_small_objects(np.asarray(mask), max_size=int(SMALLEST_UM2 / mpp**2))
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    parts = connected(mask)
    peaks = peak_local_max(depth, min_distance=max(round(LEAST_APART_UM / mpp), 1), labels=parts)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-depth, seeds, mask=mask).astype(np.int32)
