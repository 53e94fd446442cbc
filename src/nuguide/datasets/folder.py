"""A plain folder of images and labels, such as a user's own annotations."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.files import Row, components, load_sample, not_found, pair_by_stem
from nuguide.datasets.prepared import MPP_AT_40X, read_rows
from nuguide.types import Sample, UserError

log = logging.getLogger(__name__)


def read_folder(root: Path, mpp: float | None = None) -> Dataset:
    """The images of `images/`, paired by stem with instance maps in `labels/` or binary masks in `masks/`.

    The nuclei of a mask are its 4-connected components: touching nuclei become one, so `instances_are_exact` is False.
    Where both folders are there, `labels/` is read. An optional `manifest.csv` has the columns `id` (the stem) and, if
    wanted, `group` and `mpp`; without a group every image is its own.

    Args:
        mpp: microns per pixel, where the manifest states none; None: as the image file states it, else 0.25.

    Raises one UserError that lists every problem: an image or labels without partner, two files of the same stem, a row
    of the manifest without image or with a wrong number. Unreadable files and differing sizes are found when a sample
    is read (`Dataset.check` reads all).
    """
    annotations = next((root / name for name in ("labels", "masks") if (root / name).is_dir()), None)
    if not (root / "images").is_dir() or annotations is None:
        raise not_found(root, "images/ with labels/ (instance maps) or masks/ (binary)")
    is_mask = annotations.name == "masks"
    problems: list[str] = []
    pairs = pair_by_stem(root / "images", annotations, problems)
    rows = manifest_rows(root, [stem for stem, *_ in pairs], problems)
    entries = []
    for stem, image, labels in pairs:
        row = rows.get(stem, {})
        group = row.get("group") or stem
        facts = {"id": stem, "group": group, "mpp": stated_mpp(row, problems, default=mpp), "is_mask": is_mask}
        entries.append(Entry(stem, group, partial(_load, image, labels, **facts), str(image)))
    if mpp is None and not any(row.get("mpp") for row in rows.values()):
        log.info("%s: microns per pixel as the image files state it, else %s; --mpp sets it", root, MPP_AT_40X)
    return sound(Dataset(root.resolve().name, entries), root, problems)


def manifest_rows(root: Path, stems: list[str], problems: list[str]) -> dict[str, Row]:
    """The rows of the manifest, if there is one; rows and images without partner are added to `problems`."""
    path = root / "manifest.csv"
    if not path.exists():
        return {}
    rows = read_rows(path, problems)
    problems += [f"manifest.csv names {id}, which has no image with labels" for id in rows if id not in stems]
    problems += [f"{stem} has no row in manifest.csv" for stem in stems if stem not in rows]
    return rows


def _load(image_path: Path, labels_path: Path, *, is_mask: bool, **facts) -> Sample:
    sample = load_sample(image_path, labels_path, is_mask=is_mask, instances_are_exact=not is_mask, **facts)
    if not is_mask and len(np.unique(sample.labels[sample.labels > 0])) == 1:
        areas = components(sample.labels > 0).max()
        if areas > 2:  # one nucleus may be drawn with a speck beside it, but not as many areas
            raise UserError(f"{labels_path} has one number for {areas} separate areas: move binary masks to masks/")
    return sample


def stated_mpp(row: Row, problems: list[str], default: float | None) -> float | None:
    """Microns per pixel of a row of the manifest, else `default`; what is no number above 0 is added to `problems`."""
    text = row.get("mpp")
    if not text:
        return default
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not 0 < mpp < math.inf:
        problems.append(f"manifest.csv gives {row['id']} the mpp {text!r}; it must be a number above 0")
    return mpp
