"""Writes the tables of README.md, docs/ and the model cards, and each model's scores.json, from the result files.

    python benchmarks/report.py            # rewrite
    python benchmarks/report.py --check    # exit 1 where a table or score differs from its result files

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES. Of those that tell of one model,
such as `accuracy`, a model's name may follow it; of `experiments` an experiment's, of `cross_validated` a set's. Result
files are what `nuguide evaluate --out`, `nuguide-experiments run` and the benchmarks write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import robustness
from nuguide import zoo
from nuguide.evaluate import interval, paired, read_scores
from nuguide.experiments.specs import experiment
from nuguide.experiments.tables import facts_of, markdown, only, results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
EARLIER = RESULTS / "earlier"
ARMS = RESULTS / "experiments"              # of the papers' experiments
BY_STEPS = {200: EARLIER / "experiments_200", 600: EARLIER / "experiments_600", 1200: ARMS}     # NuInsSeg's, by length
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(zoo.MODELS.glob(f"*/{zoo.CARD}")))
RESULTS_OF = {"small": "default", "small-unguided": "unguided"}      # result files not called as the model is
SETS = {
    "nuinsseg": "NuInsSeg, organs held out",
    "tnbc": "TNBC, slides held out",
    "dsb_he": "DSB2018, stained, groups held out",
    "cryonuseg": "CryoNuSeg, never trained on",
    "monuseg": "MoNuSeg, never trained on",
}
AIMS = (        # file of scores, set, title, and Dice, AJI and PQ to reach
    ("default.val", "tnbc", "TNBC, slides held out", 0.83, 0.65, 0.62),
    ("default.cryonuseg", "cryonuseg", "CryoNuSeg, never trained on", 0.79, 0.541, 0.509),
    ("default.monuseg", "monuseg", "MoNuSeg, never trained on", 0.80, 0.58, 0.54),
    ("cv.cryonuseg", "cryonuseg", "CryoNuSeg in cross-validation", 0.82, 0.58, 0.55),
)
METRICS = {"dice": "Dice", "aji": "AJI", "pq": "PQ", "dice_weighted": "weighted F1"}
BESIDE = {
    "annotator2": "CryoNuSeg: second annotator",
    "annotator1_round2": "CryoNuSeg: the first annotator again",
    "classical": "CryoNuSeg: hematoxylin, Otsu, watershed",
}


def scores(model: str) -> pd.DataFrame:
    """All image rows of the result files of a model, or of what stands beside the models."""
    model = RESULTS_OF.get(model, model)
    return pd.concat([read_scores(file) for file in sorted(RESULTS.glob(f"{model}.*.json"))], ignore_index=True)


def of_set(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one data set."""
    return table.query(f"dataset == {name!r}")


def with_interval(values: np.ndarray) -> str:
    """Mean and 95% interval."""
    low, high = interval(values)
    return f"{values.mean():.3f} ({low:.3f}-{high:.3f})"


