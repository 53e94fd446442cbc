"""Nuclei to maps and back: targets by hand, separation by seeds, outlines at any size."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from conftest import draw_tissue
from nuguide.instances import (
    INTERIOR_DEPTH,
    Separation,
    enlarge,
    flood,
    gaps,
    largest_pieces,
    separate,
    targets,
    without_holes,
)
from nuguide.metrics import panoptic_quality

MPP = 0.5


def disk(shape: tuple[int, int], y: float, x: float, radius: float) -> np.ndarray:
    """(H, W) bool, True within `radius` of the point (y, x)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def pieces(mask: np.ndarray) -> int:
    """How many 8-connected pieces a mask has."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1


def as_maps(mask: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sure maps: 1 inside, 0 outside."""
    return mask.astype(np.float32), (mask & seeds).astype(np.float32)


# Targets


def test_the_interior_of_a_square_lies_deeper_than_two_fifths_of_its_depth():
    labels = np.zeros((20, 20), np.int32)
    labels[5:14, 5:14] = 7                              # 9 x 9: depth 1 at the rim, 5 in the middle; 0.4 of it is 2
    nucleus, interior = targets(labels)
    assert nucleus.sum() == 81
    deeper = np.zeros((20, 20), bool)
    deeper[7:12, 7:12] = True                           # depth 3 and more: 5 x 5
    np.testing.assert_array_equal(interior > 0, deeper)
    assert INTERIOR_DEPTH == 0.4


def test_targets_turn_with_their_labels():
    labels = draw_tissue(3, (96, 96), 40, (6, 10))[1].astype(np.int32)
    labels[:, 48:][labels[:, 48:] > 0] += 1000          # and many that touch along a line
    upright = targets(labels)
    for turns in range(4):
        for flip in (1, -1):
            turned = np.ascontiguousarray(np.rot90(labels, turns)[:, ::flip])
            np.testing.assert_array_equal(targets(turned), np.rot90(upright, turns, (1, 2))[..., ::flip])


def test_gaps_lie_within_three_pixels_of_two_nuclei_and_in_no_interior():
    labels = np.zeros((21, 40), np.int32)
    labels[5:16, 3:14], labels[5:16, 16:27] = 4, 9      # 11 x 11 each, two pixels between them
    labels[0, 30:] = -1                                 # nothing is taught here: no nucleus
    between = gaps(labels, targets(labels)[1])
    assert set(np.flatnonzero(between[10])) == {13, 14, 15, 16}       # 3 from the one's last, 3 from the other's first
    assert not between[:, :13].any()
    assert not between[:, 17:].any()
    assert not gaps(np.where(labels == 4, labels, 0), targets(labels)[1]).any()          # alone
    everywhere = np.ones(labels.shape, np.float32)
    assert not gaps(labels, everywhere).any()


def test_touching_nuclei_have_a_gap_along_their_border():
    labels = np.zeros((16, 16), np.int32)
    labels[:, :8], labels[:, 8:] = 1, 2
    between = gaps(labels, np.zeros(labels.shape, np.float32))
    np.testing.assert_array_equal(np.flatnonzero(between.all(0)), np.arange(5, 11))


def test_the_interior_of_a_disk_is_about_a_third_of_it():
    labels = disk((80, 80), 40, 40, 30).astype(np.int32)
    nucleus, interior = targets(labels)
    assert interior.sum() / nucleus.sum() == pytest.approx(0.6**2, abs=0.03)


def test_two_touching_squares_have_interiors_apart():
    labels = np.zeros((20, 30), np.int32)
    labels[5:15, 5:15], labels[5:15, 15:25] = 1, 2
    nucleus, interior = targets(labels)
    assert pieces(nucleus > 0) == 1
    assert pieces(interior > 0) == 2
    assert {int(n) for n in np.unique(labels[interior > 0])} == {1, 2}


@pytest.mark.parametrize("below", [0, 2])
def test_a_nucleus_of_one_pixel_has_an_interior_even_on_top_of_another(below):
    labels = np.zeros((9, 9), np.int32)
    labels[4, 4], labels[5:, 4] = 1, below
    assert targets(labels)[1][4, 4] == 1


def test_targets_of_an_empty_map_are_empty():
    maps = targets(np.zeros((6, 7), np.int32))
    assert maps.shape == (2, 6, 7)
    assert maps.dtype == np.float32
    assert not maps.any()


