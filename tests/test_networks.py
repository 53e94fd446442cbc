"""Every network's contract, the sizes of U-Net3+ by hand, and the parts that networks are made of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nuguide.networks import NETWORKS, SegmentationNetwork, build_network, fold_batch_norm
from nuguide.networks import blocks as parts
from nuguide.networks.unet3plus import UNet3Plus


def network(name: str, seed: int = 0, **options) -> SegmentationNetwork:
    """A network of width 2 with two classes."""
    torch.manual_seed(seed)
    return build_network(name, 2, **({"width": 2} | options))


def images(*size: int, seed: int = 0) -> Tensor:
    return 255 * torch.rand(size, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def used_norms(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with batch norms as training leaves them: no map is the identity."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, low in ((norm.weight.data, 0.5), (norm.running_var, 0.5), (norm.bias.data, -0.5)):
                assert values is not None
                values.copy_(low + torch.rand(values.shape, generator=generator))
    return module.eval()


# --- the contract of every network ---


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(32, 32), (50, 70), (1, 17)])
def test_logits_have_the_size_of_the_image(name: str, size: tuple[int, int]) -> None:
    assert network(name).eval()(images(2, 3, *size)).shape == (2, 2, *size)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    net = network(name, dropout=0.0)
    net(images(2, 3, 50, 70)).square().mean().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", NETWORKS)
def test_encode_halves_down_to_its_stride_and_decode_uses_every_level(name: str) -> None:
    net = network(name).eval()
    features = net.encode(images(1, 3, 64, 96))
    sizes = [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
    assert [tuple(f.shape[-2:]) for f in features] == sizes[: 4 if name == "hovernet" else 5]
    assert net.stride * features[-1].shape[-1] == 96
    assert features[-1].shape[1] == net.bottleneck_channels == 32             # 16 times the width of 2
    leaves = [f.detach().requires_grad_() for f in features]
    net.decode(list(leaves)).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_weights_give_the_same_logits_in_another_network(name: str, tmp_path: Path) -> None:
    first, second = network(name, seed=0).eval(), network(name, seed=1).eval()
    image = images(1, 3, 33, 40)
    assert not torch.equal(first(image), second(image))
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, tmp_path / "net.safetensors")
    second.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(first(image), second(image))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("activation", parts.ACTIVATIONS)
def test_every_activation_works_in_encoder_and_decoder(name: str, activation: str) -> None:
    net = network(name, activation=activation, decoder_activation=activation).eval()
    plain = network(name, activation="relu", decoder_activation="relu").eval()
    image = images(1, 3, 32, 32)
    logits = net(image)
    assert logits.shape == (1, 2, 32, 32)
    assert torch.equal(logits, plain(image)) == (activation == "relu")


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_an_odd_image_by_hand_changes_nothing(name: str) -> None:
    # 50 x 70 becomes 64 x 80 with a stride of 16, 56 x 72 with one of 8, its last row and column repeated
    net, image = network(name).eval(), images(1, 3, 50, 70)
    padded = F.pad(image, {16: (0, 10, 0, 14), 8: (0, 2, 0, 6)}[net.stride], mode="replicate")
    assert torch.equal(net(image), net.decode(net.encode(padded))[..., :50, :70])


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_in_training_only(name: str) -> None:
    # of width 4, since at random weights the few channels of a narrower one may all be cut off by ReLU
    net, image = network(name, width=4, dropout=0.5), images(2, 3, 32, 32)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()                                  # so that drop-out is all that varies
    assert not torch.equal(net(image), net(image))
    net.eval()
    assert torch.equal(net(image), net(image))


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown network 'unet4'; choose from unet, unet3plus, eunet3plus"):
        build_network("unet4", 2)
    with pytest.raises(ValueError, match="unknown activation 'tanh'; choose from relu, leaky_relu, silu, glu"):
        build_network("unet", 2, activation="tanh")
    with pytest.raises(ValueError, match="unknown pool 'mean'; choose from max, maxblur"):
        build_network("unet", 2, pool="mean")


# --- sizes by hand ---


def unit(inputs: int, outputs: int, made: int = 1) -> int:
    """A 3x3 convolution without bias to `made` x `outputs` channels, and the scale and shift of its batch norm."""
    return 9 * inputs * made * outputs + 2 * made * outputs


def unet3plus_parameters(width: int, classes: int, glu: bool = False) -> int:
    """The published structure, written out.

    Encoder: five levels of two convolutions, w, 2w, 4w, 8w, 16w channels; GLU makes twice as many before it gates.
    Each of four decoder levels: one convolution to w channels from each of the encoder levels at and above it (h1..h4),
    from each decoder level below it (5w channels) and from h5; then one of 5w -> 5w. Head: 3x3 with bias.
    """
    w, made = width, 2 if glu else 1
    levels = [w, 2 * w, 4 * w, 8 * w, 16 * w]
    encoder = sum(unit(a, b, made) + unit(b, b, made) for a, b in zip([3, *levels[:-1]], levels, strict=True))
    skips = 0
    for level in (1, 2, 3, 4):
        skips += sum(unit(levels[finer - 1], w) for finer in range(1, level + 1))      # h1 .. h_level
        skips += (4 - level) * unit(5 * w, w)                                          # d_(level+1) .. d4
        skips += unit(16 * w, w)                                                       # h5
    return encoder + skips + 4 * unit(5 * w, 5 * w) + 9 * 5 * w * classes + classes


@pytest.mark.parametrize(("width", "classes"), [(2, 2), (3, 1), (32, 2)])
def test_unet3plus_has_the_parameters_of_the_published_structure(width: int, classes: int) -> None:
    with torch.device("meta"):
        assert count(build_network("unet3plus", classes, width=width)) == unet3plus_parameters(width, classes)


def test_unet3plus_of_width_64_has_the_published_27_million_parameters() -> None:
    # Huang 2020, table 1: 26.97 M, where every convolution also had a bias (batch norm makes it idle)
    with torch.device("meta"):
        net = build_network("unet3plus", 1, width=64)
    biases = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is None)
    assert (count(net) + biases) / 1e6 == pytest.approx(26.97, abs=0.03)


def test_glu_doubles_the_encoder_of_eunet3plus_and_nothing_else() -> None:
    with torch.device("meta"):
        relu, glu = build_network("unet3plus", 2, width=8), build_network("eunet3plus", 2, width=8)
    assert count(glu) == unet3plus_parameters(8, 2, glu=True)
    assert isinstance(relu, UNet3Plus)
    assert isinstance(glu, UNet3Plus)
    assert count(glu.encoder) == 2 * count(relu.encoder)
    assert count(glu) - count(relu) == count(relu.encoder)


@pytest.mark.parametrize("width", [32, 64])
def test_match_width_gives_a_glu_encoder_as_large_as_the_relu_one(width: int) -> None:
    # 32 / sqrt(2) is 22.6, rounded to 23: 2 x 23^2 = 1058 against 32^2 = 1024, so 3.3% more
    with torch.device("meta"):
        relu = UNet3Plus(2, width)
        matched = UNet3Plus(2, width, activation="glu", match_width=True)
    assert count(matched.encoder) == pytest.approx(count(relu.encoder), rel=0.04)
    assert matched.bottleneck_channels == {32: 23 * 16, 64: 45 * 16}[width]


def test_fewer_merged_channels_take_parameters_off_where_they_go_in_and_out() -> None:
    """Width 4, 8 channels instead of 20: 12 fewer out of four merges with their norms, into six skips and the head."""
    full, slim = (build_network("unet3plus", 2, width=4, merged=merged) for merged in (None, 8))
    assert count(full) - count(slim) == 4 * (9 * 20 * 12 + 2 * 12) + 6 * 9 * 12 * 4 + 9 * 12 * 2
    image = torch.rand(1, 3, 37, 50) * 255
    assert slim.eval()(image).shape == (1, 2, 37, 50)


def test_unet_has_the_parameters_of_its_structure() -> None:
    w, levels = 3, [3, 6, 12, 24, 48]
    encoder = sum(unit(a, b) + unit(b, b) for a, b in zip([3, *levels[:-1]], levels, strict=True))
    decoder = sum(unit(2 * a, a) + unit(2 * a, a) + unit(a, a) for a in levels[:-1])   # up, then two after joining
    assert count(build_network("unet", 2, width=w)) == encoder + decoder + w * 2 + 2


# --- what sees what ---


@pytest.mark.parametrize("activation", ["relu", "glu"])
def test_every_encoder_level_reaches_every_decoder_level(activation: str) -> None:
    torch.manual_seed(0)
    net = UNet3Plus(2, width=2, activation=activation).eval()
    made: dict[int, Tensor] = {}

    def keep(level: int, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        made[level] = output

    for level, merge in enumerate(net.merges):
        merge.register_forward_hook(partial(keep, level))
    encoded = [h.detach().requires_grad_() for h in net.encode(images(1, 3, 64, 64))]
    net.decode(list(encoded))
    for level, d in made.items():
        gradients = torch.autograd.grad(d.square().sum(), encoded, retain_graph=True, allow_unused=True)
        # decoder level i takes encoder levels 1..i pooled; what is coarser comes through the decoder levels below
        reached = [j for j, g in enumerate(gradients) if g is not None and bool(g.abs().sum() > 0)]
        assert reached == [0, 1, 2, 3, 4], f"decoder level {level}"


def receptive_field(net: SegmentationNetwork, level: int, position: int) -> tuple[int, int]:
    """First and last image column that an encoder map's column sees: a NaN there spreads to all that sees it."""
    width = 256
    image = torch.zeros(width, 3, 16, width)
    image[torch.arange(width), :, :, torch.arange(width)] = torch.nan
    with torch.no_grad():
        seen = net.encode(image)[level].isnan()[..., position].any((1, 2)).nonzero()[:, 0]
    assert len(seen) == seen[-1] - seen[0] + 1
    return int(seen[0]), int(seen[-1])


