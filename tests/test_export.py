"""What we write is what other programs can read, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from nuguide.export import (
    MEASUREMENTS,
    OUTLINE_RGB,
    overlay,
    read_geojson,
    write_geojson,
    write_labels,
    write_overlay,
    write_table,
)
from nuguide.images import read_image
from nuguide.measure import measure, outlines
from nuguide.types import UserError


def table_of(labels: np.ndarray) -> pd.DataFrame:
    return measure(labels, np.full((*labels.shape, 3), 200, np.uint8), 0.5, np.full(labels.shape, 0.25))


def geojson(path: Path, labels: np.ndarray) -> list[dict]:
    """Write the label map and read the features back as plain JSON."""
    write_geojson(path, outlines(labels), table_of(labels), "slide.png")
    return json.loads(path.read_text("utf-8"))["features"]


def blobs(seed: int) -> np.ndarray:
    """Random labels of random roughness, each in one piece (at least by corners) and without holes."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=rng.integers(2, 40, 2))
    if seed % 4:
        noise = cv2.GaussianBlur(noise, (0, 0), float(seed % 4)).reshape(noise.shape)
    mask = (noise >= np.quantile(noise, rng.uniform(0.3, 0.9))).astype(np.uint8)
    background = cv2.connectedComponents(np.pad(1 - mask, 1, constant_values=1), connectivity=4)[1]
    filled = (background != background[0, 0])[1:-1, 1:-1].astype(np.uint8)
    return cv2.connectedComponents(filled, connectivity=8)[1].astype(np.int32)


def is_simple(ring: np.ndarray) -> bool:
    """Whether a closed ring (first point repeated) neither crosses nor touches itself, in exact integers."""
    points = np.rint(10 * ring[:-1]).astype(np.int64)
    following = np.roll(points, -1, axis=0)
    first, second = np.triu_indices(len(points), 1)
    adjacent = (second == first + 1) | ((first == 0) & (second == len(points) - 1))

    def side(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.sign((b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]))

    a, b, c, d = points[first], following[first], points[second], following[second]
    boxes_meet = (np.minimum(a, b) <= np.maximum(c, d)) & (np.minimum(c, d) <= np.maximum(a, b))
    meets = boxes_meet.all(axis=1) & (side(a, b, c) * side(a, b, d) <= 0) & (side(c, d, a) * side(c, d, b) <= 0)
    step, next_step = following - points, np.roll(following, -1, axis=0) - following
    straight = step[:, 0] * next_step[:, 1] == step[:, 1] * next_step[:, 0]
    folds_back = (straight & ((step * next_step).sum(axis=1) <= 0)).any()
    return not (meets & ~adjacent).any() and not folds_back


def test_the_check_of_rings_knows_good_from_bad():
    assert is_simple(np.array([[0, 0], [4, 0], [4, 4], [0, 0]]))
    assert not is_simple(np.array([[0, 0], [4, 4], [4, 0], [0, 4], [0, 0]])), "a bow tie"
    assert not is_simple(np.array([[0, 0], [4, 0], [4, 4], [2, 0], [0, 4], [0, 0]])), "touches its own edge"
    assert not is_simple(np.array([[0, 0], [4, 0], [2, 0], [2, 4], [0, 0]])), "folds back"


# Labels


def test_labels_come_back_with_their_scale(tmp_path, tissue):
    path = write_labels(tmp_path / "a.labels.tif", tissue.labels, mpp=0.25)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        assert page.dtype == np.uint32
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert not page.is_tiled
        assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
        for tag in ("XResolution", "YResolution"):
            pixels, centimeters = page.tags[tag].value
            assert 1e4 * centimeters / pixels == pytest.approx(0.25)
        assert (tiff.asarray() == tissue.labels).all()
    assert path.stat().st_size < tissue.labels.nbytes / 20


def test_large_label_maps_are_tiled(tmp_path):
    labels = np.zeros((100, 2100), np.int64)
    labels[50:, 2000:] = 2**32 - 1
    with tifffile.TiffFile(write_labels(tmp_path / "a.tif", labels, 0.5)) as tiff:
        assert tiff.pages.first.is_tiled
        assert (tiff.asarray() == labels).all()


def test_labels_that_do_not_fit_are_refused(tmp_path):
    for labels in (np.full((2, 2), -1), np.full((2, 2), 2**32), np.zeros((2, 2)), np.zeros((2, 2, 1), int)):
        with pytest.raises(ValueError, match="labels"):
            write_labels(tmp_path / "a.tif", labels, 0.5)
    assert list(tmp_path.iterdir()) == []


