"""Copies on both sides of a split are found however they were changed; different images of one stain are not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from conftest import draw_tissue
from nuguide.datasets import Dataset, Entry, read_dataset
from nuguide.datasets.leaks import Leak, correlation, find_leaks, fingerprint, orientations
from nuguide.datasets.splits import read_manifest, shared_content, shared_groups, write_folds, write_manifest
from nuguide.types import Sample, UserError


def dataset(name: str, images: dict[str, np.ndarray]) -> Dataset:
    """Images without labels, each its own group."""

    def load(id: str) -> Sample:
        return Sample(id, images[id], np.zeros(images[id].shape[:2], np.int32), 0.5, id)

    return Dataset(name, [Entry(id, id, lambda id=id: load(id)) for id in images])


def leaks_between(tmp_path: Path, train: dict[str, np.ndarray], val: dict[str, np.ndarray]) -> list[Leak]:
    parts = {"a": dataset("a", train), "b": dataset("b", val)}
    manifest = write_manifest(tmp_path / "split.json", {"train": [parts["a"]], "val": [parts["b"]]})
    return find_leaks(manifest, parts)


def jpeg(image: np.ndarray, quality: int = 50) -> np.ndarray:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "compressed": jpeg,
    "half as large": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "cropped by 2% on each side": lambda image: image[5:-5, 5:-5],
    "cropped at a corner": lambda image: image[6:, 6:],
    "brighter": lambda image: np.clip(image * 1.15 + 5, 0, 255).astype(np.uint8),
    "turned once": np.rot90,
    "turned twice": lambda image: np.rot90(image, 2),
    "mirrored": lambda image: image[:, ::-1],
    "transposed": lambda image: image.transpose(1, 0, 2),
    "mirrored, turned, cropped and compressed": lambda image: jpeg(np.rot90(image[4:-4, 4:-4][::-1], 3).copy()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(tmp_path: Path, change: str) -> None:
    images = {f"image {seed}": draw_tissue(seed)[0] for seed in range(4)}
    copies = {f"copy {seed}": np.ascontiguousarray(CHANGES[change](draw_tissue(seed)[0])) for seed in (1, 2)}
    found = leaks_between(tmp_path, images, {**copies, "other": draw_tissue(9)[0]})
    assert [(leak.member.id, leak.other.id) for leak in found] == [("image 1", "copy 1"), ("image 2", "copy 2")]
    assert all(leak.differing is not None for leak in found)


def test_an_identical_image_is_found_and_called_so(tmp_path: Path) -> None:
    image, blank = draw_tissue()[0], np.full((64, 64, 3), 240, np.uint8)
    found = leaks_between(tmp_path, {"one": image, "glass": blank}, {"two": image.copy(), "more glass": blank.copy()})
    assert [(leak.member.id, leak.other.id, leak.differing) for leak in found] == [
        ("glass", "more glass", None), ("one", "two", None)
    ]  # fmt: skip
    assert str(found[1]) == "train: a/one is identical to val: b/two"


def test_different_tissue_of_one_stain_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    images = {f"{seed}": draw_tissue(seed, (96, 96), nuclei=8)[0] for seed in range(120)}
    halves = [{id: image for id, image in images.items() if int(id) % 2 == half} for half in (0, 1)]
    assert leaks_between(tmp_path, halves[0], halves[1]) == []


def test_glass_is_not_taken_for_a_copy_of_other_glass(tmp_path: Path) -> None:
    def glass(seed: int) -> np.ndarray:
        """Noise on the light of one lamp, which falls off to one side."""
        light = np.linspace(245, 225, 128)[None, :, None]
        noisy = light + np.random.default_rng(seed).normal(0, 2, (128, 128, 3))
        return np.clip(noisy, 0, 255).astype(np.uint8)

    assert leaks_between(tmp_path, {"one": glass(0), "two": glass(1)}, {"three": glass(2), "four": glass(3)}) == []


def test_hashes_of_a_turned_image_are_those_of_the_image_in_another_order() -> None:
    image = draw_tissue(size=(128, 128))[0]
    upright = set(fingerprint(image).hashes.tolist())
    for turned in (np.rot90(image), image[::-1], image.transpose(1, 0, 2)):
        found = set(fingerprint(np.ascontiguousarray(turned)).hashes.tolist())
        assert len(upright & found) >= 6                                   # rounding may move a bit
    frequencies = cv2.dct(np.random.default_rng(0).random((32, 32)).astype(np.float32))
    pictures = [cv2.idct(np.ascontiguousarray(turned)) for turned in orientations(frequencies)]
    picture = pictures[0]
    turns = [np.rot90(view, turn) for view in (picture, picture.T) for turn in range(4)]
    assert all(any(np.allclose(one, turned, atol=1e-4) for one in pictures) for turned in turns)


def test_correlation_knows_every_orientation_and_nothing_of_flat_images() -> None:
    one = fingerprint(draw_tissue()[0]).reduced
    assert correlation(one, np.rot90(one, 3)[::-1]) == pytest.approx(1)
    assert correlation(one, np.zeros_like(one)) == 0


def test_tiny_and_flat_images_come_through(tmp_path: Path) -> None:
    odd = {"one pixel": np.zeros((1, 1, 3), np.uint8), "line": np.full((1, 9, 3), 7, np.uint8)}
    assert leaks_between(tmp_path, odd, {"black": np.zeros((40, 40, 3), np.uint8)}) == []


def test_what_the_manifest_names_must_be_there_as_it_was(tmp_path: Path) -> None:
    parts = {name: dataset(name, {"one": draw_tissue(seed)[0]}) for seed, name in enumerate("ab")}
    manifest = write_manifest(tmp_path / "split.json", {"train": [parts["a"]], "val": [parts["b"]]})
    with pytest.raises(UserError, match="say where they are: b=FOLDER"):
        find_leaks(manifest, {"a": parts["a"]})
    with pytest.raises(UserError, match="names one, which b lacks"):
        find_leaks(manifest, {"a": parts["a"], "b": dataset("b", {"two": draw_tissue(1)[0]})})
    with pytest.raises(UserError, match="b, image one is not the one that the manifest was made of"):
        find_leaks(manifest, {"a": parts["a"], "b": dataset("b", {"one": draw_tissue(7)[0]})})


def test_real_organs_have_no_copies_of_each_other(tmp_path: Path, shared_data: Path) -> None:
    nuinsseg = read_dataset("nuinsseg", shared_data / "nuinsseg")
    halves = {"train": [nuinsseg.subset(range(0, 240, 8))], "val": [nuinsseg.subset(range(4, 240, 8))]}
    assert find_leaks(write_manifest(tmp_path / "split.json", halves), {"nuinsseg": nuinsseg}) == []


def counted(images: int, groups: int, reads: list[str]) -> Dataset:
    """Images of one pixel each, whose reading is noted."""

    def load(index: int) -> Sample:
        reads.append(str(index))
        pixel = np.full((1, 1, 3), index, np.uint8)
        return Sample(str(index), pixel, np.zeros((1, 1), np.int32), 0.5, str(index % groups))

    return Dataset("counted", [Entry(str(i), str(i % groups), lambda i=i: load(i)) for i in range(images)])


def test_folds_are_written_and_every_image_is_read_once(tmp_path: Path) -> None:
    reads: list[str] = []
    written = write_folds(tmp_path / "folds", [counted(20, 7, reads)], folds=3, seed=0)
    assert sorted(reads, key=int) == [str(index) for index in range(20)]
    files = sorted((tmp_path / "folds").iterdir())
    assert [file.name for file in files] == ["fold_0.json", "fold_1.json", "fold_2.json"]
    assert [read_manifest(file) for file in files] == written
    assert sorted(member.id for fold in written for member in fold.parts["val"]) == sorted(map(str, range(20)))
    for fold in written:
        assert len(fold.parts["train"]) + len(fold.parts["val"]) == 20
        assert shared_groups(fold) == shared_content(fold) == []
    assert all(one.sha256 != other.sha256 for one, other in pairwise(written))
    assert write_folds(tmp_path / "again", [counted(20, 7, reads)], folds=3, seed=0) == written


def test_groups_of_two_sets_that_share_a_name_are_two_groups(tmp_path: Path) -> None:
    ones, others = dataset("a", {"1": draw_tissue(1)[0]}), dataset("b", {"1": draw_tissue(2)[0]})
    folds = write_folds(tmp_path, [ones, others], folds=2, seed=0)
    assert {fold.parts["val"][0].dataset for fold in folds} == {"a", "b"}


def test_impossible_folds_say_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="counted: 2 groups cannot be divided into 3 folds"):
        write_folds(tmp_path, [counted(6, 2, [])], folds=3, seed=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the folder .*file"):
        write_folds(tmp_path / "file", [counted(6, 3, [])], folds=3, seed=0)
