"""The slides of scanners' vendors (SVS, NDPI, MRXS, SCN, BIF, VMS, DICOM, ...), by OpenSlide."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from nuguide.images import PLAUSIBLE_MPP
from nuguide.slides.slide import Level, Slide, levels_of
from nuguide.types import UserError

if TYPE_CHECKING:
    from openslide import OpenSlide

INSTALL = "pip install 'nuguide[slides]'"
MAX_PIECE_PX = 2**26       # of a tile or strip, which is decoded in one piece: 270 MB; common are 2^16 to 2^20

_MPP_SLACK = 0.02
_LATTICE_PX = 512


def detect(path: Path) -> str | None:
    """The name that OpenSlide has for the format of a file; None for others, and where OpenSlide is not installed."""
    if not is_installed():
        return None
    from openslide import OpenSlide

    return OpenSlide.detect_format(path)


def is_installed() -> bool:
    """Whether OpenSlide can be used here."""
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError):  # the package, or the library under it
        return False
    return True


class VendorSlide(Slide):
    """A slide that OpenSlide reads.

    Raises:
        UserError: OpenSlide cannot open it; the message does not name the file.
    """

    def __init__(self, path: Path, vendor: str) -> None:
        super().__init__(path)
        self.format = vendor
        self._lock = threading.Lock()
        handle = self._open()
        self._shared: OpenSlide | None = handle
        properties = handle.properties
        _refuse_large_pieces(properties)
        self._downsamples = tuple(map(float, handle.level_downsamples))
        sizes = [(height, width) for width, height in handle.level_dimensions]
        self.levels = levels_of(sizes)
        bounds = [properties.get(f"openslide.bounds-{name}", "") for name in ("x", "y", "width", "height")]
        if all(value.isdecimal() for value in bounds) and int(bounds[2]) and int(bounds[3]):
            x, y, width, height = map(int, bounds)
            self.bounds_px = (x, y)
            self.levels = tuple(
                Level(level.downsample, (max(1, round(height / scale)), max(1, round(width / scale))))
                for level, scale in zip(self.levels, self._downsamples, strict=True)
            )
        self.mpp, self.notes = _mpp(properties)
        self.objective_power = _positive(properties.get("openslide.objective-power"))

    def _open(self) -> OpenSlide:
        from openslide import OpenSlide, OpenSlideError

        try:
            return OpenSlide(self.path)
        except OpenSlideError as error:
            told = " ".join(str(error).split())[:150]
            raise UserError(f"OpenSlide cannot open it ({told}); copy it again with all its files") from error

    def _pixels(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        if self._downsamples[level].is_integer():
            return self._region(level, top, left, height, width)
        # OpenSlide counts in whole pixels of level 0. Where those of the level fall between them it interpolates, by
        # fractions that depend on the corner that was asked for: so we ask for the same corners always.
        image = np.empty((height, width, 3), np.uint8)
        for y in range(top // _LATTICE_PX * _LATTICE_PX, top + height, _LATTICE_PX):
            for x in range(left // _LATTICE_PX * _LATTICE_PX, left + width, _LATTICE_PX):
                bottom, right = min(y + _LATTICE_PX, top + height), min(x + _LATTICE_PX, left + width)
                block = self._region(level, y, x, bottom - y, right - x)
                block = block[max(top - y, 0) :, max(left - x, 0) :]
                image[max(y, top) - top : bottom - top, max(x, left) - left : right - left] = block
        return image

    def _region(self, level: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 of a level, transparency on white."""
        from openslide import OpenSlideError

        scale = self._downsamples[level]
        place = self.bounds_px[0] + round(left * scale), self.bounds_px[1] + round(top * scale)
        handle = self._handle()
        try:
            region = handle.read_region(place, level, (width, height))
        except OpenSlideError:
            # An error, in whatever thread, ends a handle for good: a new one for all others, and one for this region
            # alone, which tells whether the trouble is here.
            with self._lock:
                if self._shared is handle:
                    self._shared = None
            try:
                with self._open() as own:
                    region = own.read_region(place, level, (width, height))
            except OpenSlideError as error:
                raise UserError(str(error)) from error
        return _on_white(np.asarray(region))

    def _handle(self) -> OpenSlide:
        with self._lock:
            if self._shared is None:
                self._shared = self._open()
            return self._shared

    def close(self) -> None:
        with self._lock:
            if self._shared is not None:
                self._shared.close()


def _on_white(image: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 with straight alpha, laid on white: (H, W, 3)."""
    image_rgb = cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)
    opacity = image[..., 3:]
    if opacity.min() == 255:
        return image_rgb
    return ((image_rgb * opacity.astype(np.uint16) + (255 - opacity.astype(np.uint16)) * 255 + 127) // 255).astype(
        np.uint8
    )


def _mpp(properties: Mapping[str, str]) -> tuple[float | None, tuple[str, ...]]:
    """Microns per pixel where both are stated, plausible and equal to 2%; else None, and why where they are stated."""
    x_um, y_um = (_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x_um is None or y_um is None:
        return None, ()
    mpp = (x_um + y_um) / 2
    stated = f"the file states {x_um:g} x {y_um:g} microns per pixel"
    if abs(x_um - y_um) > _MPP_SLACK * mpp:
        return None, (f"{stated}, which is not square",)
    if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        return None, (f"{stated}, which no microscope has",)
    return mpp, ()


def _positive(text: str | None) -> float | None:
    try:
        number = float(text or 0)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None


def _refuse_large_pieces(properties: Mapping[str, str]) -> None:
    """UserError where the file declares tiles that would take the machine's memory: OpenSlide would try."""
    for level in range(int(properties.get("openslide.level-count", "0"))):
        width, height = (int(properties.get(f"openslide.level[{level}].tile-{side}", "1")) for side in
                         ("width", "height"))
        if width * height > MAX_PIECE_PX:
            raise UserError(
                f"level {level} declares tiles of {width} x {height} pixels, which are too large to read one at a"
                " time; save it with tiles of 512 x 512"
            )
