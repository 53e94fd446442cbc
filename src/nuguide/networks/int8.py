"""Convolutions in 8-bit integers, for processors that multiply those several times faster than floats.

Weights are quantized per output channel, symmetric; activations per tensor, on a range measured once on training
images and kept with the model. The range is fixed, so a tile's result depends on nothing but the tile. The kernels are
oneDNN's, as torch's own compiler calls them.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn

from .blocks import ConvUnit, UpConvUnit

Ranges = dict[str, tuple[float, float]]      # of the input of each convolution, by the name of its unit


def int8_available() -> bool:
    """Whether this build of torch has the kernels."""
    return hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.backends.mkldnn.is_available()


class Int8Conv(nn.Module):
    """A 3x3 convolution, with ReLU if asked, of 8-bit inputs and weights: float32 (B, C, H, W) in and out.

    y = ReLU(s_x s_w (q_x - z) * q_w + b), q_x = round(x / s_x) + z clipped to 0..255, q_w in -127..127.

    Args:
        conv: with the batch norm folded in. low, high: the range of its inputs; what lies beyond is clipped.
    """

    def __init__(self, conv: nn.Conv2d, low: float, high: float, relu: bool):
        super().__init__()
        low, high = min(low, 0.0), max(high, 1e-6)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)
        self.relu = "relu" if relu else "none"
        weight = conv.weight.detach()
        scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-12) / 127
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
        quantized = (weight / scales[:, None, None, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qconv_prepack(quantized, scales, self.scale, self.zero, *self.shape, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            # torch 2.13 announces a successor; it has no other way yet that quantizes in one pass
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8).int_repr()
        return torch.ops.onednn.qconv2d_pointwise(
            *(quantized, self.scale, self.zero, self.packed, self.scales, self.zeros, self.bias, *self.shape),
            *(1.0, 0, torch.float32, self.relu, [], ""),
        )


def quantizable(module: nn.Module) -> dict[str, ConvUnit]:
    """The units whose convolution can run in 8 bits, by name: all but those that are computed before enlarging."""
    return {
        name: unit
        for name, unit in module.named_modules()
        if isinstance(unit, ConvUnit) and not (isinstance(unit, UpConvUnit) and unit.scale >= 4)
    }


class InputRanges:
    """Collects the least and greatest input of every quantizable convolution while the module runs."""

    def __init__(self, module: nn.Module):
        self.ranges: Ranges = {}
        self.hooks = [
            unit.conv.register_forward_pre_hook(partial(self.see, name)) for name, unit in quantizable(module).items()
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
    for name, unit in quantizable(module).items():
        if name not in ranges:
            continue
        relu = isinstance(unit.activation, nn.ReLU)
        unit.conv = Int8Conv(unit.conv, *ranges[name], relu=relu)  # pyright: ignore[reportAttributeAccessIssue]
        if relu:
            unit.activation = nn.Identity()
    return module
