"""Which maps separate touching nuclei best: five designs on one network, trained alike, on the same validation images.

    python benchmarks/instances_compare.py train interior hover star flow --data DATA --out runs/instances
    python benchmarks/instances_compare.py score --data DATA --out runs/instances

Every arm starts from the weights of the default model; its head keeps the nucleus channel and gets fresh weights for
whatever else it predicts. All arms named in one command see the same patches, step by step. `score` chooses each arm's
thresholds on training images, measures on the validation images and writes results/instances.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nuguide import checkpoint
from nuguide.augment import Augmentation, augment
from nuguide.batches import Patch, Patches, Picture, collate
from nuguide.calibrate import quality
from nuguide.datasets import read_dataset
from nuguide.datasets.splits import read_manifest
from nuguide.evaluate import write_scores
from nuguide.instances import (
    EIGHT,
    LEVELS,
    Separation,
    connected,
    flood,
    largest_pieces,
    ranked_pieces,
    separate,
    targets,
    without_holes,
)
from nuguide.loaders import pictures_of
from nuguide.losses import dice_focal
from nuguide.metrics import score
from nuguide.networks import fold_batch_norm
from nuguide.predict import padded
from nuguide.train import seen
from nuguide.types import IGNORED

RESULTS = Path(__file__).resolve().parents[1] / "results"
MPP = 0.5
PATCH_PX, MARGIN_PX, AROUND_PX = 128, 32, 32      # labels reach beyond the patch: a nucleus it cuts keeps its center
RAYS, REACH_PX, UNIT_PX = 16, 32, 8.0             # of star-convex shapes; lengths are predicted in units of 8 px
ANGLES = 2 * np.pi * np.arange(RAYS) / RAYS


# --- what each arm is taught: (C, H, W) float32 from a label map (H, W), the nucleus first, -1 where nothing is taught


def nucleus_target(labels: np.ndarray) -> np.ndarray:
    """1 in nuclei, 0 beside them, `IGNORED` where nothing is taught: (1, H, W)."""
    return np.where(labels == IGNORED, IGNORED, labels > 0).astype(np.float32)[None]


def from_center(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the pixels of nuclei: flat places, the number of each one's nucleus, rows and columns from its center."""
    inside = np.flatnonzero(labels > 0)
    _, number = np.unique(labels.ravel()[inside], return_inverse=True)
    place = np.stack(np.divmod(inside, labels.shape[1])).astype(np.float64)
    area = np.bincount(number)
    center = np.stack([np.bincount(number, axis) / area for axis in place])
    return inside, number, place - center[:, number]


def hover_targets(labels: np.ndarray) -> np.ndarray:
    """Nucleus, vertical and horizontal distance from its center, -1 to 1 at its ends (HoVer-Net, Graham 2019)."""
    inside, number, offset = from_center(labels)
    maps = np.zeros((2, labels.size), np.float32)
    for axis, values in enumerate(offset):
        for sign in (-1, 1):
            end = np.zeros(number.max(initial=-1) + 1)
            np.maximum.at(end, number, sign * values)
            side = sign * values > 0
            maps[axis, inside[side]] = values[side] / end[number[side]]
    return np.concatenate([nucleus_target(labels), maps.reshape(2, *labels.shape)])


def flow_targets(labels: np.ndarray) -> np.ndarray:
    """Nucleus, and the way to its center, rows and columns, in units of 8 px."""
    inside, _, offset = from_center(labels)
    maps = np.zeros((2, labels.size), np.float32)
    maps[:, inside] = -offset / UNIT_PX
    return np.concatenate([nucleus_target(labels), maps.reshape(2, *labels.shape)])


