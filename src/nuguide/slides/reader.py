"""One door for whole slides and plain images: `open_slide`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from nuguide.images import (
    DECODER_ERRORS,
    SLIDE_SUFFIXES,
    TIFF_STARTS,
    declared_px,
    pixel_limit,
    plain_errors,
    read_image,
)
from nuguide.slides.pyramid import PyramidSlide, is_pyramid
from nuguide.slides.slide import Level, Slide
from nuguide.slides.vendor import INSTALL, VendorSlide, detect, is_installed
from nuguide.types import UserError

# What OpenSlide alone reads rightly, though some look like a TIFF or a JPEG. An SVS is an ordinary TIFF mostly.
OPENSLIDE_SUFFIXES = (".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm")
LARGE_PX = 64_000_000      # from here on an image is better read and segmented piece by piece
MAX_SIDE_PX = 2_000_000    # half a meter of glass


def is_slide(path: Path) -> bool:
    """Whether a file is better segmented as a slide: of a scanner's format, a pyramid, or with `LARGE_PX` or more.

    One that is too large to be read at all is none; whoever reads it as an image says so.
    """
    if path.suffix.lower() in (*SLIDE_SUFFIXES, ".dcm") or LARGE_PX <= declared_px(path) <= pixel_limit():
        return True
    try:
        with path.open("rb") as file:
            looks_like_tiff = file.read(4).startswith(TIFF_STARTS)
        if not looks_like_tiff:
            return False
        slide = _scanned(path)
    except (*DECODER_ERRORS, UserError):
        return False
    if slide is None:
        return False
    with slide:
        return len(slide.levels) > 1


def open_slide(path: Path) -> Slide:
    """A slide or an image, open for reading.

    * What OpenSlide recognizes it reads, but for TIFF without a pyramid and OME-TIFF.
    * Other tiled TIFF and OME-TIFF are read tile by tile.
    * PNG, JPEG, BMP and small plain TIFF are read into memory as a whole, by `images.read_image` and its limits.

    Raises:
        UserError: no such file, a folder, empty, damaged, cut short, of no kind that is known, with declared sizes
            that no memory could hold, or in need of OpenSlide where it is not installed.
    """
    path = Path(path)
    with plain_errors(path):
        slide = _scanned(path)
        if slide is not None and max(slide.size_px) > MAX_SIDE_PX:
            slide.close()
            raise UserError("declares {1} x {0} pixels, more than any slide has; copy it again".format(*slide.size_px))
    return slide or PlainSlide(path)


def _scanned(path: Path) -> Slide | None:
    """The slide by OpenSlide or tile by tile; None for what is to be read as a plain image."""
    with path.open("rb") as file:
        looks_like_tiff = file.read(4).startswith(TIFF_STARTS)
    vendor = detect(path)
    if vendor and not (vendor == "generic-tiff" and _is_ome(path)):
        slide = VendorSlide(path, vendor)
        if vendor != "generic-tiff" or len(slide.levels) > 1:
            return slide
        slide.close()
    if vendor is None:
        _refuse_without_openslide(path)
    return PyramidSlide(path) if looks_like_tiff and is_pyramid(path) else None


def _is_ome(path: Path) -> bool:
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff.is_ome
    except DECODER_ERRORS:
        return False


def _refuse_without_openslide(path: Path) -> None:
    """UserError for a file of which only OpenSlide knows the layout, and which it does not know or is not there."""
    if path.suffix.lower() not in OPENSLIDE_SUFFIXES:
        return
    if not is_installed():
        raise UserError(f"needs OpenSlide to be read; {INSTALL}")
    raise UserError(
        f"is not recognized as a {path.suffix[1:].upper()} slide; copy it again, with the files and folders beside it"
        " that belong to it"
    )


class PlainSlide(Slide):
    """An image that is held in memory as a whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        image = read_image(path)
        self._image_rgb = image.image_rgb
        self.format = path.suffix[1:].lower().replace("jpg", "jpeg").replace("tiff", "tif").replace("tif", "tiff")
        self.mpp, self.notes = image.mpp, image.notes
        self.levels = (Level(1.0, image.image_rgb.shape[:2]),)

    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self._image_rgb[top : top + height, left : left + width]

    def close(self) -> None:
        self._image_rgb = np.empty((0, 0, 3), np.uint8)
