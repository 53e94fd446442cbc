"""Tiles: they cover, they blend, and a large image in tiles is the same image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import draw_tissue
from fakes import RADIUS, ByColor
from nuguide import predict
from nuguide.checkpoint import ModelSpec
from nuguide.instances import separate
from nuguide.predict import Predictor
from nuguide.tiling import batches, blend, cover, gather, middles, ramp
from nuguide.types import Tile


def random_covers(count: int = 150) -> list[tuple[tuple[int, int], int, int, int]]:
    """(shape, tile_px, overlap_px, multiple), all sorts."""
    rng = np.random.default_rng(0)
    cases = []
    while len(cases) < count:
        shape = tuple(int(side) for side in rng.integers(1, 300, 2))
        tile, multiple = int(rng.integers(1, 130)), int(rng.choice([1, 1, 2, 16, 32]))
        overlap = int(rng.integers(0, 60))
        if tile // multiple > -(-overlap // multiple):
            cases.append((shape, tile, overlap, multiple))
    return cases


@pytest.mark.parametrize("case", range(0, 150, 10))
def test_every_pixel_lies_in_exactly_one_core(case):
    for shape, tile_px, overlap_px, multiple in random_covers()[case : case + 10]:
        owners = np.zeros(shape, int)
        for tile in cover(shape, tile_px, overlap_px, multiple):
            assert 0 <= tile.top <= tile.core_top < tile.core_bottom <= tile.bottom <= shape[0]
            assert 0 <= tile.left <= tile.core_left < tile.core_right <= tile.right <= shape[1]
            owners[tile.core_top : tile.core_bottom, tile.core_left : tile.core_right] += 1
        assert (owners == 1).all()


@pytest.mark.parametrize("case", range(0, 150, 10))
def test_tiles_are_alike_and_neighbors_share_the_overlap(case):
    for shape, tile_px, overlap_px, multiple in random_covers()[case : case + 10]:
        tiles = cover(shape, tile_px, overlap_px, multiple)
        for axis, (start, stop) in enumerate([("top", "bottom"), ("left", "right")]):
            places = sorted({(getattr(tile, start), getattr(tile, stop)) for tile in tiles})
            length = places[0][1] - places[0][0]
            assert length <= tile_px
            assert (places[0][0], places[-1][1]) == (0, shape[axis])
            assert all(first % multiple == 0 for first, _ in places)
            for first, last in places:                   # alike, but for what the border cuts off
                assert last - first == length or (last == shape[axis] and last - first > length - multiple)
            for (_, stop_before), (start_after, _) in zip(places, places[1:], strict=False):
                assert stop_before - start_after >= overlap_px
            if len(places) > 1:
                assert length % multiple == 0
                fewer = len(places) - 1
                longest, shared = tile_px // multiple * multiple, -(-overlap_px // multiple) * multiple
                assert fewer * (longest - shared) + shared < shape[axis], "one less would do"


def test_a_core_keeps_half_the_overlap_away_from_borders_inside_the_image():
    tiles = cover((700, 900), 256, 64)
    assert len(tiles) == 4 * 5
    for tile in tiles:
        for edge, core_edge, last in ((tile.top, tile.core_top, 0), (tile.left, tile.core_left, 0),
                                      (tile.bottom, tile.core_bottom, 700), (tile.right, tile.core_right, 900)):
            assert edge == core_edge == last or abs(core_edge - edge) >= 32


def test_an_image_smaller_than_a_tile_is_one_tile():
    assert cover((30, 45), 256, 64, multiple=16) == [Tile(0, 0, 30, 45, 0, 0, 30, 45)]


def test_tiles_are_made_no_larger_than_it_takes():
    assert {tile.bottom - tile.top for tile in cover((520, 100), 512, 64)} == {292}     # (520 + 64) / 2


IMPOSSIBLE = [(64, 64, 1), (64, -1, 1), (8, 0, 16), (70, 64, 32), (0, 0, 1)]


@pytest.mark.parametrize(("tile_px", "overlap_px", "multiple"), IMPOSSIBLE)
def test_tiles_without_anything_of_their_own_are_refused(tile_px, overlap_px, multiple):
    with pytest.raises(ValueError, match="px cannot overlap by"):
        cover((100, 100), tile_px, overlap_px, multiple)


@pytest.mark.parametrize("margin_px", [0, 4, 16])
def test_the_weights_of_two_neighbors_sum_to_1(margin_px):
    left, right = ramp(0, 100, 160, 40, margin_px), ramp(60, 160, 160, 40, margin_px)   # they share pixels 60..99
    np.testing.assert_allclose(left[60:] + right[:40], 1, atol=1e-6)
    assert (left[:60] == 1).all()
    assert (right[40:] == 1).all()
    assert (left[100 - margin_px :] == 0).all()
    assert (np.diff(right[margin_px : 40 - margin_px]) > 0).all()


@pytest.mark.parametrize(("tile_px", "overlap_px", "margin_px"), [(64, 16, 0), (64, 16, 7), (50, 20, 3), (31, 0, 0)])
def test_the_tiles_of_a_map_blend_into_the_map(tile_px, overlap_px, margin_px):
    known = np.random.default_rng(0).random((2, 141, 203), dtype=np.float32)
    tiles = cover(known.shape[1:], tile_px, overlap_px)
    assert len(tiles) > 6
    cut = ((tile, known[:, *tile.window]) for tile in tiles)
    np.testing.assert_allclose(blend(known.shape[1:], cut, 2, overlap_px, margin_px), known, atol=1e-6)


def test_what_a_tile_says_within_the_margin_does_not_count():
    known = np.random.default_rng(0).random((1, 100, 150), dtype=np.float32)

    def wrong_at_borders(tile: Tile) -> np.ndarray:
        values = known[:, *tile.window].copy()
        values[:, :5] = known[:, tile.top : tile.top + 5, tile.left : tile.right] if tile.top == 0 else np.nan
        return values

    tiles = cover((100, 150), 64, 20)
    blended = blend((100, 150), ((tile, np.nan_to_num(wrong_at_borders(tile), nan=99)) for tile in tiles), 1, 20, 5)
    np.testing.assert_allclose(blended, known, atol=1e-6)
    blended = blend((100, 150), ((tile, np.nan_to_num(wrong_at_borders(tile), nan=99)) for tile in tiles), 1, 20, 0)
    assert np.abs(blended - known).max() > 1


@pytest.mark.parametrize(("overlap_px", "margin_px"), [(32, 16), (0, 16), (0, 1)])
def test_margins_that_leave_nothing_of_the_overlap_are_refused(overlap_px, margin_px):
    with pytest.raises(ValueError, match="leaves nothing"):
        blend((64, 64), [], 1, overlap_px, margin_px)


def test_the_middle_of_a_bounding_box():
    labels = np.zeros((20, 30), int)
    labels[2:5, 10:20] = 7                              # rows 2..4, columns 10..19
    labels[10, 3] = labels[14, 5] = 2
    ids, y, x = middles(labels)
    assert list(zip(ids, y, x, strict=True)) == [(2, 12, 4), (7, 3, 14)]
    assert [len(part) for part in middles(np.zeros((4, 4), int))] == [0, 0, 0]


def test_batches_are_full_but_for_the_last():
    tiles = cover((300, 300), 100, 0)
    assert [len(group) for group in batches(tiles, 4)] == [4, 4, 1]
    assert [tile for group in batches(iter(tiles), 4) for tile in group] == tiles
    assert list(batches([], 4)) == []


# A large image in tiles is the same image.

SHAPE = (700, 900)
TILES_PX = (128, 192, 256)          # of the network, overlapping by 64
WINDOWS = ((128, 32), (192, 64), (257, 64), (320, 48))      # side and halo of the separation


def seams(tile_px: int, overlap_px: int) -> tuple[list[int], list[int]]:
    """Rows and columns where a core ends inside the image."""
    tiles = cover(SHAPE, tile_px, overlap_px)
    return sorted({tile.core_top for tile in tiles} - {0}), sorted({tile.core_left for tile in tiles} - {0})


@pytest.fixture(scope="module")
def crowded() -> tuple[np.ndarray, int]:
    """Tissue with nuclei all over, and on all seams and corners of all covers used here as far as there is room.

    Returns image (700, 900, 3) uint8 and how many nuclei lie on a seam.
    """
    image = np.tile(draw_tissue(0, (175, 225), 25, (5, 9))[0], (4, 4, 1))     # its own seams cut nuclei, too
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    taken = np.zeros(SHAPE, bool)
    on_seams = 0
    for tile_px, overlap_px in [*((tile, 64) for tile in TILES_PX), *((side, 2 * halo) for side, halo in WINDOWS)]:
        seam_rows, seam_columns = seams(tile_px, overlap_px)
        corners = [(y, x) for y in seam_rows for x in seam_columns]
        along = [(y, int(x)) for y in seam_rows for x in rng.integers(0, SHAPE[1], 6)]
        along += [(int(y), x) for x in seam_columns for y in rng.integers(0, SHAPE[0], 6)]
        for y, x in [*corners, *along]:
            near = np.s_[max(y - 14, 0) : y + 15, max(x - 14, 0) : x + 15]
            if taken[near].any():
                continue
            distance = np.hypot((rows[near] - y) / rng.uniform(0.6, 1), columns[near] - x)
            image[near][distance <= 12] = (228, 170, 200)
            image[near][distance <= rng.uniform(6, 10)] = (95, 60, 140)
            taken[near] = True
            on_seams += 1
    return image, on_seams


def predictor(tile_px: int, overlap_px: int = 64, batch: int = 4) -> Predictor:
    return Predictor(
        ByColor(), None, ModelSpec("unet"), "cpu", "fp32", batch=batch, tile_px=tile_px, overlap_px=overlap_px
    )


@pytest.fixture(scope="module")
def untiled(crowded) -> tuple[np.ndarray, np.ndarray]:
    """(2, H, W) maps and (H, W) labels of the whole image, in one tile and one window."""
    maps = predictor(1024).probabilities(crowded[0])
    return maps, separate(maps[0], maps[1], 0.5)


def same_but_for_numbers(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two label maps show the same nuclei: numbers pair one to one, and background with background."""
    pairs = np.unique(one.astype(np.int64) << 32 | other)
    return pairs[0] == 0 and len(set(pairs >> 32)) == len(set(pairs & 0xFFFFFFFF)) == len(pairs)


