"""The files of a slide: opened by the libraries that users open them with, they hold what the parts hold."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from drawn_slides import disks, drawn_store, part_of, small_layout
from nuguide import export
from nuguide.images import read_image
from nuguide.measure import COLUMNS, outlines
from nuguide.slides.heatmap import density, heatmap
from nuguide.slides.layout import Layout
from nuguide.slides.parts import Part, PartStore
from nuguide.slides.windows import LabelWindows
from nuguide.slides.writers import MOST_SHAPES, WRITERS, About
from nuguide.types import UserError

ABOUT = About('a & "b"', "small")
LIGHT = [name for name in WRITERS if name != "spatialdata"]     # whose library takes ten seconds to import


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartStore, np.ndarray]:
    return drawn_store(tmp_path_factory.mktemp("parts"))


def written(name: str, store: PartStore, folder: Path, about: About = ABOUT) -> Path:
    path = folder / f"slide{WRITERS[name].ending}"
    WRITERS[name].write(store, path, about)
    return path


def whole_table(store: PartStore) -> pd.DataFrame:
    parts = [part.table.assign(id=part.table["id"] + first) for _, first, part in store.all()]
    return pd.concat(parts, ignore_index=True)


# Windows


def test_the_drawing_has_nuclei_across_every_seam_and_corner(drawn):
    store, labels = drawn
    cores = [region.window for region in store.layout.regions]
    assert store.layout.region_rows_columns == (2, 3)
    for seam in {2 * core.core_top for core in cores} - {0}:
        assert ((labels[seam] == labels[seam - 1]) & (labels[seam] > 0)).any()
    for seam in {2 * core.core_left for core in cores} - {0}:
        assert ((labels[:, seam] == labels[:, seam - 1]) & (labels[:, seam] > 0)).any()
    owners = [set(np.unique(part.labels + first)) - {first} for _, first, part in store.all()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == labels.max() == len(np.unique(labels)) - 1


def test_windows_of_any_place_are_crops_of_the_global_map(drawn):
    store, labels = drawn
    windows = LabelWindows(store, kept=2)
    assert windows.nuclei == labels.max()
    rng = np.random.default_rng(0)
    corners = [(2 * r.window.core_top, 2 * r.window.core_left) for r in store.layout.regions]
    places = [(y - 25, x - 25) for y, x in corners] + [tuple(rng.integers(-40, 420, 2)) for _ in range(40)]
    padded = np.pad(labels, 600)
    for top, left in [(0, 0), *places]:
        height, width = rng.integers(1, 150, 2)
        expected = padded[600 + top : 600 + top + height, 600 + left : 600 + left + width]
        assert np.array_equal(windows.window(top, left, top + height, left + width), expected)
    assert np.array_equal(windows.window(0, 0, 400, 520), labels)
    assert len(windows._kept) == 2


def test_of_two_owners_of_a_pixel_the_first_region_wins(tmp_path):
    store = PartStore(tmp_path, small_layout())
    for index in (0, 1):
        window = store.layout.regions[index].window
        labels = np.ones(((window.bottom - window.top) * 2, (window.right - window.left) * 2), np.int32)
        store.write(store.layout.regions[index], part_of(labels, 2 * window.top, 2 * window.left, store.layout))
    first, second = (region.window for region in store.layout.regions[:2])
    row = LabelWindows(store).window(0, 0, 1, 520)[0]
    assert second.left < first.right
    only_second, neither = 2 * (second.right - first.right), 520 - 2 * second.right
    assert row.tolist() == [1] * 2 * first.right + [2] * only_second + [0] * neither


@pytest.mark.parametrize("tile", [32, 64, 100, 512])
def test_a_pyramid_takes_the_first_of_every_two_by_two_pixels(drawn, tile):
    store, labels = drawn
    windows = LabelWindows(store)
    sizes = windows.sizes(tile)
    levels = [np.zeros((h + tile, w + tile), np.int32) for h, w in sizes]
    for level, row, column, found in windows.pyramid(tile):
        levels[level][row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] = found
    for level, size in enumerate(sizes):
        assert np.array_equal(levels[level][: size[0], : size[1]], labels[:: 2**level, :: 2**level])
    assert max(sizes[-1]) <= tile


def test_places_without_nuclei_are_no_tiles(tmp_path):
    layout = Layout((4000, 4000), 0.25, (2000, 2000), 0.5, 2, 64, 16, 4, 16)
    store = PartStore(tmp_path, layout)
    window = layout.regions[-1].window
    store.write(layout.regions[-1], part_of(disks((100, 100)), 2 * window.core_top, 2 * window.core_left, layout))
    tiles = [place[:3] for place in LabelWindows(store).pyramid(512)]
    assert tiles == [(0, 7, 7), (1, 3, 3), (2, 1, 1), (3, 0, 0)]


# Tables


def test_parquet_holds_every_row_and_says_what_its_pixels_are(drawn, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = written("parquet", drawn[0], tmp_path)
    assert pd.read_parquet(path).equals(whole_table(drawn[0]))
    facts = json.loads(parquet.read_schema(path).metadata[b"nuguide"])
    assert (facts["mpp"], facts["model"], facts["slide"]) == (0.25, "small", ABOUT.slide)


def test_parquet_rows_are_in_groups_of_a_size(drawn, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("nuguide.slides.writers._ROW_GROUP", 60)
    file = parquet.ParquetFile(written("parquet", drawn[0], tmp_path))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert len(groups) > 1
    assert min(groups[:-1]) >= 60
    assert sum(groups) == drawn[1].max()


def test_csv_is_what_write_table_writes(drawn, tmp_path):
    expected = export.write_table(tmp_path / "whole.csv", whole_table(drawn[0]))
    assert written("csv", drawn[0], tmp_path).read_text() == expected.read_text()


# Polygons


def test_where_fine_pixels_are_level_0_pixels_geojson_is_that_of_an_image(drawn, tmp_path):
    store, labels = drawn
    expected = export.write_geojson(tmp_path / "a.geojson", outlines(labels), whole_table(store), ABOUT.slide)
    text = written("geojson", store, tmp_path).read_bytes()
    assert text == expected.read_bytes()
    assert gzip.decompress(written("geojson.gz", store, tmp_path).read_bytes()) == text
    assert np.array_equal(export.read_geojson(tmp_path / "slide.geojson", labels.shape) > 0, labels > 0)


@pytest.mark.parametrize("slide_px", [(800, 1040), (401, 523), (211, 257)])
def test_polygons_are_valid_and_lie_on_level_0(tmp_path, slide_px):
    shapely = pytest.importorskip("shapely")
    store, labels = drawn_store(tmp_path / "parts", small_layout(slide_px))
    features = json.loads(written("geojson", store, tmp_path).read_text())["features"]
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert all(shapely.is_valid(shapes))
    assert len({feature["id"] for feature in features}) == len(shapes) == labels.max()
    y, x = store.layout.fine_scale
    area = np.bincount(labels.ravel())[1:] * y * x
    assert np.abs([shape.area for shape in shapes] / area - 1).max() < 0.12
    assert np.abs(sum(shape.area for shape in shapes) / area.sum() - 1) < 0.02
    box = np.array([shape.bounds for shape in shapes])
    assert box.min() == 0
    far = np.argwhere(labels).max(axis=0) + 1
    assert far[1] == 520, "the border on the right"
    assert np.allclose(box[:, 2:].max(axis=0), [far[1] * x, far[0] * y], atol=0.006)
    numbers = [n for f in features for p in f["geometry"]["coordinates"][0] for n in p]
    assert all(round(number, 2) == number for number in numbers)
    assert "-0," not in (tmp_path / "slide.geojson").read_text()


# Label maps


def test_the_ome_tiff_is_a_tiled_pyramid_in_microns(drawn, tmp_path):
    store, labels = drawn
    path = written("labels", store, tmp_path)
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert [level.shape for level in series.levels] == [(400, 520), (200, 260)]
        assert all(level.keyframe.is_tiled and level.dtype == np.uint32 for level in series.levels)
        for number, level in enumerate(series.levels):
            assert np.array_equal(level.asarray(), labels[:: 2**number, :: 2**number])
        image = tifffile.xml2dict(tiff.ome_metadata or "")["OME"]["Image"]
        assert image["Name"] == ABOUT.slide
        assert image["Pixels"]["PhysicalSizeX"] == image["Pixels"]["PhysicalSizeY"] == 0.25
        assert image["Pixels"]["PhysicalSizeXUnit"] == "µm"
        assert not tiff.is_bigtiff


def test_a_large_ome_tiff_is_a_bigtiff(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("nuguide.slides.writers._CLASSIC_TIFF_BYTES", 1000)
    with tifffile.TiffFile(written("labels", drawn[0], tmp_path)) as tiff:
        assert tiff.is_bigtiff
        assert np.array_equal(tiff.asarray(), drawn[1])


@pytest.mark.parametrize(("name", "version"), [("ome-zarr", "0.4"), ("ome-zarr-0.5", "0.5")])
def test_ome_zarr_is_valid_and_read_back(drawn, tmp_path, monkeypatch, name, version):
    zarr = pytest.importorskip("zarr")
    models = pytest.importorskip("ome_zarr_models")
    monkeypatch.setattr("nuguide.slides.writers._ZARR_TILE_PX", 256)
    store, labels = drawn
    path = written(name, store, tmp_path)
    label = models.open_ome_zarr(str(path / "labels" / "nuclei"), version=version)
    group = models.open_ome_zarr(str(path / "labels"), version=version)
    assert type(label).__name__ == "ImageLabel"
    assert type(group).__name__ == "Labels"
    arrays = [zarr.open_array(path / "labels" / "nuclei" / str(level), mode="r") for level in range(3)]
    for level, array in enumerate(arrays):
        assert (array.dtype, array.chunks) == (np.int32, (256, 256))
        assert np.array_equal(array[:], labels[:: 2**level, :: 2**level])
    attributes = zarr.open_group(path / "labels" / "nuclei", mode="r").attrs.asdict()
    multiscales = attributes.get("ome", attributes)["multiscales"][0]
    assert [axis["unit"] for axis in multiscales["axes"]] == ["micrometer", "micrometer"]
    scales = [level["coordinateTransformations"][0]["scale"] for level in multiscales["datasets"]]
    assert scales == [[0.25, 0.25], [0.5, 0.5], [1, 1]]
    assert attributes["nuguide"]["label_px_in_level0"] == [1, 1]


@pytest.mark.parametrize("name", ["ome-zarr", "ome-zarr-0.5"])
def test_ome_zarr_is_what_its_own_reader_reads(drawn, tmp_path, name):
    io, reader = pytest.importorskip("ome_zarr.io"), pytest.importorskip("ome_zarr.reader")
    path = written(name, drawn[0], tmp_path)
    nodes = list(reader.Reader(io.parse_url(path / "labels"))())
    (found,) = [node for node in nodes if node.data]
    assert np.array_equal(found.data[0].compute(), drawn[1])
    assert found.metadata["name"] == "nuclei"


def test_an_ome_zarr_is_replaced_but_no_other_folder(drawn, tmp_path):
    pytest.importorskip("zarr")
    path = written("ome-zarr", drawn[0], tmp_path)
    (path / "stray").touch()
    written("ome-zarr", drawn[0], tmp_path)
    assert not (path / "stray").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(UserError, match="a folder has this name"):
        WRITERS["ome-zarr"].write(drawn[0], other, ABOUT)
    assert (other / "precious").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "slide.ome.zarr"]


# SpatialData


# Its dependencies name things of xarray, dask, zarr and anndata that are about to go.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_spatialdata_reads_labels_shapes_and_table(tmp_path):
    spatialdata = pytest.importorskip("spatialdata", "0.7.2", exc_type=ImportError)
    store, labels = drawn_store(tmp_path / "parts", small_layout((800, 1040), 0.125))
    path = written("spatialdata", store, tmp_path)
    data, before = spatialdata.read_zarr(path), contents(path)
    assert contents(written("spatialdata", store, tmp_path)) == before
    found, shapes, table = data["nuclei_labels"], data["nuclei"], data["table"]
    assert np.array_equal(np.asarray(found), labels)
    assert shapes.index.tolist() == table.obs["id"].tolist() == list(range(1, labels.max() + 1))
    assert table.uns["spatialdata_attrs"] == {"region": "nuclei", "region_key": "region", "instance_key": "id"}
    assert table.var_names.tolist() == list(COLUMNS[1:])
    assert shapes.geometry.is_valid.all()
    inside = shapes.geometry.iloc[50].centroid
    assert np.allclose([inside.x, inside.y], table.obsm["spatial"][50], atol=1)
    assert labels[int(inside.y / 2), int(inside.x / 2)] == 51, "labels are scaled by 2 onto the polygons"
    to_global = spatialdata.transformations.get_transformation(found, "global")
    to_um = spatialdata.transformations.get_transformation(found, "microns")
    assert to_global.to_affine_matrix("yx", "yx").diagonal().tolist() == [2, 2, 1]
    assert to_um.to_affine_matrix("yx", "yx").diagonal().tolist() == [0.25, 0.25, 1]
    moved = spatialdata.transform(shapes, to_coordinate_system="microns").geometry.iloc[50].centroid
    assert moved.x == pytest.approx(inside.x / 8)


def test_too_many_nuclei_for_spatialdata_are_refused(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata", json)
    monkeypatch.setattr(LabelWindows, "__init__", lambda self, store: setattr(self, "nuclei", MOST_SHAPES + 1))
    with pytest.raises(UserError, match="2000001 nuclei.*; choose ome-zarr and parquet instead"):
        written("spatialdata", drawn[0], tmp_path)


# Heat map


def test_the_density_counts_every_nucleus_in_its_cell(tmp_path):
    layout = Layout((1024, 512), 0.25, (512, 256), 0.5, 2, 64, 16, 32, 16)  # 256 x 128 um: 4 x 2 cells
    store = PartStore(tmp_path, layout)
    labels = np.zeros((1024, 512), np.int32)
    labels[10:20, 300:310], labels[10:20, 340:350], labels[1014:, :9] = 1, 2, 3
    store.write(layout.regions[0], part_of(labels, 0, 0, layout))
    cell_mm2 = 0.064**2
    assert np.allclose(density(store) * cell_mm2, [[0, 2], [0, 0], [0, 0], [1, 0]])


def test_the_heat_map_lies_on_the_thumbnail(tmp_path):
    layout = Layout((4000, 8000), 0.25, (2000, 4000), 0.5, 2, 576, 128)
    store = PartStore(tmp_path, layout)
    store.write(layout.regions[0], part_of(disks((600, 600)), 0, 0, layout))    # 0.15 mm in the upper left
    thumbnail = np.full((300, 600, 3), 200, np.uint8)
    thumbnail[150:] = 0
    path = written("heatmap", store, tmp_path, About("a", "b", thumbnail_rgb=thumbnail))
    picture = read_image(path).image_rgb
    assert picture.shape == (300, 750, 3)
    assert np.array_equal(picture, heatmap(store, thumbnail))
    yellow, purple = picture[10, 10].astype(int), picture[140, 500].astype(int)
    assert yellow[1] > 150 > purple[1]
    assert purple.sum() > picture[200, 500].sum(), "the dark half of the thumbnail is darker"
    assert (picture[290:, 600:] == 255).all(), "the legend is beside the slide"
    assert heatmap(store).shape[:2] == (512, 1024 + 150)


def test_a_slide_without_nuclei_has_every_file(tmp_path):
    store = PartStore(tmp_path / "none", small_layout())
    for name in LIGHT:
        assert written(name, store, tmp_path).exists()
    assert len(pd.read_parquet(tmp_path / "slide.parquet")) == 0
    assert list(pd.read_csv(tmp_path / "slide.csv").columns) == list(COLUMNS)
    assert json.loads((tmp_path / "slide.geojson").read_text())["features"] == []
    assert not tifffile.imread(tmp_path / "slide.labels.ome.tif").any()


# Whole or not at all


def contents(path: Path) -> dict[str, str]:
    """Every file and the hash of its bytes."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.mark.parametrize("name", LIGHT)
