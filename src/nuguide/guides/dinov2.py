"""The vision transformers of DINOv2 (Oquab et al. 2023, arXiv 2304.07193), learned without labels or masks.

Plain ViT blocks (Dosovitskiy et al. 2021) over patches of 14 px, all attending to all, each branch scaled channel by
channel (Touvron et al. 2021, CaiT). The files are those of the Hugging Face hub, whose names are translated.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fitting import fitted, padded_to

PATCH_PX = 14
NATIVE_PX = 518
NATIVE_GRID = NATIVE_PX // PATCH_PX

HUGGING_FACE_NAMES = (                                  # its names, in files and in memory -> ours
    ("^embeddings\\.cls_token$", "cls_token"),
    ("^embeddings\\.position_embeddings$", "pos_embed"),
    ("^embeddings\\.patch_embeddings\\.projection\\.", "patch_embed."),
    ("^encoder\\.layer\\.", "blocks."),
    ("\\.attention\\.(attention\\.query|q_proj)\\.", ".query."),
    ("\\.attention\\.(attention\\.key|k_proj)\\.", ".key."),
    ("\\.attention\\.(attention\\.value|v_proj)\\.", ".value."),
    ("\\.attention\\.(output\\.dense|o_proj)\\.", ".out."),
    ("\\.mlp\\.fc([12])\\.", ".fc\\1."),
    ("\\.layer_scale([12])\\.lambda1$", ".scale\\1.weight"),
    ("^layernorm\\.", "norm."),
)
UNUSED = "embeddings.mask_token"                        # stands for hidden patches while DINOv2 is trained


def dinov2_small(image_px: int = NATIVE_PX) -> Dinov2Guide:
    """ViT-S/14: 22 million parameters, a latent of 384 channels."""
    return Dinov2Guide(depth=12, width=384, heads=6, image_px=image_px)


def dinov2_base(image_px: int = NATIVE_PX) -> Dinov2Guide:
    """ViT-B/14: 87 million parameters, a latent of 768 channels."""
    return Dinov2Guide(depth=12, width=768, heads=12, image_px=image_px)


class Dinov2Guide(nn.Module):
    """RGB 0..255 (B, 3, H, W) of any size -> latent (B, width, h, w), the longer of h and w being image_px / 14.

    The image is resized so that its longest side is `image_px`, normalized with ImageNet's mean and deviation, and
    padded with the mean color below and on the right to whole patches. The latent is the last block's patch tokens
    after the final norm; the class token takes part and is left out. The position table is learned for 37 x 37 patches
    and interpolated (bicubic) to any other grid.
    """

    def __init__(self, depth: int, width: int, heads: int, image_px: int = NATIVE_PX):
        super().__init__()
        if image_px % PATCH_PX:
            raise ValueError(f"image_px must be a multiple of {PATCH_PX}, got {image_px}")
        self.image_px = image_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + NATIVE_GRID**2, width))
        self.patch_embed = nn.Conv2d(3, width, PATCH_PX, stride=PATCH_PX)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = fitted(image, self.image_px)
        height, width = (-(-side // PATCH_PX) for side in x.shape[-2:])
        patches = self.patch_embed(padded_to(x, height * PATCH_PX, width * PATCH_PX).to(self.pos_embed.dtype))
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self.positions(height, width)                        # (B, 1 + h w, C)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (height, width))

    def positions(self, height: int, width: int) -> Tensor:
        """What is added to the class token and to each patch of a grid: (1, 1 + height width, C)."""
        if (height, width) == (NATIVE_GRID, NATIVE_GRID):
            return self.pos_embed
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (NATIVE_GRID, NATIVE_GRID))
        table = F.interpolate(table.float(), (height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    def adapted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under this module's names: those of the hub (`Dinov2Model`, alone or in a classifier)."""
        if any(key.startswith("dinov2.") for key in state):
            state = {key.removeprefix("dinov2."): v for key, v in state.items() if key.startswith("dinov2.")}
        result = {}
        for key, value in state.items():
            for pattern, name in HUGGING_FACE_NAMES:
                key = re.sub(pattern, name, key)
            if key != UNUSED:
                result[key] = value
        return result


class Block(nn.Module):
    """x + s1 * attention(norm(x)), then x + s2 * mlp(norm(x)), on tokens (B, N, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.scale1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2 = Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def attention(self, x: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d)) v by heads, projected."""
        projected = (layer(x) for layer in (self.query, self.key, self.value))
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)    # each (B, heads, N, d)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    """Each channel of (B, N, C) times a learned factor."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