@pytest.mark.parametrize(
    ("pool", "sides"),
    [
        ("max", [5, 14, 32, 68, 140]),       # r + (2 - 1) s by a pool, then r + 2 x 2 s by two convolutions at stride s
        ("maxblur", [5, 16, 38, 82, 170]),   # a pool that sees 4 x 4: r + 3 s
    ],
)
def test_receptive_fields_of_the_encoder_levels(pool: str, sides: list[int]) -> None:
    net = UNet3Plus(1, width=1, pool=pool).eval()
    for level, side in enumerate(sides):
        position = 128 // 2**level
        first, last = receptive_field(net, level, position)
        assert last - first + 1 == side
        # centered on the image pixels that the position stands for
        assert first + last == 2 * position * 2**level + 2**level - 1


def test_one_pixel_changes_logits_all_over_a_unet3plus_of_128_px() -> None:
    net, image = UNet3Plus(2, width=1).eval(), torch.zeros(1, 3, 128, 128)
    image[..., 64, 64] = torch.nan
    with torch.no_grad():
        assert net(image).isnan().all()      # h5 sees 140 px, and full-scale skips carry it to the finest level


# --- deep supervision ---


def test_deep_supervision_returns_five_logits_in_training_and_one_tensor_else() -> None:
    net, image = network("unet3plus", deep_supervision=True), images(2, 3, 50, 70)
    sides = net(image)
    assert [tuple(side.shape) for side in sides] == 5 * [(2, 2, 50, 70)]
    torch.stack([side.square().mean() for side in sides]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    net.eval()
    assert net(image).shape == (2, 2, 50, 70)
    # heads of 5w = 10 channels for three decoder levels, and of 32 for the bottom
    assert count(net) - count(network("unet3plus")) == 3 * (9 * 10 * 2 + 2) + 9 * 32 * 2 + 2


# --- max-blur pooling ---


def test_max_blur_pool_keeps_a_constant_to_the_border_and_halves_exactly() -> None:
    pooled = parts.MaxBlurPool()(torch.full((2, 3, 10, 6), 7.0))
    assert torch.equal(pooled, torch.full((2, 3, 5, 3), 7.0))


def test_max_blur_pool_of_an_impulse_by_hand() -> None:
    # The impulse at (6, 6) lies in the 2x2 maxima at 5 and 6 of either axis. Output k weighs maxima 2k-1, 2k, 2k+1
    # by 1/4, 1/2, 1/4: output 2 has maximum 5 on its right, 1/4; output 3 has 5 and 6, 1/4 + 1/2.
    image = torch.zeros(1, 1, 12, 12)
    image[0, 0, 6, 6] = 1
    line = torch.tensor([0, 0, 0.25, 0.75, 0, 0])
    assert torch.equal(parts.MaxBlurPool()(image)[0, 0], line[:, None] * line)


def test_max_blur_pool_is_less_aliased_than_max_pool() -> None:
    # One column in four is 1. A max-pooled output is 1 for half of the four shifts and 0 for the others; under max-blur
    # pooling it sees two of four maxima, through weights that add to 3/4 for half of the shifts and 1/4 for the others.
    stripes = (torch.arange(64) % 4 < 1).float().expand(1, 1, 64, 64)
    change = {}
    for name in parts.POOLS:
        pool = parts.pool_layer(name)
        inner = [pool(stripes.roll(shift, 3))[..., 4:-4, 4:-4] for shift in range(4)]
        change[name] = float(torch.stack(inner).std(0, correction=0).mean())
    assert change == {"max": 0.5, "maxblur": 0.25}


# --- convolving an enlarged map without making it ---


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 7)])
def test_enlarged_conv_equals_enlarging_then_convolving(scale: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, requires_grad=True)
    weight, bias = torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(4)
    enlarged = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    expected = F.conv2d(enlarged, weight, bias, padding=1)
    found = parts.enlarged_conv(x, weight, bias, scale)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    pull = torch.randn(expected.shape)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight), pull), torch.autograd.grad(expected, (x, weight), pull), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("scale", [4, 16])
