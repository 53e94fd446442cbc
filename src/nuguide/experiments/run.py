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
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..datasets import Dataset, read_dataset
from ..datasets.splits import (
    Member,
    SplitManifest,
    grouped_folds,
    hold_out,
    members_of,
    own_split,
    read_manifest,
    write_members,
)
from ..evaluate import evaluate, write_scores
from ..guides import find_guide
from ..machine import choose_device, keep_freed_memory
from ..predict import load
from ..recipe import TrainOptions
from ..train import RESUME, fit
from ..types import UserError
from .specs import Arm, Experiment
from .tables import facts_of

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
        workers: that draw patches ahead, see `loaders.worker_count`.
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
    workers: int | None = None

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise UserError(f"--budget must be positive, not {self.budget}")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"--epochs must be 1 or more, not {self.epochs}")
        if self.folds < 2:
            raise UserError(f"--folds must be 2 or more, not {self.folds}")
        folds = 1 if self.split == "own" else self.folds
        if beyond := [number for number in self.only_folds if not 0 <= number < folds]:
            raise UserError(f"--only-folds {beyond[0]}: there are the folds 0 to {folds - 1}")


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
    divided = {name: divide(name, dataset.groups, plan) for name, dataset in sets.items()}
    find_guides(chosen, plan)
    files = []
    for set_name, dataset in sets.items():
        members = members_of(dataset)
        for fold in divided[set_name]:
            if plan.only_folds and fold.number not in plan.only_folds:
                continue
            place = out / set_name / f"fold{fold.number}"
            manifest = note_fold(place, members, fold)
            for arm in chosen:
                files.append(run_arm(arm, dataset, fold, manifest, place, plan, progress, said))
    return files


def find_guides(arms: Sequence[Arm], plan: Plan) -> None:
    """See that the weights of all guides are here, before hours go into the first arm; UserError lists what is not."""
    recipes = [arm.recipe(plan.base, plan.guide) for arm in arms]
    problems = []
    named = {(str(o.guide), o.guide_weights) for o in recipes if o.fusion != "none"}
    for name, weights in sorted(named, key=str):
        try:
            find_guide(name, weights)
        except (UserError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems) + "; or name the arms that need none of this with --arms")


def note_fold(place: Path, members: Sequence[Member], fold: Fold) -> SplitManifest:
    """Write split.json, or check that the one that is there says the same.

    Args:
        members: all images of the set, in its order.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place}: no folder can be made here ({error.strerror}); choose another --out") from error
    split = place / "split.json"
    wanted = {name: tuple(sorted(members[i] for i in getattr(fold, name))) for name in ("train", "val", "test")}
    if split.is_file():
        manifest = read_manifest(split)
        if manifest.parts != wanted:
            raise UserError(f"{split}: divides other images, or otherwise; choose another --out")
        return manifest
    return write_members(split, wanted)


def processor(device: str) -> str:
    """What a run computes on, in words."""
    if choose_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


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
        facts = facts_of(result)
        # what `auto` came to depends on the machine; a result from another one still counts
        same = {**facts.get("options", {}), "precision": asked["precision"], "device": asked["device"]}
        if not options.equal(same) or facts.get("split_sha256") != manifest.sha256:
            raise UserError(f"{result}: was made with other options or images; choose another --out")
        return result
    name = f"{dataset.name}, fold {fold.number}, {arm.title}"
    said(f"{name}: {options.epochs} epochs of {options.steps_per_epoch} steps")
    keep_freed_memory()
    begun = (place / arm.name / RESUME).is_file()
    start = time.perf_counter()
    train, val = ([dataset.subset(part)] for part in (fold.train, fold.val))
    model = fit(train, val, place / arm.name, options, progress=progress, workers=plan.workers)
    trained_s = time.perf_counter() - start
    scores = evaluate(load(model, device=options.device, precision="fp32"), dataset.subset(fold.test))
    write_scores(result, scores, {
        "arm": arm.name, "title": arm.title, "dataset": dataset.name, "fold": fold.number, "options": asked,
        "split_sha256": manifest.sha256, "seed": options.seed,
        "training_seconds": None if begun else round(trained_s, 1),      # of a run that was cut the rest is not known
        "trained_in": json.loads((place / arm.name / "options.json").read_text())["precision"],
        "code": f"nuguide {__version__}", "torch": torch.__version__, "numpy": np.__version__,
        "processor": processor(options.device), "threads": torch.get_num_threads(), "curve": curve_of(place / arm.name),
    })
    said(f"{name}: Dice {scores['dice'].mean():.3f}, AJI {scores['aji'].mean():.3f}, PQ {scores['pq'].mean():.3f}")
    return result
