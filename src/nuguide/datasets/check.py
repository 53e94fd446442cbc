"""Whether a folder holds a data set soundly."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import skimage.measure

from nuguide.datasets import DATASETS, Dataset
from nuguide.datasets.conic import counts_problems
from nuguide.datasets.cryonuseg import ANNOTATORS
from nuguide.datasets.dataset import UnsoundError
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import components
from nuguide.datasets.prepared import is_prepared
from nuguide.datasets.splits import content_hash
from nuguide.types import Sample, UserError

FEW_AREAS = 2  # one nucleus may be drawn with a speck beside it, but not as more areas
SPECK_PX = 20  # separate areas of a label below this are taken for slips of the pen


@dataclass(frozen=True)
class Report:
    """What a folder holds.

    Attributes:
        name: of the data set, as in `DATASETS`.
        images, groups, nuclei: how many of them could be read.
        sizes: "512 x 512" (width x height in pixels) -> images of that size.
        problems: one line each, naming the file; none in a sound data set.
        notes: what is worth knowing and no fault.
    """

    name: str
    images: int = 0
    groups: int = 0
    nuclei: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(
    name: str,
    root: Path,
    *,
    annotator: str | None = None,
    partial: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads every image and label map of a data set once, and reports what is wrong; it goes on after each problem.

    Found are: images and labels without partner, files that cannot be read, sizes that differ between image and labels
    or from the published one, labels that are no label numbers, a mask in place of a label map, nuclei that leave no
    background, images whose pixels are the same, and numbers of images that are not the published ones. Label numbers
    that cover separate areas, as two nuclei with one number do, are noted and no fault: all readers keep them whole.

    Args:
        name: of the data set, as in `DATASETS`.
        root: its folder.
        annotator: of cryonuseg; None checks all three annotations.
        partial: the folder is known to hold a part of the set: the number of images is not compared.
        watch: called with (images read, images in all).

    Raises UserError for an unknown name or annotator, and where there is no folder `root`, with where to get the set.
    """
    root = Path(root)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    if annotator is not None and (name != "cryonuseg" or annotator not in ANNOTATORS):
        raise UserError(f"--annotator {annotator}: only cryonuseg has annotators: {', '.join(ANNOTATORS)}")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root} {what}; expected a folder of {FACTS[name].layout}{source(name)}")
    report = Report(name)
    if not any(root.iterdir()):
        report.problems.append(f"{root} is empty; expected {FACTS[name].layout}{source(name)}")
        return report
    annotators = [annotator] if annotator else list(ANNOTATORS) if name == "cryonuseg" else [None]
    opened = [_open(name, root, given, report.problems) for given in annotators]
    report.problems.extend(EXTRAS[name](root) if name in EXTRAS and not is_prepared(root) else [])
    first = opened[0]
    if first is not None:
        report = _read_all(first, report, FACTS[name].size, watch)
        if not partial and not is_prepared(root):
            report.problems.extend(_count_problems(name, root, len(first)))
    for given, dataset in zip(annotators[1:], opened[1:], strict=True):
        if dataset is not None:
            report.notes.append(f"{given}: {_check_labels(dataset, report.problems)} nuclei")
    return report


def lines(report: Report, root: Path) -> Sequence[str]:
    """The report in words: what the folder holds, the license and the notes; not the problems."""
    facts = FACTS[report.name]
    sizes = ", ".join(f"{count} of {size}" for size, count in sorted(report.sizes.items(), key=lambda item: -item[1]))
    told = [
        f"{facts.title} in {root}: {report.images} images, {report.groups} groups, {report.nuclei} nuclei"
        + (f" (published: {facts.nuclei})" if facts.nuclei else ""),
        *([f"sizes (width x height): {sizes}"] if sizes else []),
        *([f"license: {facts.license}"] if facts.license else []),
    ]
    return [*told, *report.notes]


def source(name: str) -> str:
    """Where to get a data set, as the end of a sentence; "" for a user's own images."""
    facts = FACTS[name]
    return f"; get it from {facts.page}" + (" (needs a login)" if facts.login else "") if facts.page else ""


def _open(name: str, root: Path, annotator: str | None, problems: list[str]) -> Dataset | None:
    """What can be read of a data set, or None where nothing can; the reasons are added to `problems`."""
    options: dict[str, Any] = {} if annotator is None else {"annotator": annotator}
    try:
        dataset = DATASETS[name](root, **options)
    except UnsoundError as error:
        problems.extend(problem for problem in error.problems if problem not in problems)
        return error.usable
    except UserError as error:
        problems.append(f"{error}{source(name)}")
        return None
    if not len(dataset):
        problems.append(f"{root} holds no image of the data set {name}{source(name)}")
    return dataset