# GeoJSON


def test_a_feature_is_a_qupath_detection(tmp_path):
    labels = np.zeros((8, 9), np.int32)
    labels[2:4, 3:7] = 5
    (feature,) = geojson(tmp_path / "a.geojson", labels)
    properties = feature["properties"]
    assert feature["type"] == "Feature"
    assert uuid.UUID(feature["id"]).version == 5
    assert feature["geometry"]["type"] == "Polygon"
    assert properties["objectType"] == "detection"
    assert properties["name"] == "5"
    assert properties["classification"] == {"name": "Nucleus", "color": list(OUTLINE_RGB)}
    assert list(properties["measurements"]) == list(MEASUREMENTS.values())
    assert properties["measurements"]["Nucleus: Area µm^2"] == 8 * 0.25
    assert properties["measurements"]["Detection probability"] == 0.25


def test_coordinates_count_from_the_corner_of_the_first_pixel(tmp_path):
    labels = np.zeros((8, 9), np.int32)
    labels[2:4, 3:7] = 1  # columns 3 to 6 reach from x = 3 to 7, rows 2 and 3 from y = 2 to 4
    (ring,) = geojson(tmp_path / "a.geojson", labels)[0]["geometry"]["coordinates"]
    ring = np.array(ring)
    assert (ring.min(axis=0).tolist(), ring.max(axis=0).tolist()) == ([3, 2], [7, 4])
    assert (ring[0] == ring[-1]).all()


@pytest.mark.parametrize("pixels", [[(0, 0)], [(2, 2), (2, 3)], [(1, 1), (2, 2)], [(0, 5), (1, 5)]])
def test_nuclei_of_one_and_two_pixels_are_valid_polygons(tmp_path, pixels):
    labels = np.zeros((6, 6), np.int32)
    labels[tuple(zip(*pixels, strict=True))] = 1
    ring = np.array(geojson(tmp_path / "a.geojson", labels)[0]["geometry"]["coordinates"][0])
    assert len(ring) >= 5
    assert is_simple(ring)
    assert (read_geojson(tmp_path / "a.geojson", labels.shape) == labels).all()


def test_every_ring_is_valid_and_every_pixel_comes_back(tmp_path):
    points = 0
    for seed in range(100):
        labels = blobs(seed)
        for feature in geojson(tmp_path / "a.geojson", labels):
            (ring,) = np.array(feature["geometry"]["coordinates"])
            assert len(ring) >= 4
            assert (ring[0] == ring[-1]).all()
            assert is_simple(ring)
            points += len(ring)
        assert (read_geojson(tmp_path / "a.geojson", labels.shape) == labels).all()
    assert points > 5000


def test_drawn_tissue_comes_back_from_a_third_of_its_points(tmp_path, tissue):
    features = geojson(tmp_path / "a.geojson", tissue.labels)
    assert (read_geojson(tmp_path / "a.geojson", tissue.labels.shape) == tissue.labels).all()
    kept = sum(len(feature["geometry"]["coordinates"][0]) for feature in features)
    assert kept < 0.45 * sum(map(len, outlines(tissue.labels).values()))


def test_holes_are_filled_and_labels_are_renumbered_in_order(tmp_path):
    labels = np.zeros((9, 20), np.int32)
    labels[1:8, 1:8], labels[3:5, 3:5], labels[2:6, 12:16] = 900, 0, 70
    geojson(tmp_path / "a.geojson", labels)
    expected = np.zeros_like(labels)
    expected[1:8, 1:8], expected[2:6, 12:16] = 2, 1  # 70 comes before 900
    assert (read_geojson(tmp_path / "a.geojson", labels.shape) == expected).all()


def test_identifiers_are_unique_and_follow_from_image_and_nucleus(tmp_path, tissue):
    rings, table = outlines(tissue.labels), table_of(tissue.labels)
    ids = []
    for path, image in (("a", "1.png"), ("b", "1.png"), ("c", "2.png")):
        text = write_geojson(tmp_path / path, rings, table, image).read_text("utf-8")
        ids.append([feature["id"] for feature in json.loads(text)["features"]])
    assert ids[0] == ids[1]
    assert len(set(ids[0] + ids[2])) == 2 * len(rings)


def test_no_nuclei_are_an_empty_collection(tmp_path):
    assert geojson(tmp_path / "a.geojson", np.zeros((5, 5), np.int32)) == []
    assert read_geojson(tmp_path / "a.geojson", (5, 5)).tolist() == np.zeros((5, 5)).tolist()


