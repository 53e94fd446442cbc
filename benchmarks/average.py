"""What to keep of a training: the weights at its end, their average, its best epoch, or the mean of those two averages.

    python benchmarks/average.py NAME=RUN ... --data DATA

RUN is a folder of `nuguide train --ema ... --keep mean`: last.ckpt holds the weights at the end and their average,
best/ the average at the best epoch, model/ the mean. Scores are at 0.5 microns per pixel, on the validation images of
results/split.json, by the thresholds in model/; they go to results/ema.json, where other runs stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from instances_compare import RESULTS, listed
from nuguide import checkpoint
from nuguide.batches import Picture
from nuguide.evaluate import read_scores, write_scores
from nuguide.metrics import score
from nuguide.predict import Predictor
from nuguide.train import RESUME

OUT = RESULTS / "ema.json"


def states(run: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What a run may keep, by name, with its weights."""
    held = torch.load(run / RESUME, weights_only=True)
    yield "weights", {name.removeprefix("model."): value for name, value in held["state_dict"].items()}
    yield "average", held["callbacks"]["WeightAverage"]["average"]
    for name, folder in (("best", "best"), ("mean", "model")):
        yield name, checkpoint.load(run / folder)[0].state_dict()


def scored(run: Path, state: dict[str, torch.Tensor], pictures: list[Picture]) -> list[dict]:
    """A row of scores for every picture, by the run's model with other weights."""
    model, guide, spec = checkpoint.load(run / "model")
    model.load_state_dict(state)
    predictor = Predictor(model, guide, spec, device="cpu", precision="fp32")
    rows = []
    for drawn in pictures:
        scores = score(drawn.labels, predictor.label(*predictor.probabilities(drawn.image_rgb)), drawn.ignore)
        dataset, _, number = drawn.id.partition("/")
        rows.append({"dataset": dataset, "id": number, "dice": scores.dice, "aji": scores.aji, "pq": scores.pq})
    return rows


def main() -> int:
    """Score every run in all its states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    pictures = listed(given.data, "val")
    named = dict(each.split("=", 1) for each in given.runs)
    rows = [
        row | {"run": name, "weights": kept}
        for name, run in named.items()
        for kept, state in states(Path(run))
        for row in scored(Path(run), state, pictures)
    ]
    before = read_scores(OUT).query("run not in @named") if OUT.is_file() else pd.DataFrame()
    write_scores(OUT, pd.concat([before, pd.DataFrame(rows)], ignore_index=True), {"mpp": 0.5})
    return 0


if __name__ == "__main__":
    sys.exit(main())
