"""The networks that ours is compared with: their sizes by hand, and what makes each of them what it is."""

from __future__ import annotations

from math import e, exp

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nuguide.fusion import Cross, Guided, build_fusion
from nuguide.instances import targets
from nuguide.losses import dice_focal
from nuguide.networks import SegmentationNetwork, build_network, fold_batch_norm
from nuguide.networks.asppunet import AtrousPyramid
from nuguide.networks.awgunet import DenseNet121, SmoothUp, WaveletAttention, enlarged, enlarging_taps, haar
from nuguide.networks.blocks import KernelUnit, PreActivation
from nuguide.networks.ddunet import DDUNet
from nuguide.networks.hovernet import Dense, HoVerNet, Residual
from nuguide.networks.int8 import InputRanges, int8_available, quantizable, to_int8
from nuguide.networks.sharpunet import Sharpen

BASELINES = ["ddunet", "awgunet", "asppunet", "sharpunet", "hovernet"]


def network(name: str, width: int = 4, **options) -> SegmentationNetwork:
    torch.manual_seed(0)
    return build_network(name, 2, width=width, **options)


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def images(*size: int) -> Tensor:
    return 255 * torch.rand(size, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- sizes by hand ---


def unit(inputs: int, outputs: int, kernel: int = 3) -> int:
    """A convolution without bias, and the scale and shift of its batch norm."""
    return kernel**2 * inputs * outputs + 2 * outputs


def before(channels: int) -> int:
    """The scale and shift of a batch norm before a convolution."""
    return 2 * channels


def unet_encoder(w: int) -> int:
    levels = [w, 2 * w, 4 * w, 8 * w, 16 * w]
    return sum(unit(a, b) + unit(b, b) for a, b in zip([3, *levels[:-1]], levels, strict=True))


def unet_decoder(w: int) -> int:
    # at each level: from twice the channels up, then two after joining
    return sum(unit(2 * a, a) + unit(2 * a, a) + unit(a, a) for a in (w, 2 * w, 4 * w, 8 * w))


def sharpunet(w: int, classes: int) -> int:
    return unet_encoder(w) + unet_decoder(w) + w * classes + classes      # a U-Net's: the filter is fixed


def asppunet(w: int, classes: int) -> int:
    # four branches 16w -> 4w, and one 1x1 convolution of all of them
    return sharpunet(w, classes) + 4 * unit(16 * w, 4 * w) + unit(4 * 4 * w, 16 * w, kernel=1)


def ddunet(w: int, classes: int) -> int:
    return unet_encoder(w) + classes * (unet_decoder(w) + w + 1)          # each decoder has a head of its own


def densenet(k: int) -> int:
    total, channels = unit(3, 2 * k, kernel=7), 2 * k
    for layers in (6, 12, 24):
        for _ in range(layers):
            total += before(channels) + unit(channels, 4 * k, kernel=1) + 9 * 4 * k * k
            channels += k
        total += before(channels)
        if layers < 24:
            total += channels * channels // 2
            channels //= 2
    return total


def awgunet(w: int, classes: int) -> int:
    """With k = w / 2: skips of 3, 2k, 8k and 16k channels, 32k at the bottom, decoder levels of 2k, 4k, 8k and 16k."""
    k = w // 2
    total = densenet(k)
    for c in (3, 2 * k, 8 * k, 16 * k, 32 * k):
        narrow = max(c // 4, 8)
        up = 4 * (4 * c) * c + c                                           # 2x2 taps, 4c -> c
        separable = 9 * c + c * c + c
        total += up + 3 * separable + c + (c * narrow + narrow) + (narrow * c + c)
    for skip, out, wide in ((3, 2 * k, 4 * k), (2 * k, 4 * k, 8 * k), (8 * k, 8 * k, 16 * k), (16 * k, 16 * k, 32 * k)):
        taken = 2 * wide + skip
        total += (wide * wide + wide) + (4 * wide * wide + wide)           # 1x1 convolution, transposed 2x2
        total += unit(taken, out // 2, kernel=5) + unit(taken, out // 2) + unit(taken, out, kernel=1)
        total += (out * out + out) + unit(2 * out, out)
    return total + 2 * k * classes + classes


def hovernet_blocks(w: int) -> int:
    """The stem and the residual blocks; each unit is 1x1, 3x3, 1x1."""
    total, taken = unit(3, w, kernel=7), w
    for units, narrow in zip((3, 4, 6, 3), (w, 2 * w, 4 * w, 8 * w), strict=True):
        total += units * (unit(narrow, narrow) + narrow * 4 * narrow)
        total += unit(taken, narrow, kernel=1) + taken * 4 * narrow        # the first, with its shortcut
        total += (units - 1) * (before(4 * narrow) + unit(4 * narrow, narrow, kernel=1))
        total += before(4 * narrow)
        taken = 4 * narrow
    return total


def hovernet(w: int, classes: int) -> int:
    growth, groups = w // 2, {2: 1, 4: 2, 64: 4}[w]                        # what divides 4, 2w and w / 2
    branch = 0
    for skip, units in ((16 * w, 8), (8 * w, 4)):
        channels = skip // 4
        branch += 25 * skip * channels
        for _ in range(units):
            branch += before(channels) + unit(channels, 2 * w, kernel=1) + 25 * 2 * w * growth // groups
            channels += growth
        branch += before(channels) + channels * (skip // 2)
    branch += unit(4 * w, w, kernel=5) + w + 1
    return hovernet_blocks(w) + 32 * w * 16 * w + classes * branch


@pytest.mark.parametrize("size", [ddunet, awgunet, asppunet, sharpunet, hovernet], ids=lambda size: size.__name__)
@pytest.mark.parametrize(("width", "classes"), [(2, 2), (4, 1), (64, 2)])
def test_a_network_has_the_parameters_of_its_structure(size, width: int, classes: int) -> None:
    with torch.device("meta"):
        assert count(build_network(size.__name__, classes, width=width)) == size(width, classes)


def test_the_width_of_awgunet_is_twice_a_growth_rate() -> None:
    with pytest.raises(ValueError, match="must be even, not 3"):
        build_network("awgunet", 2, width=3)


def test_the_encoder_of_awgunet_is_the_published_densenet_121_up_to_its_third_block() -> None:
    # Huang 2017's has 6,953,856 parameters before its classifier. Not ours: the third halving, 1024 x 512; the fourth
    # block, whose 16 layers take 512 + 32 i channels (norm, 1x1 convolution to 128, norm, 3x3 convolution to 32); its
    # batch norm of 1024.
    fourth = sum(2 * c + c * 128 + 2 * 128 + 9 * 128 * 32 for c in range(512, 1024, 32))
    with torch.device("meta"):
        assert count(DenseNet121(32, "relu")) == 6_953_856 - 1024 * 512 - fourth - 2 * 1024


def test_the_encoder_of_hovernet_is_a_pre_activated_resnet_50() -> None:
    # ResNet-50 has 23,508,032 parameters before its classifier. Batch norms before convolutions save one of 4n
    # channels in each of four blocks, n = 64, 128, 256, 512; 2048 -> 1024 at the bottom is HoVer-Net's own.
    with torch.device("meta"):
        net = HoVerNet(2, width=64)
    assert count(net.stem) + count(net.blocks) == 23_508_032 - sum(2 * 4 * n for n in (64, 128, 256, 512))
    assert count(net.bottom) == 2048 * 1024
    main = [m for name, m in net.blocks.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    assert len(main) + 1 + 1 == 50                                         # with the stem and the classifier it lacks


# --- what all can do ---


def one_nucleus() -> tuple[Tensor, Tensor]:
    """A dark disk on a pale ground (1, 3, 32, 32), and its targets (1, 2, 32, 32)."""
    rows, columns = np.mgrid[:32, :32]
    labels = ((rows - 14) ** 2 + (columns - 17) ** 2 < 64).astype(np.int32)
    image = torch.tensor([225.0, 180.0, 210.0]).view(3, 1, 1) - 110 * torch.from_numpy(labels)
    return image[None], torch.from_numpy(targets(labels))[None]


@pytest.mark.parametrize("name", BASELINES)
def test_a_few_steps_on_one_nucleus_lower_the_loss(name: str) -> None:
    net, (image, target) = network(name), one_nucleus()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        loss = dice_focal(net(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("fusion", ["cross", "x_gfb"])
def test_a_guide_teaches_and_is_heard(name: str, fusion: str) -> None:
    net = network(name)
    block = build_fusion(fusion, net.bottleneck_channels, 6)
    model, image, latent = Guided(net, block), images(2, 3, 41, 50), normal(2, 6, 4, 5)
    if isinstance(block, Cross):
        nn.init.normal_(block.attention.out.weight)                        # as after some steps: it starts at zero
    logits = model(image, latent)
    logits.square().mean().backward()
    assert logits.shape == (2, 2, 41, 50)
    assert not [key for key, p in block.named_parameters() if p.grad is None]
    assert sum(float(p.grad.abs().sum()) for p in block.parameters() if p.grad is not None) > 0
    assert not torch.equal(model.eval()(image, latent), model(image, -latent))


@pytest.mark.parametrize("name", BASELINES)
def test_batch_norm_folds_under_gated_activations_too(name: str) -> None:
    net, image = network(name, activation="glu", decoder_activation="glu"), images(1, 3, 32, 48)
    with torch.no_grad():
        net.train()(images(4, 3, 32, 32))
        expected = net.eval()(image)
        assert float((fold_batch_norm(net)(image) - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1)


@pytest.mark.skipif(not int8_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("name", BASELINES)
def test_in_8_bits_probabilities_stay_within_a_few_percent(name: str) -> None:
    net, image = network(name), images(2, 3, 48, 48)
    with torch.no_grad():
        for _ in range(3):
            net.train()(image)                                             # so that batch norm has seen something
    net.eval()
    with torch.inference_mode():
        with InputRanges(net) as seen:
            expected = net(image).sigmoid()
        assert set(seen.ranges) == set(quantizable(net))
        found = to_int8(fold_batch_norm(net), seen.ranges)(image).sigmoid()
    assert 0 < float((found - expected).abs().mean()) < 0.02


@pytest.mark.parametrize("name", BASELINES)
def test_in_bf16_probabilities_stay_within_a_few_percent(name: str) -> None:
    net, image = network(name), images(2, 3, 48, 48)
    with torch.no_grad():
        net.train()(image)
        expected = net.eval()(image).sigmoid()
        with torch.autocast("cpu", torch.bfloat16):
            found = net(image)
    assert found.dtype is torch.bfloat16
    assert 0 < float((found.float().sigmoid() - expected).abs().mean()) < 0.02


# --- the parts of several ---


def test_a_kernel_unit_rounds_its_size_up_and_takes_its_taps_apart() -> None:
    x = normal(1, 2, 7, 10)
    assert KernelUnit(2, 3, kernel=7, stride=2)(x).shape == (1, 3, 4, 5)
    made = KernelUnit(1, 1, "leaky_relu", dilation=3).eval()
    nn.init.ones_(made.conv.weight)
    impulse = F.pad(torch.ones(1, 1, 1, 1), (4, 4, 4, 4))
    assert made(impulse)[0, 0].nonzero().tolist() == [[i, j] for i in (1, 4, 7) for j in (1, 4, 7)]


def test_a_gated_pre_activation_keeps_every_channel() -> None:
    # untrained, value and gate are the same: x * sigmoid(x) of the normalized channel
    x = normal(4, 3, 8, 8)
    expected = F.silu(F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(PreActivation(3, "glu")(x), expected)


# --- DDU-Net ---


@pytest.mark.parametrize(("name", "parts"), [("ddunet", "decoders"), ("hovernet", "branches")])
def test_each_channel_has_a_decoder_of_its_own_and_all_share_the_encoder(name: str, parts: str) -> None:
    net = network(name)
    assert isinstance(net, DDUNet | HoVerNet)
    owned = [set(map(id, part.parameters())) for part in getattr(net, parts)]
    assert len(owned) == 2
    assert not owned[0] & owned[1]
    assert count(getattr(net, parts)[0]) == count(getattr(net, parts)[1])
    logits = net(images(2, 3, 32, 32))
    for channel in range(2):
        gradients = torch.autograd.grad(
            logits[:, channel].square().sum(), list(net.parameters()), retain_graph=True, materialize_grads=True
        )
        moved = {id(p) for p, g in zip(net.parameters(), gradients, strict=True) if bool(g.abs().sum() > 0)}
        assert owned[channel] <= moved
        assert not owned[1 - channel] & moved
        shared = {id(p) for key, p in net.named_parameters() if not key.startswith((parts, "head"))}
        assert shared <= moved


# --- AWGUNet ---


def test_haar_of_one_cell_by_hand() -> None:
    cell = torch.tensor([[1.0, 2.0], [3.0, 5.0]])[None, None]
    # half of 11, of 1 - 2 + 3 - 5, of 1 + 2 - 3 - 5 and of 1 - 2 - 3 + 5
    assert haar(cell).flatten().tolist() == [5.5, -1.5, -2.5, 0.5]


def test_haar_groups_the_bands_of_all_channels_and_keeps_their_place() -> None:
    x = torch.zeros(1, 2, 4, 6)
    x[0, 1, 2:, 4:] = 3.0                                                  # one constant cell of the second channel
    bands = haar(x)
    assert bands.shape == (1, 8, 2, 3)
    assert bands.nonzero().tolist() == [[0, 1, 1, 2]]
    assert float(bands[0, 1, 1, 2]) == 6.0                                 # 4 x 3 / 2


def test_haar_keeps_energy_and_can_be_undone() -> None:
    x = normal(2, 3, 6, 8)
    bands = haar(x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    # the transform of a cell is its own inverse
    mean, across, down, diagonal = bands.chunk(4, dim=1)
    again = haar(F.pixel_shuffle(torch.stack([mean, across, down, diagonal], dim=2).flatten(1, 2), 2))
    torch.testing.assert_close(F.pixel_shuffle(again.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), 2), x)


def test_attention_of_untaught_weights_takes_half_of_a_half() -> None:
    attention = WaveletAttention(3)
    for p in attention.parameters():
        nn.init.zeros_(p)
    x = normal(2, 3, 5, 7)                                                 # odd sides, for the transform to fill up
    torch.testing.assert_close(attention(x), x / 4)


def test_attention_weighs_channels_by_their_weighted_mean_and_places_by_their_wavelets() -> None:
    attention = WaveletAttention(1)
    for p in attention.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        attention.mean_weights.fill_(3.0)
        attention.squeeze.weight[0] = attention.excite.weight[0, 0] = 1.0
        x = torch.full((1, 1, 4, 4), 2.0)
        by_mean = 1 / (1 + exp(-3 * 2))
        torch.testing.assert_close(attention(x), x * 0.5 * by_mean)
        # the band of edges across columns, brought back to the left column of each cell, and nothing else
        attention.mean_weights.zero_()
        attention.up.weight[1, 0, :, 0] = 1.0
        for part in (attention.of_wavelets, attention.of_both):
            of_each, of_all, _ = part.parameters()
            of_each[0, 0, 1, 1] = of_all[0, 0, 0, 0] = 1.0
        x[..., 2, 0] = 4.0                                                 # (4 - 2 + 2 - 2) / 2 = 1 in this cell
        places = torch.full((4, 4), 0.5)
        places[2:, 0] = 1 / (1 + exp(-1))
        torch.testing.assert_close(attention(x)[0, 0], x[0, 0] * places * 0.5)


def test_enlarging_taps_by_hand() -> None:
    taps = enlarging_taps()
    torch.testing.assert_close(taps.sum(-1), torch.ones(2, 2))
    torch.testing.assert_close(taps[:, 0], taps[:, 1].flip(-1))            # the sample before mirrors the one after
    # the new sample lies 1/4 from its own and 3/4 from the next: exp(-(1/16 - 9/16) / (2 / 4)) = e times the weight
    assert float(taps[0, 1, 5] / taps[0, 1, 6]) == pytest.approx(e, rel=1e-5)
    # sinc(1/4) sinc(1/20) to sinc(3/4) sinc(3/20)
    expected = float(torch.tensor([0.25, 0.05]).sinc().prod() / torch.tensor([0.75, 0.15]).sinc().prod())
    assert float(taps[1, 1, 5] / taps[1, 1, 6]) == pytest.approx(expected, rel=1e-4)


def test_enlarging_keeps_a_constant_and_lanczos_a_wave() -> None:
    gaussian, lanczos = enlarging_taps()
    for taps in (gaussian, lanczos):
        torch.testing.assert_close(enlarged(torch.full((1, 2, 3, 1), 7.0), taps), torch.full((1, 2, 6, 2), 7.0))
    columns = torch.arange(40.0)
    wave = (columns * 2 * torch.pi / 6).cos().expand(1, 1, 4, 40)          # a period of 6 samples
    fine = ((torch.arange(80.0) - 0.5) / 2 * 2 * torch.pi / 6).cos()
    off = {}
    for name, large in (
        ("lanczos", enlarged(wave, lanczos)), ("bilinear", F.interpolate(wave, scale_factor=2, mode="bilinear"))
    ):
        assert large.shape == (1, 1, 8, 80)
        off[name] = float((large[0, 0, :, 10:-10] - fine[10:-10]).abs().max())
    assert off["lanczos"] < 0.02 < 0.05 < off["bilinear"]


def test_rows_and_columns_are_enlarged_by_the_same_taps() -> None:
    """A sample far from the border becomes the product of its taps along rows and along columns, whichever way."""
    lone = torch.zeros(1, 2, 15, 13)
    lone[0, 1, 7, 6] = 1
    for taps in enlarging_taps():
        line = taps.flip(1).T.flatten()                                   # from two samples per tap, the far one first
        made = enlarged(lone, taps)
        torch.testing.assert_close(made[0, 1, 4:26, 2:24], torch.outer(line, line))
        assert made[0, 0].count_nonzero() == 0
        torch.testing.assert_close(enlarged(lone.mT, taps), made.mT)


def test_mixing_before_enlarging_is_mixing_after() -> None:
    torch.manual_seed(0)
    up, x = SmoothUp(3), normal(2, 3, 4, 5)
    after = up.mix((enlarged(x, up.taps[0]) + enlarged(x, up.taps[1])) / 2)
    found = up(x)
    assert found.shape == (2, 6, 8, 10)
    torch.testing.assert_close(found[:, :3], after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 3:], up.learned(x))


# --- ASPPU-Net ---


def test_a_pyramid_looks_at_eight_cells_at_each_of_its_distances() -> None:
    torch.manual_seed(0)
    pyramid, x = AtrousPyramid(4, (1, 2, 4, 8), "relu").eval(), torch.zeros(1, 4, 17, 17)
    x[..., 8, 8] = torch.nan                                               # spreads to all that sees it
    seen = {(i - 8, j - 8) for i, j in pyramid(x)[0].isnan().any(0).nonzero().tolist()}
    expected = {(i * rate, j * rate) for rate in (1, 2, 4, 8) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert len(expected) == 4 * 8 + 1
    assert seen == expected


# --- Sharp U-Net ---


def test_sharpening_an_impulse_and_a_ramp_by_hand() -> None:
    x = torch.zeros(1, 2, 5, 5)
    x[0, 1, 2, 2] = 1
    around = torch.tensor([[0, 0, 0, 0, 0], [0, -1, -1, -1, 0], [0, -1, 8, -1, 0], [0, -1, -1, -1, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(Sharpen()(x)[0], torch.stack([torch.zeros(5, 5), around.float()]))
    # at the border a ramp's repeated column lacks a step of 1 from three neighbors
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    assert Sharpen()(ramp)[0, 0].tolist() == 4 * [[-3, 0, 0, 0, 3]]


def test_a_sharp_unet_does_not_see_the_level_of_its_skips() -> None:
    net = network("sharpunet").eval()
    with torch.no_grad():
        *skips, deepest = net.encode(images(1, 3, 32, 32))
        expected = net.decode([*skips, deepest])
        torch.testing.assert_close(net.decode([*(h + 0.5 for h in skips), deepest]), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(net.decode([*(2 * h for h in skips), deepest]), expected, atol=1e-2)


# --- HoVer-Net ---


def test_a_residual_unit_adds_to_what_it_takes() -> None:
    torch.manual_seed(0)
    x = normal(2, 8, 6, 6)
    inner = Residual(8, 2, "relu", first=False)
    nn.init.zeros_(inner.widen.weight)
    assert torch.equal(inner(x), x)
    first = Residual(8, 4, "relu", first=True, stride=2)
    nn.init.zeros_(first.widen.weight)
    torch.testing.assert_close(first(x), first.shortcut(x))
    assert first(x).shape == (2, 16, 3, 3)


@pytest.mark.parametrize(("width", "groups"), [(2, 1), (4, 2), (8, 4), (9, 2), (64, 4)])
def test_a_dense_unit_keeps_what_it_takes_and_works_in_up_to_four_groups(width: int, groups: int) -> None:
    dense, x = Dense(6, width, width // 2, "relu"), normal(1, 6, 5, 5)
    assert dense.look.groups == groups
    made = dense.eval()(x)
    assert made.shape == (1, 6 + width // 2, 5, 5)
    assert torch.equal(made[:, :6], x)
