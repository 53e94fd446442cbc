"""Latents of the frozen guides, computed once and kept on disk, bounded."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from .guides import CELLS_PX, FrozenGuide
from .networks.blocks import MaxBlurPool
from .tiling import regions
from .types import Tile, UserError

log = logging.getLogger(__name__)

FORMAT = "1"                                            # of the files, and of how latents are computed and pooled
KEPT_SHARE = 0.9                                        # of max_bytes, left when a full cache is thinned
ABANDONED_S = 3600.0                                    # after which another process's half-written file is litter


class LatentCache:
    """Latents by (pixels, guide, weights, preprocessing, precision, pool), as fp16 on disk.

    Processes may share one folder: files appear in one step, and a file that another process removed is computed
    again. What was used longest ago goes first when the files exceed `max_bytes`. The device is not part of the key:
    a latent computed on a GPU is served to a CPU, from which it differs by rounding.

    Args:
        root: the folder; made where it doesn't exist. Nothing but latents belongs there.
        max_bytes: the most that the files take together (a 256 x 16 x 16 latent takes 128 KiB).

    Raises:
        UserError: the folder can't be made.
    """

    def __init__(self, root: Path, max_bytes: int = 10 << 30):
        self.root, self.max_bytes = root, max_bytes
        self._held_bytes: int | None = None             # as far as this process knows; counted at the first write
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't keep latents in {root} ({error}); choose another folder") from error

    def latent(self, guide: FrozenGuide, image_rgb: np.ndarray, pool: int | None = None) -> Tensor:
        """The guide's latent of one image, from disk or computed; a hit equals the computation bit for bit.

        Args:
            guide: a frozen guide; the latent is computed where its weights lie, under the caller's autocast.
            image_rgb: (H, W, 3) uint8.
            pool: the grid to reduce to (`pooled`), or None for the guide's own.

        Returns:
            (channels, h, w) float16 on the CPU, without gradient.
        """
        path = self.path(guide, image_rgb, pool)
        latent = read(path)
        if latent is None:
            latent = compute(guide, image_rgb, pool)
            self._write(path, latent)
        return latent

    def path(self, guide: FrozenGuide, image_rgb: np.ndarray, pool: int | None = None) -> Path:
        """The file that holds, or would hold, this latent."""
        if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
            raise ValueError(f"expected an RGB image (H, W, 3) uint8, got {image_rgb.shape} {image_rgb.dtype}")
        how = (FORMAT, guide.spec.name, guide.weights_id, guide.preprocessing, precision(guide), pool)
        key = hashlib.sha256(repr((how, image_rgb.shape)).encode())
        key.update(image_rgb.tobytes())
        name = key.hexdigest()
        return self.root / name[:2] / f"{name}.safetensors"

    def _write(self, path: Path, latent: Tensor) -> None:
        data = safetensors.torch.save({"latent": latent}, {"crc32": checksum(latent)})
        if len(data) > self.max_bytes:
            log.warning("a latent of %d bytes does not fit a cache of %d bytes", len(data), self.max_bytes)
            return
        half_written = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            half_written.write_bytes(data)
            os.replace(half_written, path)
        except OSError as error:                        # the latent is still right; only the next time is slower
            half_written.unlink(missing_ok=True)
            log.warning("can't keep a latent in %s: %s", self.root, error)
            return
        if self._held_bytes is None:
            self._held_bytes = sum(file.bytes for file in self._files())
        else:
            self._held_bytes += len(data)
        if self._held_bytes > self.max_bytes:
            self._thin()

    def _thin(self) -> None:
        """Delete the latents used longest ago until the rest takes `KEPT_SHARE` of the bound, and litter."""
        files = sorted(self._files(), key=lambda file: file.used_s)
        held = sum(file.bytes for file in files)
        *older, newest = files
        for file in older:
            if held > KEPT_SHARE * self.max_bytes:
                file.path.unlink(missing_ok=True)
                held -= file.bytes
        self._held_bytes = held
        for litter in self.root.glob("??/*.tmp"):
            try:
                if time.time() - litter.stat().st_mtime > ABANDONED_S:
                    litter.unlink()
            except FileNotFoundError:                   # its process was alive after all
                continue

    def _files(self) -> list[_File]:
        files = []
        for path in self.root.glob("??/*.safetensors"):
            try:
                about = path.stat()
            except FileNotFoundError:                   # removed by another process
                continue
            files.append(_File(path, about.st_size, about.st_mtime))
        return files


class _File(NamedTuple):
    path: Path
    bytes: int
    used_s: float


class RegionLatents:
    """The latent of any part of an image, pieced together from regions that are each encoded once, when first needed.

    For guides of scale "region". Each cell comes from the region whose core holds it.

    Args:
        shape: (H, W) of the image, at the network's resolution. guide: gives the regions' side and the cells' size.
        encode: the latent (C, h, w) of a region, as `FrozenGuide` of scale "region" makes it.
    """

    def __init__(self, shape: tuple[int, int], guide: FrozenGuide, encode: Callable[[Tile], Tensor]):
        assert guide.image_px is not None
        self.stride, self.encode = guide.spec.stride, encode
        self.regions = regions(shape, guide.image_px, CELLS_PX)
        self.known: dict[Tile, Tensor] = {}

    def part(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """The latent (C, h, w) of a rectangle of the image whose sides are multiples of the stride.

        Parts are to be asked for from the top down: regions that end above `top` are forgotten.
        """
        self.known = {region: latent for region, latent in self.known.items() if region.core_bottom > top}
        stride, result = self.stride, None
        for region in self.regions:
            rows = range(max(region.core_top, top), min(region.core_bottom, bottom), stride)
            columns = range(max(region.core_left, left), min(region.core_right, right), stride)
            if not rows or not columns:
                continue
            if region not in self.known:
                self.known[region] = self.encode(region)
            latent = self.known[region]
            if result is None:
                result = latent.new_zeros(len(latent), (bottom - top) // stride, (right - left) // stride)
            cells = [
                [slice((run[0] - first) // stride, (run[0] - first) // stride + len(run)) for first in firsts]
                for run, *firsts in ((rows, region.top, top), (columns, region.left, left))
            ]
            (from_rows, to_rows), (from_columns, to_columns) = cells
            result[:, to_rows, to_columns] = latent[:, from_rows, from_columns]
        assert result is not None
        return result


@torch.no_grad()
def compute(guide: FrozenGuide, image_rgb: np.ndarray, pool: int | None = None) -> Tensor:
    """The guide's latent of one (H, W, 3) uint8 image, pooled: (channels, h, w) float16 on the CPU."""
    device = next(guide.parameters()).device
    image = torch.from_numpy(np.ascontiguousarray(image_rgb)).permute(2, 0, 1)[None].to(device)
    latent = guide(image.float()).float()
    if pool is not None:
        with torch.autocast(device.type, enabled=False):
            latent = pooled(latent, pool)
    latent = latent[0].to(torch.float16).contiguous().cpu()
    if not torch.isfinite(latent).all():
        raise ValueError(f"{guide.spec.name} gave a latent beyond the range of float16; it is not cached")
    return latent


