"""Files of a data set: pairs them by stem, and reads label maps and masks."""

from __future__ import annotations

import csv
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from nuguide.images import OUTPUT_SUFFIXES, SUFFIXES, TURNED, read_image
from nuguide.types import Sample, UserError

Row = dict[str, str]
LabelReader = Callable[[Path, tuple[int, int]], np.ndarray]

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
LABEL_SUFFIXES = TIFF_SUFFIXES | {".png", ".bmp"}  # lossless only: JPEG alters label numbers
DECODING_ERRORS = (
    *(
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ),
    *(MemoryError, struct.error, zlib.error, tifffile.TiffFileError, Image.DecompressionBombError),
)

log = logging.getLogger(__name__)


def load_sample(
    image_path: Path,
    labels_path: Path,
    *,
    id: str,
    group: str,
    mpp: float | None,
    default_mpp: float = 0.25,
    is_mask: bool = False,
    ignore_path: Path | None = None,
    instances_are_exact: bool = True,
    label_reader: LabelReader | None = None,
) -> Sample:
    """One sample read from its files.

    Args:
        image_path, labels_path: an image, and its instance label map or (`is_mask`) its binary mask, whose
            4-connected components become the nuclei.
        label_reader: for labels that are no image file: called with `labels_path` and the (H, W) of the image, it
            returns a label map (H, W) int32.
        id, group, instances_are_exact: as in `Sample`.
        mpp: microns per pixel; None: as the image file states it, else `default_mpp`.
        ignore_path: a binary mask of the area where nothing is scored.

    Raises UserError, naming the files, where one cannot be read or they differ in size.
    """
    image = read_image(image_path)
    if TURNED in image.notes:
        log.warning("%s was turned upright, %s was not: make sure that they match", image_path, labels_path)
    if label_reader is not None:
        labels = label_reader(labels_path, image.image_rgb.shape[:2])
    else:
        labels = read_mask(labels_path) if is_mask else read_labels(labels_path)
    ignore = None if ignore_path is None else read_mask(ignore_path)
    for path, array in ((labels_path, labels), (ignore_path, ignore)):
        if array is not None and array.shape != image.image_rgb.shape[:2]:
            sizes = " and ".join(f"{shape[1]} x {shape[0]}" for shape in (image.image_rgb.shape, array.shape))
            raise UserError(f"{image_path} and {path} differ in size: {sizes} pixels (width x height)")
    return Sample(
        id=id,
        image_rgb=image.image_rgb,
        labels=components(labels) if is_mask else labels,
        mpp=next(value for value in (mpp, image.mpp, default_mpp) if value is not None),
        group=group,
        ignore=ignore,
        instances_are_exact=instances_are_exact,
    )


def components(mask: np.ndarray) -> np.ndarray:
    """The 4-connected components of a mask (H, W) bool as an instance label map (H, W) int32.

    Not 8-connected, so that two nuclei drawn apart by a diagonal of background stay two.
    """
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1].astype(np.int32, copy=False)


def read_labels(path: Path) -> np.ndarray:
    """An instance label map (H, W) int32 of a PNG, BMP or TIFF file with integers, or floats that are whole.

    Raises UserError, naming the file, where it cannot be read or holds anything else than label numbers.
    """
    labels = _read_plane(path)
    if np.issubdtype(labels.dtype, np.floating) and not np.array_equal(labels, np.round(labels)):
        raise UserError(f"{path} is no label map: it holds fractions; save whole numbers, 0 for background")
    if labels.size and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        raise UserError(f"{path} is no label map: its values run from {labels.min()} to {labels.max()}")
    return labels.astype(np.int32)


def read_mask(path: Path) -> np.ndarray:
    """A binary mask (H, W) bool of a PNG, BMP or TIFF file that holds 0 and at most one other value.

    Raises UserError, naming the file, where it cannot be read or holds more values.
    """
    values = _read_plane(path)
    foreground = values != 0
    if foreground.any() and (values[foreground] != values[foreground][0]).any():
        found = ", ".join(str(value) for value in np.unique(values)[:5])
        raise UserError(f"{path} is no binary mask: it holds the values {found}; instance maps belong in labels/")
    return foreground


