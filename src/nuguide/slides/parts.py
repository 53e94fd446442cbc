"""The nuclei of one region, and their files: what a killed run finds again, and what the writers stream from."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from .. import export
from ..measure import COLUMNS, renumbered
from ..types import UserError
from .layout import Layout, Region

SUFFIX = ".npz"


@dataclass(frozen=True)
class Part:
    """The nuclei that one region owns, numbered from 1 within it.

    Attributes:
        table: `measure.COLUMNS`, or those with flips; centroids in level-0 pixels (center of the first pixel at 0, 0)
            and in microns from the same origin, areas and lengths in microns.
        rings: of each nucleus in the order of the table: (N, 2) float32 x, y in fine pixels of the whole slide, the
            center of the first at (0, 0); closed without repeating the first point; multiples of 0.5.
        labels: (h, w) int32 of the region's window in fine pixels, values as `id` in the table.
        top, left: where `labels` begins, in fine pixels of the slide.
        facts: numbers about the region, such as seconds and places that could not be read.
    """

    table: pd.DataFrame
    rings: list[np.ndarray]
    labels: np.ndarray
    top: int
    left: int
    facts: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def above(self, probability: float) -> Part:
        """The nuclei of at least that probability, numbered anew from 1."""
        kept = self.table["probability"].to_numpy() >= probability
        if kept.all():
            return self
        table, labels = renumbered(self.table, self.labels, kept)
        return replace(self, table=table, labels=labels, rings=[self.rings[row] for row in np.flatnonzero(kept)])

    @classmethod
    def empty(cls, columns: Sequence[str] = COLUMNS) -> Part:
        """Of a region without tissue."""
        return cls(_table(np.zeros((0, len(columns))), columns), [], np.zeros((0, 0), np.int32), 0, 0)


def _table(values: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
    """A table of nuclei from its values (n, columns) float64."""
    types = {name: np.int64 if name == "id" else np.float64 for name in columns}
    return pd.DataFrame({name: values[:, i].astype(kind) for i, (name, kind) in enumerate(types.items())})


class PartStore:
    """The parts of a slide, each a file of its own, written whole or not at all.

    Args:
        folder: where they lie. layout: of the slide. columns: of the tables of all parts.
    """

    def __init__(self, folder: Path, layout: Layout, columns: Sequence[str] = COLUMNS):
        self.folder, self.layout, self.columns = folder, layout, tuple(columns)

    def path(self, region: Region) -> Path:
        """The file of a region."""
        return self.folder / (region.name + SUFFIX)

    def has(self, region: Region) -> bool:
        """Whether the region is done."""
        return self.path(region).is_file()

    def write(self, region: Region, part: Part) -> None:
        """Keep the part of a region; UserError where the disk is full or the folder not writable."""
        # outlines turn at half pixels, and a window is far smaller than 16,000 fine pixels
        origin = np.array([part.left, part.top])
        halves = [np.rint(2 * (ring - origin)).astype(np.int16) for ring in part.rings]
        arrays = {
            "table": part.table.to_numpy(np.float64).reshape(-1, len(self.columns)),
            "rings": np.concatenate(halves) if halves else np.zeros((0, 2), np.int16),
            "ring_lengths": np.array([len(ring) for ring in halves], np.int32),
            "place": np.array([part.top, part.left, *part.labels.shape], np.int64),
            "labels": packed(part.labels),
            "facts": np.frombuffer(json.dumps(part.facts).encode(), np.uint8),
        }
        memory = io.BytesIO()
        np.savez(memory, **arrays)  # pyright: ignore[reportArgumentType]
        with export.replacing(self.path(region)) as file:
            file.write(memory.getbuffer())

    def read(self, region: Region, labels: bool = True) -> Part:
        """The part of a region; empty where it has none (no tissue). UserError where its file is damaged.

        Args:
            labels: whether the label map is unpacked, which takes most of the time; without, it is empty.
        """
        if not self.has(region):
            return Part.empty(self.columns)
        with self._arrays(region) as arrays:
            table = _table(arrays["table"], self.columns)
            top, left, height, width = (int(value) for value in arrays["place"])
            rings = arrays["rings"].astype(np.float32) / 2 + np.array([left, top], np.float32)
            return Part(
                table,
                np.split(rings, np.cumsum(arrays["ring_lengths"])[:-1]) if len(table) else [],
                unpacked(arrays["labels"], (height, width)) if labels else np.zeros((0, 0), np.int32),
                top,
                left,
                json.loads(arrays["facts"].tobytes() or b"{}"),
            )

    def labels(self, region: Region) -> tuple[int, int, np.ndarray]:
        """Top, left and label map of a part, uint16 where its numbers fit (half the memory), without the rest of it."""
        if not self.has(region):
            return 0, 0, np.zeros((0, 0), np.uint16)
        with self._arrays(region) as arrays:
            top, left, height, width = (int(value) for value in arrays["place"])
            return top, left, _decoded(arrays["labels"], (height, width))

    def count(self, region: Region) -> int:
        """How many nuclei a region has, without reading more than that."""
        if not self.has(region):
            return 0
        with self._arrays(region) as arrays:
            return len(arrays["ring_lengths"])

    @contextmanager
    def _arrays(self, region: Region) -> Iterator[Mapping[str, np.ndarray]]:
        """The arrays of a region's file, each read when it is asked for; UserError where the block finds damage."""
        path = self.path(region)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                yield arrays
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is damaged; delete it and run the same command again") from error

    def all(self, labels: bool = True) -> Iterator[tuple[Region, int, Part]]:
        """Every region with nuclei, in order, what its nuclei count from on the slide, and its part.

        The nucleus `id` of a part is number `first + id` of the slide: slide numbers run from 1 without a gap. `labels`
        as in `read`.
        """
        first = 0
        for region in self.layout.regions:
            part = self.read(region, labels)
            if len(part):
                yield region, first, part
                first += len(part)


def packed(labels: np.ndarray) -> np.ndarray:
    """A label map of fewer than 2^24 labels as the bytes of a PNG: few, for labels are flat."""
    if not labels.size:
        return np.zeros(0, np.uint8)
    low, high = (labels & 0xFFFF).astype(np.uint16), (labels >> 16).astype(np.uint16)
    both = low if not high.any() else np.vstack([low, high])
    return cv2.imencode(".png", both, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].ravel()


def unpacked(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The label map of `packed`, int32; ValueError where the bytes are of another size or no PNG."""
    return _decoded(data, shape).astype(np.int32, copy=False)


def _decoded(data: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`unpacked`, but uint16 where the numbers fit."""
    if not data.size:
        return np.zeros(shape, np.uint16)
    both = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if both is None or both.shape[1:] != shape[1:] or both.shape[0] not in (shape[0], 2 * shape[0]):
        raise ValueError("no label map of that size")
    if both.shape[0] == shape[0]:
        return both
    return both[: shape[0]].astype(np.int32) | (both[shape[0] :].astype(np.int32) << 16)
