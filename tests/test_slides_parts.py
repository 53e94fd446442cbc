"""Layout and parts: every pixel of a slide has one owner, and a part comes back as it was written."""

import numpy as np
import pytest

from conftest import draw_tissue
from nuguide.measure import measure, outlines
from nuguide.slides.layout import Layout
from nuguide.slides.parts import Part, PartStore, packed, unpacked
from nuguide.types import UserError


def layout(grid: tuple[int, int], tile: int = 576, overlap: int = 128, regions: int = 4) -> Layout:
    return Layout((2 * grid[0], 2 * grid[1]), 0.25, grid, 0.5, 2, tile, overlap, regions)


@pytest.mark.parametrize("grid", [(50, 60), (576, 577), (3000, 5000), (2048, 1), (1793, 2241)])
@pytest.mark.parametrize(("tile", "overlap"), [(576, 128), (256, 64), (320, 96)])
def test_cores_divide_the_grid_and_windows_reach_a_halo_beyond(grid, tile, overlap):
    plan = layout(grid, tile, overlap)
    owners = np.zeros(grid, np.uint8)
    for region in plan.regions:
        core = region.window
        owners[core.core_top : core.core_bottom, core.core_left : core.core_right] += 1
        assert core.top == max(core.core_top - plan.halo_px, 0)
        assert core.right == min(core.core_right + plan.halo_px, grid[1])
    assert owners.min() == owners.max() == 1
    assert [region.number for region in plan.regions] == list(range(len(plan.regions)))


def test_the_tiles_of_a_region_are_all_that_touch_its_window():
    plan = layout((3000, 5000))
    rows, columns = plan.tile_rows_columns
    every = {(i, j): plan.tile(i, j) for i in range(rows) for j in range(columns)}
    assert max(tile.bottom for tile in every.values()) == 3000
    for region in plan.regions:
        window = region.window
        touching = {
            place
            for place, tile in every.items()
            if tile.top < window.bottom and tile.bottom > window.top
            and tile.left < window.right and tile.right > window.left
        }
        assert set(region.tiles) == touching


def test_a_region_of_four_by_four_strides_asks_for_five_by_five_tiles():
    plan = layout((10_000, 10_000))
    inner = plan.regions[plan.region_rows_columns[1] + 1]
    assert len(inner.tiles) == 25
    assert inner.window.core_bottom - inner.window.core_top == 4 * (576 - 128)


def test_scales_lead_from_fine_pixels_to_level_0_and_microns():
    plan = Layout((1000, 2000), 0.2527, (505, 1011), 0.5, 2, 576, 128)
    assert plan.fine_px == (1010, 2022)
    assert plan.fine_scale == (1000 / 1010, 2000 / 2022)
    assert plan.fine_mpp == pytest.approx(0.25, rel=1e-3)
    assert Layout.from_dict(plan.to_dict()) == plan


def drawn_part(top: int = 40, left: int = 7000) -> Part:
    image, labels = draw_tissue(size=(200, 240), nuclei=12)
    rings = [ring + np.array([left, top], np.float32) for ring in outlines(labels).values()]
    return Part(measure(labels, image, 0.25, np.ones(labels.shape, np.float32)), rings, labels, top, left, {"bad": [1]})


def test_a_part_comes_back_as_it_was_written(tmp_path):
    plan = layout((3000, 5000))
    store, region, part = PartStore(tmp_path, plan), plan.regions[3], drawn_part()
    assert not store.has(region)
    store.write(region, part)
    found = store.read(region)
    assert store.has(region)
    assert found.table.equals(part.table)
    assert np.array_equal(found.labels, part.labels)
    assert (found.top, found.left, found.facts) == (40, 7000, {"bad": [1]})
    assert all(np.array_equal(a, b) for a, b in zip(found.rings, part.rings, strict=True))
    assert len(found.rings) == len(part) == 12


def test_numbers_run_through_the_slide_without_a_gap(tmp_path):
    plan = layout((3000, 5000))
    store = PartStore(tmp_path, plan)
    for index in (1, 4):
        store.write(plan.regions[index], drawn_part())
    assert [(region.number, first, len(part)) for region, first, part in store.all()] == [(1, 0, 12), (4, 12, 12)]


def test_a_part_without_nuclei_is_kept_too(tmp_path):
    plan = layout((3000, 5000))
    store = PartStore(tmp_path, plan)
    store.write(plan.regions[0], Part.empty())
    assert store.has(plan.regions[0])
    assert len(store.read(plan.regions[0])) == 0
    assert store.read(plan.regions[0]).table.dtypes.equals(drawn_part().table.dtypes)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", b"no zip at all"])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path, damage):
    plan = layout((600, 600))
    store = PartStore(tmp_path, plan)
    store.path(plan.regions[0]).write_bytes(damage)
    with pytest.raises(UserError, match=r"region_0000_0000.npz: is damaged; delete it"):
        store.read(plan.regions[0])


@pytest.mark.parametrize("most", [0, 1, 65535, 65536, 3_000_000])
def test_label_maps_of_any_count_are_packed_without_loss(most):
    labels = np.array([[0, most, 5], [most, 0, most // 2]], np.int32)
    assert np.array_equal(unpacked(packed(labels), labels.shape), labels)
