"""Fusing a network's deepest features with a foundation model's latent, and `Guided`, the network that does it.

A guide whose latent holds finer features too (`GuideSpec.finer`) has each of them concatenated with the task's features
of the same stride, whatever the block (`FinerGuidance`).

Notation: t (B, T, H, W) are the task network's features, g (B, G, h, w) the guide's latent, which `Guided` has `halved`
where it is finer, and which `at_grid` brings to the task's grid where a block needs both on one. S(x) is the mean of x
over its pixels, [a; b] stacks channels, W are learned 1x1 maps, * multiplies channel by channel, and
Attn(q, k, v) = softmax(q' k / sqrt(d)) v over the pixels as tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks.blocks import GLU, MaxBlurPool, SegmentationNetwork, cropped, pad_to_stride

GATES = ("glu", "sigmoid")


def halved(latent: Tensor, height: int, width: int) -> Tensor:
    """The latent (B, G, h, w), halved by max-blur pooling while its sides are even and at least twice the task's.

    SAM's 64x64 latent of a 256 px tile comes to 16x16 by two poolings, as in the paper's code. A latent that was
    pooled before, since it comes from a cache, stays as it is: so both give the same.
    """
    pool = MaxBlurPool().to(latent.device)
    while all(g % 2 == 0 and g >= 2 * t for g, t in zip(latent.shape[-2:], (height, width), strict=True)):
        latent = pool(latent)
    return latent


def at_grid(latent: Tensor, height: int, width: int) -> Tensor:
    """The latent on the task's grid: `halved`, then resized bilinearly; (B, G, h, w) -> (B, G, height, width)."""
    latent = halved(latent, height, width)
    if latent.shape[-2:] != (height, width):
        latent = F.interpolate(latent, (height, width), mode="bilinear", align_corners=False)
    return latent


class ChannelGate(nn.Module):
    """Squeeze, excite and gate (B, N, h, w), (B, T, H, W) -> gates (B, T, 1, 1).

    s = [S(g); S(t)];  e = ReLU(W1 s), 16 times narrower
    `glu` (the paper):      gate = GLU(W2 e) = (Wl e + bl) * sigmoid(Wg e + bg)
    `sigmoid` (its code):   gate = sigmoid(W2 e)
    """

    def __init__(self, task_channels: int, guide_channels: int, gate: str = "glu"):
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"unknown gate {gate!r}; choose from {', '.join(GATES)}")
        joined = task_channels + guide_channels
        narrow = max(joined // 16, 4)
        self.squeeze = nn.Conv2d(joined, narrow, 1)
        self.excite = nn.Conv2d(narrow, task_channels * (2 if gate == "glu" else 1), 1)
        self.gate = GLU() if gate == "glu" else nn.Sigmoid()

    def forward(self, task: Tensor, latent: Tensor) -> Tensor:
        means = torch.cat([latent.mean((2, 3), keepdim=True), task.mean((2, 3), keepdim=True)], dim=1)
        return self.gate(self.excite(F.relu(self.squeeze(means))))


class Attention(nn.Module):
    """Attn(Wq q, Wk k, Wv v) projected by Wo; queries (B, Q, H, W), keys and values (B, K, h, w) -> (B, Q, H, W).

    With a `reach`, a query attends only to keys whose place, on the grid of the queries, is at most so many cells away
    along each side.
    """

    def __init__(self, query_channels: int, key_channels: int, heads: int = 1, reach: int | None = None):
        super().__init__()
        self.heads = heads
        self.reach = reach
        self.query = nn.Conv2d(query_channels, query_channels, 1)
        self.key = nn.Conv2d(key_channels, query_channels, 1)
        self.value = nn.Conv2d(key_channels, query_channels, 1)
        self.out = nn.Conv2d(query_channels, query_channels, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def tokens(x: Tensor) -> Tensor:                                       # (B, heads, h w, C / heads)
            return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)

        (height, width), (h, w) = query.shape[-2:], key.shape[-2:]
        q, k, v = tokens(self.query(query)), tokens(self.key(key)), tokens(self.value(value))
        found = [
            F.scaled_dot_product_attention(q[:, :, own], k[:, :, near], v[:, :, near], attn_mask=mask)
            for own, near, mask in bands(height, width, h, w, self.reach, query.device)
        ]
        return self.out(torch.cat(found, dim=2).transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)))


