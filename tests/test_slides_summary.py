"""The row of a slide: numbers that can be counted by hand, and warnings where they are odd."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from drawn_slides import drawn_store, part_of
from nuguide.slides.layout import Layout
from nuguide.slides.parts import PartStore
from nuguide.slides.summary import summarize
from nuguide.slides.writers import About

ABOUT = About("slide", "small")


def seen(thumbnail_rgb: np.ndarray) -> About:
    """The same with a picture of the slide."""
    return About("slide", "small", thumbnail_rgb=thumbnail_rgb)


def squares(folder: Path, sides: list[int], mpp: float = 0.5) -> PartStore:
    """A slide of 1000 x 1000 px with a square nucleus of each side, in pixels."""
    layout = Layout((1000, 1000), mpp, (1000, 1000), mpp, 1, 576, 128)
    labels = np.zeros((60, 60 * len(sides)), np.int32)
    for number, side in enumerate(sides):
        labels[:side, 60 * number : 60 * number + side] = number + 1
    store = PartStore(folder, layout)
    store.write(layout.regions[0], part_of(labels, 0, 0, layout))
    return store


def test_counts_areas_and_densities_are_those_of_the_parts(tmp_path):
    row = summarize(squares(tmp_path, [10, 12, 20]), ABOUT, tissue_area_mm2=0.2, seconds=4.5)
    assert row["nuclei"] == 3
    assert row["nuclei_per_mm2"] == 15
    assert row["area_um2_median"] == 12**2 / 4
    assert row["area_um2_mean"] == pytest.approx((100 + 144 + 400) / 4 / 3)
    assert row["probability_mean"] == 0.5
    assert row["tissue_share"] == pytest.approx(0.2 / 0.25)
    assert (row["slide"], row["model"], row["mpp"], row["seconds"]) == ("slide", "small", 0.5, 4.5)
    assert row["warnings"] == []


def test_every_part_is_counted_once(tmp_path):
    store, labels = drawn_store(tmp_path)
    assert summarize(store, ABOUT, 0.01)["nuclei"] == labels.max()


@pytest.mark.parametrize(("side", "warns"), [(7, True), (8, False), (24, False), (25, True)])
def test_nuclei_of_an_odd_size_say_that_magnification_may_be_wrong(tmp_path, tissue, side, warns):
    """Ten squares: 14.5 to 150 um2 are 58 to 600 px."""
    warnings = summarize(squares(tmp_path, [side] * 10), seen(tissue.image_rgb), 0.2)["warnings"]
    remedy = f"give --mpp {'0.25' if side > 20 else '1'}"
    assert any("for 0.5 microns per pixel" in text and text.endswith(remedy) for text in warnings) == warns


def test_a_slide_without_tissue_has_a_row_too(tmp_path):
    store = PartStore(tmp_path, Layout((1000, 1000), 0.5, (1000, 1000), 0.5, 1, 576, 128))
    row = summarize(store, ABOUT, 0.0)
    assert row["nuclei"] == 0
    assert row["nuclei_per_mm2"] is row["area_um2_mean"] is row["area_um2_median"] is row["quality"] is None
    assert row["warnings"] == []
    row = summarize(store, seen(np.full((63, 63, 3), 243, np.uint8)), 0.0)
    assert [text.split(":")[0] for text in row["warnings"]] == ["tissue is 0.00% of it", "no nuclei were found"]


def test_focus_is_that_of_the_windows(tmp_path, tissue):
    blurred = cv2.GaussianBlur(tissue.image_rgb, (0, 0), 3)
    store, about = squares(tmp_path, [10] * 10), seen(tissue.image_rgb)
    sharp, soft, unseen = (
        summarize(store, about, 0.2, windows=windows) for windows in ([tissue.image_rgb], [blurred], [])
    )
    assert (sharp["quality"]["blurred_share"], soft["quality"]["blurred_share"]) == (0, 1)
    assert unseen["quality"]["focus"] is None
    assert [any("out of focus" in text for text in row["warnings"]) for row in (sharp, soft, unseen)] == [
        False, True, False
    ]
