"""What watches a training run: what it keeps, an average of the weights, and the pictures that are hard."""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from . import checkpoint
from .batches import Patches, harder
from .checkpoint import ModelSpec
from .networks.unet3plus import UNet3Plus
from .types import UserError

NEWEST = 0.3                # share of the newest patch in the recent loss of its picture


class KeepModel(Callback):
    """Writes the model folder as `keep` of the options says; metrics and curves after every epoch.

    For the mean, the best model so far waits in a folder of its own, which the last epoch's is joined with; half
    way, what training began with does, and is joined with every epoch's.
    """

    def __init__(self, folder: Path, spec: ModelSpec, deep_supervision: bool = False, keep: str = "best"):
        self.folder, self.spec, self.deep_supervision, self.keep = folder, spec, deep_supervision, keep
        self.best = -1.0

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.keep == "halfway" and trainer.current_epoch == 0 and trainer.is_global_zero:
            self._save(self.folder / "start", self._model(pl_module), {})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics["val_dice"])
        better, self.best = score > self.best, max(score, self.best)
        if not trainer.is_global_zero:
            return
        facts = {"val_dice_at_training_resolution": round(score, 4), "epoch": trainer.current_epoch}
        kept = self._model(pl_module)
        if self.keep == "halfway":
            joined = checkpoint.mean(kept, self.folder / "start")
            self._save(self.folder / "model", joined, facts | {"mean_with_start": True})
            return
        best = self.folder / ("best" if self.keep == "mean" else "model")
        if better or self.keep == "last":
            self._save(best, kept, facts)
        if self.keep == "mean" and trainer.current_epoch == (trainer.max_epochs or 0) - 1:
            origin = checkpoint.read_spec(best).origin
            self._save(self.folder / "model", checkpoint.mean(kept, best), facts | {"mean_with_epoch": origin["epoch"]})

    def _model(self, pl_module: lightning.LightningModule) -> nn.Module:
        model = pl_module.model
        assert isinstance(model, nn.Module)
        return without_side_heads(model) if self.deep_supervision else model

    def _save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        checkpoint.save(folder, model, dataclasses.replace(self.spec, origin=self.spec.origin | facts))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_dice")}
        if not math.isfinite(scores["train_loss"]):
            raise UserError(f"{self.folder}: the loss is no longer finite; train anew with a lower lr or in fp32")
        if not trainer.is_global_zero:
            return
        note_epoch(self.folder / "metrics.csv", {"epoch": trainer.current_epoch, "step": trainer.global_step, **scores})
        draw_curves(self.folder / "metrics.csv", self.folder / "curves.png")


def without_side_heads(model: nn.Module) -> nn.Module:
    """A copy of a model without the heads that deep supervision alone needs."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, UNet3Plus):
            part.side_heads = nn.ModuleList()
    return model


def note_epoch(metrics: Path, row: dict[str, float]) -> None:
    """Add a row to the metrics; rows of this epoch and later ones, left by a run that was cut, go."""
    rows: list[dict] = []
    if metrics.is_file():
        with metrics.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
    written = metrics.with_suffix(".tmp")
    with written.open("w", newline="") as file:
        table = csv.DictWriter(file, list(row), extrasaction="ignore")
        table.writeheader()
        table.writerows([*rows, row])
    os.replace(written, metrics)


def draw_curves(metrics: Path, picture_path: Path) -> None:
    """Training loss and validation Dice over epochs, as a PNG."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.read_csv(metrics)
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), ("train_loss", "val_dice"), ("training loss", "validation Dice"), strict=True
    ):
        axes.plot(table["epoch"] + 1, table[column], marker=".")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=110)


class WeightAverage(Callback):
    """An exponential moving average of the weights, which the model has while it is validated and kept.

    After step t it moves towards the weights by 1 - d, where d = min(decay, (1 + t) / (10 + t)), so that it soon
    forgets where training began. Running means of batch norm are averaged alike; counters are copied.

    What saves the model after a validation must stand before this in the list of callbacks.

    Args:
        decay: d in the long run, 0..1.
    """

    def __init__(self, decay: float):
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.average = state_dict["steps"], state_dict["average"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        now = weights_of(pl_module)
        self.average = {name: self.average.get(name, value).to(value.device, copy=True) for name, value in now.items()}

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in weights_of(pl_module).items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._exchange(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._exchange(pl_module)

    def _exchange(self, pl_module: lightning.LightningModule) -> None:
        """The model gets the average, and what it had is kept in its place."""
        with torch.no_grad():
            for name, value in weights_of(pl_module).items():
                held = value.clone()
                value.copy_(self.average[name])
                self.average[name] = held


def weights_of(pl_module: lightning.LightningModule) -> dict[str, Tensor]:
    """The weights and buffers of the model that a run trains, not copied."""
    model = pl_module.model
    assert isinstance(model, nn.Module)
    return {name: value.detach() for name, value in model.state_dict().items()}


class HardExamples(Callback):
    """Draws pictures of high recent loss more often, anew at the start of every epoch; see `batches.harder`.

    The recent loss of a picture is the mean focal loss of its patches, each new one counting 0.3. It is part of the
    checkpoint, and the epochs of a run draw by what was known at their start; so a resumed run draws what an unbroken
    one draws.

    Args:
        patches: what the run draws; its weights are changed. batch: patches in a batch. power: see `batches.harder`.
    """

    def __init__(self, patches: Patches, batch: int, power: float):
        self.patches, self.batch, self.power = patches, batch, power
        self.weights = patches.weights
        self.recent = np.full(len(patches.pictures), np.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent = np.array(state_dict["recent"])

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.patches.weights = harder(self.weights, self.recent, self.power)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, *_: Any
    ) -> None:
        first = (trainer.global_step - 1) * self.batch
        for index, loss in enumerate(outputs["each"].tolist(), first):
            number = self.patches.picture_of(index)
            before = self.recent[number]
            self.recent[number] = loss if np.isnan(before) else before + NEWEST * (loss - before)
