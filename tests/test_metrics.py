"""Every metric against numbers that can be checked by hand."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from nuguide import metrics
from nuguide.metrics import aji, dice, dice_weighted, f1_50, iou, iou_weighted, panoptic_quality, score

SINGLE = [dice, iou, dice_weighted, iou_weighted, aji, f1_50]


def strip(*areas: tuple[int, int, int], length: int = 1000) -> np.ndarray:
    """A map of one row: for each (label, start, stop) the pixels start..stop-1 carry the label."""
    labels = np.zeros((1, length), np.int32)
    for label, start, stop in areas:
        labels[0, start:stop] = label
    return labels


def test_dice_and_iou_of_half_overlapping_nuclei():
    truth, found = strip((1, 0, 100)), strip((1, 50, 150))
    assert dice(truth, found) == pytest.approx(2 * 50 / 200)
    assert iou(truth, found) == pytest.approx(50 / 150)


def test_dice_asks_for_nucleus_not_for_which_nucleus():
    assert dice(strip((1, 0, 50), (2, 50, 100)), strip((9, 0, 100))) == 1.0


def test_weighted_metrics_are_shares_of_truth_times_each_class():
    truth, found = strip((1, 0, 100)), strip((1, 50, 150))  # 1000 px: nucleus hit 50, background hit 850
    assert dice_weighted(truth, found) == pytest.approx(0.1 * (100 / 200) + 0.9 * (2 * 850 / 1800))
    assert iou_weighted(truth, found) == pytest.approx(0.1 * (50 / 150) + 0.9 * (850 / 950))


def test_weighted_metrics_of_a_truth_without_background_ignore_the_background():
    truth, found = strip((1, 0, 10), length=10), strip((1, 0, 5), length=10)
    assert dice_weighted(truth, found) == pytest.approx(2 * 5 / 15)
    assert iou_weighted(truth, found) == pytest.approx(5 / 10)


def test_weighted_metrics_of_an_empty_truth_measure_the_background_alone():
    truth, found = strip(), strip((1, 0, 100))
    assert dice_weighted(truth, found) == pytest.approx(2 * 900 / 1900)
    assert iou_weighted(truth, found) == pytest.approx(900 / 1000)


def test_aji_counts_a_missed_nucleus_against_the_union():
    truth, found = strip((1, 0, 100), (2, 200, 300)), strip((1, 0, 100))
    assert aji(truth, found) == pytest.approx(100 / 200)


def test_aji_counts_a_nucleus_found_in_vain_against_the_union():
    truth, found = strip((1, 0, 100)), strip((1, 0, 100), (2, 200, 300))
    assert aji(truth, found) == pytest.approx(100 / 200)


def test_aji_of_one_blob_over_two_nuclei_counts_the_blob_twice():
    truth, found = strip((1, 0, 100), (2, 100, 200)), strip((1, 0, 200))
    assert aji(truth, found) == pytest.approx((100 + 100) / (200 + 200))


def test_aji_of_a_nucleus_cut_in_two_leaves_the_smaller_piece_over():
    truth, found = strip((1, 0, 100)), strip((1, 0, 60), (2, 60, 100))
    assert aji(truth, found) == pytest.approx(60 / (100 + 40))


def test_aji_matches_by_iou_and_not_by_intersection():
    truth = strip((1, 0, 100))
    found = strip((1, 0, 40), (2, 40, 400))  # 2 shares 60 of a union of 400; 1 shares 40 of a union of 100
    assert aji(truth, found) == pytest.approx(40 / (100 + 360))


def test_aji_takes_the_lowest_label_of_equal_ious():
    truth, found = strip((1, 0, 100)), strip((8, 0, 50), (3, 50, 100))
    assert aji(truth, found) == pytest.approx(50 / (100 + 50))


def test_panoptic_quality_of_one_match_one_miss_and_one_in_vain():
    truth = strip((1, 0, 100), (2, 200, 300))
    found = strip((1, 0, 80), (2, 500, 600))
    quality = panoptic_quality(truth, found)
    assert (quality.tp, quality.fp, quality.fn) == (1, 1, 1)
    assert quality.dq == pytest.approx(1 / (1 + 0.5 + 0.5))
    assert quality.sq == pytest.approx(0.8)
    assert quality.pq == pytest.approx(0.4)
    assert f1_50(truth, found) == quality.dq


def test_an_iou_of_exactly_one_half_is_no_match():
    truth = strip((1, 0, 100))
    assert panoptic_quality(truth, strip((1, 0, 50))).tp == 0
    assert panoptic_quality(truth, strip((1, 0, 51))).tp == 1


def test_panoptic_quality_without_a_match_is_zero():
    quality = panoptic_quality(strip((1, 0, 100)), strip((1, 500, 600)))
    assert (quality.pq, quality.dq, quality.sq, quality.tp, quality.fp, quality.fn) == (0, 0, 0, 0, 1, 1)


def naive_aji_and_pq(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The definitions written down as loops over masks, nucleus by nucleus."""
    true_masks = [truth == label for label in np.unique(truth) if label]
    found_masks = [found == label for label in np.unique(found) if label]
    shared_sum = union_sum = iou_sum = matches = 0
    taken = set()
    for mask in true_masks:
        shared = [int((mask & other).sum()) for other in found_masks]
        union = [int((mask | other).sum()) for other in found_masks]
        best = int(np.argmax([s / u for s, u in zip(shared, union, strict=True)]))
        if shared[best] == 0:
            union_sum += int(mask.sum())
            continue
        taken.add(best)
        shared_sum += shared[best]
        union_sum += union[best]
        if shared[best] / union[best] > 0.5:
            matches += 1
            iou_sum += shared[best] / union[best]
    union_sum += sum(int(mask.sum()) for number, mask in enumerate(found_masks) if number not in taken)
    return shared_sum / union_sum, iou_sum / (0.5 * (len(true_masks) + len(found_masks)))


