"""One run with `nuguide train --ema`, scored with the average of its weights and with the weights themselves.

    python benchmarks/average.py runs/ema/last.ckpt ... --data DATA

Each checkpoint holds both, so the two are of one run, step for step. Scores are at 0.5 microns per pixel, on the
validation images of results/split.json, by the default model's thresholds; they go to results/ema.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

from instances_compare import RESULTS, listed
from nuguide import checkpoint
from nuguide.batches import Picture
from nuguide.evaluate import write_scores
from nuguide.metrics import score
from nuguide.predict import Predictor


def scored(state: dict[str, torch.Tensor], pictures: list[Picture]) -> list[dict]:
    """A row of scores for every picture, by the default model with other weights."""
    model, guide, spec = checkpoint.load("default")
    model.load_state_dict(state)
    predictor = Predictor(model, guide, spec, device="cpu", precision="fp32")
    rows = []
    for drawn in pictures:
        scores = score(drawn.labels, predictor.label(*predictor.probabilities(drawn.image_rgb)), drawn.ignore)
        dataset, _, number = drawn.id.partition("/")
        rows.append({"dataset": dataset, "id": number, "dice": scores.dice, "aji": scores.aji, "pq": scores.pq})
    return rows


def main() -> int:
    """Score every checkpoint twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    pictures = listed(given.data, "val")
    rows, steps = [], []
    for path in given.checkpoints:
        held = torch.load(path, weights_only=True)
        last = {name.removeprefix("model."): value for name, value in held["state_dict"].items()}
        steps.append(held["global_step"])
        for weights, state in (("last", last), ("average", held["callbacks"]["WeightAverage"]["average"])):
            rows += [row | {"steps": held["global_step"], "weights": weights} for row in scored(state, pictures)]
    write_scores(RESULTS / "ema.json", pd.DataFrame(rows), {"steps": steps, "mpp": 0.5})
    return 0


if __name__ == "__main__":
    sys.exit(main())