def star_targets(labels: np.ndarray) -> np.ndarray:
    """Nucleus, depth as a share of its greatest, and the way to its border along 16 rays (StarDist, Schmidt 2018)."""
    height, width = labels.shape
    wide = np.pad(labels, REACH_PX)
    rays = np.zeros((RAYS, height, width), np.float32)
    for ray, angle in zip(rays, ANGLES, strict=True):
        alive = labels > 0
        for step in range(1, REACH_PX + 1):
            down, right = round(step * math.sin(angle)) + REACH_PX, round(step * math.cos(angle)) + REACH_PX
            alive = alive & (wide[down : down + height, right : right + width] == labels)
            if not alive.any():
                break
            ray += alive
        ray += 0.5
    inside, number, _ = from_center(labels)
    depth = rays[:, labels > 0].min(0)
    greatest = np.zeros(number.max(initial=-1) + 1, np.float32)
    np.maximum.at(greatest, number, depth)
    share = np.zeros(labels.size, np.float32)
    share[inside] = depth / greatest[number]
    return np.concatenate([nucleus_target(labels), share.reshape(1, height, width), rays / UNIT_PX])


# --- and by which loss: logits and target (B, C, H, W) -> scalar


def hover_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + focal of the nucleus; squared error of both distances, and twice that of their gradients in nuclei."""
    known, inside = (target[:, :1] >= 0).float(), (target[:, :1] > 0).float()
    found, true = logits[:, 1:], target[:, 1:]
    value = ((found - true) ** 2 * known).sum() / (2 * known.sum()).clamp(min=1)
    slope = ((slopes(found) - slopes(true)) ** 2 * inside).sum() / (2 * inside.sum()).clamp(min=1)
    return dice_focal(logits[:, :1], target[:, :1]) + value + 2 * slope


def slopes(maps: Tensor, reach: int = 2) -> Tensor:
    """Of (B, 2, H, W) the first map's slope along rows and the second's along columns, by HoVer-Net's 5 x 5 kernel."""
    line = torch.arange(-reach, reach + 1, dtype=maps.dtype)
    down, right = torch.meshgrid(line, line, indexing="ij")
    kernel = torch.stack([down, right]) / (down**2 + right**2 + 1e-15)
    return F.conv2d(maps, kernel[:, None], padding=reach, groups=2)


def flow_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + focal of the nucleus; absolute error of the way to the center, smoothed within 0.8 px, in nuclei."""
    inside = (target[:, :1] > 0).float()
    way = F.smooth_l1_loss(logits[:, 1:], target[:, 1:], beta=0.1, reduction="none") * inside
    return dice_focal(logits[:, :1], target[:, :1]) + way.sum() / (2 * inside.sum()).clamp(min=1)


def star_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + focal of the nucleus; cross entropy of the depth; a fifth of the rays' error in pixels, by depth."""
    known, depth = (target[:, :1] >= 0).float(), target[:, 1:2]
    shallow = F.binary_cross_entropy_with_logits(logits[:, 1:2], depth, reduction="none") * known
    rays = (logits[:, 2:] - target[:, 2:]).abs().mean(1, keepdim=True) * depth * known
    ways = 0.2 * UNIT_PX * rays.sum() / (depth * known).sum().clamp(min=1)
    return dice_focal(logits[:, :1], target[:, :1]) + shallow.sum() / known.sum().clamp(min=1) + ways


@dataclass(frozen=True)
class Arm:
    """A design: how many maps it predicts, what they should be, and what an error costs."""

    channels: int
    targets: Callable[[np.ndarray], np.ndarray]
    loss: Callable[[Tensor, Tensor], Tensor]


ARMS = {
    "interior": Arm(2, targets, dice_focal),
    "hover": Arm(3, hover_targets, hover_loss),
    "flow": Arm(3, flow_targets, flow_loss),
    "star": Arm(2 + RAYS, star_targets, star_loss),
}


# --- training


class LabelPatches(Patches):
    """Patch number i, as in training, with a label map that reaches `MARGIN_PX` beyond it instead of a target."""

    def __getitem__(self, index: int) -> Patch:
        rng = np.random.default_rng([self.seed, index])
        drawn = self.pictures[rng.choice(len(self.pictures), p=self.weights)]
        size = PATCH_PX + 2 * MARGIN_PX
        return Patch(*augment(drawn.image_rgb, drawn.taught, size, rng, self.how, AROUND_PX))


