"""Processes that train one model together (Lightning's DDP): who this one is, and which share of the work it has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import distributed
from torch.utils.data import Sampler

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")      # what torchrun, SLURM and Lightning itself tell a process


def leads() -> bool:
    """Whether this process is the one that writes and speaks; known before the group is there."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    told = next((os.environ[name] for name in RANKS if os.environ.get(name)), "0")
    return told == "0" and os.environ.get("NODE_RANK", "0") == "0"


def place() -> tuple[int, int]:
    """The number of this process in its group, and how many there are; (0, 1) where it is alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def mean_of_all(values: list[tuple[float, float]], device: torch.device) -> float:
    """The mean of the values of all processes, pairs of value and weight; each has at least one."""
    weighted, weights = sum(value * weight for value, weight in values), sum(weight for _, weight in values)
    sums = torch.tensor([weighted, weights], dtype=torch.float64, device=device)
    if place()[1] > 1:
        distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


class Stretch(Sampler):
    """The patch numbers of one epoch, so that a run resumed at an epoch draws what an unbroken one draws.

    Processes that train together have their parts of each batch: whatever their number, a step sees the same patches.

    Args:
        steps: in an epoch. batch: patches of a step, of all processes together; a multiple of their number.
    """

    def __init__(self, steps: int, batch: int):
        self.steps, self.batch, self.epoch = steps, batch, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batch // place()[1]

    def __iter__(self) -> Iterator[int]:
        number, count = place()
        share = self.batch // count
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            first = step * self.batch + number * share
            yield from range(first, first + share)


class Share(Sampler):
    """Every number below `count`, dealt to the processes by turns."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return len(range(*self._range()))

    def __iter__(self) -> Iterator[int]:
        return iter(range(*self._range()))

    def _range(self) -> tuple[int, int, int]:
        number, count = place()
        return number, self.count, count