@pytest.mark.parametrize("seed", range(6))
def test_aji_and_pq_agree_with_the_definitions_as_loops(seed):
    rng = np.random.default_rng(seed)
    truth, found = np.zeros((2, 60, 60), np.int32)
    for number in range(1, 25):
        top, left, height, width, shift = rng.integers(0, [48, 48, 12, 12, 4])
        truth[top : top + height, left : left + width] = number
        found[top + shift : top + height, left : left + width + shift] = 25 - number
    expected_aji, expected_pq = naive_aji_and_pq(truth, found)
    assert aji(truth, found) == pytest.approx(expected_aji)
    assert panoptic_quality(truth, found).pq == pytest.approx(expected_pq)


@pytest.mark.parametrize("metric", SINGLE)
def test_equal_maps_score_one(metric):
    truth = strip((1, 0, 100), (2, 100, 150))
    assert metric(truth, truth) == 1.0


@pytest.mark.parametrize("metric", SINGLE)
def test_an_empty_truth_and_an_empty_prediction_agree(metric):
    assert metric(strip(), strip()) == 1.0


@pytest.mark.parametrize("metric", [dice, iou, aji, f1_50])
@pytest.mark.parametrize(("truth", "found"), [((1, 0, 9), (1, 0, 0)), ((1, 0, 0), (1, 0, 9))])
def test_one_empty_map_scores_zero(metric, truth, found):
    assert metric(strip(truth), strip(found)) == 0.0


def test_score_holds_what_the_single_functions_return(tissue):
    truth = tissue.labels
    found = np.roll(truth, (2, 3), (0, 1))
    scores = score(truth, found)
    quality = panoptic_quality(truth, found)
    for field in fields(scores):
        if field.name not in {"pq", "dq", "sq", "nuclei_truth", "nuclei_found"}:
            assert getattr(scores, field.name) == getattr(metrics, field.name)(truth, found)
    assert (scores.pq, scores.dq, scores.sq) == (quality.pq, quality.dq, quality.sq)
    assert (scores.nuclei_truth, scores.nuclei_found) == (40, 40)
    assert 0.3 < scores.aji < scores.iou < scores.dice < scores.dice_weighted < 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_scores_do_not_depend_on_the_integer_type(dtype):
    truth, found = strip((1, 0, 100), (200, 100, 150)), strip((3, 20, 110), (7, 110, 140))
    assert score(truth.astype(dtype), found.astype(np.uint16)) == score(truth, found)


def test_scores_do_not_depend_on_label_values_gaps_or_order():
    truth, found = strip((1, 0, 100), (2, 100, 150)), strip((1, 20, 110), (2, 110, 140))
    huge = np.array([0, 2**64 - 1, 2**64 - 2], np.uint64)[truth]  # equal once rounded to float64
    assert score(huge, np.array([0, 4_000_000_000, 17], np.uint32)[found]) == score(truth, found)


def test_a_mask_counts_as_one_nucleus():
    scores = score(strip((1, 0, 60), (2, 80, 100)) > 0, strip((1, 0, 100)) > 0)
    assert (scores.nuclei_truth, scores.nuclei_found) == (1, 1)
    assert scores.sq == pytest.approx(0.8)


def test_nothing_is_scored_where_it_is_ignored():
    truth, found = strip((1, 0, 100), (2, 300, 400)), strip((1, 0, 100), (2, 550, 600), (3, 40, 60))
    ignore = np.zeros(truth.shape, bool)
    ignore[0, 300:600] = True  # the missed nucleus and the one found in vain
    ignore[0, 40:60] = True  # and the middle of the first
    scores = score(truth, found, ignore)
    assert (scores.dice, scores.aji, scores.pq, scores.nuclei_truth, scores.nuclei_found) == (1, 1, 1, 1, 1)


def test_a_nucleus_that_reaches_into_the_ignored_area_is_scored_by_the_rest():
    truth, found = strip((1, 0, 100)), strip((1, 50, 100))
    ignore = np.zeros(truth.shape, bool)
    ignore[0, 50:80] = True
    assert iou(truth, found, ignore) == pytest.approx(20 / 70)


def test_where_all_is_ignored_nothing_disagrees():
    scores = score(strip((1, 0, 100)), strip(), np.ones((1, 1000), bool))
    assert (scores.dice, scores.dice_weighted, scores.aji, scores.pq, scores.nuclei_truth) == (1, 1, 1, 1, 0)


def test_different_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"truth has shape \(4, 5\), found \(5, 4\)"):
        score(np.zeros((4, 5), int), np.zeros((5, 4), int))
    with pytest.raises(ValueError, match=r"truth has shape \(4, 5\), ignore \(5, 4\)"):
        score(np.zeros((4, 5), int), np.zeros((4, 5), int), np.zeros((5, 4), bool))


def test_maps_that_hold_no_labels_are_refused():
    with pytest.raises(ValueError, match="found is of float64"):
        dice(np.zeros((2, 2), int), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="negative label -3"):
        dice(np.full((2, 2), -3), np.zeros((2, 2), int))
