"""Lizard: 238 H&E images of colon at 20x, gathered from other data sets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import DECODING_ERRORS, Row, files_by_stem, load_sample, not_found, read_table
from nuguide.datasets.prepared import LAYOUT, is_prepared, read_prepared
from nuguide.types import UserError

LICENSE = FACTS["lizard"].license
OFFICIAL = "'lizard_images1/Lizard_Images1/', 'lizard_images2/Lizard_Images2/' and 'lizard_labels/Lizard_Labels/'"
IMAGE_FOLDERS = ("lizard_images1", "lizard_images2")
MPP = 0.5
SPLITS = ("1", "2", "3")
MAX_MAT_BYTES = 256 * 2**20  # the largest image has 2.5 million pixels, its label map 10 MB uncompressed


def read_lizard(root: Path, split: int | None = None) -> Dataset:
    """Lizard, images of several sizes at 20x (about 0.5 microns per pixel), grouped by the data set they came from.

    Args:
        root: the official folder of `lizard_images1/Lizard_Images1/*.png`, `lizard_images2/Lizard_Images2/*.png` and
            `lizard_labels/Lizard_Labels/` with `Labels/*.mat` (`inst_map`: (H, W) of integers) and `info.csv` (columns
            `Filename`, `Source`, `Split`), each directly or under its own name, or the folder above; or the prepared
            layout.
        split: 1, 2 or 3, the folds of the paper; None reads all images.

    Raises ValueError for another split, and one UserError that lists every image without labels or row of `info.csv`
    and the reverse. Nothing but `inst_map` is loaded from a .mat file.

    Source: Graham et al., ICCV workshops 2021, arXiv 2108.11195; for non-commercial use.
    """
    if split is not None and str(split) not in SPLITS:
        raise ValueError(f"unknown split {split}; choose from {', '.join(SPLITS)}")
    if is_prepared(root):
        return read_prepared(root, name="lizard", license=LICENSE, mpp=MPP)
    folders = list(_folders(root, depth=4))
    labels_folder = next((folder for folder in folders if folder.name == "Labels"), None)
    image_folders = [folder for folder in folders if folder.name.lower() in IMAGE_FOLDERS]
    if labels_folder is None or not image_folders:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    problems: list[str] = []
    images: dict[str, Path] = {}
    for folder in image_folders:
        images |= files_by_stem(folder, {".png"}, problems)
    labels = files_by_stem(labels_folder, {".mat"}, problems)
    rows = _rows(labels_folder.parent / "info.csv", images, problems)
    problems += [f"{path} has no partner in {labels_folder}" for stem, path in images.items() if stem not in labels]
    problems += [f"{path} has no image" for stem, path in labels.items() if stem not in images]
    entries = []
    for stem, image in images.items():
        row = rows.get(stem, {})
        if stem in labels and (split is None or row.get("Split") == str(split)):
            group = row.get("Source") or stem.split("_")[0]
            facts = {"id": stem, "group": group, "mpp": MPP, "label_reader": read_inst_map}
            entries.append(Entry(stem, group, partial(load_sample, image, labels[stem], **facts), str(image)))
    return sound(Dataset("lizard", entries, LICENSE), root, problems)


def read_inst_map(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The label map `inst_map` (H, W) int32 of a MATLAB file of version 4 to 7.2.

    Raises UserError, naming the file, where it cannot be read, has no such variable of integers, or one of another size
    than `shape`; size and type are read first.
    """
    try:
        if path.stat().st_size > MAX_MAT_BYTES:
            raise UserError(f"{path} is larger than any label map of the set; copy it again from its source")
        stated = {name: (size, kind) for name, size, kind in scipy.io.whosmat(path)}
        size, kind = stated.get("inst_map", ((), ""))
        if len(size) != 2 or not kind.removeprefix("u").startswith("int"):
            held = ", ".join(f"{name} {have} {what}" for name, (have, what) in stated.items()) or "nothing"
            raise UserError(f"{path} has no map of integers called inst_map; it holds {held}")
        if tuple(size) != tuple(shape):
            sizes = f"{shape[1]} x {shape[0]} and {size[1]} x {size[0]}"
            raise UserError(f"{path} and its image differ in size: image and labels are {sizes} (width x height)")
        labels = scipy.io.loadmat(path, variable_names=["inst_map"])["inst_map"]
    except (*DECODING_ERRORS, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path} as labels: {reason}; copy it again from its source") from error
    if labels.size and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        raise UserError(f"{path} is no label map: its values run from {labels.min()} to {labels.max()}")
    return labels.astype(np.int32)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """The folder and those in it, down to a depth, in the order of their names."""
    if root.is_dir():
        yield root
        for folder in sorted(root.iterdir()) if depth else []:
            yield from _folders(folder, depth - 1)


def _rows(path: Path, images: dict[str, Path], problems: list[str]) -> dict[str, Row]:
    """The rows of `info.csv` by stem of the image; what does not match is added to `problems`."""
    try:
        table = read_table(path)
    except UserError as error:
        problems.append(str(error))
        return {}
    if table and not {"Filename", "Source", "Split"} <= set(table[0]):
        problems.append(f"{path} has the columns {', '.join(table[0])}; it must have Filename, Source and Split")
        return {}
    rows = {row["Filename"].removesuffix(".png"): row for row in table}
    problems += [f"{path} names {stem}, which has no image" for stem in rows if stem not in images]
    problems += [f"{image} has no row in {path.name}" for stem, image in images.items() if stem not in rows]
    problems += [
        f"{path} gives {stem} the split {row['Split']!r}; it must be one of {', '.join(SPLITS)}"
        for stem, row in rows.items()
        if row["Split"] not in SPLITS
    ]
    return rows
