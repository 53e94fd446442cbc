"""How many defects `nuguide.quality` finds, how many sound images it reports, and what it costs.

    python benchmarks/quality.py --data DATA [--part val] [--out results/quality.json]

Images are those of one part of results/split.json; the limits in `nuguide.quality` were chosen on the training part, of
other organs and patients. Each image is looked at as it is, with the nuclei that the default model finds, and in
copies with one defect each, made here: defocus (Gaussian blur, sigma in pixels of 0.5 um, then the noise and the JPEG
of a camera), pen strokes over tissue, folds (a band that lies on its mirror image: densities add), gains of the
exposure, and labels of microns per pixel that are wrong, for which the model segments again. Empty glass is drawn.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import nuguide
from nuguide.images import read_image
from nuguide.quality import inspect

ROOT = Path(__file__).resolve().parents[1]
MPP = 0.25
BLURS = (1.0, 1.5, 2.0, 3.0, 4.0)                   # pixels of 0.5 um
STROKES_UM = (20, 40, 80)
# share of red, green and blue light that they let through
INKS = {"green": (0.15, 0.55, 0.25), "blue": (0.10, 0.15, 0.55), "black": (0.08, 0.08, 0.09)}
FOLDS_UM = (15, 30, 50)
DARK = (0.7, 0.5, 0.35)                             # gains
WRONG_MPP = {"twice the right one": 2.0, "half of it": 0.5, "a quarter of it": 0.25}
TINTS = ((243, 242, 244), (255, 255, 255), (240, 238, 222), (200, 200, 202))


def blurred(image_rgb: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Out of focus by `sigma` pixels of 0.5 um; noise of 3 of 255 and JPEG of quality 80 come after the optics."""
    soft = cv2.GaussianBlur(image_rgb, (0, 0), sigma * 0.5 / MPP) + rng.normal(0, 3, image_rgb.shape)
    stored = cv2.imencode(".jpg", np.clip(soft, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return np.asarray(cv2.imdecode(stored, cv2.IMREAD_COLOR))


def band(shape: tuple[int, ...], width_um: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) float32, 1 in a band of a width that crosses an image near its middle, with soft borders."""
    height, width = shape[:2]
    mask = np.zeros((height, width), np.float32)
    middle, half = np.array([width, height]) * rng.uniform(0.35, 0.65, 2), max(height, width)
    turn = rng.uniform(0, np.pi)
    step = half * np.array([np.cos(turn), np.sin(turn)])
    start, stop = ((int(x), int(y)) for x, y in (middle - step, middle + step))
    cv2.line(mask, start, stop, 1.0, max(1, round(width_um / MPP)))
    return cv2.GaussianBlur(mask, (0, 0), 2.0)


def inked(image_rgb: np.ndarray, color: str, width_um: float, rng: np.random.Generator) -> np.ndarray:
    """A stroke over tissue: ink lets a share of the light through."""
    mask = band(image_rgb.shape, width_um, rng)[..., None]
    return (image_rgb * (1 - mask + mask * np.array(INKS[color]))).astype(np.uint8)


def folded(image_rgb: np.ndarray, width_um: float, rng: np.random.Generator) -> np.ndarray:
    """A band in which the tissue lies twice: the light passes the picture and its mirror image."""
    mask = band(image_rgb.shape, width_um, rng)[..., None]
    glass = np.maximum(np.percentile(image_rgb, 99.5, axis=(0, 1)), 200)
    twice = image_rgb * np.minimum(image_rgb[::-1, ::-1] / glass, 1)
    return (image_rgb * (1 - mask) + twice * mask).astype(np.uint8)


def gained(image_rgb: np.ndarray, gain: float) -> np.ndarray:
    """The exposure of another camera."""
    return np.clip(image_rgb * gain, 0, 255).astype(np.uint8)


def copies(image_rgb: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, str, np.ndarray]]:
    """Kind, severity and image of every copy with a defect that shows without nuclei."""
    for sigma in BLURS:
        yield "blur", f"sigma {sigma:g} px", blurred(image_rgb, sigma, rng)
    for width_um in STROKES_UM:
        for color in INKS:
            yield "pen", f"{color}, {width_um} um", inked(image_rgb, color, width_um, rng)
    for width_um in FOLDS_UM:
        yield "fold", f"{width_um} um", folded(image_rgb, width_um, rng)
    for gain in DARK:
        yield "dark", f"gain {gain}", gained(image_rgb, gain)


def empty(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Glass of several tints with little and more noise."""
    for tint in TINTS:
        for noise in (1.0, 3.0, 6.0):
            yield np.clip(np.array(tint) + rng.normal(0, noise, (512, 512, 3)), 0, 255).astype(np.uint8)


def part(data: Path, name: str, every: int) -> list[tuple[str, np.ndarray]]:
    """(group, image) of every so many images of a part of results/split.json that are of `MPP`."""
    members = json.loads((ROOT / "results" / "split.json").read_text())["parts"][name]
    members = [member for member in members if member["dataset"] in ("nuinsseg", "tnbc")][::every]
    return [
        (member["group"], read_image(next((data / member["dataset"] / "images").glob(f"{member['id']}.*"))).image_rgb)
        for member in members
    ]


def measure(images: list[tuple[str, np.ndarray]], segment: Callable | None) -> dict[str, Any]:
    """Shares of the images that are reported: sound ones by kind, and of each kind of defect and severity."""
    false: Counter[str] = Counter()
    found: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    rng = np.random.default_rng(0)
    for number, (_, image) in enumerate(images):
        sound = inspect(image, MPP, segment(image, MPP).table if segment else None)
        false.update([*sound.findings, *(["any"] if sound.findings else [])])
        for kind, severity, copy in copies(image, rng):
            found[kind, severity].append(kind in inspect(copy, MPP).findings)
        for said, factor in WRONG_MPP.items():
            if segment is None:
                break
            wrong = inspect(image, MPP * factor, segment(image, MPP * factor).table)
            found["magnification", said].append("magnification" in wrong.findings)
        print(f"{number + 1} of {len(images)}", dict(false), flush=True)
    found["glass", "empty"] = ["glass" in inspect(image, MPP).findings for image in empty(rng)]
    return {
        "images": len(images),
        "false": {kind: count / len(images) for kind, count in sorted(false.items())},
        "found": [
            {"kind": kind, "severity": severity, "copies": len(said), "share": float(np.mean(said))}
            for (kind, severity), said in found.items()
        ],
    }


def cost(image_rgb: np.ndarray, segment: Callable) -> dict[str, float]:
    """CPU seconds for an image of 2000 x 2000 px, the least of three runs."""
    large = np.tile(image_rgb, (4, 4, 1))[:2000, :2000].copy()
    nuclei = segment(large, MPP)
    spent: defaultdict[str, list[float]] = defaultdict(list)
    runs = {"segment": lambda: segment(large, MPP), "inspect": lambda: inspect(large, MPP, nuclei.table)}
    for _ in range(3):
        for name, run in runs.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    seconds = {name: round(min(times), 4) for name, times in spent.items()}
    return {**seconds, "share": round(seconds["inspect"] / seconds["segment"], 4)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", default="val")
    parser.add_argument("--every", type=int, default=1, help="every so many images only")
    parser.add_argument("--no-model", action="store_true", help="leave out what needs nuclei")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    model = None if options.no_model else nuguide.load("default")
    images = part(options.data, options.part, options.every)
    result = measure(images, model.segment if model else None)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result |= {
        "benchmark": "quality", "part": options.part, "groups": sorted({group for group, _ in images}),
        "precision": model.precision if model else None,
        "cpu_seconds": cost(images[0][1], model.segment) if model else None,
        "threads": 1, "machine": platform.machine(), "commit": commit,
        "command": "python benchmarks/quality.py --data DATA " + " ".join(sys.argv[3:]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
