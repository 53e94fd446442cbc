"""Convolutions in 8-bit integers, for processors that multiply those several times faster than floats.

Weights are quantized per output channel, symmetric; activations per tensor, on a range measured once on training
images and kept with the model. The range is fixed, so a tile's result depends on nothing but the tile. Where one
convolution's output is another's input, it stays in 8 bits in between. The kernels are oneDNN's, as torch's own
compiler calls them.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from .blocks import ConvUnit, GatedConv, SegmentationNetwork, UpConvUnit
from .unet3plus import UNet3Plus

IMAGE_CHANNELS = 3
Ranges = dict[str, tuple[float, float]]      # of the input of each convolution, by the name of its unit or head


def int8_available() -> bool:
    """Whether this build of torch has the kernels."""
    return hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.backends.mkldnn.is_available()


@functools.cache
def take_note() -> None:
    """Have torch say now, unheard, what it says once: that a successor of `quantize_per_tensor` will come.

    It has no other way yet that quantizes in one pass.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def quantized(x: Tensor, scale: float, zero: int) -> Tensor:
    """round(x / scale) + zero, clipped to 0..255: uint8 of the same shape and memory layout."""
    take_note()
    steps = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(steps.untyped_storage(), 0, x.shape, steps.stride())


class Quantize(nn.Module):
    """`quantized` as a layer: float32 in, uint8 of the same shape out. With `zero` 0 it does what ReLU does, too."""

    def __init__(self, scale: float, zero: int = 0):
        super().__init__()
        self.scale, self.zero = scale, zero

    def forward(self, x: Tensor) -> Tensor:
        return quantized(x, self.scale, self.zero)


class Int8Conv(nn.Module):
    """A convolution, with ReLU if asked, of 8-bit inputs and weights: (B, C, H, W) in and out, both float32.

    y = ReLU(s_x s_w (q_x - z) * q_w + b), q_x = round(x / s_x) + z clipped to 0..255, q_w in -127..127. What comes in
    as uint8 is taken for q_x. With `out_scale` s_y, for ReLU only, uint8 goes out: round(y / s_y) clipped to 0..255.

    Args:
        conv: with the batch norm folded in. low, high: the range of its inputs; what lies beyond is clipped.
    """

    def __init__(self, conv: nn.Conv2d, low: float, high: float, relu: bool):
        super().__init__()
        low, high = min(low, 0.0), max(high, 1e-6)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)
        self.relu = "relu" if relu else "none"
        self.out_scale: float | None = None
        weight = conv.weight.detach()
        scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
        steps = (weight / scales[:, None, None, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qconv_prepack(steps, scales, self.scale, self.zero, *self.shape, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype != torch.uint8:
            x = quantized(x, self.scale, self.zero)
        kind = torch.float32 if self.out_scale is None else torch.uint8
        return torch.ops.onednn.qconv2d_pointwise(
            *(x, self.scale, self.zero, self.packed, self.scales, self.zeros, self.bias, *self.shape),
            *(self.out_scale or 1.0, 0, kind, self.relu, [], ""),
        )


def quantizable(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The convolutions that can run in 8 bits, as (owner, attribute), by the name of their unit or head.

    Those that are computed before enlarging are no convolutions then, and stay in floats; so do those that read the
    image, for its gray levels would be rounded to steps of about their own size.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, part in module.named_modules():
        if isinstance(part, ConvUnit):
            conv = part.conv.value if isinstance(part.conv, GatedConv) else part.conv
            reads_image = isinstance(conv, nn.Conv2d) and conv.in_channels == IMAGE_CHANNELS
            if not reads_image and not (isinstance(part, UpConvUnit) and part.scale >= 4):
                found[name] = (part, "conv")
        elif isinstance(part, SegmentationNetwork):
            found[f"{name}.head".removeprefix(".")] = (part, "head")
    return found


class InputRanges:
    """Collects the least and greatest input of every quantizable convolution while the module runs."""

    def __init__(self, module: nn.Module):
        self.ranges: Ranges = {}
        self.hooks = [
            getattr(owner, attribute).register_forward_pre_hook(functools.partial(self.see, name))
            for name, (owner, attribute) in quantizable(module).items()
        ]

    def see(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        """Widen the range of a unit by its input."""
        low, high = (value.item() for value in torch.aminmax(inputs[0].float()))
        old = self.ranges.get(name, (low, high))
        self.ranges[name] = (min(old[0], low), max(old[1], high))

    def __enter__(self) -> InputRanges:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def to_int8(module: nn.Module, ranges: Ranges) -> nn.Module:
    """Replace, in place, every convolution with a known range by `Int8Conv`, its ReLU with it; batch norm is folded."""
    for name, (owner, attribute) in quantizable(module).items():
        if name not in ranges:
            continue
        relu = isinstance(getattr(owner, "activation", None), nn.ReLU)
        conv = getattr(owner, attribute)
        if isinstance(conv, GatedConv):
            value, gate = (Int8Conv(half, *ranges[name], relu=False) for half in (conv.value, conv.gate))  # pyright: ignore
            conv.value, conv.gate, conv.enter = value, gate, Quantize(value.scale, value.zero)
        else:
            setattr(owner, attribute, Int8Conv(conv, *ranges[name], relu=relu))
        if relu:
            owner.activation = nn.Identity()
    for network in module.modules():
        if isinstance(network, UNet3Plus):
            join(network)
    return module


def join(network: UNet3Plus) -> None:
    """Let the decoder's maps stay in 8 bits from the skips to the convolution that merges them, and on to the head."""
    for row, merge in zip(network.skips, network.merges, strict=True):
        scale = scale_of_steps(merge.conv)  # pyright: ignore[reportArgumentType]
        if scale is None or not all(ends_in_relu(unit) for unit in row):  # pyright: ignore
            continue
        for unit in row:  # pyright: ignore[reportGeneralTypeIssues]
            if isinstance(unit.conv, Int8Conv):
                unit.conv.out_scale = scale
            else:
                unit.activation = Quantize(scale)
    last = network.merges[0].conv
    if isinstance(last, Int8Conv) and last.relu == "relu":
        last.out_scale = scale_of_steps(network.head)


def scale_of_steps(conv: nn.Module) -> float | None:
    """The step of a convolution that takes uint8 whose 0 is 0.0, as ReLU's outputs are; None where it does not."""
    return conv.scale if isinstance(conv, Int8Conv) and conv.zero == 0 else None


def ends_in_relu(unit: ConvUnit) -> bool:
    """Whether nothing but ReLU follows the unit's convolution."""
    return unit.conv.relu == "relu" if isinstance(unit.conv, Int8Conv) else isinstance(unit.activation, nn.ReLU)
