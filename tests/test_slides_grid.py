"""A slide at a model's resolution: every window is the same crop of the whole, and the whole is the resized image."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from drawn_slide import write_slide
from nuguide.resample import resampled_size, resize_image
from nuguide.slides.grid import Grid
from nuguide.slides.reader import open_slide
from nuguide.slides.slide import Slide, levels_of

FACTORS = (1, 2, 2.5, 0.7, 1.0163, 4, 7.3)


class Noise(Slide):
    """A slide of random pixels in memory, whose levels have the sizes they are given: only the first is asked for."""

    format = "noise"

    def __init__(self, *sizes_px: tuple[int, int]) -> None:
        super().__init__(Path("noise"))
        self.levels = levels_of(sizes_px)
        self.image = np.random.default_rng(0).integers(0, 256, (*sizes_px[0], 3), np.uint8)
        self.largest_read_px = 0

    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        self.largest_read_px = max(self.largest_read_px, height * width)
        return self.image[top : top + height, left : left + width]

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("factor", FACTORS)
def test_any_window_is_the_crop_of_the_whole(factor: float) -> None:
    slide = Noise((301, 412))
    grid = Grid(slide, 0.25, 0.25 * factor)
    assert grid.shape == resampled_size((301, 412), 0.25, 0.25 * factor)
    height, width = grid.shape
    whole = grid.read(0, 0, height, width)
    assert np.abs(whole.astype(int) - resize_image(slide.image, grid.shape)).max() <= 1
    rng = np.random.default_rng(1)
    for _ in range(20):
        top, bottom = np.sort(rng.choice(height + 1, 2, replace=False)).tolist()
        left, right = np.sort(rng.choice(width + 1, 2, replace=False)).tolist()
        assert np.array_equal(grid.read(top, left, bottom, right), whole[top:bottom, left:right])


@pytest.mark.parametrize("factor", [2, 4, 7.3])
@pytest.mark.parametrize("name", ["slide.svs", "slide.ome.tif"])
def test_windows_of_a_file_agree_wherever_they_begin(tmp_path: Path, name: str, factor: float) -> None:
    # 1099 / 4 and 1499 / 4 are no whole numbers: OpenSlide interpolates between the pixels of such levels
    write_slide(tmp_path / name, (1099, 1499), compression="zlib")
    with open_slide(tmp_path / name) as slide:
        grid = Grid(slide, 0.25, 0.25 * factor)
        height, width = grid.shape
        whole = grid.read(0, 0, height, width)
        rng = np.random.default_rng(1)
        for _ in range(4):
            top, left = rng.integers(0, (height - 10, width - 10)).tolist()
            window = grid.read(top, left, min(height, top + 90), min(width, left + 90))
            assert np.array_equal(window, whole[top : top + 90, left : left + 90])


def test_the_factor_one_gives_the_pixels_of_the_slide() -> None:
    slide = Noise((50, 60))
    assert np.array_equal(Grid(slide, 0.5, 0.5).read(3, 4, 50, 60), slide.image[3:, 4:])


def test_the_coarsest_level_that_is_fine_enough_is_read() -> None:
    slide = Noise((1600, 1600), (800, 800), (400, 400), (100, 300))
    assert [level.downsample for level in slide.levels[:3]] == [1, 2, 4]
    levels = {target: Grid(slide, 0.25, target).level for target in (0.2, 0.25, 0.49, 0.496, 0.5, 0.992, 1.0, 4.0)}
    # 0.496 and 0.992 are 1% finer than levels 1 and 2; the last level shows something else, as its sides say
    assert levels == {0.2: 0, 0.25: 0, 0.49: 0, 0.496: 1, 0.5: 1, 0.992: 2, 1.0: 2, 4.0: 2}


def test_a_line_says_what_is_read() -> None:
    slide = Noise((1000, 1000))
    assert Grid(slide, 0.2527, 0.5).describe() == "level 0 (0.2527 mpp), reduced 1.98 times to 0.5 microns per pixel"
    assert Grid(slide, 1.0, 0.5).describe() == "level 0 (1 mpp), enlarged 2 times to 0.5 microns per pixel"
    assert Grid(slide, 0.5, 0.5).describe() == "level 0 (0.5 mpp), as it is, 0.5 microns per pixel"


@pytest.mark.parametrize("mpp", [0.1, 0.2527, 0.37, 0.5, 1.0])
def test_borders_lie_on_borders_at_any_resolution(mpp: float) -> None:
    grid = Grid(Noise((333, 217)), mpp, 0.5)
    assert grid.shape == (max(1, round(333 * mpp / 0.5)), max(1, round(217 * mpp / 0.5)))
    assert grid.scale == (333 / grid.shape[0], 217 / grid.shape[1])
    assert grid.read(grid.shape[0] - 1, 0, grid.shape[0], 1).shape == (1, 1, 3)


def test_a_large_window_is_read_in_blocks() -> None:
    slide = Noise((5000, 6000))
    grid = Grid(slide, 0.1, 0.5)
    tracemalloc.start()
    grid.read(0, 0, *grid.shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slide.largest_read_px <= 1501**2  # a fourteenth of the level
    assert peak < 100e6


@pytest.mark.parametrize("window", [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 26, 5), (5, 0, 4, 5)])
def test_windows_outside_the_grid_are_refused(window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no window of a grid"):
        Grid(Noise((50, 50)), 0.25, 0.5).read(*window)
