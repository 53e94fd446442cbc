"""Label maps as runs, and the pieces of nuclei."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from nuguide.runs import pieces_of, runs_of


def test_pieces_touch_at_corners_and_never_across_labels_or_the_ends_of_rows():
    labels = np.array([
        [1, 0, 2, 2, 0, 3],
        [0, 1, 2, 0, 0, 0],
        [4, 0, 0, 5, 5, 3],
        [3, 0, 4, 0, 0, 5],
    ])
    runs = runs_of(labels)
    pieces = pieces_of(runs)
    named = [(int(runs.ids[nucleus]), piece) for nucleus, piece in zip(runs.nucleus, pieces, strict=True)]
    of = {label: len({piece for name, piece in named if name == label}) for label in (1, 2, 3, 4, 5)}
    assert of == {1: 1, 2: 1, 3: 3, 4: 2, 5: 1}
    assert len(set(pieces)) == 8


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_those_of_a_search_label_by_label(seed):
    labels = np.random.default_rng(seed).integers(0, 4, (23, 31))
    runs = runs_of(labels)
    pieces = np.full(labels.shape, -1)
    pieces.ravel()[runs.pixels] = np.repeat(pieces_of(runs), runs.stop - runs.start)
    for label in (1, 2, 3):
        count, known = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=8)
        pairs = {*zip(known[labels == label], pieces[labels == label], strict=True)}
        assert len(pairs) == count - 1 == len({piece for _, piece in pairs})


def test_an_empty_map_has_no_runs_and_no_pieces():
    assert len(pieces_of(runs_of(np.zeros((5, 7), np.int32)))) == 0
