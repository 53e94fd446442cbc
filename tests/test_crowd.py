"""Copied nuclei: of those that stand alone, beside others, owners of what they cover, of which enough is left."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from nuguide.augment import Augmentation, augment
from nuguide.crowd import HIDDEN, OVERLAP, crowded, placed, standing_alone
from nuguide.types import IGNORED

GLASS, ALONE, OTHER = (235, 235, 235), (60, 40, 120), (150, 30, 60)
ALL = Augmentation(
    rotate=False, scale=(1, 1), elastic_px=0, crowd=1.0,
    gain=(1, 1), gamma=(1, 1), brightness=0, contrast=(1, 1), clahe=0, stain=0, stain_shift=0,
)


def drawn(disks: list[tuple[int, int, int, tuple[int, int, int]]], side: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """An image of disks (x, y, radius, color) on glass, and its labels."""
    image, labels = np.full((side, side, 3), GLASS, np.uint8), np.zeros((side, side), np.int32)
    for number, (x, y, radius, color) in enumerate(disks, start=1):
        cv2.circle(image, (x, y), radius, color, -1)
        cv2.circle(labels, (x, y), radius, number, -1)
    return image, labels


def inside(labels: np.ndarray, first: int) -> np.ndarray:
    """What lies 4 px or more inside of one nucleus that is numbered `first` or higher."""
    kernel = np.ones((9, 9))
    each = [cv2.erode((labels == number).astype(np.uint8), kernel) for number in np.unique(labels[labels >= first])]
    return np.any(each, axis=0) if each else np.zeros(labels.shape, bool)


SOME = [(40, 50, 8, ALONE), (90, 80, 7, ALONE), (30, 100, 9, ALONE)]


def test_copies_are_drawn_where_they_are_labeled_and_nothing_else_changes() -> None:
    image, labels = drawn(SOME)
    made = 0
    for seed in range(30):
        found, taught = crowded(image, labels, np.random.default_rng(seed), 4)
        assert (found.dtype, taught.dtype) == (np.uint8, np.int32)
        copies = taught >= 4
        made += len(np.unique(taught[copies]))
        assert (found[inside(taught, 4)][:, 0] < 120).all()
        away = cv2.dilate(copies.astype(np.uint8), np.ones((13, 13))) == 0
        assert np.array_equal(found[away], image[away])
        assert np.array_equal(taught[~copies], labels[~copies])
    assert made > 60


def test_only_nuclei_are_copied_that_touch_no_other_no_border_and_nothing_ignored() -> None:
    image, labels = drawn([*SOME, (80, 20, 7, OTHER), (94, 20, 7, OTHER), (125, 60, 6, OTHER), (60, 110, 6, OTHER)])
    labels[115:118, 55:66] = IGNORED
    assert len(standing_alone(image, labels)) == 3
    looked_at = 0
    for seed in range(30):
        found, taught = crowded(image, labels, np.random.default_rng(seed), 8)
        core = inside(taught, 8)
        looked_at += np.count_nonzero(core)
        assert (found[core][:, 2] > found[core][:, 0]).all()
        assert np.array_equal(taught == IGNORED, labels == IGNORED)
    assert looked_at > 3000


def test_a_copy_touches_its_neighbor_and_hides_no_more_of_it_than_allowed() -> None:
    image, labels = drawn([(50, 60, 12, ALONE), (90, 80, 7, ALONE)])
    size, touching = np.bincount(labels.ravel())[1:], 0
    for seed in range(60):
        taught = crowded(image, labels, np.random.default_rng(seed), 3)[1]
        for number in (1, 2):
            assert np.count_nonzero(taught == number) >= (1 - HIDDEN) * size[number - 1]
        copies = (taught >= 3).astype(np.uint8)
        pieces = cv2.connectedComponents((taught > 0).astype(np.uint8))[0] - 1
        touching += copies.any() and pieces == 2
    assert touching > 40


def test_a_place_overlaps_as_little_as_drawn_and_lies_inside() -> None:
    labels, mask = drawn(SOME)[1], np.ones((10, 10), bool)
    places = [placed(labels, mask, np.random.default_rng(seed)) for seed in range(200)]
    inside = [place for place in places if place is not None]
    assert len(inside) > 150
    for place in inside:
        assert labels[place].shape == mask.shape
        assert np.count_nonzero(labels[place]) <= OVERLAP[1] * mask.size


def test_without_a_nucleus_that_stands_alone_nothing_changes() -> None:
    image, labels = drawn([(60, 60, 8, OTHER), (76, 60, 8, OTHER)])
    for known in (labels, np.zeros_like(labels), np.full_like(labels, IGNORED)):
        found, taught = crowded(image, known, np.random.default_rng(0), 3)
        assert np.array_equal(found, image)
        assert np.array_equal(taught, known)


@pytest.mark.parametrize("around", [32, 64])
def test_with_what_a_guide_sees_around_the_patch_is_the_same(around: int) -> None:
    image, labels = drawn([(x, y, 7, ALONE) for x in range(20, 240, 24) for y in range(20, 240, 40)], 256)
    changed = 0
    for seed in range(10):
        alone, taught = augment(image, labels, 96, np.random.default_rng(seed), ALL, 0, None, 24)
        wide, same = augment(image, labels, 96, np.random.default_rng(seed), ALL, around, None, 24)
        assert np.array_equal(wide[around:-around, around:-around], alone)
        assert np.array_equal(same, taught)
        plain = augment(image, labels, 96, np.random.default_rng(seed), dataclasses.replace(ALL, crowd=0), 0, None, 24)
        changed += not np.array_equal(plain[1], taught)
    assert changed > 5


def test_as_many_patches_are_crowded_as_asked_for_and_the_others_are_as_without() -> None:
    image, labels = drawn([(x, y, 7, ALONE) for x in range(20, 240, 24) for y in range(20, 240, 40)], 256)

    def patch(seed: int, crowd: float) -> np.ndarray:
        return augment(image, labels, 96, np.random.default_rng(seed), dataclasses.replace(ALL, crowd=crowd))[0]

    changed = [not np.array_equal(patch(seed, 0.3), patch(seed, 0.0)) for seed in range(100)]
    assert 12 < sum(changed) < 42
    assert np.array_equal(patch(1, 1.0), patch(1, 1.0))
