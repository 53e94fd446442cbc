"""The papers' figures from result files and models, and one more: the paired differences with their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..datasets import read_dataset
from ..export import replacing
from ..guides import FrozenGuide
from ..latents import compute
from ..measure import outlines
from ..predict import load
from .specs import Experiment
from .tables import METRICS, differences, only, summary

TRUTH_RGB, FOUND_RGB = (255, 221, 0), (0, 230, 64)
DPI = 150


def save(figure: Figure, path: Path) -> Path:
    """The figure as PNG, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
    return path


def titled(experiment: Experiment, arms: list[str]) -> list[str]:
    """The titles of arms, broken into lines."""
    return [experiment.arm(name).title.replace(", ", ",\n") for name in arms]


def bars(rows: pd.DataFrame, experiment: Experiment, metric: str = "dice") -> Figure:
    """Figure 3: the mean of each arm on each set, and the deviation of the folds' means."""
    table = summary(rows, experiment)
    sets, arms = list(table["set"].unique()), [arm.name for arm in experiment.arms if arm.name in set(table["arm"])]
    figure = Figure(figsize=(4 + 0.5 * len(arms) * len(sets), 4), layout="constrained")
    axes: Axes = figure.subplots()
    width = 0.8 / max(len(arms), 1)
    for index, name in enumerate(arms):
        of_arm = only(table, arm=name).set_index("set").reindex(sets)
        places = np.arange(len(sets)) + (index - (len(arms) - 1) / 2) * width
        axes.bar(places, of_arm[metric], width, yerr=of_arm[f"{metric}_sd"].fillna(0), capsize=2,
                 label=experiment.arm(name).title)
    axes.set_xticks(range(len(sets)), sets)
    axes.set(ylabel=METRICS[metric], title=experiment.title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def violins(rows: pd.DataFrame, experiment: Experiment, metric: str = "dice") -> Figure:
    """Figure 4: how an arm's images are distributed, one panel a set; the mean is dotted."""
    sets = sorted(rows["set"].unique())
    figure = Figure(figsize=(2 + 3.5 * len(sets), 4), layout="constrained")
    for axes, set_name in zip(np.atleast_1d(figure.subplots(1, len(sets), sharey=True)), sets, strict=True):
        of_set = only(rows, set=set_name)
        arms = [arm.name for arm in experiment.arms if arm.name in set(of_set["arm"])]
        values = [only(of_set, arm=name)[metric].to_numpy() for name in arms]
        axes.violinplot(values, showextrema=False)
        for place, scores in enumerate(values, 1):
            axes.hlines(scores.mean(), place - 0.25, place + 0.25, linestyles="dotted", colors="black")
        axes.set_xticks(range(1, len(arms) + 1), titled(experiment, arms), rotation=45, ha="right", fontsize=7)
        axes.set_title(set_name)
        axes.grid(axis="y", alpha=0.3)
    figure.supylabel(f"{METRICS[metric]} of an image")
    return figure


def forest(rows: pd.DataFrame, experiment: Experiment, metrics: tuple[str, ...] = ("dice", "aji", "pq")) -> Figure:
    """Each arm minus the reference, paired by image: mean and 95% interval of `differences`, one panel a metric."""
    table = differences(rows, experiment)
    sets = sorted(table["set"].unique())
    arms = [arm.name for arm in experiment.arms if arm.name in set(table["arm"])]
    figure = Figure(figsize=(3 + 2.5 * len(metrics), 1.5 + 0.35 * len(arms) * len(sets)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics), sharey=True))
    height = 0.7 / max(len(sets), 1)
    for axes, metric in zip(panels, metrics, strict=True):
        for index, set_name in enumerate(sets):
            part = only(table, metric=metric, set=set_name).set_index("arm").reindex(arms)
            places = np.arange(len(arms)) + (index - (len(sets) - 1) / 2) * height
            spread = np.abs(part[["low", "high"]].to_numpy().T - part["difference"].to_numpy())
            axes.errorbar(part["difference"], places, xerr=spread, fmt="o", capsize=3, label=set_name)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=METRICS[metric], xlabel=f"minus {experiment.arm(experiment.reference).title}")
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), titled(experiment, arms), fontsize=7)
    panels[0].invert_yaxis()
    if len(sets) > 1:
        panels[-1].legend(fontsize=7)
    return figure