def test_the_image_is_crowded_and_the_fake_network_wrong_at_borders(crowded, untiled):
    image, on_seams = crowded
    assert on_seams > 200
    assert untiled[1].max() > 400
    tile = cover(SHAPE, 256, 64)[6]
    whole = untiled[0][:, *tile.window]
    alone = predictor(1024).probabilities(image[tile.window])
    inside = np.s_[:, RADIUS:-RADIUS, RADIUS:-RADIUS]
    assert np.abs(alone - whole).max() > 0.1
    np.testing.assert_allclose(alone[inside], whole[inside], atol=1e-6)


@pytest.mark.parametrize("tile_px", TILES_PX)
def test_maps_in_tiles_are_the_maps_of_the_whole_image(crowded, untiled, tile_px):
    assert len(cover(SHAPE, tile_px, 64)) >= 12
    np.testing.assert_allclose(predictor(tile_px).probabilities(crowded[0]), untiled[0], atol=1e-6)


@pytest.mark.parametrize(("side", "halo"), WINDOWS)
def test_labels_in_windows_are_the_labels_of_the_whole_image(untiled, side, halo):
    maps, whole = untiled
    tiles: list[Tile] = []

    def one(tile: Tile) -> np.ndarray:
        tiles.append(tile)
        return separate(maps[0][tile.window], maps[1][tile.window], 0.5)

    labels, owned = gather(SHAPE, side, halo, one)
    assert len(tiles) == len(owned) >= 12
    assert sum(owned) == whole.max() == labels.max(), "every nucleus is owned by exactly one"
    assert len(np.unique(labels)) == whole.max() + 1
    assert same_but_for_numbers(labels, whole)


