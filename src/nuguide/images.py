"""Image files in: PNG, JPEG, TIFF and BMP as 8-bit RGB, with microns per pixel where the file knows them.

What cannot be read rightly is refused: every trouble with a file ends in a UserError of one line that names the file
and the remedy, whatever the decoders raise. Sizes are checked as declared, before anything is decoded.
"""

from __future__ import annotations

import html
import lzma
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import tifffile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from nuguide.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide")     # for OpenSlide
# our own, not taken for input where both share a folder
OUTPUT_SUFFIXES = (".overlay.png", ".labels.tif", ".labels.ome.tif", ".tissue.png", ".heatmap.png")
MAX_PIXELS = 1_000_000_000  # 3 GB as RGB
MAX_PIXELS_VARIABLE = "NUGUIDE_MAX_PIXELS"
PLAUSIBLE_MPP = (0.05, 5.0)  # 72 to 600 dpi of a screen or a printer are 42 to 353 microns per pixel

GREY = "the image is grey: without stain color the results may be poor"
TRANSPARENT = "transparent areas are shown on white"
TURNED = "turned upright as its orientation tag says; all results are in the turned frame"

_OPENERS = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"BM": BmpImageFile}
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRICS = (
    tifffile.PHOTOMETRIC.MINISWHITE,
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.RGB,
    tifffile.PHOTOMETRIC.PALETTE,
    tifffile.PHOTOMETRIC.YCBCR,
)
_ALPHAS: dict[int, str] = {
    tifffile.EXTRASAMPLE.ASSOCALPHA: "premultiplied",
    tifffile.EXTRASAMPLE.UNASSALPHA: "straight",
}
_UNITS = {"nm": 1e-3, "um": 1.0, "micron": 1.0, "microns": 1.0, "mm": 1e3, "cm": 1e4, "inch": 25_400.0, "m": 1e6}
_ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF; its values, and what brings (H, W, C) upright:
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: np.rot90,
}
_TELLING_ERRORS = (OSError, SyntaxError, zlib.error, lzma.LZMAError, tifffile.TiffFileError)
DECODER_ERRORS = (
    *_TELLING_ERRORS,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    Warning,
    struct.error,
    PIL.Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Image:
    """A picture that was read from a file.

    Attributes:
        image_rgb: (H, W, 3) uint8, contiguous.
        mpp: microns per pixel as the file states them, or None where it does not or they are out of `PLAUSIBLE_MPP`.
        notes: one sentence for each thing that was done to the picture and that its user should know.
    """

    image_rgb: np.ndarray
    mpp: float | None = None
    notes: tuple[str, ...] = ()


def read_image(path: Path, max_pixels: int | None = None) -> Image:
    """An image file as 8-bit RGB.

    * Grey is repeated in all three channels, palettes are looked up, transparency is laid on white; each is noted.
    * Of a TIFF pyramid the full resolution is read. Of several images in a file the largest, with a note.
    * An orientation tag is obeyed, as viewers do, with a note.
    * Microns per pixel come from OME-XML, an Aperio description, ImageJ's or the baseline tags of a TIFF, or from the
      density in a PNG, JPEG or BMP, if they are between 0.05 and 5 and equal in x and y: 72, 96 or 300 dpi tell of no
      microscope.

    Args:
        max_pixels: refuse what declares more; default: the environment variable NUGUIDE_MAX_PIXELS, else 1e9.

    Raises:
        UserError: no such file, a folder, empty, damaged, cut short, too large, or of a kind that has no 8-bit RGB in
            it (16-bit or float values, CMYK, stacks, more than four channels).
    """
    limit = pixel_limit() if max_pixels is None else max_pixels
    path = Path(path)
    with plain_errors(path), path.open("rb") as file:
        start = file.read(32)
        file.seek(0)
        if start.startswith(TIFF_STARTS):
            return _read_tiff(file, limit)
        for magic, opener in _OPENERS.items():
            if start.startswith(magic):
                return _read_picture(file, opener, start, limit)
        raise UserError("is not a PNG, JPEG, TIFF or BMP image, whatever its name says; convert it to one of these")


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """UserError of one line that names the image file, for whatever is wrong with it or raised in the block."""
    try:
        if path.is_dir():
            raise UserError("is a folder; name an image file")
        if path.stat().st_size == 0:
            raise UserError("is empty (0 bytes); copy it again from its source")
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the name") from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; change its permissions") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; cut it into smaller images") from error
    except DECODER_ERRORS as error:
        told = f" ({' '.join(str(error).split())[:100]})" if isinstance(error, _TELLING_ERRORS) else ""
        raise UserError(f"{path}: is damaged or cut short{told}; copy it again or save it anew as PNG") from error


