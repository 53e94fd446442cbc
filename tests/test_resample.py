"""Sizes by hand, and images that keep their labels under them at any resolution."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from nuguide.resample import (
    WEIGHT_BITS,
    Axis,
    axis_weights,
    nearest_index,
    read_resized,
    resampled_size,
    resize_image,
    resize_labels,
    resize_map,
)


@pytest.mark.parametrize(
    ("shape", "mpp", "target", "expected"),
    [
        ((512, 512), 0.25, 0.5, (256, 256)),             # 40x to 20x
        ((1000, 600), 0.2525, 0.5, (505, 303)),
        ((99, 101), 0.25, 0.5, (50, 50)),                # 49.5 and 50.5: halves go to the even number
        ((300, 500), 0.5, 0.5, (300, 500)),
        ((100, 100), 1.0, 0.5, (200, 200)),
        ((1, 3), 0.25, 2.0, (1, 1)),                     # never less than a pixel
    ],
)
def test_sizes_by_hand(
    shape: tuple[int, int], mpp: float, target: float, expected: tuple[int, int]
) -> None:
    assert resampled_size(shape, mpp, target) == expected


@pytest.mark.parametrize(("mpp", "target"), [(0, 0.5), (0.5, 0), (-1, 0.5), (float("nan"), 0.5)])
def test_resolutions_must_be_positive(mpp: float, target: float) -> None:
    with pytest.raises(ValueError, match="microns per pixel must be positive"):
        resampled_size((10, 10), mpp, target)


def test_halving_an_image_takes_the_mean_of_each_2x2_cell() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, :2] = np.array([[10, 20], [30, 40]])[..., None]
    image[:, 2:, 1] = 100
    assert resize_image(image, (1, 2)).tolist() == [[[25, 25, 25], [0, 100, 0]]]
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    means = noise.reshape(32, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(resize_image(noise, (32, 24)) - means).max() <= 0.5


def test_shrinking_by_other_factors_keeps_the_mean_color() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    assert np.abs(resize_image(noise, (37, 41)).mean((0, 1)) - noise.mean((0, 1))).max() < 1


def test_the_same_size_changes_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    assert np.array_equal(resize_image(noise, (17, 23)), noise)
    labels = np.arange(17 * 23).reshape(17, 23).astype(np.uint32)
    assert np.array_equal(resize_labels(labels, (17, 23)), labels)


def test_nearest_pixels_by_hand() -> None:
    # centers of 2 pixels over 5: 1.25 and 3.75; of 5 over 2: 0.2, 0.6, 1.0, 1.4, 1.8
    assert nearest_index(5, 2).tolist() == [1, 3]
    assert nearest_index(2, 5).tolist() == [0, 0, 1, 1, 1]
    assert nearest_index(4, 4).tolist() == [0, 1, 2, 3]
    assert nearest_index(7, 1).tolist() == [3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_labels_keep_their_type_and_make_no_new_numbers(dtype: type) -> None:
    labels = np.zeros((40, 40), dtype)
    labels[5:20, 5:20], labels[20:35, 20:35] = 7, np.iinfo(dtype).max
    for size in ((20, 20), (33, 51), (80, 7)):
        found = resize_labels(labels, size)
        assert found.dtype == dtype
        assert found.shape == size
        assert set(np.unique(found)) == {0, 7, np.iinfo(dtype).max}


def test_enlarging_labels_and_back_is_the_identity() -> None:
    labels = np.random.default_rng(0).integers(0, 9, (13, 17))
    assert np.array_equal(resize_labels(resize_labels(labels, (39, 51)), (13, 17)), labels)


def test_maps_are_interpolated_linearly() -> None:
    # two pixels over four: samples at 1/4 and 3/4 of the way between their centers, the border repeated
    assert resize_map(np.array([[0.0, 1.0]], np.float32), (1, 4)).tolist() == [[0, 0.25, 0.75, 1]]


def center(weight: np.ndarray) -> np.ndarray:
    """Centroid (y, x) as a share of the image's sides."""
    y, x = ((np.arange(side) + 0.5) / side for side in weight.shape)
    return np.array([(weight.sum(1) * y).sum(), (weight.sum(0) * x).sum()]) / weight.sum()


@pytest.mark.parametrize("size", [(60, 80), (120, 160), (47, 63), (200, 240), (241, 333)])
def test_image_labels_and_maps_stay_within_half_a_pixel_of_each_other(size: tuple[int, int]) -> None:
    labels = np.zeros((120, 160), np.int32)
    cv2.circle(labels, (101, 37), 14, 1, -1)
    image = np.repeat((labels * np.uint8(200)).astype(np.uint8)[..., None], 3, axis=2)
    truth = center(labels)
    for moved in (
        resize_labels(labels, size),
        resize_image(image, size)[..., 0].astype(float),
        resize_map(labels.astype(np.float32), size),
    ):
        assert moved.shape == size
        assert np.all(np.abs(center(moved) - truth) * size < 0.5)


