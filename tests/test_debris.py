"""Torn tissue and debris: labels follow the glass; what is left of a torn nucleus is taught if it is most of it."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from nuguide.augment import Augmentation, augment
from nuguide.debris import kept, littered, piece
from nuguide.types import IGNORED, Sample

ALL = Augmentation(
    rotate=False, scale=(1, 1), elastic_px=0, debris=1.0,
    gain=(1, 1), gamma=(1, 1), brightness=0, contrast=(1, 1), clahe=0, stain=0, stain_shift=0,
)


def inner(mask: np.ndarray) -> np.ndarray:
    """What lies 3 px or more inside of a mask."""
    return cv2.erode(mask.astype(np.uint8), np.ones((7, 7)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0


def test_part_of_the_tissue_becomes_glass_and_something_lies_on_it() -> None:
    image, labels = np.full((128, 160, 3), (120, 60, 130), np.uint8), np.ones((128, 160), np.int32)
    shares, stained = [], 0
    for seed in range(30):
        found, left = littered(image, labels, np.random.default_rng(seed))
        assert found.shape == image.shape
        assert found.dtype == np.uint8
        assert left.dtype == np.int32
        shares.append(np.mean(left == 0))
        stained += bool((found[..., 1][inner(left == 0)] < 170).any())
    assert 0.08 < min(shares) < max(shares) < 0.8
    assert stained > 15


@pytest.mark.parametrize(("around", "margin"), [(0, 0), (0, 24), (64, 24), (32, 0)])
def test_labels_end_where_the_glass_begins_whatever_image_and_labels_show_beside_the_patch(
    around: int, margin: int
) -> None:
    image, labels = np.full((200, 200, 3), 40, np.uint8), np.ones((200, 200), np.int32)
    for seed in range(20):
        patch, found = augment(image, labels, 96, np.random.default_rng(seed), ALL, around, None, margin)
        assert patch.shape == (96 + 2 * around, 96 + 2 * around, 3)
        assert found.shape == (96 + 2 * margin, 96 + 2 * margin)
        middle = patch[around : around + 96, around : around + 96, 1]
        taught = found[margin : margin + 96, margin : margin + 96]
        assert np.mean((taught == 1) & inner(middle > 140)) < 0.002          # specks, paler than they are
        assert (middle[inner(taught == 1)] < 80).all()


def test_of_a_torn_nucleus_the_rest_is_taught_if_it_is_most_of_it() -> None:
    labels = np.array([[1, 1, 1, 1, 2, 2, 2, 2, IGNORED, 0]], np.int32)
    torn = np.array([[1, 0, 0, 0, 1, 1, 1, 0, 0, 1]], bool)
    assert kept(labels, torn).tolist() == [[0, 1, 1, 1, 0, 0, 0, IGNORED, IGNORED, 0]]


def test_a_piece_lies_about_its_center_and_is_no_larger_than_the_largest() -> None:
    for seed in range(50):
        outline, thickness = piece((120, 150), np.array([50, 70]), np.random.default_rng(seed))
        assert outline.shape == thickness.shape == (120, 150)
        assert 0 <= outline.min() <= outline.max() <= 1 + 1e-6
        assert not thickness[outline == 0].any()
        y, x = np.nonzero(outline > 0.5)
        if len(x):
            assert np.hypot(y - 50, x - 70).max() < 120
            assert len(x) < 4000


def test_as_many_patches_are_littered_as_asked_for_and_the_others_are_as_without(tissue: Sample) -> None:
    def patch(seed: int, debris: float) -> np.ndarray:
        how = dataclasses.replace(ALL, debris=debris)
        return augment(tissue.image_rgb, tissue.labels, 64, np.random.default_rng(seed), how)[0]

    changed = [not np.array_equal(patch(seed, 0.3), patch(seed, 0.0)) for seed in range(200)]
    assert 35 < sum(changed) < 85
    assert np.array_equal(patch(1, 1.0), patch(1, 1.0))
