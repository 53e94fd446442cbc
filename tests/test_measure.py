"""Shapes and colors whose measures can be worked out by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest
from skimage.measure import regionprops

from nuguide.measure import COLUMNS, measure, outlines
from nuguide.stain import STAINS

KULPA = np.pi * (1 + np.sqrt(2)) / 8


def measured(
    labels: np.ndarray, mpp: float = 1.0, image_rgb: np.ndarray | None = None, probability: object = None
) -> pd.DataFrame:
    """`measure` with a white image and probability 1 where the test is about neither."""
    image_rgb = np.full((*labels.shape, 3), 255, np.uint8) if image_rgb is None else image_rgb
    probability = np.ones(labels.shape, np.float32) if probability is None else probability
    return measure(labels, image_rgb, mpp, np.asarray(probability))


def disk(radius: float, x: float = 60.0, y: float = 60.0, size: int = 120) -> np.ndarray:
    row, column = np.mgrid[:size, :size]
    return ((column - x) ** 2 + (row - y) ** 2 < radius**2).astype(np.int32)


def blobs(seed: int) -> np.ndarray:
    """A random label of random roughness: rings, combs, specks and all."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=rng.integers(1, 25, 2))
    if seed % 4:
        noise = cv2.GaussianBlur(noise, (0, 0), float(seed % 4)).reshape(noise.shape)
    return (noise >= np.quantile(noise, rng.uniform(0.1, 0.9))).astype(np.int32)


def area_inside(ring: np.ndarray) -> float:
    return cv2.contourArea(ring)


# The table


def test_columns_types_and_order_of_rows():
    labels = np.zeros((10, 10), np.uint32)
    labels[1, 1], labels[5, 5], labels[8, 2] = 4_000_000_000, 7, 300
    table = measured(labels)
    assert tuple(table.columns) == COLUMNS
    assert table["id"].tolist() == [7, 300, 4_000_000_000]
    assert [str(kind) for kind in table.dtypes] == ["int64"] + ["float64"] * 11


def test_an_empty_map_gives_an_empty_table_with_the_same_columns_and_types():
    empty, full = measured(np.zeros((10, 10), np.int32)), measured(disk(5))
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)
    assert list(empty.dtypes) == list(full.dtypes)
    assert len(measured(np.zeros((0, 0), np.int32))) == 0


def test_the_first_pixel_has_its_center_at_zero():
    labels = np.zeros((10, 10), np.int32)
    labels[0, 0], labels[3:5, 5] = 1, 2  # rows 3 and 4 of column 5
    table = measured(labels, mpp=0.5)
    assert table[["centroid_x_px", "centroid_y_px"]].to_numpy().tolist() == [[0, 0], [5, 3.5]]
    assert table[["centroid_x_um", "centroid_y_um"]].to_numpy().tolist() == [[0, 0], [2.5, 1.75]]


def test_area_is_pixels_times_the_area_of_one():
    assert measured(np.ones((4, 5), np.int32), mpp=0.5)["area_um2"].tolist() == [20 * 0.25]


def test_eccentricity_of_a_rectangle_by_hand():
    labels = np.zeros((10, 10), np.int32)
    labels[2:4, 2:6] = 1  # variances 4^2 / 12 and 2^2 / 12
    assert measured(labels).eccentricity.tolist() == [pytest.approx(np.sqrt(1 - 4 / 16))]


def test_eccentricity_of_a_slanted_line_of_two_pixels_by_hand():
    labels = np.eye(2, dtype=np.int32)  # along: 1/2 + 1/12, across: 1/12
    assert measured(labels).eccentricity.tolist() == [pytest.approx(np.sqrt(1 - (1 / 12) / (7 / 12)))]


def test_eccentricity_and_centroid_agree_with_scikit_image(tissue):
    table = measured(tissue.labels)
    regions = regionprops(tissue.labels)
    assert np.abs(table["eccentricity"] - [region.eccentricity for region in regions]).max() < 0.02
    centers = np.array([region.centroid for region in regions])[:, ::-1]
    assert table[["centroid_x_px", "centroid_y_px"]].to_numpy() == pytest.approx(centers)


@pytest.mark.parametrize("radius", [6, 8, 12, 20, 40])
def test_perimeter_of_a_disk_is_within_three_percent(radius):
    for x, y in np.random.default_rng(radius).uniform(60, 61, (10, 2)):
        assert measured(disk(radius, x, y), mpp=0.5).perimeter_um.tolist() == [pytest.approx(np.pi * radius, rel=0.03)]


