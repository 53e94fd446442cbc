"""How well models bear what goes wrong with pictures: stain, JPEG, blur, noise, exposure, a wrong microns per pixel.

    python benchmarks/robustness.py run --data-root DATA [--models small base ... classical] [--out LINES.jsonl]
    python benchmarks/robustness.py plot [LINES.jsonl] [PICTURE.png]

`run` scores each model on 24 validation images of results/split.json: all of TNBC, and of NuInsSeg as many of each
organ, drawn with a fixed seed. They are changed in one way at a time, at every level of PERTURBATIONS; the truth stays.
It adds one JSON line a model, perturbation and level to LINES (results/robustness.jsonl), the scores of each image in
it, and leaves out what stands there, so a run that was cut can be started again. "classical" is hematoxylin, Otsu's
threshold and a watershed (`nuguide.experiments.beside`). `plot` draws docs/images/robustness.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure

import nuguide
from nuguide.checkpoint import WEIGHTS, model_folder
from nuguide.datasets import read_dataset
from nuguide.datasets.splits import Member, read_manifest
from nuguide.evaluate import interval
from nuguide.experiments.beside import otsu_watershed
from nuguide.guides.weights import file_sha256
from nuguide.metrics import score
from nuguide.stain import restained
from nuguide.types import Sample

ROOT = Path(__file__).resolve().parents[1]
LINES, PICTURE = ROOT / "results" / "robustness.jsonl", ROOT / "docs" / "images" / "robustness.png"
IMAGES, SEED = 24, 0
METRICS = ("dice", "aji", "pq")
CLASSICAL = "classical"
MUCH = 0.05                                       # of Dice
CLEAN = "none"                                    # the perturbation of images as they are
TITLES = {"small": "small (guided)", "small-unguided": "small-unguided", "base": "base", CLASSICAL: "classical method"}


@dataclass(frozen=True)
class Perturbation:
    """One way to change a picture.

    Attributes:
        title, unit: for people.
        neutral: the level at which the picture is as it was. levels: the others, in order.
        change: (image (H, W, 3) uint8, level, microns per pixel, what draws) -> such an image.
        claim: level -> the factor by which the microns per pixel told to the model are wrong.
    """

    title: str
    unit: str
    neutral: float
    levels: tuple[float, ...]
    change: Callable[[np.ndarray, float, float, np.random.Generator], np.ndarray] = lambda image, *_: image
    claim: Callable[[float], float] = lambda level: 1.0


def scaled_hematoxylin(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image with `level` times its hematoxylin."""
    return restained(image_rgb, (level, 1, 1))


def scaled_eosin(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image with `level` times its eosin."""
    return restained(image_rgb, (1, level, 1))


def turned_hue(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image with all hues turned by `level` degrees on the wheel of HSV."""
    hsv = cv2.cvtColor(image_rgb.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + level) % 360
    return np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)


