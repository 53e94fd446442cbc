"""The evaluator: one row of scores an image, means with intervals, differences image by image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nuguide.datasets import Dataset, Entry
from nuguide.evaluate import SHOWN, evaluate, interval, paired, read_scores, summarize, write_scores
from nuguide.metrics import Scores
from nuguide.nuclei import Nuclei
from nuguide.types import Sample, UserError


def strip(*areas: tuple[int, int, int]) -> np.ndarray:
    """A map of 1 x 1000 pixels: for each (label, start, stop) the pixels start..stop-1 carry the label."""
    labels = np.zeros((1, 1000), np.int32)
    for label, start, stop in areas:
        labels[0, start:stop] = label
    return labels


IMAGE = np.full((1, 1000, 3), 200, np.uint8)
TRUTH = {"half": strip((1, 0, 100)), "hit": strip((1, 0, 100), (2, 300, 400))}
FOUND = {"half": strip((1, 50, 150)), "hit": strip((5, 0, 100), (9, 300, 400))}


class Oracle:
    """Answers with the maps of FOUND in their order, and notes the scale that it was told."""

    def __init__(self, answers: list[np.ndarray]):
        self.answers = list(answers)
        self.mpp: list[float] = []

    def segment(self, image_rgb: np.ndarray, mpp: float) -> Nuclei:
        self.mpp.append(mpp)
        labels = self.answers.pop(0).astype(np.uint32)
        return Nuclei.found(labels, image_rgb, np.ones(labels.shape), mpp)


def dataset(ignore: np.ndarray | None = None) -> Dataset:
    samples = [Sample(id, IMAGE, labels, 0.5, f"slide of {id}", ignore) for id, labels in TRUTH.items()]
    return Dataset("strips", [Entry(s.id, s.group, lambda s=s: s) for s in samples])


def scored(found: list[np.ndarray] | None = None) -> pd.DataFrame:
    return evaluate(Oracle(found or list(FOUND.values())), dataset())  # pyright: ignore[reportArgumentType]


def test_there_is_one_row_an_image_with_every_score():
    scores = scored()
    assert list(scores.columns) == ["dataset", "id", "group", *Scores.__dataclass_fields__]
    assert set(SHOWN) <= set(scores.columns)
    assert scores["dataset"].tolist() == ["strips", "strips"]
    assert scores["id"].tolist() == ["half", "hit"]
    assert scores["group"].tolist() == ["slide of half", "slide of hit"]
    assert scores["dice"].tolist() == pytest.approx([0.5, 1])           # 2 x 50 / 200
    assert scores["iou"].tolist() == pytest.approx([1 / 3, 1])          # 50 / 150
    assert scores["pq"].tolist() == pytest.approx([0, 1])               # IoU 1/3 is no match


def test_the_model_is_told_the_scale_and_progress_counts_images():
    oracle, told = Oracle(list(FOUND.values())), []
    evaluate(oracle, dataset(), told.append)  # pyright: ignore[reportArgumentType]
    assert oracle.mpp == [0.5, 0.5]
    assert told == [1, 2]


def test_what_annotators_called_vague_does_not_count():
    ignore = np.zeros((1, 1000), bool)
    ignore[0, 100:150] = True                           # where "half" was found too far to the right
    scores = evaluate(Oracle(list(FOUND.values())), dataset(ignore))  # pyright: ignore[reportArgumentType]
    assert scores["dice"].tolist() == pytest.approx([2 * 50 / 150, 1])


def test_the_summary_is_that_of_two_images_by_hand():
    summary = summarize(scored()).set_index("metric")
    assert list(summary.index) == list(SHOWN)
    dice = summary.loc["dice"]
    assert dice["mean"] == pytest.approx(0.75)
    assert dice["sd"] == pytest.approx(0.25 * np.sqrt(2))               # of 0.5 and 1, with n - 1
    assert (dice["low"], dice["high"]) == pytest.approx((0.5, 1))       # a quarter of all draws takes one image twice
    assert set(summary["n"]) == {2}


def test_the_summary_of_one_image_has_no_spread():
    dice = summarize(scored().head(1)).set_index("metric").loc["dice"]
    assert dice[["mean", "sd", "low", "high", "n"]].tolist() == [0.5, 0, 0.5, 0.5, 1]


def test_an_interval_holds_the_mean_and_narrows_with_the_images():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(400), rel=0.15)
    few_low, few_high = interval(values[:25])
    assert few_high - few_low == pytest.approx(4 * (high - low), rel=0.35)
    assert interval(values) == (low, high), "the draws are seeded"


def test_an_interval_over_groups_is_as_wide_as_few_values_make_it():
    """Eight organs of fifty images that are all alike: as an interval of eight values, not of 400."""
    rng = np.random.default_rng(1)
    organ = np.repeat(rng.permutation(8), 50)
    values = rng.normal(0.8, 0.1, 8)[organ]
    low, high = interval(values, [f"organ {number}" for number in organ])
    assert (low, high) == pytest.approx(interval(values[::50]), abs=0.01)
    of_images = interval(values)
    assert high - low > 5 * (of_images[1] - of_images[0])


def test_groups_count_by_their_images():
    """One group of nine zeros and one of a one: drawing both gives 0.1, drawing one twice 0 or 1."""
    assert interval([0] * 9 + [1], ["many"] * 9 + ["one"]) == (0, 1)
    draws = {interval([0] * 9 + [1], ["many"] * 9 + ["one"], seed=seed, draws=1)[0] for seed in range(20)}
    assert sorted(draws) == pytest.approx([0, 0.1, 1])


def test_a_difference_may_be_over_groups():
    one = pd.concat([scored([TRUTH["half"], FOUND["hit"]]).assign(id=[f"{i}a", f"{i}b"], group=f"organ {i}")
                     for i in range(3)])
    other = pd.concat([scored().assign(id=[f"{i}a", f"{i}b"], group=f"organ {i}") for i in range(3)])
    dice = paired(one, other, by_group=True).set_index("metric").loc["dice"]
    assert dice[["difference", "low", "high"]].tolist() == pytest.approx([0.25, 0.25, 0.25])      # each organ the same
    assert paired(one, other).set_index("metric").loc["dice", "low"] < 0.25
    mean = summarize(other, by_group=True).set_index("metric").loc["dice"]
    assert mean["low"] == mean["mean"] == mean["high"] > summarize(other).set_index("metric").loc["dice", "low"]


def test_a_better_model_differs_upwards():
    better, worse = scored([TRUTH["half"], FOUND["hit"]]), scored()
    difference = paired(better, worse).set_index("metric").loc["dice"]
    assert difference["difference"] == pytest.approx(0.25)              # (0.5 + 0) / 2
    assert difference[["better", "worse", "n"]].tolist() == [1, 0, 2]
    assert difference["low"] <= 0.25 <= difference["high"]
    turned = paired(worse, better).set_index("metric").loc["dice"]
    assert turned["difference"] == pytest.approx(-0.25)
    assert turned[["better", "worse"]].tolist() == [0, 1]


def test_a_model_does_not_differ_from_itself():
    rows = paired(scored(), scored())
    assert (rows[["difference", "low", "high", "better", "worse"]] == 0).to_numpy().all()


def test_images_are_paired_by_name_not_by_order():
    shuffled = scored().iloc[::-1].reset_index(drop=True)
    assert set(paired(scored(), shuffled)["difference"]) == {0}


def test_scores_of_different_images_are_not_compared():
    other = scored().assign(id=["half", "third"])
    with pytest.raises(ValueError, match="2 and 2 images, 1 of them the same: not comparable"):
        paired(scored(), other)


def test_scores_come_back_from_disk(tmp_path: Path):
    scores = scored()
    path = write_scores(tmp_path / "scores.json", scores, {"model": "oracle", "seed": 3})
    pd.testing.assert_frame_equal(read_scores(path), scores.round(5), check_dtype=False)
    facts = json.loads(path.read_text())["facts"]
    assert (facts["model"], facts["seed"]) == ("oracle", 3)
    assert {"python", "machine"} <= set(facts)
    assert len(path.read_text().splitlines()) == 3, "one line an image"


def test_scores_that_cannot_be_written_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"scores\.json: not written .*; make the folder first"):
        write_scores(tmp_path / "nowhere" / "scores.json", scored(), {})
