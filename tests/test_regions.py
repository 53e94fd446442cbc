"""The guide's two scales: a tile enlarged to the encoder's size, and a region as it is that many tiles share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import draw_tissue
from fakes import Brightness, ByColorGuided, brightness
from nuguide import checkpoint
from nuguide.augment import Augmentation, augment
from nuguide.batches import Patches, Picture, collate
from nuguide.checkpoint import ModelSpec
from nuguide.datasets import Dataset, Entry
from nuguide.guides import GUIDES, FrozenGuide, load_guide, sam
from nuguide.guides.fitting import MEAN, fitted
from nuguide.latents import LatentCache, RegionLatents, pooled
from nuguide.predict import Predictor, load
from nuguide.recipe import TrainOptions
from nuguide.tiling import cover, regions
from nuguide.train import Training, fit, seen
from nuguide.types import Sample, UserError

SPEC = ModelSpec("unet", {"width": 2}, tile_px=256)
STILL = Augmentation(False, (1.0, 1.0), 0.0, (1, 1), (1, 1), 0.0, (1, 1), 0.0, 0.0, 0.0)


def runs(guide: FrozenGuide) -> int:
    assert isinstance(guide.network, Brightness)
    return guide.network.runs


def cells(image_rgb: np.ndarray) -> Tensor:
    """What `Brightness` says of an image at its own scale, (3, H / 16, W / 16)."""
    normalized = fitted(torch.from_numpy(image_rgb).permute(2, 0, 1)[None], max(image_rgb.shape))
    return nn.functional.avg_pool2d(normalized, 16)[0]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# --- regions ---


@pytest.mark.parametrize(
    ("side", "starts", "cores"),
    [
        (2048, [0, 1024], [0, 1024, 2048]),
        (1500, [0, 480], [0, 736, 1500]),                # 480 to 1504; the middle of 480 and 1024 is 752
        (1024, [0], [0, 1024]),
        (100, [0], [0, 100]),
        (2080, [0, 512, 1056], [0, 768, 1280, 2080]),
    ],
)
def test_as_few_regions_as_cover_a_side_and_their_cores_divide_it(side: int, starts: list[int], cores: list[int]):
    found = regions((64, side), 1024, 32)
    assert [tile.left for tile in found] == starts
    assert [tile.right for tile in found] == [min(start + 1024, side) for start in starts]
    assert [found[0].core_left, *(tile.core_right for tile in found)] == cores
    assert all(tile.left <= tile.core_left < tile.core_right <= tile.right for tile in found)
    assert all(tile.core_left % 32 == 0 for tile in found)


def test_every_part_of_an_image_is_pieced_together_right_and_each_region_encoded_once():
    image = noise(160, 224)                              # 64 px regions: 3 rows of 4
    guide = brightness(64)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    known = RegionLatents((160, 224), guide, lambda region: guide(tensor[..., *region.window])[0])
    expected = cells(image)
    for top in range(0, 160, 16):
        for left in range(0, 224, 32):
            bottom, right = min(top + 96, 160), min(left + 64, 224)
            part = known.part(top, left, bottom, right)
            torch.testing.assert_close(part, expected[:, top // 16 : bottom // 16, left // 16 : right // 16])
    assert runs(guide) == 12


def test_a_region_is_filled_below_and_on_the_right_with_the_mean_color():
    guide = brightness(64)
    image = noise(40, 50)
    latent = guide(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert latent.shape == (1, 3, 3, 4)                  # 2.5 and 3.1 cells, rounded up
    torch.testing.assert_close(latent[0, :, :2, :3], cells(image[:32, :48]))
    square = torch.tensor(MEAN).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    square[..., :40, :50] = torch.from_numpy(image).permute(2, 0, 1)
    torch.testing.assert_close(latent, brightness(64, "tile")(square)[..., :3, :4])
    with pytest.raises(ValueError, match="a region is 64 px at most, got 65 x 20"):
        guide(torch.zeros(1, 3, 65, 20))


def test_the_scale_is_part_of_a_latents_key(tmp_path: Path):
    cache, image = LatentCache(tmp_path), noise(64, 64)
    assert cache.path(brightness(64, "tile"), image) != cache.path(brightness(64, "region"), image)


def test_only_guides_that_enlarge_in_cells_that_fit_have_a_region():
    assert load_guide("sam_vit_b", "random:0", 256, "region").scale == "region"
    with pytest.raises(ValueError, match="efficientnet_lite0 has no guide_scale region"):
        load_guide("efficientnet_lite0", scale="region")
    with pytest.raises(ValueError, match="dinov2_small has no guide_scale region .its cells are of 14 px"):
        load_guide("dinov2_small", "random:0", scale="region")
    with pytest.raises(ValueError, match="unknown guide_scale 'slide'; choose from tile, region"):
        load_guide("sam_vit_b", "random:0", scale="slide")


# --- prediction ---


@pytest.mark.parametrize(("scale", "calls"), [("region", 4), ("tile", 121)])
def test_a_2048_px_image_costs_as_many_passes_as_it_has_regions(scale: str, calls: int):
    guide = brightness(1024 if scale == "region" else 64, scale)
    predictor = Predictor(ByColorGuided(), guide, SPEC, "cpu", "fp32")
    tiles = cover((2048, 2048), predictor.tile_px, predictor.overlap_px, 32)
    of_tile = predictor._latents(np.full((2048, 2048, 3), 200, np.uint8))
    assert of_tile is not None
    for tile in tiles:
        of_tile(tile)
    assert (len(tiles), runs(guide)) == (121, calls)


def test_a_landmark_moves_the_same_cell_in_both_modes():
    plain = np.full((768, 768, 3), 200, np.uint8)
    marked = plain.copy()
    marked[304:320, 592:608] = 0                         # cell (19, 37) of the image
    tile = next(tile for tile in cover((768, 768), 256, 64, 32) if tile.owns(np.array(310), np.array(600)))
    for scale in ("tile", "region"):
        found = []
        for image in (plain, marked):
            guide = brightness(256 if scale == "region" else 1024, scale)
            predictor = Predictor(ByColorGuided(), guide, SPEC, "cpu", "fp32")
            of_tile = predictor._latents(image)
            assert of_tile is not None
            rows, columns = (tile.bottom - tile.top) // 16, (tile.right - tile.left) // 16
            latent = of_tile(tile)
            assert (rows, columns) == (16, 16)
            assert latent.shape == ((1, 3, 64, 64) if scale == "tile" else (1, 3, rows, columns))
            found.append(pooled(latent, 16) if scale == "tile" else latent)
        change = (found[1] - found[0]).abs().sum(1)[0]
        place = divmod(int(change.argmax()), change.shape[1])
        assert place == (19 - tile.top // 16, 37 - tile.left // 16)


@pytest.mark.parametrize("shape", [(100, 75), (1, 1), (300, 520)])
def test_any_size_is_segmented_with_regions(shape: tuple[int, int]):
    predictor = Predictor(ByColorGuided(), brightness(256), SPEC, "cpu", "fp32", tile_px=128)
    assert predictor.probabilities(noise(*shape)).shape == (2, *shape)
    assert runs(predictor.guide) == len(regions(shape, 256, 32))  # pyright: ignore[reportArgumentType]


# --- training ---


@pytest.mark.parametrize("size", [(128, 192), (90, 100), (40, 20)])
def test_a_cached_patch_has_its_part_of_the_regions_latents(size: tuple[int, int], tmp_path: Path):
    guide = brightness(128)
    whole = Picture("p", "g", noise(*size), np.zeros(size, np.int32))
    patches = Patches([whole], 64, STILL, 0, guide=guide, cache=LatentCache(tmp_path, 10**8), pool=4)
    for i in range(24):
        image, _, latent, _ = patches[i]
        assert latent is not None
        torch.testing.assert_close(latent.float(), cells(image), atol=2e-3, rtol=0)
    assert runs(guide) == len(regions(size, 128, 32))    # though the patches are of many places


def test_a_live_patch_is_seen_in_the_middle_of_its_region():
    guide = brightness(128)
    whole = Picture("p", "g", noise(96, 96), np.zeros((96, 96), np.int32))
    batch = collate([Patches([whole], 64, STILL, 0, guide=guide, around=32)[0]])
    assert batch.image.shape == (1, 3, 128, 128)
    patch, latent = seen(batch, guide)
    assert latent is not None
    torch.testing.assert_close(latent[0], cells(patch[0].permute(1, 2, 0).numpy().astype(np.uint8)))


def test_beyond_the_image_a_live_region_shows_the_mean_color_and_its_patch_a_mirror_image():
    image, labels = np.full((32, 32, 3), 10, np.uint8), np.zeros((32, 32), np.int32)
    patch, _ = augment(image, labels, 64, np.random.default_rng(0), STILL, 32, MEAN)
    assert patch.shape == (128, 128, 3)
    assert (patch[32:96, 32:96] == 10).all()
    around = np.ones((128, 128), bool)
    around[32:96, 32:96] = False
    assert (patch[around] == np.rint(MEAN)).all()
    mirrored, _ = augment(image, labels, 64, np.random.default_rng(0), STILL, 32)
    assert (mirrored == 10).all()


def test_validation_goes_region_by_region():
    guide = brightness(64)
    heard = []

    class Listener(nn.Module):
        """Notes the latent that it is given."""

        def forward(self, image: Tensor, latent: Tensor) -> Tensor:
            heard.append(latent)
            return image[:, :2]

    image = noise(100, 130)                              # 128 x 160 with whole cells: 2 x 3 regions
    logits = Training(Listener(), guide, TrainOptions())(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    assert logits.shape == (1, 2, 100, 130)
    assert runs(guide) == 6
    torch.testing.assert_close(heard[0][0, :, :6, :8], cells(image[:96, :128]))


def tissue(*seeds: int) -> list[Dataset]:
    def entry(seed: int) -> Entry:
        image, labels = draw_tissue(seed, (72, 72), 6, (5, 9))
        sample = Sample(f"tissue{seed}", image, labels, 0.5, f"patient{seed}")
        return Entry(sample.id, sample.group, lambda: sample)

    return [Dataset("drawn", [entry(seed) for seed in seeds], "CC0")]


@pytest.mark.parametrize("latents", ["live", "cached"])
def test_a_model_trained_with_regions_rebuilds_itself(latents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = dataclasses.replace(
        GUIDES["sam_vit_b"], name="tiny", image_px=(64,),
        build=lambda px: sam.SamGuide(depth=2, width=32, heads=2, global_blocks=(1,), image_px=px or 64),
    )
    monkeypatch.setitem(GUIDES, "tiny", spec)
    options = TrainOptions(
        width=1, patch_px=32, epochs=1, steps_per_epoch=1, batch=2, precision="fp32", guide="tiny",
        guide_weights="random:0", guide_scale="region", latents=latents,
    )
    folder = fit(tissue(0, 1), tissue(2), tmp_path / "out", options, progress=False)
    noted = json.loads((folder / "config.json").read_text())
    assert noted["guide_scale"] == "region"
    predictor = load(folder, device="cpu", precision="fp32")
    assert predictor.guide is not None
    assert predictor.guide.scale == "region"
    assert predictor.segment(noise(80, 70), 0.5).labels.shape == (80, 70)
    del noted["guide_scale"]                             # as models were written before there was a choice
    (folder / "config.json").write_text(json.dumps(noted))
    assert checkpoint.read_spec(folder).guide_scale == "tile"
    with pytest.raises(UserError, match="patch_px 96 is more than the guide's region of 64 px"):
        fit(tissue(0, 1), tissue(2), tmp_path / "large", dataclasses.replace(options, patch_px=96), progress=False)


def test_options_noted_before_there_was_a_choice_mean_tile():
    noted = TrainOptions().noted()
    del noted["guide_scale"]
    assert TrainOptions().equal(noted)
    assert not TrainOptions(guide_scale="region").equal(noted)
    with pytest.raises(UserError, match="unknown guide_scale 'slide'"):
        TrainOptions(guide_scale="slide")
