"""Training on drawn tissue: it learns, a run that was cut continues exactly, and its folder holds what it should."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nuguide
from conftest import draw_tissue
from nuguide import callbacks, checkpoint, train
from nuguide.batches import Batch, Patches, Picture
from nuguide.calibrate import calibrate
from nuguide.callbacks import KeepModel, note_epoch
from nuguide.datasets import Dataset, Entry
from nuguide.guides import FrozenGuide, load_guide
from nuguide.loaders import loaders, training_pictures, worker_count
from nuguide.losses import dice_focal
from nuguide.metrics import dice
from nuguide.networks import fold_batch_norm
from nuguide.normalize import StainNormalizer
from nuguide.recipe import TrainOptions
from nuguide.start import with_guide
from nuguide.train import RESUME, Training, fit, seen
from nuguide.types import Sample, UserError
from nuguide.zoo import trained_on

LEARNS = TrainOptions(width=4, patch_px=64, epochs=3, steps_per_epoch=8, batch=4, lr=5e-3, precision="fp32")
TINY = TrainOptions(width=1, patch_px=32, epochs=3, steps_per_epoch=3, batch=2, precision="fp32")


def drawn(*seeds: int, size: int = 96) -> list[Dataset]:
    """One data set of drawn tissue at 0.5 microns per pixel, each image its own group."""

    def entry(seed: int) -> Entry:
        image, labels = draw_tissue(seed, (size, size), size // 8, (5, 9))
        sample = Sample(f"tissue{seed}", image, labels, 0.5, f"patient{seed}")
        return Entry(sample.id, sample.group, lambda: sample)

    return [Dataset("drawn", [entry(seed) for seed in seeds], "CC0")]


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state at the end of a run."""
    state = torch.load(out / RESUME, weights_only=True)
    moments = state["optimizer_states"][0]["state"]
    return state["state_dict"] | {f"{i}.{k}": v for i, moment in moments.items() for k, v in moment.items()}


# --- one whole run, guided, with drop-out ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A guided eU-Net3+ of width 4 after 24 steps, its guide's weights at their end, and what it was validated on."""
    out, val, after = tmp_path_factory.mktemp("train") / "out", drawn(10, 11), {}

    def noted(folder: Path, pictures, unseen, guide: FrozenGuide) -> Path:
        assert all(parameter.grad is None for parameter in guide.parameters())
        after.update({name: value.clone() for name, value in guide.state_dict().items()})
        return calibrate(folder, pictures, unseen, guide)              # which folds the guide's batch norms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "calibrate", noted)
        model = fit(drawn(0, 1, 2, 3), val, out, LEARNS, progress=False)
    return SimpleNamespace(out=out, model=model, guide_after=after, val=val[0])


