"""The chance that an annotator drew a nucleus, how it is fitted and judged, and the agreement of mirror images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import draw_tissue
from fakes import ByColor
from nuguide import checkpoint
from nuguide.batches import Picture
from nuguide.calibrate import Judged, confidence_of, judged
from nuguide.checkpoint import ModelSpec
from nuguide.confidence import (
    FEATURES,
    agreement,
    calibration_error,
    chance,
    checked,
    clarity,
    features,
    fit,
    reliability,
)
from nuguide.instances import enlarge
from nuguide.measure import AGREEMENT, COLUMNS
from nuguide.metrics import best_overlap
from nuguide.predict import Predictor
from nuguide.types import Sample, UserError

COEFFICIENTS = {"intercept": -9.0, "clarity": 20.0, "concavity": -1.0, "oddity": -0.75}


def predictor(flips: bool = False, confidence: dict[str, float] | None = None) -> Predictor:
    return Predictor(ByColor(), None, ModelSpec("unet", confidence=confidence or {}), "cpu", "fp32", flips=flips)


# Features


def test_clarity_is_the_standard_deviation_over_a_nucleus_by_its_label():
    labels = np.array([[1, 1, 0, 3], [1, 1, 0, 3]], np.int32)
    interior = np.array([[0.0, 1.0, 0.7, 0.4], [0.0, 1.0, 0.7, 0.4]], np.float32)
    np.testing.assert_allclose(clarity(labels, interior), [0.5, 0, 0], atol=1e-7)     # label 2 is missing
    assert clarity(np.zeros((3, 3), np.int32), np.zeros((3, 3), np.float32)).shape == (0,)


def test_features_by_hand():
    table = pd.DataFrame({"solidity": [1.0, 0.51], "area_um2": [33.0, 33 * np.e]})
    np.testing.assert_allclose(features(table, np.array([0.4, 0.1])), [[0.4, np.log(0.01), 0], [0.1, np.log(0.5), 1]])


def test_the_chance_rises_with_clarity_and_falls_with_concavity_and_oddity():
    plain = np.array([0.4, -3.0, 0.5])
    steps = np.linspace(0, 1, 7)
    for place, sign in enumerate((1, -1, -1)):
        values = np.tile(plain, (7, 1))
        values[:, place] += steps
        found = chance(values, COEFFICIENTS)
        assert (sign * np.diff(found) > 0).all()
        assert ((found > 0) & (found < 1)).all()


# Fitting


def test_the_fit_of_two_groups_is_their_log_odds(monkeypatch):
    """Matched are 30 of 120 nuclei with x = 0 and 90 of 120 with x = 1: odds of 1/3 and of 3."""
    monkeypatch.setattr("nuguide.confidence.FEATURES", ("x",))
    x = np.repeat([0.0, 1.0], 120)
    matched = np.arange(240) % 120 < np.where(x == 0, 30, 90)
    found = fit(x[:, None], matched, np.ones(240), ridge=0)
    assert found == {"intercept": pytest.approx(-np.log(3), abs=1e-6), "x": pytest.approx(2 * np.log(3), abs=1e-6)}
    twice = fit(x[:, None], matched, np.full(240, 2.0))         # weights tell of shares alone
    assert twice == fit(x[:, None], matched, np.ones(240))


def test_the_fit_recovers_known_coefficients():
    rng = np.random.default_rng(0)
    spread = np.array([0.06, 0.8, 0.7])
    values = rng.normal([0.39, -2.8, 0.8], spread, (40_000, 3))
    matched = rng.random(40_000) < chance(values, COEFFICIENTS)
    found = fit(values, matched, np.ones(40_000))
    for name, one in zip(FEATURES, spread, strict=True):
        assert found[name] * one == pytest.approx(COEFFICIENTS[name] * one, abs=0.05)
    assert chance(values, found) == pytest.approx(chance(values, COEFFICIENTS), abs=0.02)


def test_few_or_one_sided_nuclei_give_no_fit_and_a_feature_that_divides_them_a_finite_one():
    values = np.random.default_rng(0).normal(size=(100, 3))
    assert fit(values, np.arange(100) < 29, np.ones(100)) == {}
    assert fit(values, np.ones(100, bool), np.ones(100)) == {}
    divided = fit(values, values[:, 0] > 0, np.ones(100))
    assert 1 < divided["clarity"] < 100
    assert all(np.isfinite(list(divided.values())))


def test_data_sets_count_alike_however_many_nuclei_they_have():
    """One set matches 900 of 1200, the other 30 of 120, and nothing tells them apart: half way is 1 of 2."""
    pictures = [Picture(name, f"{name}/a", np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.int32)) for name in "ab"]
    found = [Judged(np.zeros((size, 3)), np.arange(size) < hits) for size, hits in ((1200, 900), (120, 30))]
    coefficients = confidence_of(pictures, found)
    assert chance(np.zeros((1, 3)), coefficients) == pytest.approx([0.5], abs=1e-4)


def test_what_is_found_in_a_picture_is_judged_by_its_labels(tissue: Sample):
    """Of 40 drawn nuclei, all found, 10 are struck from the truth: those are in vain, the others matched."""
    maps = predictor().probabilities(tissue.image_rgb)
    labels = np.where(tissue.labels > 10, tissue.labels, 0)
    found = judged(predictor(), Picture("a", "a/b", tissue.image_rgb, labels), maps)
    assert found.features.shape == (40, 3)
    assert found.matched.sum() == 30
    ignore = (tissue.labels > 0) & (tissue.labels <= 10)
    vague = judged(predictor(), Picture("a", "a/b", tissue.image_rgb, labels, np.pad(ignore, 3)[3:-3, 3:-3]), maps)
    assert vague.matched.sum() == 30


# Judging


def test_calibration_error_of_four_nuclei_by_hand():
    probability, matched = np.array([0.9, 0.2, 0.7, 0.4]), np.array([True, False, False, True])
    bins = reliability(probability, matched, bins=2)
    assert np.allclose(bins, [(2, 0.3, 0.5), (2, 0.8, 0.5)])
    assert calibration_error(bins) == pytest.approx((2 * 0.2 + 2 * 0.3) / 4)


def test_bins_hold_equal_numbers_and_none_is_empty():
    assert [one.nuclei for one in reliability(np.linspace(0, 1, 25), np.ones(25, bool))] == [3] * 5 + [2] * 5
    assert [one.nuclei for one in reliability(np.ones(3), np.ones(3, bool))] == [1, 1, 1]
    assert calibration_error(reliability(np.ones(3), np.ones(3, bool))) == 0


# Agreement


def test_equal_views_agree_wholly():
    labels = np.array([[1, 1, 0, 2, 2]], np.int32)
    np.testing.assert_array_equal(agreement(labels, [labels, labels * 7]), [1, 1])


def test_agreement_with_a_shifted_and_an_empty_view_by_hand():
    """A nucleus of 10 x 10 px; one view shows it 5 px to the right (IoU 50 / 150), one not at all."""
    labels, moved = np.zeros((2, 30, 30), np.int32)
    labels[5:15, 5:15], moved[5:15, 10:20] = 1, 4
    none = np.zeros_like(labels)
    assert agreement(labels, [labels, moved, none, labels]) == pytest.approx([(1 + 1 / 3 + 0 + 1) / 4])
    labels[20:25, 20:25] = 3                            # label 2 is missing
    assert agreement(labels, [moved]) == pytest.approx([1 / 3, 0, 0])


def test_best_overlap_takes_the_best_and_leaves_out_what_is_ignored():
    truth = np.array([[1, 1, 1, 2, 0, 0]], np.int32)
    found = np.array([[5, 5, 5, 5, 0, 9]], np.int32)
    ids, iou = best_overlap(truth, found)
    assert (ids.tolist(), iou.tolist()) == ([5, 9], [0.75, 0])
    ids, iou = best_overlap(truth, found, np.array([[0, 0, 0, 1, 1, 1]], bool))
    assert (ids.tolist(), iou.tolist()) == ([5], [1.0])


def test_with_flips_the_table_and_its_files_have_the_agreement(tissue: Sample, tmp_path: Path):
    """Where the network sees every mirror image alike, all agree but for ties between nuclei that touch."""
    nuclei = predictor(flips=True).segment(tissue.image_rgb, tissue.mpp)
    assert tuple(nuclei.table.columns) == (*COLUMNS, AGREEMENT)
    assert nuclei.table[AGREEMENT].between(0.99, 1).all()
    assert pd.read_csv(nuclei.to_csv(tmp_path / "a.csv")).columns[-1] == "agreement"
    written = json.loads(nuclei.to_geojson(tmp_path / "a.geojson").read_text())["features"][0]["properties"]
    assert written["measurements"]["Agreement of mirror images"] == pytest.approx(nuclei.table[AGREEMENT][0], abs=1e-4)
    assert AGREEMENT not in predictor().segment(tissue.image_rgb, tissue.mpp).table


class LeftOnly(ByColor):
    """Sees nuclei in the left half of what it is shown only: of an image and its mirror image, each the other half."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = super().forward(image)
        logits[..., logits.shape[-1] // 2 :] -= 20
        return logits


def test_a_nucleus_that_half_of_the_mirror_images_show_has_an_agreement_of_a_half():
    """The mean of maps near 1 and 0 is near 0.5: with a threshold of 0.3 both halves are found."""
    image, _ = draw_tissue(2, (96, 96), 6)
    model = LeftOnly()
    seen = Predictor(model, None, ModelSpec("unet", separation={"nucleus": 0.3, "interior": 0.3}), "cpu", "fp32",
                     flips=True).segment(image, 0.5)
    inside = np.abs(seen.table["centroid_x_px"].to_numpy() - 48) > 16       # clear of the middle
    assert inside.sum() >= 3
    assert seen.table[AGREEMENT].to_numpy()[inside].max() <= 0.5
    assert seen.table[AGREEMENT].to_numpy()[inside].min() > 0.3


# In the model


def test_the_calibrated_probability_stands_in_the_table(tissue: Sample):
    plain, calibrated = predictor(), predictor(confidence=COEFFICIENTS)
    before, after = (one.segment(tissue.image_rgb, tissue.mpp) for one in (plain, calibrated))
    pd.testing.assert_frame_equal(before.table.drop(columns="probability"), after.table.drop(columns="probability"))
    maps = plain.probabilities(tissue.image_rgb)
    labels = plain.label(*maps)
    np.testing.assert_array_equal(enlarge(labels, maps[0], labels.shape, 0.5), after.labels)
    expected = chance(features(after.table, clarity(labels, maps[1])), COEFFICIENTS)
    np.testing.assert_allclose(after.table["probability"], expected)
    assert np.abs(after.table["probability"] - before.table["probability"]).max() > 0.01


def test_a_model_of_no_nuclei_has_an_empty_calibrated_table():
    nothing = predictor(flips=True, confidence=COEFFICIENTS).segment(np.full((40, 50, 3), 235, np.uint8), 0.5)
    assert len(nothing) == 0
    assert tuple(nothing.table.columns) == (*COLUMNS, AGREEMENT)


def test_a_model_folder_keeps_its_confidence_and_an_old_one_has_none(tmp_path: Path):
    spec = ModelSpec("unet", {"width": 2}, confidence=COEFFICIENTS)
    folder = checkpoint.save(tmp_path / "model", checkpoint.build(spec), spec)
    assert checkpoint.read_spec(folder) == spec
    config = folder / checkpoint.CONFIG
    old = json.loads(config.read_text())
    del old["confidence"]
    config.write_text(json.dumps(old))
    assert checkpoint.load(folder)[2] == dataclasses.replace(spec, confidence={})


@pytest.mark.parametrize(
    "wrong",
    [
        {"clarity": 1.0},
        COEFFICIENTS | {"other": 1.0},
        COEFFICIENTS | {"oddity": "1"},
        COEFFICIENTS | {"oddity": None},
        COEFFICIENTS | {"oddity": float("nan")},
        COEFFICIENTS | {"oddity": True},
        [1, 2],
        None,
    ],
)
def test_a_wrong_confidence_is_refused_with_the_file(tmp_path: Path, wrong):
    spec = ModelSpec("unet", {"width": 2})
    folder = checkpoint.save(tmp_path / "model", checkpoint.build(spec), spec)
    config = folder / checkpoint.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"confidence": wrong}))
    with pytest.raises(UserError, match=r"config\.json: not a model description \(confidence needs"):
        checkpoint.read_spec(folder)


def test_a_calibrated_spec_is_accepted_as_it_is():
    checked({})
    checked(COEFFICIENTS)
