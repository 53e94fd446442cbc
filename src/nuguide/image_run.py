"""Images that fit into memory to result files: the job of `fanout` for them, as `slide_run` is for slides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .fanout import Job, Row, Watch, joined, with_ending
from .images import Image, read_image
from .quality import inspect
from .types import UserError

if TYPE_CHECKING:
    from .nuclei import Nuclei

ENDINGS = {"labels": ".labels.tif", "geojson": ".geojson", "csv": ".csv", "overlay": ".overlay.png"}


@dataclass
class ImageJob(Job):
    """Images that fit into memory, each segmented in one go.

    Attributes:
        segment: (image (H, W, 3) uint8, mpp, progress) -> Nuclei. model: what to call it in the summary.
        mpp: microns per pixel of all images; where not given, what each file says, else `default_mpp` with a note.
        formats: keys of `ENDINGS`.
    """

    segment: Callable[[np.ndarray, float, Callable[[int, int], None]], Nuclei]
    model: str
    mpp: float | None = None
    default_mpp: float = 0.25
    formats: Sequence[str] = tuple(ENDINGS)

    @property
    def endings(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the formats."""
        return [ENDINGS[name] for name in self.formats]

    def do(self, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
        """Segment one image and write its results."""
        start = time.perf_counter()
        image = read_image(file)
        used_mpp = self.mpp or image.mpp or self.default_mpp
        notes = list(image.notes)
        if not self.mpp:
            notes.append(
                f"{image.mpp:.4g} microns per pixel, from the file"
                if image.mpp
                else f"the file states no scale: {self.default_mpp} microns per pixel assumed (--mpp sets it)"
            )
        try:
            nuclei = self.segment(image.image_rgb, used_mpp, watch.tiles)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        write_results(nuclei, image, stem, self.formats)
        quality = inspect(image.image_rgb, used_mpp, nuclei.table)
        count, mm2 = len(nuclei), image.image_rgb.shape[0] * image.image_rgb.shape[1] * used_mpp**2 / 1e6
        row = Row(
            name=stem.name,
            nuclei=count,
            nuclei_per_mm2=round(count / mm2, 1),
            mean_area_um2=round(float(np.mean(nuclei.table["area_um2"])), 2) if count else 0.0,
            mean_probability=round(float(np.mean(nuclei.table["probability"])), 4) if count else 0.0,
            seconds=round(time.perf_counter() - start, 2),
            mpp=used_mpp,
            source=str(file.resolve()),
            model=self.model,
            warnings=joined(quality.warnings),
        )
        return row, f"{file.name}: {count} nuclei in {row.seconds:.1f} s" + "".join(f"; {note}" for note in notes)


def write_results(nuclei: Nuclei, image: Image, stem: Path, formats: Sequence[str]) -> None:
    """Every asked-for format of the results of one image, as `stem` plus its ending; all at a time, for most of the
    work is compression, which threads share.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "labels": nuclei.to_labels,
        "geojson": lambda path: nuclei.to_geojson(path, image_name=stem.name),
        "csv": nuclei.to_csv,
        "overlay": lambda path: nuclei.to_overlay(path, image.image_rgb),
    }
    with ThreadPoolExecutor(max(len(formats), 1)) as pool:
        for writing in [pool.submit(writers[name], with_ending(stem, ENDINGS[name])) for name in formats]:
            writing.result()
