"""Writes the tables of README.md, docs/ and the model card from the result files, between their markers.

    python benchmarks/report.py            # rewrite
    python benchmarks/report.py --check    # exit 1 where a table differs from its result files

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES. Result files are what
`nuguide evaluate --out` and the benchmarks print.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nuguide.evaluate import interval, paired, read_scores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = ("README.md", "docs/results.md", "docs/slides.md", "src/nuguide/models/default/README.md")
SETS = {
    "nuinsseg": "NuInsSeg, organs held out",
    "tnbc": "TNBC, slides held out",
    "cryonuseg": "CryoNuSeg, never trained on",
    "monuseg": "MoNuSeg, never trained on",
}
METRICS = {"dice": "Dice", "aji": "AJI", "pq": "PQ", "dice_weighted": "weighted F1"}
BESIDE = {
    "annotator2": "CryoNuSeg: second annotator",
    "annotator1_round2": "CryoNuSeg: the first annotator again",
    "classical": "CryoNuSeg: hematoxylin, Otsu, watershed",
}


def scores(model: str) -> pd.DataFrame:
    """All image rows of a model's result files."""
    return pd.concat([read_scores(file) for file in sorted(RESULTS.glob(f"{model}.*.json"))], ignore_index=True)


def of_set(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of one data set."""
    return table.query(f"dataset == {name!r}")


def with_interval(values: np.ndarray) -> str:
    """Mean and 95% interval."""
    low, high = interval(values)
    return f"{values.mean():.3f} ({low:.3f}-{high:.3f})"


def accuracy() -> str:
    """The default model on every set."""
    table = scores("default")
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


def guidance() -> str:
    """Guided minus unguided, image by image."""
    return difference("default", "unguided")


def flips() -> str:
    """The default model with --flips minus without, image by image."""
    return difference("flips", "default")


def difference(one: str, other: str) -> str:
    """One model's scores minus another's, image by image."""
    guided, plain = scores(one), scores(other)
    lines = ["| set | images | Dice | AJI | PQ |", "|---|---|---|---|---|"]
    for name, title in SETS.items():
        rows = paired(of_set(guided, name), of_set(plain, name)).set_index("metric")
        cells = []
        for metric in ("dice", "aji", "pq"):
            row = rows.loc[metric]
            span = f"{row['low']:+.3f} to {row['high']:+.3f}"
            cells.append(f"{row['difference']:+.3f} ({span}), {int(row['better'])} up {int(row['worse'])} down")
        lines.append(f"| {title} | {rows['n'].iloc[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def groups() -> str:
    """The default model on each held-out organ and slide, and the Dice of what stands beside it."""
    table, beside = scores("default"), {"unguided": scores("unguided"), "classical": scores("classical")}
    lines = ["| group | images | Dice | AJI | PQ | Dice, unguided | Dice, classical |", "|---" * 7 + "|"]
    table = table[table["dataset"].isin(["nuinsseg", "tnbc"])]
    for (dataset, group), rows in table.groupby(["dataset", "group"]):  # pyright: ignore[reportGeneralTypeIssues]
        cells = [rows[metric].mean() for metric in ("dice", "aji", "pq")]
        for others in beside.values():
            same = of_set(others, str(dataset))
            cells.append(same.take(np.flatnonzero(np.isin(same["id"], rows["id"].tolist())))["dice"].mean())
        lines.append(f"| {dataset}: {group} | {len(rows)} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


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
    """One run, scored with the average of its weights and with the weights themselves."""
    file = RESULTS / "ema.json"
    steps, table = json.loads(file.read_text())["facts"]["steps"], read_scores(file)
    heads = ("steps", "set", "Dice: average", "Dice: weights", "difference", "AJI: difference", "PQ: difference")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for at in steps:
        for dataset in ("tnbc", "nuinsseg"):
            rows = of_set(table.query(f"steps == {at}"), dataset)
            own, plain = (rows.query(f"weights == {which!r}").set_index("id") for which in ("average", "last"))
            cells = [f"{own['dice'].mean():.3f}", f"{plain['dice'].mean():.3f}"]
            for metric in ("dice", "aji", "pq"):
                difference = (own[metric] - plain[metric]).to_numpy()
                low, high = interval(difference)
                cells.append(f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})")
            lines.append(f"| {at} | {SETS[dataset]} | " + " | ".join(cells) + " |")
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
                lines.append(f"| {width:,} x {height:,} | {called} | {run['seconds']:.0f} | {run['peak_mb']:,} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy, "guidance": guidance, "groups": groups, "screen": screen, "speed": speed, "seams": seams,
    "training": training, "flips": flips, "precision": precision, "instances": instances, "floods": floods,
    "average": average,
    "slide_growth": slide_growth, "slide_seams": slide_seams, "slide_beside": slide_beside,
}


def rewritten(page: str) -> str:
    """The page with every table made anew."""
    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / name for name in PAGES):
        old = path.read_text()
        new = rewritten(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new)
    if stale:
        print("differs from the result files: " if check else "rewritten: ", ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
