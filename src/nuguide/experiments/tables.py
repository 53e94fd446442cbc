"""Result files to tables, Markdown and LaTeX: means and their spread over folds, differences paired by image."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluate import paired, read_scores
from ..types import UserError
from .specs import Experiment

METRICS = {"dice": "Dice", "iou": "IoU", "dice_weighted": "Dice, weighted", "iou_weighted": "IoU, weighted",
           "aji": "AJI", "pq": "PQ"}
BESIDE = {"annotator2": "second annotator", "annotator1_round2": "first annotator again",
          "classical": "classical: hematoxylin, Otsu, watershed"}


def only(rows: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows that hold these values in these columns."""
    kept = [rows[column].to_numpy() == value for column, value in values.items()]
    return rows.take(np.flatnonzero(np.logical_and.reduce(kept)))


def facts_of(result: Path) -> dict[str, Any]:
    """The facts in a result file; UserError where it is none."""
    try:
        facts = json.loads(result.read_text())["facts"]
        if {"arm", "fold", "seed"} <= set(facts):
            return facts
        missing = "facts of a run are missing"
    except (OSError, ValueError, LookupError, TypeError) as error:
        missing = str(error)
    raise UserError(f"{result}: is no result of a run ({missing}); remove it to run that arm anew")


def result_files(out: Path, experiment: Experiment) -> dict[str, list[Path]]:
    """The result files of each arm of an experiment, by set and fold.

    Sets where one arm alone was run are left out if others have more: an arm that experiments share is then there for
    another one's sake.
    """
    files = {arm.name: sorted(out.glob(f"*/fold*/{arm.name}.json")) for arm in experiment.arms}
    arms = Counter(name for of_arm in files.values() for name in {file.parts[-3] for file in of_arm})
    least = min(2, max(arms.values(), default=0))
    return {arm: [file for file in of_arm if arms[file.parts[-3]] >= least] for arm, of_arm in files.items()}


def results(out: Path, experiment: Experiment) -> pd.DataFrame:
    """The image rows of the result files of an experiment: those of `Scores`, and set, arm, fold and seed."""
    tables = []
    for of_arm in result_files(out, experiment).values():
        for file in of_arm:
            facts = facts_of(file)
            same = {name: facts[name] for name in ("arm", "fold", "seed")}
            tables.append(read_scores(file).assign(set=file.parts[-3], **same))
    nothing = pd.DataFrame(columns=pd.Index(["set", "arm", "fold", *METRICS]))
    return pd.concat(tables, ignore_index=True) if tables else nothing


def curves(out: Path, experiment: Experiment) -> pd.DataFrame:
    """How the runs of an experiment went: set, arm, fold, step, train_loss, val_dice, one row an epoch."""
    rows = []
    for arm, of_arm in result_files(out, experiment).items():
        for file in of_arm:
            facts = facts_of(file)
            where = {"set": file.parts[-3], "arm": arm, "fold": facts["fold"]}
            rows += [where | epoch for epoch in facts.get("curve", ())]
    return pd.DataFrame(rows, columns=pd.Index(["set", "arm", "fold", "step", "train_loss", "val_dice"]))


