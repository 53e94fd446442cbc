"""Annotated images: one reader a data set, chosen by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nuguide.datasets.conic import read_conic
from nuguide.datasets.cryonuseg import read_cryonuseg
from nuguide.datasets.dataset import Dataset, Entry
from nuguide.datasets.dsb2018 import read_dsb2018
from nuguide.datasets.folder import read_folder
from nuguide.datasets.lizard import read_lizard
from nuguide.datasets.monuseg import read_monuseg
from nuguide.datasets.nuinsseg import read_nuinsseg
from nuguide.datasets.pannuke import read_pannuke
from nuguide.datasets.prepared import read_dsb_he
from nuguide.datasets.qupath import read_qupath
from nuguide.datasets.tnbc import read_tnbc
from nuguide.types import UserError

DATASETS: dict[str, Callable[..., Dataset]] = {
    "folder": read_folder,
    "nuinsseg": read_nuinsseg,
    "tnbc": read_tnbc,
    "cryonuseg": read_cryonuseg,
    "dsb_he": read_dsb_he,
    "monuseg": read_monuseg,
    "conic": read_conic,
    "dsb2018": read_dsb2018,
    "pannuke": read_pannuke,
    "lizard": read_lizard,
    "qupath": read_qupath,
}

__all__ = ["DATASETS", "Dataset", "Entry", "read_dataset"]


def read_dataset(name: str, root: Path, **options: Any) -> Dataset:
    """The data set `name` of `DATASETS` in the folder `root`; no pixel is read yet.

    Args:
        options: of the reader: `annotator` of cryonuseg, `mpp` of folder and qupath, `part` of monuseg, `fold` of
            pannuke, `split` of lizard. None counts as not given.

    Raises ValueError for an unknown name or option, listing the choices, and UserError where `root` holds
    something else or no image.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    reader = DATASETS[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = list(inspect.signature(reader).parameters)[1:]
    for option in given:
        if option not in known:
            raise ValueError(f"the data set {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    dataset = reader(Path(root), **given)
    if not len(dataset):
        raise UserError(f"{root} holds no image of the data set {name}")
    return dataset