def declared_px(path: Path) -> int:
    """How many pixels the header of an image file declares, nothing being decoded; 0 where it cannot be told."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
            file.seek(0)
            if start.startswith(TIFF_STARTS):
                with tifffile.TiffFile(file) as tiff:
                    page = tiff.pages.first
                    return page.imagewidth * page.imagelength
            for magic, opener in _OPENERS.items():
                if start.startswith(magic):
                    with opener(file) as picture:
                        return picture.width * picture.height
    except DECODER_ERRORS:
        return 0                                        # whoever reads it will say what is wrong with it
    return 0


def list_images(inputs: Sequence[Path]) -> list[Path]:
    """The image files that files and folders stand for, each once, in the order given.

    A file is taken whatever its name. Of a folder, its own files with the suffix of an image or a slide, sorted by
    name; hidden files, subfolders, and pictures and label maps that we wrote are left out.

    Raises:
        UserError: one line that names every input that is missing, cannot be looked into, or holds no image.
    """
    files: dict[Path, Path] = {}
    problems = []
    for given in map(Path, inputs):
        try:
            found = _images_in(given) if given.is_dir() else [given]
            if not given.exists():
                problems.append(f"{given}: there is no such file or folder; check the name")
            elif not found:
                kinds = ", ".join((*SUFFIXES, *SLIDE_SUFFIXES))
                problems.append(f"{given}: holds no image ({kinds}); name a folder that does")
            else:
                files.update((file.resolve(), file) for file in found if file.resolve() not in files)
        except OSError as error:
            problems.append(f"{given}: cannot be looked into ({error.strerror}); change its permissions")
    if problems:
        raise UserError("; ".join(problems))
    return list(files.values())


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in (*SUFFIXES, *SLIDE_SUFFIXES)
        and not file.name.startswith(".")
        and not file.name.lower().endswith(OUTPUT_SUFFIXES)
        and (file.is_file() or (file.is_symlink() and not file.exists()))       # one that leads nowhere is told of
    )


def pixel_limit() -> int:
    """How many pixels an image may declare: NUGUIDE_MAX_PIXELS, or `MAX_PIXELS`."""
    stated = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    try:
        return int(float(stated))
    except (ValueError, OverflowError) as error:
        raise UserError(f"{MAX_PIXELS_VARIABLE}={stated}: is no number; set it to one, such as 2e9") from error


def _admit(width: object, height: object, limit: int) -> None:
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise UserError("has no valid size in its header; copy it again from its source")
    if width * height > limit:
        raise UserError(
            f"declares {width} x {height} pixels, more than the {limit:.3g} allowed; cut it into smaller images,"
            f" or raise the limit with {MAX_PIXELS_VARIABLE}"
        )


def _read_picture(file: BinaryIO, opener: type[ImageFile], start: bytes, limit: int) -> Image:
    """PNG, JPEG or BMP. The opener is called by itself: PIL.Image.open has a size limit of its own, for the process."""
    with opener(file) as picture:
        _admit(*picture.size, limit)
        if opener is PngImageFile and start[24] > 8:  # bits per channel; Pillow's mode does not tell it of RGB
            raise UserError(f"has {start[24]} bits per channel; convert it to 8 bits per channel")
        picture.load()
        mpp = square_mpp(*(25_400 / dpi if dpi else 0 for dpi in picture.info.get("dpi", (0, 0))))
        return finished(*_picture_channels(picture), picture.getexif().get(_ORIENTATION, 1), mpp, [])


def _read_tiff(file: BinaryIO, limit: int) -> Image:
    """The largest image of a TIFF at full resolution: layout and scale by tifffile, pixels by it or by libtiff."""
    with tifffile.TiffFile(file) as tiff:
        len(tiff.pages)  # follows the chain of pages once, to its end or into a loop: `series` would run in it for ever
        for page in (series.keyframe for series in tiff.series):
            _admit(page.imagewidth, page.imagelength, limit)
            _admit(page.tilewidth or 1, page.tilelength or 1, limit)
        if not tiff.series:
            raise UserError("holds no image; copy it again from its source")
        series = max(tiff.series, key=lambda one: one.keyframe.imagewidth * one.keyframe.imagelength)
        page = series.keyframe
        refuse_no_rgb(series, page)
        refuse_cut_short(series, os.fstat(file.fileno()).st_size)
        notes = [f"the file holds {len(tiff.series)} images; the largest was read"] if len(tiff.series) > 1 else []
        if series.axes == "CYX":
            notes.append("its three channels were taken for red, green and blue")
        mpp = next((mpp for scale in tiff_scales(tiff, page) if (mpp := square_mpp(*scale))), None)
        orientation = page.tags.valueof("Orientation", 1)
        if page.compression in tifffile.TIFF.DECOMPRESSORS and page.photometric != tifffile.PHOTOMETRIC.YCBCR:
            return finished(*_tiff_channels(series, page), orientation, mpp, notes)
        if orientation != 1:
            notes.append(TURNED)  # libtiff's reader in Pillow has done it
        return finished(*_libtiff_channels(file, series, page), 1, mpp, notes)


def finished(channels: np.ndarray, alpha: str, orientation: int, mpp: float | None, notes: list[str]) -> Image:
    """RGB from (H, W) or (H, W, 1..4) uint8, whose last channel is "straight" or "premultiplied" alpha, or not: ""."""
    channels = channels[..., None] if channels.ndim == 2 else channels
    colors = channels.shape[2] - bool(alpha)
    if colors < 3:
        notes.append(GREY)
    image_rgb = channels[..., : 3 if colors >= 3 else 1]
    if alpha and (opacity := channels[..., -1:].astype(np.uint16)).min() < 255:
        notes.append(TRANSPARENT)
        seen = image_rgb if alpha == "premultiplied" else (image_rgb * opacity + 127) // 255
        image_rgb = np.minimum(seen + (255 - opacity), 255).astype(np.uint8)
    if orientation in _UPRIGHT:
        notes.append(TURNED)
        image_rgb = _UPRIGHT[orientation](image_rgb)
    if colors < 3:
        image_rgb = np.broadcast_to(image_rgb, (*image_rgb.shape[:2], 3))
    return Image(np.require(image_rgb, np.uint8, ["C", "W"]), mpp, tuple(notes))


def _picture_channels(picture: PIL.Image.Image) -> tuple[np.ndarray, str]:
    """Channels and kind of alpha of a loaded Pillow image of any 8-bit mode."""
    if picture.mode == "CMYK":
        raise UserError("has the CMYK colors of a printer; convert it to RGB")
    if picture.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"):
        raise UserError(f"has pixels of mode {picture.mode}; convert it to RGB with 8 bits per channel")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode in ("P", "YCbCr", "RGBX"):
        picture = picture.convert("RGB")
    return np.array(picture), "straight" if picture.mode in ("LA", "RGBA") else ""


def refuse_no_rgb(series: tifffile.TiffPageSeries, page: tifffile.TiffPage) -> None:
    """UserError unless the series is one image of 1 to 4 channels of 8 bits that can be shown as RGB."""
    if series.dtype != np.uint8 or page.bitspersample != 8:
        raise UserError(f"has {page.bitspersample}-bit values ({series.dtype}); convert it to 8 bits per channel")
    if series.axes not in ("YX", "YXS", "SYX", "CYX"):
        raise UserError(f"holds a stack of images (axes {series.axes}, shape {series.shape}); save one of them as RGB")
    channels = series.sizes.get("sample", series.sizes.get("channel", 1))
    if channels > 4 or (series.axes == "CYX" and channels != 3):
        raise UserError(f"has {channels} channels; save it as RGB")
    if page.photometric not in _PHOTOMETRICS:
        kind = getattr(page.photometric, "name", page.photometric)
        raise UserError(f"has colors of the kind {'CMYK' if kind == 'SEPARATED' else kind}; convert it to RGB")


def refuse_cut_short(series: tifffile.TiffPageSeries, size: int) -> None:
    for page in series.pages:
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=False)) if page is not None else []
        if len(parts) < math.prod(series.keyframe.chunked) or any(offset + count > size for offset, count in parts):
            raise UserError("is cut short: parts of its pixels are not in the file; copy it again from its source")


def _tiff_channels(series: tifffile.TiffPageSeries, page: tifffile.TiffPage) -> tuple[np.ndarray, str]:
    """Channels and kind of alpha, decoded by tifffile."""
    channels = series.asarray()
    if series.axes in ("SYX", "CYX"):
        channels = np.moveaxis(channels, 0, -1)
    return tiff_colors(channels, page)


def tiff_colors(stored: np.ndarray, page: tifffile.TiffPage) -> tuple[np.ndarray, str]:
    """Channels and kind of alpha of `finished`, of (H, W) or (H, W, C) uint8 as stored for a page of a TIFF."""
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        stored = 255 - stored
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        return (np.asarray(page.colormap).T >> 8).astype(np.uint8)[stored.reshape(stored.shape[:2])], ""
    count = stored.shape[2] if stored.ndim == 3 else 1
    if count in (1, 3):
        return stored, ""
    alpha = _ALPHAS.get(page.extrasamples[-1] if page.extrasamples else 0, "")
    return stored if alpha else stored[..., : count - 1], alpha  # a channel of no stated meaning is left out


def _libtiff_channels(
    file: BinaryIO, series: tifffile.TiffPageSeries, page: tifffile.TiffPage
) -> tuple[np.ndarray, str]:
    """The same by Pillow's libtiff: LZW, JPEG and others, for which tifffile needs imagecodecs."""
    name = getattr(page.compression, "name", page.compression)
    remedy = "save it with deflate or without compression, or `pip install imagecodecs`"
    if len(series.pages) > 1 or not isinstance(page.index, int):
        raise UserError(f"has {name}-compressed planes; {remedy}")
    file.seek(0)
    try:
        with TiffImageFile(file) as picture:
            picture.seek(page.index)
            picture.load()
            return _picture_channels(picture)
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"is too large for {name} compression; {remedy}") from error
    except DECODER_ERRORS as error:
        raise UserError(f"is damaged, or its {name} compression is not known; copy it again, or {remedy}") from error