def with_head(model: nn.Module, channels: int, seed: int) -> nn.Module:
    """A copy of a guided model whose head predicts the nucleus as before, and other maps by fresh weights."""
    model = copy.deepcopy(model)
    old = model.get_submodule("network.head")
    assert isinstance(old, nn.Conv2d)
    torch.manual_seed(seed)
    new = nn.Conv2d(old.in_channels, channels, 3, padding=1)
    with torch.no_grad():
        for name, value in new.named_parameters():
            value[:1] = old.get_parameter(name)[:1]
    model.get_submodule("network").head = new
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def train(names: Sequence[str], pictures: list[Picture], out: Path, steps: int, lr: float, seed: int) -> None:
    """Train arms side by side, on the same patches; each is kept every 25 steps, and goes on from there."""
    base, guide, _ = checkpoint.load("default")
    drawn = LabelPatches(pictures, PATCH_PX, Augmentation(), seed, balance=0.8)
    models = {name: with_head(base, ARMS[name].channels, seed).train() for name in names}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4) for name, model in models.items()}
    first, losses = resumed(models, optimizers, out)
    inner = slice(MARGIN_PX, MARGIN_PX + PATCH_PX)
    for step in range(first, steps):
        warm = steps // 20
        fall = 0.01 + 0.495 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        rate = (step + 1) / warm if step < warm else fall
        patches = [drawn[8 * step + number] for number in range(8)]
        batch = collate(Patch(patch.image, patch.target[None, inner, inner]) for patch in patches)
        image, latent = seen(batch, guide)
        image = image.contiguous(memory_format=torch.channels_last)
        for name, model in models.items():
            wanted = [ARMS[name].targets(patch.target)[:, inner, inner] for patch in patches]
            optimizers[name].param_groups[0]["lr"] = lr * rate
            torch.manual_seed(seed * 1_000_003 + step)
            loss = ARMS[name].loss(model(image, latent), torch.from_numpy(np.stack(wanted)))
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name].append(round(loss.item(), 4))
        if (step + 1) % 25 == 0 or step + 1 == steps:
            means = {name: round(float(np.mean(values[-25:])), 4) for name, values in losses.items()}
            print(json.dumps({"step": step + 1, "loss": means, "time": time.strftime("%H:%M:%S")}), flush=True)
            for name, model in models.items():
                state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizers[name].state_dict(),
                         "losses": losses[name]}
                torch.save(state, out / f"{name}.tmp")
                (out / f"{name}.tmp").replace(out / f"{name}.pt")


def resumed(models: dict, optimizers: dict, out: Path) -> tuple[int, dict[str, list[float]]]:
    """Bring every arm to where it was kept, all at the same step; that step, and the losses so far."""
    out.mkdir(parents=True, exist_ok=True)
    kept = [name for name in models if (out / f"{name}.pt").is_file()]
    states = {name: torch.load(out / f"{name}.pt", weights_only=True) for name in kept}
    if len({states[name]["step"] if name in states else 0 for name in models}) != 1:
        raise SystemExit(f"{out}: the arms are not at the same step; train them one by one")
    for name, state in states.items():
        models[name].load_state_dict(state["model"])
        optimizers[name].load_state_dict(state["optimizer"])
    losses = {name: states[name]["losses"] if states else [] for name in models}
    return max((state["step"] for state in states.values()), default=0), losses


# --- from maps to nuclei: (C, H, W) with probabilities where there were logits -> label map (H, W) int32


def by_interior(maps: np.ndarray, how: Separation) -> np.ndarray:
    """Today's way: interiors seed a flood of the nucleus map."""
    return separate(maps[0], maps[1], MPP, how)


