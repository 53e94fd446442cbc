"""PanNuke: 7901 H&E patches of 19 tissues in three folds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import not_found, open_array
from nuguide.datasets.prepared import LAYOUT, MPP_AT_40X, is_prepared, read_prepared
from nuguide.types import Sample, UserError

LICENSE = FACTS["pannuke"].license
OFFICIAL = "'Fold 1/' to 'Fold 3/', each with images/foldN/{images,types}.npy and masks/foldN/masks.npy"
FOLDS = (1, 2, 3)
IMAGES = (None, 256, 256, 3)
MASKS = (None, 256, 256, 6)
CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")  # the sixth plane is background
NUMBERS = ["u", "i", "f"]


def read_pannuke(root: Path, fold: int | None = None) -> Dataset:
    """PanNuke, 256 x 256 at 40x (0.25 microns per pixel), grouped by fold and tissue: "fold1 Breast".

    The set does not name slides or patients, so no finer group is known; its own split is the three folds. The arrays
    are mapped into memory. Their values are floats: images 0..255, masks whole numbers, one a nucleus in the plane of
    its class. A pixel of two planes goes to the first, in the order of `CLASSES`.

    Args:
        root: the official folder of `Fold N/images/foldN/{images,types}.npy` and `Fold N/masks/foldN/masks.npy`, the
            folder of one fold, or one up to two levels above; or the prepared layout.
        fold: 1, 2 or 3; None reads all that are there.

    Raises ValueError for another fold, and one UserError that lists every problem: a file that is missing, no array of
    that shape, images, types and masks that differ in number.

    Source: Gamper et al., arXiv 2003.10778; CC BY-NC-SA 4.0.
    """
    if fold is not None and fold not in FOLDS:
        raise ValueError(f"unknown fold {fold}; choose from {', '.join(map(str, FOLDS))}")
    if is_prepared(root):
        return read_prepared(root, name="pannuke", license=LICENSE)
    bases = {number: base for number in FOLDS if (base := _base(root, number)) is not None}
    wanted = [number for number in bases if fold in (None, number)]
    if not wanted:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    problems: list[str] = []
    entries = [entry for number in wanted for entry in _fold_entries(bases[number], number, problems)]
    return sound(Dataset("pannuke", entries, LICENSE), root, problems)


def _base(root: Path, number: int) -> Path | None:
    """The folder that holds `images/foldN` and `masks/foldN`."""
    bases = (base for depth in ("", "*", "*/*") for base in ([root] if not depth else sorted(root.glob(depth))))
    parts = (f"images/fold{number}", f"masks/fold{number}")
    return next((base for base in bases if any((base / part).is_dir() for part in parts)), None)


def _paths(base: Path, number: int) -> tuple[Path, Path, Path]:
    images, masks = base / "images" / f"fold{number}", base / "masks" / f"fold{number}"
    return images / "images.npy", images / "types.npy", masks / "masks.npy"


def _fold_entries(base: Path, number: int, problems: list[str]) -> list[Entry]:
    """The samples of a fold; none, with the reasons added to `problems`, where its files do not match."""
    paths = _paths(base, number)
    arrays = []
    for path, shape, kinds in zip(paths, (IMAGES, (None,), MASKS), (NUMBERS, ["U"], NUMBERS), strict=True):
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        try:
            arrays.append(open_array(path, shape, kinds))
        except UserError as error:
            problems.append(str(error))
    if len(arrays) < len(paths):
        return []
    if len({len(array) for array in arrays}) > 1:
        counts = ", ".join(f"{len(array)} in {path.name}" for array, path in zip(arrays, paths, strict=True))
        problems.append(f"{base}, fold {number}: images, types and masks differ in number: {counts}")
        return []
    return [_entry(base, number, index, str(tissue)) for index, tissue in enumerate(arrays[1])]


def _entry(base: Path, number: int, index: int, tissue: str) -> Entry:
    id, group = f"fold{number}_{index:04}", f"fold{number} {tissue}"
    return Entry(id, group, partial(_load, base, number, index, id, group), f"{_paths(base, number)[0]}[{index}]")


def _load(base: Path, number: int, index: int, id: str, group: str) -> Sample:
    images, _, masks = _paths(base, number)
    image_rgb = _as_image(open_array(images, IMAGES, NUMBERS)[index], f"{images}[{index}]")
    labels = _merged(open_array(masks, MASKS, NUMBERS)[index], f"{masks}[{index}]")
    return Sample(id, image_rgb, labels, MPP_AT_40X, group)


def _as_image(values: np.ndarray, where: str) -> np.ndarray:
    """(H, W, 3) uint8 of values 0..255 of any type; UserError for others, and for those scaled to 0..1."""
    values = np.asarray(values, np.float64)
    if not (values.min() >= 0 and values.max() <= 255):  # false for NaN too
        raise UserError(f"{where} holds values from {values.min()} to {values.max()}; they must lie in 0..255")
    if 0 < values.max() <= 1:
        raise UserError(f"{where} holds values up to {values.max()}: it was scaled to 0..1; take the published array")
    return np.rint(values).astype(np.uint8)


def _merged(planes: np.ndarray, where: str) -> np.ndarray:
    """One label map (H, W) int32, numbered from 1, of instance maps (H, W, 6), the last of which is background."""
    labels = np.zeros(planes.shape[:2], np.int32)
    for plane, name in enumerate(CLASSES):
        numbers = np.asarray(planes[..., plane])
        if not (numbers.min() >= 0 and (numbers == np.round(numbers)).all()):
            raise UserError(f"{where}: the plane {name} is no label map: it must hold whole numbers from 0")
        free = (numbers > 0) & (labels == 0)
        labels[free] = labels.max() + 1 + np.unique(numbers[free], return_inverse=True)[1]
    return labels
