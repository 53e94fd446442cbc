"""A wider network that begins as a narrower one ends (Net2WiderNet; Chen, Goodfellow, Shlens, ICLR 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fusion import Attention, Concat

SPREAD = 0.5        # of the weights of copies, relative to their own


def widen(narrow: nn.Module, wide: nn.Module, seed: int = 0) -> nn.Module:
    """Give a wider network of the same kind the function of a narrower one; the wide one, in place.

    Each channel becomes r adjacent copies. What takes them in weighs them by shares that add to the old weight and
    differ at random, so that the copies learn apart. All logits are those of the narrow network, up to rounding, in
    evaluation and (but for drop-out) in training.

    Args:
        seed: of those shares.

    Raises:
        ValueError: transposed convolutions, or groups that differ; or a tensor of the wide
            network is not r times as long along its sides as its counterpart, r being one whole number for all,
            or equal to it: such as where a gate's channels are stacked with a guide's, which stay as many.
    """
    generator = torch.Generator().manual_seed(seed)
    old, new = narrow.state_dict(), wide.state_dict()
    if old.keys() != new.keys():
        raise ValueError("the two networks are not of the same kind")
    mixes = {f"{name}.mix.weight": part.norm.num_features for name, part in wide.named_modules()
             if isinstance(part, Concat)}
    for before, after in zip(narrow.modules(), wide.modules(), strict=True):
        if isinstance(after, nn.ConvTranspose2d):
            raise ValueError("transposed convolutions are not widened")
        if isinstance(after, nn.Conv2d) and after.groups not in (before.groups, after.in_channels):
            raise ValueError("its convolutions are grouped otherwise")
    factors = {
        after / before
        for name in new.keys() - mixes.keys()
        for before, after in zip(old[name].shape, new[name].shape, strict=True)
        if after != before
    }
    if any(factor != int(factor) for factor in factors) or len(factors) > 1:
        raise ValueError("its channels do not all grow by the same whole factor")
    factor = int(factors.pop()) if factors else 1
    made = {
        name: _spread(old[name], value.shape, factor, generator) for name, value in new.items() if name not in mixes
    }
    for name, task in mixes.items():                    # whose inputs from there on are the guide's, which stay as many
        own, guide = old[name][:, : task // factor], old[name][:, task // factor :]
        outputs = len(new[name])
        made[name] = torch.cat([
            _spread(own, (outputs, task, 1, 1), factor, generator),
            _spread(guide, (outputs, *guide.shape[1:]), factor, generator),
        ], dim=1)
    for name, part in wide.named_modules():
        if isinstance(part, Attention):         # products of longer tokens grow by r, their scale falls by sqrt(r)
            for which in ("weight", "bias"):
                made[f"{name}.query.{which}"] /= factor**0.5
    wide.load_state_dict(made)
    return wide


def _spread(value: Tensor, shape: tuple[int, ...], factor: int, generator: torch.Generator) -> Tensor:
    """A tensor, outputs first and inputs second, for `factor` copies of each channel where the shape asks for it."""
    if value.shape == shape:
        return value.clone()
    if value.shape[0] != shape[0]:
        value = value.repeat_interleave(factor, 0)
    if value.dim() < 2 or value.shape[1] == shape[1]:
        return value
    value = value.repeat_interleave(factor, 1) / factor
    noise = torch.randn(value.shape, generator=generator) * SPREAD * value.std()
    groups = noise.unflatten(1, (-1, factor))
    return value + (groups - groups.mean(2, keepdim=True)).flatten(1, 2)
