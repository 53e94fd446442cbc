"""The released weights find what they found when they were released: label maps change on purpose alone.

Where weights, the separation or the path from image to label map were changed on purpose, look at what changed, then
write the golden label maps anew with `python tests/test_golden.py` and say in the commit why. The H&E picture of
`make demo` is used where that has been run.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import nuguide
from conftest import draw_tissue
from nuguide import zoo
from nuguide.images import read_image
from nuguide.metrics import panoptic_quality

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
HASHES = GOLDEN / "weights.json"
HE = ROOT / "demo" / "wheel" / "stardist" / "data" / "images" / "histo.jpg"       # where examples/demo.py puts it
PICTURES = ("drawn", "he")
MPP = 0.5


def picture(name: str) -> np.ndarray:
    """(H, W, 3) uint8 at 0.5 microns per pixel: drawn tissue, or a part of the H&E picture of `make demo`."""
    if name == "drawn":
        return draw_tissue(7, (256, 256), 45)[0]
    if not HE.is_file():
        pytest.skip("the H&E picture is not here; make demo gets it")
    return read_image(HE).image_rgb[:256, :256]


@functools.cache
def labels_of(model: str, name: str) -> np.ndarray:
    """The label map of a picture by a model in the reference arithmetic."""
    return nuguide.load(model, device="cpu", precision="fp32").segment(picture(name), MPP).labels


def golden(model: str, name: str) -> Path:
    """Where the label map is kept."""
    return GOLDEN / f"{model}.{name}.png"


def agrees(found: np.ndarray, kept: np.ndarray) -> bool:
    """Whether two label maps are the same up to what the arithmetic of another processor may move."""
    nuclei, before = len(np.unique(found)) - 1, len(np.unique(kept)) - 1
    return panoptic_quality(kept, found).pq >= 0.995 and abs(nuclei - before) <= 0.01 * before


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("model", zoo.names())
def test_a_released_model_finds_what_it_found(model: str, name: str) -> None:
    found = labels_of(model, name)
    kept = np.asarray(PIL.Image.open(golden(model, name))).astype(np.int32)
    assert kept.max() > 20                                  # a picture with too few nuclei would guard nothing
    assert agrees(found, kept)


def test_weights_are_those_that_the_golden_label_maps_were_made_with() -> None:
    assert {name: zoo.find(name).sha256 for name in zoo.names()} == json.loads(HASHES.read_text())


def test_a_lost_nucleus_a_grown_one_and_another_model_are_noticed() -> None:
    """Of 45 nuclei one is more than 1%, and a row of pixels more on each lowers their mean IoU by far."""
    kept = np.asarray(PIL.Image.open(golden("small", "drawn"))).astype(np.int32)
    other = np.asarray(PIL.Image.open(golden("small-unguided", "drawn"))).astype(np.int32)
    grown = np.maximum(kept, np.roll(kept, 1, axis=0))
    assert agrees(kept, kept)
    assert not agrees(np.where(kept == 1, 0, kept), kept)
    assert not agrees(grown, kept)
    assert not agrees(other, kept)


def write() -> None:
    """Write every golden label map and the hashes of the weights anew."""
    GOLDEN.mkdir(exist_ok=True)
    for model in zoo.names():
        for name in PICTURES:
            image = PIL.Image.fromarray(labels_of(model, name).astype(np.uint16))
            image.save(golden(model, name), optimize=True)
    HASHES.write_text(json.dumps({name: zoo.find(name).sha256 for name in zoo.names()}, indent=1) + "\n")


if __name__ == "__main__":
    write()
