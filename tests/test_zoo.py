"""The models that come with the package: listed quickly and truly, free to use, loaded by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nuguide
from conftest import nuguide as run
from nuguide import checkpoint, zoo
from nuguide.evaluate import read_scores
from nuguide.types import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@pytest.mark.parametrize("name", zoo.names())
def test_every_shipped_model_is_of_free_data_alone(name: str) -> None:
    spec = checkpoint.read_spec(zoo.MODELS / name)
    assert spec.guide in (None, "efficientnet_lite0")
    parts = [*zoo.trained_on(spec.origin), *spec.origin["validated_on"]]
    assert {part["name"] for part in parts} <= {"nuinsseg", "tnbc", "dsb_he"}
    assert {part["license"] for part in parts} <= {"CC BY 4.0", "CC0"}


@pytest.mark.parametrize("name", zoo.names())
def test_no_group_was_both_trained_on_and_validated_on(name: str) -> None:
    origin = checkpoint.read_spec(zoo.MODELS / name).origin
    parts = (origin[part] for part in ("trained_on", "validated_on"))
    train, val = ({(p["name"], group) for p in part for group in p["groups"]} for part in parts)
    assert train
    assert val
    assert not train & val


@pytest.mark.parametrize("name", zoo.names())
def test_a_listed_model_is_as_its_file_says(name: str) -> None:
    listed, (model, guide, spec) = zoo.find(name), checkpoint.load(name)
    assert listed.parameters == sum(value.numel() for value in model.parameters())
    assert listed.bytes == (zoo.MODELS / name / zoo.WEIGHTS).stat().st_size
    assert (listed.network, listed.guide, listed.fusion, listed.mpp) == (
        spec.network, spec.guide, spec.fusion, spec.mpp)
    assert (guide is None) == (listed.guide is None)
    assert [(part["name"], part["images"]) for part in listed.trained_on] == [
        ("nuinsseg", 414), ("tnbc", 35), ("dsb_he", 71)]


def test_the_listing_shows_each_model_and_its_scores(capsys: pytest.CaptureFixture) -> None:
    assert run("models") == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    facts = {" ".join(line) for line in lines}
    assert "base eunet3plus 32 efficientnet_lite0 concat 11.9 M 23.9 MB 0.5" in facts
    assert "small (default) eunet3plus 16 efficientnet_lite0 concat 3.0 M 6.1 MB 0.5" in facts
    assert "small-unguided eunet3plus 16 - - 2.9 M 5.8 MB 0.5" in facts
    assert max(map(len, shown.splitlines())) <= 88
    assert ["Dice", "AJI", "PQ", "base", "small", "small-unguided"] in lines
    all_three = [read_scores(RESULTS / f"{results}.monuseg.json") for results in ("base", "default", "unguided")]
    means = [f"{rows[metric].mean():.3f}".removeprefix("0") for rows in all_three for metric in ("dice", "aji", "pq")]
    assert ["MoNuSeg,", "never", "trained", "on", *means] in lines


def test_machines_get_the_same_as_json(capsys: pytest.CaptureFixture) -> None:
    assert run("models", "--json") == 0
    base, small, unguided = json.loads(capsys.readouterr().out)
    assert [(model["name"], model["aliases"]) for model in (base, small, unguided)] == [
        ("base", []), ("small", ["default"]), ("small-unguided", [])]
    assert base["width"] == 2 * small["width"] == 32
    assert (small["parameters"], small["mpp"]) == (3_045_762, 0.5)
    mean, low, high = small["scores"]["cryonuseg"]["dice"]
    dice = read_scores(RESULTS / "default.cryonuseg.json")["dice"]
    assert mean == pytest.approx(dice.mean(), abs=1e-4)
    assert low < mean < high
    assert run("models", "small", "--json") == 0
    assert json.loads(capsys.readouterr().out) == small


def test_a_name_prints_the_card_without_the_marks_of_its_tables(capsys: pytest.CaptureFixture) -> None:
    assert run("models", "default") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# Model card: small")
    assert "Where it fails" in shown
    assert "<!--" not in shown
    card = (zoo.MODELS / "small" / zoo.CARD).read_text()
    assert set(shown.splitlines()) == {line for line in card.splitlines() if not line.startswith("<!--")}


def test_an_unknown_name_gets_one_line_that_lists_the_names(capsys: pytest.CaptureFixture) -> None:
    assert run("models", "big") == 2
    assert capsys.readouterr().err == "nuguide: big: no such model; choose from base, small, small-unguided\n"
    assert run("models", "elsewhere/small") == 2
    assert capsys.readouterr().err.startswith("nuguide: elsewhere/small: no such model; choose from base, small")
    with pytest.raises(UserError) as refused:
        nuguide.load("big")
    assert str(refused.value).startswith("big: no such model; give base, small, small-unguided, or a folder with ")
    assert "\n" not in str(refused.value)


def test_default_is_the_small_model() -> None:
    assert checkpoint.model_folder("default") == checkpoint.model_folder("small") == zoo.MODELS / "small"


def test_models_are_listed_without_torch() -> None:
    heavy = {"torch", "pandas", "scipy", "safetensors"}
    code = (
        "import sys, nuguide.cli\n"
        "try: nuguide.cli.main(['models'])\n"
        f"except SystemExit: print({heavy} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "set()\n"
    assert ended.stdout.startswith("model ")


def test_a_model_without_scores_or_width_is_listed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors of 6 and 4 numbers, the second of them a buffer."""
    from safetensors.numpy import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    config = {"network": "unet", "network_options": {}, "fusion": None, "guide": None, "mpp": 0.25,
              "origin": {"trained_on": [{"name": "a", "license": "CC0", "images": 2}],
                         "started_from": {"trained_on": [{"name": "b", "license": "CC BY 4.0", "images": 5}]}}}
    (folder / zoo.CONFIG).write_text(json.dumps(config))
    weights = {"conv.weight": np.zeros((2, 3), np.float16), "norm.running_mean": np.zeros(4, np.float32)}
    save_file(weights, folder / zoo.WEIGHTS)
    monkeypatch.setattr(zoo, "MODELS", tmp_path)
    assert zoo.names() == ["base"]
    base = zoo.find("base")
    assert base.parameters == 6
    assert zoo.listing([base]).splitlines()[1].split() == ["base", "unet", "-", "-", "0.0", "M", "0.0", "MB", "0.25"]
    assert zoo.listing([base]).endswith("base: trained on b (5 images, CC BY 4.0), a (2 images, CC0)")
