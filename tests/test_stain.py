"""Images from different scanners at one appearance."""

from __future__ import annotations

import numpy as np

from conftest import draw_tissue
from nuguide.stain import exposed


def test_a_picture_half_as_bright_comes_back_to_the_exposure_of_the_other() -> None:
    bright = np.clip(draw_tissue()[0].astype(float) * 240 / 255, 0, 240).astype(np.uint8)
    bright[:20] = 240                                    # glass
    dark = (bright // 2).astype(np.uint8)                # its glass is at 120: a gain of 2
    assert np.abs(exposed(dark).astype(int) - bright).max() <= 2
    assert exposed(bright) is bright


def test_colors_stay_and_the_gain_is_bounded() -> None:
    dim = np.full((8, 8, 3), (60, 30, 15), np.uint8)     # 240 / 60 would be 4; 2.5 is the most
    assert exposed(dim)[0, 0].tolist() == [150, 75, 38]
    assert exposed(np.zeros((8, 8, 3), np.uint8)).max() == 0
