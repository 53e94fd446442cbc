"""The separation that is noted in a model suits every data set that it was validated on."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np

from nuguide.batches import Picture
from nuguide.calibrate import best_separation, quality


def disks(radius: int, group: str) -> Picture:
    """Four nuclei, and the truth about them as the image: `Sees` reads its maps from there."""
    labels = np.zeros((80, 80), np.int32)
    for number, center in enumerate(((20, 20), (60, 20), (20, 60), (60, 60)), 1):
        cv2.circle(labels, center, radius, number, -1)
    image = np.repeat((labels > 0).astype(np.uint8)[..., None] * 255, 3, axis=2)
    return Picture(group, group, image, labels)


class Sees:
    """A predictor that is sure of every nucleus, and of a speck of 4 x 9 px, 9 um2, beside the large ones."""

    spec = SimpleNamespace(mpp=0.5)

    def probabilities(self, image_rgb: np.ndarray) -> np.ndarray:
        found = image_rgb[..., 0] / np.float32(255)
        if found.sum() > 800:                               # the large ones
            found = found.copy()
            found[38:42, 36:45] = 1
        return np.stack([found, found])


def test_the_set_of_few_pictures_counts_as_much_as_that_of_many():
    """Small nuclei of 13 um2: a least area of 14 loses all of them; one of 8 lets a speck stand in the large."""
    small, large = disks(4, "few/a"), disks(10, "many/b")
    area_um2 = (small.labels == 1).sum() * 0.25
    assert 8 < area_um2 < 14
    assert best_separation(Sees(), [large] * 9)["min_area_um2"] == 14  # pyright: ignore[reportArgumentType]
    assert best_separation(Sees(), [*[large] * 9, small])["min_area_um2"] == 8  # pyright: ignore[reportArgumentType]


def test_of_thresholds_that_score_alike_the_one_nearest_to_the_aim_is_taken_and_a_better_one_before_it():
    picture = disks(10, "set/a")
    assert best_separation(Sees(), [picture])["nucleus"] == 0.5  # pyright: ignore[reportArgumentType]

    class Haloed(Sees):
        def probabilities(self, image_rgb: np.ndarray) -> np.ndarray:
            nucleus = (image_rgb[..., 0] > 0).astype(np.float32)
            return np.stack([np.maximum(nucleus, 0.65 * cv2.dilate(nucleus, np.ones((7, 7)))), nucleus])

    assert best_separation(Haloed(), [picture])["nucleus"] == 0.7  # pyright: ignore[reportArgumentType]


def test_quality_is_the_mean_of_three_and_leaves_out_what_is_ignored():
    one = disks(10, "x/a")
    assert quality(one, one.labels) == 1
    assert quality(one, np.where(one.labels == 4, 0, one.labels)) < 0.9
    ignore = one.labels == 4
    vague = Picture(one.id, one.group, one.image_rgb, one.labels, ignore)
    assert quality(vague, np.where(one.labels == 4, 0, one.labels)) == 1
