"""The training loss: soft Dice + focal, in equal parts, on logits.

Pixels with a target below 0 do not count, the others as much as their weight says, where one is given.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice of each channel over the whole batch, averaged over channels.

    logits, target, weight: (B, C, H, W), target in 0..1, or below 0 where it does not count. A perfect prediction gives
    0; `smooth` pixels are added above and below, so a channel that is empty in both gives 0 too.
    """
    counts, target = counted(target, weight)
    probability = logits.sigmoid()
    overlap = (probability * target * counts).sum((0, 2, 3))
    total = ((probability + target) * counts).sum((0, 2, 3))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def focal_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Mean of (1 - p_t)^gamma * cross entropy (Lin 2017), p_t the probability given to the true class.

    Taken over the pixels whose target is not below 0, by their weight; 0 where there is none.
    """
    counts, target = counted(target, weight)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = (1 - (-entropy).exp()) ** gamma * entropy * counts
    return loss.sum() / counts.sum().clamp(min=1)


def counted(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(How much each pixel counts, 0 where its target is below 0; the target with 0 where it does not)."""
    counts = (target >= 0).to(target.dtype)
    return counts if weight is None else counts * weight, target.clamp(min=0)


def dice_focal(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Dice + focal in equal parts (Swain 2024); logits in any float type, computed in fp32."""
    logits = logits.float()
    return dice_loss(logits, target, weight) + focal_loss(logits, target, weight)