def test_a_disk_is_round_and_solid():
    row = measured(disk(20)).iloc[0]
    assert row.eccentricity < 0.02
    assert row.solidity > 0.97


def test_a_single_pixel_has_every_measure():
    labels = np.zeros((5, 5), np.int32)
    labels[2, 2] = 1
    row = measured(labels).iloc[0]
    assert row.perimeter_um == pytest.approx(KULPA * 4 * np.sqrt(0.5))  # a diamond through the middles of its edges
    assert (row.area_um2, row.eccentricity, row.solidity) == (1, 0, 1)


def test_solidity_of_an_l_by_hand():
    labels = np.zeros((30, 30), np.int32)
    labels[5:25, 5:15] = labels[15:25, 5:25] = 1  # three squares of 10
    outline = 300 - 5 / 8 + 1 / 8  # five corners are cut by an eighth of a pixel, one is filled by it
    hull = 400 - 10.5**2 / 2 - 3 / 8  # the missing square but for a triangle, and three cut corners
    assert measured(labels).solidity.tolist() == [pytest.approx(outline / hull)]


def test_fragments_count_for_area_but_the_largest_makes_the_outline():
    labels = np.zeros((40, 40), np.int32)
    labels[0, 0:30:2], labels[10:20, 10:20] = 5, 5  # 15 specks and a square
    row = measured(labels).iloc[0]
    assert row.area_um2 == 115
    assert row.perimeter_um == pytest.approx(KULPA * (4 * 9 + 4 * np.sqrt(0.5)))


def test_stains_of_known_density():
    hematoxylin, eosin = STAINS[:2]
    labels = np.repeat([[1, 2, 3, 4]], 2, axis=0).astype(np.int32)
    density = np.stack([0.8 * hematoxylin, 0.5 * eosin, 0.4 * hematoxylin + 0.3 * eosin, 0 * eosin])
    image = np.rint(255 * 10**-density).astype(np.uint8)[labels - 1]
    table = measured(labels, image_rgb=image)
    assert table["hematoxylin_od"].to_numpy() == pytest.approx([0.8, 0, 0.4, 0], abs=0.01)
    assert table["eosin_od"].to_numpy() == pytest.approx([0, 0.5, 0.3, 0], abs=0.01)


def test_the_density_of_a_nucleus_is_the_mean_over_its_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 8, 3), np.uint8)
    pixels = np.arange(1, 17, dtype=np.int32).reshape(2, 8)
    together = measured(np.ones((2, 8), np.int32), image_rgb=image)
    apart = measured(pixels, image_rgb=image)
    for stain in ("hematoxylin_od", "eosin_od"):
        assert together[stain].tolist() == [pytest.approx(apart[stain].mean(), abs=1e-6)]
        assert np.isfinite(measured(pixels, image_rgb=np.zeros_like(image))[stain]).all()  # black


def test_probability_from_a_map_of_either_kind_or_one_a_nucleus():
    labels = np.array([[3, 3, 0, 9]], np.int32)
    floats = np.array([[0.2, 0.6, 0.9, 1.0]], np.float32)
    assert measured(labels, probability=floats)["probability"].to_numpy() == pytest.approx([0.4, 1.0])
    bytes_ = np.array([[51, 153, 7, 255]], np.uint8)
    assert measured(labels, probability=bytes_)["probability"].to_numpy() == pytest.approx([0.4, 1.0])
    assert measured(labels, probability=np.array([0.1, 0.7]))["probability"].tolist() == [0.1, 0.7]


