"""Augmentation moves labels with their image, keeps their numbers, and every knob turns something."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from nuguide.augment import Augmentation, augment, degrade, geometry, jitter_stain, recolor
from nuguide.stain import STAINS
from nuguide.types import Sample

# Only quarter turns, flips and, in an image larger than the patch, the place are left to chance.
STILL = Augmentation(
    rotate=False, scale=(1, 1), elastic_px=0,
    gain=(1, 1), gamma=(1, 1), brightness=0, contrast=(1, 1), clahe=0, stain=0, stain_shift=0,
)
GEOMETRY = {"rotate": True, "scale": (0.8, 0.8), "elastic_px": 3.0}
COLOR = {
    "gain": (0.8, 0.8), "gamma": (1.3, 1.3), "brightness": 20.0, "contrast": (0.8, 0.8), "clahe": 1.0, "stain": 0.3,
    "stain_shift": 0.1,
}
QUALITY = {"blur": 2.0, "noise": 20.0, "jpeg": 30}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(*size: int, seed: int = 0) -> np.ndarray:
    """Colors without symmetry, smooth enough for contrast to be local."""
    return cv2.GaussianBlur(rng(seed).integers(0, 256, (*size, 3), np.uint8), (0, 0), 1)


def orientations(image: np.ndarray) -> list[bytes]:
    """The eight ways to lay down a square image."""
    return [np.rot90(side, turns).tobytes() for side in (image, image[:, ::-1]) for turns in range(4)]


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(tissue: Sample) -> None:
    one, again, other = (augment(tissue.image_rgb, tissue.labels, 64, rng(s), Augmentation()) for s in (3, 3, 4))
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])
    assert one[0].shape == (64, 64, 3)
    assert one[0].dtype == np.uint8
    assert one[1].shape == (64, 64)
    assert one[1].dtype == np.int32


@pytest.mark.parametrize("size", [64, 65])
def test_without_augmentation_a_patch_is_the_image_itself_in_one_of_eight_orientations(size: int) -> None:
    image, labels = noise(size, size), np.arange(size * size, dtype=np.int32).reshape(size, size)
    seen = set()
    for seed in range(60):
        patch, found = augment(image, labels, size, rng(seed), STILL)
        assert patch.tobytes() in orientations(image)
        seen.add(orientations(labels).index(found.tobytes()))
        assert orientations(image).index(patch.tobytes()) == orientations(labels).index(found.tobytes())
    assert seen == set(range(8))


def test_an_image_smaller_than_the_patch_lies_in_the_middle_and_is_mirrored_around() -> None:
    image, labels = noise(40, 40), np.arange(1600, dtype=np.int32).reshape(40, 40)
    patch, found = augment(image, labels, 64, rng(), STILL)
    assert found[12:52, 12:52].tobytes() in orientations(labels)
    assert np.array_equal(found, np.pad(found[12:52, 12:52], 12, mode="reflect"))
    assert np.array_equal(patch, np.pad(patch[12:52, 12:52], ((12, 12), (12, 12), (0, 0)), mode="reflect"))


def test_an_image_of_one_pixel_fills_the_patch() -> None:
    patch, found = augment(np.full((1, 1, 3), 9, np.uint8), np.full((1, 1), 5, np.int32), 8, rng(), STILL)
    assert set(patch.ravel()) == {9}
    assert set(found.ravel()) == {5}


def test_labels_move_with_the_image() -> None:
    # A dark disk on white: whatever is done to it, dark pixels and labeled pixels have one centroid, within a pixel.
    image, labels = np.full((96, 96, 3), (236, 216, 232), np.uint8), np.zeros((96, 96), np.int32)
    cv2.circle(labels, (40, 57), 10, 1, -1)
    image[labels > 0] = (90, 50, 140)
    apart = []
    for seed in range(200):
        patch, found = augment(image, labels, 64, rng(seed), Augmentation())
        gray = patch.mean(2)
        if np.count_nonzero(found) < 50:                 # cut away
            continue
        dark = gray < (gray.max() + gray.min()) / 2
        apart.append(np.hypot(*(np.argwhere(dark).mean(0) - np.argwhere(found).mean(0))))
    assert len(apart) > 100
    assert max(apart) < 1
    assert np.mean(apart) < 0.2


def test_label_values_up_to_a_million_are_kept_exactly() -> None:
    values = np.array([0, 1, 2**16 + 1, 2**20 - 1, 2**20])
    labels = values[rng().integers(0, 5, (80, 80))].astype(np.int32)
    for seed in range(20):
        _, found = augment(np.zeros((80, 80, 3), np.uint8), labels, 64, rng(seed), Augmentation())
        assert set(np.unique(found)) == set(values)


@pytest.mark.parametrize("knob", [*GEOMETRY, *COLOR])
def test_every_knob_has_an_effect_on_what_it_should(knob: str) -> None:
    how = dataclasses.replace(STILL, **{knob: (GEOMETRY | COLOR)[knob]})
    image, labels = noise(64, 64), np.arange(4096, dtype=np.int32).reshape(64, 64)
    for seed in range(3):
        patch, found = augment(image, labels, 64, rng(seed), how)
        assert patch.tobytes() not in orientations(image)
        moved = found.tobytes() not in orientations(labels)
        assert moved == (knob in GEOMETRY)


def test_every_field_is_a_knob_of_these_tests() -> None:
    known = {*GEOMETRY, *COLOR, *QUALITY, "crowd", "debris"}
    assert {field.name for field in dataclasses.fields(Augmentation)} == known


def degraded(image: np.ndarray, knob: str, seeds: int = 40) -> list[np.ndarray]:
    how = dataclasses.replace(STILL, **{knob: QUALITY[knob]})
    return [degrade(image, rng(seed), how) for seed in range(seeds)]


@pytest.mark.parametrize("knob", QUALITY)
def test_half_the_patches_lose_quality_and_keep_their_color(knob: str) -> None:
    image = noise(64, 64)
    image[..., 0] //= 3                                  # red is dark: channels that change places would show
    seen = degraded(image, knob)
    changed = [found for found in seen if not np.array_equal(found, image)]
    assert 10 < len(changed) < 30
    assert all(found.dtype == np.uint8 and found.shape == image.shape for found in seen)
    for found in changed:
        np.testing.assert_allclose(found.mean((0, 1)), image.mean((0, 1)), atol=2)
    assert np.array_equal(degrade(image, rng(0), STILL), image)


def test_quality_is_lost_by_no_more_than_asked_for() -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    spread = [float(found.std()) for found in degraded(image, "noise")]
    assert 10 < max(spread) < 21
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 200
    steepest = [int(np.diff(found[32, :, 0].astype(int)).max()) for found in degraded(edge, "blur")]
    sharpest = cv2.GaussianBlur(edge, (0, 0), QUALITY["blur"])
    assert np.diff(sharpest[32, :, 0].astype(int)).max() - 1 <= min(steepest) < 100
    compressed = [np.abs(found.astype(int) - noise(64, 64)).mean() for found in degraded(noise(64, 64), "jpeg")]
    assert 1 < max(compressed) < 20


def test_an_enlargement_by_2_makes_nuclei_four_times_as_large() -> None:
    labels = np.zeros((64, 64), np.int32)
    cv2.circle(labels, (32, 32), 9, 1, -1)
    how = dataclasses.replace(STILL, scale=(2, 2))
    _, found = augment(np.zeros((64, 64, 3), np.uint8), labels, 128, rng(), how)
    assert np.count_nonzero(found) == pytest.approx(4 * np.count_nonzero(labels), rel=0.02)


def test_elastic_shifts_stay_near_the_largest_shift_asked_for() -> None:
    x, y = geometry((64, 64), 64, rng(1), STILL)
    bent_x, bent_y = geometry((64, 64), 64, rng(1), dataclasses.replace(STILL, elastic_px=3.0))
    shift = np.maximum(np.abs(bent_x - x), np.abs(bent_y - y))
    assert 1 < shift.max() < 4.5                         # cubic interpolation overshoots its grid by up to half


def test_patches_come_from_everywhere_inside() -> None:
    # of an image of 100 x 300, patches of 50 are centered from 25 to 75 and from 25 to 275
    centers = np.array([[np.mean(a) for a in geometry((100, 300), 50, rng(s), STILL)] for s in range(500)]) + 0.5
    assert centers.min(0) == pytest.approx([25, 25], abs=3)
    assert centers.max(0) == pytest.approx([275, 75], abs=3)


@pytest.mark.parametrize(
    ("knob", "expected"),
    [
        ({"gamma": (2, 2)}, 10),                         # 255 x 0.2^2 = 10.2
        ({"contrast": (0.5, 0.5)}, 89),                  # 255 x ((0.2 - 0.5) / 2 + 0.5) = 89.25
        ({"gain": (1.5, 1.5)}, 76),                      # 76.5, rounded to even
        ({"gain": (9, 9)}, 255),                         # held back to 5: the brightest pixel becomes white, no more
        ({}, 51),
    ],
)
def test_the_intensity_curve_by_hand(knob: dict, expected: int) -> None:
    gray = np.full((4, 4, 3), 51, np.uint8)              # 0.2 of 255
    assert set(recolor(gray, rng(), dataclasses.replace(STILL, **knob)).ravel()) == {expected}


def test_stain_jitter_of_nothing_is_the_identity() -> None:
    image = rng().integers(0, 256, (64, 64, 3), np.uint8)
    assert np.array_equal(jitter_stain(image, rng(), 0, 0), image)


def test_stain_jitter_scales_and_shifts_the_amount_of_each_stain() -> None:
    # amounts of hematoxylin, eosin and residual before and after, by the inverse of the stain matrix
    image = rng().integers(100, 200, (32, 32, 3), np.uint8)
    drawn = rng(5)
    scale, shift = drawn.uniform(0.8, 1.2, 3), drawn.uniform(-0.05, 0.05, 3)

    def amounts(rgb: np.ndarray) -> np.ndarray:
        return -np.log((rgb.astype(float) + 1) / 256) @ np.linalg.inv(STAINS.astype(float))

    found = jitter_stain(image, rng(5), 0.2, 0.05)
    assert np.abs(amounts(found) - (amounts(image) * scale + shift)).mean() < 0.01


def test_the_stain_vectors_have_unit_length() -> None:
    assert np.linalg.norm(STAINS, axis=1) == pytest.approx([1, 1, 1])
