"""MoNuSeg 2018: H&E images of several organs at 40x with outlines in Aperio XML."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import skimage.draw

from nuguide.datasets.dataset import Dataset, Entry, sound
from nuguide.datasets.facts import FACTS
from nuguide.datasets.files import load_sample, not_found, pair_by_stem
from nuguide.datasets.prepared import LAYOUT, MPP_AT_40X, is_prepared, read_prepared
from nuguide.types import UserError

LICENSE = FACTS["monuseg"].license
OFFICIAL = "'Tissue Images/*.tif' with 'Annotations/*.xml' (train) or *.tif beside *.xml (test)"
PARTS = ("train", "test")
PATIENT = re.compile(r"TCGA-\w{2}-\w{4}")
MAX_XML_BYTES = 64 * 2**20  # a thousand outlines take a few MB
MAX_VERTICES = 20_000  # of one outline
MATLAB_SHIFT_PX = 1  # the annotators' code takes coordinates for MATLAB's, where the first pixel's center is at (1, 1)


def read_monuseg(root: Path, part: str | None = None) -> Dataset:
    """MoNuSeg, 1000 x 1000 at 40x, grouped by patient: "TCGA-18-5592" of the barcode in the file's name.

    Args:
        root: the official folder of `Tissue Images/*.tif` and `Annotations/*.xml` (training), that of `*.tif` beside
            `*.xml` (test), or one up to two levels above them; or the prepared layout, which holds the first 30
            training images.
        part: "train" or "test", told apart by their layouts; None reads all that are there.

    Raises ValueError for another part, and one UserError that lists every problem: an image without outlines and the
    reverse, a name that is no TCGA barcode.

    Source: Kumar et al., IEEE Transactions on Medical Imaging 2017, doi:10.1109/TMI.2017.2677499, and 2020,
    doi:10.1109/TMI.2019.2947628; CC BY-NC-SA 4.0.
    """
    if part is not None and part not in PARTS:
        raise ValueError(f"unknown part {part!r}; choose from {', '.join(PARTS)}")
    if is_prepared(root):
        return read_prepared(root, name="monuseg", license=LICENSE)
    problems: list[str] = []
    folders = [folders for name, *folders in _parts(root) if part in (None, name)]
    if not folders:
        raise not_found(root, f"{OFFICIAL}, or {LAYOUT}")
    entries: dict[str, Entry] = {}
    for images, outlines in folders:
        if not images.is_dir() or not outlines.is_dir():
            problems.append(f"{outlines if images.is_dir() else images} is missing")
            continue
        for stem, image, xml in pair_by_stem(images, outlines, problems, label_suffixes=(".xml",)):
            patient = PATIENT.match(stem)
            if patient is None:
                problems.append(f"{image}: its name is no TCGA barcode, so its patient is unknown")
            elif stem in entries:
                problems.append(f"{image} has the stem of {entries[stem].where}")
            else:
                facts = {"id": stem, "group": patient[0], "mpp": MPP_AT_40X, "label_reader": read_aperio}
                entries[stem] = Entry(stem, patient[0], partial(load_sample, image, xml, **facts), str(image))
    return sound(Dataset("monuseg", entries.values(), LICENSE), root, problems)


def read_aperio(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A label map from the regions of an Aperio (ImageScope) XML file, as MoNuSeg's own code draws them.

    The regions are numbered from 1 in the order of the file. A pixel belongs to the outline that holds its center by
    the even-odd rule; where several do, to the first. Coordinates are MATLAB's, (1, 1) at the center of the first
    pixel. What lies off the image is cut off; an outline of fewer than 3 points holds no pixel, and its number is left
    out.

    Args:
        path: XML with elements `Region` that hold `Vertex` with attributes `X` and `Y`.
        shape: (H, W) of the image.

    Returns:
        (H, W) int32.

    Raises:
        UserError: where the file cannot be read, declares a document type (whose entities could fill the memory), or
            has a vertex without finite coordinates.
    """
    labels = np.zeros(shape, np.int32)
    for number, ring in enumerate(_regions(path), start=1):
        points = np.array(ring, np.float64).reshape(-1, 2) - MATLAB_SHIFT_PX
        rows, columns = skimage.draw.polygon(points[:, 1], points[:, 0], shape)
        free = labels[rows, columns] == 0
        labels[rows[free], columns[free]] = number
    return labels


class _Outlines:
    """What the XML parser builds: of every region its vertices, and of all else nothing."""

    def __init__(self) -> None:
        self.rings: list[list[tuple[float, float]]] = []
        self.is_aperio = False

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type, which an annotation never needs")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "Annotations":
            self.is_aperio = True
        elif tag == "Region":
            self.rings.append([])
        elif tag == "Vertex":
            x, y = float(attributes["X"]), float(attributes["Y"])
            if not (math.isfinite(x) and math.isfinite(y)):
                raise ValueError(f"a vertex lies at {x}, {y}")
            self.rings[-1].append((x, y))
            if len(self.rings[-1]) > MAX_VERTICES:
                raise ValueError(f"an outline has more than {MAX_VERTICES} vertices")


def _regions(path: Path) -> list[list[tuple[float, float]]]:
    """The (x, y) of every vertex of every region, as they stand in the file."""
    try:
        if path.stat().st_size > MAX_XML_BYTES:
            raise ValueError(f"it is larger than {MAX_XML_BYTES // 2**20} MB")
        outlines = _Outlines()
        parser = ElementTree.XMLParser(target=outlines)
        parser.feed(path.read_bytes())
        parser.close()
        if not outlines.is_aperio:
            raise ValueError("it has no element Annotations")
        return outlines.rings
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"cannot read {path} as Aperio XML: {reason}; copy it again from its source") from error


def _parts(root: Path) -> list[tuple[str, Path, Path]]:
    """(part, folder of images, folder of outlines) of every part under a folder."""
    found = []
    for folder in [root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))]:
        images, outlines = folder / "Tissue Images", folder / "Annotations"
        if images.is_dir() or outlines.is_dir():
            found.append(("train", images, outlines))
        elif folder.name not in ("Tissue Images", "Annotations") and _holds_test_images(folder):
            found.append(("test", folder, folder))
    return found


def _holds_test_images(folder: Path) -> bool:
    """Whether files of the test part lie in a folder, be it only its images or only its outlines."""
    return any(any(folder.glob(pattern)) for pattern in ("TCGA-*.tif", "*.xml"))
