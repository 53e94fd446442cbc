"""`nuguide data check` names every fault with its file, goes on after each, and says where data sets come from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trees
from nuguide import cli
from nuguide.datasets import DATASETS
from nuguide.datasets.check import check
from nuguide.datasets.facts import FACTS
from nuguide.types import UserError
from trees import TREES, draw, save, write

ROOT = Path(__file__).resolve().parents[1]


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path: Path, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a .npy file anew; it may come to hold Python objects."""
    array = changed(np.load(path))
    np.save(path, array)


def with_value(index: tuple, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def changed(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return changed


# Sound folders


@pytest.mark.parametrize("name", TREES)
def test_a_sound_tree_has_no_problem_but_its_number_of_images(tmp_path: Path, name):
    root = TREES[name](tmp_path)
    report = check(name, root, partial=True)
    assert report.problems == []
    images = {"tnbc": 2, "pannuke": 6, "nuinsseg": 2, "cryonuseg": 2, "qupath": 2}.get(name, 3)
    assert (report.name, report.images, report.nuclei) == (name, images, 3 * images)
    assert sum(report.sizes.values()) == images
    assert 0 < report.groups <= images
    problems = check(name, root).problems
    if not FACTS[name].images:
        assert problems == []
    else:
        (problem,) = problems
        assert f"holds {images} usable images, but " in problem
        assert FACTS[name].page in problem


def test_the_prepared_layout_is_checked_and_not_counted(tmp_path: Path):
    for seed, stem in enumerate("ab"):
        image, labels = draw(seed, (512, 512))
        save(tmp_path / "images" / f"{stem}.png", image)
        save(tmp_path / "labels" / f"{stem}.png", labels.astype(np.uint16))
    write(tmp_path / "manifest.csv", "id,group\na,liver\nb,liver\n")
    report = check("nuinsseg", tmp_path)
    assert (report.images, report.groups, report.nuclei, report.problems) == (2, 1, 6, [])
    assert report.sizes == {"512 x 512": 2}
    half(tmp_path / "labels" / "a.png")
    (problem,) = check("nuinsseg", tmp_path).problems
    assert "a.png" in problem


def test_a_folder_of_ones_own_is_checked(tmp_path: Path):
    for seed, stem in enumerate("ab"):
        image, labels = draw(seed)
        save(tmp_path / "images" / f"{stem}.png", image)
        save(tmp_path / "labels" / f"{stem}.png", labels.astype(np.uint16))
    report = check("folder", tmp_path)
    assert (report.images, report.nuclei, report.sizes, report.problems) == (2, 6, {"48 x 60": 2}, [])
    save(tmp_path / "labels" / "b.png", (draw(1)[1] > 0).astype(np.uint8) * 255)
    (problem,) = check("folder", tmp_path).problems
    assert re.search(r"labels/b\.png has one number for 3 separate areas: move binary masks to masks/", problem)


def test_one_number_over_separate_areas_is_noted(tmp_path: Path):
    image, labels = draw(0)
    labels[:] = 0
    labels[2:8, 2:8] = labels[2:8, 30:36] = 7                    # two nuclei
    labels[20:26, 2:8], labels[20:22, 20:22] = 9, 9              # a nucleus and a speck
    labels[30:33, 30:36], labels[33:36, 36:44] = 4, 4            # they meet at a corner
    save(tmp_path / "images" / "a.png", image)
    save(tmp_path / "labels" / "a.png", labels.astype(np.uint16))
    report = check("folder", tmp_path)
    assert (report.nuclei, report.problems) == (3, [])
    (note,) = report.notes
    assert note.startswith("1 label number of 1 image covers separate areas, each taken for one nucleus; most in the")
    assert note.endswith("a.png: 7")


def test_each_annotation_of_cryonuseg_is_counted_by_name(tmp_path: Path):
    trees.cryonuseg(tmp_path)
    report = check("cryonuseg", tmp_path, partial=True)
    assert (report.nuclei, report.notes) == (6, ["annotator1_round2: 4 nuclei", "annotator2: 2 nuclei"])
    report = check("cryonuseg", tmp_path, annotator="annotator2", partial=True)
    assert (report.nuclei, report.notes) == (2, [])


# Corrupted folders: what is done to a sound one, and the words that must be said

BLADDER, FAT = "human bladder", "mouse fat"
ROUND_2 = f"{trees.ROUND_2}/{trees.ROUND_2}/label masks modify"
FOLD = "Fold 2/images/fold2"
MASKS = "Fold 2/masks/fold2/masks.npy"
LABELS = "lizard_labels/Lizard_Labels"
XML = "MoNuSegTestData/TCGA-2Z-A9J9-01A-01-TS1.xml"
DTD = '<!DOCTYPE a [<!ENTITY e0 "ha"><!ENTITY e1 "&e0;&e0;">]><Annotations>&e1;</Annotations>'

FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a label map is missing": (
        "nuinsseg",
        lambda root: (root / FAT / "label masks modify/mouse_fat_01.tif").unlink(),
        r"mouse fat/tissue images/mouse_fat_01\.png has no partner in .*label masks modify",
    ),
    "an image is missing": (
        "nuinsseg",
        lambda root: (root / FAT / "tissue images/mouse_fat_01.png").unlink(),
        r"mouse_fat_01\.tif has no partner in .*tissue images",
    ),
    "an image is cut short": (
        "nuinsseg",
        lambda root: half(root / BLADDER / "tissue images/human_bladder_02.png"),
        r"human_bladder_02\.png: is damaged or cut short",
    ),
    "an image has no byte": (
        "nuinsseg",
        lambda root: (root / BLADDER / "tissue images/human_bladder_02.png").write_bytes(b""),
        r"human_bladder_02\.png: is empty",
    ),
    "an image has 16 bits": (
        "nuinsseg",
        lambda root: save(root / BLADDER / "tissue images/human_bladder_02.png", np.zeros((512, 512), np.uint16)),
        r"human_bladder_02\.png: has 16 bits per channel",
    ),
    "a label map has another size than its image": (
        "nuinsseg",
        lambda root: save(root / BLADDER / "label masks modify/human_bladder_02.tif", np.zeros((512, 500), "u2")),
        r"human_bladder_02\.png and .*human_bladder_02\.tif differ in size: 512 x 512 and 500 x 512",
    ),
    "an image has not the published size": (
        "nuinsseg",
        lambda root: trees.nuinsseg(root, (256, 300)),
        r"human_bladder_02\.png has 300 x 256 pixels; those of the set have 512 x 512",
    ),
    "labels are fractions": (
        "nuinsseg",
        lambda root: save(root / FAT / "label masks modify/mouse_fat_01.tif", np.full((512, 512), 0.5, "f4")),
        r"mouse_fat_01\.tif is no label map: it holds fractions",
    ),
    "labels are negative": (
        "nuinsseg",
        lambda root: save(root / FAT / "label masks modify/mouse_fat_01.tif", np.full((512, 512), -2, "i4")),
        r"mouse_fat_01\.tif is no label map: its values run from -2 to -2",
    ),
    "labels are colors": (
        "nuinsseg",
        lambda root: save(root / FAT / "label masks modify/mouse_fat_01.tif", draw(3, (512, 512))[0]),
        r"mouse_fat_01\.tif holds colors",
    ),
    "a mask stands in place of a label map": (
        "nuinsseg",
        lambda root: save(
            root / FAT / "label masks modify/mouse_fat_01.tif", (draw(1, (512, 512))[1] > 0).astype(np.uint8) * 255
        ),
        r"the labels of .*mouse_fat_01\.png have one number for 3 separate areas: a mask",
    ),
    "labels leave no background": (
        "nuinsseg",
        lambda root: save(root / FAT / "label masks modify/mouse_fat_01.tif", draw(1, (512, 512))[1].astype("u2") + 1),
        r"the labels of .*mouse_fat_01\.png leave no background",
    ),
    "an image is there twice": (
        "nuinsseg",
        lambda root: [
            shutil.copy(
                root / BLADDER / folder / f"human_bladder_02.{ending}", root / BLADDER / folder / f"copy.{ending}"
            )
            for folder, ending in [("tissue images", "png"), ("label masks modify", "tif")]
        ],
        r"human_bladder_02\.png shows the same image as .*copy\.png",
    ),
    "an organ has no label maps": (
        "nuinsseg",
        lambda root: shutil.rmtree(root / FAT / "label masks modify"),
        r"mouse fat has no folder 'label masks modify'",
    ),
    "a vague area is of no image": (
        "nuinsseg",
        lambda root: (root / FAT / "vague areas/mask binary/mouse_fat_01.png").rename(
            root / FAT / "vague areas/mask binary/mouse_fat_09.png"
        ),
        r"vague areas/mask binary/mouse_fat_09\.png has no image",
    ),
    "a vague area has another size": (
        "nuinsseg",
        lambda root: save(root / FAT / "vague areas/mask binary/mouse_fat_01.png", np.zeros((9, 9), np.uint8)),
        r"vague areas/mask binary/mouse_fat_01\.png differ in size",
    ),
    "a mask has several values": (
        "tnbc",
        lambda root: save(root / "GT_02/02_1.png", draw(1, (512, 512))[1].astype(np.uint8)),
        r"GT_02/02_1\.png is no binary mask: it holds the values 0, 1, 2",
    ),
    "a slide has no masks": ("tnbc", lambda root: shutil.rmtree(root / "GT_02"), r"Slide_02 has no partner GT_02/"),
    "masks have no slide": ("tnbc", lambda root: shutil.rmtree(root / "Slide_02"), r"GT_02 has no partner Slide_02/"),
    "a slide is unknown": (
        "tnbc",
        lambda root: (root / "Slide_02").rename(root / "Slide_77"),
        r"Slide_77 is none of the slides 01 to 14",
    ),
    "an annotation is missing": (
        "cryonuseg",
        lambda root: shutil.rmtree(root / trees.ANNOTATOR_2),
        r"looked for .*Annotator 2 \(bioinformatician\)/label masks modify/.*needs a login",
    ),
    "one label map of the second round is cut short": (
        "cryonuseg",
        lambda root: half(root / ROUND_2 / "Human_Skin_01.tif"),
        r"cannot read .*second round.*Human_Skin_01\.tif as labels",
    ),
    "one label map of the second round is missing": (
        "cryonuseg",
        lambda root: (root / ROUND_2 / "Human_Skin_01.tif").unlink(),
        r"tissue images/Human_Skin_01\.tif has no partner in .*second round",
    ),
    "two images have one stem": (
        "cryonuseg",
        lambda root: save(root / "tissue images/Human_Skin_01.png", draw(5, (512, 512))[0]),
        r"Human_Skin_01\.png and Human_Skin_01\.tif have the same stem",
    ),
    "an array has another shape": (
        "conic",
        lambda root: change(root / "labels.npy", lambda array: array[..., 0]),
        r"labels\.npy holds an array of shape \(3, 256, 256\); it must be \(N, 256, 256, 2\)",
    ),
    "labels of an array are floats": (
        "conic",
        lambda root: change(root / "labels.npy", lambda array: array.astype(np.float32)),
        r"labels\.npy holds float32 values",
    ),
    "images of an array are no bytes": (
        "conic",
        lambda root: change(root / "images.npy", lambda array: array.astype(np.uint16)),
        r"images\.npy holds uint16 values",
    ),
    "an array is pickled": (
        "conic",
        lambda root: change(root / "images.npy", lambda array: np.array([{"run": "me"}, None])),
        r"cannot read .*images\.npy as an array: .*Python objects",
    ),
    "an array is cut short": (
        "conic",
        lambda root: half(root / "images.npy"),
        r"cannot read .*images\.npy as an array: .*greater than file size",
    ),
    "an array is missing": ("conic", lambda root: (root / "labels.npy").unlink(), r"labels\.npy is missing"),
    "arrays differ in number": (
        "conic",
        lambda root: change(root / "images.npy", lambda array: array[:2]),
        r"patch_info\.csv names 3 patches, but images\.npy holds 2 and labels\.npy 3",
    ),
    "a patch names no source": (
        "conic",
        lambda root: write(root / "patch_info.csv", "patch_info\nconsep_1-0000\nconsep\ndpath_12-0000\n"),
        r"patch_info\.csv, line 3: 'consep' is no <source>-<index>",
    ),
    "names of patches have another column": (
        "conic",
        lambda root: write(root / "patch_info.csv", "name\na_1-0000\nb_1-0000\nc_1-0000\n"),
        r"patch_info\.csv has the columns name; it must have patch_info",
    ),
    "a patch is named twice": (
        "conic",
        lambda root: write(root / "patch_info.csv", "patch_info\na_1-0000\nb_1-0000\na_1-0000\n"),
        r"patch_info\.csv, line 2: a_1-0000 is named 2 times",
    ),
    "a count is not a number": (
        "conic",
        lambda root: write(root / "counts.csv", (root / "counts.csv").read_text().replace("0,3,0", "0,nan,0", 1)),
        r"counts\.csv, line 2: epithelial is 'nan'; it must be a whole number",
    ),
    "counts are of other patches": (
        "conic",
        lambda root: write(root / "counts.csv", (root / "counts.csv").read_text().replace("0,3,0", "2,1,0", 1)),
        r"counts\.csv: the counts of 1 of 3 patches, first in line 2, are not of the nuclei in labels\.npy",
    ),
    "counts are missing": ("conic", lambda root: (root / "counts.csv").unlink(), r"cannot read .*counts\.csv"),
    "counts have other columns": (
        "conic",
        lambda root: write(root / "counts.csv", "a,b\n1,2\n"),
        r"counts\.csv has the columns a, b; it must have neutrophil",
    ),
    "a class is unknown": (
        "conic",
        lambda root: change(root / "labels.npy", with_value((1, 0, 0, 1), 9)),
        r"labels\.npy\[1\] \(consep_1-0001\) has classes from 0 to 9",
    ),
    "a label of an array is negative": (
        "conic",
        lambda root: change(root / "labels.npy", lambda array: with_value((2, 0, 0, 0), -1)(array.astype(np.int32))),
        r"images\.npy\[2\] \(dpath_12-0000\): .*labels must not be negative",
    ),
    "a patch of an array is there twice": (
        "conic",
        lambda root: change(root / "images.npy", lambda array: array[[0, 1, 0]]),
        r"images\.npy\[2\] \(dpath_12-0000\) shows the same image as .*images\.npy\[0\] \(consep_1-0000\)",
    ),
    "XML declares entities": (
        "monuseg",
        lambda root: write(root / XML, DTD),
        r"A9J9-01A-01-TS1\.xml as Aperio XML: it declares a document type",
    ),
    "XML is cut short": ("monuseg", lambda root: half(root / XML), r"cannot read .*TS1\.xml as Aperio XML"),
    "XML is of another program": (
        "monuseg",
        lambda root: write(root / XML, "<svg/>"),
        r"TS1\.xml as Aperio XML: it has no element Annotations",
    ),
    "a vertex is not a number": (
        "monuseg",
        lambda root: write(root / XML, trees.aperio([np.array([[1, 2], [np.nan, 4], [5, 6]])])),
        r"TS1\.xml as Aperio XML: a vertex lies at nan",
    ),
    "a vertex has no X": (
        "monuseg",
        lambda root: write(root / XML, trees.aperio([np.ones((3, 2))]).replace("X=", "Z=", 1).replace('Z="0"', "", 1)),
        r"TS1\.xml as Aperio XML: 'X' is missing",
    ),
    "outlines are missing": ("monuseg", lambda root: (root / XML).unlink(), r"A9J9-01A-01-TS1\.tif has no partner"),
    "outlines of one image are missing": (
        "monuseg",
        lambda root: (root / "MoNuSeg 2018 Training Data/Annotations/TCGA-38-6178-01Z-00-DX1.xml").unlink(),
        r"TCGA-38-6178-01Z-00-DX1\.tif has no partner in .*Annotations",
    ),
    "a patient is unknown": (
        "monuseg",
        lambda root: [
            (root / XML).with_suffix(ending).rename(root / f"MoNuSegTestData/slide7{ending}")
            for ending in (".xml", ".tif")
        ],
        r"slide7\.tif: its name is no TCGA barcode",
    ),
    "images were scaled to 0..1": (
        "pannuke",
        lambda root: change(root / FOLD / "images.npy", lambda array: array / 255),
        r"fold2/images\.npy\[0\] holds values up to .*scaled to 0\.\.1",
    ),
    "an image holds no number": (
        "pannuke",
        lambda root: change(root / FOLD / "images.npy", with_value((1, 0, 0, 0), np.nan)),
        r"fold2/images\.npy\[1\] holds values from nan",
    ),
    "a mask holds fractions": (
        "pannuke",
        lambda root: change(root / MASKS, with_value((1, 0, 0, 3), 0.5)),
        r"fold2/masks\.npy\[1\]: the plane dead is no label map",
    ),
    "types are pickled": (
        "pannuke",
        lambda root: change(root / FOLD / "types.npy", lambda array: array.astype(object)),
        r"cannot read .*fold2/types\.npy as an array: .*Python objects",
    ),
    "types are too few": (
        "pannuke",
        lambda root: change(root / FOLD / "types.npy", lambda array: array[:1]),
        r"Fold 2, fold 2: images, types and masks differ in number: 2 in images\.npy, 1 in types\.npy, 2 in masks",
    ),
    "masks are missing": ("pannuke", lambda root: (root / MASKS).unlink(), r"fold2/masks\.npy is missing"),
    "masks have no plane of background": (
        "pannuke",
        lambda root: change(root / MASKS, lambda array: array[..., :5]),
        r"fold2/masks\.npy holds an array of shape \(2, 256, 256, 5\)",
    ),
    "a .mat file is text": (
        "lizard",
        lambda root: write(root / LABELS / "Labels/crag_5.mat", "no MATLAB here\n" * 20),
        r"cannot read .*crag_5\.mat as labels",
    ),
    "a .mat file is cut short": (
        "lizard",
        lambda root: half(root / LABELS / "Labels/crag_5.mat"),
        r"cannot read .*crag_5\.mat as labels",
    ),
    "a .mat file has another variable": (
        "lizard",
        lambda root: trees.save_mat(root / LABELS / "Labels/crag_5.mat", draw(1, (90, 71))[1], "inst"),
        r"crag_5\.mat has no map of integers called inst_map; it holds inst \(90, 71\) int32",
    ),
    "labels of a .mat file are floats": (
        "lizard",
        lambda root: trees.save_mat(root / LABELS / "Labels/crag_5.mat", draw(1, (90, 71))[1].astype(float)),
        r"crag_5\.mat has no map of integers called inst_map; it holds inst_map \(90, 71\) double",
    ),
    "labels of a .mat file have another size": (
        "lizard",
        lambda root: trees.save_mat(root / LABELS / "Labels/crag_5.mat", draw(1, (71, 90))[1]),
        r"crag_5\.mat and its image differ in size: .* 71 x 90 and 90 x 71",
    ),
    "an image is not listed": (
        "lizard",
        lambda root: write(root / LABELS / "info.csv", "Filename,Source,Split\nconsep_1,consep,1\nglas_7,glas,4\n"),
        r"crag_5\.png has no row in info\.csv",
    ),
    "a split is unknown": (
        "lizard",
        lambda root: write(root / LABELS / "info.csv", "Filename,Source,Split\nconsep_1,consep,1\nglas_7,glas,4\n"),
        r"info\.csv gives glas_7 the split '4'",
    ),
    "the list is missing": ("lizard", lambda root: (root / LABELS / "info.csv").unlink(), r"cannot read .*info\.csv"),
    "a mask of a nucleus has another size": (
        "dsb2018",
        lambda root: save(root / "stage1_train/00ae65/masks/nucleus_2.png", np.zeros((9, 9), np.uint8)),
        r"00ae65/masks/nucleus_2\.png and its image differ in size",
    ),
    "an image has no masks": (
        "dsb2018",
        lambda root: shutil.rmtree(root / "stage1_train/00ae65/masks"),
        r"00ae65/masks holds no mask",
    ),
    "a folder has two images": (
        "dsb2018",
        lambda root: save(root / "stage1_train/00ae65/images/b.png", draw(4)[0]),
        r"00ae65/images holds 2 images; it must hold one",
    ),
    "the head of an image is damaged": (
        "dsb2018",
        lambda root: (root / "stage1_train/00ae65/images/00ae65.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"?" * 40),
        r"00ae65\.png: is damaged or cut short",
    ),
    "an image has no annotation": (
        "qupath",
        lambda root: Image.fromarray(draw(6)[0]).save(root / "case 3.jpg"),
        r"case 3\.jpg has no partner",
    ),
    "GeoJSON is cut short": ("qupath", lambda root: half(root / "case 2.geojson"), r"case 2\.geojson: is not GeoJSON"),
    "a polygon covers the image": (
        "qupath",
        lambda root: write(
            root / "case 2.geojson", trees.geojson([np.array([[0, 0], [47, 0], [47, 59], [0, 59]])])
        ),
        r"case 2\.geojson: polygon 1 covers \d+% of the image",
    ),
    "annotations hold no nucleus": (
        "qupath",
        lambda root: [write(root / f"case {n}.geojson", '{"type":"FeatureCollection","features":[]}') for n in (1, 2)],
        r"none of the 2 images has a nucleus",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(tmp_path: Path, fault):
    name, spoil, words = FAULTS[fault]
    root = TREES[name](tmp_path)
    spoil(root)
    problems = check(name, root, partial=True).problems
    assert any(re.search(words, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_there_are_twenty_faults_and_more():
    assert len(FAULTS) >= 60
    assert {name for name, *_ in FAULTS.values()} == set(TREES)


def test_the_check_goes_on_after_each_problem(tmp_path: Path):
    root = trees.nuinsseg(tmp_path)
    image, labels = draw(7, (512, 512))
    save(root / BLADDER / "tissue images" / "good.png", image)
    save(root / BLADDER / "label masks modify" / "good.tif", labels.astype(np.uint16))
    save(root / BLADDER / "tissue images" / "lonely.png", image)
    half(root / BLADDER / "tissue images" / "human_bladder_02.png")
    save(root / FAT / "label masks modify" / "mouse_fat_01.tif", np.full((512, 512), -1, np.int32))
    report = check("nuinsseg", root, partial=True)
    assert (report.images, report.nuclei) == (1, 3)
    assert len(report.problems) == 3
    for words in ["lonely.png has no partner", "human_bladder_02.png: is damaged", "mouse_fat_01.tif is no label map"]:
        assert any(words in problem for problem in report.problems)


def test_many_wrong_counts_are_told_in_a_few_lines(tmp_path: Path):
    root = trees.conic(tmp_path)
    write(root / "counts.csv", (root / "counts.csv").read_text().replace("0", "-1"))
    problems = check("conic", root, partial=True).problems
    assert len(problems) == 6
    assert problems[-1].endswith("counts.csv has 10 more such counts")


def test_nuclei_on_the_border_of_what_is_counted_may_count_or_not(tmp_path: Path):
    root = trees.conic(tmp_path)
    labels = np.load(root / "labels.npy")
    labels[0, 10:20, 100:110] = (9, 2)                  # reaches four pixels into the counted part
    labels[1, :10, 100:110] = (9, 2)                    # does not reach it
    trees.save(root / "labels.npy", labels)
    rows = (root / "counts.csv").read_text().splitlines()
    for counted, sound in (((3, 3), True), ((4, 3), True), ((5, 3), False), ((3, 4), False), ((2, 3), False)):
        for line, count in enumerate(counted, start=1):
            rows[line] = f"0,{count},0,0,0,0"
        write(root / "counts.csv", "\n".join(rows) + "\n")
        assert (not check("conic", root, partial=True).problems) == sound, counted


def test_progress_is_told(tmp_path: Path):
    told = []
    check("qupath", trees.qupath(tmp_path), watch=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


# Facts


def test_every_set_has_its_facts_and_the_license_of_its_reader(tmp_path: Path):
    assert set(FACTS) == set(DATASETS)
    for name, tree in TREES.items():
        assert DATASETS[name](tree(tmp_path / name)).license == FACTS[name].license


def test_the_page_on_data_states_the_facts():
    page = (ROOT / "docs" / "data.md").read_text()
    shown = re.findall(r"^nuguide data check (\S+)", page, re.MULTILINE)
    assert shown
    assert set(shown) <= set(DATASETS)
    for name, facts in FACTS.items():
        assert f"`{name}`" in page
        assert facts.page in page
        assert (facts.license or "") in page


# The command


def nuguide(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_sound_folder_returns_0_and_what_it_holds(tmp_path: Path, capsys):
    assert nuguide("data", "check", "tnbc", trees.tnbc(tmp_path), "--partial") == 0
    said = capsys.readouterr().out
    assert f"TNBC in {tmp_path}: 2 images, 2 groups, 6 nuclei (published: 4,022)" in said
    assert "sizes (width x height): 2 of 512 x 512" in said
    assert "license: CC BY 4.0" in said
    assert said.endswith("no problems\n")


def test_problems_return_1_and_are_told_one_a_line(tmp_path: Path, capsys):
    root = trees.tnbc(tmp_path)
    shutil.rmtree(root / "GT_02")
    assert nuguide("data", "check", "tnbc", root) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("problem: ")] == [
        f"problem: {root / 'Slide_02'} has no partner GT_02/",
        f"problem: {root} holds 1 usable images, but 50 are published; get it from https://zenodo.org/records/1175282",
    ]
    assert said[-1] == "2 problems"


def test_an_empty_folder_says_what_is_expected_and_where_to_get_it(tmp_path: Path, capsys):
    assert nuguide("data", "check", "conic", tmp_path) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path} is empty; expected images.npy, labels.npy, counts.csv and patch_info.csv; get it from " in said
    assert "https://conic-challenge.grand-challenge.org/Data/ (needs a login)" in said


def test_a_folder_of_something_else_says_so(tmp_path: Path, capsys):
    write(tmp_path / "letter.txt", "dear reader")
    assert nuguide("data", "check", "lizard", tmp_path) == 1
    assert "found letter.txt; get it from https://warwick.ac.uk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data"], "{check, fetch, folds, leaks}"),
        (["data", "chekc"], "chekc"),
        (["data", "check"], "required"),
        (["data", "check", "tnbc", "nowhere"], "nowhere does not exist; expected a folder of Slide_XX/*.png"),
        (["data", "check", "tnbc", "nowhere"], "get it from https://zenodo.org/records/1175282"),
        (["data", "check", "brain", "."], "unknown data set 'brain'; choose from folder, nuinsseg, tnbc"),
        (["data", "check", "tnbc", ".", "--annotator", "me"], "--annotator me: only cryonuseg has annotators"),
        (["data", "check", "cryonuseg", ".", "--annotator", "me"], "annotator1, annotator1_round2, annotator2"),
    ],
)
def test_a_wrong_command_returns_2_and_says_why(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nuguide(*arguments) == 2
    heard = capsys.readouterr()
    assert said in " ".join((heard.out + heard.err).replace("│", " ").split())


def test_an_unknown_name_is_a_users_error(tmp_path: Path):
    with pytest.raises(UserError, match="unknown data set 'brain'"):
        check("brain", tmp_path)
