"""The commands of `nuguide data`, and how data sets are named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .types import UserError

if TYPE_CHECKING:
    from .datasets import Dataset


def data() -> int:
    """Look after annotated images: check, fetch, divide into folds, find leaks between parts of a split."""
    raise UserError(f"nuguide data: choose from {', '.join(DATA_COMMANDS)}")


def data_check(
    name: Annotated[str, tyro.conf.Positional],
    root: Annotated[Path, tyro.conf.Positional],
    /,
    annotator: str | None = None,
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Read every image and label map of a data set once and say what is wrong.

    Checks that images and labels pair up, can be read, match in size, hold label numbers, show no image twice and are
    as many as published. Exit code 0: sound; 1: problems, one a line.

    Args:
        name: Of the data set: folder, nuinsseg, tnbc, cryonuseg, monuseg, conic, dsb2018, pannuke, lizard, qupath or
            dsb_he.
        root: Its folder, as it was unpacked.
        annotator: Check one annotation of CryoNuSeg: annotator1, annotator1_round2 or annotator2. Where not given, all.
        partial: The folder holds a part of the set on purpose: do not compare the number of images.
    """
    from tqdm import tqdm

    from .datasets.check import check, lines

    bar = tqdm(desc=name, unit="image", leave=False, delay=1)  # from a second on, so that no wrong name has a bar

    def read(images: int, total: int) -> None:
        bar.total = total
        bar.update(images - bar.n)

    with bar:
        report = check(name, root, annotator=annotator, partial=partial, watch=read)
    if report.images:
        print("\n".join(lines(report, root)))
    for problem in report.problems:
        print(f"problem: {problem}")
    count = len(report.problems)
    print(f"{count or 'no'} problem{'s' * (count != 1)}")
    return 1 if report.problems else 0


def data_leaks(
    manifest: Annotated[Path, tyro.conf.Positional],
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
) -> int:
    """Find images that are the same, or nearly so, in two parts of a split. Exit code 0: none; 1: some, one a line.

    Args:
        manifest: A split.json.
        data: Its data sets, NAME=FOLDER.
    """
    from .datasets.leaks import find_leaks
    from .datasets.splits import read_manifest

    leaks = find_leaks(read_manifest(manifest), {part.name: part for part in open_all(data)})
    for leak in leaks:
        print(f"leak: {leak}")
    print(f"{len(leaks) or 'no'} leak{'s' * (len(leaks) != 1)}")
    return 1 if leaks else 0


def data_folds(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    out: Path,
    folds: int = 5,
    seed: int = 0,
    split: Literal["grouped", "own"] = "grouped",
) -> int:
    """Divide data sets into folds by group (patient, slide, organ), each a split.json with parts train and val.

    Args:
        data: Annotated images, NAME=FOLDER or FOLDER, as for nuguide train.
        out: Folder for fold_0.json, fold_1.json and so on.
        folds: How many.
        seed: Draws the order of groups of one size.
        split: grouped, or own for the division that belongs to a data set (conic: the 80/20 of its baseline, by source
            image): one fold, whatever the number and seed.
    """
    from .datasets.splits import write_folds, write_own_split

    parts = open_all(data)
    if split == "own" and len(parts) > 1:
        raise UserError("--split own divides one data set; name one")
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = write_own_split(out, parts[0]) if split == "own" else write_folds(out, parts, folds, seed)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    except ValueError as error:
        raise UserError(f"{error}; choose fewer with --folds") from error
    print(f"{len(written)} fold{'s' * (len(written) != 1)} in {out}")
    return 0


def data_fetch(
    name: Annotated[str, tyro.conf.Positional],
    root: Annotated[Path, tyro.conf.Positional],
    /,
) -> int:
    """Download a data set that is open to all; of the others, say where they are and what to do.

    Args:
        name: nuinsseg, tnbc, dsb2018, or another.
        root: Folder to unpack it into.
    """
    from .datasets.facts import FACTS, PUBLISHED
    from .datasets.fetch import fetch, how_to_get

    if name not in PUBLISHED:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(PUBLISHED)}")
    if FACTS[name].url is None:
        print(how_to_get(name, root))
        return 2
    print(f"{name} is in {fetch(name, root)}")
    return 0


DATA_COMMANDS: dict[str, Callable[..., int]] = {
    "check": data_check, "fetch": data_fetch, "folds": data_folds, "leaks": data_leaks,
}


def open_all(texts: Sequence[str], annotator: str | None = None) -> list[Dataset]:
    """The data sets that are named; UserError where there is none, or an image of one name stands in two."""
    if not texts:
        raise UserError("no data; name a FOLDER of images/ and labels/, or NAME=FOLDER")
    parts = [open_data(text, annotator) for text in texts]
    images = [(part.name, id) for part in parts for id in part.ids]
    if len(set(images)) < len(images):
        name, id = next(image for image in images if images.count(image) > 1)
        raise UserError(f"two data sets called {name} have an image {id}; rename one of their folders")
    if annotator is not None and all(part.name != "cryonuseg" for part in parts):
        raise UserError("--annotator chooses between those of cryonuseg; leave it out")
    return parts


def open_data(text: str, annotator: str | None = None) -> Dataset:
    """The data set that NAME=FOLDER or FOLDER names."""
    from .datasets import DATASETS, read_dataset

    name, equals, folder = text.partition("=")
    if name not in DATASETS:
        if equals and not Path(text).exists():
            raise UserError(f"{text}: {name} is no data set; choose from {', '.join(DATASETS)}")
        name, folder = "folder", text
    try:
        return read_dataset(name, Path(folder), **({"annotator": annotator} if name == "cryonuseg" else {}))
    except ValueError as error:
        raise UserError(f"{text}: {error}") from error
