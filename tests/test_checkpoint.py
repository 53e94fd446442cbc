"""A saved model rebuilds itself, a bad one is refused in one line, and a failed save harms nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nuguide import checkpoint
from nuguide.checkpoint import CONFIG, WEIGHTS, ModelSpec
from nuguide.types import UserError

PLAIN = ModelSpec("unet", {"width": 1}, mpp=0.4, tile_px=128, origin={"trained_on": ["drawn tissue"]})
GUIDED = ModelSpec(
    "eunet3plus", {"width": 1}, "cross", {"heads": 2}, latent_dropout=0.2, levels="all", guide="efficientnet_lite0"
)
IMAGE = 255 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return checkpoint.build(PLAIN).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved plain model."""
    return checkpoint.save(tmp_path / "model", plain(), PLAIN)


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


# --- what is saved comes back ---


def test_a_model_without_guide_comes_back_equal(folder: Path) -> None:
    model, guide, spec = checkpoint.load(folder)
    assert guide is None
    assert spec == PLAIN
    assert not model.training
    assert torch.equal(model(IMAGE), plain()(IMAGE))
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, CONFIG}


def test_a_guided_model_comes_back_with_its_guide_but_does_not_hold_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = checkpoint.build(GUIDED, guide_channels=432).eval()
    nn.init.normal_(model.fusion.attention.out.weight)   # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    spec = dataclasses.replace(GUIDED, guide_weights="579344248a93")           # as the published file's hash begins
    checkpoint.save(tmp_path / "model", model, spec)
    again, guide, found = checkpoint.load(tmp_path / "model")
    assert guide is not None
    assert found == spec
    assert not any(p.requires_grad for p in guide.parameters())
    with torch.no_grad():
        latent = guide(IMAGE)
        assert latent.shape == (1, 432, 4, 4)
        assert torch.equal(again(IMAGE, latent), model(IMAGE, latent))
        assert not torch.equal(again(IMAGE, latent), again(IMAGE, 0 * latent))
    assert (tmp_path / "model" / WEIGHTS).stat().st_size < 10**6               # the guide alone has 19 MB


def test_stored_as_fp16_a_model_takes_half_and_comes_back_as_fp32(folder: Path, tmp_path: Path) -> None:
    small = checkpoint.save(tmp_path / "small", plain(), PLAIN, torch.float16)
    weights, halves = load_file(folder / WEIGHTS), load_file(small / WEIGHTS)
    assert {v.dtype for v in halves.values() if v.is_floating_point()} == {torch.float16}
    sizes = [sum(v.nbytes for v in state.values()) for state in (weights, halves)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)
    model, _, _ = checkpoint.load(small)
    assert {v.dtype for v in model.state_dict().values() if v.is_floating_point()} == {torch.float32}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model(IMAGE), plain()(IMAGE), atol=0.02, rtol=0.02)


def test_a_number_too_large_for_fp16_is_stored_in_full(tmp_path: Path) -> None:
    model = plain()
    name = "encoder.levels.0.0.norm.running_var"
    model.state_dict()[name].fill_(70_000.0)             # fp16 ends at 65,504
    checkpoint.save(tmp_path / "model", model, PLAIN, torch.float16)
    assert checkpoint.load(tmp_path / "model")[0].state_dict()[name].tolist() == [70_000.0]


def test_a_model_is_found_by_name_by_folder_and_by_either_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path)
    assert checkpoint.model_folder("model") == folder
    assert checkpoint.model_folder(str(folder)) == folder
    assert checkpoint.model_folder(folder / WEIGHTS) == folder
    assert checkpoint.model_folder(folder / CONFIG) == folder


def test_a_second_save_replaces_the_model_and_keeps_its_card(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    checkpoint.save(folder, plain(seed=1), dataclasses.replace(PLAIN, mpp=0.7))
    model, _, spec = checkpoint.load(folder)
    assert spec.mpp == 0.7
    assert torch.equal(model(IMAGE), plain(seed=1)(IMAGE))
    assert (folder / "README.md").read_text() == "card"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]              # nothing is left beside it


def test_a_random_guide_comes_back_by_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = checkpoint.build(GUIDED, 432)
    checkpoint.save(tmp_path / "model", model, dataclasses.replace(GUIDED, guide_weights="random-3"))
    guide = checkpoint.load(tmp_path / "model")[1]
    assert guide is not None
    assert guide.weights_id == "random-3"


def test_a_guided_network_cannot_be_built_without_the_guides_channels() -> None:
    with pytest.raises(ValueError, match="needs the channels of its guide's latent"):
        checkpoint.build(GUIDED)


# --- what is refused ---


