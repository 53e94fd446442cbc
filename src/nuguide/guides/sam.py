"""The image encoder of the Segment Anything Model (Kirillov et al. 2023, arXiv 2304.02643): a ViT with windows.

Plain ViT blocks (Li et al. 2022, arXiv 2203.16527): most attend within windows of 14 x 14 tokens, four attend to all;
relative positions are decomposed into rows and columns (Li et al. 2022, MViTv2, arXiv 2112.01526). Parameters carry the
names of the official checkpoints, so those load as they are; Hugging Face's names are translated.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fitting import fitted, padded_to

PATCH_PX = 16
WINDOW = 14
LATENT_CHANNELS = 256
NATIVE_PX = 1024
BIAS_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}       # glibc maps larger blocks afresh each time, which costs more

HUGGING_FACE_NAMES = (                                  # its names -> the official ones
    ("^layers\\.", "blocks."),
    ("^patch_embed\\.projection\\.", "patch_embed.proj."),
    ("^(blocks\\.\\d+)\\.layer_norm([12])\\.", "\\1.norm\\2."),
    ("^neck\\.conv1\\.", "neck.0."),
    ("^neck\\.layer_norm1\\.", "neck.1."),
    ("^neck\\.conv2\\.", "neck.2."),
    ("^neck\\.layer_norm2\\.", "neck.3."),
)


def sam_vit_b(image_px: int = NATIVE_PX) -> SamGuide:
    """SAM's base encoder: 90 million parameters. MedSAM and PathoSAM have the same shape."""
    return SamGuide(depth=12, width=768, heads=12, global_blocks=(2, 5, 8, 11), image_px=image_px)


def sam_vit_l(image_px: int = NATIVE_PX) -> SamGuide:
    """SAM's large encoder: 308 million parameters."""
    return SamGuide(depth=24, width=1024, heads=16, global_blocks=(5, 11, 17, 23), image_px=image_px)


def sam_vit_h(image_px: int = NATIVE_PX) -> SamGuide:
    """SAM's huge encoder: 637 million parameters."""
    return SamGuide(depth=32, width=1280, heads=16, global_blocks=(7, 15, 23, 31), image_px=image_px)