def test_enlarged_conv_in_bf16_is_within_a_percent(scale: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 5, 6), torch.randn(8, 32, 3, 3) / 17         # 17 = sqrt(9 x 32): unit variance
    expected = parts.enlarged_conv(x, weight, None, scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = parts.enlarged_conv(x, weight, None, scale)
    assert found.dtype is torch.bfloat16
    assert float((found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.01


def test_enlarged_conv_can_train_after_a_prediction_of_the_same_size() -> None:
    # the interpolation matrices are kept between calls; those of inference mode could not be used for a gradient
    parts.shifted_interpolation.cache_clear()
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3, requires_grad=True)
    with torch.inference_mode():
        parts.enlarged_conv(x, weight, None, 4)
    parts.enlarged_conv(x, weight, None, 4).sum().backward()
    assert weight.grad is not None


def test_a_network_with_exact_skips_equals_one_that_enlarges(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = used_norms(network("eunet3plus")), images(1, 3, 48, 64)
    expected = net(image)

    def slow(x: Tensor, weight: Tensor, bias: Tensor | None, scale: int) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=scale, mode="bilinear"), weight, bias, padding=1)

    monkeypatch.setattr(parts, "enlarged_conv", slow)
    torch.testing.assert_close(net(image), expected, atol=1e-4, rtol=1e-4)


# --- batch norm folded, GLU ---


# Batch norms before a convolution, which stay. DenseNet-121: one in each of 6 + 12 + 24 layers, one after each of three
# blocks. HoVer-Net: in residual blocks of 3, 4, 6 and 3 units one in all but the first unit and one at the end; in each
# of two branches one in each of 8 + 4 dense units and one after either group.
PRE_ACTIVATIONS = {"awgunet": 42 + 3, "hovernet": 3 + 4 + 6 + 3 + 2 * (8 + 1 + 4 + 1)}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_batch_norm_keeps_the_logits(name: str) -> None:
    net, image = used_norms(network(name, width=4)).requires_grad_(False), images(1, 3, 40, 64)
    expected = net(image)
    folded = fold_batch_norm(net)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == PRE_ACTIVATIONS.get(name, 0)
    assert float((net(image) - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1)


def test_folding_is_refused_in_training_mode() -> None:
    net = network("unet").train()
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        fold_batch_norm(net)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_glu_equals_torch_and_keeps_gradients_channels_last() -> None:
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(parts.GLU()(x), F.glu(x, dim=1))
    kept: list[Tensor] = []
    through = x * 1
    through.register_hook(kept.append)
    parts.GLU()(through).square().sum().backward()
    assert kept[0].is_contiguous(memory_format=torch.channels_last)
    mine, x.grad = x.grad, None
    F.glu(x, dim=1).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)


def test_images_are_scaled_to_minus_one_to_one() -> None:
    assert parts.normalized(torch.tensor([0.0, 127.5, 255.0])).tolist() == [-1, 0, 1]
