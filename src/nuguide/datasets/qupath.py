"""Images with annotations of QuPath beside them: a user's own data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.files import load_sample, not_found, pair_by_stem
from nuguide.datasets.folder import manifest_rows, stated_mpp
from nuguide.datasets.prepared import LAYOUT, is_prepared, read_prepared
from nuguide.export import read_geojson
from nuguide.types import UserError

MAX_BYTES = 512 * 2**20  # about a million nuclei
MAX_SHARE = 0.5  # of the image that one nucleus can cover


def read_qupath(root: Path, mpp: float | None = None) -> Dataset:
    """Images and GeoJSON files of the same stem, one polygon a nucleus, in pixels of the image at full resolution.

    An optional `manifest.csv` has the columns `id` (the stem) and, if wanted, `group` and `mpp`, as for `read_folder`;
    without a group every image is its own.

    Args:
        root: a folder with `a.tif` (or another image) and `a.geojson` (exported from QuPath as FeatureCollection)
            beside each other, in it or in its folder `images/`; or the prepared layout.
        mpp: microns per pixel, where the manifest states none; None: as the image file states it, else 0.25.

    Raises one UserError that lists every image without annotations and the reverse.

    Source: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html
    """
    if is_prepared(root) and (root / "labels").is_dir():
        return read_prepared(root, name="qupath")
    folder = next((path for path in (root, root / "images") if any(path.glob("*.geojson"))), None)
    if folder is None:
        raise not_found(root, f"images with a .geojson of the same name beside each, here or in images/, or {LAYOUT}")
    problems: list[str] = []
    pairs = pair_by_stem(folder, folder, problems, label_suffixes=(".geojson",))
    rows = manifest_rows(root, [stem for stem, *_ in pairs], problems)
    entries = []
    for stem, image, outlines in pairs:
        row = rows.get(stem, {})
        group = row.get("group") or stem
        facts = {"id": stem, "group": group, "mpp": stated_mpp(row, problems, default=mpp), "label_reader": _labels}
        entries.append(Entry(stem, group, partial(load_sample, image, outlines, **facts), str(image)))
    return sound(Dataset(root.resolve().name, entries), root, problems)


def _labels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The label map (H, W) int32 of the polygons of a file; UserError where one is so large that it is no nucleus."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 2**20} MB; export fewer objects at a time")
    labels = read_geojson(path, shape)
    areas = np.bincount(labels.ravel())[1:]
    if areas.size and areas.max() > MAX_SHARE * labels.size:
        share = f"{areas.max() / labels.size:.0%}"
        number = areas.argmax() + 1
        raise UserError(f"{path}: polygon {number} covers {share} of the image; take out regions, which are no nuclei")
    return labels
