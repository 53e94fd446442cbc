"""One row of numbers a slide, and what in them looks wrong."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from .parts import PartStore
from .writers import About

USUAL_AREA_UM2 = (15.0, 120.0)  # of the median nucleus, whatever the tissue
LEAST_TISSUE = 0.005            # share of a slide


def summarize(
    store: PartStore,
    about: About,
    tissue_area_mm2: float,
    seconds: float | None = None,
    sharpness: float | None = None,
) -> dict[str, Any]:
    """The row of a slide: counts, means and warnings; what cannot be known is None.

    Nothing but areas, 8 bytes a nucleus, is in memory at once.

    Args:
        tissue_area_mm2: that was searched for nuclei.
        seconds: that it took.
        sharpness: `laplacian_variance` of the slide at a resolution where focus shows. Without it that of the thumbnail
            is taken, which only tells thumbnails of one size and scanner apart: no warning follows from either.
    """
    probability, areas = 0.0, [np.zeros(0)]
    for _, _, part in store.all(labels=False):
        areas.append(part.table["area_um2"].to_numpy())
        probability += float(part.table["probability"].to_numpy().sum())
    area_um2 = np.concatenate(areas)
    nuclei = len(area_um2)
    layout = store.layout
    slide_mm2 = layout.slide_px[0] * layout.slide_px[1] * layout.mpp**2 / 1e6
    if sharpness is None and about.thumbnail_rgb is not None:
        sharpness = laplacian_variance(about.thumbnail_rgb)
    row = {
        "slide": about.slide,
        "model": about.model,
        "mpp": layout.mpp,
        "nuclei": nuclei,
        "tissue_mm2": tissue_area_mm2,
        "tissue_share": tissue_area_mm2 / slide_mm2,
        "nuclei_per_mm2": nuclei / tissue_area_mm2 if tissue_area_mm2 > 0 else None,
        "area_um2_mean": float(area_um2.mean()) if nuclei else None,
        "area_um2_median": float(np.median(area_um2)) if nuclei else None,
        "probability_mean": probability / nuclei if nuclei else None,
        "sharpness": sharpness,
        "seconds": seconds,
    }
    return {**row, "warnings": _warnings(row)}


def laplacian_variance(image_rgb: np.ndarray) -> float:
    """Variance of the Laplacian of an image's gray values: low where it is blurred, or where there is little in it.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.

    Args:
        image_rgb: (H, W, 3) uint8.
    """
    return float(cv2.Laplacian(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def _warnings(row: dict[str, Any]) -> list[str]:
    """What a person should look at, a sentence each."""
    found = []
    if row["tissue_share"] < LEAST_TISSUE:
        found.append(f"tissue is {row['tissue_share']:.2%} of the slide: faint tissue may have been missed")
    if not row["nuclei"]:
        found.append("no nuclei were found")
    median, (least, most) = row["area_um2_median"], USUAL_AREA_UM2
    if median is not None and not least <= median <= most:
        found.append(
            f"the median nucleus has {median:.1f} square microns, not {least:.0f} to {most:.0f}: "
            f"magnification may be wrong ({row['mpp']:.4g} microns per pixel)"
        )
    return found
