"""CryoNuSeg: 30 H&E images of frozen sections, annotated three times."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import load_sample, not_found, pair_by_stem
from nuguide.datasets.prepared import LAYOUT, MPP_AT_40X, is_prepared, read_prepared

LICENSE = FACTS["cryonuseg"].license
ANNOTATORS = {  # option -> (official folder, folder of the prepared layout)
    "annotator1": ("Annotator 1 (biologist)", "labels"),
    "annotator1_round2": ("Annotator 1 (biologist second round of manual marks up)", "labels_annot1_round2"),
    "annotator2": ("Annotator 2 (bioinformatician)", "labels_annot2"),
}


def read_cryonuseg(root: Path, annotator: str = "annotator1") -> Dataset:
    """CryoNuSeg, 512 x 512 at 40x, grouped by organ (10 organs, 3 images each).

    Args:
        root: the official folder of `tissue images/*.tif` and one folder an annotation, which holds
            `label masks modify/*.tif`, directly or nested under its own name; or the prepared layout.
        annotator: whose nuclei: "annotator1", "annotator1_round2" (the same person again) or "annotator2".

    Source: Mahbod et al., Computers in Biology and Medicine 2021, doi:10.1016/j.compbiomed.2021.104349;
    CC BY-NC-SA 4.0.
    """
    if annotator not in ANNOTATORS:
        raise ValueError(f"unknown annotator {annotator!r}; choose from {', '.join(ANNOTATORS)}")
    official, prepared = ANNOTATORS[annotator]
    if is_prepared(root):
        return read_prepared(root, name="cryonuseg", license=LICENSE, labels=prepared)
    nested = (root / official / official / "label masks modify", root / official / "label masks modify")
    labels = next((folder for folder in nested if folder.is_dir()), None)
    if labels is None or not (root / "tissue images").is_dir():
        raise not_found(root, f"'tissue images/' with '{official}/label masks modify/', or {LAYOUT}")
    problems: list[str] = []
    pairs = pair_by_stem(root / "tissue images", labels, problems)
    entries = []
    for stem, image, mask in pairs:
        group = stem.removeprefix("Human_").rpartition("_")[0] or stem
        load = partial(load_sample, image, mask, id=stem, group=group, mpp=MPP_AT_40X)
        entries.append(Entry(stem, group, load, str(image)))
    return sound(Dataset("cryonuseg", entries, LICENSE), root, problems)
