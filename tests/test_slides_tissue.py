"""Tissue is found, whatever the exposure; glass, dust and ink are not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from drawn_slide import INKS_RGB, write_slide
from nuguide.images import read_image
from nuguide.slides.reader import open_slide
from nuguide.slides.tissue import Tissue, picture, slide_tissue
from nuguide.tissue import find_ink, find_tissue

MPP = 8.0
GLASS, EOSIN = (243, 242, 244), (228, 170, 200)


def glass(color: tuple[int, int, int] = GLASS, noise: float = 3.0) -> np.ndarray:
    """200 x 300 px of empty slide: 1.6 x 2.4 mm."""
    noisy = np.array(color) + np.random.default_rng(0).normal(0, noise, (200, 300, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def with_square(color: tuple[int, int, int], side: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """A square of tissue on glass, and where it is."""
    image, truth = glass(), np.zeros((200, 300), bool)
    truth[50 : 50 + side, 100 : 100 + side] = True
    image[truth] = np.clip(np.array(color) + np.random.default_rng(1).normal(0, 8, (truth.sum(), 3)), 0, 255)
    return image, truth


@pytest.mark.parametrize("color", [GLASS, (255, 255, 255), (240, 238, 222), (0, 0, 0), (150, 150, 152)])
def test_glass_alone_has_no_tissue_whatever_its_noise(color: tuple[int, int, int]) -> None:
    assert not find_tissue(glass(color), MPP).any()


def test_a_slide_that_is_all_tissue_is_found_whole() -> None:
    assert find_tissue(glass(EOSIN, noise=8), MPP).all()


@pytest.mark.parametrize("color", [EOSIN, (120, 90, 160), (236, 214, 226), (222, 206, 196)])
def test_pale_and_dark_tissue_is_found_with_a_margin_of_25_microns(color: tuple[int, int, int]) -> None:
    image, truth = with_square(color)
    found = find_tissue(image, MPP)
    assert found[truth].all()
    assert 3 <= 100 - np.flatnonzero(found[90])[0] <= 5  # 25 um are 3.1 px; and the blur
    assert not found[:40].any()


def test_exposure_makes_no_difference() -> None:
    image, truth = with_square(EOSIN)
    bright, dim = find_tissue(image, MPP), find_tissue((image * 0.6).astype(np.uint8), MPP)
    assert (bright ^ dim).sum() <= 0.02 * truth.sum()


def test_glass_around_the_tissue_of_a_small_slide_is_no_hole() -> None:
    """48 x 40 px, 0.12 mm2: the glass around is smaller than the holes that are filled."""
    image, _ = with_square(EOSIN, side=24)
    found = find_tissue(image[42:82, 88:136], MPP)
    assert found[8:32, 12:36].all()
    assert not any(border.any() for border in (found[:3], found[-3:], found[:, :6], found[:, -6:]))


def test_holes_are_filled_and_specks_dropped_by_their_area() -> None:
    image, truth = with_square(EOSIN, side=100)
    image[80:110, 120:150] = GLASS       # 0.24 mm, 0.058 mm2: a vessel
    image[10:13, 20:23] = EOSIN          # 24 um: dust
    found = find_tissue(image, MPP)
    assert found[truth].all()
    assert not found[:30, :60].any()
    image[60:140, 110:190] = GLASS       # 0.64 mm: glass that tissue surrounds
    assert not find_tissue(image, MPP)[90:110, 140:160].any()


@pytest.mark.parametrize("ink", INKS_RGB)
def test_pen_marks_are_no_tissue(ink: str) -> None:
    image, truth = with_square(EOSIN)
    cv2.line(image, (20, 10), (60, 190), INKS_RGB[ink], 8, cv2.LINE_AA)
    found = find_tissue(image, MPP)
    assert found[truth].all()
    assert not found[:, :75].any()
    assert not find_ink(image, MPP)[truth].any()


def test_real_tissue_is_no_ink(shared_data: Path) -> None:
    files = sorted((shared_data / "monuseg" / "images").iterdir())[:12]
    for file in files:
        image = read_image(file).image_rgb
        small = cv2.resize(image, None, fx=1 / 32, fy=1 / 32, interpolation=cv2.INTER_AREA)
        on_glass = np.pad(small, ((40, 40), (40, 40), (0, 0)), constant_values=243)
        assert not find_ink(on_glass, MPP).any()
        assert find_tissue(on_glass, MPP)[40:-40, 40:-40].mean() > 0.98


def test_a_drawn_slide_has_the_tissue_that_was_drawn(tmp_path: Path) -> None:
    truth = write_slide(tmp_path / "slide.svs", (4096, 6144), block_px=512, glass_blocks=2, ink="green")
    with open_slide(tmp_path / "slide.svs") as slide:
        tissue, thumbnail = slide_tissue(slide, truth.mpp)
    assert thumbnail.shape == (128, 192, 3)
    assert tissue.holds(*truth.centroids_px().T).mean() > 0.99  # but for those beside the pen
    # 4 x 7 blocks of 128 um, of which three sides have a margin of about 31 um and the fourth has ink
    assert truth.tissue_mm2 == pytest.approx(4 * 7 * 0.128**2)
    assert truth.tissue_mm2 * 0.95 < tissue.area_mm2 < (4 * 0.128 + 0.08) * (7 * 0.128 + 0.04)


def test_rectangles_and_points_are_pixels_of_the_slide() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = True                    # rows 100 to 200 and columns 200 to 300 of 400 x 500 px
    tissue = Tissue(mask, (400, 500), 0.5)
    assert tissue.area_mm2 == pytest.approx((100 * 0.5e-3) ** 2)
    assert tissue.holds(np.array([99, 100, 199, 200, -1]), np.array([250, 200, 299, 250, 250])).tolist() == [
        False, True, True, False, False
    ]
    assert tissue.covers(199, 299, 500, 600)
    assert not tissue.covers(200, 0, 400, 500)
    assert not tissue.covers(0, 300, 400, 500)
    assert not tissue.covers(-50, -50, 0, 0)


def test_the_picture_has_the_outline_of_the_mask_alone() -> None:
    image, mask = glass(noise=0), np.zeros((200, 300), bool)
    mask[10:20, 10:20] = True
    drawn = picture(image, mask)
    changed = (drawn != image).any(2)
    assert changed.sum() == 36           # the border of 10 x 10 pixels
    assert not changed[11:19, 11:19].any()
