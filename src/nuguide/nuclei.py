"""`Nuclei`: what segmentation finds in one image, and every form in which it leaves the program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from . import export
from .measure import measure, outlines, renumbered


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of one image.

    Attributes:
        labels: (H, W) uint32 instance label map at the size of the image; 0 is background.
        table: a data frame, one row a nucleus, with the columns of `measure.COLUMNS`, and `measure.AGREEMENT`
            where mirror images were segmented too.
        mpp: microns per pixel of the image.
    """

    labels: np.ndarray
    table: pd.DataFrame
    mpp: float

    @classmethod
    def found(cls, labels: np.ndarray, image_rgb: np.ndarray, probability: np.ndarray, mpp: float) -> Nuclei:
        """Measured on the image (H, W, 3) uint8 and the probability map (H, W) that they were found in."""
        rings = outlines(labels)
        nuclei = cls(labels, measure(labels, image_rgb, mpp, probability, rings), mpp)
        nuclei.__dict__["rings"] = rings        # known already; see the cached property
        return nuclei

    def __len__(self) -> int:
        return len(self.table)

    def above(self, probability: float) -> Nuclei:
        """The nuclei of at least that probability, numbered anew from 1."""
        kept = self.table["probability"].to_numpy() >= probability
        if kept.all():
            return self
        old = self.table["id"].to_numpy()
        table, labels = renumbered(self.table, self.labels, kept)
        nuclei = Nuclei(labels, table, self.mpp)
        nuclei.__dict__["rings"] = dict(zip(table["id"].tolist(), map(self.rings.__getitem__, old[kept]), strict=True))
        return nuclei

    @cached_property
    def rings(self) -> dict[int, np.ndarray]:
        """The outline of each nucleus; see `measure.outlines`."""
        return outlines(self.labels)

    def overlay(self, image_rgb: np.ndarray) -> np.ndarray:
        """The image (H, W, 3) uint8 with every nucleus outlined."""
        return export.overlay(image_rgb, self.rings)

    def to_labels(self, path: str | Path) -> Path:
        """The label map as a uint32 TIFF."""
        return export.write_labels(Path(path), self.labels, self.mpp)

    def to_geojson(self, path: str | Path, image_name: str | None = None) -> Path:
        """QuPath detections with measurements; `image_name` (the file's own where not given) makes their ids unique."""
        path = Path(path)
        return export.write_geojson(path, self.rings, self.table, image_name or path.stem)

    def to_csv(self, path: str | Path) -> Path:
        """The table as CSV."""
        return export.write_table(Path(path), self.table)

    def to_overlay(self, path: str | Path, image_rgb: np.ndarray) -> Path:
        """The overlay as PNG."""
        return export.write_overlay(Path(path), image_rgb, self.rings)