# Separation


@pytest.mark.parametrize("seed", range(3))
def test_the_targets_of_drawn_tissue_separate_into_the_drawn_nuclei(seed):
    _, labels = draw_tissue(seed, nuclei=60, radius=(5, 14))
    nucleus, interior = targets(labels)
    assert panoptic_quality(labels, separate(nucleus, interior, MPP)).pq > 0.95


def test_the_targets_of_64_touching_disks_separate_into_the_64_disks():
    labels = np.zeros((208, 208), np.int32)
    for number in range(64):                            # radius 13, centers 24 apart: each overlaps the next by 2
        row, column = divmod(number, 8)
        labels[disk(labels.shape, 20 + 24 * row, 20 + 24 * column, 13) & (labels == 0)] = number + 1
    assert pieces(labels > 0) == 1
    nucleus, interior = targets(labels)
    found = separate(nucleus, interior, MPP)
    assert found.max() == 64
    assert panoptic_quality(labels, found).pq > 0.95


def test_two_overlapping_disks_are_divided_in_the_middle():
    shape = (60, 90)
    seeds = disk(shape, 30, 30, 6) | disk(shape, 30, 60, 6)
    found = separate(*as_maps(disk(shape, 30, 30, 18) | disk(shape, 30, 60, 18), seeds), MPP)
    assert found.max() == 2
    left, right = sorted((found[30, 30], found[30, 60]))
    for row in range(22, 39):                           # the waist: |row - 30| < 10
        rightmost = max(np.flatnonzero(found[row] == found[30, 30]))
        assert abs(rightmost - 45) <= 1.5
    assert (left, right) == (1, 2)
    areas = np.bincount(found.ravel())[1:]
    assert areas[0] == pytest.approx(areas[1], rel=0.08)


def test_a_piece_without_interior_is_one_nucleus():
    shape = (40, 80)
    mask = disk(shape, 20, 20, 10) | disk(shape, 20, 55, 10)
    found = separate(*as_maps(mask, disk(shape, 20, 20, 3)), MPP)       # the right one has no seed
    assert found.max() == 2
    np.testing.assert_array_equal(found > 0, mask)


def test_a_seed_below_the_least_area_counts_as_none():
    shape = (40, 60)
    mask = disk(shape, 20, 20, 12) | disk(shape, 20, 36, 12)
    three_px = np.zeros(shape, bool)
    three_px[20, 36:39] = True                          # 0.75 um2; 1 um2 are 4 px
    assert separate(*as_maps(mask, disk(shape, 20, 20, 4) | three_px), MPP).max() == 1
    three_px[20, 39] = True
    assert separate(*as_maps(mask, disk(shape, 20, 20, 4) | three_px), MPP).max() == 2


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 6), (0.25, 12)])
def test_specks_are_dropped_by_physical_area(mpp, side):
    mask = np.zeros((60, 60), bool)
    mask[5 : 5 + side, 5 : 5 + side] = True             # 3 x 3 um: 9 um2
    mask[30 : 30 + side - 1, 30 : 30 + side - 1] = True     # 2.5 x 2.5 or 2.75 x 2.75 um: 6.25 or 7.56 um2
    found = separate(*as_maps(mask, mask), mpp)
    assert found.max() == 1
    assert (found > 0).sum() * mpp**2 == 9.0
    assert separate(*as_maps(mask, mask), mpp, Separation(min_area_um2=6.25)).max() == 2


def test_a_hole_is_filled_unless_it_is_large_or_at_the_border():
    shape = (80, 80)
    mask = disk(shape, 40, 40, 24)
    mask[38:42, 38:42] = False                          # 16 px are 4 um2
    mask[50:58, 36:44] = False                          # 64 px are 16 um2, more than 15
    found = separate(*as_maps(mask, mask), MPP)
    assert found[40, 40] == 1
    assert found[54, 40] == 0
    at_border = disk(shape, 0, 40, 24)
    at_border[0:3, 38:41] = False                       # 9 px, but who knows how far it goes on
    assert separate(*as_maps(at_border, at_border), MPP)[0, 39] == 0


