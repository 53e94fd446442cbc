"""How far the probability of a nucleus can be trusted, before and after it is calibrated, and what agreement tells.

    python benchmarks/confidence.py DATA             # a line of JSON a set; results/confidence.small.json, the picture
    python benchmarks/confidence.py DATA --install   # and the coefficients into the model's config.json
    python benchmarks/confidence.py DATA --model small-unguided --unseen    # results/confidence.small-unguided.json

DATA holds nuinsseg, tnbc, dsb_he, cryonuseg and monuseg. The coefficients are fitted on the validation images of the
shipped models (results/split.json), as `nuguide train` does. Nuclei of these images are scored by a fit that saw
nothing of their organ or slide; those of the other sets by the fit of all. "Before" is the mean of the nucleus map over
a nucleus, "after" the calibrated probability. A nucleus is matched where its IoU with an annotated one exceeds 0.5, at
the image's own size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from nuguide import checkpoint, zoo
from nuguide.batches import picture
from nuguide.calibrate import Judged, confidence_of, judged
from nuguide.cli import validation_part
from nuguide.confidence import FEATURES, agreement, calibration_error, chance, clarity, features, reliability
from nuguide.datasets import Dataset, read_dataset
from nuguide.export import replacing
from nuguide.instances import enlarge
from nuguide.metrics import best_overlap
from nuguide.nuclei import Nuclei
from nuguide.predict import Predictor, load
from nuguide.resample import resize_map
from nuguide.types import Sample

ROOT = Path(__file__).resolve().parents[1]
VALIDATION, UNSEEN = ("nuinsseg", "tnbc", "dsb_he"), ("cryonuseg", "monuseg")
TITLES = {"nuinsseg": "NuInsSeg, organ left out", "tnbc": "TNBC, slide left out", "dsb_he": "DSB2018, group left out",
          "cryonuseg": "CryoNuSeg, never trained on", "monuseg": "MoNuSeg, never trained on"}


def found_in(sample: Sample, predictor: Predictor, maps: np.ndarray, views: Sequence[np.ndarray] = ()) -> pd.DataFrame:
    """The nuclei of an image, one a row: `FEATURES`, before, matched, and agreement where there are views."""
    labels = predictor.label(*maps)
    fine = enlarge(labels, maps[0], sample.labels.shape, predictor.separation.nucleus)  # pyright: ignore
    nuclei = Nuclei.found(fine, sample.image_rgb, resize_map(maps[0], fine.shape), sample.mpp)  # pyright: ignore
    index = nuclei.table["id"].to_numpy() - 1
    values = features(nuclei.table, clarity(labels, maps[1])[index])
    rows = pd.DataFrame(dict(zip(FEATURES, values.T, strict=True)))
    rows["before"] = nuclei.table["probability"]
    if len(views):
        rows["agreement"] = agreement(labels, [predictor.label(*view) for view in views])[index]
    scored, iou = best_overlap(sample.labels, nuclei.labels, sample.ignore)
    kept = np.isin(index + 1, scored)
    return rows[kept].assign(matched=iou > 0.5, group=sample.group)


def of_images(part: Dataset, predictor: Predictor) -> tuple[list[Judged], list[pd.DataFrame], list[pd.DataFrame]]:
    """Of each image of a validation part: what `calibrate` sees of it, its nuclei, and those found with flips."""
    seen, plain, flipped = [], [], []
    predictor.flips = True
    for number, sample in enumerate(part):
        views: list[np.ndarray] = []
        mean = predictor.probabilities(predictor.prepared(sample.image_rgb, sample.mpp), each=views.append)
        drawn = picture(sample, predictor.spec.mpp, predictor.spec.exposure)
        seen.append(judged(predictor, drawn, views[0]))
        plain.append(found_in(sample, predictor, views[0]))
        flipped.append(found_in(sample, predictor, mean, views))
        told(part.name, number + 1, len(part))
    predictor.flips = False
    return seen, plain, flipped


def told(name: str, done: int, images: int) -> None:
    """A line on the terminal every tenth image."""
    if done % 10 == 0 or done == images:
        print(f"{name}: {done} of {images} images", file=sys.stderr, flush=True)


def auroc(score: np.ndarray, matched: np.ndarray) -> float:
    """The chance that a matched nucleus scores higher than one that is not, ties counting half (Mann and Whitney)."""
    rank = pd.Series(score).rank().to_numpy()
    hits, others = int(matched.sum()), int((~matched).sum())
    return float((rank[matched].sum() - hits * (hits + 1) / 2) / (hits * others))


def judgment(rows: pd.DataFrame) -> dict:
    """Errors and curves before and after, of nuclei with `before`, `after` and `matched`."""
    matched = rows["matched"].to_numpy(bool)
    result: dict = {"images": len(set(rows["image"])), "nuclei": len(rows), "matched": round(matched.mean(), 4)}
    for name in ("before", "after"):
        values = rows[name].to_numpy(float)
        bins = reliability(values, matched)
        result[name] = {
            "ece": round(calibration_error(bins), 4),
            "brier": round(float(((values - matched) ** 2).mean()), 4),
            "auroc": round(auroc(values, matched), 4),
            "mean": round(float(values.mean()), 4),
            "bins": [[one.nuclei, round(one.probability, 4), round(one.matched, 4)] for one in bins],
        }
    if "agreement" in rows:
        result["agreement"] = {"auroc": round(auroc(rows["agreement"].to_numpy(), matched), 4),
                               "mean": round(float(rows["agreement"].to_numpy().mean()), 4)}
    return result


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The nuclei of several images, with the number of their image."""
    return pd.concat([table.assign(image=number) for number, table in enumerate(tables)], ignore_index=True)