def pooled(latent: Tensor, grid: int) -> Tensor:
    """A latent (B, C, h, w) on a grid x grid raster.

    A square latent whose side is grid, 2 grid, 4 grid, ... is halved by max-blur pooling, as the paper's code does
    with SAM's 64 x 64; any other is averaged over the cells of the raster (adaptive average pooling).
    """
    height, width = latent.shape[-2:]
    factor, rest = divmod(height, grid)
    if height != width or rest or factor & (factor - 1):
        return F.adaptive_avg_pool2d(latent, grid)
    halve = MaxBlurPool().to(latent.device)
    for _ in range(factor.bit_length() - 1):
        latent = halve(latent)
    return latent


def precision(guide: FrozenGuide) -> str:
    """The number type that the guide would compute in here: autocast's where that is on, else its weights'."""
    weight = next(guide.parameters())
    device = weight.device.type
    return str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)


def read(path: Path) -> Tensor | None:
    """The latent in a file, which counts as used now; None where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            latent, about = file.get_tensor("latent"), file.metadata() or {}
        os.utime(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s); computing it again", path, error)
        return None
    if about.get("crc32") != checksum(latent):
        log.warning("%s is damaged (checksum differs); computing it again", path)
        return None
    return latent


def checksum(latent: Tensor) -> str:
    """CRC-32 of a tensor's bytes; catches what a crash leaves of a file whose size is right."""
    return f"{zlib.crc32(latent.numpy().tobytes()):08x}"