def compressed(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image after JPEG of this quality, its colors at half resolution as scanners store them; 100 leaves it."""
    if level >= 100:
        return image_rgb
    done, file = cv2.imencode(".jpg", image_rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(level)])
    read = cv2.imdecode(file, cv2.IMREAD_COLOR)
    assert done
    assert read is not None
    return read[..., ::-1]


def blurred(image_rgb: np.ndarray, level: float, mpp: float, *_: Any) -> np.ndarray:
    """The image under a Gaussian whose standard deviation is `level` microns."""
    return cv2.GaussianBlur(image_rgb, (0, 0), level / mpp) if level else image_rgb


def noisy(image_rgb: np.ndarray, level: float, mpp: float, rng: np.random.Generator) -> np.ndarray:
    """The image with Gaussian noise of standard deviation `level`, of 255, in every channel."""
    return clipped(image_rgb + level * rng.standard_normal(image_rgb.shape, np.float32))


def brighter(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image times `level`."""
    return clipped(image_rgb * np.float32(level))


def contrasted(image_rgb: np.ndarray, level: float, *_: Any) -> np.ndarray:
    """The image with its distances from its own mean intensity times `level`."""
    mean = np.float32(image_rgb.mean())
    return clipped((image_rgb - mean) * np.float32(level) + mean)


def clipped(values: np.ndarray) -> np.ndarray:
    """Rounded to 0..255, uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


PERTURBATIONS = {
    "hematoxylin": Perturbation("hematoxylin", "times as much", 1, (0.4, 0.7, 1.3, 1.6), scaled_hematoxylin),
    "eosin": Perturbation("eosin", "times as much", 1, (0.4, 0.7, 1.3, 1.6), scaled_eosin),
    "hue": Perturbation("hue", "degrees", 0, (-40, -20, 20, 40), turned_hue),
    "jpeg": Perturbation("JPEG", "quality", 100, (30, 50, 70, 90), compressed),
    "blur": Perturbation("blur", "standard deviation, microns", 0, (0.25, 0.5, 1.0, 1.5), blurred),
    "noise": Perturbation("noise", "standard deviation, of 255", 0, (5, 10, 20, 40), noisy),
    "brightness": Perturbation("brightness", "times", 1, (0.5, 0.75, 1.15, 1.3), brighter),
    "contrast": Perturbation("contrast", "times", 1, (0.4, 0.7, 1.3, 1.6), contrasted),
    "mpp": Perturbation("wrong mpp", "percent", 0, (-50, -25, 25, 50), claim=lambda level: 1 + level / 100),
}


def chosen(members: Sequence[Member], images: int, seed: int) -> list[Member]:
    """All of TNBC, and of NuInsSeg's organs in turn one each, drawn with a seed, until there are `images`."""
    rng = np.random.default_rng(seed)
    some = sorted(member for member in members if member.dataset == "tnbc")
    organs: dict[str, list[Member]] = {}
    for member in sorted(member for member in members if member.dataset == "nuinsseg"):
        organs.setdefault(member.group, []).append(member)
    drawn = [[organ[place] for place in rng.permutation(len(organ))] for organ in organs.values()]
    rounds = (organ[turn] for turn in range(max(map(len, drawn))) for organ in drawn if turn < len(organ))
    return [*some, *(member for member, _ in zip(rounds, range(images - len(some)), strict=False))]


def samples_of(members: Sequence[Member], root: Path) -> list[Sample]:
    """The annotated images of a split's members, in their order."""
    sets = {name: read_dataset(name, root / name) for name in sorted({member.dataset for member in members})}
    return [sets[member.dataset][sets[member.dataset].ids.index(member.id)] for member in members]


def perturbed(sample: Sample, index: int, kind: str, level: float) -> tuple[np.ndarray, float]:
    """A sample's image (H, W, 3) uint8 and the microns per pixel told to a model.

    Args:
        index: of the image; what is drawn depends on it alone, so that levels of noise differ in strength only.
    """
    if kind == CLEAN or level == PERTURBATIONS[kind].neutral:
        return sample.image_rgb, sample.mpp
    how = PERTURBATIONS[kind]
    image = how.change(sample.image_rgb, level, sample.mpp, np.random.default_rng([SEED, index]))
    return np.ascontiguousarray(image), sample.mpp * how.claim(level)


def segmenter(model: str, precision: str) -> tuple[Callable[[np.ndarray, float], np.ndarray], str | None]:
    """(image, microns per pixel) -> label map, and the first digits of the SHA-256 of the model's weights."""
    if model == CLASSICAL:
        return otsu_watershed, None
    predictor = nuguide.load(model, device="cpu", precision=precision)
    weights = file_sha256(model_folder(model) / WEIGHTS)[:8]
    return lambda image, mpp: predictor.segment(image, mpp).labels, weights


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, [] where there is none; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def run(models: Sequence[str], root: Path, split: Path, out: Path, precision: str) -> Iterator[dict[str, Any]]:
    """Score what is not scored yet; each line is added to `out` and given back."""
    members = chosen(read_manifest(split).parts["val"], IMAGES, SEED)
    names = [f"{member.dataset}/{member.id}" for member in members]
    lines = read_lines(out)
    if any(line["images"] != names for line in lines):
        raise SystemExit(f"{out}: was made with other images; choose another --out")
    done = {(line["model"], line["perturbation"], line["level"]) for line in lines}
    samples = samples_of(members, root)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts = {"precision": precision, "seed": SEED, "threads": torch.get_num_threads(), "torch": torch.__version__,
             "machine": platform.machine(), "commit": commit.stdout.strip(), "images": names}
    wanted = [(CLEAN, 0.0), *((kind, level) for kind, how in PERTURBATIONS.items() for level in how.levels)]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for model in models:
        segment, weights = segmenter(model, precision)
        for kind, level in wanted:
            if (model, kind, level) in done:
                continue
            found = [score(sample.labels, segment(*perturbed(sample, index, kind, level)), sample.ignore)
                     for index, sample in enumerate(samples)]
            line = {"benchmark": "robustness", "model": model, "weights": weights, "perturbation": kind, "level": level,
                    **{metric: [round(float(getattr(one, metric)), 4) for one in found] for metric in METRICS},
                    **facts}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            yield line


def curve(lines: Sequence[dict[str, Any]], model: str, kind: str, metric: str = "dice") -> dict[float, np.ndarray]:
    """Level -> scores (images,) of a model under a perturbation, the neutral level among them, in order."""
    neutral = PERTURBATIONS[kind].neutral
    found = {
        neutral if line["perturbation"] == CLEAN else line["level"]: np.array(line[metric])
        for line in lines if line["model"] == model and line["perturbation"] in (CLEAN, kind)
    }
    return dict(sorted(found.items()))


def unchanged(lines: Sequence[dict[str, Any]], model: str, metric: str = "dice") -> np.ndarray:
    """Scores (images,) of a model on the images as they are."""
    return next(
        np.array(line[metric]) for line in lines if line["model"] == model and line["perturbation"] == CLEAN
    )


def change(
    lines: Sequence[dict[str, Any]], model: str, kind: str, level: float, metric: str = "dice"
) -> np.ndarray:
    """Scores (images,) of a model at a level of a perturbation minus those on the images as they are."""
    return curve(lines, model, kind, metric)[level] - unchanged(lines, model, metric)


def strongest(kind: str, level: float) -> bool:
    """Whether no level of a perturbation on the same side of the neutral one is further from it."""
    how = PERTURBATIONS[kind]
    return level == (min if level < how.neutral else max)(how.levels)


def panels_of(lines: Sequence[dict[str, Any]]) -> Figure:
    """One panel a perturbation: mean Dice of each model against the level, with the 95% interval of the mean."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(3, 3, sharey=True)
    for axes, (kind, how) in zip(panels.flat, PERTURBATIONS.items(), strict=True):
        for number, model in enumerate(dict.fromkeys(line["model"] for line in lines)):
            found = curve(lines, model, kind)
            means = [values.mean() for values in found.values()]
            low, high = zip(*(interval(values) for values in found.values()), strict=True)
            axes.plot(list(found), means, "o-", ms=3.5, color=f"C{number}", label=TITLES.get(model, model))
            axes.fill_between(list(found), low, high, color=f"C{number}", alpha=0.12, linewidth=0)
        axes.axvline(how.neutral, color="0.7", linewidth=0.8, linestyle=":")
        if kind == "jpeg":
            axes.invert_xaxis()                       # to the right it gets worse, as with blur and noise
        axes.set(title=how.title, xlabel=how.unit, ylim=(0, 1))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("Dice")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    """Parse, then run or plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--data-root", type=Path, required=True)
    one.add_argument("--models", nargs="+", default=["small", "small-unguided", "base", CLASSICAL])
    one.add_argument("--split", type=Path, default=ROOT / "results" / "split.json")
    one.add_argument("--out", type=Path, default=LINES)
    one.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    one = commands.add_parser("plot")
    one.add_argument("lines", type=Path, nargs="?", default=LINES)
    one.add_argument("picture", type=Path, nargs="?", default=PICTURE)
    options = parser.parse_args()
    if options.command == "plot":
        panels_of(read_lines(options.lines)).savefig(options.picture, dpi=100)
        return
    for line in run(options.models, options.data_root, options.split, options.out, options.precision):
        means = ", ".join(f"{metric} {np.mean(line[metric]):.3f}" for metric in METRICS)
        print(f"{line['model']}, {line['perturbation']} {line['level']}: {means}", flush=True)


if __name__ == "__main__":
    main()