def validated(parts: Sequence[Dataset], predictor: Predictor) -> tuple[dict[str, float], dict]:
    """The coefficients of all validation images, and the judgment of each set by fits that leave its groups out."""
    by_part = [of_images(part, predictor) for part in parts]
    pictures = [picture(sample, predictor.spec.mpp) for part in parts for sample in part]
    groups = [f"{part.name}/{group}" for part in parts for group in part.groups]
    pictures = [dataclasses.replace(drawn, group=group) for drawn, group in zip(pictures, groups, strict=True)]
    seen = [one for found, _, _ in by_part for one in found]
    fits = {}
    for group in dict.fromkeys(groups):
        others = [i for i, name in enumerate(groups) if name != group]
        fits[group] = confidence_of([pictures[i] for i in others], [seen[i] for i in others])
    result: dict = {}
    for part, (_, plain, flipped) in zip(parts, by_part, strict=True):
        for suffix, tables in (("", plain), (" flips", flipped)):
            rows = joined(tables)
            for group, some in rows.groupby("group"):
                values = some[list(FEATURES)].to_numpy()
                rows.loc[some.index, "after"] = chance(values, fits[f"{part.name}/{group}"])
            result[part.name + suffix] = judgment(rows)
    return confidence_of(pictures, seen), result


def unseen(part: Dataset, predictor: Predictor, coefficients: dict[str, float]) -> dict:
    """The judgment of a set that chose nothing."""
    tables = []
    for number, sample in enumerate(part):
        maps = predictor.probabilities(predictor.prepared(sample.image_rgb, sample.mpp))
        tables.append(found_in(sample, predictor, maps))
        told(part.name, number + 1, len(part))
    rows = joined(tables)
    return judgment(rows.assign(after=chance(rows[list(FEATURES)].to_numpy(), coefficients)))


def draw(judgments: dict, titles: dict[str, str], path: Path) -> None:
    """The reliability curves of each set, before and after."""
    figure = Figure(figsize=(3.1 * len(titles), 3.4), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for key, color in (("before", "tab:orange"), ("after", "tab:blue")):
            _, probability, matched = np.array(judgments[name][key]["bins"]).T
            label = f"{key}, ECE {judgments[name][key]['ece']:.3f}"
            axes.plot(probability, matched, marker="o", markersize=3, color=color, label=label)
        axes.set(title=f"{title}\n{judgments[name]['nuclei']:,} nuclei", xlabel="probability", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("share that was annotated too")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="small", choices=zoo.names())
    parser.add_argument("--install", action="store_true", help="write the coefficients into the model")
    parser.add_argument("--unseen", nargs="*", default=UNSEEN, help="sets that choose nothing")
    parser.add_argument("--out", type=Path, help="results/confidence.MODEL.json")
    parser.add_argument("--picture", type=Path, help="docs/images/reliability.MODEL.png; none with no --unseen")
    options = parser.parse_args()
    torch.set_num_threads(1)
    predictor = load(options.model, device="cpu", precision="fp32")
    split = ROOT / "results" / "split.json"
    parts = [validation_part(read_dataset(name, options.data / name), split) for name in VALIDATION]
    coefficients, judgments = validated(parts, predictor)
    for name in options.unseen:
        judgments[name] = unseen(read_dataset(name, options.data / name), predictor, coefficients)
    for name, found in judgments.items():
        print(json.dumps({"benchmark": "confidence", "set": name, **found}))
    document = {"model": options.model, "precision": "fp32", "coefficients": coefficients, "sets": judgments}
    with replacing(options.out or ROOT / "results" / f"confidence.{options.model}.json") as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())
    if options.unseen or options.picture:
        picture_path = options.picture or ROOT / "docs" / "images" / f"reliability.{options.model}.png"
        draw(judgments, {name: title for name, title in TITLES.items() if name in judgments}, picture_path)
    if options.install:
        folder = checkpoint.model_folder(options.model)
        spec = dataclasses.replace(checkpoint.read_spec(folder), confidence=coefficients)
        with replacing(folder / checkpoint.CONFIG) as file:
            file.write((json.dumps(dataclasses.asdict(spec), indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
