"""What a training is fed: patches drawn from annotated images, and whole images to validate on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .batches import Patches, Picture, collate, picture
from .datasets import Dataset
from .guides import FrozenGuide
from .latents import LatentCache
from .normalize import StainNormalizer
from .recipe import TrainOptions
from .together import Share, Stretch
from .types import UserError

LATENTS_MAX_BYTES = 8 * 2**30
MOST_WORKERS = 8            # that are started unasked: a batch of 8 patches takes one core about a tenth of a second


class Held(NamedTuple):
    """A validation image (1, 3, H, W) float32, its labels (H, W) and what to ignore; its share of its data set."""

    image: Tensor
    labels: np.ndarray
    ignore: np.ndarray | None
    share: float


def loaders(
    train: list[Picture], val: list[Picture], out: Path, guide: FrozenGuide | None, options: TrainOptions,
    processes: int = 1, workers: int = 0,
) -> tuple[DataLoader, DataLoader]:
    """Batches to train on, drawn anew in every epoch, and whole images to validate on; of each this process's share.

    Of several data sets to validate on each counts alike, however many images it has.

    Args:
        workers: processes that draw the patches of this one, ahead of the steps; 0 draws them here, in between. They
            change nothing of what is drawn.
    """
    cache = pool = None
    if guide is not None and options.latents == "cached":
        cache, pool = LatentCache(out / "latents", LATENTS_MAX_BYTES), options.patch_px // 16
    around = surroundings(guide, cache, options)
    factors = None if options.mpp_range is None else (options.mpp_range[0] / options.mpp_range[1], 1.0)
    patches = Patches(
        train,
        options.patch_px,
        options.augmentation,
        options.seed,
        options.balance,
        guide,
        cache,
        pool,
        around,
        factors,
        options.gap_weight,
    )
    sets = Counter(drawn.group.partition("/")[0] for drawn in val)
    held = [(drawn, 1 / sets[drawn.group.partition("/")[0]]) for drawn in val]
    steps = options.steps_per_epoch or math.ceil(len(train) / options.batch)
    if workers:
        cv2.setNumThreads(1)        # threads do not come along with a fork, and OpenCV would wait for them for ever
    ahead = {"num_workers": workers, "persistent_workers": True, "worker_init_fn": alone} if workers else {}
    return (
        DataLoader(
            patches, batch_size=options.batch // processes, sampler=Stretch(steps, options.batch), collate_fn=collate,
            **ahead,
        ),
        DataLoader(held, 1, sampler=Share(len(held)), collate_fn=one_image),  # pyright: ignore[reportArgumentType]
    )


def alone(_worker: int) -> None:
    """Keep a drawing process to one core."""
    if cv2.getNumThreads() != 1:                       # where it was not forked, so that `loaders` has not seen to it
        cv2.setNumThreads(1)


def worker_count(asked: int | None, options: TrainOptions, device: torch.device, devices: int = 1) -> int:
    """How many processes draw patches for each one that trains; where not asked, as many as keep a GPU busy.

    Args:
        asked: None where the user did not say. devices: processes that train on this machine.

    Raises:
        UserError: fewer than none are asked for, or some where patches depend on what this process knows.
    """
    here = "cached latents" if options.latents == "cached" else "--hard" if options.hard else None
    if asked is None:
        spare = (os.cpu_count() or 1) // devices - 1
        return 0 if device.type == "cpu" or here else max(min(spare, MOST_WORKERS), 0)
    if asked < 0:
        raise UserError(f"--workers must be 0 or more, not {asked}")
    if asked and here:
        raise UserError(f"--workers {asked} does not go with {here}, which one process alone keeps; leave it out")
    return asked


def training_pictures(
    train: Sequence[Dataset], options: TrainOptions, stain: StainNormalizer | None = None
) -> list[Picture]:
    """What patches are drawn from: all samples at the finest resolution that patches are shown at."""
    finest = options.mpp if options.mpp_range is None else options.mpp_range[0]
    names = semantic_only(options, train)
    return [
        dataclasses.replace(drawn, semantic_only=dataset.name in names)
        for dataset in train
        for drawn in pictures_of([dataset], finest, options.exposure, stain)
    ]


def pictures_of(
    datasets: Sequence[Dataset], mpp: float, exposure: bool = False, stain: StainNormalizer | None = None
) -> list[Picture]:
    """All samples at one resolution, exposure and stain if asked; groups and ids carry the name of their data set."""
    return [
        dataclasses.replace(p, id=f"{dataset.name}/{p.id}", group=f"{dataset.name}/{p.group}")
        for dataset in datasets
        for p in (picture(sample, mpp, exposure, stain) for sample in dataset)
    ]


def one_image(batch: list[tuple[Picture, float]]) -> Held:
    """A validation batch: one picture."""
    ((drawn, share),) = batch
    image = torch.from_numpy(drawn.image_rgb.copy()).permute(2, 0, 1)[None].float()
    return Held(image, drawn.labels, drawn.ignore, share)


def semantic_only(options: TrainOptions, train: Sequence[Dataset]) -> set[str]:
    """The names of the data sets that teach the nucleus map alone; UserError where one is none, or all of them do."""
    names, there = set(options.semantic_only), {dataset.name for dataset in train}
    if unknown := sorted(names - there):
        raise UserError(f"--semantic-only {unknown[0]}: no such training data; choose from {', '.join(sorted(there))}")
    if names == there:
        raise UserError("--semantic-only names all training data, so nothing would teach to tell nuclei apart")
    return names


def surroundings(guide: FrozenGuide | None, cache: LatentCache | None, options: TrainOptions) -> int:
    """How far beyond a patch, on every side, the guide sees at each step, in pixels."""
    if guide is None or cache is not None:
        return 0
    if guide.scale == "region":
        assert guide.image_px is not None
        return (guide.image_px - options.patch_px) // 2
    return 0 if guide.image_px is not None else options.context_px
