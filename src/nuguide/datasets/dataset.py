"""A data set is a sequence of samples whose pixels are read only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from nuguide.types import Sample, UserError

SHIPPABLE_LICENSES = frozenset({"CC0", "CC BY 4.0"})


@dataclass(frozen=True)
class Entry:
    """What is known of a sample before its pixels are read.

    Attributes:
        id: unique within its data set.
        group: what must not be divided by a split: the patient, slide or organ.
        load: reads the sample; raises UserError naming the file at fault.
        where: the file that holds the image, and the place in it where it holds several; for messages only.
    """

    id: str
    group: str
    load: Callable[[], Sample]
    where: str = ""


class Dataset(Sequence[Sample]):
    """Samples in a fixed order, each read from disk anew when it is asked for.

    Attributes:
        name: of the data set, as in `DATASETS`.
        entries: one a sample; `ids` and `groups` come from here, without reading a pixel.
        license: as its publisher states it, such as "CC BY 4.0", or None where unknown (a user's own folder).
    """

    def __init__(self, name: str, entries: Iterable[Entry], license: str | None = None):
        self.name = name
        self.entries = tuple(entries)
        self.license = license

    @property
    def ids(self) -> list[str]:
        return [entry.id for entry in self.entries]

    @property
    def groups(self) -> list[str]:
        return [entry.group for entry in self.entries]

    @property
    def may_ship(self) -> bool:
        """Whether weights trained on these images may be shipped with the project, given attribution."""
        return self.license in SHIPPABLE_LICENSES

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        """One sample, read and checked (UserError where it cannot be), or for a slice the data set of those."""
        if isinstance(index, slice):
            return Dataset(self.name, self.entries[index], self.license)
        sample = self.entries[index].load()
        if problem := fault(sample):
            raise UserError(f"{self.name}, sample {sample.id}: {problem}")
        return sample

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The data set of these samples, in the order of `indices`."""
        return Dataset(self.name, [self.entries[index] for index in indices], self.license)

    def check(self) -> None:
        """Reads every sample once and raises one UserError that lists every fault found."""
        problems = []
        for index in range(len(self)):
            try:
                self[index]
            except UserError as error:
                problems.append(str(error))
        if problems:
            count = f"{len(problems)} of {len(self)} samples cannot be used"
            raise UserError(f"{self.name}: {count}: " + "; ".join(problems))

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} samples, {len(set(self.groups))} groups, license={self.license!r})"


class UnsoundError(UserError):
    """A data set with problems.

    Attributes:
        problems: one line each, naming the file.
        usable: the samples that have none of these problems.
    """

    def __init__(self, root: Path, problems: Sequence[str], usable: Dataset):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{root} has {count}: " + "; ".join(problems))
        self.problems = tuple(problems)
        self.usable = usable


def sound(dataset: Dataset, root: Path, problems: Sequence[str]) -> Dataset:
    """The data set, if there are no problems; else raises UnsoundError, which lists them all and holds the rest."""
    if problems:
        raise UnsoundError(root, problems, dataset)
    return dataset


def fault(sample: Sample) -> str | None:
    """What makes a sample unusable, in words, or None."""
    image, labels, ignore = sample.image_rgb, sample.labels, sample.ignore
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        return f"the image must be (H, W, 3) uint8, but is {image.shape} {image.dtype}"
    if labels.shape != image.shape[:2]:
        return f"image and labels differ in size: {image.shape[:2]} and {labels.shape} (rows, columns)"
    if not np.issubdtype(labels.dtype, np.integer):
        return f"labels must be integers, but are {labels.dtype}"
    if labels.size and labels.min() < 0:
        return f"labels must not be negative, but the smallest is {labels.min()}"
    if ignore is not None and (ignore.shape != labels.shape or ignore.dtype != np.bool_):
        return f"the ignored area must be {labels.shape} bool, but is {ignore.shape} {ignore.dtype}"
    if not 0 < sample.mpp < float("inf"):
        return f"microns per pixel must be above 0, but is {sample.mpp}"
    return None
