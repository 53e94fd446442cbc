"""The files of a slide that other programs open, each written from its parts as a stream.

Every writer is a function of a store of parts, the path to write, and what there is to say about the slide. It reads
the parts in order, one at a time or a few around one place, so memory does not grow with the slide; it fills a hidden
file or folder and renames it when it is whole; the same parts give the same bytes. Where it fails (disk full, no such
folder, a library missing) it leaves nothing behind and raises UserError with the remedy.

Frames: tables have level-0 pixels counted from the center of the first, as `measure` has; polygons count from its
corner, as QuPath does; label maps are on the fine grid, border to border with level 0.
"""

from __future__ import annotations

import gzip
import importlib
import json
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import tifffile

from .. import export
from ..types import UserError
from .heatmap import heatmap
from .parts import Part, PartStore
from .windows import LabelWindows

LABELS = "nuclei"               # the name of the label map in OME-Zarr
MOST_SHAPES = 2_000_000         # of `write_spatialdata`, which holds shapes and table in memory
_ROW_GROUP = 65_536
_TIFF_TILE_PX, _ZARR_TILE_PX = 512, 1024
_CLASSIC_TIFF_BYTES = 2**32 - 2**26     # beyond this, less some room for tags, a TIFF needs 64-bit offsets


@dataclass(frozen=True)
class About:
    """What the files say of a slide besides its nuclei.

    Attributes:
        slide: its name, from which the ids of its nuclei follow. model: that found them.
        bounds_px: (x, y) where level 0 begins in the whole scan, of which QuPath shows no more; see `Slide.bounds_px`.
        thumbnail_rgb: (h, w, 3) uint8 of the whole slide, or None.
    """

    slide: str
    model: str
    bounds_px: tuple[int, int] = (0, 0)
    thumbnail_rgb: np.ndarray | None = None


class Writer(NamedTuple):
    """How the names of its files end, the function that writes one, and the extra and libraries that it needs."""

    ending: str
    write: Callable[[PartStore, Path, About], None]
    extra: str = ""
    needs: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError with the command that installs them, where its libraries are missing."""
        for name in self.needs:
            _library(name, self.extra)


# Tables


def write_parquet(store: PartStore, path: Path, about: About) -> None:
    """The table of all nuclei as Parquet, with `facts` as JSON in the file's metadata under the key nuguide."""
    pyarrow, parquet = _library("pyarrow", "slides"), _library("pyarrow.parquet", "slides")
    types = [(name, pyarrow.int64() if name == "id" else pyarrow.float64()) for name in store.columns]
    schema = pyarrow.schema(types, metadata={"nuguide": json.dumps(facts(store, about))})
    with export.replacing(path) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in _row_groups(store):
            writer.write_table(pyarrow.table({name: table[name].to_numpy() for name in store.columns}, schema=schema))


def write_csv(store: PartStore, path: Path, about: About) -> None:
    """The table of all nuclei as CSV, rounded as `export.write_table` rounds."""
    with export.replacing(path) as file:
        export.write_rows(file, Part.empty(store.columns).table)
        for table in _tables(store):
            export.write_rows(file, table, header=False)


def facts(store: PartStore, about: About) -> dict[str, Any]:
    """What a file needs to say to be understood by itself: slide, model, and how its pixels lie on level 0."""
    layout = store.layout
    return {
        "slide": about.slide,
        "model": about.model,
        "mpp": layout.mpp,
        "slide_px": list(layout.slide_px),
        "bounds_px": list(about.bounds_px),
        "frame": "level-0 pixels, x right, y down, the center of the first at (0, 0)",
        "label_px_in_level0": list(layout.fine_scale),
    }


def _tables(store: PartStore) -> Iterator[pd.DataFrame]:
    """The table of each part, ids those of the slide."""
    for _, first, part in store.all(labels=False):
        yield part.table.assign(id=part.table["id"] + first)


def _row_groups(store: PartStore) -> Iterator[pd.DataFrame]:
    """The tables joined until they have `_ROW_GROUP` rows: small groups are slow to read."""
    waiting: list[pd.DataFrame] = []
    for table in _tables(store):
        waiting.append(table)
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield pd.concat(waiting)
            waiting = []
    if waiting:
        yield pd.concat(waiting)


# Polygons


