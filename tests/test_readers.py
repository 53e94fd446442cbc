"""Each reader gives back exactly the images and nuclei that were drawn in the official layout of its data set."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import trees
from nuguide.datasets import DATASETS, read_dataset
from nuguide.datasets.files import open_array
from nuguide.datasets.lizard import read_inst_map
from nuguide.datasets.monuseg import read_aperio
from nuguide.export import write_labels
from nuguide.types import UserError
from trees import TREES, draw, save, write


@pytest.mark.parametrize(
    ("name", "license", "mpp", "ids", "groups"),
    [
        (
            "conic",
            "CC BY-NC-SA 4.0",
            0.5,
            ["consep_1-0000", "consep_1-0001", "dpath_12-0000"],
            ["consep_1", "consep_1", "dpath_12"],
        ),
        (
            "monuseg",
            "CC BY-NC-SA 4.0",
            0.25,
            ["TCGA-18-5592-01Z-00-DX1", "TCGA-38-6178-01Z-00-DX1", "TCGA-2Z-A9J9-01A-01-TS1"],
            ["TCGA-18-5592", "TCGA-38-6178", "TCGA-2Z-A9J9"],
        ),
        ("dsb2018", "CC0", 0.33, ["00ae65", "4590d7", "feffce"], ["48 x 60", "48 x 60", "48 x 72"]),
        ("lizard", "non-commercial", 0.5, ["consep_1", "crag_5", "glas_7"], ["consep", "crag", "glas"]),
        ("qupath", None, 0.25, ["case 1", "case 2"], ["case 1", "case 2"]),
        ("nuinsseg", "CC BY 4.0", 0.25, ["human_bladder_02", "mouse_fat_01"], ["human bladder", "mouse fat"]),
        ("cryonuseg", "CC BY-NC-SA 4.0", 0.25, ["Human_Larynx_01", "Human_Skin_01"], ["Larynx", "Skin"]),
    ],
)
def test_a_set_as_published(tmp_path: Path, name, license, mpp, ids, groups):
    data = read_dataset(name, TREES[name](tmp_path))
    assert (data.license, data.ids, data.groups) == (license, ids, groups)
    for seed, one in enumerate(data):
        image, labels = draw(seed, one.labels.shape)
        np.testing.assert_array_equal(one.image_rgb, image)
        np.testing.assert_array_equal(one.labels, labels)
        assert one.labels.dtype == np.int32
        assert (one.mpp, one.id, one.group, one.instances_are_exact) == (mpp, ids[seed], groups[seed], True)
        assert Path(data.entries[seed].where.split("[")[0]).is_file()


def test_pannuke_as_published(tmp_path: Path):
    data = read_dataset("pannuke", trees.pannuke(tmp_path))
    assert data.license == "CC BY-NC-SA 4.0"
    assert data.ids == [f"fold{fold}_{index:04}" for fold in (1, 2, 3) for index in (0, 1)]
    assert data.groups == [f"fold{fold} {tissue}" for fold in (1, 2, 3) for tissue in ("Breast", "Colon")]
    for place, one in enumerate(data):
        image, labels = draw(10 * (place // 2 + 1) + place % 2, (256, 256))
        np.testing.assert_array_equal(one.image_rgb, image)
        np.testing.assert_array_equal(one.labels, labels)       # drawn in the order of the classes
        assert (one.mpp, one.labels.dtype, one.image_rgb.dtype) == (0.25, np.int32, np.uint8)


@pytest.mark.parametrize("name", ["conic", "monuseg", "dsb2018", "pannuke", "lizard"])
def test_a_folder_around_the_set_is_found_in(tmp_path: Path, name):
    TREES[name](tmp_path / "downloads")
    assert len(read_dataset(name, tmp_path)) == len(read_dataset(name, tmp_path / "downloads")) > 0


@pytest.mark.parametrize("name", TREES)
def test_a_set_can_be_sent_to_a_worker_process(tmp_path: Path, name):
    data = read_dataset(name, TREES[name](tmp_path))
    sent = pickle.dumps(data)
    assert len(sent) < 5_000, "the pixels are not sent"
    np.testing.assert_array_equal(pickle.loads(sent)[0].labels, data[0].labels)


# Parts


def test_folds_of_pannuke_are_chosen_by_number(tmp_path: Path):
    trees.pannuke(tmp_path, folds=(1, 3))
    assert read_dataset("pannuke", tmp_path, fold=3).ids == ["fold3_0000", "fold3_0001"]
    assert read_dataset("pannuke", tmp_path / "Fold 1").ids == ["fold1_0000", "fold1_0001"]
    with pytest.raises(UserError, match="looked for 'Fold 1/'"):
        read_dataset("pannuke", tmp_path, fold=2)
    with pytest.raises(ValueError, match="unknown fold 4; choose from 1, 2, 3"):
        read_dataset("pannuke", tmp_path, fold=4)


def test_splits_of_lizard_are_chosen_by_number(tmp_path: Path):
    trees.lizard(tmp_path)
    assert [read_dataset("lizard", tmp_path, split=split).ids for split in (1, 2, 3)] == [
        ["consep_1"], ["crag_5"], ["glas_7"]
    ]
    with pytest.raises(ValueError, match="unknown split 0; choose from 1, 2, 3"):
        read_dataset("lizard", tmp_path, split=0)


def test_parts_of_monuseg_are_told_apart_by_their_layout(tmp_path: Path):
    trees.monuseg(tmp_path)
    assert len(read_dataset("monuseg", tmp_path, part="train")) == 2
    assert read_dataset("monuseg", tmp_path, part="test").groups == ["TCGA-2Z-A9J9"]
    assert read_dataset("monuseg", tmp_path / "MoNuSegTestData").groups == ["TCGA-2Z-A9J9"]
    with pytest.raises(ValueError, match="unknown part 'val'; choose from train, test"):
        read_dataset("monuseg", tmp_path, part="val")


# Overlaps


def test_of_two_outlines_in_aperio_xml_the_first_owns_the_pixels_of_both(tmp_path: Path):
    def square(left: float) -> np.ndarray:
        return np.array([[left, -0.5], [left + 4, -0.5], [left + 4, 3.5], [left, 3.5]])

    path = write(tmp_path / "a.xml", trees.aperio([square(-0.5), square(1.5), square(20.5)[:2], square(6.5)]))
    expected = np.zeros((5, 9), np.int32)
    expected[:4] = [1, 1, 1, 1, 2, 2, 0, 4, 4]       # the fourth is cut off; the third, a line, has no pixel
    np.testing.assert_array_equal(read_aperio(path, (5, 9)), expected)


def test_of_two_classes_in_pannuke_the_first_owns_the_pixels_of_both(tmp_path: Path):
    masks = np.zeros((1, 256, 256, 6))
    masks[0, :4, :4, 0] = 9
    masks[0, 2:6, :4, 3] = 9                         # the same number in another plane is another nucleus
    masks[0, 100:104, :4, 3] = 2
    trees.pannuke(tmp_path, folds=(1,), images=1)
    save(tmp_path / "Fold 1" / "masks" / "fold1" / "masks.npy", masks)
    labels = read_dataset("pannuke", tmp_path)[0].labels
    expected = np.zeros((256, 256), np.int32)
    expected[:4, :4], expected[4:6, :4], expected[100:104, :4] = 1, 3, 2
    np.testing.assert_array_equal(labels, expected)


def test_of_two_masks_of_dsb2018_the_first_owns_the_pixels_of_both(tmp_path: Path):
    folder = trees.dsb2018(tmp_path) / "stage1_train" / "00ae65"
    _, labels = draw(0)
    save(folder / "masks" / "nucleus_10.png", np.full((60, 48), 255, np.uint8))
    save(folder / "masks" / "nucleus_4.png", np.zeros((60, 48), np.uint8))
    np.testing.assert_array_equal(read_dataset("dsb2018", tmp_path)[0].labels, np.where(labels, labels, 5))


# QuPath


def test_qupath_reads_the_folder_images_and_a_manifest(tmp_path: Path):
    trees.qupath(tmp_path / "images")
    write(tmp_path / "manifest.csv", "id,group,mpp\ncase 1,p7,0.46\ncase 2,p8,\n")
    data = read_dataset("qupath", tmp_path, mpp=0.3)
    assert (data.groups, [one.mpp for one in data]) == (["p7", "p8"], [0.46, 0.3])


def test_our_own_results_beside_a_qupath_image_are_no_images(tmp_path: Path, caplog):
    trees.qupath(tmp_path)
    save(tmp_path / "case 1.overlay.png", draw(5)[0])
    write_labels(tmp_path / "case 1.labels.tif", draw(5)[1], 0.25)
    assert read_dataset("qupath", tmp_path).ids == ["case 1", "case 2"]
    assert not caplog.records


def test_a_region_in_place_of_nuclei_is_refused(tmp_path: Path):
    trees.qupath(tmp_path)
    everything = np.array([[-0.5, -0.5], [47.5, -0.5], [47.5, 40.5], [-0.5, 40.5]])
    write(tmp_path / "case 1.geojson", trees.geojson([everything]))
    with pytest.raises(UserError, match=r"case 1\.geojson: polygon 1 covers 68% of the image; take out regions"):
        read_dataset("qupath", tmp_path)[0]


# What is never done with a file


def test_arrays_are_mapped_and_nothing_pickled_is_loaded(tmp_path: Path):
    path = save(tmp_path / "a.npy", np.zeros((2, 3), np.uint8))
    assert isinstance(open_array(path, (None, 3), ["u1"]), np.memmap)
    np.save(path, np.array([{"run": "me"}, None, 1]))
    with pytest.raises(UserError, match=r"cannot read .*a\.npy as an array: .*Python objects"):
        open_array(path, (None,), ["O"])
    path.write_bytes(pickle.dumps({"run": "me"}))
    with pytest.raises(UserError, match=r"cannot read .*a\.npy as an array"):
        open_array(path, (None,), ["O"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_that_declares_entities_is_refused_before_they_are_expanded(tmp_path: Path, encoding):
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    doctype = f'<!DOCTYPE Annotations [<!ENTITY e0 "ha">{levels}]>'
    text = f'<?xml version="1.0" encoding="{encoding}"?>{doctype}<Annotations>&e11;</Annotations>'
    path = tmp_path / "a.xml"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=r"cannot read .*a\.xml as Aperio XML: it declares a document type"):
        read_aperio(path, (8, 8))


def test_xml_too_large_for_outlines_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nuguide.datasets.monuseg.MAX_XML_BYTES", 3 * 2**20)
    path = tmp_path / "a.xml"
    with path.open("wb") as file:
        file.truncate(4 * 2**20)
    with pytest.raises(UserError, match=r"a\.xml as Aperio XML: it is larger than 3 MB"):
        read_aperio(path, (8, 8))


def test_an_outline_of_too_many_vertices_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nuguide.datasets.monuseg.MAX_VERTICES", 99)
    path = write(tmp_path / "a.xml", trees.aperio([np.zeros((100, 2))]))
    with pytest.raises(UserError, match=r"a\.xml as Aperio XML: an outline has more than 99 vertices"):
        read_aperio(path, (8, 8))


def test_of_a_matlab_file_only_the_label_map_is_loaded_and_its_size_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = trees.save_mat(tmp_path / "a.mat", np.zeros((2000, 1000), np.int32))
    loaded = []
    load = scipy.io.loadmat
    monkeypatch.setattr(scipy.io, "loadmat", lambda *given, **named: loaded.append(named) or load(*given, **named))
    with pytest.raises(UserError, match=r"a\.mat and its image differ in size: .* 48 x 60 and 1000 x 2000"):
        read_inst_map(path, (60, 48))
    assert loaded == []
    assert read_inst_map(path, (2000, 1000)).dtype == np.int32
    assert loaded == [{"variable_names": ["inst_map"]}]


def test_every_reader_is_tried_here():
    assert set(DATASETS) - set(TREES) == {"folder", "dsb_he"}  # neither has a layout of a publisher