def test_a_short_run_learns_drawn_tissue(run: SimpleNamespace) -> None:
    losses = [row["train_loss"] for row in rows(run.out)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2
    assert max(row["val_dice"] for row in rows(run.out)) > 0.8


def test_the_model_kept_is_that_of_the_best_epoch(run: SimpleNamespace) -> None:
    best = max(rows(run.out), key=lambda row: row["val_dice"])
    model, guide, spec = checkpoint.load(run.model)
    assert spec.origin["epoch"] == best["epoch"]
    assert guide is not None
    found = []
    for sample in run.val:
        image = torch.from_numpy(sample.image_rgb).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            nucleus = model(image, guide(image))[0, 0] > 0
        found.append(dice(sample.labels, nucleus.numpy()))
    assert np.mean(found) == pytest.approx(best["val_dice"], abs=1e-3)


@pytest.mark.parametrize(
    ("keep", "folder", "kept"),
    [("best", "model", 1), ("last", "model", 4), ("mean", "best", 1), ("mean", "model", 2.5)],
)
def test_the_best_epoch_is_kept_or_the_last_or_their_mean_even_after_a_resume(
    tmp_path: Path, keep: str, folder: str, kept: float
) -> None:
    spec = checkpoint.ModelSpec("unet", {"width": 1})
    keeper, module = KeepModel(tmp_path, spec, keep=keep), SimpleNamespace(model=checkpoint.build(spec))
    for epoch, score in enumerate([0.5, 0.7, 0.6, 0.7, 0.65]):
        if epoch in (2, 4):                              # as from last.ckpt, which may be followed by an epoch twice
            state, keeper = keeper.state_dict(), KeepModel(tmp_path, spec, keep=keep)
            keeper.load_state_dict(state)
        for value in module.model.state_dict().values():
            value.fill_(epoch)
        trainer = SimpleNamespace(
            callback_metrics={"val_dice": score}, sanity_checking=False, current_epoch=epoch, is_global_zero=True,
            max_epochs=5,
        )
        for _ in range(2 if epoch == 4 else 1):
            keeper.on_validation_end(trainer, module)  # pyright: ignore[reportArgumentType]
    origin = checkpoint.read_spec(tmp_path / folder).origin
    last = keep == "last" or (keep, folder) == ("mean", "model")
    assert (origin["epoch"], origin["val_dice_at_training_resolution"]) == ((4, 0.65) if last else (1, 0.7))
    assert origin.get("mean_with_epoch") == (1 if (keep, folder) == ("mean", "model") else None)
    model, _, _ = checkpoint.load(tmp_path / folder)
    assert all(bool((value == kept).all()) for value in model.parameters())


def test_half_way_from_the_start_is_kept_after_every_epoch_even_after_a_resume(tmp_path: Path) -> None:
    spec = checkpoint.ModelSpec("unet", {"width": 1})
    keeper, module = KeepModel(tmp_path, spec, keep="halfway"), SimpleNamespace(model=checkpoint.build(spec))
    for epoch in range(3):
        for value in module.model.state_dict().values():
            value.fill_(10 + epoch)                     # what it begins with, or goes on with
        if epoch == 2:
            keeper = KeepModel(tmp_path, spec, keep="halfway")
        trainer = SimpleNamespace(
            callback_metrics={"val_dice": 0.5}, sanity_checking=False, current_epoch=epoch, is_global_zero=True,
            max_epochs=3,
        )
        if epoch != 1:
            keeper.on_train_start(trainer, module)  # pyright: ignore[reportArgumentType]
        for value in module.model.state_dict().values():
            value.fill_(20 + epoch)
        keeper.on_validation_end(trainer, module)  # pyright: ignore[reportArgumentType]
        model, _, kept = checkpoint.load(tmp_path / "model")
        assert all(bool((value == 15 + epoch / 2).all()) for value in model.parameters())
        assert (kept.origin["epoch"], kept.origin["mean_with_start"]) == (epoch, True)


def test_half_way_needs_a_start() -> None:
    with pytest.raises(UserError, match="name one with --start"):
        TrainOptions(keep="halfway")
    assert TrainOptions(keep="halfway", start="small").keep == "halfway"


def test_the_model_says_where_it_comes_from(run: SimpleNamespace) -> None:
    spec = checkpoint.read_spec(run.model)
    assert (spec.network, spec.fusion, spec.guide) == ("eunet3plus", "concat", "efficientnet_lite0_pyramid")
    assert spec.guide_weights == "579344248a93"          # as the hash of the published file begins
    assert spec.mpp == 0.5
    assert spec.tile_px == 64
    trained = spec.origin["trained_on"][0]
    assert (trained["name"], trained["license"], trained["images"]) == ("drawn", "CC0", 4)
    assert trained["groups"] == ["patient0", "patient1", "patient2", "patient3"]
    assert spec.origin["options"]["lr"] == 5e-3


def test_the_guide_does_not_change_and_stays_out_of_the_checkpoint(run: SimpleNamespace) -> None:
    published = fold_batch_norm(load_guide("efficientnet_lite0_pyramid").eval()).state_dict()
    assert run.guide_after.keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in run.guide_after.items())
    saved = torch.load(run.out / RESUME, weights_only=True)["state_dict"]
    model = checkpoint.build(checkpoint.read_spec(run.model), guide_channels=976)
    assert set(saved) == {f"model.{name}" for name in model.state_dict()}


