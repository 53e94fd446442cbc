"""The loss by hand on masks of a few pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nuguide.losses import dice_focal, dice_loss, focal_loss

SURE = 50.0                                              # a logit whose sigmoid is 0 or 1 in fp32


def logit(p: float | Tensor) -> Tensor:
    return torch.logit(torch.as_tensor(p))


def mask(seed: int = 0, size: int = 32) -> Tensor:
    """(2, 2, size, size), a third of it nucleus."""
    return (torch.rand(2, 2, size, size, generator=torch.Generator().manual_seed(seed)) < 1 / 3).float()


def test_a_perfect_mask_costs_nothing_and_its_opposite_one() -> None:
    target = mask()
    assert float(dice_loss(SURE * (2 * target - 1), target)) == pytest.approx(0, abs=1e-6)
    # no overlap: (0 + 1) / (2048 + 1) is left of the score of each channel
    assert float(dice_loss(-SURE * (2 * target - 1), target)) == pytest.approx(1 - 1 / 2049, abs=1e-6)
    assert float(focal_loss(SURE * (2 * target - 1), target)) == pytest.approx(0, abs=1e-6)


def test_dice_loss_of_four_pixels_by_hand() -> None:
    # p = .5 .5 / .5 0, t = 1 0 / 1 1: overlap 1, sums 1.5 + 3. 1 - (2 + 1) / (4.5 + 1) = 5/11; without smoothing 5/9
    p = logit(torch.tensor([[[[0.5, 0.5], [0.5, 0.0]]]])).clamp(min=-SURE)
    t = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    assert float(dice_loss(p, t)) == pytest.approx(5 / 11)
    assert float(dice_loss(p, t, smooth=0)) == pytest.approx(5 / 9)


def test_dice_loss_is_the_mean_over_channels_and_pools_the_batch() -> None:
    # first channel perfect, second missed altogether: 4 true pixels, 1 - 1/5. Over two images it is 1 - 1/9.
    target = torch.ones(1, 2, 2, 2)
    logits = torch.stack([torch.full((2, 2), SURE), torch.full((2, 2), -SURE)])[None]
    assert float(dice_loss(logits, target)) == pytest.approx((0 + 4 / 5) / 2)
    assert float(dice_loss(logits.repeat(2, 1, 1, 1), target.repeat(2, 1, 1, 1))) == pytest.approx((0 + 8 / 9) / 2)


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_focal_loss_of_an_undecided_pixel_is_a_quarter_of_ln_2(truth: float) -> None:
    logits, target = torch.zeros(1, 1, 3, 3), torch.full((1, 1, 3, 3), truth)
    assert float(focal_loss(logits, target)) == pytest.approx(0.25 * math.log(2))


def test_weights_count_pixels_several_times() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 2, 4, 4, generator=rng), torch.randint(-1, 2, (2, 2, 4, 4), generator=rng).float()
    weight = torch.ones_like(target)
    weight[..., 2:] = 3.0
    longer, wanted = (torch.cat([part, part[..., 2:], part[..., 2:]], 3) for part in (logits, target))
    for loss in (dice_loss, focal_loss, dice_focal):
        assert float(loss(logits, target, weight)) == pytest.approx(float(loss(longer, wanted)), rel=1e-5)
        assert float(loss(logits, target, torch.ones_like(target))) == pytest.approx(float(loss(logits, target)))


def test_focal_loss_of_a_confident_pixel_nearly_vanishes() -> None:
    # p = 0.9: 0.1^2 x -ln 0.9; the same mistaken: 0.9^2 x -ln 0.1, 1770 times as much
    target = torch.ones(1, 1, 1, 1)
    assert float(focal_loss(logit(0.9).view(1, 1, 1, 1), target)) == pytest.approx(0.01 * -math.log(0.9), rel=1e-4)
    assert float(focal_loss(logit(0.1).view(1, 1, 1, 1), target)) == pytest.approx(0.81 * -math.log(0.1), rel=1e-4)


def test_an_empty_target_found_empty_costs_nothing_and_every_false_pixel_something() -> None:
    target = torch.zeros(1, 1, 4, 4)
    assert float(dice_focal(torch.full((1, 1, 4, 4), -SURE), target)) == pytest.approx(0, abs=1e-6)
    one = torch.full((1, 1, 4, 4), -SURE)
    one[0, 0, 0, 0] = SURE
    assert float(dice_loss(one, target)) == pytest.approx(1 / 2)               # 1 - (0 + 1) / (1 + 1)


def test_the_loss_is_dice_plus_focal_in_fp32() -> None:
    logits, target = torch.randn(2, 2, 8, 8), mask(size=8)
    found = dice_focal(logits.bfloat16(), target)
    assert found.dtype is torch.float32
    exact = logits.bfloat16().float()
    assert float(found) == pytest.approx(float(dice_loss(exact, target) + focal_loss(exact, target)))


def test_the_nearer_the_truth_the_lower_the_loss() -> None:
    target = mask()
    toward = 2 * target - 1
    losses = [float(dice_focal(confidence * toward, target)) for confidence in (-4, -2, -1, 0, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1


def test_gradients_push_each_pixel_toward_its_truth_even_when_sure_and_stay_finite() -> None:
    logits = torch.tensor([[[[0.0, 0.0], [90.0, -90.0]]]], requires_grad=True)
    dice_focal(logits, torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    (up, down), (sure_and_wrong, _) = logits.grad[0, 0].tolist()
    assert up < 0 < down
    assert sure_and_wrong > 0


def test_pixels_without_a_target_do_not_count() -> None:
    # the right half is ignored: the loss is that of the left half, whatever is said or was true there
    logits, target = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(1)), mask(size=16)[:, :, :8]
    halved = target.clone()
    halved[..., 8:] = -1
    said = logits.clone()
    said[..., 8:] += 5
    expected = dice_focal(logits[..., :8], target[..., :8])
    assert float(dice_focal(logits, halved)) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(dice_focal(said, halved), dice_focal(logits, halved))
    assert float(dice_focal(logits, target)) != pytest.approx(float(expected), rel=1e-3)
    assert float(focal_loss(logits, torch.full_like(target, -1))) == 0


def test_no_gradient_comes_from_what_does_not_count() -> None:
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    target = torch.ones(1, 2, 4, 4)
    target[..., 0] = -1
    dice_focal(logits, target).backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] == 0).all()
    assert (logits.grad[..., 1:] != 0).all()
