"""The average of the weights and the losses of pictures, by hand, on a model of one number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nuguide.augment import Augmentation
from nuguide.batches import Patches, Picture
from nuguide.callbacks import HardExamples, WeightAverage


class OneWeight(nn.Module):
    """A number, and how often it was set, as batch norm counts."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.value.fill_(value)
        self.seen += 1  # pyright: ignore[reportOperatorIssue]


def averaged(average: WeightAverage, values: list[float]) -> Any:
    """A run whose steps leave the weight at these values."""
    module: Any = SimpleNamespace(model=OneWeight())
    trainer: Any = None
    average.on_train_start(trainer, module)
    for value in values:
        module.model.set(value)
        average.on_train_batch_end(trainer, module, None, None, 0)
    return module


def test_the_average_by_hand() -> None:
    # from 0, with decays min(0.2, 2/11), min(0.2, 3/12), min(0.2, 4/13): 2/11, 0.2, 0.2
    average = WeightAverage(0.2)
    averaged(average, [1.0, 2.0, 3.0])
    one = 9 / 11
    two = 0.2 * one + 0.8 * 2
    assert average.average["value"].item() == pytest.approx(0.2 * two + 0.8 * 3)
    assert average.average["seen"].item() == 3


def test_a_long_warm_up_makes_the_average_follow() -> None:
    # after 100 steps at 1 nothing of where it began is left, though 0.9999^100 is 0.99
    average = WeightAverage(0.9999)
    averaged(average, [1.0] * 100)
    assert average.average["value"].item() > 0.9999


def test_the_model_has_the_average_while_it_is_validated_and_its_own_weights_after() -> None:
    average = WeightAverage(0.0)
    trainer: Any = None
    module = averaged(average, [1.0])
    module.model.set(5.0)
    average.on_validation_start(trainer, module)
    assert (module.model.value.item(), module.model.seen.item()) == (1.0, 1)
    average.on_validation_end(trainer, module)
    assert (module.model.value.item(), module.model.seen.item()) == (5.0, 2)
    assert average.average["value"].item() == 1.0


def test_an_average_goes_on_from_its_checkpoint() -> None:
    whole, first, second = (WeightAverage(0.5) for _ in range(3))
    averaged(whole, [1.0, 2.0, 3.0, 4.0])
    averaged(first, [1.0, 2.0])
    second.load_state_dict(first.state_dict())
    averaged(second, [3.0, 4.0])
    assert torch.equal(second.average["value"], whole.average["value"])
    assert second.steps == 4


def hard(power: float) -> HardExamples:
    pictures = [Picture(str(i), "all", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int32)) for i in range(2)]
    return HardExamples(Patches(pictures, 8, Augmentation(), seed=0), batch=4, power=power)


def test_the_recent_loss_of_a_picture_by_hand() -> None:
    callback = hard(1.0)
    numbers = [callback.patches.picture_of(i) for i in range(8)]
    assert set(numbers[:4]) == {0, 1}
    trainer: Any = SimpleNamespace(global_step=1)
    module: Any = None
    callback.on_train_batch_end(trainer, module, {"each": torch.tensor([0.2 if n == 0 else 0.6 for n in numbers[:4]])})
    assert callback.recent == pytest.approx([0.2, 0.6])     # the first loss of a picture counts whole
    trainer.global_step = 2
    callback.on_train_batch_end(trainer, module, {"each": torch.full((4,), 1.0)})
    times = [numbers[4:].count(n) for n in range(2)]
    assert callback.recent == pytest.approx([1 - 0.8 * 0.7 ** times[0], 1 - 0.4 * 0.7 ** times[1]])


def test_the_weights_change_at_the_start_of_an_epoch_and_from_a_checkpoint_alike() -> None:
    callback, other = hard(1.0), hard(1.0)
    nobody: Any = None
    callback.recent = np.array([0.1, 0.3])
    assert callback.patches.weights == pytest.approx([1 / 2, 1 / 2])
    callback.on_train_epoch_start(nobody, nobody)
    assert callback.patches.weights == pytest.approx([1 / 4, 3 / 4])
    callback.on_train_epoch_start(nobody, nobody)           # from the weights of the run, not those of the last epoch
    assert callback.patches.weights == pytest.approx([1 / 4, 3 / 4])
    other.load_state_dict(callback.state_dict())
    other.on_train_epoch_start(nobody, nobody)
    assert other.patches.weights == pytest.approx([1 / 4, 3 / 4])
