"""A slide cut into regions gives the nuclei of the slide as a whole, each once, and the same on every way there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from conftest import draw_tissue
from fakes import ByColor, ByColorGuided, brightness
from nuguide.checkpoint import ModelSpec
from nuguide.instances import Separation, enlarge
from nuguide.measure import COLUMNS_WITH_FLIPS
from nuguide.predict import Predictor
from nuguide.resample import resampled_size, resize_image
from nuguide.slides.layout import Layout
from nuguide.slides.parts import PartStore
from nuguide.slides.roi import Roi
from nuguide.types import UserError
from nuguide.whole_slide import SlideRegions, lay_out, shifted

SEPARATION = Separation(min_area_um2=2)


@dataclass
class Held:
    """A slide at the network's resolution, held in memory."""

    image_rgb: np.ndarray
    reads: int = 0

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        self.reads += 1
        return self.image_rgb[top:bottom, left:right].copy()


def predictor(tile_px: int | None = None, **options) -> Predictor:
    spec = ModelSpec(network="unet", separation={"min_area_um2": 2}, **options)
    return Predictor(ByColor(), None, spec, precision="fp32", tile_px=tile_px, separation=SEPARATION)


@lru_cache
def tissue_block(seed: int) -> np.ndarray:
    return draw_tissue(seed=seed, size=(170, 190), nuclei=22, radius=(4, 7))[0]


