"""Files that other programs open: label TIFF, QuPath GeoJSON, CSV and an overlay picture.

Each writer fills a hidden file in the folder of `path` and renames it when it is whole, so no half-written file is ever
seen under that name. Where that fails (disk full, no such folder, no permission) it leaves nothing behind and raises
UserError with the name of the file and the remedy. `rings` are those of `measure.outlines`, in its frame: x right, y
down, the center of the first pixel at (0, 0).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pandas as pd
import tifffile

from nuguide.types import UserError

OUTLINE_RGB = (0, 230, 64)  # green: the one hue that neither hematoxylin nor eosin nor DAB brings

# How the columns of the table are called in QuPath, which measures the centroids itself.
MEASUREMENTS = {
    "area_um2": "Nucleus: Area µm^2",
    "perimeter_um": "Nucleus: Perimeter µm",
    "eccentricity": "Nucleus: Eccentricity",
    "solidity": "Nucleus: Solidity",
    "hematoxylin_od": "Nucleus: Hematoxylin OD mean",
    "eosin_od": "Nucleus: Eosin OD mean",
    "probability": "Detection probability",
}
AGREEMENT_MEASUREMENT = {"agreement": "Agreement of mirror images"}  # of tables that have it

# Below sqrt(2) / 4 = 0.354, the least distance from a pixel center to an outline: simplified, an outline still holds
# the same pixels, and two parts of it never meet.
SIMPLIFY_PX = 0.35

_QUPATH_SHIFT_PX = 0.5  # QuPath counts from the corner of the first pixel, `rings` from its center
_TILE_PX = 512
_TILED_FROM_PX = 2048
_WIDE_LINES_FROM_PX = 1500
_DECIMALS = {"centroid_x_px": 2, "centroid_y_px": 2, "centroid_x_um": 3, "centroid_y_um": 3, "area_um2": 3}
_OTHER_DECIMALS = 4


def write_labels(path: Path, labels: np.ndarray, mpp: float) -> Path:
    """A label map as uint32 TIFF, deflated; tiled by 512 px where a side has 2048 px or more.

    The scale stands in the baseline tags XResolution, YResolution and ResolutionUnit (pixels per centimeter), which
    ImageJ, QuPath (Bio-Formats) and tifffile read.

    Args:
        labels: (H, W) of any integer type, 0 for background, no value above 2^32 - 1.
        mpp: microns per pixel.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}: a label map is (H, W) of integers")
    if labels.size and not 0 <= labels.min() <= labels.max() < 2**32:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}: they must fit into uint32")
    per_cm = 10_000 / mpp
    with replacing(path) as file:
        tifffile.imwrite(
            file,
            labels.astype(np.uint32, copy=False),
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": 3},  # level 6 takes twice the time for 40% of the bytes off a small file
            tile=(_TILE_PX, _TILE_PX) if max(labels.shape) >= _TILED_FROM_PX else None,
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return path


def write_geojson(path: Path, rings: dict[int, np.ndarray], table: pd.DataFrame, image_name: str) -> Path:
    """The nuclei as QuPath detections: a GeoJSON FeatureCollection with one closed Polygon a nucleus.

    Coordinates are pixels from the upper left corner of the image, as in QuPath (0.5 more than in `rings`), simplified
    by at most `SIMPLIFY_PX`. All are multiples of 0.5, so nothing is lost by rounding, and `read_geojson` gives back
    every pixel of a nucleus that is in one piece and has no holes. The name is the id of the nucleus in table and label
    map; the UUID follows from `image_name` and id, so that a second run names the same nuclei alike. The measurements
    are `MEASUREMENTS`, and `AGREEMENT_MEASUREMENT` where the table has it.

    Args:
        table: of `measure.measure`, its ids those of `rings` in the same order.
    """
    if list(rings) != table["id"].tolist():
        raise ValueError(f"{len(rings)} rings, {len(table)} rows: they must be of the same nuclei in the same order")
    with replacing(path) as file:
        write_features(file, features(list(rings.values()), table, image_name))
    return path


def write_features(file: BinaryIO, features: Iterable[str]) -> None:
    """A FeatureCollection of the texts of `features`, of which one at a time is in memory."""
    file.write(b'{"type":"FeatureCollection","features":[')
    comma = ""
    for text in features:
        file.write(f"{comma}{text}".encode())
        comma = ",\n"
    file.write(b"]}\n")


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """The table as CSV: 0.01 px, 0.001 µm and µm^2, all else to four decimals."""
    with replacing(path) as file:
        write_rows(file, table)
    return path


def write_rows(file: BinaryIO, table: pd.DataFrame, header: bool = True) -> None:
    """The rows of `write_table`, with or without the names of the columns above."""
    decimals = {
        column: _DECIMALS.get(column, _OTHER_DECIMALS) for column in table.columns if table[column].dtype.kind == "f"
    }
    table.round(decimals).to_csv(file, index=False, header=header, lineterminator="\n")


def write_overlay(path: Path, image_rgb: np.ndarray, rings: dict[int, np.ndarray]) -> Path:
    """`overlay` as PNG."""
    return write_picture(path, overlay(image_rgb, rings))


def write_picture(path: Path, image_rgb: np.ndarray) -> Path:
    """An image (H, W, 3) uint8 as PNG, packed for speed: a tenth larger than the smallest file, in half the time."""
    picture_bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    with replacing(path) as file:
        file.write(cv2.imencode(".png", picture_bgr, [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])[1].data)
    return path


def overlay(image_rgb: np.ndarray, rings: dict[int, np.ndarray]) -> np.ndarray:
    """The image with its outlines drawn in `OUTLINE_RGB`, 1 pixel wide, or 3 where a side has 1500 pixels or more.

    Args:
        image_rgb: (H, W, 3) uint8, left as it is.

    Returns:
        (H, W, 3) uint8.
    """
    picture = np.array(image_rgb, np.uint8, order="C")
    thickness = 2 if max(picture.shape[:2]) >= _WIDE_LINES_FROM_PX else 1  # OpenCV's 2 is 3 pixels
    cv2.polylines(picture, half_pixels(list(rings.values())), True, OUTLINE_RGB, thickness, cv2.LINE_8, shift=1)
    return picture


def read_geojson(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A label map from the polygons of a GeoJSON file: of `write_geojson`, of QuPath, or drawn by hand.

    Polygons and MultiPolygons are numbered from 1 in the order of the file; other geometries are left out. A pixel
    belongs to the polygon that holds its center, outside of its holes; where several do, to the last. What lies off the
    image is cut off. Of a QuPath cell the nucleus is taken, not the cell.

    Args:
        path: a FeatureCollection, a list of features or one feature, in pixels from the upper left corner.
        shape: (H, W) of the image.

    Returns:
        (H, W) int32.

    Raises:
        UserError: where the file cannot be read or is no such GeoJSON.
    """
    polygons = [[ring - _QUPATH_SHIFT_PX for ring in polygon] for polygon in read_polygons(path)]
    return _filled(polygons, shape)


def read_polygons(path: Path) -> list[list[np.ndarray]]:
    """The rings of every polygon of a GeoJSON file, (N, 2) float64 x, y as they stand there; see `read_geojson`.

    Raises:
        UserError: where the file cannot be read or is no such GeoJSON.
    """
    try:
        document = json.loads(path.read_bytes())
        features = document if isinstance(document, list) else document.get("features", [document])
        return [rings for feature in features if (rings := _rings_of(feature))]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and the permissions") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: is not GeoJSON of polygons ({reason}); export it from QuPath as GeoJSON") from error


def features(
    rings: Sequence[np.ndarray],
    table: pd.DataFrame,
    image_name: str,
    scale_xy: tuple[float, float] = (1.0, 1.0),
) -> Iterator[str]:
    """The GeoJSON text of one nucleus after another, as `write_geojson` writes it.

    Args:
        rings: of `measure.outlines`, in the order of `table`.
        scale_xy: pixels of the image that QuPath opens, per pixel of the rings. A coordinate that this makes a fraction
            is rounded to 0.01 px.
    """
    classification = json.dumps({"name": "Nucleus", "color": OUTLINE_RGB}, separators=(",", ":"))
    columns = MEASUREMENTS | {key: name for key, name in AGREEMENT_MEASUREMENT.items() if key in table}
    names = [json.dumps(name, ensure_ascii=False) for name in columns.values()]
    values = table[list(columns)].to_numpy(np.float64).round(_OTHER_DECIMALS)
    if not np.isfinite(values).all():
        raise ValueError("the table holds values that are not finite: JSON has no way to write them")
    texts = _ring_texts(half_pixels(rings), scale_xy)
    for id, ring, row in zip(table["id"].tolist(), texts, values.tolist(), strict=True):
        measurements = ",".join([f"{name}:{value}" for name, value in zip(names, row, strict=True)])
        yield (
            f'{{"type":"Feature","id":"{uuid.uuid5(uuid.NAMESPACE_URL, f"nuguide:{image_name}:{id}")}",'
            f'"geometry":{{"type":"Polygon","coordinates":[{ring}]}},'
            f'"properties":{{"objectType":"detection","name":"{id}",'
            f'"classification":{classification},"measurements":{{{measurements}}}}}}}'
        )


def _ring_texts(halves: list[np.ndarray], scale_xy: tuple[float, float]) -> Iterator[str]:
    """Each ring as GeoJSON, closed, in the frame of QuPath."""
    if not halves:
        return
    joined = np.concatenate(halves) + int(2 * _QUPATH_SHIFT_PX)
    x, y = (_numbers(joined[:, axis], scale_xy[axis]) for axis in (0, 1))
    point = [f"[{x},{y}]" for x, y in zip(x, y, strict=True)]
    start = 0
    for ring in halves:
        stop = start + len(ring)
        yield f"[{','.join(point[start:stop])},{point[start]}]"
        start = stop


def _numbers(halves: np.ndarray, scale: float) -> list[str]:
    """Half pixels as text in pixels, scaled, to two decimals at most; by table, for numbers are few and points many."""
    low = int(halves.min())
    values = (np.arange(low, halves.max() + 1) / 2 * scale).round(2) + 0.0  # never -0
    text = [f"{value:.2f}".rstrip("0").rstrip(".") for value in values.tolist()]
    return [text[place] for place in (halves - low).tolist()]


def half_pixels(rings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The simplified rings, (N, 2) int32, in half pixels: outlines turn at multiples of 0.5 only."""
    if not rings:
        return []
    joined = np.rint(2 * np.concatenate(rings)).astype(np.int32)
    cuts = np.cumsum([len(ring) for ring in rings])[:-1]
    return [cv2.approxPolyDP(ring, 2 * SIMPLIFY_PX, True)[:, 0] for ring in np.split(joined, cuts)]


def _rings_of(feature: dict[str, Any]) -> list[np.ndarray]:
    """Every ring of a feature, outer ones and holes alike, (N, 2) float64."""
    geometry = feature.get("nucleusGeometry") or feature["geometry"]
    kind = geometry["type"] if geometry else None
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    rings = [np.array(ring, np.float64)[:, :2] for part in parts for ring in part]
    if not all(np.isfinite(ring).all() for ring in rings):
        raise ValueError("a coordinate is not finite")
    return rings


def _filled(polygons: Sequence[Sequence[np.ndarray]], shape: tuple[int, int]) -> np.ndarray:
    """Label map of polygons, each a list of rings, by the even-odd rule at pixel centers.

    Every edge gives one crossing for each row of centers that it passes; sorted along a row, the crossings of one
    polygon bound its runs of pixels in pairs.
    """
    height, width = shape
    labels = np.zeros(shape, np.int32)
    numbered = [(number, ring) for number, polygon in enumerate(polygons, 1) for ring in polygon if len(ring)]
    if not numbered:
        return labels
    start = np.concatenate([ring for _, ring in numbered])
    stop = np.concatenate([np.roll(ring, -1, axis=0) for _, ring in numbered])
    owner = np.repeat([number for number, _ in numbered], [len(ring) for _, ring in numbered])
    first_row = np.ceil(np.minimum(start[:, 1], stop[:, 1])).clip(0, height).astype(np.int64)
    after_row = np.ceil(np.maximum(start[:, 1], stop[:, 1])).clip(0, height).astype(np.int64)
    edge, row = _ranges(first_row, after_row)
    slope = (stop[edge, 0] - start[edge, 0]) / (stop[edge, 1] - start[edge, 1])
    column = np.ceil(start[edge, 0] + (row - start[edge, 1]) * slope).clip(0, width).astype(np.int64)
    order = np.lexsort((column, row, owner[edge]))
    run, pixel = _ranges(column[order][::2], column[order][1::2])
    labels[row[order][::2][run], pixel] = owner[edge][order][::2][run]
    return labels


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every number of every range start..stop-1, and which range it is of."""
    length = stop - start
    which = np.repeat(np.arange(len(length)), length)
    return which, np.arange(len(which)) + np.repeat(start - (np.cumsum(length) - length), length)


_REMEDIES = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EFBIG: "write to a disk that takes larger files",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "make the folder first",
    errno.ENOTDIR: "make the folder first",
    errno.EISDIR: "a folder has this name: choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends well and vanishes when it does not."""
    part = path.parent / f".{uuid.uuid4().hex}.part"  # hidden, so that no reader takes it for an image
    try:
        with part.open("wb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def replacing_zarr(path: Path) -> Iterator[Path]:
    """Where to make a Zarr group, which becomes `path` when the block ends well and vanishes when it does not.

    A Zarr group of that name is replaced; any other folder is left as it is, and refused.
    """
    part, old = (path.parent / f".{uuid.uuid4().hex}.{ending}" for ending in ("part", "old"))
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.is_dir() and not any((path / name).is_file() for name in (".zgroup", "zarr.json")):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield part
        if path.is_dir():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        if old.is_dir() and not path.exists():
            os.replace(old, path)
        raise _not_written(path, error) from error
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)


def _not_written(path: Path, error: OSError) -> UserError:
    remedy = _REMEDIES.get(error.errno or 0, "check the disk and the folder")
    return UserError(f"{path}: not written ({error.strerror or error}); {remedy}")