def test_the_folder_holds_metrics_curves_and_tensorboard_logs(run: SimpleNamespace) -> None:
    assert {p.name for p in run.out.iterdir()} == {
        "model", "metrics.csv", "curves.png", "options.json", "tensorboard", RESUME
    }
    assert [(row["epoch"], row["step"]) for row in rows(run.out)] == [(0, 8), (1, 16), (2, 24)]
    assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (run.out / "tensorboard").glob("events.*")
    assert b"train_loss" in events.read_bytes()
    assert b"val_dice" in events.read_bytes()


# --- a run that was cut ---


class Cut(Exception):
    """The power fails."""


@pytest.mark.parametrize("when", ["between epochs", "within an epoch", "while the metrics are written"])
def test_a_run_that_was_cut_continues_exactly(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # cut in or after its second epoch of three; drop-out acts on features and latent, and what a run remembers beside
    # its weights goes into their average and into what is drawn
    options = dataclasses.replace(TINY, latent_dropout=0.2, ema=0.9, hard=1.0, deep_supervision=True)
    unbroken, cut = tmp_path / "unbroken", tmp_path / "cut"
    fit(drawn(0, 1), drawn(2), unbroken, options, progress=False)

    real_step, real_note, numbers = Training.training_step, note_epoch, []

    def step(self: Training, batch, index: int):
        if self.global_step == {"between epochs": 6, "within an epoch": 4}.get(when):
            raise Cut
        return real_step(self, batch, index)

    def note(metrics: Path, row: dict[str, float]) -> None:
        real_note(metrics, row)
        if when == "while the metrics are written" and row["epoch"] == 1:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Training, "training_step", step)
        patch.setattr(callbacks, "note_epoch", note)
        with pytest.raises(Cut):
            fit(drawn(0, 1), drawn(2), cut, options, progress=False)
    real_patch = Patches.__getitem__
    monkeypatch.setattr(Patches, "__getitem__", lambda self, i: numbers.append(i) or real_patch(self, i))
    fit(drawn(0, 1), drawn(2), cut, options, progress=False)

    # 3 steps of 2 patches an epoch: the epoch that was under way is repeated, those before it are not
    assert numbers == list(range(12 if when == "between epochs" else 6, 18))
    one, other = weights(unbroken), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (cut / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    assert [row["epoch"] for row in rows(cut)] == [0, 1, 2]
    for file in (checkpoint.WEIGHTS, checkpoint.CONFIG):
        assert (cut / "model" / file).read_bytes() == (unbroken / "model" / file).read_bytes()


def test_a_finished_run_is_left_as_it_is_and_others_are_refused(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1)
    out, tissue = tmp_path / "out", drawn(0)
    fit(tissue, tissue, out, options, progress=False)
    before = (out / "metrics.csv").read_text(), (out / "model" / checkpoint.WEIGHTS).read_bytes()
    fit(tissue, tissue, out, options, progress=False)
    assert ((out / "metrics.csv").read_text(), (out / "model" / checkpoint.WEIGHTS).read_bytes()) == before
    with pytest.raises(UserError, match="holds a run with other options"):
        fit(tissue, tissue, out, dataclasses.replace(options, lr=0.1), progress=False)
    with pytest.raises(UserError, match="holds a run already"):
        fit(tissue, tissue, out, options, resume=False, progress=False)
    # `auto` takes what the run took, whatever this machine would choose now
    fit(tissue, tissue, out, dataclasses.replace(options, precision="auto"), progress=False)
    # nor does an option that came after it stand in its way
    noted = json.loads((out / "options.json").read_text())
    del noted["normalize_stain"], noted["augmentation"]["gain"]
    for newer in ("ema", "hard", "semantic_only", "gap_weight", "deep_supervision", "mpp_range"):
        del noted[newer]
    (out / "options.json").write_text(json.dumps(noted))
    fit(tissue, tissue, out, options, progress=False)
    with pytest.raises(UserError, match="holds a run with other options"):
        fit(tissue, tissue, out, dataclasses.replace(options, normalize_stain="macenko"), progress=False)
    (out / "options.json").write_text("{")
    with pytest.raises(UserError, match=r"options\.json: is damaged"):
        fit(tissue, tissue, out, options, progress=False)
    (out / "options.json").write_text(json.dumps(noted))
    (out / RESUME).write_bytes((out / RESUME).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt: is damaged; remove it"):
        fit(tissue, tissue, out, options, progress=False)


def test_metrics_of_a_repeated_epoch_replace_the_old(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    for epoch, loss in [(0, 0.9), (1, 0.8), (2, 0.7), (1, 0.6)]:
        note_epoch(file, {"epoch": epoch, "train_loss": loss})
    assert file.read_text().split() == ["epoch,train_loss", "0,0.9", "1,0.6"]


# --- the other ways to train ---


def test_bf16_learns_as_fp32_does(tmp_path: Path) -> None:
    last = {}
    for precision in ("fp32", "bf16"):
        options = dataclasses.replace(LEARNS, fusion="none", patch_px=32, epochs=2, precision=precision)
        fit(drawn(0, 1, 2, 3), drawn(10), tmp_path / precision, options, progress=False)
        last[precision] = rows(tmp_path / precision)
    first, second = ([row["train_loss"] for row in last[precision]] for precision in ("fp32", "bf16"))
    assert second == pytest.approx(first, rel=0.03)
    assert second != first
    assert second[1] < second[0]


def test_cached_latents_and_deep_supervision_train_too(tmp_path: Path) -> None:
    options = dataclasses.replace(
        TINY, epochs=1, latents="cached", network_options={"deep_supervision": True}, schedule="constant"
    )
    fit(drawn(0, size=48), drawn(2), tmp_path / "out", options, progress=False)
    # 6 patches of 32 px from one image of 48, at rows and columns 0 and 16: at most 4 latents
    assert 1 <= len(list((tmp_path / "out" / "latents").rglob("*.safetensors"))) <= 4
    model, guide, spec = checkpoint.load(tmp_path / "out" / "model")
    assert guide is not None
    assert spec.network_options["deep_supervision"] is True
    image = torch.zeros(1, 3, 40, 50)
    assert model(image, guide(image)).shape == (1, 2, 40, 50)


def test_deep_supervision_counts_each_level_half_of_the_finer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # five levels whose losses are 1, 0, 0, 0, 0 and 0, 0, 0, 0, 1: shares of 16/31 and 1/31
    target = torch.ones(1, 1, 4, 4)
    right, wrong = torch.full((1, 1, 4, 4), 30.0), torch.full((1, 1, 4, 4), -30.0)
    whole = float(dice_focal(wrong, target))
    losses = []
    for worst in (0, 4):
        heads = [wrong if level == worst else right for level in range(5)]
        training = Training(torch.nn.Identity(), None, TINY)
        monkeypatch.setattr(training, "forward", lambda *_, heads=heads: heads)
        monkeypatch.setattr(training, "log", lambda *_, **__: None)
        losses.append(float(training.training_step(Batch(torch.zeros(1, 3, 4, 4), target, None), 0)["loss"]))
    assert losses == pytest.approx([whole * 16 / 31, whole / 31], rel=1e-4)


def test_patches_drawn_ahead_by_two_processes_give_the_very_same_model(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=2, gap_weight=5.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)            # and OpenCV as many, which a fork leaves behind
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    for workers in (0, 2):
        fit(drawn(0, 1), drawn(2), tmp_path / str(workers), options, progress=False, workers=workers)
    alone, ahead = (weights(tmp_path / name) for name in "02")
    assert all(torch.equal(alone[name], value) for name, value in ahead.items())


def test_a_gpu_gets_processes_that_draw_for_it_a_cpu_none_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [worker_count(None, TINY, cpu), worker_count(3, TINY, cpu), worker_count(0, TINY, gpu)] == [0, 3, 0]
    assert [worker_count(None, TINY, gpu, devices) for devices in (1, 4, 16)] == [8, 3, 0]     # 15, 3 and 0 to spare
    for own in ({"latents": "cached"}, {"hard": 1.0}):
        options = dataclasses.replace(TINY, **own)
        assert worker_count(None, options, gpu) == worker_count(0, options, gpu) == 0
        with pytest.raises(UserError, match="--workers 2 does not go with .*leave it out"):
            worker_count(2, options, gpu)
    with pytest.raises(UserError, match="0 or more, not -1"):
        worker_count(-1, TINY, gpu)


def test_gaps_weigh_in_the_loss_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(TINY, gap_weight=50.0)
    loader, _ = loaders(training_pictures(drawn(0), options), [], tmp_path, None, options)
    assert isinstance(loader.dataset, Patches)
    assert loader.dataset.gap_weight == 50.0
    target, weight = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)
    weight[:, 1, 2:] = 50.0
    logits = torch.linspace(-3, 3, 32).reshape(1, 2, 4, 4)
    training = Training(torch.nn.Identity(), None, options)
    monkeypatch.setattr(training, "forward", lambda *_: logits)
    monkeypatch.setattr(training, "log", lambda *_, **__: None)
    loss = training.training_step(Batch(torch.zeros(1, 3, 4, 4), target, None, weight), 0)["loss"]
    assert float(loss) == pytest.approx(float(dice_focal(logits, target, weight)))
    assert float(loss) > float(dice_focal(logits, target))


def test_the_heads_of_deep_supervision_stay_out_of_the_model(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1)
    plain = fit(drawn(0), drawn(2), tmp_path / "plain", options, progress=False)
    deep = dataclasses.replace(options, deep_supervision=True, start=str(plain))
    model, _, spec = checkpoint.load(fit(drawn(0), drawn(2), tmp_path / "deep", deep, progress=False))
    assert spec.network_options == {"width": 1}
    assert not any("side_heads" in name for name in model.state_dict())
    trained = torch.load(tmp_path / "deep" / RESUME, weights_only=True)["state_dict"]
    assert sum("side_heads" in name for name in trained) == 8         # four heads' weights and biases
    with pytest.raises(UserError, match="no model can be built with these options: .*deep_supervision"):
        fit(drawn(0), drawn(2), tmp_path / "no", dataclasses.replace(deep, network="unet", start=None), progress=False)


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, ema=0.9)
    model, _, _ = checkpoint.load(fit(drawn(0), drawn(2), tmp_path / "out", options, progress=False))
    last = torch.load(tmp_path / "out" / RESUME, weights_only=True)
    average = last["callbacks"]["WeightAverage"]
    assert average["steps"] == 3
    kept = model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in average["average"].items())
    own = {name.removeprefix("model."): value for name, value in last["state_dict"].items()}
    assert not torch.equal(kept["head.weight"], own["head.weight"])
    assert torch.allclose(kept["head.weight"], own["head.weight"], atol=0.02)


