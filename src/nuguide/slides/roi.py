"""Regions of interest: the part of a slide that a user wants, a rectangle or the annotations of QuPath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from .. import export
from ..types import UserError

COARSE_PX = 2048        # longest side of the picture in which rectangles are looked up
_AT_ONCE = 4_000_000    # point-edge pairs


@dataclass(frozen=True)
class Roi:
    """Polygons on a slide, in level-0 pixels from the corner of the first (QuPath's frame).

    Attributes:
        polygons: each a list of rings (N, 2) float64 x, y, outer ones and holes alike; inside is what the even-odd rule
            says.
        slide_px: (H, W) of level 0.
    """

    polygons: Sequence[Sequence[np.ndarray]]
    slide_px: tuple[int, int]

    @classmethod
    def parse(cls, text: str, slide_px: tuple[int, int]) -> Roi:
        """Of "x,y,w,h" in level-0 pixels, or of the path of a GeoJSON file with polygons.

        Raises:
            UserError: it is neither, the file cannot be read, or nothing of it lies on the slide.
        """
        numbers = text.split(",")
        if len(numbers) == 4 and not Path(text).exists():
            try:
                x, y, width, height = (float(number) for number in numbers)
            except ValueError as error:
                raise UserError(f"--roi {text}: is not x,y,width,height in level-0 pixels") from error
            if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
                raise UserError(f"--roi {text}: width and height must be above 0")
            corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
            found = cls([[corners]], slide_px)
        else:
            found = cls(export.read_polygons(Path(text)), slide_px)
            if not found.polygons:
                raise UserError(f"--roi {text}: holds no polygon; draw an area in QuPath and export it as GeoJSON")
        if not found._coarse[0].any():
            raise UserError(f"--roi {text}: lies off the slide, which has {slide_px[1]} x {slide_px[0]} pixels")
        return found

    @cached_property
    def _coarse(self) -> tuple[np.ndarray, float]:
        """A mask (h, w) bool of every coarse pixel that the polygons touch, and level-0 pixels per coarse pixel."""
        factor = max(1.0, max(self.slide_px) / COARSE_PX)
        shape = tuple(max(1, int(np.ceil(side / factor))) for side in self.slide_px)
        mask = np.zeros(shape, np.uint8)
        for polygon in self.polygons:
            # OpenCV's fill takes in the pixels of the outline; in 1/16 pixel, and kept small enough for its integers
            rings = [np.rint((ring / factor - 0.5).clip(-1e5, 1e5) * 16).astype(np.int32) for ring in polygon]
            cv2.fillPoly(mask, rings, 1, shift=4)
            cv2.polylines(mask, rings, True, 1, shift=4)
        return mask > 0, factor

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Top, left, bottom and right of what holds all polygons, cut at the borders of the slide."""
        corners = np.concatenate([ring for polygon in self.polygons for ring in polygon])
        (left, top), (right, bottom) = corners.min(0), corners.max(0)
        height, width = self.slide_px
        return max(top, 0.0), max(left, 0.0), min(bottom, height), min(right, width)

    @cached_property
    def _edges(self) -> list[tuple[np.ndarray, np.ndarray, float, float]]:
        """Of each polygon: where its edges start and stop, (m, 2) of x, y, and its lowest and highest y."""
        starts = [np.concatenate(polygon) for polygon in self.polygons]
        stops = [np.concatenate([np.roll(ring, -1, axis=0) for ring in polygon]) for polygon in self.polygons]
        return [
            (start, stop, float(start[:, 1].min()), float(start[:, 1].max()))
            for start, stop in zip(starts, stops, strict=True)
            if len(start)
        ]

    def covers(self, top: float, left: float, bottom: float, right: float) -> bool:
        """Whether anything of a rectangle may lie inside; never False where some does."""
        mask, factor = self._coarse
        rows, columns = (
            slice(max(int(start / factor) - 1, 0), int(np.ceil(stop / factor)) + 1)
            for start, stop in ((top, bottom), (left, right))
        )
        return bool(mask[rows, columns].any())

    def holds(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Whether points (level-0 pixels, from the corner of the first) lie inside; (n,) bool."""
        inside = np.zeros(len(y), bool)
        low, high = (y.min(), y.max()) if len(y) else (np.inf, -np.inf)
        for start, stop, top, bottom in self._edges:
            if bottom < low or top > high:
                continue
            passed = (np.minimum(start[:, 1], stop[:, 1]) <= high) & (np.maximum(start[:, 1], stop[:, 1]) >= low)
            start, stop = start[passed], stop[passed]
            rows = max(1, _AT_ONCE // max(len(start), 1))
            for first in range(0, len(y), rows):
                part = slice(first, first + rows)
                inside[part] |= crossings(y[part], x[part], start, stop) % 2 == 1
        return inside

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return {"polygons": [[np.round(ring, 3).tolist() for ring in polygon] for polygon in self.polygons]}


def crossings(y: np.ndarray, x: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """How many edges a ray from each point (n,) to the right crosses, (n,) int; edges are (m, 2) of x, y."""
    (x0, y0), (x1, y1) = start.T, stop.T
    passes = (y0 > y[:, None]) != (y1 > y[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):                # level edges, which nothing passes
        meets = x0 + (y[:, None] - y0) * (x1 - x0) / (y1 - y0)
    return (passes & (x[:, None] < meets)).sum(axis=1)