def write_geojson(store: PartStore, path: Path, about: About) -> None:
    """The nuclei as QuPath detections in level-0 pixels; see `export.write_geojson`, of which this is the text."""
    with export.replacing(path) as file:
        export.write_features(file, _features(store, about))


def write_geojson_gz(store: PartStore, path: Path, about: About) -> None:
    """`write_geojson`, compressed."""
    with export.replacing(path) as file, gzip.GzipFile("", "wb", 5, file, mtime=0) as packed:
        export.write_features(packed, _features(store, about))  # pyright: ignore[reportArgumentType]


def _features(store: PartStore, about: About) -> Iterator[str]:
    scale_y, scale_x = store.layout.fine_scale
    for _, first, part in store.all(labels=False):
        table = part.table.assign(id=part.table["id"] + first)
        yield from export.features(part.rings, table, about.slide, (scale_x, scale_y))


# Label maps


def write_labels(store: PartStore, path: Path, about: About) -> None:
    """The label map as pyramidal OME-TIFF, uint32, in deflated tiles of 512 px, with its pixel size.

    A TIFF has its tiles in rows, but tiles are made in squares; those made, packed, wait in a temporary file beside it.
    """
    windows = LabelWindows(store)
    sizes = windows.sizes(_TIFF_TILE_PX)
    with ExitStack() as stack:
        file = stack.enter_context(export.replacing(path))
        spill = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
        blank, places, end = zlib.compress(bytes(4 * _TIFF_TILE_PX**2), 6), {}, 0
        for level, row, column, tile in windows.pyramid(_TIFF_TILE_PX):
            places[level, row, column] = end, spill.write(zlib.compress(tile.astype("<u4").tobytes(), 6))
            end += places[level, row, column][1]
        tiles = [-(-height // _TIFF_TILE_PX) * -(-width // _TIFF_TILE_PX) for height, width in sizes]
        large = end + (len(blank) + 32) * sum(tiles) > _CLASSIC_TIFF_BYTES
        tiff = stack.enter_context(tifffile.TiffWriter(file, bigtiff=large, byteorder="<", ome=True))
        for level, size in enumerate(sizes):
            _write_level(tiff, level, size, _packed_tiles(spill, places, blank, level, size), store, about, len(sizes))


def _write_level(
    tiff: tifffile.TiffWriter,
    level: int,
    size: tuple[int, int],
    tiles: Iterator[bytes],
    store: PartStore,
    about: About,
    levels: int,
) -> None:
    """One level: the first an image of its own, the others below it."""
    um_y, um_x = _label_um(store)
    first = {
        "subifds": levels - 1,
        "metadata": {
            "axes": "YX",
            "Name": about.slide,
            "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"nuguide:{about.slide}:labels")),   # not one of the day
            "PhysicalSizeX": um_x,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": um_y,
            "PhysicalSizeYUnit": "µm",
        },
    }
    tiff.write(
        tiles,
        shape=size,
        dtype=np.uint32,
        tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
        photometric="minisblack",
        compression="zlib",
        resolution=(1e4 / um_x / 2**level, 1e4 / um_y / 2**level),
        resolutionunit="CENTIMETER",
        **(first if level == 0 else {"subfiletype": 1, "metadata": None}),
    )


def _packed_tiles(
    spill: IO[bytes],
    places: dict[tuple[int, int, int], tuple[int, int]],
    blank: bytes,
    level: int,
    size: tuple[int, int],
) -> Iterator[bytes]:
    """The packed tiles of a level in rows, from where they wait."""
    for row in range(-(-size[0] // _TIFF_TILE_PX)):
        for column in range(-(-size[1] // _TIFF_TILE_PX)):
            if (level, row, column) in places:
                start, length = places[level, row, column]
                spill.seek(start)
                yield spill.read(length)
            else:
                yield blank


def _label_um(store: PartStore) -> tuple[float, float]:
    """Microns per fine pixel, (y, x)."""
    y, x = store.layout.fine_scale
    return y * store.layout.mpp, x * store.layout.mpp


def write_ome_zarr(store: PartStore, path: Path, about: About) -> None:
    """The label map as OME-Zarr 0.4 (Zarr format 2), int32, in labels/nuclei: what QuPath 0.6 and napari open.

    There is no image beside it: open the group labels/nuclei itself. `facts` are among its attributes.
    """
    zarr = _library("zarr", "slides")
    with export.replacing_zarr(path) as folder:
        root = zarr.open_group(folder, mode="w", zarr_format=2)
        root.create_group("labels", attributes={"labels": [LABELS]})
        windows = LabelWindows(store)
        attributes = {
            "multiscales": [{"version": "0.4", **_multiscales(windows, _label_um(store))}],
            "image-label": {"version": "0.4"},
            "nuguide": facts(store, about),
        }
        _write_pyramid(root.create_group(f"labels/{LABELS}", attributes=attributes), windows)


def write_ome_zarr_05(store: PartStore, path: Path, about: About) -> None:
    """`write_ome_zarr` in version 0.5 (Zarr format 3)."""
    zarr = _library("zarr", "slides")
    with export.replacing_zarr(path) as folder:
        root = zarr.open_group(folder, mode="w", zarr_format=3)
        root.create_group("labels", attributes={"ome": {"version": "0.5", "labels": [LABELS]}})
        windows = LabelWindows(store)
        multiscales = [_multiscales(windows, _label_um(store))]
        attributes = {
            "ome": {"version": "0.5", "multiscales": multiscales, "image-label": {}},
            "nuguide": facts(store, about),
        }
        _write_pyramid(root.create_group(f"labels/{LABELS}", attributes=attributes), windows)


def _multiscales(windows: LabelWindows, pixel: tuple[float, float], unit: str | None = "micrometer") -> dict[str, Any]:
    """The metadata of a pyramid with pixels of the first level of a size (y, x)."""
    axes = [{"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in "yx"]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [{"type": "scale", "scale": [side * 2**level for side in pixel]}],
        }
        for level in range(len(windows.sizes(_ZARR_TILE_PX)))
    ]
    return {"name": LABELS, "axes": axes, "datasets": datasets, "type": "nearest"}


def _write_pyramid(group: Any, windows: LabelWindows) -> None:
    """The arrays of a label map, in a Zarr group of either format. Chunks without nuclei are not written.

    Zlib in format 2 because every reader in Java has it; zstandard in format 3, whose standard names it.
    """
    old = group.metadata.zarr_format == 2
    zarr = importlib.import_module("zarr")
    packing = importlib.import_module("numcodecs").Zlib(6) if old else zarr.codecs.ZstdCodec(level=3)
    arrays = [
        group.create_array(
            str(level),
            shape=size,
            dtype="int32",
            chunks=(_ZARR_TILE_PX, _ZARR_TILE_PX),
            compressors=[packing],
            fill_value=0,
            chunk_key_encoding={"name": "v2" if old else "default", "separator": "/"},
            dimension_names=None if old else ("y", "x"),
        )
        for level, size in enumerate(windows.sizes(_ZARR_TILE_PX))
    ]
    for level, row, column, tile in windows.pyramid(_ZARR_TILE_PX):
        height, width = arrays[level].shape
        top, left = row * _ZARR_TILE_PX, column * _ZARR_TILE_PX
        bottom, right = min(top + _ZARR_TILE_PX, height), min(left + _ZARR_TILE_PX, width)
        arrays[level][top:bottom, left:right] = tile[: bottom - top, : right - left]


# SpatialData


def write_spatialdata(store: PartStore, path: Path, about: About) -> None:
    """Labels, polygons and table as SpatialData, in the coordinate systems "global" (level-0 pixels) and "microns".

    Elements: labels nuclei_labels, shapes nuclei (indexed by id), table with all measurements,
    which annotates the shapes by the column id; labels have the same numbers. Labels are streamed, but the library
    takes shapes and table as a whole only: more than `MOST_SHAPES` nuclei are refused.
    """
    spatialdata = _library("spatialdata", "spatialdata")
    windows = LabelWindows(store)
    if windows.nuclei > MOST_SHAPES:
        raise UserError(
            f"{path}: not written ({windows.nuclei} nuclei, of which SpatialData would hold all in memory, "
            f"{MOST_SHAPES} at most); choose ome-zarr and parquet instead"
        )
    zarr = importlib.import_module("zarr")
    with export.replacing_zarr(path) as folder:
        shapes, table = _shapes_and_table(store)
        data = spatialdata.SpatialData(shapes={"nuclei": shapes}, tables={"table": table}, attrs=facts(store, about))
        data.write(folder, consolidate_metadata=False)
        root = zarr.open_group(folder, mode="r+", use_consolidated=False)
        name = "nuclei_labels"
        root.require_group("labels").attrs.put({"ome": {"labels": [name]}})
        multiscales = _multiscales(windows, (1.0, 1.0), unit=None)
        multiscales["coordinateTransformations"] = [
            {"type": "scale", "scale": list(pixel), "input": _space("yx"), "output": _space(system)}
            for system, pixel in (("global", store.layout.fine_scale), ("microns", _label_um(store)))
        ]
        attributes = {
            "ome": {"version": "0.5-dev-spatialdata", "multiscales": [multiscales], "image-label": {}},
            "spatialdata_attrs": {"version": "0.3"},
        }
        _write_pyramid(root.create_group(f"labels/{name}", attributes=attributes), windows)
        data.write_consolidated_metadata()


def _space(name: str) -> dict[str, Any]:
    """A coordinate system as SpatialData writes it into its files."""
    return {"name": name, "axes": [{"name": axis, "type": "space", "unit": "unit"} for axis in "yx"]}


def _shapes_and_table(store: PartStore) -> tuple[Any, Any]:
    """The polygons of all nuclei, those of `write_geojson`, and their table, as SpatialData's models."""
    anndata, geopandas, shapely = (importlib.import_module(name) for name in ("anndata", "geopandas", "shapely"))
    models = importlib.import_module("spatialdata.models")
    transformations = importlib.import_module("spatialdata.transformations")
    scale = np.array(store.layout.fine_scale[::-1])
    tables, polygons = [Part.empty(store.columns).table], []
    for _, first, part in store.all(labels=False):
        tables.append(part.table.assign(id=part.table["id"] + first))
        rings = export.half_pixels(part.rings)
        points = (np.concatenate(rings) / 2 + 0.5) * scale
        owners = np.repeat(np.arange(len(part)), [len(ring) for ring in rings])
        polygons.append(shapely.polygons(shapely.linearrings(points, indices=owners)))
    table = pd.concat(tables[1:] or tables, ignore_index=True)
    microns = transformations.Scale([store.layout.mpp] * 2, axes=("x", "y"))
    systems = {"global": transformations.Identity(), "microns": microns}
    geometry = np.concatenate(polygons) if polygons else np.zeros(0, object)
    shapes = geopandas.GeoDataFrame({"geometry": geometry}, index=pd.Index(table["id"], name="id"))
    measured = list(store.columns[1:])
    cells = anndata.AnnData(
        X=table[measured].to_numpy(),
        obs=pd.DataFrame(
            {"id": table["id"].to_numpy(), "region": pd.Categorical(["nuclei"] * len(table), ["nuclei"])},
            index=table["id"].astype(str).to_numpy(),
        ),
        var=pd.DataFrame(index=pd.Index(measured)),
        obsm={"spatial": table[["centroid_x_px", "centroid_y_px"]].to_numpy() + 0.5},
    )
    annotated = models.TableModel.parse(cells, region="nuclei", region_key="region", instance_key="id")
    return models.ShapesModel.parse(shapes, transformations=systems), annotated


# Pictures


def write_heatmap(store: PartStore, path: Path, about: About) -> None:
    """`heatmap` as PNG."""
    picture = cv2.cvtColor(heatmap(store, about.thumbnail_rgb), cv2.COLOR_RGB2BGR)
    with export.replacing(path) as file:
        file.write(cv2.imencode(".png", picture)[1].data)


WRITERS = {
    "parquet": Writer(".parquet", write_parquet, "slides", ("pyarrow.parquet",)),
    "csv": Writer(".csv", write_csv),
    "geojson": Writer(".geojson", write_geojson),
    "geojson.gz": Writer(".geojson.gz", write_geojson_gz),
    "labels": Writer(".labels.ome.tif", write_labels),
    "ome-zarr": Writer(".ome.zarr", write_ome_zarr, "slides", ("zarr",)),
    "ome-zarr-0.5": Writer(".v0.5.ome.zarr", write_ome_zarr_05, "slides", ("zarr",)),
    "spatialdata": Writer(".spatialdata.zarr", write_spatialdata, "spatialdata", ("spatialdata",)),
    "heatmap": Writer(".heatmap.png", write_heatmap),
}


def _library(name: str, extra: str) -> Any:
    """A library of an extra; UserError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this format needs {name}, which cannot be imported ({error}); pip install 'nuguide[{extra}]'"
        ) from error
