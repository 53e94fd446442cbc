"""How well a found segmentation agrees with the truth, on instance label maps.

Every function takes `truth` and `found`, (H, W) integer label maps of one shape (0 is background, any other value is
one nucleus; gaps and huge values are fine; a bool mask counts as one nucleus), and `ignore`, (H, W) bool or None.
Ignored pixels are taken out of both maps before anything is counted: a nucleus that lies wholly inside them is not
scored, one that reaches into them is scored by the rest of it. All raise ValueError where the shapes differ, where a
map is not of integers, or where a label is negative.

An empty truth and an empty prediction agree: every metric is then 1.0. Where one of the two is empty, Dice, IoU, AJI,
PQ, DQ, SQ and F1 are 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PanopticQuality:
    """PQ = DQ x SQ, and the counts behind it: nuclei matched (tp), found in vain (fp) and missed (fn)."""

    pq: float
    dq: float
    sq: float
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class Scores:
    """Every metric of one image. The fields are explained at the functions of the same names."""

    dice: float
    iou: float
    dice_weighted: float
    iou_weighted: float
    aji: float
    pq: float
    dq: float
    sq: float
    f1_50: float
    nuclei_truth: int
    nuclei_found: int


def score(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> Scores:
    """Every metric at once, from one pass over the two label maps."""
    overlap = _overlap(truth, found, ignore)
    panoptic = _panoptic(overlap)
    dice_weighted, iou_weighted = _weighted(overlap)
    return Scores(
        dice=_dice(overlap),
        iou=_iou(overlap),
        dice_weighted=dice_weighted,
        iou_weighted=iou_weighted,
        aji=_aji(overlap),
        pq=panoptic.pq,
        dq=panoptic.dq,
        sq=panoptic.sq,
        f1_50=panoptic.dq,
        nuclei_truth=len(overlap.truth_px),
        nuclei_found=len(overlap.found_px),
    )


def dice(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Nucleus Dice: 2 |T n F| / (|T| + |F|) over the pixels of all nuclei, whichever nucleus they belong to."""
    return _dice(_overlap(truth, found, ignore))