def test_without_holes_closes_background_that_touches_only_at_corners():
    mask = np.ones((5, 5), bool)
    mask[1, 1] = mask[2, 2] = False
    assert without_holes(mask, max_area_px=2).all()
    assert not without_holes(mask, max_area_px=1).all()


def rough_maps(seed: int, size: int = 220, blur: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Maps of no tissue at all: blurred noise of every shape that a poor network could make."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(size, size)), (0, 0), blur)
    nucleus = 1 / (1 + np.exp(-2 * noise / noise.std()))
    return nucleus.astype(np.float32), np.clip(1.4 * nucleus - 0.6, 0, 1).astype(np.float32)


@pytest.mark.parametrize("blur", [1.0, 2.0, 4.0])
def test_every_nucleus_is_one_piece_and_large_enough(blur):
    found = separate(*rough_maps(0, blur=blur), MPP)
    assert found.max() > 10
    areas = np.bincount(found.ravel())[1:]
    assert areas.min() * MPP**2 >= 8
    for number in range(1, found.max() + 1):
        assert pieces(found == number) == 1


def test_nuclei_are_numbered_from_top_to_bottom():
    _, labels = draw_tissue(1)
    nucleus, interior = targets(labels)
    found = separate(nucleus, interior, MPP)
    tops = [np.flatnonzero(((found == number) & (interior > 0)).any(axis=1))[0] for number in range(1, found.max() + 1)]
    assert tops == sorted(tops)
    assert len(tops) == labels.max()


@pytest.mark.parametrize(("top", "left"), [(64, 96), (33, 77), (100, 31)])
def test_what_lies_around_does_not_change_a_nucleus(top, left):
    inner_labels = np.zeros((200, 200), np.int32)
    _, drawn = draw_tissue(2, (160, 160), 60, (5, 12))
    inner_labels[20:180, 20:180] = drawn
    inner = targets(inner_labels)
    rough = rough_maps(3, 160)                          # also what is no drawn nucleus
    inner[:, 20:180, 20:180] = np.where(drawn > 0, inner[:, 20:180, 20:180], 0.9 * np.stack(rough))
    _, around = draw_tissue(4, (140, 140), 60, (5, 12))
    outer = np.tile(targets(around), (1, 3, 3))
    outer[:, top : top + 200, left : left + 200] = inner    # with a ring of 20 px of nothing around it
    alone = separate(inner[0], inner[1], MPP)
    embedded = separate(outer[0], outer[1], MPP)[top : top + 200, left : left + 200]
    assert alone.max() > 30
    inside = np.s_[20:180, 20:180]
    pairs = np.unique(np.stack([alone[inside].ravel(), embedded[inside].ravel()]), axis=1)
    assert len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1], "one to one, background to background"
    assert pairs[:, 0].tolist() == [0, 0]


def test_empty_maps_hold_no_nucleus():
    for shape in ((40, 50), (1, 1), (1, 4), (4, 1), (2, 2), (1, 30)):
        nothing = np.zeros(shape, np.float32)
        found = separate(nothing, nothing, MPP)
        assert found.shape == shape
        assert found.dtype == np.int32
        assert not found.any()


def test_a_map_full_of_nucleus_is_one_nucleus():
    full = np.ones((30, 40), np.float32)
    assert (separate(full, full, MPP) == 1).all()


def test_a_nucleus_grows_16_microns_from_its_seed_and_no_farther():
    nucleus, interior = np.zeros((2, 20, 200), np.float32)
    nucleus[5:15, :] = 1
    interior[5:15, 0:10] = 1
    found = separate(nucleus, interior, MPP)
    assert np.flatnonzero(found[10]).max() == 9 + 16 / MPP
    farther = separate(nucleus, interior, MPP, Separation(reach_um=30))
    assert np.flatnonzero(farther[10]).max() == 9 + 30 / MPP


def test_a_flood_of_10_steps_fills_an_octagon_of_radius_10():
    labels = np.zeros((41, 41), np.float32)
    labels[20, 20] = 1
    flood(labels, np.ones(labels.shape, bool), steps=10)     # by turns to 4 and to 8 neighbors
    down, right = np.abs(np.mgrid[-20:21, -20:21])
    np.testing.assert_array_equal(labels > 0, (down <= 10) & (right <= 10) & (down + right <= 15))


