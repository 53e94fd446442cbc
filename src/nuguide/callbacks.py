"""What watches a training run: an average of the weights, and the pictures that are hard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from .batches import Patches, harder

NEWEST = 0.3                # share of the newest patch in the recent loss of its picture


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
