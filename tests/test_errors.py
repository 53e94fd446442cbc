"""Each kind of error is told from the others, by hand-drawn label maps."""

from __future__ import annotations

import numpy as np
import pytest

from errors import errors


def rectangles(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Labels 1, 2, ... of (top, left, bottom, right)."""
    labels = np.zeros((20, 40), int)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        labels[top:bottom, left:right] = number
    return labels


ONE, OTHER = (0, 0, 10, 10), (0, 10, 10, 20)


@pytest.mark.parametrize(
    ("truth", "found", "kinds", "invented"),
    [
        ([ONE], [ONE], {"found": 1}, 0),
        ([ONE], [], {"missed": 1}, 0),
        ([ONE], [(0, 9, 10, 30)], {"outlined otherwise": 1}, 1),      # a tenth of it is covered
        ([ONE, OTHER], [(0, 0, 10, 20)], {"joined": 2}, 0),
        ([ONE], [(0, 0, 5, 10), (5, 0, 10, 10)], {"divided": 1}, 0),
        ([ONE], [(0, 0, 10, 4)], {"outlined otherwise": 1}, 0),
        ([], [ONE], {}, 1),
    ],
)
def test_kinds_of_errors(truth: list, found: list, kinds: dict[str, int], invented: int) -> None:
    result = errors(rectangles(*truth), rectangles(*found))
    assert {name: count for name, count in result.kinds.items() if count} == kinds
    assert result.invented == invented
    assert result.answered == len(found)


def test_what_each_kind_costs_in_dice() -> None:
    # 200 px annotated: one nucleus found with half of its pixels too many, one missed; one of 50 px invented
    truth = rectangles(ONE, OTHER)
    found = rectangles((0, 0, 15, 10), (0, 30, 10, 35))
    found[:, 10:20] = 0
    result = errors(truth, found)
    assert result.dice == pytest.approx(2 * 100 / (200 + 200))
    assert result.of_those_seen == pytest.approx(2 * 100 / (100 + 150))
    assert result.outlined_rightly == pytest.approx(2 * 100 / (200 + 150))
    nothing = errors(truth * 0, found * 0)
    assert nothing.dice == nothing.of_those_seen == nothing.outlined_rightly == 1


def test_ignored_pixels_are_in_neither() -> None:
    truth, found = rectangles(ONE, (10, 20, 20, 30)), rectangles(ONE)
    ignore = np.zeros(truth.shape, bool)
    ignore[10:] = True
    assert errors(truth, found, ignore).kinds == errors(rectangles(ONE), found).kinds
