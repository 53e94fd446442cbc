"""The image encoder of MobileSAM (Zhang et al. 2023, arXiv 2306.14289): a TinyViT that was taught SAM ViT-H's latent.

TinyViT (Wu et al. 2022, arXiv 2207.10666), of 5 million parameters: inverted residuals at a quarter of the image's
size, then attention within windows, each block with a depthwise convolution between attention and perceptron. The last
stage keeps the size of the one before it, so the latent has SAM's grid. The file is the official mobile_sam.pt.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fitting import fitted, padded_to
from .sam import LATENT_CHANNELS, NATIVE_PX, PATCH_PX, LayerNorm2d, TokenLinear, divided, joined

WIDTHS, DEPTHS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (None, 7, 14, 7)
STRIDES = (2, 2, 1)                                     # between the stages
HEAD_CHANNELS = 32
PREFIX = "image_encoder."
UNUSED = re.compile(r"norm_head\.|head\.|.*\.attention_bias_idxs$")           # the classifier, and what is computed

OFFICIAL_NAMES = (                                      # -> ours, by which batch norms are folded
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
)


class MobileSamGuide(nn.Module):
    """RGB 0..255 (B, 3, H, W) of any size -> latent (B, 256, h, w), the longer of h and w being image_px / 16.

    Images are resized, normalized and filled to a square as SAM's are, and the cells of the filling are cut away. There
    are no tables of positions but those within a window, so smaller sizes need no interpolation.
    """

    def __init__(self, image_px: int = NATIVE_PX):
        super().__init__()
        if image_px % PATCH_PX:
            raise ValueError(f"image_px must be a multiple of {PATCH_PX}, got {image_px}")
        self.image_px = image_px
        self.encoder = TinyViT()

    def forward(self, image: Tensor) -> Tensor:
        x = fitted(image, self.image_px)
        height, width = x.shape[-2:]
        latent = self.encoder(padded_to(x, self.image_px, self.image_px))
        return latent[..., : -(-height // PATCH_PX), : -(-width // PATCH_PX)]

    def adapted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's image encoder under this module's names; takes all of mobile_sam.pt, or its encoder alone."""
        if any(key.startswith(PREFIX) for key in state):
            state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        result = {}
        for key, value in state.items():
            if not UNUSED.match(key):
                for pattern, name in OFFICIAL_NAMES:
                    key = re.sub(pattern, name, key)
                result[key if key.startswith("encoder.") else "encoder." + key] = value
        return result


class TinyViT(nn.Module):
    """Normalized square (B, 3, S, S) -> (B, 256, S / 16, S / 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Stem(WIDTHS[0])
        self.layers = nn.ModuleList(Stage(index) for index in range(len(WIDTHS)))
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], LATENT_CHANNELS, 1, bias=False),
            LayerNorm2d(LATENT_CHANNELS),
            nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(LATENT_CHANNELS),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


class ConvNorm(nn.Module):
    """Convolution without bias and batch norm, keeping the size but for the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """The image at a quarter of its size: (B, 3, H, W) -> (B, width, H/4, W/4)."""

    def __init__(self, width: int):
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, width // 2, 3, 2), nn.GELU(), ConvNorm(width // 2, width, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class Stage(nn.Module):
    """The blocks of one width, and the step to the next width where there is one."""

    def __init__(self, index: int):
        super().__init__()
        width, window = WIDTHS[index], WINDOWS[index]
        self.blocks = nn.ModuleList(
            InvertedResidual(width) if window is None else Block(width, window) for _ in range(DEPTHS[index])
        )
        last = index == len(STRIDES)
        self.downsample = nn.Identity() if last else Merge(width, WIDTHS[index + 1], STRIDES[index])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class InvertedResidual(nn.Module):
    """x + (C -> 4 C, depthwise 3x3, 4 C -> C), and GELU after each step and after the sum; (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class Merge(nn.Module):
    """To another width and, with stride 2, to half the size: 1x1, depthwise 3x3, 1x1, with GELU between them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class Block(nn.Module):
    """y = x + attention(x), z = depthwise 3x3 of y, z + mlp(z); (B, C, H, W)."""

    def __init__(self, width: int, window: int):
        super().__init__()
        self.attn = Attention(width, window)
        self.local_conv = ConvNorm(width, width, 3, groups=width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)                                         # (B, H, W, C)
        tokens = tokens + self.attn(tokens)
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention within windows of `window` x `window` tokens: (B, H, W, C) -> (B, H, W, C).

    The logit of query i and key j is q_i k_j / sqrt(d) plus a learned number for each head and each pair of distances
    |row_i - row_j|, |column_i - column_j|. Where windows don't divide the grid, zeros are added below and on the right,
    which the norm makes its bias, and take part as keys and values.
    """

    def __init__(self, width: int, window: int):
        super().__init__()
        self.window, self.heads = window, width // HEAD_CHANNELS
        self.norm = nn.LayerNorm(width)
        self.qkv = TokenLinear(width, 3 * width)        # q, k and v of the first head, then of the second, ...
        self.proj = TokenLinear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, window**2))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        nothing = F.linear(self.norm.bias, self.qkv.weight, self.qkv.bias)
        windows = divided(self.qkv(self.norm(x)), self.window, nothing)        # (B n, window², 3 C)
        q, k, v = windows.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)     # each (B n, heads, window², d)
        bias = self.attention_biases[:, distances(self.window, x.device)].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        y = y.transpose(1, 2).reshape(-1, self.window, self.window, channels)
        return self.proj(joined(y, height, width))


def distances(window: int, device: torch.device | str = "cpu") -> Tensor:
    """Which number of `attention_biases` belongs to each query and key of a window: (window², window²) int64.

    The tokens stand row by row; the number is the distance in rows times `window` plus that in columns.
    """
    line = torch.arange(window, device=device)
    apart = (line[:, None] - line[None, :]).abs()
    return (apart[:, None, :, None] * window + apart[None, :, None, :]).reshape(window**2, window**2)


class Mlp(nn.Module):
    """Norm, C -> 4 C -> GELU -> C, token by token."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = TokenLinear(width, 4 * width)
        self.fc2 = TokenLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
