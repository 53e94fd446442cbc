"""The runner: every arm on every fold of every set, resumable, one JSON file of scores each.

    OUT/SET/foldK/split.json        which images were trained on, validated on and tested on, by content
    OUT/SET/foldK/ARM/              the training run; ARM.json beside it holds the scores of the test images

Groups (organs, patients, sources) are dealt to K folds; each fold is tested once, with a model that was trained and
chosen on the others, so no test image chooses anything. Arms that several experiments share are run once. A data set
that has a division of its own may be run on that instead: one fold.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..datasets import Dataset, read_dataset
from ..datasets.splits import SplitManifest, grouped_folds, hold_out, own_split, read_manifest, write_manifest
from ..evaluate import evaluate, write_scores
from ..machine import keep_freed_memory
from ..predict import load
from ..recipe import TrainOptions
from ..train import fit
from ..types import UserError
from .specs import Arm, Experiment

log = logging.getLogger(__name__)

VAL_SHARE = 0.2           # of the images that a fold does not test


@dataclass(frozen=True)
class Plan:
    """How an experiment is run.

    Attributes:
        base: options that all arms share. guide: of the guided arms that name none.
        folds: how many, grouped. only_folds: if any, these alone. arms: if any, these alone, by name.
        budget: factor on the steps of `base`. epochs: at the most, of the same steps in all: what is between them
            (validation, checkpoint) takes longer than a few steps on a small set.
        split: "grouped", or "own" for the one division that belongs to a data set (`splits.OWN_SPLITS`).
    """

    base: TrainOptions
    guide: str
    folds: int = 5
    only_folds: Sequence[int] = ()
    arms: Sequence[str] = ()
    budget: float = 1.0
    split: str = "grouped"
    epochs: int | None = None


@dataclass(frozen=True)
class Fold:
    """One division of a set: indices of the images to train on, to choose the epoch by, and to test on."""

    number: int
    train: list[int]
    val: list[int]
    test: list[int]


def folds_of(groups: Sequence[str], count: int, seed: int) -> list[Fold]:
    """`count` folds, no group in two parts of one; each image is tested in exactly one."""
    return [
        fold_of(number, groups, rest, test, seed)
        for number, (rest, test) in enumerate(grouped_folds(groups, count, seed))
    ]


def fold_of(number: int, groups: Sequence[str], rest: list[int], test: list[int], seed: int) -> Fold:
    """The fold that tests these images, and holds `VAL_SHARE` of the rest out to choose the epoch by."""
    train, val = hold_out([groups[i] for i in rest], VAL_SHARE, seed)
    return Fold(number, [rest[i] for i in train], [rest[i] for i in val], test)


def divide(name: str, groups: Sequence[str], plan: Plan) -> list[Fold]:
    """The folds of a set as planned; UserError where it has too few groups for them, or no division of its own."""
    if plan.split == "own":
        return [fold_of(0, groups, *own_split(name, groups), plan.base.seed)]
    try:
        return folds_of(groups, plan.folds, plan.base.seed)
    except ValueError as error:
        raise UserError(f"{name}: {error}; choose fewer with --folds") from error


def budgeted(options: TrainOptions, images: int, budget: float, most_epochs: int | None = None) -> TrainOptions:
    """The options with `budget` times their steps: fewer epochs, and at the least one step."""
    per_epoch = options.steps_per_epoch or -(-images // options.batch)
    steps = max(round(options.epochs * per_epoch * budget), 1)
    epochs = max(min(options.epochs, steps // per_epoch, most_epochs or options.epochs), 1)
    return dataclasses.replace(options, epochs=epochs, steps_per_epoch=max(steps // epochs, 1))


def open_sets(root: Path, names: Sequence[str]) -> dict[str, Dataset]:
    """The data sets ROOT/NAME; UserError names those that are not there, and goes no further."""
    if missing := [name for name in names if not (root / name).is_dir()]:
        raise UserError(
            f"{root}: holds no folder {', '.join(missing)}; put each set there under its name, or name others "
            "with --sets (nuguide data check NAME ROOT says where a set is to be had)"
        )
    return {name: read_dataset(name, root / name) for name in names}


def run(
    experiment: Experiment,
    sets: dict[str, Dataset],
    out: Path,
    plan: Plan,
    progress: bool = True,
    said: Callable[[str], None] = log.info,
) -> list[Path]:
    """Run what is missing of an experiment; the result files of all its arms, folds and sets that were asked for.

    A run that was cut goes on with the next call, within an arm too.

    Args:
        sets: by name.
        said: is told what begins and what is done.
    Raises:
        UserError: a set has fewer groups than folds, OUT holds a run on other images or with other options, the guide
            has no weights.
    """
    chosen = [experiment.arm(name) for name in plan.arms] or list(experiment.arms)
    files = []
    for set_name, dataset in sets.items():
        for fold in divide(set_name, dataset.groups, plan):
            if plan.only_folds and fold.number not in plan.only_folds:
                continue
            place = out / set_name / f"fold{fold.number}"
            manifest = note_fold(place, dataset, fold)
            for arm in chosen:
                files.append(run_arm(arm, dataset, fold, manifest, place, plan, progress, said))
    return files


def note_fold(place: Path, dataset: Dataset, fold: Fold) -> SplitManifest:
    """Write split.json, or check that the one that is there says the same."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place}: no folder can be made here ({error.strerror}); choose another --out") from error
    split = place / "split.json"
    if split.is_file():
        manifest = read_manifest(split)
        wanted = {name: sorted(dataset.ids[i] for i in getattr(fold, name)) for name in ("train", "val", "test")}
        if {name: sorted(member.id for member in part) for name, part in manifest.parts.items()} != wanted:
            raise UserError(f"{split}: divides other images, or otherwise; choose another --out")
        return manifest
    return write_manifest(split, {name: [dataset.subset(getattr(fold, name))] for name in ("train", "val", "test")})


