"""What the errors of a model are: nuclei missed, joined, divided or badly outlined, and what each costs in Dice.

    python benchmarks/errors.py DATA [--model small] [--unseen cryonuseg monuseg] > results/errors.jsonl

A line of JSON for each set: the validation images of the shipped models (results/split.json), all images of the sets
that choose nothing, and the second annotator of CryoNuSeg against the first. Shares are of all nuclei of a set, Dice is
the mean over images, at the images' own size.

* Of the annotated nuclei: found (IoU above 0.5); missed (less than a tenth of it covered); joined (half of it or more
  in a nucleus that holds half of another, too); divided (two nuclei cover a fifth of it or more each); outlined
  otherwise.
* Of those that were found by the model: invented (less than a tenth of it annotated).
* Dice as it is; if what is missed were left out of the annotation and what is invented out of the answer ("of those
  seen"); and if all that was not missed or invented had its annotated outline ("outlined rightly").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nuguide.cli import validation_part
from nuguide.datasets import Dataset, read_dataset
from nuguide.predict import Predictor, load

RESULTS = Path(__file__).resolve().parent.parent / "results"
VALIDATION, UNSEEN = ("nuinsseg", "tnbc", "dsb_he"), ("cryonuseg", "monuseg")
KINDS = ("found", "missed", "joined", "divided", "outlined otherwise")


@dataclass(frozen=True)
class Errors:
    """Of one image: how many annotated nuclei of each of `KINDS`, those invented of how many, and three Dices."""

    kinds: dict[str, int]
    invented: int
    answered: int
    dice: float
    of_those_seen: float
    outlined_rightly: float


def errors(truth: np.ndarray, found: np.ndarray, ignore: np.ndarray | None = None) -> Errors:
    """The errors of a label map (H, W) int against another; what is to be ignored is in neither."""
    if ignore is not None:
        truth, found = np.where(ignore, 0, truth), np.where(ignore, 0, found)
    true_px, found_px = np.bincount(truth.ravel()), np.bincount(found.ravel())
    pairs, shared = np.unique(np.stack([truth.ravel(), found.ravel()]), axis=1, return_counts=True)
    both = (pairs > 0).all(0)
    (t, f), shared = pairs[:, both], shared[both]
    covered = np.bincount(t, shared, len(true_px))
    annotated = np.bincount(f, shared, len(found_px))
    is_found = np.zeros(len(true_px), bool)
    is_found[t[shared > 0.5 * (true_px[t] + found_px[f] - shared)]] = True
    within = shared >= 0.5 * true_px[t]
    joined = np.zeros(len(true_px), bool)
    joined[t[within & (np.bincount(f[within], minlength=len(found_px))[f] > 1)]] = True
    divided = np.bincount(t[shared >= 0.2 * true_px[t]], minlength=len(true_px)) > 1
    missed = covered < 0.1 * true_px
    there = (true_px > 0) & (np.arange(len(true_px)) > 0)
    counts, rest = {}, there
    for name, kind in zip(KINDS, (is_found, missed, joined, divided, there), strict=True):
        counts[name] = int((rest & kind).sum())
        rest = rest & ~kind
    answers = (found_px > 0) & (np.arange(len(found_px)) > 0)
    invented = answers & (annotated < 0.1 * found_px)
    total, answer, common = true_px[1:].sum(), found_px[1:].sum(), shared.sum()
    gone, extra = true_px[there & missed].sum(), found_px[invented].sum()
    lost = shared[missed[t] | invented[f]].sum()
    return Errors(
        counts, int(invented.sum()), int(answers.sum()),
        _ratio(2 * common, total + answer),
        _ratio(2 * (common - lost), total - gone + answer - extra),
        _ratio(2 * (total - gone), 2 * total - gone + extra),
    )


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def summed(name: str, parts: list[Errors]) -> dict:
    """The line of a set."""
    nuclei = sum(sum(part.kinds.values()) for part in parts)
    return {
        "benchmark": "errors", "set": name, "images": len(parts), "nuclei": nuclei,
        "share": {kind: round(sum(part.kinds[kind] for part in parts) / nuclei, 4) for kind in KINDS},
        "invented": round(sum(part.invented for part in parts) / max(sum(part.answered for part in parts), 1), 4),
        **{
            key: round(float(np.mean([getattr(part, key) for part in parts])), 4)
            for key in ("dice", "of_those_seen", "outlined_rightly")
        },
    }


def of_set(part: Dataset, predictor: Predictor) -> list[Errors]:
    """The errors of a model on each image of a set."""
    return [
        errors(sample.labels, predictor.segment(sample.image_rgb, sample.mpp).labels.astype(np.int64), sample.ignore)
        for sample in part
    ]


def lines(data: Path, model: str, unseen: list[str]) -> Iterator[dict]:
    """A line a set, as they are done."""
    predictor = load(model, device="cpu", precision="fp32")
    for name in VALIDATION:
        part = validation_part(read_dataset(name, data / name), RESULTS / "split.json")
        yield {"model": model, **summed(name, of_set(part, predictor))}
    for name in unseen:
        yield {"model": model, **summed(name, of_set(read_dataset(name, data / name), predictor))}
    place = data / "cryonuseg"
    other = {sample.id: sample.labels for sample in read_dataset("cryonuseg", place, annotator="annotator2")}
    people = [errors(sample.labels, other[sample.id]) for sample in read_dataset("cryonuseg", place)]
    yield {"model": "the second annotator", **summed("cryonuseg", people)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="small")
    parser.add_argument("--unseen", nargs="*", default=list(UNSEEN), help="sets that choose nothing")
    options = parser.parse_args()
    for line in lines(options.data, options.model, options.unseen):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
