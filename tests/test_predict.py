"""The predictor: an image goes in at any resolution, its nuclei come out at the size of the image."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nuguide
from conftest import draw_tissue
from fakes import ByColor, ByColorGuided
from nuguide import checkpoint, predict
from nuguide.checkpoint import MODELS, ModelSpec
from nuguide.fusion import Cross, Guided
from nuguide.measure import COLUMNS
from nuguide.metrics import panoptic_quality
from nuguide.networks import UNet
from nuguide.predict import Predictor
from nuguide.tiling import cover
from nuguide.types import Sample, UserError

SPEC = ModelSpec("unet", {"width": 2})


@pytest.fixture
def untrained() -> Predictor:
    """A network of 2 channels that knows nothing."""
    torch.manual_seed(0)
    return Predictor(checkpoint.build(SPEC).eval(), None, SPEC, "cpu", "fp32")


@pytest.fixture
def by_color() -> Predictor:
    return Predictor(ByColor(), None, SPEC, "cpu", "fp32")


@pytest.fixture(scope="module")
def default_model() -> Predictor:
    """The model that comes with the package, skipped where it has not been trained yet."""
    if not (MODELS / "small" / checkpoint.WEIGHTS).is_file():
        pytest.skip("models/small is not in this checkout")
    return nuguide.load("default", device="cpu", precision="fp32")


class MeanColor(nn.Module):
    """A guide whose latent is the mean color in cells of 16 x 16 pixels, over 255."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image, 16, ceil_mode=True) / 255


# What comes out


@pytest.mark.parametrize("shape", [(128, 160), (61, 93), (1, 1), (1, 50), (40, 3)])
@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_labels_have_the_size_of_the_image(untrained, shape, mpp):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    nuclei = untrained.segment(image, mpp)
    assert nuclei.labels.shape == shape
    assert nuclei.labels.dtype == np.uint32
    assert tuple(nuclei.table.columns) == COLUMNS
    assert nuclei.mpp == mpp
    assert set(nuclei.table["id"]) == set(np.unique(nuclei.labels)) - {0}


def test_drawn_nuclei_are_found_where_they_are(by_color, tissue: Sample):
    nuclei = by_color.segment(tissue.image_rgb, tissue.mpp)
    assert len(nuclei) == 40
    assert panoptic_quality(tissue.labels, nuclei.labels).pq > 0.9
    assert nuclei.table["probability"].between(0.5, 1).all()


def drawn_at(mpp: float) -> np.ndarray:
    """Nine nuclei of radius 5 um, 20 um apart, in an image of 60 x 60 um whose optics blur by 0.3 um."""
    place_um = (np.arange(round(60 / mpp)) + 0.5) * mpp
    to_center = np.hypot(*np.meshgrid(place_um % 20 - 10, place_um % 20 - 10))
    inside = 1 / (1 + np.exp((to_center[..., None] - 5) / 0.15))
    return np.rint(inside * [95, 60, 140] + (1 - inside) * [228, 170, 200]).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.1, 0.2, 0.25, 0.37, 0.5, 0.75, 1.0])
def test_areas_in_microns_are_right_at_every_resolution(by_color, mpp):
    nuclei = by_color.segment(drawn_at(mpp), mpp)
    assert len(nuclei) == 9
    assert nuclei.table["area_um2"].mean() == pytest.approx(np.pi * 5**2, rel=0.05)
    np.testing.assert_allclose(sorted(nuclei.table["centroid_x_um"] + mpp / 2), np.repeat([10, 30, 50], 3), atol=0.3)


def test_the_scale_matters(by_color):
    at_quarter = by_color.segment(drawn_at(0.25), 0.25)
    taken_for_half = by_color.segment(drawn_at(0.25), 0.5)
    assert taken_for_half.table["area_um2"].mean() == pytest.approx(4 * at_quarter.table["area_um2"].mean(), rel=0.05)


def test_an_image_of_nothing_has_no_nuclei(by_color):
    nuclei = by_color.segment(np.full((70, 80, 3), 230, np.uint8), 0.5)
    assert len(nuclei) == 0
    assert not nuclei.labels.any()


def test_a_view_of_an_image_is_as_good_as_a_copy(by_color, tissue: Sample):
    flipped = by_color.segment(tissue.image_rgb[::-1, ::-1], 0.25)
    copied = by_color.segment(np.ascontiguousarray(tissue.image_rgb[::-1, ::-1]), 0.25)
    np.testing.assert_array_equal(flipped.labels, copied.labels)


# What is refused


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 of shape \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
    ],
)
def test_what_is_no_8_bit_rgb_image_is_refused(untrained, image, said):
    with pytest.raises(UserError, match=f"{said}.*; give 8-bit RGB"):
        untrained.segment(image, 0.5)


def test_what_becomes_too_large_for_memory_is_refused(by_color, monkeypatch):
    monkeypatch.setattr(predict, "MOST_PX", 40_000)
    image = np.full((100, 100, 3), 230, np.uint8)
    by_color.segment(image, 1.0)                                # 200 x 200 at half a micron
    with pytest.raises(UserError, match=r"at 1\.1 microns per pixel .* more than 0; check .*--mpp.*--treat-as slide"):
        by_color.segment(image, 1.1)


