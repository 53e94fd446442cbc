"""What the experiments of the papers would cost, by counting operations; no weights are needed.

    python benchmarks/operations.py [--out results/operations.json] [--rate 30]

Counted is one forward pass of each arm of `nuguide-experiments`, guide and network with its fusion apart, on one patch
of the papers' recipe, by PyTorch's counter, for large guides on tensors without content; a multiplication and an
addition are one each. Training is taken for three passes of the network and one of the guide, validation for one of
both on each image. A GPU that sustains `--rate` TFLOP/s on such networks is an assumption; the hours follow from it.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from nuguide.checkpoint import build
from nuguide.datasets.facts import FACTS
from nuguide.experiments.run import VAL_SHARE
from nuguide.experiments.specs import EXPERIMENTS, PAPER, SETS, Arm
from nuguide.guides import GUIDES, FrozenGuide
from nuguide.loaders import surroundings
from nuguide.start import model_spec

FOLDS = 5
GUIDE = "sam_vit_b"                                     # of the guided arms that name none


def place(name: str) -> str:
    """Where a guide is counted: the large ones without content."""
    return "meta" if GUIDES[name].image_px else "cpu"


@cache
def guide_of(name: str) -> FrozenGuide:
    """A guide without weights."""
    spec = GUIDES[name]
    side = spec.image_px[0] if spec.image_px else None
    with torch.device(place(name)):
        return FrozenGuide(spec.build(side or 0), spec, "none", side)


@cache
def guide_operations(name: str, side: int) -> tuple[int, torch.Size]:
    """Of a guide's forward pass on an image of this many pixels a side, and the shape of the latent."""
    guide = guide_of(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latent = guide(torch.empty(1, 3, side, side, device=place(name)))
    return counter.get_total_flops(), latent.shape


def arm_operations(arm: Arm) -> tuple[int, int]:
    """Of the forward passes of network and guide of an arm, on one patch; the guide sees what is around it, too."""
    options = arm.recipe(PAPER, GUIDE)
    guide = None if options.fusion == "none" else guide_of(options.guide)
    side = options.patch_px
    spec = model_spec(options, guide, [], [])
    network = build(spec, guide.channels if guide else None).eval()
    inputs, of_guide = [torch.rand(1, 3, side, side)], 0
    if guide is not None:
        of_guide, latent = guide_operations(options.guide, side + 2 * surroundings(guide, None, options))
        inputs.append(torch.rand(latent))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return counter.get_total_flops(), of_guide


def experiment_operations(network: int, guide: int, images: int) -> float:
    """Of training and validating an arm on every fold of a set of this many images, a patch each."""
    rest = images * (FOLDS - 1) / FOLDS
    train = math.ceil(rest * (1 - VAL_SHARE) / PAPER.batch) * PAPER.batch
    return FOLDS * PAPER.epochs * (train * (3 * network + guide) + rest * VAL_SHARE * (network + guide))


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/operations.json"))
    parser.add_argument("--rate", type=float, default=30, help="TFLOP/s that the GPU is taken to sustain")
    given = parser.parse_args()
    images = {name: FACTS[name].images[0] for name in SETS}
    tables = {}
    for name, experiment in EXPERIMENTS.items():
        arms = {}
        for arm in experiment.arms:
            network, guide = arm_operations(arm)
            total = {which: experiment_operations(network, guide, count) for which, count in images.items()}
            arms[arm.name] = {
                "title": arm.title, "network_gflop": round(network / 1e9, 1), "guide_gflop": round(guide / 1e9, 1),
                "hours": {which: round(flop / given.rate / 1e12 / 3600, 3) for which, flop in total.items()},
            }
        tables[name] = arms
    facts = {
        "benchmark": "operations", "command": f"python benchmarks/operations.py --rate {given.rate:g}",
        "patch_px": PAPER.patch_px, "epochs": PAPER.epochs, "batch": PAPER.batch, "folds": FOLDS, "images": images,
        "tflop_per_second": given.rate, "torch": torch.__version__,
    }
    given.out.write_text(json.dumps({"facts": facts, "experiments": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