def test_a_nucleus_over_the_whole_width_is_not_torn_or_joined_at_the_row_ends():
    labels = np.zeros((4, 6), np.int32)
    labels[1:3] = 1
    labels[0, 5], labels[3, 0] = 2, 3
    table = measured(labels)
    assert table["area_um2"].tolist() == [12, 1, 1]
    assert table["centroid_x_px"].tolist() == [2.5, 5, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_measures_depend_neither_on_the_type_nor_on_the_memory_layout(tissue, dtype):
    expected = measure(tissue.labels, tissue.image_rgb, 0.5, np.ones(tissue.labels.shape))
    labels = np.asfortranarray(tissue.labels.astype(dtype))
    probability = np.asfortranarray(np.ones(labels.shape))
    assert measure(labels, np.asfortranarray(tissue.image_rgb), 0.5, probability).equals(expected)


def test_given_outlines_are_used_instead_of_computed_ones(tissue):
    rings = outlines(tissue.labels)
    probability = np.ones(tissue.labels.shape)
    given = measure(tissue.labels, tissue.image_rgb, 0.5, probability, rings)
    assert given.equals(measure(tissue.labels, tissue.image_rgb, 0.5, probability))
    doubled = measure(tissue.labels, tissue.image_rgb, 0.5, probability, {id: 2 * ring for id, ring in rings.items()})
    assert doubled["perimeter_um"].to_numpy() == pytest.approx(2 * given["perimeter_um"].to_numpy())


def test_what_does_not_fit_together_is_refused():
    labels, image, probability = np.ones((4, 5), np.int32), np.zeros((4, 5, 3), np.uint8), np.ones((4, 5))
    with pytest.raises(ValueError, match=r"image is uint8 of shape \(5, 4, 3\)"):
        measure(labels, image.swapaxes(0, 1), 0.5, probability)
    with pytest.raises(ValueError, match=r"probability has shape \(2,\)"):
        measure(labels, image, 0.5, np.ones(2))
    with pytest.raises(ValueError, match="mpp is 0"):
        measure(labels, image, 0, probability)
    with pytest.raises(ValueError, match="labels are float64"):
        outlines(labels.astype(float))
    with pytest.raises(ValueError, match="2 outlines for 1 nuclei"):
        measure(labels, image, 0.5, probability, {1: np.zeros((4, 2)), 2: np.zeros((4, 2))})


# Outlines


def test_the_outline_of_a_pixel_runs_through_the_middles_of_its_edges():
    labels = np.zeros((5, 5), np.uint16)
    labels[2, 3] = 9
    ring = outlines(labels)[9]
    assert ring.dtype == np.float32
    assert sorted(ring.tolist()) == [[2.5, 2], [3, 1.5], [3, 2.5], [3.5, 2]]


def test_the_outline_of_a_rectangle_has_a_point_for_every_edge():
    labels = np.zeros((6, 8), np.int32)
    labels[1:3, 2:5] = 1
    ring = outlines(labels)[1]
    assert len(ring) == 2 * (2 + 3)
    assert area_inside(ring) == 6 - 4 / 8  # four corners of an eighth
    assert np.abs(np.diff(ring, axis=0, append=ring[:1])).max() <= 1  # in order


def test_outlines_of_touching_nuclei_share_the_edges_between_them():
    rings = outlines(np.array([[1, 1, 2, 2]] * 3, np.int32))
    shared = {tuple(point) for point in rings[1].tolist()} & {tuple(point) for point in rings[2].tolist()}
    assert shared == {(1.5, 0.0), (1.5, 1.0), (1.5, 2.0)}


def test_pixels_that_touch_at_a_corner_are_one_fragment():
    ring = outlines(np.eye(3, dtype=np.int32))[1]
    assert len(ring) == 3 * 4
    assert area_inside(ring) == 3 / 2 + 2 * 0.25 + 2 * 0.25  # three diamonds and two bridges


def test_holes_are_filled_and_the_largest_fragment_is_outlined():
    labels = np.zeros((20, 20), np.int32)
    labels[2:9, 2:9], labels[4:6, 4:6], labels[12:14, 12:19] = 1, 0, 1
    ring = outlines(labels)[1]
    assert area_inside(ring) == 49 - 4 / 8
    assert ring.max() == 8.5


def test_there_are_no_outlines_in_an_empty_map():
    assert outlines(np.zeros((5, 5), np.int32)) == {}


def test_an_outline_holds_the_pixel_centers_of_its_nucleus_and_no_others():
    for seed in range(80):
        labels = blobs(seed)
        ring = outlines(labels)[1]
        fragment = cv2.connectedComponents(labels.astype(np.uint8), connectivity=8)[1]
        around = cv2.connectedComponents(np.pad(1 - labels, 1, constant_values=1).astype(np.uint8), connectivity=4)[1]
        hole = (around != around[0, 0])[1:-1, 1:-1] & (labels == 0)
        inside = np.array(
            [[cv2.pointPolygonTest(ring, (x, y), False) for x in range(labels.shape[1])] for y in range(len(labels))]
        )
        held = np.unique(fragment[(inside > 0) & (labels > 0)])
        area = np.bincount(fragment.ravel())
        assert len(ring) >= 4
        assert (inside != 0).all()
        assert held.size >= 1, "nothing inside"
        largest = max(held, key=area.item)
        assert ((inside > 0) >= (fragment == largest)).all(), "all of the fragment"
        assert ((inside > 0) <= ((fragment > 0) | hole)).all(), "nothing around it"
