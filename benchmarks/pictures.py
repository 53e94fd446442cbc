"""The pictures of README and model card, from validation images of NuInsSeg and TNBC (CC BY 4.0).

    python benchmarks/pictures.py --data DATA     # the folder that holds nuinsseg/ and tnbc/

Which images are shown follows from results/default.val.json: for the README, in each set, the image of median Dice
among those with 20 nuclei or more; for the failures, the worst three of those with 10 or more, one a group. Annotation
is drawn in yellow, what the model found in green.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

import nuguide
from nuguide.datasets import read_dataset
from nuguide.evaluate import read_scores
from nuguide.measure import outlines
from nuguide.types import Sample

ROOT = Path(__file__).resolve().parents[1]
YELLOW, GREEN = (255, 221, 0), (0, 255, 90)


def drawn(image: np.ndarray, labels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """A copy of the image, enlarged twice, with every nucleus outlined."""
    large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    rings = [np.rint(2 * ring + 0.5).astype(np.int32) for ring in outlines(labels).values()]
    return cv2.polylines(large, rings, True, color, 2, cv2.LINE_AA)


def row(sample: Sample, found: np.ndarray) -> np.ndarray:
    """Annotated and found, side by side."""
    return np.hstack([drawn(sample.image_rgb, sample.labels, YELLOW), drawn(sample.image_rgb, found, GREEN)])


def save(path: Path, rows: list[np.ndarray], width: int) -> None:
    """Rows of panels as one JPEG, `width` px wide."""
    picture = np.vstack(rows)
    height = round(picture.shape[0] * width / picture.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)).save(path, quality=85)


def main() -> None:
    """Choose, segment, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    scores = read_scores(ROOT / "results" / "default.val.json")
    model = nuguide.load("default")
    sets = {name: read_dataset(name, data / name) for name in ("nuinsseg", "tnbc")}

    def panel(choice: dict) -> np.ndarray:
        dataset = sets[choice["dataset"]]
        sample = dataset[dataset.ids.index(choice["id"])]
        print(choice["dataset"], choice["id"], f"Dice {choice['dice']:.3f} AJI {choice['aji']:.3f}")
        return row(sample, model.segment(sample.image_rgb, sample.mpp).labels)

    middling = []
    for name in sets:
        rows = scores.query(f"dataset == {name!r} and nuclei_truth >= 20").sort_values(by="dice").to_dict("records")
        middling.append(rows[len(rows) // 2])
    save(ROOT / "docs/images/result.jpg", [panel(choice) for choice in middling], 1000)
    worst = scores.query("nuclei_truth >= 10").sort_values(by="dice").drop_duplicates("group").head(3)
    save(ROOT / "docs/images/failures.jpg", [panel(choice) for choice in worst.to_dict("records")], 900)


if __name__ == "__main__":
    main()