def test_with_a_halo_smaller_than_nuclei_they_would_not_be(untiled):
    maps, whole = untiled
    labels, _ = gather(SHAPE, 192, 5, lambda tile: separate(maps[0][tile.window], maps[1][tile.window], 0.5))
    assert not same_but_for_numbers(labels, whole)


@pytest.mark.parametrize("tile_px", TILES_PX)
def test_a_tiled_image_has_the_nuclei_of_the_untiled_image(crowded, untiled, tile_px, monkeypatch):
    monkeypatch.setattr(predict, "WINDOW_PX", tile_px)
    monkeypatch.setattr(predict, "HALO_PX", 40)
    nuclei = predictor(tile_px).segment(crowded[0], mpp=0.5)
    assert len(nuclei) == untiled[1].max()
    assert same_but_for_numbers(nuclei.labels, untiled[1])


def test_a_tiled_image_has_the_nuclei_of_the_untiled_image_at_another_resolution(crowded, monkeypatch):
    image = crowded[0][:350, :450].repeat(2, axis=0).repeat(2, axis=1)
    whole = predictor(1024).segment(image, mpp=0.25)
    monkeypatch.setattr(predict, "WINDOW_PX", 128)
    monkeypatch.setattr(predict, "HALO_PX", 40)
    tiled = predictor(128).segment(image, mpp=0.25)
    assert len(tiled) == len(whole) > 80
    assert same_but_for_numbers(tiled.labels, whole.labels)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_does_not_matter(crowded, untiled, batch):
    np.testing.assert_allclose(predictor(256, batch=batch).probabilities(crowded[0]), untiled[0], atol=1e-6)


@pytest.mark.parametrize("overlap_px", [0, 8, 32])
def test_any_overlap_gives_maps_without_gaps(crowded, overlap_px):
    maps = predictor(256, overlap_px).probabilities(crowded[0])
    assert maps.dtype == np.float32
    assert torch.isfinite(torch.from_numpy(maps)).all()
    assert ((maps >= 0) & (maps <= 1)).all()


def test_a_single_window_keeps_its_own_numbers():
    labels = np.array([[0, 2], [1, 0]], np.int32)
    same, owned = gather((2, 2), 8, 2, lambda tile: labels)
    np.testing.assert_array_equal(same, labels)
    assert owned == [2]


def test_windows_without_nuclei_own_none():
    nothing = np.zeros((90, 90), np.int32)
    labels, owned = gather((90, 90), 40, 5, lambda tile: nothing[tile.window])
    assert not labels.any()
    assert owned == [0] * 9
