"""Every slide of TNBC, or organ of CryoNuSeg, scored by a model that never saw it.

    python benchmarks/cross_validate.py tnbc DATA --start RUN/model --out FOLDER [--folds 5] [--only-folds 0 1]
    python benchmarks/cross_validate.py cryonuseg DATA --start small --out FOLDER
    python benchmarks/cross_validate.py scores FOLDER RESULT.json --what "one sentence"

Groups are dealt to folds. For each fold the model START is trained further on the other groups, of which one part
chooses the epoch and the thresholds, and then scored on the fold: once, and it chooses nothing. START must not have
seen the set; fusion, network and width are START's. Training on TNBC goes on with NuInsSeg's training organs (those
that results/split.json does not hold out) beside it, as the shipped model's did; on CryoNuSeg it is alone.

DATA holds the sets under their names. FOLDER/foldK is a training run, which resumes, and FOLDER/foldK.json its scores.
`scores` gathers them to one file in the layout of `nuguide evaluate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nuguide.augment import Augmentation
from nuguide.checkpoint import model_folder, read_spec
from nuguide.datasets import Dataset, read_dataset
from nuguide.datasets.splits import read_manifest
from nuguide.evaluate import evaluate, write_scores
from nuguide.experiments.run import Fold, folds_of
from nuguide.predict import load
from nuguide.recipe import TrainOptions
from nuguide.train import fit
from nuguide.zoo import trained_on

RESULTS = Path(__file__).resolve().parent.parent / "results"
BESIDE = {"tnbc": ("nuinsseg",), "cryonuseg": ()}


def recipe(name: str, start: str, steps: int, seed: int) -> TrainOptions:
    """How every fold is trained: five epochs, else as in the third stage of the shipped models, with copied nuclei.
    Exits where START has seen the set `name`.
    """
    spec = read_spec(model_folder(start))
    if any(part["name"] == name for part in trained_on(spec.origin)):
        raise SystemExit(f"{start}: was trained on {name}, so scores of it would say nothing")
    width = spec.network_options["width"]
    return TrainOptions(
        start=start, network=spec.network, width=int(width), fusion=spec.fusion or "none", mpp=spec.mpp, lr=1e-3,
        balance=0.8, gap_weight=5.0, ema=0.99, keep="mean", epochs=5, steps_per_epoch=steps // 5, seed=seed,
        augmentation=Augmentation(elastic_px=1.7, blur=1.0, noise=10.0, jpeg=50, crowd=0.4), precision="bf16",
    )


def beside(name: str, root: Path) -> list[Dataset]:
    """What is trained on besides a set: all of each other set but what results/split.json holds out."""
    held = {(member.dataset, member.id) for member in read_manifest(RESULTS / "split.json").parts["val"]}
    sets = [read_dataset(other, root / other) for other in BESIDE[name]]
    return [part.subset([i for i, one in enumerate(part.ids) if (part.name, one) not in held]) for part in sets]


def run_fold(dataset: Dataset, fold: Fold, more: Sequence[Dataset], options: TrainOptions, out: Path) -> None:
    """Train on a fold and score it, unless that was done."""
    result = out / f"fold{fold.number}.json"
    if result.is_file():
        return
    train = [dataset.subset(fold.train), *more]
    model = fit(train, [dataset.subset(fold.val)], out / f"fold{fold.number}", options, progress=False)
    scores = evaluate(load(model, precision="fp32"), dataset.subset(fold.test))
    facts = {
        "fold": fold.number, "options": options.noted(), "train": sorted({g for d in train for g in d.groups}),
        "val": sorted(set(dataset.subset(fold.val).groups)), "test": sorted(set(dataset.subset(fold.test).groups)),
    }
    write_scores(result, scores, facts)
    print(f"fold {fold.number}: Dice {scores['dice'].mean():.3f}, AJI {scores['aji'].mean():.3f}", flush=True)


def gather(folder: Path, result: Path, what: str) -> None:
    """All folds' scores in one file."""
    documents = [json.loads(file.read_text()) for file in sorted(folder.glob("fold*.json"))]
    rows = pd.DataFrame([row for document in documents for row in document["images"]])
    options = documents[0]["facts"]["options"]
    folds = [{name: document["facts"][name] for name in ("fold", "val", "test")} for document in documents]
    write_scores(result, rows, {"what": what, "options": options, "folds": folds})
    shown = ["dice", "aji", "pq"]
    print(rows.groupby("group")[shown].mean().round(3).to_string())
    print(", ".join(f"{name} {rows[name].to_numpy().mean():.3f}" for name in shown))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, steps in (("tnbc", 500), ("cryonuseg", 300)):
        one = commands.add_parser(name)
        one.add_argument("data", type=Path)
        one.add_argument("--start", required=True)
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--folds", type=int, default=5)
        one.add_argument("--only-folds", type=int, nargs="*", default=[])
        one.add_argument("--steps", type=int, default=steps)
        one.add_argument("--seed", type=int, default=0)
    one = commands.add_parser("scores")
    one.add_argument("folder", type=Path)
    one.add_argument("result", type=Path)
    one.add_argument("--what", required=True)
    options = parser.parse_args()
    if options.name == "scores":
        gather(options.folder, options.result, options.what)
        return
    dataset = read_dataset(options.name, options.data / options.name)
    more = beside(options.name, options.data)
    how = recipe(options.name, options.start, options.steps, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for fold in folds_of(dataset.groups, options.folds, options.seed):
        if not options.only_folds or fold.number in options.only_folds:
            run_fold(dataset, fold, more, how, options.out)


if __name__ == "__main__":
    main()
