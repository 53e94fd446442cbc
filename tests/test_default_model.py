"""The model that comes with the package: small, of free data, sound on drawn and real tissue, the same in tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nuguide
from conftest import draw_tissue
from drawn_slide import Block, write_slide
from nuguide import cli
from nuguide.checkpoint import MODELS, WEIGHTS, read_spec
from nuguide.datasets import read_dataset
from nuguide.metrics import dice, panoptic_quality
from nuguide.networks.int8 import int8_available
from nuguide.predict import Predictor

FOLDER = MODELS / "small"
RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def model() -> Predictor:
    """The default model in the reference arithmetic."""
    return nuguide.load("default", device="cpu", precision="fp32")


def test_it_is_small_and_its_guide_comes_with_it() -> None:
    assert (FOLDER / WEIGHTS).stat().st_size < 15e6
    assert read_spec(FOLDER).guide == "efficientnet_lite0"


def test_it_finds_most_drawn_nuclei(model: Predictor) -> None:
    image, labels = draw_tissue(3, (300, 420), 60)
    nuclei = model.segment(image, mpp=0.5)
    assert dice(labels, nuclei.labels) > 0.7
    assert panoptic_quality(labels, nuclei.labels).dq > 0.6


@pytest.mark.skipif(not int8_available(), reason="this build of torch has no oneDNN")
def test_8_bit_integers_find_what_floats_find(model: Predictor) -> None:
    image, _ = draw_tissue(4, (300, 420), 60)
    fast = nuguide.load("default", device="cpu", precision="int8").segment(image, mpp=0.5)
    assert dice(model.segment(image, mpp=0.5).labels, fast.labels) > 0.98


def test_tiles_find_what_one_piece_finds(model: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = draw_tissue(5, (400, 400), 90)
    whole = model.segment(image, mpp=0.5).labels
    monkeypatch.setattr(model, "tile_px", 256)
    tiled = model.segment(image, mpp=0.5).labels
    assert panoptic_quality(whole, tiled).pq > 0.9


def test_it_scores_on_real_slides_what_its_result_file_says(model: Predictor, shared_data: Path) -> None:
    rows = [row for row in json.loads((RESULTS / "default.val.json").read_text())["images"] if row["dataset"] == "tnbc"]
    tnbc = read_dataset("tnbc", shared_data / "tnbc")
    found = []
    for row in rows:
        sample = tnbc[tnbc.ids.index(row["id"])]
        found.append(dice(sample.labels, model.segment(sample.image_rgb, sample.mpp).labels))
    assert np.mean(found) == pytest.approx(np.mean([row["dice"] for row in rows]), abs=0.01)


def test_a_slide_of_real_tissue_is_segmented_as_its_images_are(shared_data, tmp_path):
    """Nine images of NuInsSeg side by side on glass: the slide has about as many nuclei as its annotation."""
    dataset = read_dataset("nuinsseg", shared_data / "nuinsseg")
    some = [dataset[index] for index in range(0, len(dataset), len(dataset) // 9)][:9]
    given = [Block(sample.image_rgb, sample.labels) for sample in some]
    truth = write_slide(tmp_path / "real.svs", (5 * 512, 5 * 512), 0.25, block_px=512, given=given)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", str(tmp_path / "real.svs"), "--out", str(tmp_path / "out"), "--formats", "csv"])
    assert stopped.value.code == 0
    table = pd.read_csv(tmp_path / "out" / "real.csv")
    assert truth.nuclei > 200
    assert 0.6 * truth.nuclei < len(table) < 1.6 * truth.nuclei
    inside = table[["centroid_x_px", "centroid_y_px"]].to_numpy()
    assert inside.min() > 512 - 40
    assert inside.max() < 4 * 512 + 40
