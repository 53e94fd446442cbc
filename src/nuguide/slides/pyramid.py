"""Tiled TIFF and OME-TIFF, read tile by tile: layout by tifffile, pixels by zlib, libtiff or OpenJPEG.

Nothing but the tiles under a window is ever decoded, each to no more than the size that was checked when the file was
opened.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.TiffImagePlugin import TiffImageFile

from nuguide.images import finished, refuse_cut_short, refuse_no_rgb, square_mpp, tiff_colors, tiff_scales
from nuguide.slides.slide import Slide, levels_of
from nuguide.slides.vendor import INSTALL, MAX_PIECE_PX
from nuguide.types import UserError

_CACHE_BYTES = 2**26
_NONE = 1
_DEFLATE = (8, 32946)
_JPEG2000 = (33005, 34712)                                # RGB; Aperio's other one, YCbCr, is for OpenSlide
_LIBTIFF = (5, 7, 32773, 34925, 50000, 50001)             # LZW, JPEG, PackBits, LZMA, Zstandard, WebP
_YCBCR = 6


def is_pyramid(path: Path) -> bool:
    """Whether a TIFF is tiled or has levels, in pieces small enough to be decoded one at a time, and upright."""
    with tifffile.TiffFile(path) as tiff:
        levels = _level_series(tiff)
        page = levels[0].keyframe
        return (
            (page.is_tiled or len(levels) > 1)
            and _piece_px(page) <= MAX_PIECE_PX
            and page.tags.valueof("Orientation", 1) == 1
        )


class PyramidSlide(Slide):
    """A TIFF of tiles or strips.

    Raises:
        UserError: it has no 8-bit RGB, is cut short, or has a compression that is not known; does not name the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with tifffile.TiffFile(path) as tiff:
            series = _level_series(tiff)
            page = series[0].keyframe
            refuse_no_rgb(series[0], page)
            series = [series[0], *(one for one in series[1:] if _is_like(one, series[0]))]
            for one in series:
                refuse_cut_short(one, path.stat().st_size)
            self._stored = tuple(_Stored(one) for one in series)
            self.levels = levels_of([stored.size_px for stored in self._stored])
            self.mpp = next((mpp for scale in tiff_scales(tiff, page) if (mpp := square_mpp(*scale))), None)
            text = tiff.ome_metadata or page.description
            self.format = "ome-tiff" if tiff.is_ome else "aperio" if tiff.is_svs else "tiff"
        power = re.search(r"\b(?:AppMag\s*=\s*|NominalMagnification=\")([0-9]+(?:\.[0-9]+)?)", text)
        self.objective_power = float(power[1]) if power else None
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._cache: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        stored = self._stored[level]
        tall, wide = stored.piece_px
        image = np.empty((height, width, 3), np.uint8)
        for row in range(top // tall, (top + height - 1) // tall + 1):
            for column in range(left // wide, (left + width - 1) // wide + 1):
                piece = self._piece(level, row, column)
                y, x = row * tall - top, column * wide - left
                window = image[max(y, 0) : y + tall, max(x, 0) : x + wide]
                part = piece[max(-y, 0) :, max(-x, 0) :]
                window[...] = part[: window.shape[0], : window.shape[1]]
        return image

    def _piece(self, level: int, row: int, column: int) -> np.ndarray:
        key = (level, row, column)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        stored = self._stored[level]
        data = [self._bytes(*place) for place in stored.places(row, column)]
        piece = stored.decode(data, row)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = piece
                self._cached_bytes += piece.nbytes
            while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return piece

    def _bytes(self, offset: int, count: int) -> bytes:
        """Bytes of the file, which is opened anew after an error: a drive may come back."""
        with self._lock:
            try:
                if self._file is None:
                    self._file = self.path.open("rb")
                self._file.seek(offset)
                data = self._file.read(count)
            except OSError:
                self._let_go()
                raise
        if len(data) < count:
            raise UserError(f"{count - len(data)} of {count} bytes are missing")
        return data

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        with self._lock:
            self._let_go()
            self._cache.clear()
            self._cached_bytes = 0


class _Stored:
    """How the pixels of one level lie in the file: pieces (tiles or strips) of one page, or of one page a channel."""

    def __init__(self, series: tifffile.TiffPageSeries) -> None:
        page = series.keyframe
        self.page = page
        self.size_px = (page.imagelength, page.imagewidth)
        self.piece_px = (page.tilelength, page.tilewidth) if page.is_tiled else (_strip_rows(page), page.imagewidth)
        self.across = -(-self.size_px[1] // self.piece_px[1])
        down = -(-self.size_px[0] // self.piece_px[0])
        self.planes: list[tuple[Sequence[int], Sequence[int]]] = []
        for one in filter(None, series.pages):
            offsets, counts = one.dataoffsets, one.databytecounts
            planes = len(offsets) // (down * self.across) if page.planarconfig == 2 else 1
            for plane in range(planes):
                part = slice(plane * down * self.across, (plane + 1) * down * self.across)
                self.planes.append((offsets[part], counts[part]))
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        self.coding = _Coding(
            compression=int(page.compression),
            predictor=int(page.predictor),
            photometric=int(page.photometric),
            samples=samples,
            jpeg_tables=page.jpegtables or b"",
            subsampling=tuple(page.tags.valueof("YCbCrSubSampling", (2, 2))),
        )
        self.coding.refuse_unknown()

    def places(self, row: int, column: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of a piece in the file, for each plane."""
        index = row * self.across + column
        for offsets, counts in self.planes:
            yield offsets[index], counts[index]

    def decode(self, data: Sequence[bytes], row: int) -> np.ndarray:
        """(h, w, 3) uint8 of a piece in `row` from its bytes, one for each plane; white where there are none."""
        tall, wide = self.piece_px
        if not self.page.is_tiled:
            tall = min(tall, self.size_px[0] - row * tall)
        if not all(data):
            return np.full((tall, wide, 3), 255, np.uint8)
        planes = [self.coding.decode(one, tall, wide) for one in data]
        channels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        return finished(*tiff_colors(channels, self.page), 1, None, []).image_rgb


@dataclass(frozen=True)
class _Coding:
    """How a piece is packed: the values of its page's tags."""

    compression: int
    predictor: int
    photometric: int
    samples: int
    jpeg_tables: bytes
    subsampling: tuple[int, ...]

    def refuse_unknown(self) -> None:
        known = {_NONE, *_DEFLATE, *_JPEG2000, *_LIBTIFF}
        bare_ycbcr = self.photometric == _YCBCR and self.compression != 7
        if self.compression not in known or self.predictor not in (1, 2) or bare_ycbcr:
            raise UserError(
                f"has tiles of compression {self.compression}, color {self.photometric} and predictor"
                f" {self.predictor}, which need OpenSlide or another format; {INSTALL}, or save it with JPEG or"
                " deflate tiles"
            )

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """(height, width, samples) uint8 as stored. A ValueError or one of the decoders' where it is damaged."""
        if self.compression in _LIBTIFF:
            return self._by_libtiff(data, height, width)
        if self.compression in _JPEG2000:
            with Jpeg2KImageFile(io.BytesIO(data)) as picture:
                if picture.size != (width, height):
                    raise ValueError("a tile has another size than the file declares")
                return np.array(picture).reshape(height, width, self.samples)
        size = height * width * self.samples
        if self.compression in _DEFLATE:
            data = zlib.decompressobj().decompress(data, size)  # no more, whatever is packed in it
        if len(data) < size:
            raise ValueError("a tile is cut short")
        pixels = np.frombuffer(data, np.uint8, size).reshape(height, width, self.samples)
        return np.cumsum(pixels, axis=1, dtype=np.uint8) if self.predictor == 2 else pixels

    def _by_libtiff(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The same by the libtiff in Pillow, of a TIFF in memory that holds the piece as its only strip."""
        photometric = 1 if self.samples < 3 else self.photometric  # grey values and palette indices as they are
        values: dict[int, tuple[str, tuple[int, ...]]] = {
            256: ("I", (width,)),
            257: ("I", (height,)),
            258: ("H", (8,) * self.samples),
            259: ("H", (self.compression,)),
            262: ("H", (photometric,)),
            273: ("I", (8,)),
            277: ("H", (self.samples,)),
            278: ("I", (height,)),
            279: ("I", (len(data),)),
            284: ("H", (1,)),
            317: ("H", (self.predictor,)),
        }
        if extra := self.samples - (3 if self.samples >= 3 else 1):
            values[338] = ("H", (0,) * extra)
        if self.jpeg_tables:
            values[347] = ("B", tuple(self.jpeg_tables))
        if photometric == _YCBCR:
            values[530] = ("H", self.subsampling)
        with TiffImageFile(io.BytesIO(_one_strip(data, values))) as picture:
            return np.array(picture).reshape(height, width, self.samples)


def _one_strip(data: bytes, values: dict[int, tuple[str, tuple[int, ...]]]) -> bytes:
    """A little-endian TIFF: its header, its only strip at byte 8, long values, and the directory of tags."""
    kinds = {"B": 7, "H": 3, "I": 4}                      # UNDEFINED, SHORT, LONG (TIFF 6.0, section 2)
    body = bytearray(b"II*\0\0\0\0\0" + data + b"\0" * (len(data) % 2))
    entries = []
    for tag, (kind, numbers) in sorted(values.items()):
        packed = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            place = len(body)
            body += packed + b"\0" * (len(packed) % 2)
            packed = struct.pack("<I", place)
        entries.append(struct.pack("<HHI4s", tag, kinds[kind], len(numbers), packed))
    struct.pack_into("<I", body, 4, len(body))
    return bytes(body + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0")


def _level_series(tiff: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """The largest image of a TIFF and the smaller ones that show the same: its levels, and pages of its shape."""
    len(tiff.pages)                                       # as in `images`: `series` would follow a loop of pages
    if not tiff.series:
        raise UserError("holds no image; copy it again from its source")
    largest = max(tiff.series, key=lambda one: one.keyframe.imagewidth * one.keyframe.imagelength)
    found = list(largest.levels)
    if not tiff.is_ome:                                   # which names its levels
        found += [
            one for other in tiff.series if other is not largest for one in other.levels
            if one.keyframe.is_tiled or one.keyframe.is_reduced
        ]
    return sorted(found, key=lambda one: -one.keyframe.imagewidth)


def _is_like(level: tifffile.TiffPageSeries, full: tifffile.TiffPageSeries) -> bool:
    """Whether a level can stand for the full resolution: channels and proportions are the same, its pieces small."""
    page, whole = level.keyframe, full.keyframe
    reduced = (whole.imagewidth / page.imagewidth + whole.imagelength / page.imagelength) / 2
    return (
        (level.axes, level.dtype, page.samplesperpixel, page.bitspersample)
        == (full.axes, full.dtype, whole.samplesperpixel, whole.bitspersample)
        and page.imagewidth < whole.imagewidth
        and all(
            abs(side / reduced - part) <= max(1.0, 0.005 * part)
            for side, part in ((whole.imagewidth, page.imagewidth), (whole.imagelength, page.imagelength))
        )
        and _piece_px(page) <= MAX_PIECE_PX
    )


def _piece_px(page: tifffile.TiffPage) -> int:
    return page.tilewidth * page.tilelength if page.is_tiled else _strip_rows(page) * page.imagewidth


def _strip_rows(page: tifffile.TiffPage) -> int:
    return min(page.tags.valueof("RowsPerStrip", page.imagelength), page.imagelength)