def tiff_scales(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> Iterator[tuple[float, float]]:
    """Microns per pixel in x and y as each kind of metadata states them, the most explicit first."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", tiff.ome_metadata or "")
    if pixels:
        said = {name: html.unescape(value) for name, value in re.findall(r'\b(\w+)="([^"]*)"', pixels[0])}
        sizes = (f"PhysicalSize{axis}" for axis in "XY")
        x, y = (_number(said.get(size, "")) * _micron(said.get(f"{size}Unit", "µm")) for size in sizes)
        yield x, y
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description)
    if aperio:
        yield _number(aperio[1]), _number(aperio[1])
    unit = _micron(str((tiff.imagej_metadata or {}).get("unit", "")))
    unit = unit or {2: 25_400.0, 3: 10_000.0}.get(page.tags.valueof("ResolutionUnit", 2), 0.0)  # inch, centimeter
    x, y = (page.tags.valueof(f"{a}Resolution", (0, 1)) for a in "XY")
    if x[0] and y[0]:
        yield unit * x[1] / x[0], unit * y[1] / y[0]


def square_mpp(x_um: float, y_um: float) -> float | None:
    """Microns per pixel, where they are those of a microscope and equal to 1% in x and y."""
    least, most = PLAUSIBLE_MPP
    return x_um if least <= x_um <= most and abs(x_um - y_um) <= 0.01 * x_um else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _micron(unit: str) -> float:
    """Microns in a unit of length, 0 for what is none."""
    return _UNITS.get(unit.strip().lower().replace("\\u00b5", "u").replace("µ", "u").replace("μ", "u"), 0.0)
