"""A widened network does what the narrow one did, and its copies learn apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nuguide.fusion import FinerGuidance, Guided, build_fusion, feature_shapes
from nuguide.networks import build_network
from nuguide.widen import widen

GUIDE_CHANNELS = 6


def unguided(width: int, name: str = "eunet3plus", **options) -> nn.Module:
    torch.manual_seed(width)
    return build_network(name, 2, width=width, **options)


def guided(width: int, fusion: str = "cross") -> nn.Module:
    """With the fusion "pyramid", concatenated, and of the guide's channels one at stride 8, too, four places a cell."""
    torch.manual_seed(width)
    network = build_network("eunet3plus", 2, width=width)
    finer = None
    if fusion == "pyramid":
        channels, strides = zip(*feature_shapes(network), strict=True)
        finer = FinerGuidance(strides, channels, [(1, 2)])
    own = GUIDE_CHANNELS - (4 if finer else 0)
    name = "concat" if finer else fusion
    model = Guided(network, build_fusion(name, network.bottleneck_channels, own), finer=finer)
    for parameter in model.fusion.parameters():
        nn.init.normal_(parameter, std=0.3)             # its output starts at zero otherwise
    return model


def used(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """With running means that are not those of a fresh network."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    return model.eval()


IMAGE = 255 * torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
LATENT = torch.randn(2, GUIDE_CHANNELS, 3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", ["unet", "unet3plus", "eunet3plus", "ddunet", "asppunet", "sharpunet"])
def test_a_wider_network_begins_with_the_same_logits(name: str, factor: int) -> None:
    narrow = used(unguided(4, name), IMAGE)
    wide = widen(narrow, unguided(4 * factor, name)).eval()
    torch.testing.assert_close(wide(IMAGE), narrow(IMAGE), atol=1e-3, rtol=1e-3)
    assert sum(p.numel() for p in wide.parameters()) > 0.9 * factor**2 * sum(p.numel() for p in narrow.parameters())


@pytest.mark.parametrize("fusion", ["cross", "concat", "pyramid"])
def test_a_guided_network_keeps_what_the_guide_tells_it(fusion: str) -> None:
    narrow = used(guided(4, fusion), IMAGE, LATENT)
    wide = widen(narrow, guided(8, fusion)).eval()
    torch.testing.assert_close(wide(IMAGE, LATENT), narrow(IMAGE, LATENT), atol=1e-3, rtol=1e-3)
    away = (narrow(IMAGE, LATENT) - narrow(IMAGE, -LATENT)).abs().max()
    assert away > 0.01                                  # the guide matters here


def test_copies_of_a_channel_learn_apart() -> None:
    wide = widen(used(unguided(4), IMAGE), unguided(8)).train()
    wide(IMAGE).square().mean().backward()
    for name, parameter in wide.named_parameters():
        if parameter.dim() == 4 and "encoder" in name:
            gradient = parameter.grad
            assert gradient is not None
            one, other = gradient.unflatten(0, (-1, 2)).unbind(1)
            assert (one - other).abs().mean() > 0.05 * gradient.abs().mean()


def test_the_seed_draws_the_shares() -> None:
    narrow = used(unguided(4), IMAGE)
    one, same, other = (widen(narrow, unguided(8), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("narrow", "wide", "told"),
    [
        (lambda: unguided(4), lambda: unguided(6), "do not all grow by the same whole factor"),
        (lambda: unguided(8), lambda: unguided(4), "do not all grow by the same whole factor"),
        (lambda: guided(4, "x_gfb"), lambda: guided(8, "x_gfb"), "do not all grow by the same whole factor"),
        (lambda: unguided(4, "unet"), lambda: unguided(8), "not of the same kind"),
        (lambda: unguided(4, "awgunet"), lambda: unguided(8, "awgunet"), "transposed convolutions"),
        (lambda: unguided(4, "hovernet"), lambda: unguided(8, "hovernet"), "grouped otherwise"),
    ],
)
def test_what_cannot_be_widened_is_refused(narrow, wide, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        widen(narrow(), wide())