def curve_of(folder: Path) -> list[dict[str, float]]:
    """How a training run went: step, train_loss and val_dice after each epoch."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {"step": int(row["step"]), **{name: round(float(row[name]), 4) for name in ("train_loss", "val_dice")}}
        for row in rows
    ]


def run_arm(
    arm: Arm,
    dataset: Dataset,
    fold: Fold,
    manifest: SplitManifest,
    place: Path,
    plan: Plan,
    progress: bool,
    said: Callable[[str], None],
) -> Path:
    """Train and score one arm on one fold, unless that was done; its result file."""
    options = budgeted(arm.recipe(plan.base, plan.guide), len(fold.train), plan.budget, plan.epochs)
    result = place / f"{arm.name}.json"
    asked = options.noted()
    if result.is_file():
        facts = json.loads(result.read_text())["facts"]
        # what `auto` came to depends on the machine; a result from another one still counts
        same = {**facts["options"], "precision": asked["precision"], "device": asked["device"]}
        if not options.equal(same) or facts["split_sha256"] != manifest.sha256:
            raise UserError(f"{result}: was made with other options or images; choose another --out")
        return result
    name = f"{dataset.name}, fold {fold.number}, {arm.title}"
    said(f"{name}: {options.epochs} epochs of {options.steps_per_epoch} steps")
    keep_freed_memory()
    start = time.perf_counter()
    train, val = ([dataset.subset(part)] for part in (fold.train, fold.val))
    model = fit(train, val, place / arm.name, options, progress=progress)
    trained_s = time.perf_counter() - start
    scores = evaluate(load(model, device=options.device, precision="fp32"), dataset.subset(fold.test))
    write_scores(result, scores, {
        "arm": arm.name, "title": arm.title, "dataset": dataset.name, "fold": fold.number, "options": asked,
        "split_sha256": manifest.sha256, "seed": options.seed, "training_seconds": round(trained_s, 1),
        "code": f"nuguide {__version__}", "torch": torch.__version__, "numpy": np.__version__,
        "threads": torch.get_num_threads(), "curve": curve_of(place / arm.name),
    })
    said(f"{name}: Dice {scores['dice'].mean():.3f}, AJI {scores['aji'].mean():.3f}, PQ {scores['pq'].mean():.3f}")
    return result