def _read_plane(path: Path) -> np.ndarray:
    """The one channel (H, W) of a lossless image file, in its own type; equal color channels count as one."""
    if path.suffix.lower() not in LABEL_SUFFIXES:
        raise UserError(f"{path}: labels and masks must be PNG, BMP or TIFF, which keep numbers exactly")
    try:
        values = _decode(path)
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path} as labels: {reason}; export it again, or take it out") from error
    if values.ndim == 3 and values.shape[2] in (2, 3, 4):
        colors = values[..., : 1 if values.shape[2] == 2 else 3]  # without alpha
        if (colors == colors[..., :1]).all():
            return colors[..., 0]
        raise UserError(f"{path} holds colors; labels must be numbers in one channel, 0 for background")
    if values.ndim != 2:
        raise UserError(f"{path} holds an array of shape {values.shape}; labels must be one plane (height, width)")
    return values


def _decode(path: Path) -> np.ndarray:
    if path.suffix.lower() in TIFF_SUFFIXES:
        try:
            return tifffile.imread(path)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
    with Image.open(path) as file:  # also TIFF with a compression that tifffile leaves to an extra package, such as LZW
        return np.asarray(file)


def files_by_stem(
    folder: Path, suffixes: Iterable[str], problems: list[str], others: Iterable[str] = ()
) -> dict[str, Path]:
    """The files of a folder by stem, in natural order of their names; two of the same stem are added to `problems`.

    Hidden files are skipped, and files with other endings, which the log names unless `others` lists them.
    """
    files: dict[str, Path] = {}
    suffixes = frozenset(suffixes)
    known = tuple(others)
    for path in sorted(folder.iterdir(), key=lambda path: natural_order(path.name)):
        if path.name.startswith(".") or path.is_dir() or path.name.lower().endswith(known):
            continue
        if path.suffix.lower() not in suffixes:
            log.warning("%s is passed over: its ending is none of %s", path, ", ".join(sorted(suffixes)))
        elif path.stem in files:
            problems.append(f"{files[path.stem]} and {path.name} have the same stem")
        else:
            files[path.stem] = path
    return files


def pair_by_stem(
    images_folder: Path, labels_folder: Path, problems: list[str], label_suffixes: Iterable[str] = LABEL_SUFFIXES
) -> list[tuple[str, Path, Path]]:
    """(stem, image, labels) of two folders; whatever has no partner is added to `problems`.

    The two may be one folder where `label_suffixes` are none of an image; results of `nuguide segment` in it are then
    taken for neither.
    """
    beside = images_folder == labels_folder
    images = files_by_stem(images_folder, SUFFIXES, problems, (*label_suffixes, *OUTPUT_SUFFIXES) if beside else ())
    labels = files_by_stem(labels_folder, label_suffixes, problems, SUFFIXES if beside else ())
    problems += [f"{images[stem]} has no partner in {labels_folder}" for stem in images if stem not in labels]
    problems += [f"{labels[stem]} has no partner in {images_folder}" for stem in labels if stem not in images]
    return [(stem, images[stem], labels[stem]) for stem in images if stem in labels]


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV file in UTF-8 by the names of its columns, "" where a row is short; UserError, naming it."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, restkey="more columns than the header", restval=""))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); get it, or change its permissions") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; save it as comma-separated UTF-8 text") from error


def open_array(path: Path, shape: tuple[int | None, ...], kinds: Iterable[str]) -> np.ndarray:
    """A .npy file mapped into memory, read-only; nothing pickled is ever loaded.

    Args:
        shape: that the array must have; None stands for any length.
        kinds: allowed types, as letters of `numpy.dtype.kind` ("i") or with their bytes ("u1").

    Raises UserError, naming the file, where it cannot be mapped, is shorter than it states, or has another shape or
    type.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path} as an array: {reason}; copy it again from its source") from error
    fixed = tuple(None if want is None else have for want, have in zip(shape, array.shape, strict=False))
    if len(array.shape) != len(shape) or fixed != shape:
        wanted = ", ".join("N" if length is None else str(length) for length in shape)
        raise UserError(f"{path} holds an array of shape {array.shape}; it must be ({wanted})")
    kinds = list(kinds)
    if array.dtype.kind not in kinds and array.dtype.str[1:] not in kinds:
        raise UserError(f"{path} holds {array.dtype} values; copy it again from its source")
    return array


def not_found(root: Path, looked_for: str) -> UserError:
    """The error for a root folder that is laid out otherwise than it should be."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        return UserError(f"{root} {what}; looked for a folder with {looked_for}")
    found = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    listing = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    return UserError(f"{root}: looked for {looked_for}; found {listing or 'an empty folder'}")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts image_2 before image_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
