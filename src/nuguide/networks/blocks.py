"""The parts that networks are made of: activations, convolution blocks, pooling, convolutions of enlarged maps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

ACTIVATIONS = ("relu", "leaky_relu", "silu", "glu")


class GLU(nn.Module):
    """Gated linear unit (Dauphin 2017): x = [a; b] (B, 2 C, H, W) -> a * sigmoid(b) (B, C, H, W).

    Unlike torch's own, its gradient keeps the channels-last layout; without it the batch norm before it takes a slow
    path, and a training step on a CPU nearly twice as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return a * b.sigmoid()


class GatedConv(nn.Module):
    """A convolution and the `GLU` after it as two convolutions: value * sigmoid(gate), each contiguous in memory.

    For evaluation only, where it saves most of the GLU's time.
    """

    value: nn.Module
    gate: nn.Module

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        halves = zip(conv.weight.detach().chunk(2), (None, None) if conv.bias is None else conv.bias.detach().chunk(2),
                     strict=True)
        self.value, self.gate = (conv_like(conv, weight, bias) for weight, bias in halves)
        self.enter: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.value(x).mul_(self.gate(x).sigmoid_())


def conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution with the stride, padding and dilation of another, and this weight and bias."""
    made = nn.Conv2d(
        weight.shape[1], weight.shape[0], conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # pyright: ignore
        bias=bias is not None,
    )
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    return made


def activation_layer(name: str) -> nn.Module:
    """An activation by name, one of `ACTIVATIONS`; `glu` halves the channels."""
    layers = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "glu": GLU}
    if name not in layers:
        raise ValueError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return layers[name]()


def conv_width(channels: int, activation: str) -> int:
    """Channels that a convolution must make for `channels` to be left after the activation."""
    return 2 * channels if activation == "glu" else channels


class ConvUnit(nn.Module):
    """3x3 convolution, batch norm, activation: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, activation: str = "relu"):
        super().__init__()
        made = conv_width(out_channels, activation)
        self.conv = nn.Conv2d(in_channels, made, 3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(made)
        self.activation = activation_layer(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class UpConvUnit(ConvUnit):
    """A `ConvUnit` on the input enlarged `scale` times (bilinear): (B, in, h, w) -> (B, out, scale h, scale w).

    The 3x3 convolution of an enlarged map is linear and separable in the map, so from scale 4 on it is computed at low
    resolution: nine 1x1 projections, one for each tap, then two small products with shifted interpolation matrices.
    That equals enlarging first, zero padding included, up to rounding, and costs a tenth at scale 16.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, activation: str = "relu"):
        super().__init__(in_channels, out_channels, activation)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale >= 4:
            y = enlarged_conv(x, self.conv.weight, self.conv.bias, self.scale)
        else:
            y = self.conv(F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False))
        return self.activation(self.norm(y))


class KernelUnit(ConvUnit):
    """A `ConvUnit` with another kernel: (B, in, H, W) -> (B, out, H / stride, W / stride), rounded up.

    Args:
        kernel: side of the kernel, odd. dilation: distance between its taps.
    """

    def __init__(
        self, in_channels: int, out_channels: int, activation: str = "relu", kernel: int = 3, stride: int = 1,
        dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, activation)
        self.conv = nn.Conv2d(
            in_channels, self.conv.out_channels, kernel, stride, dilation * (kernel // 2), dilation, bias=False
        )
        if dilation > 1:
            self.activation = nn.Sequential(self.activation)     # hidden from `GatedConv`, which knows no dilation


class PreActivation(nn.Module):
    """Batch norm and activation of what a convolution takes in (He 2016): (B, C, H, W), the same shape out.

    Under `glu`, value and gate are two scaled and shifted copies of each channel, so that no channel is lost. The batch
    norm cannot be folded into the convolution before it: others take that convolution's output, too.
    """

    def __init__(self, channels: int, activation: str = "relu"):
        super().__init__()
        made = conv_width(channels, activation)
        self.copies = made // channels
        self.norm = nn.BatchNorm2d(made)
        self.activation = activation_layer(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(x if self.copies == 1 else torch.cat(self.copies * [x], dim=1)))


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor | None, scale: int) -> Tensor:
    """conv3x3(bilinear enlargement of x), zero padded, without making the enlarged map.

    With U = A x B' the enlargement (A, B the interpolation matrices of rows and columns) and A_i, B_j those matrices
    shifted by tap (i, j), the output is sum_ij A_i (w_ij x) B_j'.

    Args:
        x: (B, C, h, w). weight: (O, C, 3, 3). bias: (O,) or None.
    Returns:
        (B, O, scale h, scale w), channels last in memory.
    """
    batch, channels, height, width = x.shape
    out = weight.shape[0]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    taps = weight.permute(2, 3, 0, 1).reshape(9 * out, channels)
    # a product, for torch has no fast 1x1 convolution on one thread
    z = F.linear(x.permute(0, 2, 3, 1), taps).unflatten(3, (3, 3, out)).permute(0, 3, 1, 4, 2, 5)
    z = z.reshape(batch * 3 * height, 3, width, out)                           # rows of (i, h), then j, w, o
    columns = shifted_interpolation(width, scale, x.dtype, x.device)           # (S w, 3 w)
    z = torch.cat([part @ z[:, :, near].flatten(1, 2) for near, part in bands(columns, width)], dim=1)     # over j, w
    z = z.reshape(batch, 3, height, scale * width * out)
    rows = shifted_interpolation(height, scale, x.dtype, x.device)             # (S h, 3 h)
    z = torch.cat([part @ z[:, :, near].flatten(1, 2) for near, part in bands(rows, height)], dim=1)       # over i, h
    y = z.unflatten(2, (scale * width, out)).permute(0, 3, 1, 2)
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


BAND = 16


def bands(matrix: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """A matrix of `shifted_interpolation` (scale * size, 3 * size) in blocks of rows, each without most of its zeros.

    Yields (the samples that the block needs, the block (rows, 3 * samples)). What an enlarged map holds at one place
    comes from the samples next to it, so the work is linear in the size.
    """
    scale = len(matrix) // size
    for start in range(0, size, BAND):
        stop = min(start + BAND, size)
        near = slice(max(start - 1, 0), min(stop + 1, size))
        yield near, matrix[scale * start : scale * stop].unflatten(1, (3, size))[:, :, near].flatten(1)


@lru_cache(maxsize=128)
def shifted_interpolation(size: int, scale: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Interpolation matrices of the three taps side by side: (scale * size, 3 * size), zeros beyond the border."""
    # kept between calls, so it must serve training too where a prediction asked for it first
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        eye = torch.eye(size, device=device)[None]                             # each column enlarges one sample
        plain = F.interpolate(eye, scale_factor=scale, mode="linear", align_corners=False)[0].T
        padded = F.pad(plain, (0, 0, 1, 1))
        long = scale * size
        return torch.cat([padded[tap : tap + long] for tap in range(3)], dim=1).to(dtype)


class MaxBlurPool(nn.Module):
    """Halves a map without aliasing: dense 2x2 maximum, then a 3x3 binomial blur with stride 2 (Zhang 2019).

    (B, C, H, W) -> (B, C, H/2, W/2) for even H and W; each output is centered on its 2x2 cell. The border is repeated,
    so a constant map stays constant.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (line[:, None] * line[None, :])[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        if torch.is_grad_enabled():
            x = F.max_pool2d(x, 2, stride=1)
        else:                               # a third of the time without the places of the maxima
            x = torch.maximum(x[:, :, :-1], x[:, :, 1:])
            x = torch.maximum(x[..., :-1], x[..., 1:])
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), stride=2, groups=channels)


POOLS = ("max", "maxblur")


def pool_layer(name: str) -> nn.Module:
    """A layer that halves a map, by name."""
    layers = {"max": lambda: nn.MaxPool2d(2), "maxblur": MaxBlurPool}
    if name not in layers:
        raise ValueError(f"unknown pool {name!r}; choose from {', '.join(POOLS)}")
    return layers[name]()


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Merge the batch norm of every unit of a `conv` and a `norm` into its convolution, in place; for evaluation only.

    A GLU after it is merged too (`GatedConv`).

    Raises:
        ValueError: the module is in training mode, where batch norm is no fixed map.
    """
    if module.training:
        raise ValueError("batch norm can be folded only in evaluation mode; call .eval() first")
    for unit in module.modules():
        conv, norm = getattr(unit, "conv", None), getattr(unit, "norm", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            unit.conv = fuse_conv_bn_eval(conv, norm)
            unit.norm = nn.Identity()
            if isinstance(getattr(unit, "activation", None), GLU):
                unit.conv, unit.activation = GatedConv(unit.conv), nn.Identity()
    return module


class SegmentationNetwork(nn.Module):
    """The one seam of all networks: `encode(image) -> features`, `decode(features) -> logits`.

    `image` is (B, 3, H, W), RGB in 0..255 with H and W multiples of `stride`; features run from finest to coarsest,
    `features[-1]` with `bottleneck_channels` channels at 1/`stride`; logits are (B, classes, H, W).
    """

    stride: int
    bottleneck_channels: int

    def encode(self, image: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def decode(self, features: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of an image of any size."""
        height, width = image.shape[-2:]
        return cropped(self.decode(self.encode(pad_to_stride(image, self.stride))), height, width)


def pad_to_stride(image: Tensor, stride: int) -> Tensor:
    """The image, its last row and column repeated until both sides are multiples of `stride`."""
    height, width = image.shape[-2:]
    below, right = -height % stride, -width % stride
    if not below and not right:
        return image
    return F.pad(image, (0, right, 0, below), mode="replicate")


def cropped(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits without what `pad_to_stride` added; each of them where a network in training returns a list."""
    if isinstance(logits, list):
        return [head[..., :height, :width] for head in logits]  # pyright: ignore[reportReturnType]
    return logits[..., :height, :width]


def normalized(image: Tensor) -> Tensor:
    """RGB 0..255 to about -1..1."""
    return (image - 127.5) / 127.5