@pytest.mark.parametrize("mpp", [0.0, -1.0, 0.049, 5.1, float("nan"), float("inf")])
def test_a_scale_of_no_microscope_is_refused(untrained, tissue: Sample, mpp):
    with pytest.raises(UserError, match=r"between 0\.05 and 5"):
        untrained.segment(tissue.image_rgb, mpp)


def test_an_unknown_scale_is_taken_for_a_quarter_micron_and_said_so(by_color, tissue: Sample, caplog):
    with caplog.at_level(logging.WARNING):
        nuclei = by_color.segment(tissue.image_rgb)
    assert nuclei.mpp == 0.25
    assert caplog.messages == ["no microns per pixel given; 0.25 assumed (a 40x scan)"]


def test_a_batch_of_none_is_refused():
    with pytest.raises(UserError, match="--batch must be 1 or more, not 0"):
        Predictor(ByColor(), None, SPEC, "cpu", "fp32", batch=0)


class NoMemory(nn.Module):
    """Fails the way torch fails."""

    def __init__(self, error: RuntimeError):
        super().__init__()
        self.error = error

    def forward(self, image: Tensor) -> Tensor:
        raise self.error


def test_a_full_memory_is_told_from_other_trouble(tissue: Sample):
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
    for error in (full, torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(MemoryError, match="a tile does not fit into memory; lower --batch"):
            Predictor(NoMemory(error), None, SPEC, "cpu", "fp32").segment(tissue.image_rgb, 0.5)
    with pytest.raises(RuntimeError, match="sizes differ"):
        Predictor(NoMemory(RuntimeError("sizes differ")), None, SPEC, "cpu", "fp32").segment(tissue.image_rgb, 0.5)


# How it is computed


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    """300 x 420 pixels, 3 x 4 tiles of 128."""
    return np.tile(draw_tissue(3, (150, 210), 30)[0], (2, 2, 1))


def test_batches_of_1_and_of_5_give_the_same(wide):
    torch.manual_seed(0)
    model = checkpoint.build(SPEC).eval()
    one, five = (Predictor(model, None, SPEC, "cpu", "fp32", batch=batch, tile_px=128) for batch in (1, 5))
    np.testing.assert_allclose(one.probabilities(wide), five.probabilities(wide), atol=1e-5)
    colors = [Predictor(ByColor(), None, SPEC, "cpu", "fp32", batch=batch, tile_px=128) for batch in (1, 5)]
    labels = [predictor.segment(wide, 0.5).labels for predictor in colors]
    assert labels[0].max() > 80
    np.testing.assert_array_equal(labels[0], labels[1])


def test_with_flips_a_mirrored_image_gives_the_mirrored_maps(wide):
    torch.manual_seed(0)
    model, told = checkpoint.build(SPEC).eval(), []
    image = wide[:64, :96]                              # even numbers of pixels and strides: one tile
    plain, mirrored = (Predictor(model, None, SPEC, "cpu", "fp32", flips=flips) for flips in (False, True))
    maps = mirrored.probabilities(image, lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for axis in (0, 1):
        turned = mirrored.probabilities(np.ascontiguousarray(np.flip(image, axis)))
        np.testing.assert_allclose(np.flip(turned, axis + 1), maps, atol=1e-6)
    one = plain.probabilities(np.ascontiguousarray(image[::-1]))[:, ::-1]
    assert np.abs(one - plain.probabilities(image)).max() > 1e-4        # which the network alone does not
    four = [plain.probabilities(np.ascontiguousarray(image[::a, ::b]))[:, ::a, ::b] for a in (1, -1) for b in (1, -1)]
    np.testing.assert_allclose(np.mean(four, axis=0), maps, atol=1e-6)


def test_small_tiles_overlap_by_a_quarter():
    def overlap(**options) -> int:
        return Predictor(ByColor(), None, SPEC, "cpu", "fp32", **options).overlap_px

    assert (overlap(), overlap(tile_px=256), overlap(tile_px=128, overlap_px=48)) == (96, 64, 48)


def test_progress_counts_tiles_up_to_all_of_them(wide):
    told: list[tuple[int, int]] = []
    predictor = Predictor(ByColor(), None, SPEC, "cpu", "fp32", batch=5, tile_px=128, overlap_px=64)
    predictor.segment(wide, 0.5, progress=lambda done, total: told.append((done, total)))
    assert told == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]


def test_bf16_agrees_with_fp32(wide):
    torch.manual_seed(0)
    model = checkpoint.build(SPEC).eval()
    fp32, bf16 = (Predictor(model, None, SPEC, "cpu", precision, tile_px=256) for precision in ("fp32", "bf16"))
    maps = fp32.probabilities(wide), bf16.probabilities(wide)
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.02
    found = [Predictor(ByColor(), None, SPEC, "cpu", name).segment(wide, 0.5).labels for name in ("fp32", "bf16")]
    assert panoptic_quality(*found).pq > 0.97


def test_the_guide_is_asked_and_heard(wide):
    guided = Predictor(ByColorGuided(), MeanColor(), SPEC, "cpu", "fp32", tile_px=128)
    plain = Predictor(ByColor(), None, SPEC, "cpu", "fp32", tile_px=128)
    more, less = guided.probabilities(wide), plain.probabilities(wide)
    assert (more > less).mean() > 0.99                  # the mean color is above 0
    assert len(guided.segment(wide, 0.5)) > 80


def test_a_guided_network_segments_any_size():
    torch.manual_seed(0)
    network = UNet(2, width=2)
    guided = Predictor(Guided(network, Cross(network.bottleneck_channels, 3)), MeanColor(), SPEC, "cpu", "fp32")
    for shape in ((100, 75), (16, 16), (1, 1)):
        assert guided.segment(np.zeros((*shape, 3), np.uint8), 0.5).labels.shape == shape


def test_folding_batch_norm_changes_nothing_but_rounding(wide):
    torch.manual_seed(0)
    model = checkpoint.build(SPEC)
    with torch.no_grad():
        model.train()(torch.from_numpy(wide.copy()).permute(2, 0, 1)[None].float())     # statistics unlike 0 and 1
        model.eval()
        image = torch.from_numpy(wide[:128, :128].copy()).permute(2, 0, 1)[None]
        expected = model(image.float()).sigmoid()
    found = Predictor(model, None, SPEC, "cpu", "fp32").maps(image)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# From disk


def test_a_saved_model_segments_as_it_did(tmp_path: Path, wide):
    torch.manual_seed(0)
    model = checkpoint.build(SPEC)
    folder = checkpoint.save(tmp_path / "model", model, SPEC)
    fresh = Predictor(model, None, SPEC, "cpu", "fp32", tile_px=128)
    loaded = nuguide.load(folder, device="cpu", precision="fp32", tile_px=128, batch=4)
    np.testing.assert_allclose(loaded.probabilities(wide), fresh.probabilities(wide), atol=1e-5)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(UserError, match="no_such_model: no such model; give .*a folder with model.safetensors"):
        nuguide.load("no_such_model")


# The model that comes with the package


def test_the_default_model_finds_the_nuclei_of_drawn_tissue(default_model):
    image, labels = draw_tissue(0, (256, 256), 40, (8.0, 13.0))
    found = default_model.segment(image, 0.5)
    assert len(found) == pytest.approx(labels.max(), rel=0.25)
    assert panoptic_quality(labels, found.labels).dq > 0.6


def lost(labels: np.ndarray, other: np.ndarray, near_seam: np.ndarray) -> tuple[int, int]:
    """(how many nuclei of `labels` that touch the band have no match of IoU > 0.5 in `other`, how many touch it)."""
    numbers = np.unique(labels[near_seam])
    numbers = numbers[numbers > 0]
    missing = 0
    for number in numbers:
        one = labels == number
        against = np.bincount(other[one], minlength=1)
        against[0] = 0
        best = int(against.argmax())
        union = one.sum() + (other == best).sum() - against[best]
        missing += not against[best] or against[best] / union <= 0.5
    return missing, len(numbers)


def test_the_default_model_finds_the_same_in_tiles(default_model, monkeypatch):
    """Its squeeze and its guide see the whole of a tile, so tiles differ slightly; seams must not show."""
    image = np.tile(draw_tissue(5, (320, 320), 90, (7.0, 12.0))[0], (2, 2, 1))
    image = cv2.GaussianBlur(image, (0, 0), 0.5)
    monkeypatch.setattr(default_model, "tile_px", 640)
    whole = default_model.segment(image, 0.5).labels
    monkeypatch.setattr(default_model, "tile_px", 352)      # 2 x 2 tiles that meet in a cross of 88 px
    tiled = default_model.segment(image, 0.5).labels
    assert panoptic_quality(whole, tiled).pq >= 0.97
    seam = np.zeros(image.shape[:2], bool)
    seam[288:352] = seam[:, 288:352] = True
    for one, other in ((whole, tiled), (tiled, whole)):
        at_seam, elsewhere = lost(one, other, seam), lost(one, other, ~seam)
        assert at_seam[0] / at_seam[1] <= elsewhere[0] / elsewhere[1] + 2 / at_seam[1]


class Surroundings(nn.Module):
    """A guide of bounded receptive field: the mean of each 16 px cell and its neighbors, zeros beyond the border."""

    def forward(self, image):
        cells = torch.nn.functional.avg_pool2d(image, 16)
        return torch.nn.functional.avg_pool2d(cells, 3, stride=1, padding=1)


def test_a_guide_sees_what_lies_around_a_tile(wide):
    predictor = Predictor(ByColor(), Surroundings(), SPEC, "cpu", "fp32", tile_px=128, overlap_px=32)  # pyright: ignore
    image = wide[:288, :416]
    whole = Surroundings()(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float())
    tiles = cover(image.shape[:2], 128, 32, 32)
    assert len(tiles) > 4
    for tile in tiles:
        cells = whole[..., tile.top // 16 : tile.bottom // 16, tile.left // 16 : tile.right // 16]
        torch.testing.assert_close(predictor.latent(image, tile), cells)
