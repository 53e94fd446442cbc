"""Nuclei leave the program: label map, table, outlines and files."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

import nuguide
from nuguide.export import read_geojson
from nuguide.images import read_image
from nuguide.measure import COLUMNS, outlines
from nuguide.nuclei import Nuclei
from nuguide.types import Sample, UserError


@pytest.fixture
def nuclei(tissue: Sample) -> Nuclei:
    return Nuclei.found(tissue.labels.astype(np.uint32), tissue.image_rgb, (tissue.labels > 0) * 0.75, tissue.mpp)


def test_there_are_as_many_as_rows_and_labels(nuclei, tissue):
    assert len(nuclei) == len(nuclei.table) == tissue.labels.max() == 40
    assert nuclei.table["id"].tolist() == list(range(1, 41))


def test_the_table_has_the_promised_columns_in_their_order(nuclei):
    assert tuple(nuclei.table.columns) == COLUMNS
    assert COLUMNS == (
        "id", "centroid_x_px", "centroid_y_px", "centroid_x_um", "centroid_y_um", "area_um2", "perimeter_um",
        "eccentricity", "solidity", "hematoxylin_od", "eosin_od", "probability",
    )  # fmt: skip


def test_areas_are_microns_and_probabilities_means(nuclei, tissue):
    pixels = np.bincount(tissue.labels.ravel())[1:]
    np.testing.assert_allclose(nuclei.table["area_um2"], pixels * 0.25)     # 0.5 x 0.5 um
    np.testing.assert_allclose(nuclei.table["probability"], 0.75)


def test_outlines_are_those_of_the_label_map_whether_known_or_not(nuclei):
    expected = outlines(nuclei.labels)
    for made in (nuclei, Nuclei(nuclei.labels, nuclei.table, nuclei.mpp)):
        assert list(made.rings) == list(expected)
        for number, ring in expected.items():
            np.testing.assert_array_equal(made.rings[number], ring)


def test_those_above_a_probability_are_numbered_anew_and_otherwise_the_same(nuclei):
    nuclei.table["probability"] = [0.1, 0.5] * 20
    likely = nuclei.above(0.5)
    assert len(likely) == 20
    assert likely.table["id"].tolist() == list(range(1, 21))
    same = [name for name in COLUMNS if name != "id"]
    rows = nuclei.table[1::2].reset_index(drop=True)
    pd.testing.assert_frame_equal(likely.table[same], rows[same])
    for new, old in zip(range(1, 21), range(2, 41, 2), strict=True):
        assert np.array_equal(likely.labels == new, nuclei.labels == old)
        assert np.array_equal(likely.rings[new], nuclei.rings[old])
    assert likely.labels.dtype == np.uint32
    assert nuclei.above(0.1) is nuclei
    assert len(nuclei.above(0.6)) == 0
    assert not nuclei.above(0.6).labels.any()


def test_the_overlay_outlines_nuclei_and_leaves_the_image_alone(nuclei, tissue):
    before = tissue.image_rgb.copy()
    picture = nuclei.overlay(tissue.image_rgb)
    np.testing.assert_array_equal(tissue.image_rgb, before)
    changed = (picture != before).any(axis=2)
    inside = np.pad(tissue.labels > 0, 3).astype(np.uint8)
    near, deep = (morph(inside, np.ones((7, 7), np.uint8))[3:-3, 3:-3] > 0 for morph in (cv2.dilate, cv2.erode))
    assert changed.any()
    assert near[changed].all()
    assert not deep[changed].any()


def test_every_file_holds_the_nuclei(nuclei, tissue, tmp_path):
    np.testing.assert_array_equal(tifffile.imread(nuclei.to_labels(tmp_path / "a.tif")), tissue.labels)
    found = read_geojson(nuclei.to_geojson(tmp_path / "a.geojson"), tissue.labels.shape)
    np.testing.assert_array_equal(found, tissue.labels)
    table = pd.read_csv(nuclei.to_csv(tmp_path / "a.csv"))
    assert tuple(table.columns) == COLUMNS
    np.testing.assert_allclose(table, nuclei.table, atol=5e-3)
    picture = read_image(nuclei.to_overlay(tmp_path / "a.png", tissue.image_rgb)).image_rgb
    np.testing.assert_array_equal(picture, nuclei.overlay(tissue.image_rgb))


def test_paths_may_be_text(nuclei, tmp_path):
    assert nuclei.to_csv(str(tmp_path / "a.csv")) == tmp_path / "a.csv"


def test_geojson_of_two_images_names_nuclei_apart(nuclei, tmp_path):
    one = nuclei.to_geojson(tmp_path / "one.geojson").read_text()
    other = nuclei.to_geojson(tmp_path / "other.geojson").read_text()
    named = nuclei.to_geojson(tmp_path / "named.geojson", image_name="one").read_text()
    assert one != other
    assert one == named


def test_an_image_without_nuclei_gives_empty_files(tmp_path):
    image = np.full((20, 30, 3), 200, np.uint8)
    nothing = Nuclei.found(np.zeros((20, 30), np.uint32), image, np.zeros((20, 30)), 0.5)
    assert len(nothing) == 0
    assert tuple(pd.read_csv(nothing.to_csv(tmp_path / "a.csv")).columns) == COLUMNS
    assert not read_geojson(nothing.to_geojson(tmp_path / "a.geojson"), (20, 30)).any()
    np.testing.assert_array_equal(nothing.overlay(image), image)


def test_a_folder_that_is_not_there_is_named(nuclei, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.a\.csv: not written .*; make the folder first"):
        nuclei.to_csv(tmp_path / "nowhere" / "a.csv")


def test_the_package_offers_its_public_names():
    assert nuguide.Nuclei is Nuclei
    assert sorted(nuguide.__all__) == ["Nuclei", "Predictor", "__version__", "load"]
    with pytest.raises(AttributeError, match="has no attribute 'segment'"):
        nuguide.segment  # noqa: B018  # pyright: ignore