Band = tuple[slice, slice, Tensor | None]
BAND_ROWS = 8


@lru_cache(maxsize=16)
def bands(height: int, width: int, h: int, w: int, reach: int | None, device: torch.device) -> list[Band]:
    """What the queries of a few rows of a grid height x width may attend to, of keys on a grid h x w, rows by rows.

    Each band has the slice of its queries, the slice of the keys near them, and which of these each may attend to
    (queries, keys) bool, None where all may attend to all. So the work grows with the grid's area, not its square.
    """
    if reach is None:
        return [(slice(None), slice(None), None)]
    rows, columns = (
        (torch.arange(queries)[:, None] - ((torch.arange(keys) + 0.5) * queries / keys - 0.5)).abs() <= reach
        for queries, keys in ((height, h), (width, w))
    )
    found: list[Band] = []
    for top in range(0, height, BAND_ROWS):
        own = rows[top : top + BAND_ROWS]
        near = own.any(0).nonzero()
        first, last = int(near[0]), int(near[-1]) + 1
        mask = own[:, None, first:last, None] & columns[None, :, None, :]
        mask = mask.reshape(len(own) * width, (last - first) * w)
        queries = slice(top * width, (top + len(own)) * width)
        found.append((queries, slice(first * w, last * w), None if bool(mask.all()) else mask.to(device)))
    return found


class XGFB(nn.Module):
    """X-Gated Fusion Block (MICCAI 2024, figure 1): attention from the gated to the ungated task features.

    t' = gate(g, t) * t;   out = Attn(q = t', k = t, v = t)
    One head; no residual and no norm, as in the published code.
    """

    def __init__(self, task_channels: int, guide_channels: int, gate: str = "glu"):
        super().__init__()
        self.gate = ChannelGate(task_channels, guide_channels, gate)
        self.attention = Attention(task_channels, task_channels)

    def forward(self, task: Tensor, latent: Tensor) -> Tensor:
        gated = self.gate(task, latent) * task
        return self.attention(gated, task, task)


class EFB(XGFB):
    """Enhanced Fusion Block (JMIS 2024, section on the gated fusion block): the gated features attend to themselves.

    t' = gate(g, t) * t;   out = Attn(q = t', k = t', v = t'), with the parts of `XGFB`.
    """

    def forward(self, task: Tensor, latent: Tensor) -> Tensor:
        gated = self.gate(task, latent) * task
        return self.attention(gated, gated, gated)


class Concat(nn.Module):
    """Guidance without the block (the paper's table 3): out = ReLU(BN(W [t; g])), g on the task's grid."""

    def __init__(self, task_channels: int, guide_channels: int):
        super().__init__()
        self.mix = nn.Conv2d(task_channels + guide_channels, task_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(task_channels)

    def forward(self, task: Tensor, latent: Tensor) -> Tensor:
        return F.relu(self.norm(self.mix(torch.cat([task, at_grid(latent, *task.shape[-2:])], dim=1))))


class Cross(nn.Module):
    """Ours: the task's tokens attend to the guide's, with residual and norm.

    out = t + Wo Attn(q = Wq N(t), k = Wk N(g), v = Wv N(g)), where N normalizes each token over its channels
    (one-group norm of a token, learned scale). The guide's tokens need not lie on the task's grid. Wo starts at zero,
    so training starts from the unguided network.

    Args:
        reach: a token attends to the guide's tokens at most so many cells away (4 cells are 64 px of the image), so
            that what it finds does not depend on how large a tile it lies in; None for no limit.
    """

    def __init__(self, task_channels: int, guide_channels: int, heads: int = 4, reach: int | None = 4):
        super().__init__()
        self.task_norm = nn.LayerNorm(task_channels)
        self.guide_norm = nn.LayerNorm(guide_channels)
        self.attention = Attention(task_channels, guide_channels, heads, reach)
        nn.init.zeros_(self.attention.out.weight)
        assert self.attention.out.bias is not None
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, task: Tensor, latent: Tensor) -> Tensor:
        def channels_normalized(norm: nn.LayerNorm, x: Tensor) -> Tensor:
            return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        guide = channels_normalized(self.guide_norm, latent)
        return task + self.attention(channels_normalized(self.task_norm, task), guide, guide)


