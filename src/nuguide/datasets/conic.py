"""CoNIC 2022: 4981 patches of H&E-stained colon at 20x in two arrays."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import not_found, open_array, read_table
from nuguide.datasets.prepared import LAYOUT, is_prepared, read_prepared
from nuguide.types import Sample, UserError

LICENSE = FACTS["conic"].license
OFFICIAL = "images.npy, labels.npy, counts.csv and patch_info.csv"
MPP = 0.5
IMAGES = (None, 256, 256, 3)
LABELS = (None, 256, 256, 2)
TYPES = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
OWN_SEED, OWN_DRAWS, OWN_HELD = 5, 10, 0.2  # of its own division; the first draw is the one that is used
COUNTS_SHOWN = 5  # faults of counts.csv that are told one by one
COUNTED = np.s_[16:-16, 16:-16]  # the part of a patch whose nuclei are counted
MOST_ODD = 0.01  # share of the patches whose counts may not be of their labels; more, and the rows are of others


def read_conic(root: Path) -> Dataset:
    """CoNIC, 256 x 256 at 20x (about 0.5 microns per pixel), grouped by source image: "consep_1" of "consep_1-0042".

    The arrays are mapped into memory, so that a sample reads its own patch only.

    Args:
        root: the official folder, or the one above it, of `images.npy` (N, 256, 256, 3) uint8, `labels.npy`
            (N, 256, 256, 2) of integers (instance, then class 0..6), `patch_info.csv` (column `patch_info`, names
            `<source>-<index>` in the order of the arrays) and `counts.csv`, which is not needed here; or the prepared
            layout.

    Raises one UserError that lists every problem: a file that is missing, no array of that shape and type, arrays and
    names that differ in number, a name without source or given twice.

    Source: Graham et al., arXiv 2111.14485; https://conic-challenge.grand-challenge.org; CC BY-NC-SA 4.0.
    """
    if is_prepared(root):
        return read_prepared(root, name="conic", license=LICENSE, mpp=MPP)
    folder = conic_folder(root)
    if folder is None:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    problems: list[str] = []
    lengths = [_length(folder / "images.npy", IMAGES, ["u1"], problems)]
    lengths.append(_length(folder / "labels.npy", LABELS, ["u", "i"], problems))
    names = _names(folder / "patch_info.csv", problems)
    if not problems and {*lengths} != {len(names)}:
        problems.append(
            f"{folder / 'patch_info.csv'} names {len(names)} patches, but images.npy holds {lengths[0]} and labels.npy "
            f"{lengths[1]}; copy all three from the same release"
        )
    paired = None not in lengths and {*lengths} == {len(names)}  # else no one can tell which patch is which
    entries = [
        _entry(folder, index, *name) for index, name in enumerate(names if paired else []) if name is not None
    ]
    return sound(Dataset("conic", entries, LICENSE), root, problems)


def conic_split(groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """(train, held) indices of the division of the challenge's baseline: 80/20 by source image, drawn by cohort.

    The sources, in the order of their names, pass scikit-learn's StratifiedShuffleSplit with the cohort (what stands
    before the first "_") as stratum, ten draws of seed 5, of which this is the first.

    Args:
        groups: the source of each patch, "consep_1" of "consep_1-0042"; their order does not matter.

    Raises:
        ValueError: a cohort with fewer than two sources, or too few sources.
        UserError: scikit-learn is not installed.

    Source: the baseline that accompanies the CoNIC challenge, Graham et al., arXiv 2111.14485.
    """
    try:
        from sklearn.model_selection import StratifiedShuffleSplit
    except ModuleNotFoundError as error:
        raise UserError("CoNIC's own split needs scikit-learn; install it: pip install 'nuguide[train]'") from error
    sources = np.unique(np.array(groups))
    cohorts = [str(source).split("_")[0] for source in sources]
    draws = StratifiedShuffleSplit(OWN_DRAWS, train_size=1 - OWN_HELD, test_size=OWN_HELD, random_state=OWN_SEED)
    held = set(sources[next(draws.split(sources, cohorts))[1]])
    return (
        [index for index, group in enumerate(groups) if group not in held],
        [index for index, group in enumerate(groups) if group in held],
    )


def conic_folder(root: Path) -> Path | None:
    """The folder of the arrays: `root` or one in it."""
    folders = [root, *sorted(path for path in root.glob("*") if path.is_dir())]
    files = ("images.npy", "labels.npy")
    return next((folder for folder in folders if any((folder / file).is_file() for file in files)), None)


def counts_problems(root: Path) -> list[str]:
    """What is wrong with `counts.csv`: its columns, the number of its rows, counts that are no whole numbers, or that
    are not of the labels.

    The file has a row a patch and a column a type, nuclei in the central 224 x 224 pixels.
    """
    folder = conic_folder(root)
    if folder is None:
        return []
    path, names = folder / "counts.csv", folder / "patch_info.csv"
    try:
        rows = read_table(path)
        patches = len(read_table(names))
    except UserError as error:
        return [str(error)]
    if rows and not set(TYPES) <= set(rows[0]):
        return [f"{path} has the columns {', '.join(rows[0])}; it must have {', '.join(TYPES)}"]
    problems = [f"{path} has {len(rows)} rows, but {names.name} {patches}"] if len(rows) != patches else []
    faults = [
        f"{path}, line {line}: {kind} is {row[kind]!r}; it must be a whole number"
        for line, row in enumerate(rows, start=2)
        for kind in TYPES
        if not _is_count(row[kind])
    ]
    more = [f"{path} has {len(faults) - COUNTS_SHOWN} more such counts"] if len(faults) > COUNTS_SHOWN else []
    odd = [] if problems or faults else _odd_counts(folder, [[int(float(row[kind])) for kind in TYPES] for row in rows])
    if len(odd) > MOST_ODD * len(rows):
        faults = [
            f"{path}: the counts of {len(odd)} of {len(rows)} patches, first in line {odd[0] + 2}, are not of the "
            "nuclei in labels.npy; copy both from the same release"
        ]
    return problems + faults[:COUNTS_SHOWN] + more


def _odd_counts(folder: Path, counts: Sequence[Sequence[int]]) -> list[int]:
    """The patches whose counts the labels rule out, however nuclei on the border of the counted part are counted."""
    try:
        labels = open_array(folder / "labels.npy", LABELS, ["u", "i"])
    except UserError:
        return []  # which is told of that file
    if len(labels) != len(counts):
        return []
    odd = []
    for index, given in enumerate(counts):
        numbers, classes = np.moveaxis(labels[index], -1, 0)
        ids, first, pixels = np.unique(numbers, return_index=True, return_counts=True)
        inside, within = np.unique(numbers[COUNTED], return_counts=True)
        seen = np.zeros(len(ids), int)
        seen[np.searchsorted(ids, inside)] = within
        kinds = np.where(ids > 0, classes.ravel()[first], 0)
        most, least = (np.bincount(kinds[part].clip(0, len(TYPES)), minlength=len(TYPES) + 1)[1:]
                       for part in (seen > 0, seen == pixels))
        if (given < least).any() or (given > most).any():
            odd.append(index)
    return odd


def _is_count(text: str) -> bool:
    try:
        count = float(text)
    except ValueError:
        return False
    return 0 <= count < math.inf and count == int(count)


def _length(path: Path, shape: tuple[int | None, ...], kinds: list[str], problems: list[str]) -> int | None:
    """How many patches an array holds, or None, with the reason added to `problems`."""
    if not path.is_file():
        problems.append(f"{path} is missing")
        return None
    try:
        return len(open_array(path, shape, kinds))
    except UserError as error:
        problems.append(str(error))
        return None


def _names(path: Path, problems: list[str]) -> list[tuple[str, str] | None]:
    """(patch, source image) of every row, None for a row that names none."""
    try:
        table = read_table(path)
    except UserError as error:
        problems.append(str(error))
        return []
    if table and "patch_info" not in table[0]:
        problems.append(f"{path} has the columns {', '.join(table[0])}; it must have patch_info")
        return []
    rows = [row["patch_info"] for row in table]
    times = Counter(rows)
    names: list[tuple[str, str] | None] = []
    for line, name in enumerate(rows, start=2):
        parts = re.fullmatch(r"(.+)-\d+", name)
        if parts is None:
            problems.append(f"{path}, line {line}: {name!r} is no <source>-<index>")
        elif times[name] > 1:
            problems.append(f"{path}, line {line}: {name} is named {times[name]} times")
        names.append((name, parts[1]) if parts and times[name] == 1 else None)
    return names


def _entry(folder: Path, index: int, id: str, group: str) -> Entry:
    load = partial(_load, folder, index, id=id, group=group)
    return Entry(id, group, load, f"{folder / 'images.npy'}[{index}] ({id})")


def _load(folder: Path, index: int, *, id: str, group: str) -> Sample:
    # Mapped anew for each sample: an open map would be copied whole into every worker process.
    image = open_array(folder / "images.npy", IMAGES, ["u1"])[index]
    labels, classes = np.moveaxis(open_array(folder / "labels.npy", LABELS, ["u", "i"])[index], -1, 0)
    if not 0 <= classes.min() <= classes.max() <= len(TYPES):
        raise UserError(
            f"{folder / 'labels.npy'}[{index}] ({id}) has classes from {classes.min()} to {classes.max()}; they must "
            f"lie in 0..{len(TYPES)}"
        )
    return Sample(id, np.array(image), labels.astype(np.int32), MPP, group)