def wide_tissue(size: tuple[int, int], seed: int = 3) -> np.ndarray:
    """An image of that size, of one drawn block again and again: fast, and nothing in it is as long as a block."""
    block = tissue_block(seed)
    times = (-(-size[0] // block.shape[0]), -(-size[1] // block.shape[1]), 1)
    return np.tile(block, times)[: size[0], : size[1]].copy()


def seam_image(layout: Layout) -> np.ndarray:
    """Drawn tissue with a nucleus on every crossing of a seam with another, and on seams between."""
    height, width = layout.grid_px
    image = wide_tissue((height, width))
    cuts_y = sorted({region.window.core_top for region in layout.regions} - {0})
    cuts_x = sorted({region.window.core_left for region in layout.regions} - {0})
    for y in cuts_y:
        for x in [*cuts_x, *range(40, width - 20, 90)]:
            cv2.circle(image, (x, y), 9, (228, 170, 200), -1)
            cv2.circle(image, (x, y), 6, (95, 60, 140), -1)
    for x in cuts_x:
        for y in range(40, height - 20, 90):
            cv2.circle(image, (x, y), 9, (228, 170, 200), -1)
            cv2.circle(image, (x, y), 6, (95, 60, 140), -1)
    return image


def segment(image: np.ndarray, mpp: float, model: Predictor, folder: Path, small: bool = True, **options):
    """(table, global label map, the SlideRegions) of a slide at the network's resolution."""
    layout = lay_out((round(image.shape[0] * 0.5 / mpp), round(image.shape[1] * 0.5 / mpp)), mpp, model)
    if small:
        layout = Layout(**{**layout.to_dict(), "region_tiles": 2, "halo_px": 48})
    work = SlideRegions(Held(image), layout, model, **options)
    folder.mkdir(exist_ok=True)
    store = PartStore(folder, layout)
    work.run(work.wanted, store, lambda region, count: None)
    return *assembled(store), work


def assembled(store: PartStore) -> tuple[pd.DataFrame, np.ndarray]:
    labels = np.zeros(store.layout.fine_px, np.int32)
    tables = []
    for _, first, part in store.all():
        window = labels[part.top : part.top + part.labels.shape[0], part.left : part.left + part.labels.shape[1]]
        assert not (window[part.labels > 0] > 0).any()          # no pixel has two owners
        np.copyto(window, part.labels + first, where=part.labels > 0)
        tables.append(part.table.assign(id=part.table["id"] + first))
    return pd.concat(tables, ignore_index=True), labels


def same_up_to_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(pairs[0]) == len(np.unique(a)) == len(np.unique(b)) and ((a > 0) == (b > 0)).all()


@pytest.mark.parametrize("tile_px", [128, 160, 256])
@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_regions_give_the_nuclei_of_the_whole_slide_on_every_seam_and_corner(tile_px, mpp, tmp_path):
    model = predictor(tile_px)
    layout = lay_out((int(700 * 0.5 / mpp), int(810 * 0.5 / mpp)), mpp, model)
    image = seam_image(Layout(**{**layout.to_dict(), "region_tiles": 2, "halo_px": 48}))
    table, labels, work = segment(image, mpp, model, tmp_path)
    assert len(work.wanted) >= 4
    whole = predictor(2048)
    nucleus, interior = whole.probabilities(image).astype(np.float16).astype(np.float32)
    grid_labels = whole.label(nucleus, interior)
    expected = enlarge(grid_labels, nucleus, labels.shape, SEPARATION.nucleus).astype(np.int32)
    assert same_up_to_numbers(labels, expected)
    assert len(table) == labels.max() == len(np.unique(expected)) - 1 > 200


def test_places_and_areas_are_those_of_the_slide_in_level_0_pixels_and_microns(tmp_path):
    image, truth = draw_tissue(seed=5, size=(420, 500), nuclei=60, radius=(6, 10))
    table, labels, _ = segment(image, 0.25, predictor(160), tmp_path)
    assert labels.shape == (840, 1000)
    for row in table.to_dict("records"):
        y, x = np.nonzero(labels == row["id"])
        assert row["centroid_x_px"] == pytest.approx(x.mean(), abs=1e-6)
        assert row["centroid_y_um"] == pytest.approx(y.mean() * 0.25, abs=1e-6)
        assert row["area_um2"] == pytest.approx(len(y) / 16, rel=1e-6)
    assert len(table) == pytest.approx(truth.max(), abs=3)


@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_calibrated_probabilities_are_those_of_the_slide_as_one_image(mpp, tmp_path):
    trust = {"intercept": -9.0, "clarity": 20.0, "concavity": -1.0, "oddity": -0.75}
    image = wide_tissue((300, 430), seed=12)
    table, labels, work = segment(image, mpp, predictor(128, confidence=trust), tmp_path)
    assert len(work.wanted) > 1
    large = image.repeat(work.layout.fine, 0).repeat(work.layout.fine, 1)
    whole = predictor(2048, confidence=trust).segment(large, mpp)
    assert same_up_to_numbers(labels, whole.labels)
    number = whole.labels[labels > 0]
    same = dict(zip(labels[labels > 0].tolist(), number.tolist(), strict=True))
    of_whole = dict(zip(whole.table["id"], whole.table["probability"], strict=True))
    expected = np.array([of_whole[same[id]] for id in table["id"]])
    np.testing.assert_allclose(table["probability"], expected, atol=2e-3)      # tiles are kept in fp16
    assert expected.std() > 0.02
    plain = segment(image, mpp, predictor(128), tmp_path / "plain")[0]["probability"]
    assert np.abs(plain - table["probability"]).max() > 0.05


def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    image = wide_tissue((700, 810), seed=7)
    model = predictor(128)
    table, labels, work = segment(image, 0.5, model, tmp_path / "whole")
    store = PartStore(tmp_path / "cut", work.layout)
    store.folder.mkdir()

    class Killed(Exception):
        pass

    def die(region, count):
        if region.number >= 1:
            raise Killed

    first = SlideRegions(Held(image), work.layout, model)
    with pytest.raises(Killed):
        first.run(first.wanted, store, die)
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert 2 <= len(before) < len(work.wanted)
    second = SlideRegions(Held(image), work.layout, model)
    todo = [region for region in second.wanted if not store.has(region)]
    second.run(todo, store, lambda region, count: None)
    assert {name: (store.folder / name).stat().st_mtime_ns for name in before} == before
    cut_table, cut_labels = assembled(store)
    assert cut_table.equals(table)
    assert np.array_equal(cut_labels, labels)
    for path in (tmp_path / "whole").iterdir():
        assert (store.folder / path.name).read_bytes() == path.read_bytes()


def test_regions_in_any_order_and_alone_give_the_same_parts(tmp_path):
    image = wide_tissue((500, 600), seed=8)
    model = predictor(128)
    table, _, work = segment(image, 0.5, model, tmp_path / "a")
    store = PartStore(tmp_path / "b", work.layout)
    store.folder.mkdir()
    for region in reversed(work.wanted):
        alone = SlideRegions(Held(image), work.layout, model)
        alone.run([region], store, lambda region, count: None)
    assert assembled(store)[0].equals(table)


def test_every_tile_is_computed_once(tmp_path):
    image = wide_tissue((700, 810), seed=9)
    _, _, work = segment(image, 0.5, predictor(128), tmp_path)
    rows, columns = work.layout.tile_rows_columns
    assert work.tiles_done == rows * columns == len(work.active)
    assert not work._kept


def test_nuclei_below_a_probability_are_left_out_of_slides_as_of_images(tmp_path):
    image = wide_tissue((500, 600), seed=8)
    model = predictor(128)
    table, labels, _ = segment(image, 0.5, model, tmp_path / "all")
    middle = float(np.median(table["probability"].to_numpy()))
    model.min_probability = middle
    likely, fewer, _ = segment(image, 0.5, model, tmp_path / "likely")
    kept = table["probability"].to_numpy() >= middle
    assert 0.3 < kept.mean() < 0.7
    assert likely["id"].tolist() == list(range(1, kept.sum() + 1))
    assert likely.drop(columns="id").equals(table.loc[kept].drop(columns="id").reset_index(drop=True))
    assert np.array_equal(fewer > 0, np.isin(labels, table["id"].to_numpy()[kept]))
    assert len(model.segment(image, 0.5)) == pytest.approx(kept.sum(), abs=3)


def test_without_room_to_keep_tiles_they_are_computed_again_and_the_parts_are_the_same(tmp_path, monkeypatch):
    image = wide_tissue((500, 600), seed=8)
    table, _, work = segment(image, 0.5, predictor(128), tmp_path / "roomy")
    monkeypatch.setattr("nuguide.whole_slide.CACHED_TILES", 2)
    assert max(len(step.kept) for step in work.steps(work.wanted)) == 2
    again, _, cramped = segment(image, 0.5, predictor(128), tmp_path / "cramped")
    assert cramped.tiles_done > work.tiles_done
    assert again.equals(table)


def test_outside_of_the_areas_nothing_is_found_and_no_tile_computed(tmp_path):
    image = wide_tissue((700, 810), seed=9)
    everything, _, _ = segment(image, 0.5, predictor(128), tmp_path / "all")
    roi = Roi.parse("30,500,200,150", (700, 810))
    table, _, work = segment(image, 0.5, predictor(128), tmp_path / "roi", areas=[roi])
    rows, columns = work.layout.tile_rows_columns
    assert work.tiles_done < rows * columns / 2
    x, y = everything["centroid_x_px"].to_numpy(), everything["centroid_y_px"].to_numpy()
    inside = ((x > 31) & (x < 228) & (y > 501) & (y < 648)).sum()
    near = ((x > 28) & (x < 231) & (y > 498) & (y < 651)).sum()
    assert 0 < inside <= len(table) <= near


class Torn(Held):
    """Cannot be read where its rows 300 to 320 meet its columns 300 to 320."""

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        if top < 320 and bottom > 300 and left < 320 and right > 300:
            raise UserError("torn.svs: cannot be read at 300, 300")
        return super().read(top, left, bottom, right)


def test_what_cannot_be_read_stops_the_run_or_is_left_out_and_noted(tmp_path):
    image = wide_tissue((700, 810), seed=9)
    model = predictor(128)
    layout = lay_out((700, 810), 0.5, model)
    layout = Layout(**{**layout.to_dict(), "region_tiles": 2})
    store = PartStore(tmp_path, layout)
    strict = SlideRegions(Torn(image), layout, model)
    with pytest.raises(UserError, match="cannot be read at 300, 300"):
        strict.run(strict.wanted, store, lambda region, count: None)
    lenient = SlideRegions(Torn(image), layout, model, skip_bad=True)
    lenient.run(lenient.wanted, store, lambda region, count: None)
    bad = {tuple(box) for _, _, part in store.all() for box in part.facts.get("bad", [])}
    assert bad
    assert all(top < 320 and bottom > 300 and left < 320 and right > 300 for top, left, bottom, right in bad)
    table, _ = assembled(store)
    away = np.asarray(table[["centroid_x_px", "centroid_y_px"]]).max(axis=1) > 420
    full, _, _ = segment(image, 0.5, model, tmp_path / "sound")
    far = np.asarray(full[["centroid_x_px", "centroid_y_px"]]).max(axis=1) > 420
    assert away.sum() == far.sum() > 100


def test_flips_give_the_maps_of_the_tile_and_of_its_mirror_images():
    """The network sees its surroundings evenly, so tiles inside the image differ by rounding alone; a map that rises
    from left to right is evened out.
    """
    image = wide_tissue((450, 610), seed=4)
    model = predictor(128)
    layout = lay_out(image.shape[:2], 0.5, model)
    tiles = [layout.tile(1, 1), layout.tile(*(count - 1 for count in layout.tile_rows_columns))]
    plain = model.tile_maps(image, tiles)
    model.flips = True
    flipped = model.tile_maps(image, tiles)
    for one, other, tile in zip(plain, flipped, tiles, strict=True):
        size = tile.bottom - tile.top, tile.right - tile.left
        assert (one.shape, other.shape) == ((1, 2, *size), (4, 2, *size))
        inner = np.s_[..., 8:-8, 8:-8]
        assert np.array_equal(one[0], other[0])
        assert np.allclose(one[inner], other[inner], atol=1e-4)
    sided = predictor(128)
    sided.model.forward = lambda image: torch.cat([image[:, :1] * 0 + torch.arange(image.shape[3]) / 20 - 3] * 2, 1)
    sided.flips = True
    even = sided.tile_maps(image, tiles[:1])[0].mean(0)
    assert np.allclose(even, even[:, :, ::-1], atol=1e-6)


def test_with_flips_the_table_tells_how_far_the_mirror_images_agree(tmp_path):
    """A network blind in the upper left corner of what it is given misses each corner in one of the four views."""
    image = wide_tissue((448, 608), seed=4)
    model = predictor(640)
    forward, blind = model.model.forward, torch.zeros(448, 608, dtype=torch.bool)
    blind[:150, :150] = True
    model.model.forward = lambda image: torch.where(blind, -9.0, forward(image))
    model.flips = True
    layout = lay_out(image.shape[:2], 0.5, model)
    store = PartStore(tmp_path, layout, COLUMNS_WITH_FLIPS)
    work = SlideRegions(Held(image), layout, model)
    work.run(work.wanted, store, lambda region, count: None)
    table, _ = assembled(store)
    assert tuple(table.columns) == COLUMNS_WITH_FLIPS
    y, x = (table[f"centroid_{axis}_px"].to_numpy() for axis in "yx")
    y, x, found = np.minimum(y, 448 - y), np.minimum(x, 608 - x), table["agreement"].to_numpy()
    middle, corner = (y > 170) | (x > 170), (y < 130) & (x < 130)
    assert middle.sum() > 50
    assert corner.sum() > 10
    assert found[middle] == pytest.approx(1, abs=0.02)
    assert ((found[corner] > 0.45) & (found[corner] < 0.75)).all()     # the mean map's nuclei are a little smaller
    alone = model.segment(image, 0.5).table
    np.testing.assert_allclose(np.sort(alone["agreement"]), np.sort(found), atol=0.02)


def test_exposure_is_measured_once_for_the_slide(tmp_path):
    """A dark slide with a bright corner: each region alone would be brightened by another factor."""
    image = wide_tissue((700, 810), seed=4)
    dark = (image // 2).astype(np.uint8)
    model = predictor(128, exposure=True)
    seen = []

    def gain(region, count):
        window = work.read(next(work.steps([region])))
        seen.append(window.prepared_rgb.astype(float).sum() / window.image_rgb.sum())

    layout = lay_out((700, 810), 0.5, model)
    work = SlideRegions(Held(dark), Layout(**{**layout.to_dict(), "region_tiles": 2}), model)
    work.run(work.wanted, PartStore(tmp_path, work.layout), gain)
    assert len(seen) == len(work.wanted) > 3
    assert min(seen) > 1.5
    assert max(seen) - min(seen) < 0.02


@pytest.mark.parametrize("mpp", [0.1, 0.23, 0.25, 0.33, 0.5, 0.71, 1.0])
def test_areas_in_microns_hold_at_any_resolution_of_the_scan(mpp, tmp_path):
    image, truth = draw_tissue(seed=11, size=(400, 400), nuclei=40, radius=(8, 12))      # at 0.5 microns per pixel
    size = resampled_size((400, 400), 0.5, mpp)
    scanned = resize_image(image, size)
    model = predictor(160)
    layout = lay_out(size, mpp, model)
    work = SlideRegions(Held(resize_image(scanned, layout.grid_px)), layout, model)
    store = PartStore(tmp_path, layout)
    work.run(work.wanted, store, lambda region, count: None)
    table, _ = assembled(store)
    assert abs(len(table) - truth.max()) <= 2
    assert float(table["area_um2"].to_numpy().sum()) == pytest.approx(float((truth > 0).sum()) * 0.25, rel=0.05)
    assert float(table["centroid_x_um"].to_numpy().max()) < 200 + mpp


def test_a_guided_network_gets_the_latent_of_its_place_whatever_the_region(tmp_path):
    """A guide whose latent is the mean color of each stride: a tile gets the same from a region as from the slide."""

    class Colors(torch.nn.Module):
        def forward(self, image):
            return F.avg_pool2d(image, 32)

    image = wide_tissue((700, 810), seed=12)
    spec = ModelSpec(network="unet")
    model = Predictor(ByColorGuided(), Colors(), spec, precision="fp32", tile_px=128)
    layout = Layout(**{**lay_out((700, 810), 0.5, model).to_dict(), "region_tiles": 2})
    work = SlideRegions(Held(image), layout, model)
    computed = []
    for step in work.steps(work.wanted):
        window = work.read(step)
        for place in step.missing:
            computed.append(place)
            tile = layout.tile(*place)
            here = model.latent(window.image_rgb, shifted(tile, window.top, window.left))
            assert torch.equal(here, model.latent(image, tile))
    assert sorted(computed) == sorted(work.active), "each tile once"


def test_a_guide_that_sees_regions_has_them_at_fixed_places_of_the_slide(tmp_path):
    """Regions of 160 px over 450 x 610 px are 3 x 4; what a tile gets does not depend on the region that asks."""
    image = wide_tissue((450, 610), seed=12)
    guide = brightness(160)
    model = Predictor(ByColorGuided(), guide, ModelSpec("unet", tile_px=128), precision="fp32")
    layout = Layout(**{**lay_out((450, 610), 0.5, model).to_dict(), "region_tiles": 2})
    work = SlideRegions(Held(image), layout, model)
    store = PartStore(tmp_path, layout)
    work.run(work.wanted, store, lambda region, count: None)
    table, _ = assembled(store)
    alone = []
    for region in reversed(work.wanted):
        other = SlideRegions(Held(image), layout, model)
        step = next(other.steps([region]))
        alone.append((region, other.part(region, window := other.read(step), other.maps(step, window))))
    for region, part in alone:
        assert part.table.equals(store.read(region).table)
    assert len(table) > 100
    filled = np.pad(image, ((0, -450 % 32), (0, -610 % 32), (0, 0)), mode="edge")
    of_image = model.region_latents(filled.shape[:2], lambda square: filled[square.window])
    assert work._latent_of is not None
    for place in work.active:
        assert torch.equal(work._latent_of(layout.tile(*place)), of_image(layout.tile(*place)))


def test_a_guide_sees_a_block_of_tiles_at_once_and_the_same_one_from_any_region(tmp_path):
    """Tiles of 128 px in steps of 96 over 450 x 610 px are 5 x 7, regions of 2 tiles 2 x 3: each of the 5 rows of tiles
    takes 4 passes, of tiles 0 and 1, 2, 3 and 4, 5 and 6. With a guide that sees its whole input, a region alone gives
    what it gives in a run.
    """
    seen = []

    class Level(torch.nn.Module):
        def forward(self, image):
            seen.append(tuple(image.shape[-2:]))
            return F.avg_pool2d(image, 32) + image.mean(dim=(2, 3), keepdim=True)

    image = wide_tissue((450, 610), seed=12)
    model = Predictor(ByColorGuided(), Level(), ModelSpec("unet"), precision="fp32", tile_px=128)
    layout = Layout(**{**lay_out((450, 610), 0.5, model).to_dict(), "region_tiles": 2, "halo_px": 16})
    work = SlideRegions(Held(image), layout, model)
    store = PartStore(tmp_path, layout)
    work.run(work.wanted, store, lambda region, count: None)
    assert layout.tile_rows_columns == (5, 7)
    assert len(work.wanted) == 6
    assert len(seen) == 5 * 4
    assert seen[0] == (320, 416)          # 128 rows and 224 columns of two tiles, and 192 of context
    for region in work.wanted[::-1]:      # the last first: blocks that reach into the regions before are read anew
        other = SlideRegions(Held(image), layout, model)
        step = next(other.steps([region]))
        part = other.part(region, window := other.read(step), other.maps(step, window))
        assert part.table.equals(store.read(region).table)