def test_rings_and_rows_of_different_nuclei_are_refused(tmp_path, tissue):
    with pytest.raises(ValueError, match="40 rings, 39 rows"):
        write_geojson(tmp_path / "a", outlines(tissue.labels), table_of(tissue.labels).iloc[1:], "a.png")
    table = table_of(tissue.labels)
    table.loc[3, "probability"] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        write_geojson(tmp_path / "a", outlines(tissue.labels), table, "a.png")
    assert list(tmp_path.iterdir()) == []


def square(left: float, top: float, side: float) -> list[list[float]]:
    right, bottom = left + side, top + side
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def annotation(kind: str, coordinates: list, **more: object) -> dict:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": {}, **more}


def read_back(tmp_path: Path, document: object) -> np.ndarray:
    """The label map, 6 x 8, of a document."""
    path = tmp_path / "drawn.geojson"
    path.write_text(json.dumps(document))
    return read_geojson(path, (6, 8))


def test_polygons_with_holes_and_in_parts(tmp_path):
    labels = read_back(
        tmp_path,
        {
            "type": "FeatureCollection",
            "features": [
                annotation("Polygon", [square(0, 0, 4), square(1, 1, 2)]),
                annotation("MultiPolygon", [[square(5, 0, 2)], [square(4, 4, 2)]]),
            ],
        },
    )
    assert labels.tolist() == [
        [1, 1, 1, 1, 0, 2, 2, 0],
        [1, 0, 0, 1, 0, 2, 2, 0],
        [1, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 2, 2, 0, 0],
        [0, 0, 0, 0, 2, 2, 0, 0],
    ]


def test_a_pixel_belongs_to_the_polygon_that_holds_its_center(tmp_path):
    labels = read_back(tmp_path, annotation("Polygon", [square(0.4, 0.6, 2)]))  # centers at 0.5, 1.5, 2.5
    assert np.argwhere(labels).tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


def test_of_two_polygons_the_later_is_on_top_and_what_lies_off_the_image_is_cut(tmp_path):
    labels = read_back(tmp_path, [annotation("Polygon", [square(-5, -5, 9)]), annotation("Polygon", [square(3, 3, 9)])])
    assert labels[:, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert labels[3].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]


def test_an_open_ring_is_closed_and_a_third_coordinate_ignored(tmp_path):
    ring = [[*point, 7] for point in square(1, 1, 2)[:-1]]
    assert read_back(tmp_path, annotation("Polygon", [ring])).sum() == 4


def test_of_a_cell_the_nucleus_is_taken(tmp_path):
    nucleus = {"type": "Polygon", "coordinates": [square(1, 1, 1)]}
    assert read_back(tmp_path, annotation("Polygon", [square(0, 0, 5)], nucleusGeometry=nucleus)).sum() == 1


def test_points_and_empty_geometries_are_left_out(tmp_path):
    features = [annotation("Point", [1, 1]), {"type": "Feature", "geometry": None}]
    features += [annotation("Polygon", []), annotation("Polygon", [square(0, 0, 1)])]
    assert read_back(tmp_path, {"features": features}).tolist()[0] == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "3",
        "[1, 2]",
        '{"features": 3}',
        '{"type": "FeatureCollection"}',
        '{"features": [{"geometry": {"type": "Polygon"}}]}',
        '{"geometry": {"type": "Polygon", "coordinates": [[["a", "b"]]]}}',
        '{"geometry": {"type": "Polygon", "coordinates": [[[1, 2], [3]]]}}',
        '{"geometry": {"type": "Polygon", "coordinates": [[[NaN, 2], [3, 3], [1, 3]]]}}',
        '{"geometry": {"type": "Polygon", "coordinates": [[[1e999, 2], [3, 3], [1, 3]]]}}',
        '{"geometry": {"type": "Polygon", "coordinates": [[1, 2]]}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_file_that_is_no_geojson_is_refused_by_name(tmp_path, text):
    path = tmp_path / "a.geojson"
    path.write_text(text, "latin-1")
    with pytest.raises(UserError, match=r"a\.geojson: is not GeoJSON of polygons") as raised:
        read_geojson(path, (5, 5))
    assert "\n" not in str(raised.value)


def test_a_geojson_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.geojson: cannot be read"):
        read_geojson(tmp_path / "gone.geojson", (5, 5))


# Table