def test_data_sets_of_semantic_truth_are_named(tmp_path: Path) -> None:
    both = [*drawn(0), Dataset("outlined", list(drawn(1)[0].entries), "CC0")]
    named = dataclasses.replace(TINY, semantic_only=("outlined",))
    assert [p.semantic_only for p in training_pictures(both, named)] == [False, True]
    with pytest.raises(UserError, match="--semantic-only outlines: no such training data; choose from drawn, outlined"):
        training_pictures(both, dataclasses.replace(TINY, semantic_only=("outlines",)))
    with pytest.raises(UserError, match="nothing would teach to tell nuclei apart"):
        fit(drawn(0), drawn(2), tmp_path / "out", dataclasses.replace(TINY, semantic_only=("drawn",)), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_range_of_resolutions_is_drawn_from_the_finest(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1, mpp_range=(0.25, 1.0))
    (fine,) = training_pictures(drawn(0), options)
    assert fine.labels.shape == (192, 192)                  # drawn at 96 px of 0.5 microns
    _, _, spec = checkpoint.load(fit(drawn(0), drawn(2), tmp_path / "out", options, progress=False))
    assert spec.mpp == 0.5
    assert spec.int8_ranges


def test_each_set_counts_alike_in_validation_and_vague_areas_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[:, :8] = 1
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255                                  # found: twice as much as is annotated
    vague = np.zeros((32, 32), bool)
    vague[:, 8:16] = True
    pictures = [
        Picture("a1", "many/p", image, labels), Picture("a2", "many/p", image, labels),
        Picture("a3", "many/p", image, labels), Picture("b", "few/p", image, labels, vague),
    ]
    _, held = loaders(training_pictures(drawn(0), TINY), pictures, tmp_path, None, TINY)
    training, told = Training(torch.nn.Identity(), None, TINY), {}
    monkeypatch.setattr(training, "forward", lambda image: image - 128)
    monkeypatch.setattr(training, "log", lambda name, value, **_: told.update({name: value}))
    for number, batch in enumerate(held):
        training.validation_step(batch, number)
    training.on_validation_epoch_end()
    assert told["val_dice"] == pytest.approx((2 / 3 + 1) / 2)


def test_what_a_start_was_trained_on_is_known_over_generations(run: SimpleNamespace, tmp_path: Path) -> None:
    options = dataclasses.replace(LEARNS, epochs=1, steps_per_epoch=1, lr=1e-9)
    first = dataclasses.replace(options, start=str(run.model))
    second = dataclasses.replace(options, start=str(fit(drawn(4), drawn(12), tmp_path / "b", first, progress=False)))
    with pytest.raises(UserError, match="was trained on patient0 of drawn, so validating on it says nothing"):
        fit(drawn(5), drawn(0), tmp_path / "c", second, progress=False)
    _, _, spec = checkpoint.load(fit(drawn(5), drawn(13), tmp_path / "d", second, progress=False))
    groups = [part["groups"] for part in trained_on(spec.origin)]
    assert groups == [["patient0", "patient1", "patient2", "patient3"], ["patient4"], ["patient5"]]


def test_training_goes_on_from_another_models_weights(run: SimpleNamespace, tmp_path: Path) -> None:
    # one step at a rate of nearly nothing leaves the weights where they were
    options = dataclasses.replace(LEARNS, start=str(run.model), epochs=1, steps_per_epoch=1, lr=1e-9)
    model = fit(drawn(4, 5), run_val := drawn(12), tmp_path / "tuned", options, progress=False)
    before, after = checkpoint.load(run.model), checkpoint.load(model)
    learned = dict(before[0].named_parameters())
    assert all(torch.allclose(p, learned[name], atol=1e-6) for name, p in after[0].named_parameters())
    facts = after[2].origin["started_from"]
    assert [part["groups"] for part in facts["trained_on"]] == [["patient0", "patient1", "patient2", "patient3"]]
    more = dataclasses.replace(options, width=8, network_options=options.network_options | {"dropout": 0.1})
    wide = checkpoint.load(fit(drawn(4), run_val, tmp_path / "twice", more, progress=False))
    assert wide[2].network_options == {"width": 8, "dropout": 0.1}     # drop-out may differ
    image = torch.from_numpy(drawn(12)[0][0].image_rgb.copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        logits = [Training(model, guide, options).eval()(image) for model, guide, _ in (before, wide)]
    assert (logits[0] - logits[1]).abs().mean() < 0.05 * logits[0].abs().mean()      # batch norm has moved by a step
    with pytest.raises(UserError, match="is 4 wide and cannot begin a training 6 wide: its channels do not all grow"):
        fit(drawn(4), run_val, tmp_path / "wide", dataclasses.replace(options, width=6), progress=False)
    with pytest.raises(UserError, match="no start for this training: network is 'eunet3plus' there, 'unet' here"):
        fit(drawn(4), run_val, tmp_path / "wide", dataclasses.replace(options, network="unet"), progress=False)
    with pytest.raises(UserError, match="was trained on patient3 of drawn, so validating on it says nothing"):
        fit(drawn(4), drawn(3), tmp_path / "leak", options, progress=False)
    assert not (tmp_path / "wide").exists()


def test_a_guide_that_is_not_named_is_that_of_the_start_or_the_default(run: SimpleNamespace) -> None:
    def chosen(**options) -> str | None:
        return with_guide(dataclasses.replace(TINY, **options)).guide

    assert chosen() == chosen(start="small-unguided") == chosen(start=str(run.model)) == "efficientnet_lite0_pyramid"
    assert chosen(start="small") == "efficientnet_lite0"
    assert chosen(start="small", guide="sam_vit_b") == chosen(guide="sam_vit_b") == "sam_vit_b"
    assert json.loads((run.out / "options.json").read_text())["guide"] == "efficientnet_lite0_pyramid"


def test_a_guide_is_added_to_a_model_without(tmp_path: Path) -> None:
    plain = dataclasses.replace(LEARNS, fusion="none", epochs=1)
    start = fit(drawn(0, 1), drawn(12), tmp_path / "plain", plain, progress=False)
    still = dataclasses.replace(LEARNS, start=str(start), fusion="cross", epochs=1, steps_per_epoch=1, lr=1e-9,
                                guide="efficientnet_lite0")
    before = checkpoint.load(start)
    image = torch.from_numpy(drawn(12)[0][0].image_rgb.copy()).permute(2, 0, 1)[None].float()
    for width in (4, 8):
        options = dataclasses.replace(still, width=width)
        after = checkpoint.load(fit(drawn(4), drawn(12), tmp_path / f"guided{width}", options, progress=False))
        assert (after[2].fusion, after[2].guide) == ("cross", "efficientnet_lite0")
        with torch.no_grad():
            logits = [Training(model, guide, options).eval()(image) for model, guide, _ in (before, after)]
        # cross begins as no guide; batch norm has moved by a step, far for so short a training
        assert (logits[0] - logits[1]).abs().mean() < 0.15 * logits[0].abs().mean()
    again = dataclasses.replace(plain, start=str(tmp_path / "guided4" / "model"))
    with pytest.raises(UserError, match="no start for this training: fusion is 'cross' there, None here"):
        fit(drawn(5), drawn(13), tmp_path / "back", again, progress=False)


def test_the_guide_sees_around_a_patch_what_it_will_see_around_a_tile() -> None:
    guide = load_guide("efficientnet_lite0")
    (samples,) = drawn(0, size=256)
    image = torch.from_numpy(samples[0].image_rgb.copy()).permute(2, 0, 1)[None].float()
    batch = Batch(image[..., 32:224, 32:224], torch.zeros(1, 2, 128, 128), None)
    patch, latent = seen(batch, guide)
    assert torch.equal(patch, image[..., 64:192, 64:192])
    assert latent is not None
    assert latent.shape[-2:] == (8, 8)
    # nearer to what it says of the whole picture than with nothing around the patch
    whole = guide(image)[..., 4:12, 4:12]
    assert (latent - whole).abs().mean() < 0.7 * (guide(patch) - whole).abs().mean()
    assert seen(batch, None)[1] is None


@pytest.mark.parametrize("method", ["macenko", "reinhard", "vahadane"])
def test_stain_is_measured_over_the_training_part_and_applied_at_prediction(method: str, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1, normalize_stain=method)
    model = fit(drawn(0, 1), drawn(2), tmp_path / "out", options, progress=False)
    predictor = nuguide.load(model)
    (samples,) = drawn(2)
    image = samples[0].image_rgb
    expected = StainNormalizer(method).fit(sample.image_rgb for sample in drawn(0, 1)[0])
    assert np.array_equal(predictor.prepared(image, 0.5), expected.apply(image))
    assert not np.array_equal(predictor.prepared(image, 0.5), image)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"stain": {"name": "macenko"}}))
    with pytest.raises(UserError, match="not a model description"):
        nuguide.load(model)