def accuracy(model: str = "small") -> str:
    """A model on every set."""
    table = scores(model)
    lines = ["| set | images | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for name, title in SETS.items():
        rows = of_set(table, name)
        cells = [with_interval(rows[metric].to_numpy()) for metric in METRICS]
        lines.append(f"| {title} | {len(rows)} | " + " | ".join(cells) + " |")
    for who, title in BESIDE.items():
        rows = read_scores(RESULTS / f"{who}.cryonuseg.json")
        cells = [f"{rows[metric].mean():.3f}" for metric in METRICS]
        lines.append(f"| {title} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aims() -> str:
    """What the default model was to reach, and how far it is from there."""
    lines = ["| set | aim: Dice | AJI | PQ | reached: Dice | AJI | PQ | reached minus aim: Dice | AJI | PQ |",
             "|---" * 10 + "|"]
    for file, name, title, *aimed in AIMS:
        rows = of_set(read_scores(RESULTS / f"{file}.json"), name)
        reached = [rows[metric].mean() for metric in ("dice", "aji", "pq")]
        apart = [f"{value - aim:+.3f}" for value, aim in zip(reached, aimed, strict=True)]
        lines.append(f"| {title} | {' | '.join([*(f'{value:.3f}' for value in (*aimed, *reached)), *apart])} |")
    return "\n".join(lines)


def guidance() -> str:
    """Guided minus unguided, image by image."""
    return difference("small", "small-unguided")


def flips() -> str:
    """The default model with --flips minus without, image by image."""
    return difference("flips", "small")


def debris() -> str:
    """Debris in training minus the same training without, image by image."""
    return difference("debris25", "debris0")


def crowd() -> str:
    """Copied nuclei in training minus the same training without, image by image."""
    return difference("crowd50", "crowd0")


def control(step: str = "fifth") -> str:
    """A step of the shipped models' training minus the same with a guide of random weights, image by image."""
    one = earlier("fourth_stage", "small") if step == "fourth" else scores({"fifth": "small"}.get(step, step))
    return differences_of(one, scores(f"{step}_random"))


def wider() -> str:
    """Twice the width, trained further, minus what it began as, image by image."""
    return differences_of(scores("wide"), earlier("fourth_stage", "small"))


def wide_guidance(step: str = "wide") -> str:
    """A step of the training at twice the width: guided minus unguided, image by image."""
    return difference(step, f"{step}_unguided")


def halfway(model: str = "small") -> str:
    """A model, what harder patches made of it, and the mean of the two, on changed pictures."""
    lines = robustness.read_lines(RESULTS / f"halfway.{model}.jsonl")
    levels = list(dict.fromkeys((line["perturbation"], line["level"]) for line in lines))
    titles = {"before": "before", "end": "after", "halfway": "the mean of the weights of both",
              "paler": "such a mean, patches paler and flatter"}
    heads = ["nothing" if kind == robustness.CLEAN else f"{robustness.PERTURBATIONS[kind].title}, {level:g}"
             for kind, level in levels]
    rows = [f"| Dice / AJI | {' | '.join(heads)} |", "|---" * (1 + len(levels)) + "|"]
    for name, title in titles.items():
        found = {(line["perturbation"], line["level"]): line for line in lines if line["model"] == name}
        if not found:
            continue
        cells = [f"{np.mean(found[level]['dice']):.3f} / {np.mean(found[level]['aji']):.3f}" for level in levels]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def base() -> str:
    """`base` minus the default model, image by image."""
    return difference("base", "small")


def earlier(stage: str, model: str) -> pd.DataFrame:
    """All image rows of what a model was after an earlier stage of its training."""
    return pd.concat([read_scores(file) for file in sorted(EARLIER.glob(f"{stage}.{model}.*.json"))], ignore_index=True)


def fourth(model: str = "small") -> str:
    """What the fourth stage of its training changed in a model, image by image."""
    return differences_of(earlier("fourth_stage", model), earlier("third_stage", model))


def fifth(model: str = "small") -> str:
    """What the fifth stage of its training changed in a model, image by image."""
    return differences_of(scores(model), earlier("fourth_stage", model))


def paler() -> str:
    """The fifth stage on paler and flatter patches minus the fifth stage as it was kept, image by image."""
    return difference("paler", "small")


def above() -> str:
    """The default model with --min-probability 0.3 minus without, image by image."""
    return difference("above", "small")


def difference(one: str, other: str) -> str:
    """One model's scores minus another's, image by image."""
    return differences_of(scores(one), scores(other))


def differences_of(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """Some image rows minus others, image by image, of each set that both hold."""
    lines = ["| set | images | Dice | AJI | PQ |", "|---|---|---|---|---|"]
    for name, title in SETS.items():
        both = set(of_set(one, name)["id"]) & set(of_set(other, name)["id"])
        if not both:
            continue
        pair = [of_set(rows, name).query(f"id in {sorted(both)!r}") for rows in (one, other)]
        lines.append(f"| {title} | {len(pair[0])} | " + " | ".join(paired_cells(*pair)) + " |")
    return "\n".join(lines)


def span(row: pd.Series) -> str:
    """A difference and its interval, of a row of `paired`."""
    return f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def paired_cells(one: pd.DataFrame, other: pd.DataFrame, *, by_group: bool = False) -> list[str]:
    """Dice, AJI and PQ of some image rows minus those of others, image by image; `by_group` as of `paired`."""
    rows = paired(one, other, by_group=by_group).set_index("metric")
    cells = []
    for metric in ("dice", "aji", "pq"):
        row = rows.loc[metric]
        cells.append(f"{span(row)}, {int(row['better'])} up {int(row['worse'])} down")
    return cells


def groups(model: str = "small") -> str:
    """A model on each held-out organ and slide, and the Dice of the other models and of the classical method."""
    table = scores(model)
    beside = {name: scores(name) for name in [*zoo.names(), "classical"] if name != model}
    lines = ["| group | images | Dice | AJI | PQ | " + " | ".join(f"Dice, {name}" for name in beside) + " |",
             "|---" * (5 + len(beside)) + "|"]
    table = table[table["dataset"].isin(["nuinsseg", "tnbc", "dsb_he"])]
    for (dataset, group), rows in table.groupby(["dataset", "group"]):  # pyright: ignore[reportGeneralTypeIssues]
        cells = [rows[metric].mean() for metric in ("dice", "aji", "pq")]
        for others in beside.values():
            same = of_set(others, str(dataset))
            cells.append(same.take(np.flatnonzero(np.isin(same["id"], rows["id"].tolist())))["dice"].mean())
        lines.append(f"| {dataset}: {group} | {len(rows)} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def models() -> str:
    """What comes with the package."""
    lines = ["| model | weights | guide | " + " | ".join(f"Dice, {title}" for title in SETS.values()) + " |",
             "|---" * (3 + len(SETS)) + "|"]
    for model in map(zoo.find, zoo.names()):
        table = scores(model.name)
        cells = [f"{of_set(table, name)['dice'].mean():.3f}" for name in SETS]
        name = f"`{model.name}`" + "".join(f" (`{alias}`)" for alias in model.aliases)
        size = f"{model.parameters / 1e6:.1f} million, {model.bytes / 1e6:.1f} MB"
        lines.append(f"| {name} | {size} | {model.guide or 'none'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_scores(model: str) -> dict[str, Any]:
    """What `nuguide models` shows of a model's scores: evaluation set -> mean, low and high of each metric."""
    table, found = scores(model), {}
    for name, title in SETS.items():
        rows = of_set(table, name)
        metrics = {metric: rows[metric].to_numpy() for metric in zoo.METRICS}
        found[name] = {"title": title, "images": len(rows)} | {
            metric: [round(float(value), 6) for value in (values.mean(), *interval(values))]
            for metric, values in metrics.items()
        }
    return found


def screen() -> str:
    """Short runs of every fusion, by validation Dice."""
    rows = json.loads((RESULTS / "fusion_screen.json").read_text())["runs"]
    lines = ["| arm | validation Dice | training loss |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['arm']} | {row['val_dice']:.3f} | {row['train_loss']:.3f} |")
    return "\n".join(lines)


def training() -> str:
    """Both arms of the default model's training."""
    lines = ["| arm | last epoch's loss | best validation Dice | its epoch |", "|---|---|---|---|"]
    for arm in json.loads((RESULTS / "training.json").read_text())["arms"]:
        best = max(arm["val_dice"])
        lines.append(f"| {arm['arm']} | {arm['train_loss'][-1]:.3f} | {best:.3f} | {arm['val_dice'].index(best) + 1} |")
    return "\n".join(lines)


def precision() -> str:
    """The same short trainings in fp32 and in bf16."""
    rows = json.loads((RESULTS / "precision.json").read_text())["runs"]
    lines = ["| precision | seed | validation Dice by epoch | last epoch's loss |", "|---|---|---|---|"]
    for row in rows:
        epochs = ", ".join(f"{value:.3f}" for value in row["val_dice"])
        lines.append(f"| {row['precision']} | {row['seed']} | {epochs} | {row['train_loss'][-1]:.3f} |")
    return "\n".join(lines)


def training_speed() -> str:
    """A training step in either precision."""
    found = json.loads((RESULTS / "training_speed.json").read_text())
    return "\n".join([
        "| width | patches, px | seconds a step: fp32 | bf16 | times as fast | one convolution |",
        "|---|---|---|---|---|---|",
        f"| {found['width']} | {found['batch']} x {found['patch_px']} | {found['seconds_a_step']['fp32']:.2f} | "
        f"{found['seconds_a_step']['bf16']:.2f} | {found['fp32_over_bf16']:.1f} | "
        f"{found['convolution_fp32_over_bf16']:.1f} |",
    ])


def speed() -> str:
    """Stages of `nuguide segment`."""
    found = json.loads((RESULTS / "speed.json").read_text())
    lines = ["| stage | seconds per megapixel | share |", "|---|---|---|"]
    for stage, seconds in found["seconds_per_megapixel"].items():
        lines.append(f"| {stage} | {seconds:.3f} | {100 * found['share'][stage]:.0f}% |")
    fast, plain = found["seconds"]["default"], found["seconds"]["plain"]
    text = (
        f"In all {fast} s in {found['network']['precision']} on {found['threads']} threads; the same model as plain "
        f"eager fp32 takes {plain} s, {found['times_faster']} times as long. Their label maps agree to a Dice of "
        f"{found['label_dice']}. The network runs at {100 * found['network']['share_of_peak']:.0f}% of this machine's "
        f"measured peak of {found['network']['precision']} convolutions. Peak memory {found['peak_memory_mb']} MB."
    )
    return "\n".join([*lines, "", text])


def seams() -> str:
    """Tiled against untiled."""
    lines = ["| tile, px at 0.5 mpp | PQ | lost: seams / elsewhere | split | merged |", "|---|---|---|---|---|"]
    for text in (RESULTS / "seams.jsonl").read_text().splitlines():
        row = json.loads(text)
        rates = [row[fate] for fate in ("lost", "split", "merged")]
        cells = [f"{100 * rate['seam']:.1f}% / {100 * rate['elsewhere']:.1f}%" for rate in rates]
        lines.append(f"| {row['tile_px']} | {row['pq']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def instances() -> str:
    """The designs that separate nuclei, trained alike, and what each scores over the interior map."""
    return designs("interior")


def floods() -> str:
    """What can be made of the shipped model's two maps, over what is made of them."""
    return designs("today")


def designs(against: str) -> str:
    """The designs on the same weights as `against`, or that were trained as it was, and their scores minus its own."""
    file = RESULTS / "instances.json"
    of_all, table = json.loads(file.read_text())["facts"]["designs"], read_scores(file)
    trained = of_all[against]["weights"] != "default"
    heads = ("design", "set", "AJI", "PQ", "F1", "AJI: difference", "PQ: difference", "seconds per megapixel")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, facts in of_all.items():
        if (facts["weights"] != "default") != trained:
            continue
        for dataset in ("tnbc", "nuinsseg"):
            rows = of_set(table, dataset)
            own, base = (rows.query(f"design == {which!r}").set_index("id") for which in (name, against))
            cells = [f"{own[metric].mean():.3f}" for metric in ("aji", "pq", "f1_50")]
            for metric in ("aji", "pq"):
                difference = (own[metric] - base[metric]).to_numpy()
                low, high = interval(difference)
                cells.append("" if name == against else f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})")
            seconds = f"{facts['seconds_per_megapixel']:.3f}"
            lines.append(f"| {facts['title']} | {SETS[dataset]} | " + " | ".join([*cells, seconds]) + " |")
    return "\n".join(lines)


def average() -> str:
    """What a training may keep, minus the average of its weights at its end."""
    table = read_scores(RESULTS / "ema.json")
    titles = {"weights": "the weights themselves", "best": "the average at the best epoch", "mean": "the mean of both"}
    lines = ["| training | set | minus the average at the end | Dice | AJI | PQ |", "|---|---|---|---|---|---|"]
    for run in table["run"].unique():
        for dataset in ("tnbc", "nuinsseg"):
            rows = of_set(table.query("run == @run"), dataset)
            for kept in [name for name in titles if name in set(rows["weights"])]:
                one, other = (rows.query("weights == @which").set_index("id") for which in (kept, "average"))
                cells = []
                for metric in ("dice", "aji", "pq"):
                    difference = (one[metric] - other[metric]).to_numpy()
                    low, high = interval(difference)
                    cells.append(f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})")
                lines.append(f"| {run} | {SETS[dataset]} | {titles[kept]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slide_lines(kind: str) -> list[dict[str, Any]]:
    """The lines of one part of the benchmark of slides."""
    rows = [json.loads(line) for line in (RESULTS / "slide.jsonl").read_text().splitlines()]
    return [row for row in rows if row["benchmark"] == f"slide {kind}"]


def slide_growth() -> str:
    """Time, shares and memory of slides of growing size."""
    lines = [
        "| network | slide, px | tissue, mm2 | nuclei found (drawn) | seconds per mm2 | read, network, nuclei, write "
        "| peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in slide_lines("growth"):
        height, width = row["slide_px"]
        shares = " / ".join(f"{100 * row['share'][stage]:.0f}%" for stage in ("read", "network", "nuclei", "write"))
        lines.append(
            f"| {row['network']} | {width:,} x {height:,} | {row['tissue_mm2']:.2f} | {row['nuclei']:,} "
            f"({row['nuclei_drawn']:,}) | {row['seconds_per_mm2']:.1f} | {shares} | {row['peak_mb']:,} |"
        )
    return "\n".join(lines)


def slide_seams() -> str:
    """Regions against one piece."""
    lines = ["| regions | nuclei | PQ | lost: seams / elsewhere | split | merged |", "|---|---|---|---|---|---|"]
    for row in slide_lines("seams"):
        rates = [row[fate] for fate in ("lost", "split", "merged")]
        cells = [f"{100 * rate['seam']:.1f}% / {100 * rate['elsewhere']:.1f}%" for rate in rates]
        lines.append(f"| {row['regions']} | {row['nuclei']:,} | {row['pq']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slide_beside() -> str:
    """Against the naive loop, and two workers against one."""
    lines = ["| slide, px | | seconds | peak memory, MB |", "|---|---|---|---|"]
    for kind, names in (("naive", {"ours": "nuguide segment", "naive": "a plain loop over tiles"}),
                        ("cluster", {"one": "Dask, one worker of one thread", "two": "Dask, two such workers"})):
        for row in slide_lines(kind):
            height, width = row["slide_px"]
            for key, called in names.items():
                run = row[key]
                seconds = "" if "note" in row else f"{run['seconds']:.0f}"
                lines.append(f"| {width:,} x {height:,} | {called} | {seconds} | {run['peak_mb']:,} |")
    return "\n".join(lines)


def quality() -> str:
    """What quality control finds, and what it reports of sound images."""
    result = json.loads((RESULTS / "quality.json").read_text())
    rows, false = result["found"], result["false"]
    lines = ["| defect | severity | copies | reported | sound images reported |", "|---|---|---|---|---|"]
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1]["kind"] != row["kind"]
        sound = f"{100 * false.get(row['kind'], 0):.1f}%" if first else ""
        kind = row["kind"] if first else ""
        lines.append(f"| {kind} | {row['severity']} | {row['copies']} | {100 * row['share']:.0f}% | {sound} |")
    cost = result["cpu_seconds"]
    text = (
        f"Of {result['images']} sound images {100 * false.get('any', 0):.1f}% are reported for anything at all. An "
        f"image of 2000 x 2000 px takes {1000 * cost['inspect']:.0f} ms of CPU, {100 * cost['share']:.1f}% of the "
        f"{cost['segment']:.2f} s that finding its nuclei takes in {result['precision']}."
    )
    return "\n".join([*lines, "", text])


def confidence(model: str = "small") -> str:
    """Errors of the probability of a nucleus, before and after it was calibrated."""
    found = json.loads((RESULTS / f"confidence.{model}.json").read_text())["sets"]
    lines = [
        "| set | images | nuclei | matched | mean probability, before / after | ECE, before / after "
        "| Brier score, before / after | AUROC, before / after |",
        "|---" * 8 + "|",
    ]
    for name, title in SETS.items():
        for suffix, said in (("", ""), (" flips", ", `--flips`")):
            if row := found.get(name + suffix):
                pairs = [
                    f"{row['before'][key]:.3f} / {row['after'][key]:.3f}" for key in ("mean", "ece", "brier", "auroc")
                ]
                share = f"{100 * row['matched']:.0f}%"
                lines.append(f"| {title}{said} | {row['images']} | {row['nuclei']:,} | {share} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def agreement() -> str:
    """How well three numbers tell matched nuclei from others, with --flips."""
    found = json.loads((RESULTS / "confidence.small.json").read_text())["sets"]
    head = ("set, `--flips`", "nuclei", "agreement", "probability, before", "probability, after")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, title in SETS.items():
        if row := found.get(f"{name} flips"):
            values = [row[key]["auroc"] for key in ("agreement", "before", "after")]
            lines.append(f"| {title} | {row['nuclei']:,} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def robust() -> str:
    """What the strongest levels of each perturbation change: all metrics of the default model, Dice of the others."""
    lines = robustness.read_lines(robustness.LINES)
    others = [name for name in dict.fromkeys(line["model"] for line in lines) if name != "small"]
    columns = [("small", metric) for metric in zoo.METRICS] + [(name, "dice") for name in others]
    heads = [f"{name}: {zoo.METRICS[metric]}" for name, metric in columns]
    rows = ["| changed | level | " + " | ".join(heads) + " |", "|---" * (2 + len(columns)) + "|"]
    clean = [f"{robustness.unchanged(lines, name, metric).mean():.3f}" for name, metric in columns]
    rows.append("| nothing | | " + " | ".join(clean) + " |")
    for kind, how in robustness.PERTURBATIONS.items():
        for level in (level for level in how.levels if robustness.strongest(kind, level)):
            cells = []
            for name, metric in columns:
                change = robustness.change(lines, name, kind, level, metric)
                low, high = interval(change)
                cells.append(f"{change.mean():+.3f} ({low:+.3f} to {high:+.3f})" if name == "small" else
                             f"{change.mean():+.3f}")
            rows.append(f"| {how.title}, {how.unit} | {level:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def sturdier(model: str = "small") -> str:
    """A model minus another at the strongest levels of each perturbation, image by image: the default model minus what
    it was before its fifth stage, any other minus the default model."""
    lines = robustness.read_lines(robustness.LINES)
    others = robustness.read_lines(EARLIER / "fourth_stage.robustness.jsonl") if model == "small" else lines
    rows = ["| changed | level | Dice | AJI | PQ |", "|---" * 5 + "|"]
    levels = [(kind, level) for kind, how in robustness.PERTURBATIONS.items() for level in how.levels]
    for kind, level in levels:
        if not robustness.strongest(kind, level):
            continue
        cells = []
        for metric in zoo.METRICS:
            one = robustness.curve(lines, model, kind, metric)[level]
            other = robustness.curve(others, "small", kind, metric)[level]
            low, high = interval(one - other)
            cells.append(f"{(one - other).mean():+.3f} ({low:+.3f} to {high:+.3f})")
        how = robustness.PERTURBATIONS[kind]
        rows.append(f"| {how.title}, {how.unit} | {level:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def robust_limits() -> str:
    """The levels at which each model's mean Dice is lower by more than 0.05."""
    lines = robustness.read_lines(robustness.LINES)
    names = list(dict.fromkeys(line["model"] for line in lines))
    rows = ["| changed | levels | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for kind, how in robustness.PERTURBATIONS.items():
        cells = []
        for name in names:
            falls = [f"{level:g}" for level in how.levels if
                     robustness.change(lines, name, kind, level).mean() < -robustness.MUCH]
            cells.append(", ".join(falls) or "none")
        levels = ", ".join(f"{level:g}" for level in how.levels)
        rows.append(f"| {how.title}, {how.unit} | {levels} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def experiments(name: str) -> str:
    """The arms of an experiment of the papers, and their differences."""
    chosen = experiment(name)
    return markdown(results(ARMS, chosen), chosen, RESULTS)


def unseen() -> str:
    """Guided minus not, at both widths, on CryoNuSeg and MoNuSeg, with intervals of organs and patients drawn whole."""
    pairs = {
        "`small` minus unguided": ("default", "unguided"),
        "`small` minus random weights": ("default", "fifth_random"),
        "`base` minus unguided": ("base", "base_unguided"),
        "`base` minus random weights": ("base", "base_random"),
    }
    lines = ["| set | groups | | Dice | AJI | PQ |", "|---" * 6 + "|"]
    for name in ("cryonuseg", "monuseg"):
        for title, files in pairs.items():
            one, other = (read_scores(RESULTS / f"{file}.{name}.json") for file in files)
            cells = " | ".join(paired_cells(one, other, by_group=True))
            lines.append(f"| {SETS[name]} | {one['group'].nunique()} | {title} | {cells} |")
    return "\n".join(lines)


def noise() -> str:
    """Arms whose guide knows something minus the same with a guide of random weights, image by image."""
    chosen = experiment("table3")
    lines = ["| set | steps | arm | images | Dice | AJI | PQ |", "|---" * 7 + "|"]
    for set_name, steps, folder in (("cryonuseg", 200, ARMS), *(("nuinsseg", n, BY_STEPS[n]) for n in (600, 1200))):
        rows = only(results(folder, chosen), set=set_name)
        for arm in chosen.arms:
            pair = [only(rows, arm=name) for name in (arm.name, f"{arm.name}_random")]
            if min(map(len, pair)):
                same = sorted(set(pair[0]["id"]) & set(pair[1]["id"]))
                one, other = (part.set_index("id").loc[same].reset_index() for part in pair)
                cells = " | ".join(paired_cells(one, other, by_group=True))
                lines.append(f"| {set_name} | {steps:,} | {arm.title} | {len(same)} | {cells} |")
    return "\n".join(lines)


class ArmRun(NamedTuple):
    """A run of an arm: its image rows, and its loss and validation Dice by epoch."""

    fold: int
    rows: pd.DataFrame
    curve: pd.DataFrame


def of_arms(folder: Path, set_name: str, folds: Sequence[int]) -> dict[str, list[ArmRun]]:
    """The runs of every arm of Tables 1 to 3 in these folds, by its title; arms that were run in none are left out."""
    found: dict[str, list[ArmRun]] = {}
    for arm in {arm.name: arm for table in ("table1", "table2", "table3") for arm in experiment(table).arms}.values():
        for fold in folds:
            file = folder / set_name / f"fold{fold}" / f"{arm.name}.json"
            if file.is_file():
                curve = pd.DataFrame(facts_of(file)["curve"])
                found.setdefault(arm.title, []).append(ArmRun(fold, read_scores(file), curve))
    return found


def minus_plain(arms: dict[str, list[ArmRun]], title: str) -> list[str]:
    """An arm minus the unguided one in the same folds: Dice, AJI and PQ with whole organs drawn, and Dice by fold.

    The unguided arm itself has empty cells.
    """
    chosen = experiment("table3")
    plain = chosen.arm(chosen.reference).title
    if title == plain:
        return [""] * 4
    reference = {run.fold: run.rows for run in arms[plain]}
    pairs = [(run.rows, reference[run.fold]) for run in arms[title]]
    one, other = (pd.concat(rows, ignore_index=True) for rows in zip(*pairs, strict=True))
    apart = paired(one, other, by_group=True).set_index("metric")
    folds = ", ".join(f"{one['dice'].mean() - other['dice'].mean():+.3f}" for one, other in pairs)
    return [*(span(apart.loc[metric]) for metric in ("dice", "aji", "pq")), folds]


def mean_dice(runs: list[ArmRun]) -> str:
    """The mean Dice of all images of some runs."""
    return f"{np.concatenate([run.rows['dice'].to_numpy() for run in runs]).mean():.3f}"


def lead() -> str:
    """NuInsSeg: the arms after 200, 600 and 1,200 steps, and each minus the unguided one in the same folds."""
    by_steps = {steps: of_arms(folder, "nuinsseg", range(3)) for steps, folder in BY_STEPS.items()}
    heads = ("arm", "steps", "folds", "Dice", "minus eU-Net3+: Dice", "AJI", "PQ", "Dice, fold by fold")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title in dict.fromkeys(title for arms in by_steps.values() for title in arms):
        for steps, arms in by_steps.items():
            if title in arms:
                cells = [f"{steps:,}", str(len(arms[title])), mean_dice(arms[title]), *minus_plain(arms, title)]
                lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def twice() -> str:
    """CryoNuSeg: the arms trained in fp32 by an earlier version, and again in bf16; each minus eU-Net3+ of its kind."""
    kinds = [of_arms(folder, "cryonuseg", range(5)) for folder in (EARLIER / "experiments_fp32", ARMS)]
    heads = ("arm", "Dice, fp32", "bf16", "Dice minus eU-Net3+, fp32", "bf16", "AJI minus it, fp32", "bf16")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title in kinds[0]:
        dice, aji, *_ = zip(*(minus_plain(arms, title) for arms in kinds), strict=True)
        cells = [*(mean_dice(arms[title]) for arms in kinds), *dice, *aji]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def patches() -> str:
    """CryoNuSeg, fold 0: the arms trained on patches of 256 px, two at a time, beside eight of 128 px at a time."""
    small, large = (of_arms(folder, "cryonuseg", [0]) for folder in (ARMS, RESULTS / "patches256"))
    lines = ["| arm | best validation Dice: 8 x 128 px / 2 x 256 px | its last 40 steps | Dice |",
             "|---" * 4 + "|"]
    for title in large:
        runs = (small[title][0], large[title][0])
        curves = [run.curve["val_dice"] for run in runs]
        cells = [" / ".join(f"{curve.max():.3f}" for curve in curves),
                 " / ".join(f"{curve.iloc[-1] - curve.iloc[-3]:+.3f}" for curve in curves),
                 " / ".join(f"{run.rows['dice'].mean():.3f}" for run in runs)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_the_end(runs: list[ArmRun]) -> list[str]:
    """Loss and validation Dice at the end of some runs, and how far they moved; the mean of the runs."""
    loss, dice = np.mean([run.curve[["train_loss", "val_dice"]].to_numpy() for run in runs], axis=0).T
    before = -1 - max(len(loss) // 5, 1)
    return [f"{loss[-1]:.3f}", f"{loss[0] - loss[-1]:.3f}", f"{loss[before] - loss[-1]:.3f}",
            f"{dice[-1]:.3f}", f"{dice[-1] - dice[before]:+.3f}"]


def levelling() -> str:
    """How far loss and validation Dice of each arm still moved at its end: 2 of 10 epochs, 1 of 6; mean over folds."""
    heads = ("loss at the end", "its fall in all", "at last", "validation Dice at the end", "its last change")
    lines = [f"| set | arm | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for set_name, folders in (("cryonuseg", [ARMS]), ("nuinsseg", [BY_STEPS[600], BY_STEPS[1200]])):
        lengths = [of_arms(folder, set_name, range(5)) for folder in folders]
        for title in dict.fromkeys(title for arms in lengths for title in arms):
            values = [at_the_end(arms[title]) if title in arms else ["–"] * len(heads) for arms in lengths]
            cells = (" / ".join(column) for column in zip(*values, strict=True))
            lines.append(f"| {set_name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gaps() -> str:
    """The default model trained further with gaps between nuclei weighted 1, 5 and 10 times."""
    tables = {weight: read_scores(RESULTS / f"gap{weight}.val.json") for weight in (1, 5, 10)}
    lines = ["| set | `--gap-weight` | F1 | Dice: minus 1 | AJI: minus 1 | PQ: minus 1 |", "|---" * 6 + "|"]
    for name in ("nuinsseg", "tnbc"):
        for weight, table in tables.items():
            part = of_set(table, name)
            cells = ["", "", ""] if weight == 1 else paired_cells(part, of_set(tables[1], name))
            lines.append(f"| {SETS[name]} | {weight} | {part['f1_50'].mean():.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stain() -> str:
    """Our stain normalization and torchstain's, on drawn tissue."""
    found = json.loads((RESULTS / "stain.json").read_text())["methods"]
    head = ("method", "difference, of 255", "angle of the stains, mean (worst)", "s/megapixel", "tiles it stumbles on")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in found.items():
        angle = f"{row['angle_mean_deg']:.1f}° ({row['angle_worst_deg']:.1f}°)" if "angle_mean_deg" in row else ""
        cells = [name, f"{row['difference']:.1f}", angle, f"{row['seconds_per_megapixel']:.2f}",
                 ", ".join(row["stumbles_on"]) or "none"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cross_validated(name: str) -> str:
    """A set, each group scored by a model that did not see it."""
    rows = read_scores(RESULTS / f"cv.{name}.json")
    classic = RESULTS / f"classical.{name}.json"
    plain = read_scores(classic).set_index("id") if classic.is_file() else None
    lines = ["| group | images | Dice | AJI | PQ | Dice, classical |", "|---|---|---|---|---|---|"]
    for group, some in [*rows.groupby("group"), ("all", rows)]:
        means = [some[metric].to_numpy() for metric in ("dice", "aji", "pq")]
        cells = [with_interval(part) if group == "all" else f"{part.mean():.3f}" for part in means]
        floor = "" if plain is None else f"{plain.loc[some['id'].tolist(), 'dice'].to_numpy().mean():.3f}"
        lines.append(f"| {group} | {len(some)} | {' | '.join(cells)} | {floor} |")
    return "\n".join(lines)


def further() -> str:
    """CryoNuSeg: the model trained further on it, minus the one that was not, and minus the second annotator."""
    trained = read_scores(RESULTS / "cv.cryonuseg.json")
    beside = {"the model it began with": read_scores(RESULTS / "default.cryonuseg.json"),
              "the third stage's model, so trained": read_scores(EARLIER / "third_stage_further.cryonuseg.json"),
              "the second annotator": read_scores(RESULTS / "annotator2.cryonuseg.json")}
    lines = ["| minus | Dice | AJI | PQ |", "|---|---|---|---|"]
    for title, other in beside.items():
        lines.append(f"| {title} | {' | '.join(paired_cells(trained, other))} |")
    return "\n".join(lines)


def errors() -> str:
    """What the errors of the default model are, and what they cost in Dice."""
    rows = [json.loads(line) for line in (RESULTS / "errors.jsonl").read_text().splitlines()]
    kinds = list(rows[0]["share"])
    head = ["set", "nuclei", *kinds, "invented, of those answered", "Dice", "of those seen", "outlined rightly"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        title = SETS[row["set"]] if row["model"] == "small" else f"CryoNuSeg: {row['model']}"
        shares = [f"{100 * share:.0f}%" for share in (*row["share"].values(), row["invented"])]
        dices = [f"{row[name]:.3f}" for name in ("dice", "of_those_seen", "outlined_rightly")]
        lines.append(f"| {title} | {row['nuclei']:,} | {' | '.join([*shares, *dices])} |")
    return "\n".join(lines)


def operations() -> str:
    """What each arm of the papers' experiments takes, and each experiment in all, by counted operations."""
    found = json.loads((RESULTS / "operations.json").read_text())["experiments"]
    lines = ["| arm | of | network, GFLOP | guide, GFLOP | hours, all sets |", "|---|---|---|---|---|"]
    arms = {arm["title"]: arm for table in found.values() for arm in table.values()}
    for title, arm in arms.items():
        within = [name for name, table in found.items() if any(other["title"] == title for other in table.values())]
        tables = ", ".join(f"`{name}`" for name in within)
        guide = f"{arm['guide_gflop']:,.0f}" if arm["guide_gflop"] else ""
        hours = sum(arm["hours"].values())
        lines.append(f"| {title} | {tables} | {arm['network_gflop']:.0f} | {guide} | {hours:.1f} |")
    for name, table in found.items():
        hours = sum(sum(arm["hours"].values()) for arm in table.values())
        lines.append(f"| all | `{name}` | | | {hours:.0f} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[..., str]] = {
    "accuracy": accuracy, "aims": aims, "guidance": guidance, "groups": groups, "screen": screen,
    "speed": speed, "seams": seams,
    "training": training, "flips": flips, "precision": precision, "training_speed": training_speed, "models": models,
    "confidence": confidence, "agreement": agreement, "above": above, "quality": quality,
    "debris": debris, "crowd": crowd, "wider": wider, "wide_guidance": wide_guidance, "halfway": halfway,
    "base": base, "fourth": fourth, "fifth": fifth, "paler": paler, "control": control,
    "instances": instances, "floods": floods, "average": average,
    "slide_growth": slide_growth, "slide_seams": slide_seams, "slide_beside": slide_beside,
    "robustness": robust, "robustness_limits": robust_limits, "sturdier": sturdier,
    "experiments": experiments, "cross_validated": cross_validated, "further": further,
    "errors": errors, "gaps": gaps, "stain": stain,
    "operations": operations, "unseen": unseen, "noise": noise, "lead": lead,
    "twice": twice, "patches": patches, "levelling": levelling,
}


def rewritten(page: str) -> str:
    """The page with every table made anew."""
    def table(match: re.Match[str]) -> str:
        name, *models = match[1].split()
        return f"<!-- table {match[1]} -->\n{TABLES[name](*models)}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w -]+?) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def wanted() -> dict[Path, str]:
    """Every file that is made here, wholly or in part, and its text."""
    pages = {page: rewritten(page.read_text()) for page in PAGES}
    shipped = {zoo.MODELS / name / zoo.SCORES: json.dumps(model_scores(name), indent=1) + "\n" for name in zoo.names()}
    return pages | shipped


def main() -> int:
    """Rewrite or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, new in wanted().items():
        if not path.is_file() or path.read_text() != new:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new)
    if stale:
        print("differs from the result files: " if check else "rewritten: ", ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
