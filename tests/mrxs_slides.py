"""Slides as MIRAX (MRXS): Slidedat.ini, Index.dat and Data0000.dat in a folder beside a thumbnail."""

from __future__ import annotations

import configparser
import io
import struct
from pathlib import Path

import numpy as np
import PIL.Image

TILE_PX = 128
SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
VERSION = "01.02"


def write_mrxs(path: Path, scan: np.ndarray, mpp: float, at: tuple[int, int], grid: tuple[int, int]) -> Path:
    """Write what was scanned, (H, W, 3) uint8 with sides that are multiples of `TILE_PX`, as PNG tiles; the path.

    The scanner's stage has `grid` (columns, rows) of tiles; the scan lies `at` (column, row) of it, and the rest is
    not stored. There are two levels, the second at half the size.

    Args:
        mpp: microns per pixel.
    """
    folder = path.with_suffix("")
    folder.mkdir()
    PIL.Image.fromarray(scan).resize((64, 64)).save(path, "JPEG")     # what the scanner leaves there
    (folder / "Slidedat.ini").write_text(slidedat(mpp, grid))
    data = bytearray((VERSION + SLIDE_ID).encode().ljust(64, b"\0"))
    entries: list[list[tuple[int, int, int]]] = [[], []]
    columns, rows = scan.shape[1] // TILE_PX, scan.shape[0] // TILE_PX
    for level, step in enumerate((1, 2)):
        first_column, first_row = (place - place % step for place in at)
        for row in range(first_row, at[1] + rows, step):
            for column in range(first_column, at[0] + columns, step):
                tile = _window(scan, (row - at[1]) * TILE_PX, (column - at[0]) * TILE_PX, step)
                file = io.BytesIO()
                PIL.Image.fromarray(tile).save(file, "PNG", compress_level=1)
                entries[level].append((row * grid[0] + column, len(data), file.tell()))
                data += file.getvalue()
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(index(entries))
    return path


def _window(scan: np.ndarray, top: int, left: int, step: int) -> np.ndarray:
    """A tile of the level with `step`; what was not scanned is white."""
    side = TILE_PX * step
    window = np.full((side, side, 3), 255, np.uint8)
    height, width = scan.shape[:2]
    y, x = max(top, 0), max(left, 0)
    bottom, right = min(top + side, height), min(left + side, width)
    window[y - top : bottom - top, x - left : right - left] = scan[y:bottom, x:right]
    return np.rint(window.reshape(TILE_PX, step, TILE_PX, step, 3).mean((1, 3))).astype(np.uint8)


def slidedat(mpp: float, grid: tuple[int, int]) -> str:
    """The text of Slidedat.ini."""
    ini = configparser.ConfigParser()
    ini.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    ini["GENERAL"] = {
        "SLIDE_VERSION": VERSION, "SLIDE_ID": SLIDE_ID, "IMAGENUMBER_X": str(grid[0]), "IMAGENUMBER_Y": str(grid[1]),
        "OBJECTIVE_MAGNIFICATION": "20", "CameraImageDivisionsPerSide": "1",
    }
    ini["HIERARCHICAL"] = {
        "HIER_COUNT": "1", "NONHIER_COUNT": "0", "INDEXFILE": "Index.dat", "HIER_0_NAME": "Slide zoom level",
        "HIER_0_COUNT": "2", "HIER_0_VAL_0_SECTION": "LEVEL_0", "HIER_0_VAL_1_SECTION": "LEVEL_1",
    }
    ini["DATAFILE"] = {"FILE_COUNT": "1", "FILE_0": "Data0000.dat"}
    for level in range(2):
        ini[f"LEVEL_{level}"] = {
            "OVERLAP_X": "0", "OVERLAP_Y": "0", "MICROMETER_PER_PIXEL_X": str(mpp * 2**level),
            "MICROMETER_PER_PIXEL_Y": str(mpp * 2**level), "IMAGE_FORMAT": "PNG", "IMAGE_FILL_COLOR_BGR": "16777215",
            "DIGITIZER_WIDTH": str(TILE_PX), "DIGITIZER_HEIGHT": str(TILE_PX), "IMAGE_CONCAT_FACTOR": str(level),
        }
    text = io.StringIO()
    ini.write(text, space_around_delimiters=False)
    return text.getvalue()


def index(entries: list[list[tuple[int, int, int]]]) -> bytes:
    """Index.dat of (image, offset, length) of each level: a table of records, each pointing to one page."""
    head = (VERSION + SLIDE_ID).encode()
    table = len(head) + 8
    records = table + 4 * len(entries)
    pages = records + 8 * len(entries)
    body, pointers, page = b"", b"", pages
    for level in entries:
        pointers += struct.pack("<ii", 0, page)
        body += struct.pack("<ii", len(level), 0) + b"".join(struct.pack("<iiii", *entry, 0) for entry in level)
        page = pages + len(body)
    places = b"".join(struct.pack("<i", records + 8 * number) for number in range(len(entries)))
    return head + struct.pack("<ii", table, table) + places + pointers + body