def test_a_guides_weights_may_lie_in_any_file(tmp_path: Path) -> None:
    # as a fine-tuned guide's do: the run needs them in no cache, and the model asks for these weights and no others
    state = load_guide("efficientnet_lite0").network.state_dict()
    torch.save(state | {"head.conv.weight": state["head.conv.weight"] + 1}, tmp_path / "tuned.pth")
    options = dataclasses.replace(TINY, epochs=1, steps_per_epoch=1, guide_weights=str(tmp_path / "tuned.pth"))
    model = fit(drawn(0), drawn(2), tmp_path / "out", options, progress=False)
    with pytest.raises(UserError, match="other weights of guide efficientnet_lite0"):
        checkpoint.load(model)
    guide = load_guide("efficientnet_lite0_pyramid", tmp_path / "tuned.pth")
    assert checkpoint.load(model, guide)[1] is guide
    predictor = nuguide.load(model, guide_weights=tmp_path / "tuned.pth")
    assert predictor.guide is not None
    assert predictor.guide.weights_id == guide.weights_id


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # 100 steps: up over the first 5, then half a cosine down to 1%; halfway down it is (1 + 0.01) / 2
    [("cosine", {0: 0.2, 4: 1.0, 5: 1.0, 52: 0.513, 53: 0.497, 100: 0.01}), ("constant", {0: 0.2, 4: 1.0, 100: 1.0})],
)
def test_the_learning_rate_by_hand(schedule: str, expected: dict[int, float]) -> None:
    training = Training(torch.nn.Linear(1, 1), None, dataclasses.replace(TINY, lr=2.0, schedule=schedule))
    training._trainer = SimpleNamespace(estimated_stepping_batches=100)  # pyright: ignore[reportAttributeAccessIssue]
    factor = training.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert {step: factor(step) for step in expected} == pytest.approx(expected, abs=1e-3)