def by_interior_tree(maps: np.ndarray, how: Separation, top: float, least_um2: float) -> np.ndarray:
    """Interiors that fall into several large pieces at a higher level, up to `top`, seed as many nuclei."""
    nucleus, interior = maps
    mask = without_holes(nucleus >= how.nucleus, how.max_hole_um2 / MPP**2)
    core = mask & (interior >= how.interior)
    for level in np.arange(how.interior + 0.1, top + 0.01, 0.1):
        whole, _ = connected(core, 8)
        parts, stats = connected(core & (interior >= level), 8)
        large = stats[:, cv2.CC_STAT_AREA] >= least_um2 / MPP**2
        large[0] = False
        parent = np.zeros(len(stats), np.int64)
        parent[parts[parts > 0]] = whole[parts > 0]
        several = np.bincount(parent[large], minlength=whole.max() + 1) > 1
        core = np.where(several[whole], large[parts], core)
    return grown(core, interior, mask, how)


def by_depth(maps: np.ndarray, how: Separation, share: float) -> np.ndarray:
    """No second map: seeds where the nucleus map is deeper than a share of the greatest depth near by (concavity)."""
    mask = without_holes(maps[0] >= how.nucleus, how.max_hole_um2 / MPP**2)
    depth = cv2.GaussianBlur(cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5), (0, 0), 1)
    highest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11)))
    relative = depth / np.maximum(highest, 1)
    return grown(mask & (relative >= share), relative, mask, how)


def by_interior_and_depth(maps: np.ndarray, how: Separation, weight: float) -> np.ndarray:
    """Interior and depth of the mask, as a share of the greatest near by: their blend seeds and leads the flood."""
    mask = without_holes(maps[0] >= how.nucleus, how.max_hole_um2 / MPP**2)
    depth = cv2.GaussianBlur(cv2.distanceTransform(mask.view(np.uint8), cv2.DIST_L2, 5), (0, 0), 1)
    highest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11)))
    blend = (1 - weight) * maps[1] + weight * depth / np.maximum(highest, 1)
    return grown(mask & (blend >= how.interior), blend, mask, how)


def by_hover(maps: np.ndarray, how: Separation, size: int, steep: float, radius: float) -> np.ndarray:
    """Seeds away from where a distance falls steeply (between two nuclei), and within `radius` of a center.

    HoVer-Net's way, but for a slope per pixel instead of a share of the image's greatest, so that what lies elsewhere
    in the image does not matter.
    """
    mask = without_holes(maps[0] >= how.nucleus, how.max_hole_um2 / MPP**2)
    rise, across = cv2.getDerivKernels(1, 0, size)
    ramp = np.arange(size) - size // 2
    scale = 1 / float((rise.ravel() * ramp).sum() * across.sum())
    down = cv2.Sobel(maps[1], cv2.CV_32F, 0, 1, ksize=size, scale=scale)
    right = cv2.Sobel(maps[2], cv2.CV_32F, 1, 0, ksize=size, scale=scale)
    far = np.maximum(abs(maps[1]), abs(maps[2]))
    core = mask & (np.minimum(down, right) >= -steep) & (far <= radius)
    return grown(core, 1 - far, mask, how)


def by_flow(maps: np.ndarray, how: Separation, steps: int, votes: float) -> np.ndarray:
    """Each pixel of a nucleus goes where the map sends it, `steps` times; where many meet is their center."""
    mask = without_holes(maps[0] >= how.nucleus, how.max_hole_um2 / MPP**2)
    height, width = mask.shape
    start = np.flatnonzero(mask)
    y, x = (axis.astype(np.float32) for axis in np.divmod(start, width))
    way = maps[1:].reshape(2, -1) * UNIT_PX
    end = start
    for _ in range(steps):
        y, x = y + way[0, end], x + way[1, end]
        end = np.rint(y).clip(0, height - 1).astype(np.int64) * width + np.rint(x).clip(0, width - 1).astype(np.int64)
    met = np.bincount(end, minlength=mask.size).reshape(mask.shape).astype(np.float32)
    met = cv2.GaussianBlur(met, (0, 0), 1)
    centers = ranked_pieces(met >= votes)
    labels = np.zeros(mask.shape, np.float32)
    labels.ravel()[start] = cv2.dilate(centers, EIGHT).ravel()[end]
    return finished(one_piece(labels), mask, how)


