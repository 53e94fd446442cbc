"""TNBC: 50 H&E images of triple-negative breast cancer of 11 patients."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import load_sample, not_found, pair_by_stem
from nuguide.datasets.prepared import LAYOUT, MPP_AT_40X, is_prepared, read_prepared

LICENSE = FACTS["tnbc"].license
OFFICIAL = "Slide_01/ ... Slide_11/ with GT_01/ ... GT_11/"
BREAST_SLIDES = range(1, 12)  # version 1.1 of the set adds slides 12 to 14, which are brain

log = logging.getLogger(__name__)


def read_tnbc(root: Path) -> Dataset:
    """TNBC, 512 x 512 at 40x, grouped by slide (one a patient: `slide_01` and so on).

    Args:
        root: the official folder of `Slide_XX/*.png` (RGBA) and `GT_XX/*.png` (binary; nuclei were drawn apart, so the
            4-connected components are the annotated nuclei), or the folder above it; or the prepared layout. Slides
            above 11, brain added by version 1.1, are left out.

    Source: Naylor et al., IEEE Transactions on Medical Imaging 2019, doi:10.1109/TMI.2018.2865709; CC BY 4.0.
    """
    if is_prepared(root):
        return read_prepared(root, name="tnbc", license=LICENSE)
    slides = sorted(root.glob("Slide_*")) or sorted(root.glob("*/Slide_*"))
    if not slides:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    problems: list[str] = []
    entries = []
    for slide in slides:
        number = re.fullmatch(r"Slide_(\d+)", slide.name)
        if not number or int(number[1]) not in BREAST_SLIDES:
            log.info("%s is left out: it is none of the breast slides 1 to 11", slide)
            continue
        truth = slide.with_name(f"GT_{number[1]}")
        if not truth.is_dir():
            problems.append(f"{slide} has no partner {truth.name}/")
            continue
        group = f"slide_{number[1]}"
        for stem, image, mask in pair_by_stem(slide, truth, problems):
            id = f"tnbc_{stem}"
            load = partial(load_sample, image, mask, id=id, group=group, mpp=MPP_AT_40X, is_mask=True)
            entries.append(Entry(id, group, load, str(image)))
    truths = sorted(slides[0].parent.glob("GT_*"))
    slides_of = {truth: truth.with_name(truth.name.replace("GT_", "Slide_")) for truth in truths}
    problems += [f"{truth} has no partner {slide.name}/" for truth, slide in slides_of.items() if not slide.is_dir()]
    return sound(Dataset("tnbc", entries, LICENSE), root, problems)
