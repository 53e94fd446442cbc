"""AWGUNet (Roy 2024): a U-Net on DenseNet-121 whose skips are weighed by what a wavelet transform finds in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import KernelUnit, PreActivation, SegmentationNetwork, cropped, normalized, pad_to_stride


class DenseLayer(nn.Module):
    """Adds `growth` channels k to what came before: (B, C, H, W) -> (B, C + k, H, W).

    Activation, 1x1 convolution to 4k, 3x3 convolution to k.
    """

    def __init__(self, in_channels: int, growth: int, activation: str):
        super().__init__()
        self.before = PreActivation(in_channels, activation)
        self.squeeze = KernelUnit(in_channels, 4 * growth, activation, kernel=1)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.squeeze(self.before(x)))], dim=1)


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang 2017) up to its third dense block: (B, 3, H, W) -> five maps at 1, 1/2, ... 1/16.

    The maps: the image; 2k channels after the 7x7 convolution of stride 2; 8k, 16k and 32k after dense blocks of 6, 12
    and 24 layers, activated. In between, a 3x3 maximum and, after a block, a 1x1 convolution to half the channels and
    2x2 means. With growth rate k = 32 these are the layers of the published DenseNet-121.
    """

    def __init__(self, growth: int, activation: str):
        super().__init__()
        channels = 2 * growth
        self.stem = KernelUnit(3, channels, activation, kernel=7, stride=2)
        self.blocks, self.halvings = nn.ModuleList(), nn.ModuleList()
        for layers in (6, 12, 24):
            dense = [DenseLayer(channels + k * growth, growth, activation) for k in range(layers)]
            channels += layers * growth
            self.blocks.append(nn.Sequential(*dense, PreActivation(channels, activation)))
            if layers < 24:
                self.halvings.append(nn.Conv2d(channels, channels // 2, 1, bias=False))
                channels //= 2
        self.channels = channels

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [normalized(image)]
        features.append(self.stem(features[0]))
        features.append(self.blocks[0](F.max_pool2d(features[1], 3, stride=2, padding=1)))
        for halving, block in zip(self.halvings, self.blocks[1:], strict=True):  # pyright: ignore[reportArgumentType]
            features.append(block(F.avg_pool2d(halving(features[-1]), 2)))
        return features


def haar(x: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform: (B, C, H, W) of even sides -> (B, 4C, H/2, W/2).

    Of each 2x2 cell [a b; c d], in four groups of C channels: (a + b + c + d) / 2, (a - b + c - d) / 2,
    (a + b - c - d) / 2 and (a - b - c + d) / 2: the mean, and the edges across columns, across rows and diagonal.
    """
    a, b, c, d = (x[..., row::2, column::2] for row in range(2) for column in range(2))
    return torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], dim=1) / 2


def separable_conv(channels: int) -> nn.Sequential:
    """A 3x3 convolution of each channel, then a 1x1 convolution of all: (B, C, H, W), the same shape out."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.Conv2d(channels, channels, 1)
    )


class WaveletAttention(nn.Module):
    """x weighed by place and channel, guided by its wavelets: (B, C, H, W), the same shape out.

        places   = sigmoid(Sep3(Sep1(Up(haar(x))) + Sep2(x)))         (B, C, H, W)
        channels = sigmoid(W2 ReLU(W1 (v * S(x))))                    (B, C, 1, 1)
        out      = x * places * channels

    Up is a transposed convolution, 4C -> C, Sep are separable convolutions, S is the mean over the pixels and v a
    learned weight of each channel, 1 at first: the learnable weighted global average pooling. A map of odd sides has
    its last row or column repeated for the transform.
    """

    def __init__(self, channels: int):
        super().__init__()
        narrow = max(channels // 4, 8)
        self.up = nn.ConvTranspose2d(4 * channels, channels, 2, stride=2)
        self.of_wavelets, self.of_map, self.of_both = (separable_conv(channels) for _ in range(3))
        self.mean_weights = nn.Parameter(torch.ones(channels, 1, 1))
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.excite = nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        wavelets = cropped(self.up(haar(pad_to_stride(x, 2))), *x.shape[-2:])
        places = self.of_both(self.of_wavelets(wavelets) + self.of_map(x)).sigmoid()
        means = self.mean_weights * x.mean((2, 3), keepdim=True)
        channels = self.excite(F.relu(self.squeeze(means))).sigmoid()
        return x * places * channels


REACH = 5                  # samples on either side that an enlarged one is made from
GAUSSIAN_SIGMA = 0.5       # in samples


def enlarging_taps() -> Tensor:
    """Weights of the 2 REACH + 1 samples around one, for the two samples that it becomes: (2, 2, 2 REACH + 1).

    First by a Gaussian, then by Lanczos's kernel, sinc(d) sinc(d / 5); d is the distance in samples, and the new ones
    lie 1/4 before and after the old one. All four add to 1.
    """
    offsets = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    distance = offsets - torch.tensor([[-0.25], [0.25]], dtype=torch.float64)
    gaussian = (-0.5 * (distance / GAUSSIAN_SIGMA) ** 2).exp()
    lanczos = (distance.sinc() * (distance / REACH).sinc()).where(distance.abs() < REACH, 0)
    taps = torch.stack([gaussian, lanczos])
    return (taps / taps.sum(-1, keepdim=True)).float()


def enlarged(x: Tensor, taps: Tensor) -> Tensor:
    """A map made twice as large by the taps (2, 2 REACH + 1) of one kernel: (B, C, h, w) -> (B, C, 2h, 2w).

    The border is repeated.
    """
    channels = x.shape[1]
    for axis in (2, 3):                                                           # rows, then columns
        border = (0, 0, REACH, REACH) if axis == 2 else (REACH, REACH, 0, 0)
        padded = F.pad(x, border, mode="replicate")
        weight = taps.to(x.dtype).unflatten(1, (-1, 1) if axis == 2 else (1, -1))     # (2, taps, 1) or (2, 1, taps)
        # channels last, as the convolutions around this want it: interleaving is then one copy
        before, after = (
            F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels).movedim(1, 3) for kernel in weight
        )
        x = torch.stack([before, after], axis).flatten(axis - 1, axis).movedim(3, 1)
    return x


class SmoothUp(nn.Module):
    """A map made twice as large without aliasing, and as learned: (B, C, h, w) -> (B, 2C, 2h, 2w).

    [W (G(x) + L(x)) / 2; T(x)]: G and L enlarge by a Gaussian and by Lanczos's kernel, W is a 1x1 convolution and T a
    transposed one. W is applied before enlarging, which is the same and costs a quarter.
    """

    taps: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)
        self.learned = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.register_buffer("taps", enlarging_taps(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        gaussian, lanczos = (enlarged(mixed, taps) for taps in self.taps)
        return torch.cat([(gaussian + lanczos) / 2, self.learned(x)], dim=1)


class MultiKernel(nn.Module):
    """Convolutions of three kernels side by side, and one of all: (B, in, H, W) -> (B, out, H, W).

    unit3x3([W [unit5x5(x); unit3x3(x)]; unit1x1(x)]), the first two with half the channels each.
    """

    def __init__(self, in_channels: int, out_channels: int, activation: str):
        super().__init__()
        half = out_channels // 2
        self.large = KernelUnit(in_channels, half, activation, kernel=5)
        self.medium = KernelUnit(in_channels, half, activation, kernel=3)
        self.point = KernelUnit(in_channels, out_channels, activation, kernel=1)
        self.mix = nn.Conv2d(2 * half, out_channels, 1)
        self.merge = KernelUnit(2 * out_channels, out_channels, activation)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.mix(torch.cat([self.large(x), self.medium(x)], dim=1))
        return self.merge(torch.cat([wide, self.point(x)], dim=1))


class AWGUNet(SegmentationNetwork):
    """AWGUNet: DenseNet-121, attention guided by wavelets in every skip and at the bottom, a multi-kernel decoder.

        a_i = attention_i(h_i), i = 1 ... 5;   d5 = a5;   d_i = multikernel_i([smooth_up_i(d_(i+1)); a_i])

    h1 is the image itself, h2 ... h5 the maps of `DenseNet121` with w, 4w, 8w and 16w channels; d4 ... d1 have 8w, 4w,
    2w and w.

    Source: Roy, Pramanik, Kaplun, Antonov, Sarkar, "AWGUNet: Attention-aided wavelet guided U-Net for nuclei
    segmentation in histopathology images", ISBI 2024, arXiv 2406.08425. There, w is 64 and the encoder starts from
    ImageNet's weights, which are not shipped: ours starts from random ones.

    Interpretation: the transposed convolution of the attention makes C channels, so what it gives has the shape of the
    map; the kernels of the separable convolutions are 3x3; the weighted means are not divided by the sum of their
    weights, which the next layer can undo; batch norm takes the place of instance norm in the decoder, so that a pixel
    depends less on the tile it lies in; the attention still takes averages over the tile. In `Guided` the
    attention at the bottom takes the fused features.

    Args:
        classes: output channels.
        width: channels w of the finest level, even; twice the growth rate of the encoder.
        activation: of the encoder (`ACTIVATIONS`). decoder_activation: of the decoder.
        dropout: probability of dropping a channel of the coarsest features before the attention.
    """

    stride = 16

    def __init__(
        self,
        classes: int,
        width: int = 64,
        activation: str = "relu",
        decoder_activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % 2:
            raise ValueError(f"the width of AWGUNet is twice a growth rate, so it must be even, not {width}")
        self.encoder = DenseNet121(width // 2, activation)
        self.bottleneck_channels = self.encoder.channels
        self.dropout = nn.Dropout2d(dropout)
        skips = [3, width, 4 * width, 8 * width]
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.attentions = nn.ModuleList(map(WaveletAttention, [*skips, self.bottleneck_channels]))
        self.ups, self.merges = nn.ModuleList(), nn.ModuleList()
        for skip, narrow, wide in zip(skips, widths, [*widths[1:], self.bottleneck_channels], strict=True):
            self.ups.append(SmoothUp(wide))
            self.merges.append(MultiKernel(2 * wide + skip, narrow, decoder_activation))
        self.head = nn.Conv2d(width, classes, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        return self.encoder(image)

    def decode(self, features: list[Tensor]) -> Tensor:
        *skips, deepest = features
        maps = [*skips, self.dropout(deepest)]
        *skips, x = (attention(h) for attention, h in zip(self.attentions, maps, strict=True))
        for level in reversed(range(len(skips))):
            x = self.merges[level](torch.cat([self.ups[level](x), skips[level]], dim=1))
        return self.head(x)