def test_the_same_parts_give_the_same_bytes_and_nothing_else(drawn, tmp_path, name):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        found.append(contents(written(name, drawn[0], folder)))
        assert len(list(folder.iterdir())) == 1
    assert found[0] == found[1]


class FullDisk:
    """Stands for the number of a disk error where a write is asked for."""

    def __call__(self, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


WRITES = {
    "parquet": "pyarrow.parquet.ParquetWriter.write_table",
    "csv": "nuguide.export.write_rows",
    "geojson": "nuguide.export.write_features",
    "geojson.gz": "gzip.GzipFile.write",
    "labels": "tifffile.TiffWriter.write",
    "ome-zarr": "zarr.Array.__setitem__",
    "ome-zarr-0.5": "zarr.Group.create_array",
    "heatmap": "os.replace",
}


@pytest.mark.parametrize("name", LIGHT)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(drawn, tmp_path, monkeypatch, name):
    monkeypatch.setattr(WRITES[name], FullDisk())
    with pytest.raises(UserError, match=r"slide\..*: not written \(No space left on device\); free some space"):
        written(name, drawn[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LIGHT)
def test_a_folder_that_is_not_there_is_not_made(drawn, tmp_path, name):
    with pytest.raises(UserError, match="make the folder first"):
        written(name, drawn[0], tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [("parquet", "pyarrow", "slides"), ("ome-zarr", "zarr", "slides"), ("spatialdata", "spatialdata", "spatialdata")],
)
def test_a_missing_library_is_named_with_its_extra(drawn, tmp_path, monkeypatch, name, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}, .*; pip install 'nuguide\[{extra}\]'"):
        written(name, drawn[0], tmp_path)


def test_a_damaged_part_stops_every_writer(tmp_path):
    store, _ = drawn_store(tmp_path / "parts")
    store.path(store.layout.regions[2]).write_bytes(b"PK")
    for name in LIGHT:
        with pytest.raises(UserError, match="is damaged; delete it"):
            written(name, store, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_parts_are_read_in_part(drawn):
    store, _ = drawn
    region = store.layout.regions[1]
    assert store.read(region, labels=False).labels.size == 0
    assert store.read(region, labels=False).table.equals(store.read(region).table)
    top, left, labels = store.labels(region)
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, store.read(region).labels)
    assert (top, left) == (store.read(region).top, store.read(region).left)
    assert store.count(region) == len(store.read(region))
    assert store.count(region) > 0
    assert PartStore(store.folder / "none", store.layout).count(region) == len(Part.empty()) == 0
