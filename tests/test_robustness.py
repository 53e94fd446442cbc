"""The benchmark of changed pictures: levels mean what they say, runs resume, committed lines are whole."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import robustness
from nuguide.datasets.splits import read_manifest
from nuguide.evaluate import read_scores
from nuguide.stain import STAINS
from nuguide.types import Sample
from robustness import CLASSICAL, CLEAN, LINES, PERTURBATIONS

RESULTS = Path(__file__).resolve().parents[1] / "results"
CHANGING = [name for name in PERTURBATIONS if name != "mpp"]
GRAY = np.full((64, 64, 3), 128, np.uint8)


def changed(image: np.ndarray, kind: str, level: float) -> np.ndarray:
    """An image of 0.25 microns per pixel under a perturbation."""
    return PERTURBATIONS[kind].change(image, level, 0.25, np.random.default_rng(0))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The root mean square difference of two images."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_the_neutral_level_leaves_every_pixel_as_it_is(kind: str, tissue: Sample) -> None:
    how = PERTURBATIONS[kind]
    assert np.array_equal(changed(tissue.image_rgb, kind, how.neutral), tissue.image_rgb)
    assert how.claim(how.neutral) == 1.0


@pytest.mark.parametrize("kind", CHANGING)
def test_a_level_further_from_neutral_changes_more(kind: str, tissue: Sample) -> None:
    how = PERTURBATIONS[kind]
    for side in (-1, 1):
        levels = sorted((x for x in how.levels if (x - how.neutral) * side > 0), key=lambda x: abs(x - how.neutral))
        moved = [distance(changed(tissue.image_rgb, kind, level), tissue.image_rgb) for level in levels]
        assert all(before < after for before, after in itertools.pairwise([0.0, *moved]))


def test_levels_mean_what_they_say() -> None:
    hematoxylin = 256 * np.exp(-0.8 * STAINS[0]) - 1
    halved = 256 * np.exp(-0.4 * STAINS[0]) - 1
    assert changed(np.rint(hematoxylin)[None, None].astype(np.uint8), "hematoxylin", 0.5) == pytest.approx(
        halved[None, None], abs=1)
    assert changed(GRAY, "noise", 10).std() == pytest.approx(10, rel=0.03)
    assert changed(GRAY, "brightness", 0.5).tolist() == (GRAY // 2).tolist()
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    assert changed(red, "hue", 120)[0, 0].tolist() == [0, 200, 0]
    edge = GRAY.copy()
    edge[:, 32:] = 228
    assert changed(edge, "contrast", 0.4)[0, [0, -1], 0].tolist() == [158, 198]      # 178 +- 20
    # one standard deviation, 0.5 microns or 2 pixels, from the edge a blurred step of 100 is at 84
    assert changed(edge, "blur", 0.5)[32, [33, 34], 0].mean() == pytest.approx(128 + 84.1, abs=1.5)


def test_a_wrong_mpp_is_told_of_the_picture_as_it_is(tissue: Sample) -> None:
    image, mpp = robustness.perturbed(tissue, 0, "mpp", -25)
    assert image is tissue.image_rgb
    assert mpp == 0.75 * tissue.mpp


def test_noise_is_the_same_in_every_run_and_another_in_every_image(tissue: Sample) -> None:
    first, again, other = (robustness.perturbed(tissue, index, "noise", 20)[0] for index in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_are_all_of_tnbc_and_spread_over_organs() -> None:
    members = read_manifest(RESULTS / "split.json").parts["val"]
    chosen = robustness.chosen(members, 24, 0)
    assert len(set(chosen)) == 24
    assert chosen == robustness.chosen(members[::-1], 24, 0)
    sets = Counter(member.dataset for member in chosen)
    assert sets == {"tnbc": sum(member.dataset == "tnbc" for member in members), "nuinsseg": 17}
    organs = Counter(member.group for member in chosen if member.dataset == "nuinsseg")
    assert sorted(organs.values()) == [2, 3, 3, 3, 3, 3]


def test_a_run_that_was_cut_ends_as_an_unbroken_one(tmp_path: Path, tissue: Sample, monkeypatch) -> None:
    """A stand-in for a model that calls dark what is darker than 128 in red; the cut leaves half a line."""
    scored = []

    def dark(image: np.ndarray, mpp: float) -> np.ndarray:
        scored.append(mpp)
        return (image[..., 0] < 128).astype(np.int32)

    kept = {name: PERTURBATIONS[name] for name in ("brightness", "mpp")}
    monkeypatch.setattr(robustness, "PERTURBATIONS", kept)
    monkeypatch.setattr(robustness, "segmenter", lambda model, precision: (dark, "0"))
    monkeypatch.setattr(robustness, "samples_of", lambda members, root: [tissue])
    monkeypatch.setattr(robustness, "IMAGES", 8)
    files = [tmp_path / "unbroken.jsonl", tmp_path / "cut.jsonl"]
    unbroken, cut = (robustness.run(["a"], tmp_path, RESULTS / "split.json", file, "fp32") for file in files)
    assert len(list(unbroken)) == 9
    assert len(list(itertools.islice(cut, 3))) == 3
    files[1].write_text(files[1].read_text() + '{"benchmark": "robust')
    scored.clear()
    assert len(list(robustness.run(["a"], tmp_path, RESULTS / "split.json", files[1], "fp32"))) == 6
    assert len(scored) == 6
    assert robustness.read_lines(files[0]) == robustness.read_lines(files[1])


def test_a_panel_shows_the_mean_of_each_model_at_every_level() -> None:
    levels = [(CLEAN, 0.0), *((kind, level) for kind, how in PERTURBATIONS.items() for level in how.levels)]
    lines = [
        {"model": model, "perturbation": kind, "level": level, "dice": [dice, dice + 0.2]}
        for model, dice in (("small", 0.6), ("b", 0.4)) for kind, level in levels
    ]
    panels = robustness.panels_of(lines).axes
    assert [axes.get_title() for axes in panels] == [how.title for how in PERTURBATIONS.values()]
    blur = panels[list(PERTURBATIONS).index("blur")].lines[0]
    assert np.asarray(blur.get_xydata()).tolist() == [[0, 0.7], [0.25, 0.7], [0.5, 0.7], [1.0, 0.7], [1.5, 0.7]]
    assert [axes.get_xlim()[0] > axes.get_xlim()[1] for axes in panels].count(True) == 1     # quality falls


def test_committed_lines_are_whole_and_start_where_the_result_files_are() -> None:
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    keys = [(line["model"], line["perturbation"], line["level"]) for line in lines]
    levels = [(CLEAN, 0.0), *((kind, level) for kind, how in PERTURBATIONS.items() for level in how.levels)]
    wanted = [(model, *level) for model in ("small", "small-unguided", "base", CLASSICAL) for level in levels]
    assert sorted(keys) == sorted(wanted)
    assert all(len(line["dice"]) == len(line["images"]) == 24 for line in lines)
    for model, results in (("small", "default"), ("small-unguided", "unguided"), ("base", "base")):
        rows = read_scores(RESULTS / f"{results}.val.json")
        known = dict(zip(rows["dataset"] + "/" + rows["id"], rows["dice"], strict=True))
        expected = [known[name] for name in lines[0]["images"]]
        # the unguided model was scored before its weights were rounded to fp16
        assert robustness.unchanged(lines, model) == pytest.approx(expected, abs=1e-3)
