"""Data Science Bowl 2018 (BBBC038): 670 images of nuclei of many kinds, one mask file a nucleus."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import DECODING_ERRORS, files_by_stem, load_sample, natural_order, not_found, read_mask
from nuguide.datasets.prepared import LAYOUT, is_prepared, read_prepared
from nuguide.images import SUFFIXES
from nuguide.types import UserError

LICENSE = FACTS["dsb2018"].license
OFFICIAL = "stage1_train/<id>/images/<id>.png with stage1_train/<id>/masks/*.png"
MPP = 0.33  # a guess, the median of those made for the color-stained images: the set records no magnification


def read_dsb2018(root: Path) -> Dataset:
    """The training images of stage 1, of many sizes, mostly fluorescence; about 107 are color-stained.

    Crops of one mosaic lie in several images, and the set does not say which; but they have the same size. So the group
    is the size, "320 x 256" (width x height): coarse, but it never divides a mosaic. Microns per pixel are a guess.

    Args:
        root: `stage1_train` with a folder an image, `<id>/images/<id>.png` (RGBA) and `<id>/masks/*.png` (one nucleus
            each), or one up to two levels above it; or the prepared layout.

    Raises one UserError that lists every folder without image or masks.

    Source: Caicedo et al., Nature Methods 2019, doi:10.1038/s41592-019-0612-7; BBBC038v1; CC0.
    """
    if is_prepared(root):
        return read_prepared(root, name="dsb2018", license=LICENSE, mpp=MPP)
    base = next((path for path in (root / "stage1_train", *sorted(root.glob("*/stage1_train"))) if path.is_dir()), root)
    parts = {path.parent for name in ("images", "masks") for path in base.glob(f"*/{name}") if path.is_dir()}
    if not parts:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    problems: list[str] = []
    entries = []
    for folder in sorted(parts, key=lambda part: natural_order(part.name)):
        image = _image_of(folder, problems)
        if image is not None:
            group = _size(image)
            facts = {"id": folder.name, "group": group, "mpp": MPP, "label_reader": read_nucleus_masks}
            load = partial(load_sample, image, folder / "masks", **facts)
            entries.append(Entry(folder.name, group, load, str(image)))
    return sound(Dataset("dsb2018", entries, LICENSE), root, problems)


def read_nucleus_masks(folder: Path, shape: tuple[int, int]) -> np.ndarray:
    """A label map (H, W) int32 from a folder of binary masks, one a nucleus.

    They are numbered from 1 in the natural order of their names. A pixel of several masks goes to the first; an empty
    mask leaves its number out.

    Raises UserError, naming the file, where a mask cannot be read, is not binary, or not of `shape` (H, W).
    """
    labels = np.zeros(shape, np.int32)
    for number, path in enumerate(files_by_stem(folder, {".png"}, []).values(), start=1):
        mask = read_mask(path)
        if mask.shape != labels.shape:
            sizes = f"{shape[1]} x {shape[0]} and {mask.shape[1]} x {mask.shape[0]}"
            raise UserError(f"{path} and its image differ in size: image and mask are {sizes} (width x height)")
        labels[mask & (labels == 0)] = number
    return labels


def _image_of(folder: Path, problems: list[str]) -> Path | None:
    """The one image of a folder that has masks too, or None, with the reason added to `problems`."""
    found = {
        name: list(files_by_stem(folder / name, SUFFIXES, problems).values()) if (folder / name).is_dir() else []
        for name in ("images", "masks")
    }
    if not found["masks"]:
        problems.append(f"{folder / 'masks'} holds no mask")
    if len(found["images"]) != 1:
        problems.append(f"{folder / 'images'} holds {len(found['images'])} images; it must hold one")
    return found["images"][0] if found["masks"] and len(found["images"]) == 1 else None


def _size(path: Path) -> str:
    """Width x height as the head of the file states them; no pixel is read."""
    try:
        with Image.open(path) as file:
            return f"{file.width} x {file.height}"
    except DECODING_ERRORS:
        return "unreadable"  # loading the sample says why
