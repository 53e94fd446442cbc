"""Whole slides with known truth: drawn H&E-like tissue on glass, as pyramids that OpenSlide and tifffile read.

    python benchmarks/drawn_slide.py FILE.svs|FILE.ome.tif [--width 100000] [--height 80000] [--mpp 0.25]

Prints one JSON line with the truth. A slide is laid out of a few drawn blocks, repeated: each distinct tile is encoded
once and stored once, and all its places in the file point to it. So a slide of any size is written within seconds and
takes as much room as its distinct tiles.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import tifffile

REDUCTIONS = (1, 4, 16)
GLASS_RGB = (243, 242, 244)
STROMA_RGB = (228, 170, 200)
NUCLEUS_RGB = (95, 60, 140)
INKS_RGB = {"green": (30, 130, 70), "blue": (30, 60, 170), "red": (215, 30, 40), "black": (25, 25, 28)}
NUCLEI_PER_PX = 2.3e-4     # 240 a block of 1024 px
RADIUS_UM = (1.75, 3.0)    # half axes: areas of 10 to 28 square microns
_GLASS, _INK = -1, -2      # in a plan; tissue blocks count from 0
_GAP_PX = 3                # between nuclei, and to the border of a block: none is cut by it


@dataclass(frozen=True)
class Block:
    """A square of tissue: (B, B, 3) uint8 and its label map (B, B) int32, 1 to n."""

    image_rgb: np.ndarray
    labels: np.ndarray
    centroids_px: np.ndarray = field(init=False)  # (n, 2): y, x, the center of the first pixel at (0, 0)
    areas_px: np.ndarray = field(init=False)      # (n,)

    def __post_init__(self) -> None:
        y, x = np.nonzero(self.labels)
        label = self.labels[y, x]
        areas = np.bincount(label)[1:]
        sums = np.stack([np.bincount(label, weights=place)[1:] for place in (y, x)], axis=1)
        object.__setattr__(self, "areas_px", areas)
        object.__setattr__(self, "centroids_px", sums / np.maximum(areas, 1)[:, None])


@dataclass(frozen=True)
class Truth:
    """What a drawn slide shows.

    Attributes:
        size_px: (height, width) of level 0.
        mpp: microns per pixel of level 0.
        plan: (rows, columns) int, the number of the block in each cell of the slide; below 0 there is no tissue.
        blocks: the drawn blocks.
    """

    size_px: tuple[int, int]
    mpp: float
    plan: np.ndarray
    blocks: tuple[Block, ...]

    @property
    def nuclei(self) -> int:
        """How many nuclei the slide has."""
        counts = np.array([len(block.areas_px) for block in self.blocks])
        return int(counts[self.plan[self.plan >= 0]].sum())

    @property
    def tissue_mm2(self) -> float:
        """Area of all blocks of tissue."""
        return float((self.plan >= 0).sum() * (len(self.blocks[0].labels) * self.mpp / 1000) ** 2)

    def cells(self) -> Iterator[tuple[int, int, Block]]:
        """(top, left, block) of each block of tissue in pixels of level 0, in the order of `centroids_px`."""
        side = len(self.blocks[0].labels)
        for row, column in np.argwhere(self.plan >= 0):
            yield int(row) * side, int(column) * side, self.blocks[self.plan[row, column]]

    def centroids_px(self) -> np.ndarray:
        """(nuclei, 2): y, x in pixels of level 0, the center of the first pixel at (0, 0)."""
        places = [block.centroids_px + (top, left) for top, left, block in self.cells()]
        return np.concatenate(places) if places else np.empty((0, 2))

    def areas_um2(self) -> np.ndarray:
        """(nuclei,) areas in square microns."""
        areas = [block.areas_px for _, _, block in self.cells()]
        return np.concatenate(areas) * self.mpp**2 if areas else np.empty(0)

    def labels(self) -> np.ndarray:
        """(H, W) int32 label map of level 0, numbered as `centroids_px`: for slides that fit into memory."""
        labels = np.zeros(self.size_px, np.int32)
        count = 0
        for top, left, block in self.cells():
            window = labels[top : top + len(block.labels), left : left + len(block.labels)]
            window[...] = np.where(block.labels > 0, block.labels + count, 0)
            count += len(block.areas_px)
        return labels


def draw_block(side_px: int, mpp: float, rng: np.random.Generator, density: float = NUCLEI_PER_PX) -> Block:
    """A block of tissue: purple ellipses with chromatin, apart from each other, on pink stroma.

    Args:
        side_px: of the square, in pixels of `mpp`.
        density: nuclei per pixel at 0.25 microns per pixel; fewer are drawn where there is no room.
    """
    fiber = cv2.GaussianBlur(rng.normal(0, 1, (side_px, side_px)).astype(np.float32), (0, 0), 3 / mpp / 2)
    fiber = 12 * (fiber / fiber.std())[..., None] * np.array([0.4, 1.0, 0.6], np.float32)
    image = np.array(STROMA_RGB, np.float32) + fiber
    chromatin = cv2.GaussianBlur(rng.normal(0, 1, (side_px, side_px)).astype(np.float32), (0, 0), 0.5 / mpp)
    chromatin /= chromatin.std()
    labels = np.zeros((side_px, side_px), np.int32)
    wanted = round(density * side_px**2 * (mpp / 0.25) ** 2)
    reach = int(np.ceil(RADIUS_UM[1] / mpp)) + _GAP_PX
    found = 0
    for _ in range(wanted * 10):
        if found == wanted or 2 * reach >= side_px:
            break
        y, x = rng.integers(reach, side_px - reach, 2)
        axes = rng.uniform(*RADIUS_UM, 2) / mpp
        window = np.s_[y - reach : y + reach + 1, x - reach : x + reach + 1]
        one = np.zeros((2 * reach + 1,) * 2, np.uint8)
        cv2.ellipse(one, ((reach, reach), tuple(2 * axes), float(rng.uniform(0, 180))), 1, -1)
        near = cv2.dilate(one, np.ones((2 * _GAP_PX + 1,) * 2, np.uint8))
        if not one.any() or labels[window][near > 0].any():
            continue
        found += 1
        inside = one > 0
        labels[window][inside] = found
        color = np.array(NUCLEUS_RGB, np.float32) + rng.normal(0, 10, 3).astype(np.float32)
        image[window][inside] = color + 8 * chromatin[window][inside][:, None]
    image = cv2.GaussianBlur(image, (0, 0), 0.7) + rng.normal(0, 1.5, image.shape)
    return Block(np.clip(image, 0, 255).astype(np.uint8), labels)


def write_slide(
    path: Path,
    size_px: tuple[int, int],
    mpp: float | None = 0.25,
    *,
    seed: int = 0,
    block_px: int = 256,
    blocks: int = 3,
    glass_blocks: int = 1,
    ink: str | None = None,
    compression: str = "jpeg",
    tile_px: int = 256,
    density: float = NUCLEI_PER_PX,
    given: Sequence[Block] = (),
) -> Truth:
    """The truth of a slide that is drawn into `path`: OME-TIFF where its name ends with .ome.tif, else as Aperio's.

    Levels are 1, 4 and 16 times reduced. Tissue fills the slide but for `glass_blocks` blocks along each border (more
    where the size is no multiple of a block).

    Args:
        size_px: (height, width) of level 0.
        mpp: microns per pixel; None draws at 0.25 and does not say so in the file.
        block_px: side of a block, a power of two of at least 64.
        blocks: distinct blocks of tissue.
        ink: a color of `INKS_RGB`: a column of blocks at the left border of the tissue carries a stroke of a pen.
        compression: "jpeg" (quality 85, RGB without subsampling) or "zlib".
        tile_px: side of a tile, a power of two.
        density: nuclei per pixel of 0.25 microns.
        given: real tissue to lay out instead of drawn blocks, all squares of `block_px`.
    """
    drawn_mpp = mpp or 0.25
    rng = np.random.default_rng(seed)
    tissue = tuple(given) or tuple(draw_block(block_px, drawn_mpp, rng, density) for _ in range(blocks))
    plan = _plan(size_px, block_px, len(tissue), glass_blocks, ink is not None)
    pictures = {number: block.image_rgb for number, block in enumerate(tissue)}
    pictures[_GLASS] = _noisy(np.full((block_px, block_px, 3), GLASS_RGB, np.float32), rng)
    stroke = np.full((block_px, block_px, 3), GLASS_RGB, np.float32)
    stroke[:, block_px // 4 : -block_px // 4] = INKS_RGB.get(ink or "", GLASS_RGB)
    pictures[_INK] = _noisy(stroke, rng)
    levels = [_Level(plan, _reduced(pictures, reduction), size_px, reduction, tile_px) for reduction in REDUCTIONS]
    path = Path(path)
    write = _write_ome if path.name.endswith((".ome.tif", ".ome.tiff")) else _write_aperio
    stores = write(path, levels, mpp, _ENCODERS[compression])
    _share_tiles(path, stores, compression)
    return Truth(size_px, drawn_mpp, plan, tissue)


def _plan(size_px: tuple[int, int], block_px: int, blocks: int, glass_blocks: int, ink: bool) -> np.ndarray:
    height, width = size_px
    plan = np.full((-(-height // block_px), -(-width // block_px)), _GLASS)
    bottom, right = height // block_px - glass_blocks, width // block_px - glass_blocks
    if bottom <= glass_blocks or right <= glass_blocks:
        raise ValueError(f"{height} x {width} pixels have no room for tissue in blocks of {block_px} px")
    inside = plan[glass_blocks:bottom, glass_blocks:right]
    rows, columns = np.indices(inside.shape)
    inside[...] = (rows + 2 * columns) % blocks  # periodic: few distinct tiles at every level
    if ink:
        inside[:, 0] = _INK
    return plan


def _noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 1.0, image.shape), 0, 255).astype(np.uint8)


def _reduced(pictures: dict[int, np.ndarray], reduction: int) -> dict[int, np.ndarray]:
    def smaller(image: np.ndarray) -> np.ndarray:
        side = len(image) // reduction
        return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)

    return pictures if reduction == 1 else {number: smaller(image) for number, image in pictures.items()}


@dataclass(frozen=True)
class _Level:
    """One level of the slide, tile by tile."""

    plan: np.ndarray
    pictures: dict[int, np.ndarray]
    full_px: tuple[int, int]
    reduction: int
    tile_px: int

    @property
    def size_px(self) -> tuple[int, int]:
        return self.full_px[0] // self.reduction, self.full_px[1] // self.reduction

    def tiles(self) -> Iterator[tuple[tuple[object, ...], Callable[[], np.ndarray]]]:
        """What tells a tile from others, and what draws it, row by row."""
        height, width = self.size_px
        for top in range(0, height, self.tile_px):
            for left in range(0, width, self.tile_px):
                cells, y, x = self._cells(top, left)
                yield (y, x, cells.shape, cells.tobytes()), lambda c=cells, y=y, x=x: self._draw(c, y, x)

    def _cells(self, top: int, left: int) -> tuple[np.ndarray, int, int]:
        """The part of the plan under a tile, and the tile's first pixel in it."""
        side = len(self.pictures[_GLASS])
        rows, columns = (np.arange(start // side, -(-(start + self.tile_px) // side)) for start in (top, left))
        padded = np.full((len(rows), len(columns)), _GLASS)
        known = self.plan[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        padded[: known.shape[0], : known.shape[1]] = known
        return padded, top % side, left % side

    def _draw(self, cells: np.ndarray, y: int, x: int) -> np.ndarray:
        image = np.concatenate([np.concatenate([self.pictures[n] for n in row], axis=1) for row in cells.tolist()])
        return np.ascontiguousarray(image[y : y + self.tile_px, x : x + self.tile_px])

    def whole(self) -> np.ndarray:
        """(H, W, 3) uint8: the level in one piece."""
        height, width = self.size_px
        rows, columns = -(-height // self.tile_px), -(-width // self.tile_px)
        tiles = [draw() for _, draw in self.tiles()]
        return np.concatenate(
            [np.concatenate(tiles[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
        )[:height, :width]


class _Store:
    """Hands each distinct tile of a level to the writer once, and remembers where it is wanted again."""

    def __init__(self, level: _Level, encode: Callable[[np.ndarray], bytes]) -> None:
        self._level, self._encode = level, encode
        self.first: list[int] = []                 # for each tile, the number of the first one that is the same

    def __iter__(self) -> Iterator[bytes]:
        seen: dict[tuple[object, ...], int] = {}
        for number, (key, draw) in enumerate(self._level.tiles()):
            first = seen.setdefault(key, number)
            self.first.append(first)
            yield self._encode(draw()) if first == number else b""


def _jpeg(image_rgb: np.ndarray) -> bytes:
    """As many scanners have it: red, green and blue themselves, all at full resolution."""
    stream = io.BytesIO()
    PIL.Image.fromarray(image_rgb).save(stream, "jpeg", quality=85, subsampling=0, keep_rgb=True)
    return stream.getvalue()


def _deflate(image_rgb: np.ndarray) -> bytes:
    return zlib.compress(image_rgb.tobytes(), 3)


_ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {"jpeg": _jpeg, "zlib": _deflate}
_TAGS = {"jpeg": tifffile.COMPRESSION.JPEG, "zlib": tifffile.COMPRESSION.ADOBE_DEFLATE}
_PAGE = {"dtype": np.uint8, "photometric": "rgb", "compression": "zlib"}  # see _share_tiles


def _write_aperio(
    path: Path, levels: list[_Level], mpp: float | None, encode: Callable[[np.ndarray], bytes]
) -> list[_Store]:
    """Pages as a scanner writes them: full resolution, an untiled thumbnail, the other levels."""
    height, width = levels[0].size_px
    scale = f"|AppMag = {10 / mpp:g}|MPP = {mpp:.6f}" if mpp else ""
    header = f"Aperio Image Library v11.0.0\n{width}x{height} [0,0 {width}x{height}]"
    stores = [_Store(level, encode) for level in levels]
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, store in zip(levels, stores, strict=True):
            small_height, small_width = level.size_px
            reduced = "" if level.reduction == 1 else f" -> {small_width}x{small_height}"
            tiff.write(
                iter(store),
                shape=(*level.size_px, 3),
                tile=(level.tile_px, level.tile_px),
                description=f"{header} (256x256){reduced}{scale}",
                metadata=None,
                **_PAGE,
            )
            if level.reduction == 1:
                tiff.write(
                    levels[-1].whole(), photometric="rgb", compression="zlib", metadata=None, rowsperstrip=16,
                    description=f"{header} -> thumbnail",
                )
    return stores


def _write_ome(
    path: Path, levels: list[_Level], mpp: float | None, encode: Callable[[np.ndarray], bytes]
) -> list[_Store]:
    """One image whose smaller levels hang on it as SubIFDs."""
    said = {"PhysicalSizeX": mpp, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": mpp, "PhysicalSizeYUnit": "µm"}
    stores = [_Store(level, encode) for level in levels]
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as tiff:
        for number, (level, store) in enumerate(zip(levels, stores, strict=True)):
            tiff.write(
                iter(store),
                shape=(*level.size_px, 3),
                tile=(level.tile_px, level.tile_px),
                metadata={"axes": "YXS", **(said if mpp else {})} if number == 0 else None,
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,
                **_PAGE,
            )
    return stores


def _share_tiles(path: Path, stores: list[_Store], compression: str) -> None:
    """Let the places of repeated tiles point to the bytes of their first, and declare what these are.

    tifffile takes encoded tiles, but of JPEG only where it could encode them itself: written as deflate, they are
    declared here.
    """
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.useframes = False
        first = tiff.pages.first
        pages = [page for page in [*tiff.pages, *(first.pages or ())] if isinstance(page, tifffile.TiffPage)]
        pages = [page for page in pages if page.is_tiled]
        for page, store in zip(pages, stores, strict=True):
            for name in ("TileOffsets", "TileByteCounts"):
                tag = page.tags[name]
                values = np.atleast_1d(tag.value)[store.first]
                tag.overwrite(values.tolist())
            page.tags["Compression"].overwrite(int(_TAGS[compression]))


def main() -> None:
    """Draw a slide and print its truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--width", type=int, default=100_000)
    parser.add_argument("--height", type=int, default=80_000)
    parser.add_argument("--mpp", type=float, default=0.25)
    parser.add_argument("--block", type=int, default=1024, help="side of a drawn block in pixels")
    parser.add_argument("--glass", type=int, default=10, help="blocks of glass along each border")
    parser.add_argument("--ink", choices=sorted(INKS_RGB))
    parser.add_argument("--compression", choices=sorted(_ENCODERS), default="jpeg")
    options = parser.parse_args()
    start = time.perf_counter()
    truth = write_slide(
        options.file, (options.height, options.width), options.mpp, block_px=options.block,
        glass_blocks=options.glass, ink=options.ink, compression=options.compression,
    )
    print(
        json.dumps(
            {
                "file": options.file.name,
                "size_px": truth.size_px,
                "mpp": truth.mpp,
                "nuclei": truth.nuclei,
                "tissue_mm2": round(truth.tissue_mm2, 3),
                "megabytes": round(options.file.stat().st_size / 1e6, 1),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
