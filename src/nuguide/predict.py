"""The predictor: an image goes in, its nuclei come out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import ModelSpec
from .confidence import agreement, chance, clarity, features
from .guides import load_guide
from .instances import CHANNELS, Separation, enlarge, separate
from .latents import RegionLatents
from .machine import choose_arithmetic, choose_device, keep_freed_memory
from .measure import AGREEMENT
from .networks import fold_batch_norm
from .networks.int8 import to_int8
from .normalize import StainNormalizer
from .nuclei import Nuclei
from .resample import resampled_size, resize_image, resize_map
from .stain import brightened, exposure_gain
from .tiling import batches, blend, cover, gather
from .types import Tile, UserError

log = logging.getLogger(__name__)

MOST_PX = 100_000_000       # of an image at the network's resolution: 56 bytes each, 5.6 GB
DEFAULT_MPP = 0.25          # of an image that does not say: what scanners call 40x
TILE_PX, OVERLAP_PX, MARGIN_PX = 768, 96, 16     # at the network's resolution
CONTEXT_PX = 192                                  # that the guide sees around a tile
PHASE_PX = 32                                     # the coarsest stride of networks and guides
MIRRORS = ((), (0,), (1,), (0, 1))                # axes of an image
WINDOW_PX, HALO_PX = 2048, 64                     # of the separation into nuclei


class Predictor:
    """A model made ready to segment images on one device.

    Batch norm is folded into the convolutions and memory laid out channels last; neither changes the result by more
    than rounding. In bf16 or int8 probabilities move by a few thousandths; fp32 is the reference.

    Args:
        model: a network or `Guided`, as `checkpoint.load` returns it; it is changed in place.
        guide: its frozen guide, or None. spec: its spec.
        device, precision: see `machine`. batch: tiles computed at once.
        tile_px, overlap_px: of the tiles, at the network's resolution. By default tiles are large, so that little is
            computed twice; where the guide resizes what it sees, they are as large as the patches of the training.
            They overlap by 96 px, small ones by a quarter.
        flips: average the maps of the image and its three mirror images; takes four times as long.
        min_probability: nuclei less likely than this are left out.
        separation: how maps become nuclei; by default as the spec says.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module | None,
        spec: ModelSpec,
        device: str = "auto",
        precision: str = "auto",
        batch: int = 1,
        tile_px: int | None = None,
        overlap_px: int | None = None,
        flips: bool = False,
        min_probability: float = 0.0,
        separation: Separation | None = None,
    ):
        if batch < 1:
            raise UserError(f"--batch must be 1 or more, not {batch}")
        if not 0 <= min_probability <= 1:
            raise UserError(f"--min-probability must lie between 0 and 1, not {min_probability}")
        keep_freed_memory()
        self.device = choose_device(device)
        self.precision = choose_arithmetic(precision, self.device, bool(spec.int8_ranges))
        self.model = fold_batch_norm(model.eval()).to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.precision == "int8":
            to_int8(self.model, spec.int8_ranges)
        self.guide = guide
        if guide is not None:
            self.guide = fold_batch_norm(guide.eval()).to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.spec = spec
        self.stain = StainNormalizer.from_dict(spec.stain) if spec.stain else None
        self.tile_px = tile_px or (max(spec.tile_px, 2 * PHASE_PX) if guide is not None and resizes(guide) else TILE_PX)
        self.batch, self._overlap_px, self.flips = batch, overlap_px, flips
        self.min_probability = min_probability
        self.separation = separation or Separation(**spec.separation)

    @property
    def overlap_px(self) -> int:
        """By how much neighboring tiles overlap."""
        return min(OVERLAP_PX, self.tile_px // 4) if self._overlap_px is None else self._overlap_px

    def segment(
        self, image_rgb: np.ndarray, mpp: float | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Nuclei:
        """Every nucleus of an image.

        Args:
            image_rgb: (H, W, 3) uint8.
            mpp: its microns per pixel; 0.25 (a 40x scan) is assumed, and logged, where it is not given.
            progress: called with (tiles done, tiles in all).

        Returns:
            Nuclei at the size of the image. With `flips` their table has the column `agreement`, too.

        Raises:
            UserError: the image is no 8-bit RGB image, mpp is not between 0.05 and 5, or the network would see more
                than `MOST_PX`.
            MemoryError: it does not fit into memory.
        """
        image_rgb = np.asarray(image_rgb)
        if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8 or not image_rgb.size:
            raise UserError(
                f"the image is {image_rgb.dtype} of shape {image_rgb.shape}; give 8-bit RGB, (height, width, 3) uint8"
            )
        if mpp is None:
            log.warning("no microns per pixel given; %s assumed (a 40x scan)", DEFAULT_MPP)
            mpp = DEFAULT_MPP
        if not 0.05 <= mpp <= 5:
            raise UserError(f"microns per pixel must lie between 0.05 and 5, not {mpp}; a 40x scan has about 0.25")
        size = resampled_size(image_rgb.shape[:2], mpp, self.spec.mpp)  # pyright: ignore[reportArgumentType]
        if size[0] * size[1] > MOST_PX:
            raise UserError(
                f"at {mpp:.4g} microns per pixel the image becomes {size[0] * size[1] / 1e6:.0f} megapixels for the "
                f"network, more than {MOST_PX / 1e6:.0f}; check the microns per pixel (--mpp), cut the image, or give "
                "--treat-as slide, which goes region by region"
            )
        views: list[np.ndarray] = []
        maps = self.probabilities(
            self.prepared(image_rgb, mpp), progress, lambda of_view: views.append(self.label(*of_view))
        )
        labels = self.label(*maps)
        fine = enlarge(labels, maps[0], image_rgb.shape[:2], self.separation.nucleus)
        nuclei = Nuclei.found(fine, image_rgb, resize_map(maps[0], fine.shape), mpp)  # pyright: ignore[reportArgumentType]
        index = nuclei.table["id"].to_numpy() - 1
        if self.spec.confidence:
            values = features(nuclei.table, clarity(labels, maps[1])[index])
            nuclei.table["probability"] = chance(values, self.spec.confidence)
        if views:
            nuclei.table[AGREEMENT] = agreement(labels, views)[index]
        return nuclei.above(self.min_probability)

    def prepared(self, image_rgb: np.ndarray, mpp: float) -> np.ndarray:
        """The image (H, W, 3) uint8 as the network wants it: at its resolution, exposure and stain."""
        small = resize_image(image_rgb, resampled_size(image_rgb.shape[:2], mpp, self.spec.mpp))
        return self.preparation(small)(small)

    def preparation(self, sample_rgb: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What brings any part of a picture to the exposure and stain that the network wants, as measured in a sample.

        Args:
            sample_rgb: (H, W, 3) uint8, at the network's resolution.
        """
        gain = exposure_gain(sample_rgb) if self.spec.exposure else 1.0
        if self.stain is None:
            return lambda image_rgb: brightened(image_rgb, gain)
        change = self.stain.change_for(brightened(sample_rgb, gain))
        return lambda image_rgb: change(brightened(image_rgb, gain))

    def probabilities(
        self,
        image_rgb: np.ndarray,
        progress: Callable[[int, int], None] | None = None,
        each: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Maps (2, H, W) float32 of `CHANNELS`, of an image (H, W, 3) uint8 at the network's resolution.

        Args:
            each: called with the maps of the image and of every mirror image, turned back, where there are any.
        """
        if not self.flips:
            return self._blended(image_rgb, progress)
        total = np.zeros((len(CHANNELS), *image_rgb.shape[:2]), np.float32)
        for number, axes in enumerate(MIRRORS):

            def step(done: int, tiles: int, before: int = number) -> None:
                if progress is not None:
                    progress(before * tiles + done, len(MIRRORS) * tiles)

            mirrored_maps = self._blended(np.ascontiguousarray(np.flip(image_rgb, axes)), step)
            maps = np.ascontiguousarray(np.flip(mirrored_maps, tuple(axis + 1 for axis in axes)))
            if each is not None:
                each(maps)
            total += maps
        return total / len(MIRRORS)

    def _blended(self, image_rgb: np.ndarray, progress: Callable[[int, int], None] | None) -> np.ndarray:
        shape = image_rgb.shape[:2]
        tiles = cover(shape, max(self.tile_px, PHASE_PX), self.overlap_px, PHASE_PX)
        mapped = self._map_tiles(image_rgb, tiles, progress)
        return blend(shape, mapped, len(CHANNELS), self.overlap_px, min(MARGIN_PX, self.overlap_px // 4))

    def label(self, nucleus: np.ndarray, interior: np.ndarray) -> np.ndarray:
        """The label map (H, W) int32 of two maps at the network's resolution, window by window where it is large."""

        def one(tile: Tile) -> np.ndarray:
            return separate(nucleus[tile.window], interior[tile.window], self.spec.mpp, self.separation)

        return gather(nucleus.shape, WINDOW_PX, HALO_PX, one)[0]  # pyright: ignore[reportArgumentType]

    def tile_maps(
        self, image_rgb: np.ndarray, tiles: Sequence[Tile], latent_of: Callable[[Tile], Tensor] | None = None
    ) -> list[np.ndarray]:
        """The maps of each tile, not blended, of an image (H, W, 3) uint8 as `prepared`: (V, 2, height, width) float32.

        V is 1; with `flips` there are those of the image and of each mirror image, turned back.

        What a tile gets depends on what lies within `CONTEXT_PX` of it, and on where it starts modulo `PHASE_PX`; not
        on which others come with it.

        Args:
            latent_of: gives the latent (1, C, h, w) of a tile, where the image is a part of a larger one and the guide
                sees regions of that; see `region_latents`. It cannot be given with `flips`.
        """
        if latent_of is not None and self.flips:
            raise ValueError("latents of one direction do not fit the mirror images")
        views = []
        for axes in MIRRORS if self.flips else MIRRORS[:1]:
            image = np.ascontiguousarray(np.flip(image_rgb, axes))
            turned = [mirrored(tile, image_rgb.shape[:2], axes) for tile in tiles]
            mapped = self._map_tiles(image, turned, None, latent_of)
            views.append([np.flip(maps, tuple(axis + 1 for axis in axes)) for _, maps in mapped])
        return [np.stack(of_tile) for of_tile in zip(*views, strict=True)]

    def _map_tiles(
        self,
        image_rgb: np.ndarray,
        tiles: list[Tile],
        progress: Callable[[int, int], None] | None,
        latent_of: Callable[[Tile], Tensor] | None = None,
    ) -> Iterator[tuple[Tile, np.ndarray]]:
        done = 0
        of_tile = latent_of or self._latents(image_rgb)
        for group in batches(tiles, self.batch):
            stack = np.stack([padded(image_rgb[tile.window], PHASE_PX) for tile in group])
            latents = None if of_tile is None else [of_tile(tile) for tile in group]
            maps = self.maps(as_batch(stack), None if latents is None else torch.cat(latents)).numpy()
            for tile, values in zip(group, maps, strict=True):
                yield tile, values[:, : tile.bottom - tile.top, : tile.right - tile.left]
            done += len(group)
            if progress is not None:
                progress(done, len(tiles))

    def _latents(self, image_rgb: np.ndarray) -> Callable[[Tile], Tensor] | None:
        """What gives the latent (1, C, h, w) of each tile of an image, asked for from the top down."""
        if self.guide is None:
            return None
        if not sees_regions(self.guide):
            return lambda tile: self.latent(image_rgb, tile)
        image = padded(image_rgb, PHASE_PX)
        return self.region_latents(image.shape[:2], lambda region: image[region.window])

    def region_latents(
        self, shape: tuple[int, int], pixels: Callable[[Tile], np.ndarray]
    ) -> Callable[[Tile], Tensor]:
        """What gives the latent (1, C, h, w) of each tile of an image whose guide sees regions.

        Tiles are best asked for from the top down; each region is then encoded once.

        Args:
            shape: (H, W) of the image, filled up to multiples of `PHASE_PX`. pixels: of a region (h, w, 3) uint8.
        """

        def encode(region: Tile) -> Tensor:
            assert self.guide is not None
            with self._computing():
                return self.guide(self._on_device(as_batch(pixels(region)[None])))[0]

        known = RegionLatents(shape, self.guide, encode)  # pyright: ignore[reportArgumentType]

        def part(tile: Tile) -> Tensor:
            bottom, right = (-(-side // PHASE_PX) * PHASE_PX for side in (tile.bottom, tile.right))
            return known.part(tile.top, tile.left, bottom, right)[None]

        return part

    def latent(self, image_rgb: np.ndarray, tile: Tile) -> Tensor:
        """The guide's latent (1, C, h, w) of a tile, seen with what lies around it.

        An encoder says other things of a border of its input than of the same place within an image; with
        `CONTEXT_PX` around the tile these do not reach it. A guide that resizes its input sees the tile alone.
        """
        assert self.guide is not None
        around = 0 if resizes(self.guide) else CONTEXT_PX
        # as far as the picture reaches, in whole strides: the latent is cut to the tile
        top, left = (start - min(around, start // PHASE_PX * PHASE_PX) for start in (tile.top, tile.left))
        seen = padded(image_rgb[top : tile.bottom + around, left : tile.right + around], PHASE_PX)
        with self._computing():
            latent = self.guide(self._on_device(as_batch(seen[None])))
        if not around:
            return latent
        stride = seen.shape[0] // latent.shape[2]
        rows, columns = (
            slice((start - first) // stride, (start - first + -(-(stop - start) // PHASE_PX) * PHASE_PX) // stride)
            for start, stop, first in ((tile.top, tile.bottom, top), (tile.left, tile.right, left))
        )
        return latent[:, :, rows, columns]

    def maps(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Probabilities (B, 2, H, W) float32 on the CPU, of images (B, 3, H, W) uint8.

        Args:
            latent: of the images, where it is known; else a guided model asks its guide.

        Raises:
            MemoryError: the batch is too large for the device.
        """
        image = self._on_device(image)
        with self._computing():
            if self.guide is None:
                logits = self.model(image)
            else:
                logits = self.model(image, self.guide(image) if latent is None else latent)
            return logits.float().sigmoid().cpu()

    def _on_device(self, image: Tensor) -> Tensor:
        return image.to(self.device).float().contiguous(memory_format=torch.channels_last)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradients, in the predictor's arithmetic; memory that runs out is a MemoryError."""
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):     # on GPU; on CPU
                raise MemoryError("a tile does not fit into memory; lower --batch") from error
            raise


def mirrored(tile: Tile, shape: tuple[int, int], axes: tuple[int, ...]) -> Tile:
    """Where a tile of an image of `shape` lies once the image is flipped along `axes`; its core is all of it."""
    top, bottom = (shape[0] - tile.bottom, shape[0] - tile.top) if 0 in axes else (tile.top, tile.bottom)
    left, right = (shape[1] - tile.right, shape[1] - tile.left) if 1 in axes else (tile.left, tile.right)
    return Tile(top, left, bottom, right, top, left, bottom, right)


def resizes(guide: nn.Module) -> bool:
    """Whether a guide brings what it sees to a size of its own."""
    return getattr(guide, "image_px", None) is not None


def sees_regions(guide: nn.Module | None) -> bool:
    """Whether a guide sees images at their own scale, in squares of its own size."""
    return getattr(guide, "scale", None) == "region"


def as_batch(images: np.ndarray) -> Tensor:
    """Images (B, H, W, 3) as (B, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def padded(image_rgb: np.ndarray, multiple: int) -> np.ndarray:
    """An image (H, W, 3), its last row and column repeated until both sides are multiples of `multiple`."""
    below, right = (-side % multiple for side in image_rgb.shape[:2])
    return np.pad(image_rgb, ((0, below), (0, right), (0, 0)), mode="edge") if below or right else image_rgb


def load(
    name: str | Path = "default",
    device: str = "auto",
    precision: str = "auto",
    batch: int = 1,
    guide_weights: str | Path | None = None,
    **options,
) -> Predictor:
    """A model by name or folder, ready to segment: `load("small").segment(image)`.

    Args:
        name: one of those that `nuguide models` lists, "default" for the one that commands use, or a folder.
        guide_weights: a file, where the model was trained with a guide whose weights are not the published ones.

    Raises:
        UserError: there is no such model, this machine lacks the device, or the model was trained with other weights
            of its guide.
    """
    guide = None
    if guide_weights is not None:
        spec = checkpoint.read_spec(checkpoint.model_folder(name))
        if spec.guide is None:
            raise UserError(f"{name}: has no guide, so guide_weights cannot be its weights; leave them out")
        guide = load_guide(spec.guide, guide_weights, spec.guide_px, spec.guide_scale)
    return Predictor(*checkpoint.load(name, guide), device=device, precision=precision, batch=batch, **options)
