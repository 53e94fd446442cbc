"""Stain normalization, ours and torchstain's, on drawn tissue whose stains are known.

    python benchmarks/stain.py [--out results/stain.json] [--images 12] [--megapixel-runs 3]

Drawn are disks of hematoxylin on eosin and glass, with noise, under three pairs of stains and three pairs of strengths.
For each method: degrees between the stains found and drawn (mean and worst), mean absolute difference, of 255, between
the normalized image and the same tissue drawn under the target's stains, CPU seconds for a megapixel (the least of
a few runs, on one thread), and on which of the tiles that show no tissue it raised or gave no finite image. torchstain
is measured where it can be imported, with its own defaults; nothing else needs it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from nuguide.normalize import METHODS, StainNormalizer

PAIRS = (
    [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]],      # the default of torchstain, here the target
    [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]],                  # Ruifrok and Johnston
    [[0.75, 0.60, 0.25], [0.20, 0.93, 0.30]],
)
STRENGTHS = ((1.0, 1.0), (0.7, 0.7), (1.3, 0.8))
BLUE_INK = (30, 60, 170)


class Contender(NamedTuple):
    """fit(image), apply(image) -> image, and stains() -> (2, 3) of what it was fitted to, where it has any."""

    fit: Callable[[np.ndarray], Any]
    apply: Callable[[np.ndarray], np.ndarray]
    stains: Callable[[], np.ndarray | None]


def draw(stains: np.ndarray, strength: tuple[float, float], seed: int, side: int = 512) -> np.ndarray:
    """(side, side, 3) uint8: nuclei of 0.8 to 1.6 of hematoxylin, stroma of 0.3 to 0.9 of eosin, an edge of glass."""
    rng = np.random.default_rng(seed)
    stroma = cv2.GaussianBlur(rng.random((side, side)), (0, 0), 8)
    hematoxylin, eosin = np.zeros((2, side, side))
    eosin[side // 8 :] = (0.3 + 0.6 * (stroma - stroma.min()) / np.ptp(stroma))[side // 8 :]
    for x, y in rng.integers([8, side // 8 + 8], side - 8, (side * side // 600, 2)).tolist():
        cv2.circle(hematoxylin, (x, y), 6, rng.uniform(0.8, 1.6), -1)
        cv2.circle(eosin, (x, y), 6, 0.02, -1)
    density = np.stack([hematoxylin, eosin], axis=-1) * strength @ stains
    noisy = 256 * np.exp(-density) - 1 + rng.normal(0, 1.5, (side, side, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def odd_tiles() -> dict[str, np.ndarray]:
    """Tiles without two stains to find."""
    rng = np.random.default_rng(0)
    blank = np.clip(rng.normal(240, 3, (128, 128, 3)), 0, 255).astype(np.uint8)
    inked = blank.copy()
    inked[:64] = BLUE_INK
    return {
        "white": np.full((64, 64, 3), 255, np.uint8),
        "blank": blank,
        "black": np.zeros((64, 64, 3), np.uint8),
        "one pixel": np.full((1, 1, 3), (120, 60, 140), np.uint8),
        "one color": np.full((64, 64, 3), (120, 60, 140), np.uint8),
        "ink on glass": inked,
    }


def ours(name: str) -> Contender:
    """One of `nuguide.normalize`."""
    normalizer = StainNormalizer(name)

    def stains() -> np.ndarray | None:
        return normalizer.target[:, :3] if name != "reinhard" and normalizer.target is not None else None

    return Contender(lambda image: normalizer.fit([image]), normalizer.apply, stains)


def theirs(name: str, backend: str) -> Contender:
    """One of torchstain, with its own defaults."""
    library = importlib.import_module("torchstain.torch.normalizers" if backend == "torch" else
                                      "torchstain.numpy.normalizers")  # fmt: skip
    prefix = "Torch" if backend == "torch" else "Numpy"
    normalizer = getattr(library, f"{prefix}{name.capitalize()}Normalizer")()

    def given(image: np.ndarray) -> Any:
        return torch.from_numpy(image).permute(2, 0, 1).float() if backend == "torch" else image

    def apply(image: np.ndarray) -> np.ndarray:
        options = {"stains": False} if name == "macenko" else {}
        found = normalizer.normalize(given(image), **options)
        found = np.asarray(found[0] if isinstance(found, tuple) else found)
        return found if found.shape == image.shape else np.moveaxis(found, 0, -1)

    def stains() -> np.ndarray | None:
        return np.asarray(normalizer.HERef).T if name == "macenko" else None

    return Contender(lambda image: normalizer.fit(given(image)), apply, stains)


def contenders() -> dict[str, Callable[[], Contender]]:
    """Name -> how to make one that is fitted to nothing yet."""
    made: dict[str, Callable[[], Contender]] = {f"nuguide {name}": lambda name=name: ours(name) for name in METHODS}
    if torchstain_version():
        for backend in ("numpy", "torch"):
            for name in ("macenko", "reinhard"):
                made[f"torchstain {name} ({backend})"] = lambda name=name, backend=backend: theirs(name, backend)
    return made


def torchstain_version() -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return version("torchstain")
    except PackageNotFoundError:
        return None


def accuracy(make: Callable[[], Contender], images: int) -> dict[str, float | int]:
    """Angles and differences over drawn images, and how many of them it failed on."""
    pairs = [np.array(pair) / np.linalg.norm(pair, axis=1, keepdims=True) for pair in PAIRS]
    normalizer = make()
    normalizer.fit(draw(pairs[0], STRENGTHS[0], seed=1000))
    angles, differences, failed = [], [], 0
    for seed in range(images):
        stains, strength = pairs[seed % 3], STRENGTHS[seed // 3 % 3]
        image, truth = draw(stains, strength, seed), draw(pairs[0], STRENGTHS[0], seed)
        try:
            differences.append(np.abs(normalizer.apply(image).astype(float) - truth).mean())
            one = make()
            one.fit(image)
        except (ValueError, RuntimeError, IndexError, np.linalg.LinAlgError):
            failed += 1
            continue
        if (found := one.stains()) is not None:
            found = found / np.linalg.norm(found, axis=1, keepdims=True)
            angles += np.degrees(np.arccos(np.clip((found * stains).sum(1), -1, 1))).tolist()
    row: dict[str, float | int] = {"difference": round(float(np.mean(differences)), 2), "failed": failed}
    if angles:
        row |= {"angle_mean_deg": round(float(np.mean(angles)), 2), "angle_worst_deg": round(float(np.max(angles)), 2)}
    return row


def seconds(make: Callable[[], Contender], runs: int) -> float:
    """CPU seconds for an image of 1024 x 1024, the least of a few runs."""
    stains = np.array(PAIRS[1]) / np.linalg.norm(PAIRS[1], axis=1, keepdims=True)
    image = np.tile(draw(stains, (0.8, 1.1), seed=0), (2, 2, 1))
    normalizer = make()
    normalizer.fit(draw(stains, (1, 1), seed=1))
    spent = []
    for _ in range(runs):
        start = time.process_time()
        normalizer.apply(image)
        spent.append(time.process_time() - start)
    return round(min(spent), 3)


def stumbles(make: Callable[[], Contender]) -> list[str]:
    """The odd tiles on which it raised, or did not give finite values."""
    normalizer = make()
    normalizer.fit(draw(np.array(PAIRS[0]), (1, 1), seed=1))
    names = []
    for name, tile in odd_tiles().items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)      # numpy says so where it casts NaN to uint8
                fine = np.isfinite(normalizer.apply(tile)).all()
        except (ValueError, RuntimeError, IndexError, RuntimeWarning, np.linalg.LinAlgError):
            fine = False
        if not fine:
            names.append(name)
    return names


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--megapixel-runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    methods = {}
    for name, make in contenders().items():
        methods[name] = {
            **accuracy(make, options.images), "seconds_per_megapixel": seconds(make, options.megapixel_runs),
            "stumbles_on": stumbles(make),
        }  # fmt: skip
        print(name, methods[name], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "benchmark": "stain", "command": " ".join(["python", "benchmarks/stain.py", *sys.argv[1:]]),
        "images": options.images, "image_px": [512, 512], "odd_tiles": list(odd_tiles()), "methods": methods,
        "versions": {"numpy": np.__version__, "opencv": cv2.__version__, "torch": torch.__version__,
                     "torchstain": torchstain_version()},
        "threads": 1, "machine": platform.machine(), "commit": commit,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
