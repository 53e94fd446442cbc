"""Whether tiling shows: the shipped model on an image in tiles against the same image in one piece.

    python benchmarks/seams.py [--model NAME|FOLDER] [--image FILE] [--tiles 256 400 576]

Prints one JSON line a tile size: panoptic quality of tiled against untiled, and the shares of untiled nuclei that are
lost (no tiled nucleus has an IoU above 0.5), split (two tiled nuclei each take a fifth of it) or merged (it shares with
another one a tiled nucleus that takes half of both), in the bands along the seams and elsewhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from nuguide import checkpoint
from nuguide.images import read_image
from nuguide.metrics import panoptic_quality
from nuguide.predict import PHASE_PX, Predictor
from nuguide.tiling import cover, middles
from speed import MPP, large_image

BAND_PX = 16          # to both sides of a seam, at the model's resolution: 8 microns, about a nucleus


def bands(shape: tuple[int, int], tile_px: int, overlap_px: int) -> np.ndarray:
    """(H, W) bool, True within `BAND_PX` of a border between two cores."""
    near = np.zeros(shape, bool)
    for tile in cover(shape, tile_px, overlap_px, PHASE_PX):
        if tile.core_top:
            near[tile.core_top - BAND_PX : tile.core_top + BAND_PX, tile.core_left : tile.core_right] = True
        if tile.core_left:
            near[tile.core_top : tile.core_bottom, tile.core_left - BAND_PX : tile.core_left + BAND_PX] = True
    return near


def fates(whole: np.ndarray, tiled: np.ndarray) -> dict[str, np.ndarray]:
    """For each nucleus 1..n of `whole`, whether it is lost, split or merged in `tiled`: (n,) bool each."""
    pairs, shared = np.unique(np.stack([whole.ravel(), tiled.ravel()]), axis=1, return_counts=True)
    inside = (pairs[0] > 0) & (pairs[1] > 0)
    (a, b), shared = pairs[:, inside], shared[inside]
    area_a, area_b = np.bincount(whole.ravel()), np.bincount(tiled.ravel())
    overlap = shared / (area_a[a] + area_b[b] - shared)
    n = whole.max(initial=0)
    lost = np.ones(n + 1, bool)
    lost[a[overlap > 0.5]] = False
    parts = np.bincount(a[shared >= 0.2 * area_a[a]], minlength=n + 1)
    taken = shared >= 0.5 * area_a[a]
    owners = np.bincount(b[taken], minlength=len(area_b))
    merged = np.zeros(n + 1, bool)
    merged[a[taken & (owners[b] > 1)]] = True
    return {"lost": lost[1:], "split": parts[1:] > 1, "merged": merged[1:]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 400, 576])
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    predictor = Predictor(*checkpoint.load(options.model), device="cpu", precision=options.precision)
    with tempfile.TemporaryDirectory() as folder:
        image = read_image(options.image or large_image(Path(folder) / "image.png")).image_rgb
    image = predictor.prepared(image, MPP)
    predictor.tile_px = max(image.shape[:2]) + 128         # one tile holds it all
    whole = predictor.label(*predictor.probabilities(image))
    ids, y, x = middles(whole)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for tile_px in options.tiles:
        predictor.tile_px = tile_px
        tiled = predictor.label(*predictor.probabilities(image))
        in_band = bands(image.shape[:2], tile_px, predictor.overlap_px)[y, x]
        quality = panoptic_quality(whole, tiled)
        rates = {
            name: {"seam": round(float(fate[in_band].mean()), 4), "elsewhere": round(float(fate[~in_band].mean()), 4)}
            for name, fate in fates(whole, tiled).items()
        }
        print(json.dumps({
            "benchmark": "seams", "image_px": image.shape[:2], "tile_px": tile_px, "pq": round(quality.pq, 4),
            "dq": round(quality.dq, 4), "nuclei": len(ids), "nuclei_in_bands": int(in_band.sum()), **rates,
            "precision": predictor.precision, "commit": commit,
        }))


if __name__ == "__main__":
    main()