def by_star(maps: np.ndarray, how: Separation, least: float, overlap: float, shapes: bool) -> np.ndarray:
    """Star-convex shapes at peaks of the depth, those dropped that lie by more than `overlap` in deeper ones.

    Args:
        shapes: nuclei are the shapes; else those lead a flood of the nucleus map.
    """
    mask = without_holes(maps[0] >= how.nucleus, how.max_hole_um2 / MPP**2)
    depth = cv2.GaussianBlur(maps[1], (0, 0), 1)
    peaks = np.flatnonzero(mask & (depth >= least) & (depth == cv2.dilate(depth, np.ones((5, 5), np.uint8))))
    peaks = peaks[np.argsort(-depth.ravel()[peaks], kind="stable")]
    y, x = np.divmod(peaks, mask.shape[1])
    far = np.maximum(maps[2:].reshape(RAYS, -1)[:, peaks], 0) * UNIT_PX
    corners = np.stack([x + far * np.cos(ANGLES)[:, None], y + far * np.sin(ANGLES)[:, None]], -1).transpose(1, 0, 2)
    corners = np.rint(corners).astype(np.int32).clip(0, np.array(mask.shape[::-1], np.int32) - 1)
    claimed = np.zeros(mask.shape, np.float32)
    low, high = corners.min(1), corners.max(1) + 1
    for number, (shape, (left, top), (right, bottom)) in enumerate(zip(corners, low, high, strict=True), 1):
        one = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(one, [shape - (left, top)], 1)
        here = claimed[top:bottom, left:right]
        free = (one > 0) & (here == 0)
        if np.count_nonzero(free) >= (1 - overlap) * np.count_nonzero(one):
            here[free] = number
    if shapes:
        return numbered(one_piece(claimed), how)
    return finished(one_piece(claimed * mask), mask, how)


def one_piece(labels: np.ndarray) -> np.ndarray:
    """Labels (H, W) float32, of each the largest 8-connected piece; what else they held is left to the flood."""
    return largest_pieces(labels.astype(np.int32)).astype(np.float32)


def grown(core: np.ndarray, lead: np.ndarray, mask: np.ndarray, how: Separation) -> np.ndarray:
    """Pieces of `core` of some size flood the mask, first where `lead` is high."""
    pieces, stats = connected(core, 8)
    core = core & (stats[:, cv2.CC_STAT_AREA] >= how.min_seed_um2 / MPP**2)[pieces]
    labels = ranked_pieces(core)
    for level in LEVELS:
        flood(labels, mask & (lead >= level), round(how.reach_um / MPP))
    return finished(labels, mask, how)


def finished(labels: np.ndarray, mask: np.ndarray, how: Separation) -> np.ndarray:
    """Labels (H, W) float32 after they flooded the mask; pieces of it that hold none are nuclei; no small ones."""
    bodies, stats = connected(mask, 8)
    seeded = np.zeros(len(stats), bool)
    seeded[bodies[labels > 0]] = True
    alone = mask & ~seeded[bodies]
    labels = np.where(alone, labels.max() + ranked_pieces(alone), labels).astype(np.float32)
    flood(labels, mask, round(how.reach_um / MPP))
    return numbered(labels, how)


def numbered(labels: np.ndarray, how: Separation) -> np.ndarray:
    """The label map (H, W) int32, without nuclei that are too small."""
    found = labels.astype(np.int32)
    large = np.bincount(found.ravel()) >= how.min_area_um2 / MPP**2
    large[0] = False
    return np.where(large[found], found, 0)


# --- the comparison


@dataclass(frozen=True)
class Design:
    """A way from the maps of one network to nuclei, and what of it is chosen, beside the thresholds of every design.

    Attributes:
        weights: an arm, or "default" for the model that comes with the package, trained no further.
    """

    title: str
    weights: str
    separated: Callable[..., np.ndarray]
    grid: dict[str, tuple]
    seeds: tuple[float, ...] = (0.5,)             # thresholds of the interior map, where there is one


