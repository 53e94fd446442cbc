"""Our metrics against the package cellseg-metrics, on random label maps."""

from __future__ import annotations

import numpy as np
import pytest
from cellseg_metrics import aggregated_jaccard_index, panoptic_quality

from nuguide.metrics import score


def maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps (H, W) of random rectangles, the second a shifted and thinned copy with strangers in it."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(30, 70, 2))
    truth, found = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for number in range(1, int(rng.integers(4, 25))):
        y, x = (int(rng.integers(0, side - 8)) for side in shape)
        height, width = rng.integers(3, 12, 2)
        truth[y : y + height, x : x + width] = 3 * number               # labels need not be consecutive
        dy, dx = rng.integers(-2, 3, 2)
        if rng.random() < 0.8:
            found[max(y + dy, 0) : y + dy + height, max(x + dx, 0) : x + dx + width] = 40 - number
        if rng.random() < 0.2:
            y, x = (int(rng.integers(0, side - 4)) for side in shape)
            found[y : y + 4, x : x + 4] = 100 + number
    return truth, found


def same_choice(truth: np.ndarray, found: np.ndarray) -> bool:
    """Whether for each true nucleus one found nucleus alone has the greatest overlap, and the greatest IoU as well.

    The package takes that of greatest overlap and, of equals, all; we, as in the original, that of greatest IoU.
    """
    for label in np.unique(truth[truth > 0]):
        touched, shared = np.unique(found[(truth == label) & (found > 0)], return_counts=True)
        unions = np.array([np.count_nonzero((found == other) | (truth == label)) for other in touched])
        if len(touched) and (np.sum(shared == shared.max()) > 1 or shared.argmax() != (shared / unions).argmax()):
            return False
    return True


@pytest.mark.parametrize("seed", range(40))
def test_panoptic_quality_agrees(seed: int) -> None:
    truth, found = maps(seed)
    theirs, ours = panoptic_quality(truth, found), score(truth, found)
    assert (ours.pq, ours.dq, ours.sq) == pytest.approx((theirs["pq"], theirs["dq"], theirs["sq"]), abs=1e-6)


def test_the_aggregated_jaccard_index_agrees_where_both_choose_the_same_nuclei() -> None:
    compared = 0
    for seed in range(60):
        truth, found = maps(seed)
        if same_choice(truth, found):
            compared += 1
            assert score(truth, found).aji == pytest.approx(aggregated_jaccard_index(truth, found), abs=1e-6)
    assert compared >= 15