def test_where_two_floods_meet_the_larger_number_wins():
    labels = np.zeros((1, 9), np.float32)
    labels[0, 0], labels[0, 8] = 1, 2
    flood(labels, np.ones(labels.shape, bool), steps=9)
    assert labels[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 2]


# At another size


def soft_disks(radius: float = 10.0) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float]]]:
    """Three disks whose probability falls from 1 to 0 over about 3 pixels: labels (64, 96), probability, centers."""
    shape, centers = (64, 96), [(20.3, 18.7), (40.1, 48.6), (23.4, 76.2)]
    labels, nucleus = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    for number, (y, x) in enumerate(centers, 1):
        one = 1 / (1 + np.exp(1.5 * (np.hypot(rows - y, columns - x) - radius)))
        nucleus = np.maximum(nucleus, one.astype(np.float32))
        labels[one >= 0.5] = number
    return labels, nucleus, centers


@pytest.mark.parametrize("factor", [2, 1.7, 3.3, 0.5])
def test_an_enlarged_disk_has_the_area_of_the_disk_to_2_percent(factor):
    labels, nucleus, centers = soft_disks()
    size = round(64 * factor), round(96 * factor)
    fine = enlarge(labels, nucleus, size, 0.5)
    assert fine.shape == size
    assert fine.dtype == np.uint32
    assert np.unique(fine).tolist() == [0, 1, 2, 3]
    for number, (y, x) in enumerate(centers, 1):
        rows, columns = np.nonzero(fine == number)
        # every other pixel of a small disk is chance: +-1 of 79 px at half size
        assert len(rows) == pytest.approx(np.pi * (10 * factor) ** 2, rel=0.02 if factor > 1 else 0.03)
        assert rows.mean() == pytest.approx((y + 0.5) * factor - 0.5, abs=0.3)
        assert columns.mean() == pytest.approx((x + 0.5) * factor - 0.5, abs=0.3)


def test_an_enlarged_outline_is_smooth_where_nearest_pixels_make_stairs():
    labels, nucleus, centers = soft_disks()
    fine = enlarge(labels, nucleus, (256, 384), 0.5) == 1
    stairs = np.kron(labels, np.ones((4, 4), np.int32)) == 1
    truth = disk((256, 384), 4 * centers[0][0] + 1.5, 4 * centers[0][1] + 1.5, 40)
    assert (fine ^ truth).sum() < 0.3 * (stairs ^ truth).sum()


def test_a_label_map_of_the_wanted_size_stays_as_it_is():
    labels, nucleus, _ = soft_disks()
    same = enlarge(labels, nucleus, labels.shape, 0.5)
    np.testing.assert_array_equal(same, labels)
    assert same.dtype == np.uint32


def test_enlarging_does_not_bring_back_what_separation_dropped():
    labels, nucleus, _ = soft_disks()
    labels[labels == 2] = 0                             # its probability still stands in the map
    fine = enlarge(labels, nucleus, (128, 192), 0.5)
    assert np.unique(fine).tolist() == [0, 1, 3]


def test_touching_nuclei_stay_divided_where_they_were():
    labels = np.zeros((40, 60), np.int32)
    labels[10:30, 10:30], labels[10:30, 30:50] = 1, 2
    fine = enlarge(labels, (labels > 0).astype(np.float32), (80, 120), 0.5)
    assert set(fine[40, 20:60]) == {1}
    assert set(fine[40, 60:100]) == {2}


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.7, 2, 5])
def test_every_nucleus_is_one_piece_at_any_size(factor):
    nucleus, interior = rough_maps(1, 150, blur=1.5)
    labels = separate(nucleus, interior, MPP)
    fine = enlarge(labels, nucleus, (round(150 * factor),) * 2, 0.5)
    numbers = np.unique(fine)[1:]
    assert len(numbers) > 0.95 * labels.max()
    assert max(pieces(fine == number) for number in numbers) == 1


def test_of_a_nucleus_in_two_pieces_the_larger_stays():
    labels = np.zeros((10, 20), np.int32)
    labels[2:8, 2:6] = labels[2:4, 12:14] = 5
    labels[6:9, 12:15] = 9
    kept = largest_pieces(labels.copy())
    assert np.bincount(kept.ravel())[[5, 9]].tolist() == [24, 9]
    assert not kept[2:4, 12:14].any()