def test_labels_that_shrink_have_that_of_most_of_a_pixel() -> None:
    labels = np.array([[1, 1, 2, 0], [1, 0, 0, 0], [3, 4, 5, 5], [4, 4, 6, 6]], np.int32)
    # 3 of 4; 3 of 4; 3 of 4; and two of two: by turns the upper left one's and the lower right one's
    assert resize_labels(labels, (2, 2)).tolist() == [[1, 0], [4, 5]]
    assert resize_labels(labels[:, 2:], (2, 1)).tolist() == [[0], [6]]
    assert resize_labels(np.array([[7, 7, 8]], np.uint16), (1, 1)).dtype == np.uint16
    assert resize_labels(np.array([[7, 7, 8]], np.uint16), (1, 1)).tolist() == [[7]]


@pytest.mark.parametrize("times", [1.3, 2, 2.5, 4])
def test_labels_that_shrink_neither_move_nor_grow(times: float) -> None:
    side, away, areas = 240, [], []
    for seed in range(60):
        y, x, radius = np.random.default_rng(seed).uniform((90, 90, 20), (150, 150, 40))
        rows, columns = np.mgrid[:side, :side]
        labels = ((rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2).astype(np.int32)
        found = resize_labels(labels, (round(side / times), round(side / times)))
        away.append((center(found) - center(labels)) * found.shape)
        areas.append(found.mean() / labels.mean())
    assert np.all(np.abs(np.mean(away, axis=0)) < 0.02)                # pixels of the new map
    assert np.mean(areas) == pytest.approx(1, abs=0.006)             # a curve loses a little


def test_weights_by_hand() -> None:
    one = 2**WEIGHT_BITS
    # 5 pixels over 2: each new pixel has two old ones and half of the one between
    first, weights = axis_weights(Axis(5, 2, 2.5), 0, 2, shrinks=True)
    share = one * 2 / 5
    assert first == 0
    assert np.abs(weights.toarray() - [[share, share, share / 2, 0, 0], [0, 0, share / 2, share, share]]).max() <= 1
    # 2 pixels over 4: the second new center lies a quarter of a pixel behind the first old one
    first, weights = axis_weights(Axis(2, 4, 0.5), 1, 2, shrinks=False)
    t, a = 0.25, -0.75
    before = a * (t + 1) ** 3 - 5 * a * (t + 1) ** 2 + 8 * a * (t + 1) - 4 * a
    there = (a + 2) * t**3 - (a + 3) * t**2 + 1
    assert weights.toarray()[0] / one == pytest.approx([before + there, 1 - before - there], abs=1e-3)


@pytest.mark.parametrize("scale", [1.0163, 2, 2.5, 7.3, 0.7])
def test_weights_of_every_pixel_add_up_to_one_and_know_no_window(scale: float) -> None:
    axis = Axis(1000, int(1000 / scale), scale)
    _, whole = axis_weights(axis, 0, axis.new, shrinks=scale >= 1)
    assert np.all(whole.sum(1) == 2**WEIGHT_BITS)
    first, some = axis_weights(axis, 50, 60, shrinks=scale >= 1)
    assert np.array_equal(some.toarray(), whole.toarray()[50:60, first : first + some.toarray().shape[1]])


@pytest.mark.parametrize("size", [(60, 80), (47, 63), (24, 32), (119, 159), (171, 229), (9, 11)])
def test_an_image_in_blocks_is_the_image_at_once(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    rows, columns = (Axis(old, new, old / new) for old, new in zip(noise.shape, size, strict=False))

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        assert top >= 0
        assert left >= 0
        return noise[top : top + height, left : left + width]

    whole = read_resized(read, rows, columns, (0, 0, *size))
    assert np.abs(whole.astype(int) - resize_image(noise, size)).max() <= 1
    monkeypatch.setattr("nuguide.resample._BLOCK_PX", 37)
    assert np.array_equal(read_resized(read, rows, columns, (0, 0, *size)), whole)


def test_a_flat_color_stays_what_it_is() -> None:
    flat = np.full((100, 100, 3), (255, 1, 128), np.uint8)
    for new in (30, 77, 99, 143):
        axis = Axis(100, new, 100 / new)
        resized = read_resized(lambda t, l, h, w: flat[t : t + h, l : l + w], axis, axis, (0, 0, new, new))  # noqa: E741
        assert np.unique(resized.reshape(-1, 3), axis=0).tolist() == [[255, 1, 128]]