def training_curves(table: pd.DataFrame, experiment: Experiment) -> Figure:
    """Training loss and validation Dice over steps, the mean over folds of each arm; a row a set.

    An arm has one color in all panels; that with a guide of random weights is dashed, in the color of its guided one.

    Args:
        table: of `tables.curves`; not empty.
    """
    sets = sorted(table["set"].unique())
    figure = Figure(figsize=(9, 3 * len(sets) + 0.8), layout="constrained")
    grid = np.reshape(figure.subplots(len(sets), 2), (len(sets), 2))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(plain_name(arm.name) for arm in experiment.arms))}
    drawn = {}
    for panels_of_set, set_name in zip(grid, sets, strict=True):
        for axes, column, title in zip(
            panels_of_set, ("train_loss", "val_dice"), ("training loss", "validation Dice"), strict=True
        ):
            for arm in experiment.arms:
                of_arm = only(table, set=set_name, arm=arm.name)
                if len(of_arm):
                    epoch = of_arm.groupby("fold").cumcount()           # folds may take a few steps more or fewer
                    mean = of_arm.groupby(epoch)[["step", column]].mean()
                    plain = plain_name(arm.name)
                    (drawn[arm.title],) = axes.plot(
                        mean["step"], mean[column], "-" if plain == arm.name else "--", color=colors[plain], marker=".",
                        linewidth=1, label=arm.title,
                    )
            axes.set(title=f"{set_name}: {title}", xlabel="step")
            axes.grid(alpha=0.3)
    listed = [drawn[arm.title] for arm in experiment.arms if arm.title in drawn]
    figure.legend(handles=listed, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def plain_name(arm: str) -> str:
    """The name of the arm that one with a guide of random weights is the control of; of any other, its own."""
    return arm.removesuffix("_random")


def components(guide: FrozenGuide, image_rgb: np.ndarray, count: int = 3) -> np.ndarray:
    """The first principal components of a guide's latent of one image, as a picture.

    Args:
        image_rgb: (H, W, 3) uint8.

    Returns:
        (H, W, count) uint8: each component from its least (0) to its greatest value (255).
    """
    latent = compute(guide, image_rgb).float().numpy()
    tokens = latent.reshape(latent.shape[0], -1).T
    tokens = tokens - tokens.mean(axis=0)
    _, _, directions = np.linalg.svd(tokens, full_matrices=False)
    found = np.zeros((len(tokens), count))
    directions = directions[:count]
    directions *= np.where(np.abs(directions).max(1) == directions.max(1), 1, -1)[:, None]     # one sign of the two
    found[:, : len(directions)] = tokens @ directions.T
    low, high = found.min(axis=0), found.max(axis=0)
    scaled = (255 * (found - low) / np.maximum(high - low, 1e-12)).reshape(*latent.shape[1:], count)
    height, width = image_rgb.shape[:2]
    return cv2.resize(np.rint(scaled).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)


def encodings(guides: dict[str, FrozenGuide], images: dict[str, np.ndarray]) -> Figure:
    """Figure 2: images down; the image itself, and three principal components of each guide as red, green and blue."""
    figure = Figure(figsize=(2.2 * (1 + len(guides)), 2.3 * len(images)), layout="constrained")
    grid = np.reshape(figure.subplots(len(images), 1 + len(guides)), (len(images), -1))
    for row, (name, image) in zip(grid, images.items(), strict=True):
        show(row[0], image, name)
        for axes, (title, guide) in zip(row[1:], guides.items(), strict=True):
            show(axes, components(guide, image), title)
    return figure


def panels(samples: list[tuple[str, np.ndarray, np.ndarray, dict[str, np.ndarray]]]) -> Figure:
    """Figure 5: a row an image: the image, the annotation, and what each model found.

    Args:
        samples: (name, image (H, W, 3) uint8, true labels (H, W), model -> labels (H, W)) each.
    """
    columns = 2 + max(len(found) for *_, found in samples)
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(samples)), layout="constrained")
    grid = np.reshape(figure.subplots(len(samples), columns), (len(samples), -1))
    for row, (name, image, truth, found) in zip(grid, samples, strict=True):
        show(row[0], image, name)
        show(row[1], outlined(image, truth, TRUTH_RGB), "annotated")
        for axes, (title, labels) in zip(row[2:], found.items(), strict=False):
            show(axes, outlined(image, labels, FOUND_RGB), title)
    return figure


def draw_panels(chosen: Experiment, out: Path, data_root: Path, to: Path, most: int = 3) -> list[Path]:
    """One picture a set: test images of the reference's least, median and greatest Dice, with every arm's nuclei."""
    paths = []
    for reference in sorted(out.glob(f"*/fold0/{chosen.reference}.json")):
        place, set_name = reference.parent, reference.parts[-3]
        rows = sorted(json.loads(reference.read_text())["images"], key=lambda row: row["dice"])
        picked = {rows[round(share * (len(rows) - 1))]["id"] for share in np.linspace(0, 1, most)}
        dataset = read_dataset(set_name, data_root / set_name)
        models = {
            arm.title: load(place / arm.name / "model", precision="fp32")
            for arm in chosen.arms
            if (place / f"{arm.name}.json").is_file() and (place / arm.name / "model").is_dir()
        }
        samples = []
        for id in sorted(picked):
            sample = dataset[dataset.ids.index(id)]
            labels = {title: model.segment(sample.image_rgb, sample.mpp).labels for title, model in models.items()}
            samples.append((id, sample.image_rgb, sample.labels, labels))
        paths.append(save(panels(samples), to / f"{chosen.name}.{set_name}.panels.png"))
    return paths


def outlined(image_rgb: np.ndarray, labels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """A copy of the image (H, W, 3) uint8 with every nucleus of a label map (H, W) outlined."""
    rings = [np.rint(ring).astype(np.int32) for ring in outlines(labels).values()]
    return cv2.polylines(image_rgb.copy(), rings, True, color, 1)


def show(axes: Axes, picture: np.ndarray, title: str) -> None:
    """A picture without ticks."""
    axes.imshow(picture)
    axes.set_title(title, fontsize=8)
    axes.axis("off")