class Trap:
    """Unpickled, it makes a folder: the harmless stand-in for any code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    message = refusal(file)
    assert str(file) in message
    assert "pickled checkpoints are not loaded" in message
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_in_place_of_the_weights_is_refused_and_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(folder / "sprung")))
    assert str(folder / WEIGHTS) in refusal(folder)
    assert not (folder / "sprung").exists()


def test_a_missing_model_lists_those_that_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MODELS", folder.parent)
    assert refusal("nowhere").startswith("nowhere: no such model; give model, or a folder with model.safetensors")
    monkeypatch.setattr(checkpoint, "MODELS", folder / "not there")
    assert refusal("nowhere").startswith("nowhere: no such model; give a folder with model.safetensors")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert f"{file} is missing" in refusal(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_refused(folder: Path, length: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:length])
    assert str(folder / WEIGHTS) in refusal(folder)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_weights_of_another_network_are_refused_naming_a_tensor(folder: Path, fault: str) -> None:
    state = load_file(folder / WEIGHTS)
    if fault == "missing":
        del state["head.weight"]
    elif fault == "extra":
        state["foot.weight"] = torch.zeros(1)
    else:
        state["head.weight"] = torch.zeros(2, 9, 1, 1)
    save_file(state, folder / WEIGHTS)
    message = refusal(folder)
    assert str(folder / WEIGHTS) in message
    assert ("foot.weight" if fault == "extra" else "head.weight") in message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", '{"width": 3}', '{"network": "unet", "depth": 4}', "\x00"])
def test_a_broken_description_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert f"{folder / CONFIG}: not a model description" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"separation": {"foo": 1}}, "foo"),
        ({"separation": {"nucleus": "x"}}, "nucleus is 'x', no positive number"),
        ({"separation": {"reach_um": float("inf")}}, "reach_um is inf, no positive number"),
        ({"mpp": 0}, "mpp is 0, no positive number"),
        ({"mpp": "a"}, "mpp is 'a', no positive number"),
        ({"tile_px": -64}, "tile_px is -64, no positive number"),
        ({"network": "unet9"}, "unknown network 'unet9'; choose from unet"),
        ({"network_options": {"depth": 9}}, "depth"),
        ({"fusion": "add", "guide": "efficientnet_lite0"}, "unknown fusion 'add'; choose from x_gfb"),
        ({"fusion": "cross", "guide": "clip"}, "unknown guide 'clip'; choose from efficientnet_lite0"),
        ({"fusion": "cross", "guide": "efficientnet_lite0", "guide_px": 7}, "can't be built for image_px=7"),
        ({"fusion": "cross", "guide": "efficientnet_lite0", "guide_weights": "random-x"}, "random:SEED"),
        ({"fusion": "cross"}, "needs the channels of its guide"),
    ],
)
def test_a_description_that_names_what_there_is_not_is_refused(folder: Path, changes: dict, says: str) -> None:
    change_config(folder, **changes)
    assert says in refusal(folder)


@pytest.mark.parametrize("weights", ["0123456789ab", 7])
def test_other_weights_of_the_guide_are_refused(folder: Path, weights: object) -> None:
    change_config(folder, fusion="cross", guide="efficientnet_lite0", guide_weights=weights)
    message = refusal(folder)
    assert str(weights) in message
    assert "579344248a93" in message                     # those found


# --- a save that fails ---


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def only_the_first(times: int):
    """os.replace that works `times` times and then finds the disk full, then works again."""
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == times + 1:
            full_disk()
        real(source, target)

    return replace


@pytest.mark.parametrize(
    ("broken", "exists"),
    [(step, exists) for step in ("weights", "config", "first move") for exists in (True, False)]
    + [("second move", True)],                           # a new model takes one move
)
def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, broken: str, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if exists:
        checkpoint.save(folder, plain(), PLAIN)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    match broken:
        case "weights":
            monkeypatch.setattr(checkpoint, "save_file", full_disk)
        case "config":
            monkeypatch.setattr(Path, "write_text", full_disk)
        case "first move":
            monkeypatch.setattr(os, "replace", only_the_first(0))
        case "second move":
            monkeypatch.setattr(os, "replace", only_the_first(1))
    with pytest.raises(UserError, match=f"{folder}: cannot be written.*No space left.*free some space"):
        checkpoint.save(folder, plain(seed=1), PLAIN)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert folder.exists() == exists


def test_a_file_in_the_way_is_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("notes")
    with pytest.raises(UserError, match="model: cannot be written"):
        checkpoint.save(tmp_path / "model", plain(), PLAIN)
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "model" / "inside", plain(), PLAIN)
    assert (tmp_path / "model").read_text() == "notes"
