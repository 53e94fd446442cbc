"""Each reader reads the layout that it names, and says of a broken tree what is wrong with it, file by file."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from conftest import draw_tissue
from nuguide.datasets import DATASETS, Dataset, Entry, read_dataset
from nuguide.datasets.files import components, files_by_stem, read_labels, read_mask
from nuguide.types import Sample, UserError

SIZE = (96, 80)  # rows, columns: unequal, so that a swap shows


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, labels = draw_tissue(seed=seed, size=SIZE, nuclei=6)
    assert labels.max() >= 3
    return image, labels


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def with_alpha(image_rgb: np.ndarray) -> np.ndarray:
    return np.dstack([image_rgb, np.full(image_rgb.shape[:2], 255, np.uint8)])


def plain_folder(root: Path, stems: tuple[str, ...] = ("a", "b"), annotation: str = "labels") -> Path:
    for seed, stem in enumerate(stems):
        image, labels = draw(seed)
        save(root / "images" / f"{stem}.png", image)
        values = labels.astype(np.uint16) if annotation == "labels" else (labels > 0).astype(np.uint8) * 255
        save(root / annotation / f"{stem}.png", values)
    return root


def prepared(root: Path, header: str = "id,group", rows: tuple[str, ...] = ("a,liver", "b,skin")) -> Path:
    plain_folder(root, tuple(row.split(",")[0] for row in rows))
    (root / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return root


def nuinsseg_tree(root: Path) -> Path:
    """Two organs; the images of one are RGBA, and one image has a vague area."""
    for seed, (organ, stem) in enumerate(
        [("human bladder", "human_bladder_02"), ("human bladder", "human_bladder_10"), ("mouse fat", "mouse_fat_01")]
    ):
        image, labels = draw(seed)
        save(root / organ / "tissue images" / f"{stem}.png", with_alpha(image) if organ == "mouse fat" else image)
        save(root / organ / "label masks modify" / f"{stem}.tif", labels.astype(np.uint16))
        save(root / organ / "label masks" / f"{stem}.tif", np.ones(SIZE, np.uint16))  # to be left alone
        save(root / organ / "mask binary" / f"{stem}.png", (labels > 0).astype(np.uint8) * 255)
    vague = np.zeros(SIZE, np.uint8)
    vague[:10, :20] = 255
    save(root / "mouse fat" / "vague areas" / "mask binary" / "mouse_fat_01.png", vague)
    return root


def tnbc_tree(root: Path) -> Path:
    for seed, (slide, stem) in enumerate([("01", "01_1"), ("01", "01_2"), ("11", "11_1"), ("12", "12_1")]):
        image, labels = draw(seed)
        save(root / f"Slide_{slide}" / f"{stem}.png", with_alpha(image))
        save(root / f"GT_{slide}" / f"{stem}.png", (labels > 0).astype(np.uint8) * 255)
    return root


def cryonuseg_tree(root: Path) -> Path:
    """Three annotations of the same images: all nuclei, the first two, the first alone."""
    second, third = "Annotator 1 (biologist second round of manual marks up)", "Annotator 2 (bioinformatician)"
    for seed, stem in enumerate(["Human_Larynx_01", "Human_Larynx_02", "Human_Skin_01"]):
        image, labels = draw(seed)
        save(root / "tissue images" / f"{stem}.tif", image)
        for folder, count in [("Annotator 1 (biologist)", 99), (f"{second}/{second}", 2), (f"{third}/{third}", 1)]:
            save(root / folder / "label masks modify" / f"{stem}.tif", np.where(labels > count, 0, labels).astype("u2"))
    return root


# The registry


def test_an_unknown_data_set_lists_the_choices(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown data set 'nuinseg'; choose from folder, nuinsseg, tnbc, cryonuseg"):
        read_dataset("nuinseg", tmp_path)


def test_an_option_of_another_reader_is_refused_and_none_counts_as_not_given(tmp_path: Path):
    with pytest.raises(ValueError, match="tnbc has no option 'annotator'; it has none"):
        read_dataset("tnbc", tnbc_tree(tmp_path), annotator="annotator2")
    assert len(read_dataset("tnbc", tmp_path, annotator=None)) == 3


@pytest.mark.parametrize("name", DATASETS)
def test_a_root_without_the_layout_says_what_was_looked_for_and_found(name, tmp_path: Path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "readme.txt").write_text("no images here")
    with pytest.raises(UserError, match=r"looked for .*images/.*; found holiday/, readme\.txt"):
        read_dataset(name, tmp_path)
    with pytest.raises(UserError, match=r"nowhere does not exist; looked for"):
        read_dataset(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"readme\.txt is a file; looked for"):
        read_dataset(name, tmp_path / "readme.txt")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
def test_every_set_is_read_from_the_prepared_layout(name, tmp_path: Path):
    data = read_dataset(name, prepared(tmp_path, "id,group,source", ("a,liver,liver", "b,skin,skin")))
    assert (data.name, data.ids, data.groups) == (name, ["a", "b"], ["liver", "skin"])
    image, labels = draw(1)
    np.testing.assert_array_equal(data[1].image_rgb, image)
    np.testing.assert_array_equal(data[1].labels, labels)
    assert data[1].labels.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "may_ship"),
    [("nuinsseg", True), ("tnbc", True), ("dsb_he", True), ("cryonuseg", False), ("monuseg", False), ("folder", False)],
)
def test_only_permissive_licenses_may_ship(name, may_ship, tmp_path: Path):
    assert read_dataset(name, prepared(tmp_path)).may_ship is may_ship


# Dataset


def sample(**changes) -> Sample:
    image, labels = draw(0)
    return Sample(**({"id": "x", "image_rgb": image, "labels": labels, "mpp": 0.25, "group": "g"} | changes))


def test_ids_and_groups_read_no_pixel():
    def load() -> Sample:
        raise AssertionError("a pixel was read")

    data = Dataset("drawn", [Entry("a", "g", load), Entry("b", "h", load)], "CC0")
    assert (data.ids, data.groups, len(data)) == (["a", "b"], ["g", "h"], 2)
    assert data.subset([1]).ids == data[1:].ids == ["b"]
    assert data.subset([1]).license == "CC0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_rgb": np.zeros(SIZE, np.uint8)}, r"must be \(H, W, 3\) uint8"),
        ({"image_rgb": np.zeros((*SIZE, 3), np.uint16)}, "uint16"),
        ({"labels": np.zeros((96, 81), np.int32)}, "differ in size"),
        ({"labels": np.zeros(SIZE, np.float32)}, "must be integers"),
        ({"labels": np.full(SIZE, -1)}, "must not be negative"),
        ({"ignore": np.zeros(SIZE, np.uint8)}, "ignored area"),
        ({"mpp": 0.0}, "microns per pixel"),
    ],
)
def test_a_faulty_sample_is_never_handed_out(changes, words):
    data = Dataset("drawn", [Entry("x", "g", lambda: sample(**changes))])
    with pytest.raises(UserError, match=f"drawn, sample x: .*{words}"):
        data[0]


def test_check_lists_every_sample_that_cannot_be_read(tmp_path: Path):
    root = plain_folder(tmp_path, ("a", "b", "c"))
    (root / "labels" / "a.png").write_bytes(b"")
    save(root / "labels" / "c.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"2 of 3 samples cannot be used: .*a\.png.*; .*c\.png differ in size"):
        read_dataset("folder", root).check()
    read_dataset("folder", root).subset([1]).check()


def test_a_data_set_travels_to_worker_processes(tmp_path: Path):
    data = pickle.loads(pickle.dumps(read_dataset("nuinsseg", nuinsseg_tree(tmp_path))))
    assert len(data) == 3
    assert data[0].labels.any()


# A plain folder


def test_a_folder_of_label_maps(tmp_path: Path):
    data = read_dataset("folder", plain_folder(tmp_path))
    assert (data.ids, data.groups, data.license) == (["a", "b"], ["a", "b"], None)
    np.testing.assert_array_equal(data[0].labels, draw(0)[1])
    assert (data[0].mpp, data[0].instances_are_exact) == (0.25, True)


def test_a_folder_of_masks_becomes_components(tmp_path: Path):
    data = read_dataset("folder", plain_folder(tmp_path, annotation="masks"), mpp=0.5)
    labels = draw(0)[1]
    np.testing.assert_array_equal(data[0].labels > 0, labels > 0)
    assert data[0].labels.max() == labels.max()  # the drawn nuclei lie apart
    assert (data[0].mpp, data[0].instances_are_exact) == (0.5, False)


def test_nuclei_that_touch_by_a_corner_are_two():
    assert components(np.array([[1, 0], [0, 1]], bool)).tolist() == [[1, 0], [0, 2]]


def test_the_manifest_of_a_folder_gives_groups_and_microns(tmp_path: Path):
    root = plain_folder(tmp_path)
    (root / "manifest.csv").write_text("id,group,mpp\na,patient 7,0.46\nb,patient 8,\n")
    data = read_dataset("folder", root, mpp=0.3)
    assert data.groups == ["patient 7", "patient 8"]
    assert [one.mpp for one in data] == [0.46, 0.3]


@pytest.mark.parametrize("mpp", [0.0, -0.25])
def test_microns_that_cannot_be_are_refused(tmp_path: Path, mpp):
    with pytest.raises(UserError, match="microns per pixel must be above 0"):
        read_dataset("folder", plain_folder(tmp_path), mpp=mpp)[0]


def test_the_default_of_microns_is_logged(tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        read_dataset("folder", plain_folder(tmp_path), mpp=0.5)
        assert not caplog.records
        read_dataset("folder", tmp_path)
    assert "0.25" in caplog.text


def test_every_problem_of_a_folder_is_in_one_error(tmp_path: Path):
    root = plain_folder(tmp_path, ("a", "b", "lonely"))
    (root / "labels" / "lonely.png").rename(root / "labels" / "stray.png")
    shutil.copy(root / "images" / "a.png", root / "images" / "a.tif")
    (root / "manifest.csv").write_text("id,group,mpp\na,p,coarse\na,p,\nghost,p,\n")
    with pytest.raises(UserError) as caught:
        read_dataset("folder", root)
    for words in [
        "has 7 problems",
        "a.png and a.tif have the same stem",
        f"lonely.png has no partner in {root / 'labels'}",
        f"stray.png has no partner in {root / 'images'}",
        "line 3 of manifest.csv repeats a",
        "manifest.csv names ghost, which has no image with labels",
        "b has no row in manifest.csv",
        "gives a the mpp 'coarse'",
    ]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("folder", ["images", "masks"]),
        ("nuinsseg", ["human liver/tissue images", "human liver/label masks modify"]),
        ("tnbc", ["Slide_12", "GT_12"]),
        ("cryonuseg", ["tissue images", "Annotator 1 (biologist)/label masks modify"]),
    ],
)
def test_folders_without_an_image_are_refused(name, folders, tmp_path: Path):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=f"holds no image of the data set {name}"):
        read_dataset(name, tmp_path)


def test_a_manifest_without_ids_is_refused(tmp_path: Path):
    (plain_folder(tmp_path) / "manifest.csv").write_text("name,group\na,p\n")
    with pytest.raises(UserError, match="has no column 'id'; it has name, group"):
        read_dataset("folder", tmp_path)


def test_sizes_that_differ_name_both_files_and_sizes(tmp_path: Path):
    root = plain_folder(tmp_path)
    save(root / "labels" / "a.png", np.zeros((96, 81), np.uint8))
    data = read_dataset("folder", root)
    with pytest.raises(UserError, match=r"images/a\.png and .*labels/a\.png differ in size: 80 x 96 and 81 x 96"):
        data[0]


def test_a_mask_among_the_label_maps_is_refused(tmp_path: Path):
    root = plain_folder(tmp_path)
    save(root / "labels" / "a.png", (draw(0)[1] > 0).astype(np.uint8) * 255)
    with pytest.raises(UserError, match=r"labels/a\.png has one number for \d separate areas"):
        read_dataset("folder", root)[0]


def test_a_label_map_among_the_masks_is_refused(tmp_path: Path):
    root = plain_folder(tmp_path, annotation="masks")
    save(root / "masks" / "b.png", draw(1)[1].astype(np.uint16))
    with pytest.raises(UserError, match=r"masks/b\.png is no binary mask: it holds the values 0, 1, 2"):
        read_dataset("folder", root)[1]


def test_files_come_in_natural_order_without_hidden_and_foreign_ones(tmp_path: Path, caplog):
    for name in ["image_10.png", "image_2.png", ".DS_Store", "Image_1.PNG", "notes.txt"]:
        (tmp_path / name).touch()
    assert list(files_by_stem(tmp_path, {".png"}, [])) == ["Image_1", "image_2", "image_10"]
    assert "notes.txt is passed over" in caplog.text


# Label files


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "u1"), ("a.png", "u2"), ("a.bmp", "u1")] + [("a.tif", kind) for kind in ("u2", "i4", "u4", "f4")],
)
def test_label_files_keep_their_numbers(name, kind, tmp_path: Path):
    labels = draw(0)[1]
    if np.dtype(kind).itemsize > 1:
        labels[labels > 0] += 300
    found = read_labels(save(tmp_path / name, labels.astype(kind)))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, labels)


def test_label_files_of_other_programs_are_read(tmp_path: Path):
    labels = draw(0)[1].astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    cv2.imwrite(str(tmp_path / "gray_as_rgb.png"), cv2.merge([labels] * 3))
    for name in ["lzw.tif", "palette.png", "gray_as_rgb.png"]:
        np.testing.assert_array_equal(read_labels(tmp_path / name), labels, err_msg=name)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.png", draw_tissue(size=SIZE)[0], "holds colors"),
        ("a.tif", np.full(SIZE, 0.5, np.float32), "holds fractions"),
        ("a.tif", np.full(SIZE, np.nan, np.float32), "holds fractions"),
        ("a.tif", np.full(SIZE, -3, np.int32), "run from -3 to -3"),
        ("a.tif", np.zeros((5, *SIZE), np.uint16), r"shape \(5, 96, 80\)"),
        ("a.jpg", np.zeros(SIZE, np.uint8), "must be PNG, BMP or TIFF"),
    ],
)
def test_what_holds_no_label_numbers_is_refused_by_name(name, array, words, tmp_path: Path):
    with pytest.raises(UserError, match=rf"a\.\w+\W.*{words}"):
        read_labels(save(tmp_path / name, array))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "missing"])
def test_a_broken_label_file_is_refused_by_name(name, damage, tmp_path: Path):
    path = save(tmp_path / name, np.random.default_rng(0).integers(0, 60000, SIZE).astype(np.uint16))
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"empty": b"", "text": b"These are not the pixels\n" * 9, "half": half, "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    for read in (read_labels, read_mask):
        with pytest.raises(UserError, match=rf"cannot read .*{name} as labels: "):
            read(path)


# Official layouts


def test_nuinsseg_as_published(tmp_path: Path):
    data = read_dataset("nuinsseg", nuinsseg_tree(tmp_path))
    assert data.ids == ["human_bladder_02", "human_bladder_10", "mouse_fat_01"]
    assert data.groups == ["human bladder", "human bladder", "mouse fat"]
    for seed, one in enumerate(data):
        np.testing.assert_array_equal(one.image_rgb, draw(seed)[0])
        np.testing.assert_array_equal(one.labels, draw(seed)[1])
        assert (one.mpp, one.instances_are_exact) == (0.25, True)
    assert data[0].ignore is None
    ignore = data[2].ignore
    assert ignore is not None
    assert (ignore.dtype, ignore.sum()) == (np.bool_, 200)


def test_nuinsseg_names_what_is_missing(tmp_path: Path):
    root = nuinsseg_tree(tmp_path)
    (root / "mouse fat" / "label masks modify" / "mouse_fat_01.tif").unlink()
    shutil.copy(root / "human bladder/tissue images/human_bladder_02.png", root / "mouse fat/tissue images")
    shutil.copy(root / "human bladder/label masks modify/human_bladder_02.tif", root / "mouse fat/label masks modify")
    with pytest.raises(UserError) as caught:
        read_dataset("nuinsseg", root)
    assert "2 problems" in str(caught.value)
    assert "mouse_fat_01.png has no partner" in str(caught.value)
    assert "human_bladder_02.png has the stem of an image of human bladder" in str(caught.value)


def test_prepared_nuinsseg_takes_its_foreground_from_the_exact_masks(tmp_path: Path):
    root = prepared(tmp_path, rows=("a,liver", "b,skin"))
    image, labels = draw(0)
    exact = labels > 0
    speck = tuple(np.argwhere(cv2.dilate(exact.astype(np.uint8), np.ones((3, 3))) > exact)[0])
    exact[speck] = True  # the watershed dropped one pixel beside a nucleus
    save(root / "masks" / "a.png", exact.astype(np.uint8) * 255)
    save(root / "labels" / "b.png", np.zeros(SIZE, np.uint16))
    save(root / "masks" / "b.png", (draw(1)[1] > 0).astype(np.uint8) * 255)
    first, second = read_dataset("nuinsseg", root)
    np.testing.assert_array_equal(first.labels > 0, exact)
    np.testing.assert_array_equal(first.labels[labels > 0], labels[labels > 0])
    assert first.labels.max() == labels.max()
    assert second.labels.max() == draw(1)[1].max()
    assert not first.instances_are_exact
    save(root / "masks" / "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError, match=r"masks/a\.png differ in size"):
        read_dataset("nuinsseg", root)[0]


@pytest.mark.parametrize("above", ["", "TNBC_NucleiSegmentation"])
def test_tnbc_as_published(tmp_path: Path, above):
    tnbc_tree(tmp_path / above)
    data = read_dataset("tnbc", tmp_path)
    assert data.ids == ["tnbc_01_1", "tnbc_01_2", "tnbc_11_1"]  # slide 12 is brain
    assert data.groups == ["slide_01", "slide_01", "slide_11"]
    for seed, one in enumerate(data):
        np.testing.assert_array_equal(one.image_rgb, draw(seed)[0])
        assert one.labels.max() == draw(seed)[1].max()
        assert (one.mpp, one.instances_are_exact) == (0.25, True)


def test_tnbc_names_what_is_missing(tmp_path: Path):
    root = tnbc_tree(tmp_path)
    shutil.rmtree(root / "GT_11")
    (root / "GT_01" / "01_2.png").unlink()
    with pytest.raises(UserError) as caught:
        read_dataset("tnbc", root)
    assert "01_2.png has no partner" in str(caught.value)
    assert "Slide_11 has no partner GT_11/" in str(caught.value)


@pytest.mark.parametrize(
    ("annotator", "nuclei"), [(None, 99), ("annotator1", 99), ("annotator1_round2", 2), ("annotator2", 1)]
)
def test_cryonuseg_as_published_with_each_annotation(tmp_path: Path, annotator, nuclei):
    data = read_dataset("cryonuseg", cryonuseg_tree(tmp_path), annotator=annotator)
    assert data.groups == ["Larynx", "Larynx", "Skin"]
    for seed, one in enumerate(data):
        image, labels = draw(seed)
        np.testing.assert_array_equal(one.image_rgb, image)
        assert one.labels.max() == min(nuclei, labels.max())


def test_prepared_cryonuseg_has_a_folder_an_annotation(tmp_path: Path):
    root = prepared(tmp_path, rows=("a,Larynx",))
    for label, folder in [(7, "labels_annot1_round2"), (9, "labels_annot2")]:
        save(root / folder / "a.png", np.full(SIZE, label, np.uint8))
    for annotator, label in [("annotator1", draw(0)[1].max()), ("annotator1_round2", 7), ("annotator2", 9)]:
        assert read_dataset("cryonuseg", root, annotator=annotator)[0].labels.max() == label
    shutil.rmtree(root / "labels_annot2")
    with pytest.raises(UserError, match=r"looked for images/ \+ labels_annot2/ \+ manifest\.csv"):
        read_dataset("cryonuseg", root, annotator="annotator2")


def test_cryonuseg_names_what_is_missing(tmp_path: Path):
    root = cryonuseg_tree(tmp_path)
    with pytest.raises(ValueError, match="unknown annotator 'me'; choose from annotator1, annotator1_round2"):
        read_dataset("cryonuseg", root, annotator="me")
    (root / "Annotator 1 (biologist)" / "label masks modify" / "Human_Skin_01.tif").unlink()
    with pytest.raises(UserError, match=r"Human_Skin_01\.tif has no partner in .*Annotator 1 \(biologist\)"):
        read_dataset("cryonuseg", root)
    shutil.rmtree(root / "Annotator 2 (bioinformatician)")
    with pytest.raises(UserError, match=r"looked for .*Annotator 2 \(bioinformatician\)/label masks modify/.*; found"):
        read_dataset("cryonuseg", root, annotator="annotator2")


# The prepared layout


def test_a_broken_prepared_set_names_every_problem(tmp_path: Path):
    root = prepared(tmp_path, rows=("a,liver", "b,skin", "c,skin"))
    (root / "labels" / "a.png").unlink()
    (root / "manifest.csv").write_text("id,group\na,liver\nb,skin\nb,skin\n,skin\nd,skin\n")
    with pytest.raises(UserError) as caught:
        read_dataset("tnbc", root)
    for words in [
        "a.png has no partner",
        "manifest.csv names a, which has no image with labels",
        "line 4 of manifest.csv repeats b",
        "line 5 of manifest.csv has no id",
        "c.png has no row in manifest.csv",
        "manifest.csv names d, which has no image",
    ]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("guess", "mpp"), [("~30x(crude)", 10 / 30), ("~15x(crude)", 10 / 15), ("unknown", 0.33), ("", 0.33), ("0x", 0.33)]
)
def test_the_guessed_magnification_of_dsb_becomes_microns_per_pixel(tmp_path: Path, guess, mpp):
    root = prepared(tmp_path, "id,group,source,est_magnification", (f"a,g01,purple,{guess}", "b,g02,purple,~40x"))
    data = read_dataset("dsb_he", root)
    assert data[0].mpp == pytest.approx(mpp)
    assert data.groups == ["purple", "purple"]


# Real images


@pytest.mark.parametrize(
    ("name", "images", "groups", "id", "nuclei", "size"),
    [
        ("nuinsseg", 536, 24, "human_bladder_01", 25, (512, 512)),
        ("tnbc", 42, 9, "tnbc_01_1", 69, (512, 512)),
        ("dsb_he", 107, 4, "dsb_00ae65c1", 70, (256, 320)),
        ("cryonuseg", 30, 10, "Human_AdrenalGland_01", 85, (512, 512)),
        ("monuseg", 30, 30, "TCGA-18-5592-01Z-00-DX1", 480, (1000, 1000)),
    ],
)
def test_real_sets_have_the_images_and_nuclei_that_their_manifest_states(
    shared_data: Path, name, images, groups, id, nuclei, size
):
    data = read_dataset(name, shared_data / name)
    assert (len(data), len(set(data.ids)), len(set(data.groups))) == (images, images, groups)
    one = data[data.ids.index(id)]
    assert one.image_rgb.shape == (*size, 3)
    assert len(np.unique(one.labels)) - 1 == nuclei
    assert one.image_rgb[one.labels > 0].mean() < one.image_rgb[one.labels == 0].mean()  # nuclei are dark


def test_the_annotators_of_real_cryonuseg_counted_differently(shared_data: Path):
    counts = [
        len(np.unique(read_dataset("cryonuseg", shared_data / "cryonuseg", annotator=annotator)[0].labels)) - 1
        for annotator in ["annotator1", "annotator1_round2", "annotator2"]
    ]
    assert counts == [85, 93, 134]


def test_real_nuinsseg_foreground_is_the_exact_mask(shared_data: Path):
    data = read_dataset("nuinsseg", shared_data / "nuinsseg")
    differing = data.ids.index("human_salivory_gland_36")  # the watershed dropped 13 pixels of a nucleus here
    mask = read_mask(shared_data / "nuinsseg" / "masks" / "human_salivory_gland_36.png")
    np.testing.assert_array_equal(data[differing].labels > 0, mask)


def test_a_conic_patch_without_groups_is_read_at_its_own_scale(shared_data: Path):
    (patch,) = read_dataset("folder", shared_data / "conic_sample", mpp=0.5)
    assert (patch.mpp, patch.group, len(np.unique(patch.labels)) - 1) == (0.5, "consep_1-0000", 145)
