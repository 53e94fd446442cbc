"""One row of numbers a slide, and what in them looks wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..quality import inspect_slide
from .parts import PartStore
from .writers import About


def summarize(
    store: PartStore,
    about: About,
    tissue_area_mm2: float,
    seconds: float | None = None,
    windows: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """The row of a slide: counts, means and warnings; what cannot be known is None.

    Nothing but areas, 8 bytes a nucleus, is in memory at once.

    Args:
        tissue_area_mm2: that was searched for nuclei.
        seconds: that it took.
        windows: (h, w, 3) uint8 each, parts of the slide's tissue at `quality.FINE_MPP`, in which focus is judged.
    """
    probability, areas = 0.0, [np.zeros(0)]
    for _, _, part in store.all(labels=False):
        areas.append(part.table["area_um2"].to_numpy())
        probability += float(part.table["probability"].to_numpy().sum())
    area_um2 = np.concatenate(areas)
    nuclei = len(area_um2)
    layout = store.layout
    slide_mm2 = layout.slide_px[0] * layout.slide_px[1] * layout.mpp**2 / 1e6
    tissue_share = tissue_area_mm2 / slide_mm2
    quality = None
    if about.thumbnail_rgb is not None:
        thumbnail_mpp = layout.mpp * max(layout.slide_px) / max(about.thumbnail_rgb.shape)
        quality = inspect_slide(about.thumbnail_rgb, thumbnail_mpp, windows, layout.mpp, area_um2)
    row = {
        "slide": about.slide,
        "model": about.model,
        "mpp": layout.mpp,
        "nuclei": nuclei,
        "tissue_mm2": tissue_area_mm2,
        "tissue_share": tissue_share,
        "nuclei_per_mm2": nuclei / tissue_area_mm2 if tissue_area_mm2 > 0 else None,
        "area_um2_mean": float(area_um2.mean()) if nuclei else None,
        "area_um2_median": float(np.median(area_um2)) if nuclei else None,
        "probability_mean": probability / nuclei if nuclei else None,
        "seconds": seconds,
    }
    # what cannot be seen without a picture is neither measured nor warned of
    return {**row, "quality": quality.numbers() if quality else None, "warnings": quality.warnings if quality else []}
