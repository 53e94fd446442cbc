"""Sets in one prepared layout: `images/<id>.{png,jpg}`, `labels/<id>.png` and a `manifest.csv` with a row an image."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import Row, load_sample, not_found, pair_by_stem, read_table
from nuguide.types import Sample, UserError

LAYOUT = "images/ + labels/ + manifest.csv"
MPP_AT_40X = 0.25


def read_dsb_he(root: Path) -> Dataset:
    """The 107 color-stained images of the Data Science Bowl 2018 (BBBC038, CC0), 256 x 320.

    Rough outlines, mostly purple stains without eosin: at most extra variety in training. The group is the `source`,
    the kind of picture, which is coarser and so safer than the mosaics of neighboring crops in the column `group`. The
    magnification is nowhere recorded; each image has a guess, such as "~30x(crude)" (15x to 70x), taken here at its
    word: 10 / 30 microns per pixel, and 0.33, the median, where there is none.

    Source: Caicedo et al., Nature Methods 2019, doi:10.1038/s41592-019-0612-7.
    """
    return read_prepared(root, name="dsb_he", license=FACTS["dsb_he"].license, mpp=_guessed_mpp, group_column="source")


def is_prepared(root: Path) -> bool:
    return (root / "manifest.csv").is_file() and (root / "images").is_dir()


def read_prepared(
    root: Path,
    *,
    name: str,
    license: str | None = None,
    mpp: float | Callable[[Row], float] = MPP_AT_40X,
    group_column: str = "group",
    labels: str = "labels",
    load: Callable[..., Sample] = load_sample,
    instances_are_exact: bool = True,
) -> Dataset:
    """A set in the prepared layout, in the order of its manifest.

    Args:
        mpp: microns per pixel of every image, or a function of its row of the manifest.
        group_column: of the manifest; where it is missing, every image is its own group.
        labels: the folder of instance label maps.
        load: called with the paths of image and labels and the keywords of `load_sample`.

    Raises UserError where the layout is another, and one that lists every image without labels or row and the reverse.
    """
    if not is_prepared(root) or not (root / labels).is_dir():
        raise not_found(root, LAYOUT.replace("labels", labels))
    problems: list[str] = []
    files = {stem: paths for stem, *paths in pair_by_stem(root / "images", root / labels, problems)}
    rows = read_rows(root / "manifest.csv", problems)
    problems += [f"{path} has no row in manifest.csv" for id, (path, _) in files.items() if id not in rows]
    problems += [f"manifest.csv names {id}, which has no image with labels" for id in rows if id not in files]
    entries = []
    for id, row in rows.items():
        if id not in files:
            continue
        group = row.get(group_column) or id
        facts = {"id": id, "group": group, "mpp": mpp(row) if callable(mpp) else mpp}
        read = partial(load, *files[id], **facts, instances_are_exact=instances_are_exact)
        entries.append(Entry(id, group, read, str(files[id][0])))
    return sound(Dataset(name, entries, license), root, problems)


def read_rows(path: Path, problems: list[str]) -> dict[str, Row]:
    """The rows of a manifest by their `id`; an id without value or given twice is added to `problems`."""
    rows: dict[str, Row] = {}
    for line, row in enumerate(read_table(path), start=2):
        if "id" not in row:
            raise UserError(f"{path} has no column 'id'; it has {', '.join(row)}")
        if not row["id"] or row["id"] in rows:
            problems.append(f"line {line} of manifest.csv " + (f"repeats {row['id']}" if row["id"] else "has no id"))
        else:
            rows[row["id"]] = row
    return rows


def _guessed_mpp(row: Row) -> float:
    guess = re.search(r"(\d+(?:\.\d+)?)\s*x", row.get("est_magnification", ""))
    return 10 / float(guess[1]) if guess and float(guess[1]) else 0.33