class SamGuide(nn.Module):
    """RGB 0..255 (B, 3, H, W) of any size -> latent (B, 256, h, w), the longer of h and w being image_px / 16.

    The image is resized (bilinear, antialiased where it shrinks) so that its longest side is `image_px`, normalized
    with SAM's mean and deviation, and padded with zeros below and on the right to a square. Of the latent, the cells
    that lie wholly in the padding are cut away: a square image gives the full grid, 64 x 64 at 1024 px. Other sizes
    than the native 1024 work with interpolated position tables (`adapted`); fewer pixels are faster and see less.
    """

    def __init__(self, depth: int, width: int, heads: int, global_blocks: tuple[int, ...], image_px: int = NATIVE_PX):
        super().__init__()
        if image_px % PATCH_PX:
            raise ValueError(f"image_px must be a multiple of {PATCH_PX}, got {image_px}")
        self.image_px = image_px
        self.encoder = ImageEncoder(depth, width, heads, global_blocks, grid=image_px // PATCH_PX)

    def forward(self, image: Tensor) -> Tensor:
        x = fitted(image, self.image_px)
        height, width = x.shape[-2:]
        latent = self.encoder(padded_to(x, self.image_px, self.image_px).to(self.encoder.pos_embed.dtype))
        return latent[..., : -(-height // PATCH_PX), : -(-width // PATCH_PX)]

    def adapted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors under this module's names, the position tables brought to its grid.

        Takes a whole SAM checkpoint (official: keys `image_encoder.`; Hugging Face: `vision_encoder.`), of which all
        but the image encoder is dropped, or an image encoder's own keys without prefix. Whether the result fits is
        for a strict load to say.
        """
        for prefix in ("image_encoder.", "vision_encoder."):
            if any(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                break
        grid, result = self.encoder.pos_embed.shape[1], {}
        for key, value in state.items():
            for pattern, name in HUGGING_FACE_NAMES:
                key = re.sub(pattern, name, key)
            if key == "pos_embed":
                value = resized_positions(value, grid)
            elif self.encoder.is_global_table(key):
                value = resized_distances(value, grid)
            result["encoder." + key] = value
        return result


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """Absolute positions (1, g, g, C) at another grid (1, grid, grid, C), bicubic."""
    if table.shape[1:3] == (grid, grid):
        return table
    resized = F.interpolate(table.float().permute(0, 3, 1, 2), (grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous()


def resized_distances(table: Tensor, grid: int) -> Tensor:
    """Relative positions (2 g - 1, C), from the farthest before to the farthest behind, for another grid, linear."""
    if len(table) == 2 * grid - 1:
        return table
    return F.interpolate(table.float().T[None], 2 * grid - 1, mode="linear", align_corners=False)[0].T.contiguous()


class ImageEncoder(nn.Module):
    """Normalized square (B, 3, 16 grid, 16 grid) -> (B, 256, grid, grid)."""

    def __init__(self, depth: int, width: int, heads: int, global_blocks: tuple[int, ...], grid: int):
        super().__init__()
        self.global_blocks = global_blocks
        self.patch_embed = PatchEmbedding(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, grid if index in global_blocks else WINDOW) for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, LATENT_CHANNELS, 1, bias=False),
            LayerNorm2d(LATENT_CHANNELS),
            nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(LATENT_CHANNELS),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image) + self.pos_embed    # (B, grid, grid, width)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def is_global_table(self, key: str) -> bool:
        """Whether the parameter of this name holds the relative positions of a block that attends to all tokens."""
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.rel_pos_[hw]", key)
        return found is not None and int(found[1]) in self.global_blocks


class PatchEmbedding(nn.Module):
    """Each 16 x 16 patch as one token: (B, 3, H, W) -> (B, H/16, W/16, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, stride=PATCH_PX)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on tokens (B, H, W, C)."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, window)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention within windows of `window` x `window` tokens: (B, H, W, C) -> (B, H, W, C).

    The logit of query i and key j is q_i k_j / sqrt(d) + q_i Rh[row_i - row_j] + q_i Rw[column_i - column_j]. Where
    windows don't divide the grid, zeros are added below and on the right, and take part as keys and values: a zero
    token's projection is the bias, so only real tokens are projected.
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = TokenLinear(width, 3 * width)
        self.proj = TokenLinear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * window - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * window - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        windows = divided(self.qkv(x), self.window, self.qkv.bias)                 # (B n, window², 3 C)
        q, k, v = windows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B n, heads, window², d)
        y = self.attend(q, k, v).transpose(1, 2).reshape(-1, self.window, self.window, channels)
        return self.proj(joined(y, height, width))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All of (N, heads, window², d); some query rows at a time, so the bias stays small in memory."""
        side = self.window
        queries = q.unflatten(2, (side, side))                                     # (N, heads, row, column, d)
        steps = torch.arange(side, device=q.device)
        distance = steps[:, None] - steps[None, :] + side - 1
        by_row = torch.einsum("nhrcd,rkd->nhrck", queries, self.rel_pos_h[distance])
        by_column = torch.einsum("nhrcd,ckd->nhrck", queries, self.rel_pos_w[distance])
        row_bytes = len(q) * self.heads * side**3 * q.element_size()
        rows = max(1, BIAS_BYTES.get(q.device.type, BIAS_BYTES["cpu"]) // row_bytes)
        parts = []
        for top in range(0, side, rows):
            part = slice(top, top + rows)
            bias = by_row[:, :, part, :, :, None] + by_column[:, :, part, :, None, :]
            bias = bias.flatten(4, 5).flatten(2, 3)                                # (N, heads, queries, keys)
            parts.append(F.scaled_dot_product_attention(queries[:, :, part].flatten(2, 3), k, v, attn_mask=bias))
        return torch.cat(parts, dim=2)


def divided(x: Tensor, window: int, filling: Tensor) -> Tensor:
    """Tokens (B, H, W, C) as windows (B n, window², C), row by row; `filling` (C,) stands where the grid has ended."""
    batch, height, width, channels = x.shape
    below, right = -height % window, -width % window
    if below or right:
        padded = filling.to(x.dtype).expand(batch, height + below, width + right, channels).clone()
        padded[:, :height, :width] = x
        x = padded
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))        # (B, down, window, across, window, C)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def joined(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `divided`: (B n, window, window, C) -> (B, height, width, C)."""
    window = windows.shape[1]
    down, across = -(-height // window), -(-width // window)
    x = windows.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width]


class Mlp(nn.Module):
    """C -> 4 C -> GELU -> C, token by token."""

    def __init__(self, width: int):
        super().__init__()
        self.lin1 = TokenLinear(width, 4 * width)
        self.lin2 = TokenLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class TokenLinear(nn.Linear):
    """`nn.Linear` on tokens (B, H, W, C); on a CPU as a 1x1 convolution, which takes the faster library everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
