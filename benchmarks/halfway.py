"""What further training on harder patches, and half the way to it, change on changed pictures; one set of thresholds.

    python benchmarks/halfway.py DATA before=runs/wide/model end=runs/end/model halfway=runs/base/model > OUT.jsonl

Each model is NAME=FOLDER; all separate nuclei by the thresholds of the first, so that the weights alone differ. The
images, the changes and the scores are those of benchmarks/robustness.py. Prints a line of JSON a model and a change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from nuguide.datasets.splits import read_manifest
from nuguide.predict import load
from robustness import CLEAN, IMAGES, METRICS, ROOT, SEED, chosen, perturbed, samples_of, score

CHANGES = ((CLEAN, 0.0), ("blur", 1.5), ("contrast", 0.4), ("hematoxylin", 0.4))


def main() -> None:
    """Score every model under every change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", help="NAME=FOLDER; the first gives the thresholds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    members = chosen(read_manifest(ROOT / "results" / "split.json").parts["val"], IMAGES, SEED)
    samples, separation = samples_of(members, options.data), None
    for name, folder in (model.split("=", 1) for model in options.models):
        predictor = load(folder, device="cpu", precision="fp32")
        separation = separation or predictor.separation
        predictor.separation = separation
        for kind, level in CHANGES:
            found = [
                score(sample.labels, predictor.segment(*perturbed(sample, index, kind, level)).labels, sample.ignore)
                for index, sample in enumerate(samples)
            ]
            scores = {metric: [round(float(getattr(one, metric)), 4) for one in found] for metric in METRICS}
            print(json.dumps({
                "benchmark": "halfway", "model": name, "perturbation": kind, "level": level,
                "separation": dataclasses.asdict(separation), **scores, "precision": "fp32", "seed": SEED,
                "images": [f"{member.dataset}/{member.id}" for member in members],
            }), flush=True)


if __name__ == "__main__":
    main()