SEEDS = (0.4, 0.5, 0.6, 0.7, 0.8)
TREE = {"top": (0.6, 0.7, 0.8), "least_um2": (2.5, 4.0)}
DESIGNS = {
    "today": Design("interior from 0.5, flooded: as shipped", "default", by_interior, {}),
    "higher": Design("the same, interior from a chosen threshold", "default", by_interior, {}, SEEDS),
    "tree": Design("the same, divided where a higher level divides it", "default", by_interior_tree, TREE,
                   (0.3, 0.4, 0.5)),
    "blend": Design("interior blended with the depth of the nucleus map", "default", by_interior_and_depth,
                    {"weight": (0.15, 0.25, 0.4)}, (0.5, 0.6, 0.7, 0.8)),
    "depth": Design("depth of the nucleus map alone", "default", by_depth, {"share": (0.8, 0.9, 0.95)}),
    "interior": Design("interior, flooded", "interior", by_interior, {}, SEEDS),
    "interior_tree": Design("the same, divided where a higher level divides it", "interior", by_interior_tree, TREE,
                            (0.3, 0.4, 0.5)),
    "hover": Design("distances from the center, their slopes", "hover", by_hover,
                    {"size": (5, 7, 11), "steep": (-0.05, 0.0, 0.1), "radius": (0.3, 0.4, 0.5, 0.7)}),
    "flow": Design("flow to the center", "flow", by_flow, {"steps": (2, 3, 4, 6), "votes": (2.0, 4.0, 8.0)}),
    "star": Design("star-convex shapes, 16 rays", "star", by_star,
                   {"least": (0.1, 0.2, 0.35, 0.5), "overlap": (0.2, 0.3, 0.5), "shapes": (False, True)}),
}
KEPT = ("dice", "aji", "pq", "f1_50", "nuclei_truth", "nuclei_found")
TUNED_EVERY = {"tnbc": 2, "nuinsseg": 24}         # training images on which options are chosen: as many of either set
COMMON = {"nucleus": (0.4, 0.5, 0.6), "min_area_um2": (8.0, 14.0)}


def maps_of(weights: str, pictures: Sequence[Picture], out: Path, part: str) -> list[np.ndarray]:
    """The maps of every picture, from OUT where they were computed before."""
    file = out / f"{weights}.{part}.npz"
    if not file.is_file():
        model, guide, _ = checkpoint.load("default")
        assert guide is not None
        if weights != "default":
            model = with_head(model, ARMS[weights].channels, 0)
            model.load_state_dict(torch.load(out / f"{weights}.pt", weights_only=True)["model"])
        model = fold_batch_norm(model.eval())
        found = {}
        with torch.inference_mode():
            for drawn in pictures:
                image = torch.from_numpy(padded(drawn.image_rgb, 32)).permute(2, 0, 1)[None].float()
                image = image.contiguous(memory_format=torch.channels_last)
                maps = model(image, guide(image))[0]
                logits = {"default": 2, "interior": 2, "star": 2}.get(weights, 1)
                maps[:logits] = maps[:logits].sigmoid()
                found[drawn.id] = maps[:, : drawn.labels.shape[0], : drawn.labels.shape[1]].half().numpy()
        np.savez(file, **found)
    with np.load(file) as found:
        return [found[drawn.id].astype(np.float32) for drawn in pictures]


def chosen(design: Design, pictures: Sequence[Picture], maps: Sequence[np.ndarray]) -> tuple[Separation, dict]:
    """The options with the highest mean of Dice, AJI and PQ, both data sets counting alike.

    First what the design is about, at a nucleus threshold of 0.5 and a least area of 8 um2, then those two.
    """
    def mean(choice: tuple[Separation, dict]) -> float:
        scores: dict[str, list[float]] = {}
        for drawn, of_it in zip(pictures, maps, strict=True):
            found = design.separated(of_it, choice[0], **choice[1])
            scores.setdefault(drawn.group.partition("/")[0], []).append(quality(drawn, found))
        return float(np.mean([np.mean(values) for values in scores.values()]))

    own = [(Separation(0.5, seed, 8.0), dict(zip(design.grid, values, strict=True)))
           for seed in design.seeds for values in itertools.product(*design.grid.values())]
    how, rest = max(own, key=mean)
    return max(((replace(how, nucleus=nucleus, min_area_um2=area), rest)
                for nucleus, area in itertools.product(*COMMON.values())), key=mean)


