"""Defects are found in drawn tissue, the tissue as it is is left in peace, and each warning says what to do."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pandas as pd
import pytest

from conftest import draw_tissue
from nuguide.quality import WINDOW_PX, focus, inspect, inspect_slide, likely_mpp, windows_of

GLASS = (243, 242, 244)


@functools.cache
def drawn() -> np.ndarray:
    """Drawn once, for it takes half a second."""
    return draw_tissue(size=(256, 256))[0]


def tissue_at(mpp: float = 0.5) -> np.ndarray:
    """256 x 256 px, 128 um a side: nuclei of 7 to 10 um on stroma that varies."""
    side = round(256 * 0.5 / mpp)
    return cv2.resize(drawn(), (side, side), interpolation=cv2.INTER_CUBIC).copy()


def nuclei(area_um2: float, count: int = 30) -> pd.DataFrame:
    return pd.DataFrame({"area_um2": np.full(count, area_um2)})


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Out of focus, with the noise of a camera on top, which is sharp."""
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), sigma) + noise, 0, 255).astype(np.uint8)


def glass(side: int = 256) -> np.ndarray:
    noisy = np.array(GLASS) + np.random.default_rng(0).normal(0, 3, (side, side, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def banded(image: np.ndarray, light: tuple[float, float, float], width: int = 70) -> np.ndarray:
    """A vertical band through which a share of the light passes."""
    image = image.copy()
    start = (image.shape[1] - width) // 2
    image[:, start : start + width] = (image[:, start : start + width] * np.array(light)).astype(np.uint8)
    return image


def folded(image: np.ndarray, width: int = 60) -> np.ndarray:
    """A vertical band in which the picture lies on two of its mirror images, as a pleat does: densities add."""
    image = image.copy()
    band = slice((image.shape[1] - width) // 2, (image.shape[1] + width) // 2)
    layers = image[:, band] / 255.0 * image[::-1, band] / 255.0 * image[:, band][:, ::-1]
    image[:, band] = layers.astype(np.uint8)
    return image


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_sound_tissue_is_left_in_peace(mpp: float) -> None:
    quality = inspect(tissue_at(mpp), mpp, nuclei(50))
    assert quality.warnings == []
    assert quality.tissue_share > 0.95
    assert quality.ink_share == quality.fold_share == quality.blurred_share == 0
    assert (quality.nuclei, quality.median_area_um2) == (30, 50)


@pytest.mark.parametrize("sigma", [2, 3, 4])
def test_a_blurred_picture_is_out_of_focus_in_spite_of_its_noise(sigma: float) -> None:
    quality = inspect(blurred(tissue_at(), sigma), 0.5)
    assert list(quality.findings) == ["blur"]
    assert quality.warnings == ["100% of the tissue looked at is out of focus: scan it again"]


def test_focus_depends_neither_on_the_amount_of_stain_nor_on_the_exposure() -> None:
    image = tissue_at()
    pale = (255 * (image / 255.0) ** 0.5).astype(np.uint8)                  # half the optical density
    usual = np.median(focus(image))
    assert np.median(focus(pale)) == pytest.approx(usual, rel=0.25)
    assert np.median(focus((image * 0.8).astype(np.uint8))) == pytest.approx(usual, rel=0.25)
    assert np.median(focus(blurred(image, 2))) < usual / 2


def test_half_a_picture_in_focus_is_told_by_its_share() -> None:
    """The windows of 256 px are judged in blocks of 128 px: two of four are blurred."""
    image = tissue_at()
    image[:, 128:] = blurred(image, 4)[:, 128:]
    quality = inspect(image, 0.5)
    assert quality.blurred_share == 0.5
    assert "blur" not in quality.findings


@pytest.mark.parametrize("light", [(0.15, 0.55, 0.25), (0.1, 0.15, 0.55), (0.08, 0.08, 0.09)])
def test_pens_over_tissue_are_told(light: tuple[float, float, float]) -> None:
    quality = inspect(banded(tissue_at(), light), 0.5)
    assert "pen" in quality.findings
    assert 0.6 < quality.ink_share / (70 / 256) < 2.7                        # soft borders, or margins
    assert quality.findings["pen"].endswith("leave out what was found under them")


def test_folds_are_told_by_both_stains() -> None:
    quality = inspect(folded(tissue_at()), 0.5)
    assert list(quality.findings) == ["fold"]
    assert 0.1 < quality.fold_share < 0.35                                  # 60 of 256 px are 0.23


@pytest.mark.parametrize("image", [glass(), np.full((256, 256, 3), 255, np.uint8), np.full((3, 5, 3), 240, np.uint8)])
def test_empty_glass_is_told_and_nothing_else_of_it(image: np.ndarray) -> None:
    quality = inspect(image, 0.5)
    assert list(quality.findings) == ["glass"]
    assert quality.findings["glass"].startswith("tissue is 0.00% of it")
    assert quality.focus is quality.blurred_share is None


def test_dark_pictures_are_told() -> None:
    assert list(inspect((tissue_at() * 0.35).astype(np.uint8), 0.5).findings) == ["dark"]


@pytest.mark.parametrize(
    ("area_um2", "mpp", "likely"), [(200, 0.5, 0.25), (10, 0.25, 0.5), (3, 0.25, 1.0), (1000, 1.0, 0.25)]
)
def test_a_wrong_magnification_comes_with_the_likely_one(area_um2: float, mpp: float, likely: float) -> None:
    """A scale wrong by 2 makes areas wrong by 4: 50 um2 look like 200 or 12.5."""
    quality = inspect(tissue_at(mpp), mpp, nuclei(area_um2))
    assert likely_mpp(quality, mpp) == likely
    said = quality.findings["magnification"]
    size = "large" if likely < mpp else "small"
    assert said.startswith(f"nuclei look too {size} for {mpp:g} microns per pixel (median {area_um2:.0f} um2)")
    assert said.endswith(f"if the scan is {10 / likely:g}x, give --mpp {likely:g}")


@pytest.mark.parametrize(("area_um2", "count"), [(15, 30), (150, 30), (500, 9), (2, 9)])
def test_usual_and_few_nuclei_say_nothing_of_magnification(area_um2: float, count: int) -> None:
    assert inspect(tissue_at(), 0.5, nuclei(area_um2, count)).findings == {}


def test_no_nuclei_are_told_only_where_someone_looked() -> None:
    assert list(inspect(tissue_at(), 0.5, nuclei(1, 0)).findings) == ["no nuclei"]
    assert inspect(tissue_at(), 0.5).findings == {}


@pytest.mark.parametrize(("shape", "mpp", "sizes"), [
    ((2000, 3000), 0.25, 9 * [WINDOW_PX]), ((600, 600), 0.5, 4 * [WINDOW_PX]), ((300, 300), 1.0, [WINDOW_PX]),
    ((100, 100), 0.25, [50]),
])  # fmt: skip
def test_windows_are_at_half_a_micron_and_inside(shape: tuple[int, int], mpp: float, sizes: list[int]) -> None:
    windows = windows_of(np.zeros((*shape, 3), np.uint8), mpp)
    assert [max(window.shape[:2]) for window in windows] == sizes


def test_a_slide_is_judged_by_its_thumbnail_and_windows() -> None:
    thumbnail = glass(128)
    thumbnail[40:90, 40:90] = cv2.resize(tissue_at(), (50, 50), interpolation=cv2.INTER_AREA)
    areas = np.full(100, 50.0)
    quality = inspect_slide(thumbnail, 8.0, [tissue_at()] * 3, 0.25, areas)
    assert quality.warnings == []
    assert quality.tissue_share == pytest.approx(50 * 50 / 128**2, abs=0.05)
    assert list(inspect_slide(thumbnail, 8.0, [blurred(tissue_at(), 3)] * 3, 0.25, areas).findings) == ["blur"]
    cv2.line(thumbnail, (10, 10), (10, 120), (30, 60, 170), 8)
    assert list(inspect_slide(thumbnail, 8.0, [tissue_at()], 0.25, areas).findings) == ["pen"]
    assert "glass" in inspect_slide(glass(128), 8.0, [], 0.25, areas[:0]).findings


def test_the_numbers_are_plain_json_values() -> None:
    numbers = inspect(glass(64), 0.5).numbers()
    assert set(numbers) == {"tissue_share", "ink_share", "fold_share", "focus", "blurred_share", "brightness"}
    assert all(value is None or isinstance(value, float) for value in numbers.values())
