"""Label maps as runs of pixels along rows: what is linear in the runs need not touch every pixel again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Runs:
    """The nuclei of a label map as runs of pixels along rows: far fewer than pixels, and enough for every moment.

    Attributes:
        ids: (n,) int64 labels, ascending.
        nucleus: (R,) index into `ids`; row, start, stop: (R,) the pixels start..stop-1 of that row.
        pixels: (P,) flat index of every pixel of a nucleus, run by run.
        first: (R,) where each run begins in `pixels`.
    """

    ids: np.ndarray
    nucleus: np.ndarray
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pixels: np.ndarray
    first: np.ndarray

    def total(self, run_value: np.ndarray) -> np.ndarray:
        """(n,) sum over the runs of each nucleus."""
        return np.bincount(self.nucleus, run_value, minlength=len(self.ids))

    def mean(self, pixel_value: np.ndarray) -> np.ndarray:
        """(n,) mean of (P,) values over the pixels of each nucleus."""
        if not len(self.ids):
            return np.zeros(0)
        run_sum = np.add.reduceat(pixel_value, self.first, dtype=np.float64)
        return self.total(run_sum) / self.total(self.stop - self.start)


def runs_of(labels: np.ndarray) -> Runs:
    """The runs of a label map (H, W) of any integer type; ValueError where it is none."""
    if labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}: a label map is (H, W) of integers")
    width = max(labels.shape[1], 1)
    flat = np.ascontiguousarray(labels).ravel()
    changes = flat[1:] != flat[:-1]
    changes[width - 1 :: width] = True  # a run ends with its row
    begin = np.concatenate([[0], np.flatnonzero(changes) + 1]) if flat.size else np.zeros(0, np.int64)
    end = np.append(begin[1:], flat.size)[: len(begin)]
    held = flat[begin] > 0
    begin, end = begin[held], end[held]
    ids, nucleus = np.unique(flat[begin].astype(np.int64), return_inverse=True)
    length = end - begin
    first = np.cumsum(length) - length
    pixels = np.arange(length.sum()) + np.repeat(begin - first, length)
    row = begin // width
    return Runs(ids, nucleus, row, begin - row * width, end - row * width, pixels, first)


def pieces_of(runs: Runs) -> np.ndarray:
    """(R,) the 8-connected piece, of its nucleus, that each run belongs to, numbered from 0."""
    # one number for a place in the image, such that a row ends well before the next begins
    wide = int(runs.stop.max(initial=0)) + 2
    start, stop, below = runs.row * wide + runs.start, runs.row * wide + runs.stop, (runs.row + 1) * wide
    first = np.searchsorted(stop, below + runs.start, "left")           # of the next row, those that end late enough
    count = np.searchsorted(start, below + runs.stop, "right") - first       # and begin early enough
    upper = np.repeat(np.arange(len(start)), count)
    lower = np.arange(len(upper)) + np.repeat(first - (np.cumsum(count) - count), count)
    same = runs.nucleus[upper] == runs.nucleus[lower]
    upper, lower = upper[same], lower[same]
    graph = coo_matrix((np.ones(len(upper), bool), (upper, lower)), shape=(len(start), len(start)))
    return connected_components(graph, directed=False)[1]