def summary(rows: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """One row an arm and set: the mean over images of each metric, and the deviation of the folds' means.

    Columns: set, arm, title, images, folds, each of `METRICS` and METRIC_sd, printed_dice, printed_iou. The deviation
    is NaN where there is one fold, the printed figures where none is printed.
    """
    lines = []
    for set_name in sorted(rows["set"].unique()):
        for arm in experiment.arms:
            of_arm = only(rows, set=set_name, arm=arm.name)
            if of_arm.empty:
                continue
            line: dict = {"set": set_name, "arm": arm.name, "title": arm.title, "images": len(of_arm)}
            line["folds"] = of_arm["fold"].nunique()
            for metric in METRICS:
                line[metric] = of_arm[metric].mean()
                folds = [only(of_arm, fold=fold)[metric].to_numpy() for fold in of_arm["fold"].unique()]
                means = np.array([float(values.mean()) for values in folds])
                line[f"{metric}_sd"] = means.std(ddof=1) if len(means) > 1 else float("nan")
            printed = experiment.printed.get(arm.name, {}).get(set_name, (None, None))
            line["printed_dice"], line["printed_iou"] = (float("nan") if p is None else p for p in printed)
            lines.append(line)
    return pd.DataFrame(lines)


def differences(rows: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """Each arm minus the reference, image by image, on the images that both were tested on.

    Columns: set, arm, title, metric, difference, low, high (95% bootstrap interval; whole organs, patients or sources
    are drawn), better, worse, n.
    """
    lines = []
    for set_name in sorted(rows["set"].unique()):
        reference = only(rows, set=set_name, arm=experiment.reference)
        for arm in experiment.arms:
            of_arm = only(rows, set=set_name, arm=arm.name)
            shared = sorted(set(of_arm["id"]) & set(reference["id"]))
            if arm.name == experiment.reference or not shared:
                continue
            pair = [part.take(np.flatnonzero(np.isin(part["id"], shared))) for part in (of_arm, reference)]
            lines.append(paired(*pair, by_group=True).assign(set=set_name, arm=arm.name, title=arm.title))
    if not lines:
        names = ["set", "arm", "title", "metric", "difference", "low", "high", "better", "worse"]
        return pd.DataFrame(columns=pd.Index(names))
    return pd.concat(lines, ignore_index=True)


def standing_beside(folder: Path, set_name: str, ids: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """Title and image rows of people and the classical method on these images, of what `beside` wrote into a folder."""
    files = {title: folder / f"{who}.{set_name}.json" for who, title in BESIDE.items()}
    found = {title: read_scores(file) for title, file in files.items() if file.is_file()}
    return [(title, rows.take(np.flatnonzero(np.isin(rows["id"], ids)))) for title, rows in found.items()]


def cell(mean: float, spread: float) -> str:
    """0.812 or, where there are folds, 0.812 ± 0.021."""
    return f"{mean:.3f}" if pd.isna(spread) else f"{mean:.3f} ± {spread:.3f}"


def markdown(rows: pd.DataFrame, experiment: Experiment, beside: Path | None = None) -> str:
    """The table of an experiment, one part a set, and the paired differences below it.

    Args:
        beside: folder of what `nuguide-experiments beside` wrote: rows of people and of the classical method are added.
    """
    parts = []
    table, apart = summary(rows, experiment), differences(rows, experiment)
    for set_name in table["set"].unique() if len(table) else []:
        head = ["arm", "images", "folds", *METRICS.values(), "printed Dice", "printed mIoU"]
        lines = [f"**{set_name}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in only(table, set=set_name).to_dict("records"):
            cells = [cell(row[metric], row[f"{metric}_sd"]) for metric in METRICS]
            printed = ["" if pd.isna(row[name]) else f"{row[name]:.3f}" for name in ("printed_dice", "printed_iou")]
            lines.append(f"| {' | '.join([row['title'], str(row['images']), str(row['folds']), *cells, *printed])} |")
        ids = sorted(set(only(rows, set=set_name)["id"]))
        for title, others in standing_beside(beside, set_name, ids) if beside else []:
            cells = [f"{others[metric].mean():.3f}" for metric in METRICS]
            lines.append(f"| {title} | {len(others)} |  | {' | '.join(cells)} |  |  |")
        of_set = only(apart, set=set_name)
        if len(of_set):
            reference = experiment.arm(experiment.reference).title
            lines += ["", f"Minus {reference}, image by image:", "", "| arm | Dice | AJI | PQ |", "|---|---|---|---|"]
            for title in of_set["title"].unique():
                spans = {
                    row["metric"]: f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
                    for row in only(of_set, title=title).to_dict("records")
                }
                lines.append(f"| {title} | {spans['dice']} | {spans['aji']} | {spans['pq']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def latex(rows: pd.DataFrame, experiment: Experiment, beside: Path | None = None) -> str:
    """The table as a LaTeX tabular for booktabs: arms down, and for each set Dice, IoU, AJI, PQ and the printed Dice.

    Args:
        beside: as of `markdown`.
    """
    table = summary(rows, experiment)
    sets = list(table["set"].unique()) if len(table) else []
    shown = ("dice", "iou", "aji", "pq")
    heads = [*(METRICS[metric] for metric in shown), "printed Dice"]
    body = [[escaped(arm.title)] for arm in experiment.arms]
    others = {title: [escaped(title)] for title in BESIDE.values()} if beside else {}
    for set_name in sets:
        for line, arm in zip(body, experiment.arms, strict=True):
            found = only(table, set=set_name, arm=arm.name).to_dict("records")
            cells = [cell(found[0][metric], found[0][f"{metric}_sd"]) for metric in shown] if found else ["--"] * 4
            printed = experiment.printed.get(arm.name, {}).get(set_name, (None,))[0]
            line += [*(text.replace("±", r"$\pm$") for text in cells), "--" if printed is None else f"{printed:.3f}"]
        ids = sorted(set(only(rows, set=set_name)["id"]))
        known = dict(standing_beside(beside, set_name, ids)) if beside else {}
        for title, line in others.items():
            means = [f"{known[title][metric].mean():.3f}" for metric in shown] if title in known else ["--"] * 4
            line += [*means, "--"]
    columns = "r" * len(heads) * len(sets)
    return "\n".join([
        rf"\begin{{tabular}}{{l{columns}}}", r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{{len(heads)}}}{{c}}{{{escaped(name)}}}" for name in sets)]) + r" \\",
        " & ".join(["", *heads * len(sets)]) + r" \\", r"\midrule",
        *(" & ".join(line) + r" \\" for line in [*body, *others.values()]),
        r"\bottomrule", r"\end{tabular}",
    ]) + "\n"


def escaped(text: str) -> str:
    """Text for LaTeX."""
    return "".join(f"\\{character}" if character in "&%$#_{}" else character for character in text)