# --- what a user sees ---


def test_lightning_says_nothing_and_the_bar_shows_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pytorch_lightning.trainer.connectors import data_connector

    # on a machine of many cores Lightning asks for workers, which would not share the guide and the cache
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda _: 16)
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1)
    fit(drawn(0), drawn(2), tmp_path / "quiet", options, progress=False)
    assert "".join(capfd.readouterr()) == ""
    fit(drawn(0), drawn(2), tmp_path / "bar", options)
    shown = "".join(capfd.readouterr())
    assert "train_loss" in shown
    assert "val_dice" in shown
    assert not any(word in shown for word in ("Tip", "TPU", "litlogger", "Warning"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": "unet9"}, "unknown network 'unet9'; choose from unet"),
        ({"network_options": {"depth": 3}}, "depth"),
        ({"fusion": "add"}, "unknown fusion 'add'; choose from x_gfb"),
        ({"guide": "clip"}, "unknown guide 'clip'; choose from efficientnet_lite0"),
        ({"guide_weights": "random:x"}, "random:SEED"),
        ({"device": "gpu"}, "unknown device 'gpu'; choose from auto, cpu, cuda"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; choose from auto, fp32, bf16"),
    ],
)
def test_options_that_name_what_there_is_not_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit(drawn(0), drawn(2), tmp_path / "out", dataclasses.replace(TINY, **changes), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latents": "frozen"}, "unknown latents 'frozen'; choose from live, cached"),
        ({"normalize_stain": "henna"}, "unknown normalize_stain 'henna'; choose from none, macenko, reinhard"),
        ({"schedule": "step"}, "unknown schedule 'step'; choose from cosine, constant"),
        ({"batch": 0}, "batch must be positive, not 0"),
        ({"mpp": -1.0}, "mpp must be positive, not -1.0"),
        ({"patch_px": 100}, "patch_px must be a multiple of 32, not 100"),
        ({"context_px": -32}, "context_px must be a multiple of 32, not -32"),
        ({"ema": 1.0}, "ema must be 0 or more and below 1, not 1.0"),
        ({"gap_weight": 0.0}, "gap_weight must be positive, not 0.0"),
        ({"hard": -1.0}, "hard must lie between 0 and 4, not -1.0"),
        ({"mpp_range": (1.0, 0.25)}, "mpp_range must rise from above 0, not 1.0 to 0.25"),
        ({"mpp_range": (0.25, 1.0), "latents": "cached"}, "mpp_range needs latents live"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(TINY, **changes)


def test_a_run_needs_images_and_a_folder_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one image to train on and one to validate on"):
        fit(drawn(0), drawn(), tmp_path / "out", TINY, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: cannot be written"):
        fit(drawn(0), drawn(2), tmp_path / "file" / "out", dataclasses.replace(TINY, fusion="none"), progress=False)


def test_a_full_disk_and_a_loss_that_is_not_finite_end_a_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(TINY, fusion="none", epochs=1, steps_per_epoch=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "note_epoch", full)
        with pytest.raises(UserError, match="the run was cut .*No space left.*; repeat the command"):
            fit(drawn(0), drawn(2), tmp_path / "full", options, progress=False)
    monkeypatch.setattr(train, "dice_focal", lambda logits, *_: logits.sum() * torch.nan)
    with pytest.raises(UserError, match="the loss is no longer finite"):
        fit(drawn(0), drawn(2), tmp_path / "nan", options, progress=False)