def _read_all(
    dataset: Dataset, report: Report, size: tuple[int, int] | None, watch: Callable[[int, int], None] | None
) -> Report:
    """The report with what reading every sample of the data set shows."""
    problems = list(report.problems)
    sizes: Counter[str] = Counter()
    groups: set[str] = set()
    first_with: dict[str, str] = {}
    nuclei = 0
    scattered: dict[str, list[int]] = {}
    for index, entry in enumerate(dataset.entries):
        sample = _sample(dataset, index, problems)
        if sample is not None:
            where = entry.where or entry.id
            height, width = sample.labels.shape
            sizes[f"{width} x {height}"] += 1
            groups.add(sample.group)
            if size is not None and (width, height) != size:
                problems.append(f"{where} has {width} x {height} pixels; those of the set have {size[0]} x {size[1]}")
            twin = first_with.setdefault(content_hash(sample.image_rgb), where)
            if twin != where:
                problems.append(f"{where} shows the same image as {twin}")
            nuclei += _count_nuclei(sample.labels, where, problems)
            if numbers := in_separate_areas(sample.labels):
                scattered[where] = numbers
        if watch is not None:
            watch(index + 1, len(dataset))
    if sizes and not nuclei:
        problems.append(f"none of the {sizes.total()} images has a nucleus: the labels are empty")
    notes = [*report.notes, *_scattered_note(scattered)]
    return Report(report.name, sizes.total(), len(groups), nuclei, dict(sizes), problems, notes)


def in_separate_areas(labels: np.ndarray) -> list[int]:
    """The numbers of a label map (H, W) that two or more areas apart from each other have; specks do not count."""
    areas = np.asarray(skimage.measure.label(labels, connectivity=2))
    first, sizes = np.unique(areas, return_index=True, return_counts=True)[1:]
    of_area = labels.ravel()[first]
    numbers, times = np.unique(of_area[(of_area > 0) & (sizes >= SPECK_PX)], return_counts=True)
    return [int(number) for number in numbers[times > 1]]


def _scattered_note(scattered: dict[str, list[int]]) -> list[str]:
    """A line on numbers that cover separate areas, by where they are; none where there are none."""
    if not scattered:
        return []
    worst = max(scattered, key=lambda where: len(scattered[where]))
    total = sum(map(len, scattered.values()))
    shown = ", ".join(map(str, scattered[worst][:5])) + (", ..." if len(scattered[worst]) > 5 else "")
    return [
        f"{total} label number{'s' * (total != 1)} of {len(scattered)} image{'s' * (len(scattered) != 1)} "
        f"cover{'s' * (total == 1)} separate areas, each taken for one nucleus; most in the labels of {worst}: {shown}"
    ]


def _sample(dataset: Dataset, index: int, problems: list[str]) -> Sample | None:
    try:
        return dataset[index]
    except UserError as error:
        where = dataset.entries[index].where
        named = str(error) if where.split("[")[0] in str(error) else f"{where}: {error}"
        problems.append(named)
        return None


def _check_labels(dataset: Dataset, problems: list[str]) -> int:
    """How many nuclei a further annotation of the same images has; problems that are new are added."""
    nuclei = 0
    for index, entry in enumerate(dataset.entries):
        found: list[str] = []
        sample = _sample(dataset, index, found)
        nuclei += _count_nuclei(sample.labels, entry.where, found) if sample is not None else 0
        problems.extend(problem for problem in found if problem not in problems)
    return nuclei


def _count_nuclei(labels: np.ndarray, where: str, problems: list[str]) -> int:
    """The nuclei of a label map; what cannot be nuclei is added to `problems`."""
    numbers = np.unique(labels)
    nuclei = int((numbers > 0).sum())
    if nuclei == 1 and (areas := int(components(labels > 0).max())) > FEW_AREAS:
        problems.append(f"the labels of {where} have one number for {areas} separate areas: a mask, no label map")
    if labels.size and numbers[0] > 0:
        problems.append(f"the labels of {where} leave no background")
    return nuclei


def _count_problems(name: str, root: Path, found: int) -> list[str]:
    """A line if the number of images is none of the published ones."""
    published = FACTS[name].images
    if not published or found in published:
        return []
    numbers = " or ".join(str(number) for number in published)
    return [f"{root} holds {found} usable images, but {numbers} are published{source(name)}"]


def _unknown_slides(root: Path) -> list[str]:
    """Slides of TNBC beside the 11 of version 1.0 and the 3 of brain that version 1.1 adds."""
    slides = sorted([*root.glob("Slide_*"), *root.glob("*/Slide_*")])
    known = {f"Slide_{number:02}" for number in range(1, 15)}
    return [f"{slide} is none of the slides 01 to 14; take it out" for slide in slides if slide.name not in known]


def _vague_areas_without_image(root: Path) -> list[str]:
    """Masks of vague areas of NuInsSeg that no image uses."""
    vague = sorted(path for path in root.glob("*/vague areas/mask binary/*") if not path.name.startswith("."))
    return [
        f"{path} has no image in {path.parents[2] / 'tissue images'}"
        for path in vague
        if path.suffix != ".png" or not any((path.parents[2] / "tissue images").glob(f"{glob.escape(path.stem)}.*"))
    ]


# Further checks of a data set's official files.
EXTRAS: dict[str, Callable[[Path], list[str]]] = {
    "conic": counts_problems,
    "nuinsseg": _vague_areas_without_image,
    "tnbc": _unknown_slides,
}