def test_the_table_comes_back_rounded(tmp_path, tissue):
    table = measure(tissue.labels, tissue.image_rgb, 0.5, np.full(tissue.labels.shape, 1 / 3))
    path = write_table(tmp_path / "a.csv", table)
    back = pd.read_csv(path)
    assert list(back.columns) == list(table.columns)
    assert back["id"].tolist() == table["id"].tolist()
    assert np.abs(back.to_numpy() - table.to_numpy()).max() <= 0.005
    assert np.abs(back["solidity"] - table["solidity"]).max() <= 0.00005
    assert back["probability"].unique().tolist() == [0.3333]
    assert b"\r" not in path.read_bytes()


def test_an_empty_table_keeps_its_header(tmp_path):
    path = write_table(tmp_path / "a.csv", table_of(np.zeros((5, 5), np.int32)))
    assert path.read_text().startswith("id,centroid_x_px,")
    assert len(path.read_text().splitlines()) == 1


# Overlay


def test_outlines_are_drawn_on_a_copy(tissue):
    before = tissue.image_rgb.copy()
    picture = overlay(tissue.image_rgb, outlines(tissue.labels))
    drawn = (picture == OUTLINE_RGB).all(axis=2)
    assert (tissue.image_rgb == before).all()
    assert (picture[~drawn] == before[~drawn]).all()
    nuclei = np.pad(tissue.labels > 0, 1).astype(np.uint8)
    edge = cv2.morphologyEx(nuclei, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))[1:-1, 1:-1] > 0
    assert drawn.any()
    assert not (drawn & ~edge).any(), "only at the borders"
    assert drawn.sum() > 0.35 * edge.sum()


def test_lines_grow_with_the_image():
    widths = []
    for size in (800, 3000):
        labels = np.zeros((size, size), np.int32)
        labels[100:200, 100:200] = 1
        row = overlay(np.zeros((size, size, 3), np.uint8), outlines(labels))[150, :150, 1]
        widths.append(int((row > 0).sum()))
    assert widths == [1, 3]


def test_the_overlay_file_is_the_overlay(tmp_path, tissue):
    rings = outlines(tissue.labels)
    path = write_overlay(tmp_path / "a.overlay.png", tissue.image_rgb, rings)
    assert (read_image(path).image_rgb == overlay(tissue.image_rgb, rings)).all()


def test_an_overlay_without_nuclei_is_the_image(tissue):
    assert (overlay(tissue.image_rgb, {}) == tissue.image_rgb).all()


# Whole or not at all

WRITERS = {
    "labels.tif": lambda path, tissue: write_labels(path, tissue.labels, 0.5),
    "geojson": lambda path, tissue: write_geojson(path, outlines(tissue.labels), table_of(tissue.labels), "a.png"),
    "csv": lambda path, tissue: write_table(path, table_of(tissue.labels)),
    "overlay.png": lambda path, tissue: write_overlay(path, tissue.image_rgb, outlines(tissue.labels)),
}


@contextmanager
def largest_file(limit_bytes: int) -> Iterator[None]:
    """Let the system refuse every byte beyond, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_no_half_file_and_the_old_one_whole(tmp_path, tissue, kind):
    path = tmp_path / f"a.{kind}"
    path.write_text("old")
    with largest_file(1000), pytest.raises(UserError) as raised:
        WRITERS[kind](path, tissue)
    assert str(raised.value).startswith(f"{path}: not written (")
    assert "; write to a disk" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", WRITERS)
def test_each_writer_returns_its_path_and_leaves_nothing_else(tmp_path, tissue, kind):
    path = tmp_path / f"a.{kind}"
    assert WRITERS[kind](path, tissue) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_remedy_fits_the_trouble(tmp_path, tissue, monkeypatch):
    table = table_of(tissue.labels)
    with pytest.raises(UserError, match="make the folder first"):
        write_table(tmp_path / "gone" / "a.csv", table)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="make the folder first"):
        write_table(tmp_path / "file" / "a.csv", table)
    (tmp_path / "file").unlink()
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="a folder has this name"):
        write_table(tmp_path / "folder.csv", table)
    with pytest.raises(UserError, match="choose a shorter name"):
        write_table(tmp_path / ("x" * 300), table)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match=r"a\.csv: not written \(No space left on device\); free some space"):
        write_table(tmp_path / "a.csv", table)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.csv"]


def test_an_interruption_leaves_no_half_file(tmp_path, tissue, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tifffile, "imwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_labels(tmp_path / "a.tif", tissue.labels, 0.5)
    assert list(tmp_path.iterdir()) == []
