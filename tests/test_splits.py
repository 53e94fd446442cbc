"""Splits never divide a group, follow the seed alone, and their manifest finds an image that is on both sides."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_tissue
from nuguide.datasets import Dataset, Entry, read_dataset
from nuguide.datasets.splits import (
    content_hash,
    grouped_folds,
    hold_out,
    own_split,
    read_manifest,
    shared_content,
    shared_groups,
    write_manifest,
)
from nuguide.types import Sample, UserError

ORGANS = [organ for organ, count in [("liver", 9), ("spleen", 6), ("skin", 5), ("testis", 4), ("lung", 3)] * 2
          for _ in range(count)]  # fmt: skip  # 54 images, the groups scattered


def drawn_dataset(name: str, seeds: dict[str, int], groups: dict[str, str] | None = None) -> Dataset:
    """Drawn images by id; equal seeds give equal pixels."""

    def load(id: str) -> Sample:
        image, labels = draw_tissue(seed=seeds[id], size=(48, 48), nuclei=2)
        return Sample(id=id, image_rgb=image, labels=labels, mpp=0.5, group=(groups or {}).get(id, id))

    return Dataset(name, [Entry(id, (groups or {}).get(id, id), lambda id=id: load(id)) for id in seeds])


@pytest.mark.parametrize("seed", range(5))
def test_folds_hold_each_image_once_and_divide_no_group(seed):
    folds = grouped_folds(ORGANS, 3, seed)
    assert sorted(index for _, val in folds for index in val) == list(range(54))
    for train, val in folds:
        assert sorted(train + val) == list(range(54))
        assert not {ORGANS[index] for index in train} & {ORGANS[index] for index in val}


def test_folds_are_balanced_by_images_not_by_groups():
    sizes = sorted(len(val) for _, val in grouped_folds(ORGANS, 3, seed=0))
    assert sizes == [18, 18, 18]  # liver 18 | spleen 12 + lung 6 | skin 10 + testis 8


def test_one_large_group_stands_alone_in_its_fold():
    groups = ["large"] * 10 + [f"small {index}" for index in range(10)]
    assert sorted(len(val) for _, val in grouped_folds(groups, 2, seed=3)) == [10, 10]


def test_the_seed_decides_and_the_order_of_the_files_does_not():
    groups = [f"patient {index % 12}" for index in range(24)]
    folds = grouped_folds(groups, 4, seed=1)
    assert folds == grouped_folds(groups, 4, seed=1)
    assert folds != grouped_folds(groups, 4, seed=2)
    names = [{groups[index] for index in val} for _, val in folds]
    turned = groups[::-1]
    assert [{turned[index] for index in val} for _, val in grouped_folds(turned, 4, seed=1)] == names


@pytest.mark.parametrize("folds", [0, 1, 6])
def test_more_folds_than_groups_or_fewer_than_two_are_refused(folds):
    with pytest.raises(ValueError, match="5 groups cannot be divided"):
        grouped_folds(ORGANS, folds, seed=0)


def test_named_groups_are_held_out():
    train, held = hold_out(ORGANS, ["lung", "skin"])
    assert Counter(ORGANS[index] for index in held) == {"lung": 6, "skin": 10}
    assert len(train) == 54 - 16
    assert hold_out(ORGANS, "lung")[1] == hold_out(ORGANS, ["lung"])[1]


def test_a_fraction_is_met_as_near_as_whole_groups_allow():
    groups = [f"slide {index // 5}" for index in range(100)]  # 20 slides of 5 images
    train, held = hold_out(groups, 0.2, seed=4)
    assert len(held) == 20
    assert not {groups[index] for index in train} & {groups[index] for index in held}
    assert held != hold_out(groups, 0.2, seed=5)[1]


@pytest.mark.parametrize("seed", range(8))
def test_a_group_that_would_overshoot_is_passed_over(seed):
    groups = ["large"] * 60 + [f"small {index // 10}" for index in range(40)]
    assert len(hold_out(groups, 0.2, seed)[1]) == 20  # two small ones


def test_a_representative_part_is_as_crowded_as_the_whole():
    # eight organs, half of them nearly empty: a part of one kind alone misleads
    groups = [f"organ {index // 5}" for index in range(40)]
    crowded = [0.01 if index < 20 else 0.4 for index in range(40)]
    for seed in range(6):
        train, held = hold_out(groups, 0.25, seed, like=crowded)
        assert sorted(crowded[index] for index in held) == [0.01] * 5 + [0.4] * 5
        assert not {groups[index] for index in train} & {groups[index] for index in held}
    assert held == hold_out(groups, 0.25, seed, like=crowded)[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_sides_keep_at_least_one_group(fraction):
    train, held = hold_out(["a"] * 50 + ["b"] * 50, fraction)
    assert len(train) == len(held) == 50


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (["brain"], "unknown groups brain; choose from liver, lung, skin, spleen, testis"),
        (["liver", "spleen", "skin", "testis", "lung"], "leaves one side without images"),
        ([], "leaves one side without images"),
        (1.5, "between 0 and 1"),
    ],
)
def test_an_impossible_hold_out_says_why(held, words):
    with pytest.raises(ValueError, match=words):
        hold_out(ORGANS, held)


def test_the_content_hash_sees_pixels_and_shape_only():
    image = draw_tissue(size=(32, 64))[0]
    assert content_hash(image) == content_hash(image[::1].copy(order="F"))
    assert content_hash(image) != content_hash(image.reshape(64, 32, 3))
    changed = image.copy()
    changed[5, 5, 0] ^= 1
    assert content_hash(image) != content_hash(changed)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path):
    train, val = drawn_dataset("a", {"one": 1, "two": 2}), drawn_dataset("b", {"three": 3})
    written = write_manifest(tmp_path / "split.json", {"train": [train], "val": [val]})
    assert read_manifest(tmp_path / "split.json") == written
    assert [(member.dataset, member.id) for member in written.parts["train"]] == [("a", "one"), ("a", "two")]
    assert shared_content(written) == shared_groups(written) == []
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_the_hash_of_a_split_depends_on_its_members_not_on_their_order(tmp_path: Path):
    data = drawn_dataset("a", {"one": 1, "two": 2, "three": 3})
    hashes = [
        write_manifest(tmp_path / "split.json", {"train": [data.subset(train)], "val": [data.subset(val)]}).sha256
        for train, val in [([0, 1], [2]), ([1, 0], [2]), ([0, 2], [1])]
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_same_image_under_another_name_is_found_in_both_parts(tmp_path: Path):
    train, val = drawn_dataset("a", {"one": 1, "two": 2}), drawn_dataset("b", {"copy of two": 2, "three": 3})
    (places,) = shared_content(write_manifest(tmp_path / "split.json", {"train": [train], "val": [val]}))
    assert [(part, member.id) for part, member in places] == [("train", "two"), ("val", "copy of two")]


def test_a_divided_group_is_found(tmp_path: Path):
    data = drawn_dataset("a", {"one": 1, "two": 2, "three": 3}, {"one": "P", "two": "P", "three": "Q"})
    manifest = write_manifest(tmp_path / "s.json", {"train": [data.subset([0])], "val": [data.subset([1, 2])]})
    (places,) = shared_groups(manifest)
    assert [(part, member.id) for part, member in places] == [("train", "one"), ("val", "two")]


def test_a_manifest_changed_by_hand_is_refused(tmp_path: Path):
    path = tmp_path / "split.json"
    write_manifest(path, {"train": [drawn_dataset("a", {"one": 1, "two": 2})]})
    content = json.loads(path.read_text())
    content["parts"]["train"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"split\.json was changed by hand"):
        read_manifest(path)


def test_a_manifest_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere/split\.json"):
        write_manifest(tmp_path / "nowhere" / "split.json", {"train": [drawn_dataset("a", {"one": 1})]})


@pytest.mark.parametrize("text", ["", "[]", '{"parts": {"train": [{"id": 1}]}, "sha256": ""}'])
def test_what_is_no_manifest_is_refused_by_name(tmp_path: Path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read the split manifest .*split\.json"):
        read_manifest(tmp_path / "split.json")


CONIC = [f"{cohort}_{number}" for cohort in ("dpath", "crag", "glas", "consep", "pannuke") for number in range(1, 6)]


def test_conics_own_split_holds_a_fifth_of_each_cohorts_sources():
    pytest.importorskip("sklearn")
    groups = [source for source in CONIC for _ in range(3)]
    train, held = own_split("conic", groups)
    assert (len(train), len(held)) == (60, 15)
    # noted once: the first of ten draws of seed 5; sources are taken by name, so the order of patches is of no account
    assert {groups[i] for i in held} == {"consep_4", "crag_1", "dpath_4", "glas_5", "pannuke_1"}
    backwards = groups[::-1]
    assert {backwards[i] for i in own_split("conic", backwards)[1]} == {groups[i] for i in held}


def test_a_part_of_conic_has_no_own_split():
    pytest.importorskip("sklearn")
    with pytest.raises(UserError, match="conic: its own split needs the whole set"):
        own_split("conic", ["consep_1", "dpath_1", "dpath_2"])


def test_conics_own_split_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'nuguide\[train\]'"):
        own_split("conic", ["consep_1", "consep_2"])


def test_real_organs_are_held_out_whole(shared_data: Path):
    nuinsseg = read_dataset("nuinsseg", shared_data / "nuinsseg")
    train, held = hold_out(nuinsseg.groups, 0.2, seed=0)
    assert len(train) + len(held) == 536
    assert abs(len(held) - 0.2 * 536) < 6  # the smallest organ has 6 images
    assert not np.intersect1d([nuinsseg.groups[i] for i in train], [nuinsseg.groups[i] for i in held]).size