def seconds_per_megapixel(design: Design, choice: tuple[Separation, dict], maps: Sequence[np.ndarray]) -> float:
    """Least processor time of five separations of a mosaic of 16 pictures, 1024 px square."""
    crops = [of_it[:, :256, :256] for of_it in maps if min(of_it.shape[1:]) >= 256][::4][:16]
    mosaic = np.ascontiguousarray(np.block([[crops[4 * row + column] for column in range(4)] for row in range(4)]))
    times = []
    for _ in range(5):
        start = time.process_time()
        design.separated(mosaic, choice[0], **choice[1])
        times.append(time.process_time() - start)
    return min(times) / (mosaic.shape[1] * mosaic.shape[2] / 1e6)


def judged(name: str, data: Path, out: Path) -> dict:
    """The options of a design, chosen on training images, its time, and its scores of every validation image."""
    design, held = DESIGNS[name], listed(data, "val")
    tuned = listed(data, "train", TUNED_EVERY)
    how, rest = choice = chosen(design, tuned, maps_of(design.weights, tuned, out, "train"))
    maps = maps_of(design.weights, held, out, "val")
    rows = []
    for drawn, of_it in zip(held, maps, strict=True):
        scores = asdict(score(drawn.labels, design.separated(of_it, how, **rest), drawn.ignore))
        dataset, _, number = drawn.id.partition("/")
        rows.append({"dataset": dataset, "id": number, "design": name, **{key: scores[key] for key in KEPT}})
    seconds = seconds_per_megapixel(design, choice, maps)
    common = {key: getattr(how, key) for key in ("nucleus", "interior", "min_area_um2")}
    facts = {"title": design.title, "weights": design.weights, "tuned_on": len(tuned), "chosen": common | rest,
             "seconds_per_megapixel": round(seconds, 4)}
    return {"facts": facts, "images": rows}


def score_all(names: Sequence[str], data: Path, out: Path, facts: dict) -> None:
    """Write results/instances.json; what was judged before is read from OUT."""
    cv2.setNumThreads(1)
    rows, designs = [], {}
    for name in names:
        file = out / f"{name}.scores.json"
        if not file.is_file():
            file.write_text(json.dumps(judged(name, data, out)))
        found = json.loads(file.read_text())
        designs[name] = found["facts"]
        rows += found["images"]
        means = pd.DataFrame(found["images"]).groupby("dataset")[["dice", "aji", "pq", "f1_50"]].mean().round(4)
        print(json.dumps({"design": name} | designs[name] | means.T.to_dict()), flush=True)
    write_scores(RESULTS / "instances.json", pd.DataFrame(rows), facts | {"mpp": MPP, "designs": designs})


def main() -> int:
    """Train arms, or score them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "train":
        train(given.arms or list(ARMS), listed(given.data, "train"), given.out, given.steps, given.lr, given.seed)
    else:
        facts = {"steps": given.steps, "batch": 8, "patch_px": PATCH_PX, "lr": given.lr, "seed": given.seed}
        score_all(given.arms or list(DESIGNS), given.data, given.out, facts)
    return 0


def listed(data: Path, part: str, every: dict[str, int] | None = None) -> list[Picture]:
    """The pictures of one part of results/split.json at 0.5 microns per pixel, or every n-th of each data set."""
    members = {(member.dataset, member.id) for member in read_manifest(RESULTS / "split.json").parts[part]}
    sets = []
    for name in ("nuinsseg", "tnbc"):
        whole = read_dataset(name, data / name)
        numbers = [number for number, own in enumerate(whole.ids) if (name, own) in members]
        sets.append(whole.subset(numbers[:: (every or {}).get(name, 1)]))
    return pictures_of(sets, MPP)


if __name__ == "__main__":
    sys.exit(main())