def iou(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Nucleus IoU: |T n F| / |T u F| over the pixels of all nuclei, whichever nucleus they belong to."""
    return _iou(_overlap(truth, found, ignore))


def dice_weighted(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Dice of background and of nucleus, averaged with their shares of the true pixels as weights.

    This is scikit-learn's f1_score(average="weighted") over the two classes, the convention of Swain, Cheoi, Ko (MICCAI
    2024). It follows pixel accuracy: background is most of an image, so it lies far above the nucleus Dice.
    """
    return _weighted(_overlap(truth, found, ignore))[0]


def iou_weighted(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """IoU of background and of nucleus, averaged like `dice_weighted` (jaccard_score(average="weighted"))."""
    return _weighted(_overlap(truth, found, ignore))[1]


def aji(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Aggregated Jaccard index (Kumar et al., IEEE TMI 2017, algorithm 1).

    Each true nucleus takes the found one of greatest IoU; the sum of their intersections is divided by that of their
    unions. A true nucleus that nothing touches adds its area to the unions, and so does each found nucleus that no true
    one took. As in the original, a found nucleus may be taken more than once: it then enters both sums each time (one
    blob over two nuclei is punished through its unions), and is never left over. Of equal IoUs the lowest label wins.
    """
    return _aji(_overlap(truth, found, ignore))


def panoptic_quality(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> PanopticQuality:
    """Panoptic quality (Kirillov et al., CVPR 2019): a found nucleus matches a true one where their IoU exceeds 0.5.

    DQ = TP / (TP + FP/2 + FN/2), SQ = mean IoU of the matches (0 without one), PQ = DQ x SQ. No nucleus can have two
    matches above 0.5.
    """
    return _panoptic(_overlap(truth, found, ignore))


def f1_50(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """F1 of the detections at IoU > 0.5, which is DQ."""
    return _panoptic(_overlap(truth, found, ignore)).dq


def best_overlap(
    truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the found nuclei, ascending, and the greatest IoU of each with any true one: (F,) and (F,) float64.

    Above 0.5 it is the match of `panoptic_quality`; 0 where nothing true is touched. Nuclei that lie wholly inside
    ignored pixels are left out.
    """
    overlap = _overlap(truth, found, ignore)
    ids = np.unique(found if ignore is None else found[~np.asarray(ignore, bool)])
    best = np.zeros(len(overlap.found_px))
    np.maximum.at(best, overlap.pair_found, overlap.pair_px / overlap.pair_union_px)
    return ids[ids > 0], best


@dataclass(frozen=True)
class _Overlap:
    """What two label maps have in common, in pixels; nuclei are numbered from 0 in the order of their labels.

    Attributes:
        scored_px: pixels that are not ignored.
        truth_px: (T,) area of each true nucleus; found_px: (F,) of each found one.
        pair_truth, pair_found: (P,) the pairs that share a pixel, ordered by true, then found nucleus.
        pair_px: (P,) how many pixels they share.
    """

    scored_px: int
    truth_px: np.ndarray
    found_px: np.ndarray
    pair_truth: np.ndarray
    pair_found: np.ndarray
    pair_px: np.ndarray

    @property
    def pair_union_px(self) -> np.ndarray:
        return self.truth_px[self.pair_truth] + self.found_px[self.pair_found] - self.pair_px


def _overlap(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None) -> _Overlap:
    """One sparse count of the pairs of labels, over runs of equal pixels instead of single ones."""
    truth, found = _checked("truth", truth), _checked("found", found)
    kept = np.ones(truth.shape, bool) if ignore is None else ~np.asarray(ignore, bool)
    for name, other in (("found", found), ("ignore", kept)):
        if other.shape != truth.shape:
            raise ValueError(f"truth has shape {truth.shape}, {name} {other.shape}: they must be equal")
    truth, found = (truth.ravel(), found.ravel()) if ignore is None else (truth[kept], found[kept])
    if truth.size == 0:
        none = np.zeros(0, np.int64)
        return _Overlap(0, none, none, none, none, none)
    changes = (truth[1:] != truth[:-1]) | (found[1:] != found[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    run_px = np.diff(starts, append=truth.size)
    run_truth, truth_px = _numbered(truth[starts], run_px)
    run_found, found_px = _numbered(found[starts], run_px)
    both = (run_truth >= 0) & (run_found >= 0)
    key = run_truth[both] * len(found_px) + run_found[both]
    keys, run_pair = np.unique(key, return_inverse=True)
    pair_px = np.bincount(run_pair, run_px[both], minlength=len(keys)).astype(np.int64)
    pair_truth, pair_found = np.divmod(keys, max(len(found_px), 1))
    return _Overlap(truth.size, truth_px, found_px, pair_truth, pair_found, pair_px)


def _checked(name: str, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "bui":
        raise ValueError(f"{name} is of {labels.dtype}: a label map is of integers")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"{name} holds the negative label {labels.min()}: 0 is background, nuclei count upwards")
    return labels


def _numbered(run_label: np.ndarray, run_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each run the number of its nucleus (-1 for background), and of each nucleus the area in pixels."""
    ids, number = np.unique(np.concatenate([np.zeros(1, run_label.dtype), run_label]), return_inverse=True)
    area_px = np.bincount(number[1:], run_px, minlength=len(ids)).astype(np.int64)
    return number[1:] - 1, area_px[1:]


def _dice(overlap: _Overlap) -> float:
    total = int(overlap.truth_px.sum() + overlap.found_px.sum())
    return float(2 * overlap.pair_px.sum() / total) if total else 1.0


def _iou(overlap: _Overlap) -> float:
    shared = int(overlap.pair_px.sum())
    union = int(overlap.truth_px.sum() + overlap.found_px.sum()) - shared
    return shared / union if union else 1.0


def _weighted(overlap: _Overlap) -> tuple[float, float]:
    """Weighted Dice and IoU. A class that the truth lacks has weight 0, so its undefined quotient never enters."""
    if overlap.scored_px == 0:
        return 1.0, 1.0
    shared = int(overlap.pair_px.sum())
    truth, found = int(overlap.truth_px.sum()), int(overlap.found_px.sum())
    pixels = overlap.scored_px
    classes = ((shared, truth, found), (pixels - truth - found + shared, pixels - truth, pixels - found))
    dice_sum = sum(support * 2 * hit / (support + claimed) for hit, support, claimed in classes if support)
    iou_sum = sum(support * hit / (support + claimed - hit) for hit, support, claimed in classes if support)
    return dice_sum / pixels, iou_sum / pixels


def _aji(overlap: _Overlap) -> float:
    union_px = overlap.pair_union_px
    pair_iou = overlap.pair_px / union_px
    order = np.lexsort((-pair_iou, overlap.pair_truth))  # stable: equal IoUs stay in the order of the found labels
    best = order[np.unique(overlap.pair_truth[order], return_index=True)[1]]
    missed = np.ones(len(overlap.truth_px), bool)
    missed[overlap.pair_truth[best]] = False
    left_over = np.ones(len(overlap.found_px), bool)
    left_over[overlap.pair_found[best]] = False
    unions = union_px[best].sum() + overlap.truth_px[missed].sum() + overlap.found_px[left_over].sum()
    return float(overlap.pair_px[best].sum() / unions) if unions else 1.0


def _panoptic(overlap: _Overlap) -> PanopticQuality:
    truth, found = len(overlap.truth_px), len(overlap.found_px)
    if truth + found == 0:
        return PanopticQuality(pq=1.0, dq=1.0, sq=1.0, tp=0, fp=0, fn=0)
    union_px = overlap.pair_union_px
    matched = 2 * overlap.pair_px > union_px
    tp = int(matched.sum())
    dq = 2 * tp / (truth + found)
    sq = float((overlap.pair_px[matched] / union_px[matched]).mean()) if tp else 0.0
    return PanopticQuality(pq=dq * sq, dq=dq, sq=sq, tp=tp, fp=found - tp, fn=truth - tp)