FUSIONS = {"x_gfb": XGFB, "efb": EFB, "concat": Concat, "cross": Cross}


def build_fusion(name: str, task_channels: int, guide_channels: int, **options) -> nn.Module:
    """A fusion block (t, g) -> (B, T, H, W); raises ValueError for an unknown name, listing the choices."""
    if name not in FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; choose from {', '.join(FUSIONS)}")
    return FUSIONS[name](task_channels, guide_channels, **options)


LEVELS = ("bottleneck", "all")


def feature_shapes(network: SegmentationNetwork) -> list[tuple[int, int]]:
    """(channels, stride) of each of a network's features, from finest to coarsest."""
    training = network.training
    side = 2 * network.stride
    with torch.no_grad():
        features = network.eval().encode(torch.zeros(1, 3, side, side))
    network.train(training)
    return [(feature.shape[1], side // feature.shape[-1]) for feature in features]


def level_gates(network: SegmentationNetwork, guide_channels: int, gate: str = "glu") -> list[nn.Module]:
    """A `ChannelGate` for each of a network's features but the deepest (the published code's advanced option)."""
    return [ChannelGate(channels, guide_channels, gate) for channels, _ in feature_shapes(network)[:-1]]


class FinerGuidance(nn.Module):
    """A `Concat` for each of the finer features that a guide's latent holds, with the task's of the same stride.

    Those that are no finer than the task's deepest features, or meet none of their stride, are left out.

    Args:
        strides, channels: of the network's features, from the finest. base: stride of the latent.
        finer: of `GuideSpec`: channels of each of the guide's finer features, and how many times finer they are.
    """

    def __init__(
        self, strides: Sequence[int], channels: Sequence[int], finer: Sequence[tuple[int, int]], base: int = 16
    ):
        super().__init__()
        self.finer = tuple(finer)
        self.sizes = [wide * times**2 for wide, times in finer]         # channels of the latent that each takes
        at = [base // times for _, times in finer]
        self.levels = {number: strides.index(stride) for number, stride in enumerate(at) if stride in strides[:-1]}
        self.blocks = nn.ModuleList(Concat(channels[level], finer[number][0]) for number, level in self.levels.items())

    def unpacked(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, h, w) -> the latent without what is packed in it, and that: (B, channels, times h, times w) each."""
        rest, *packed = latent.split([latent.shape[1] - sum(self.sizes), *self.sizes], dim=1)
        return rest, [F.pixel_shuffle(x, times) for x, (_, times) in zip(packed, self.finer, strict=True)]


class Guided(nn.Module):
    """Any encode/decode network, its deepest features fused with a foundation model's latent.

    Args:
        finer: for a guide whose latent holds finer features, too: fuses them with the network's own.
        gates: for the finer features, from the finest: each becomes gate(t, g) * t; none where empty.
        latent_dropout: probability, while training, of dropping a channel of the latent, so that the network does not
            come to lean on what the guide says of the few tissues it was trained on.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        fusion: nn.Module,
        latent_dropout: float = 0.0,
        gates: Iterable[nn.Module] = (),
        finer: FinerGuidance | None = None,
    ):
        super().__init__()
        self.network = network
        self.fusion = fusion
        self.gates = nn.ModuleList(gates)
        self.finer = finer
        self.latent_dropout = nn.Dropout2d(latent_dropout)

    def forward(self, image: Tensor, latent: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of an image (B, 3, H, W), RGB 0..255, and its latent (B, C, h, w)."""
        height, width = image.shape[-2:]
        features = self.network.encode(pad_to_stride(image, self.network.stride))
        if self.finer is not None:
            latent, finer = self.finer.unpacked(latent)
            for (number, level), block in zip(self.finer.levels.items(), self.finer.blocks, strict=True):
                features[level] = block(features[level], self.latent_dropout(finer[number]))
        latent = halved(latent, *features[-1].shape[-2:])
        latent = self.latent_dropout(latent)
        for level, gate in enumerate(self.gates):
            features[level] = gate(features[level], latent) * features[level]
        features[-1] = self.fusion(features[-1], latent)
        return cropped(self.network.decode(features), height, width)
