"""Small data sets drawn in the layouts that their publishers use; what is drawn is known exactly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import scipy.io
import tifffile
from PIL import Image

from nuguide.measure import outlines

Size = tuple[int, int]  # rows, columns

ANNOTATOR_1 = "Annotator 1 (biologist)"
ROUND_2 = "Annotator 1 (biologist second round of manual marks up)"
ANNOTATOR_2 = "Annotator 2 (bioinformatician)"


def draw(seed: int, size: Size = (60, 48), nuclei: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Noise (H, W, 3) uint8 and ellipses (H, W) int32 apart from each other, one a row of the image."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    height = size[0] // nuclei
    for number in range(1, nuclei + 1):
        axes = (int(rng.integers(4, min(size[1] // 4, 24))), int(rng.integers(3, min(height // 3, 20))))
        middle = (int(rng.integers(size[1] // 3, size[1] * 2 // 3)), number * height - height // 2)
        cv2.ellipse(labels, middle, axes, 0, 0, 360, number, -1)
    return rng.integers(0, 256, (*size, 3), np.uint8), labels


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    elif path.suffix == ".npy":
        np.save(path, array, allow_pickle=False)
    else:
        Image.fromarray(array).save(path, compress_level=1)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rgba(image_rgb: np.ndarray) -> np.ndarray:
    return np.dstack([image_rgb, np.full(image_rgb.shape[:2], 255, np.uint8)])


def same_nuclei(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two label maps show the same nuclei under whatever numbers."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    numbers = len(np.unique(one)), len(np.unique(other))
    return numbers == (pairs.shape[1],) * 2 and bool(((one == 0) == (other == 0)).all())


def nuinsseg(root: Path, size: Size = (512, 512)) -> Path:
    """Two organs of one image each, the second RGBA and with a vague area of 200 pixels."""
    for seed, (organ, stem) in enumerate([("human bladder", "human_bladder_02"), ("mouse fat", "mouse_fat_01")]):
        image, labels = draw(seed, size)
        save(root / organ / "tissue images" / f"{stem}.png", rgba(image) if seed else image)
        save(root / organ / "label masks modify" / f"{stem}.tif", labels.astype(np.uint16))
    vague = np.zeros(size, np.uint8)
    vague[:10, :20] = 255
    save(root / "mouse fat" / "vague areas" / "mask binary" / "mouse_fat_01.png", vague)
    return root


def tnbc(root: Path, size: Size = (512, 512)) -> Path:
    for seed, (slide, stem) in enumerate([("01", "01_1"), ("02", "02_1"), ("12", "12_1")]):
        image, labels = draw(seed, size)
        save(root / f"Slide_{slide}" / f"{stem}.png", rgba(image))
        save(root / f"GT_{slide}" / f"{stem}.png", (labels > 0).astype(np.uint8) * 255)
    return root


def cryonuseg(root: Path, size: Size = (512, 512)) -> Path:
    """Three annotations of two images: 3, 2 and 1 nuclei of each."""
    folders = {ANNOTATOR_1: 3, f"{ROUND_2}/{ROUND_2}": 2, f"{ANNOTATOR_2}/{ANNOTATOR_2}": 1}
    for seed, stem in enumerate(["Human_Larynx_01", "Human_Skin_01"]):
        image, labels = draw(seed, size)
        save(root / "tissue images" / f"{stem}.tif", image)
        for folder, count in folders.items():
            kept = np.where(labels > count, 0, labels).astype(np.uint16)
            save(root / folder / "label masks modify" / f"{stem}.tif", kept)
    return root


def conic(root: Path, names: Iterable[str] = ("consep_1-0000", "consep_1-0001", "dpath_12-0000")) -> Path:
    """One patch a name, all nuclei epithelial."""
    names = list(names)
    drawn = [draw(seed, (256, 256)) for seed in range(len(names))]
    save(root / "images.npy", np.stack([image for image, _ in drawn]))
    labels = np.stack([labels for _, labels in drawn])
    save(root / "labels.npy", np.stack([labels, np.where(labels, 2, 0)], axis=-1).astype(np.uint16))
    write(root / "patch_info.csv", "\n".join(["patch_info", *names]) + "\n")
    types = "neutrophil,epithelial,lymphocyte,plasma,eosinophil,connective"
    write(root / "counts.csv", "\n".join([types, *["0,3,0,0,0,0"] * len(names)]) + "\n")
    return root


def pannuke(root: Path, folds: Iterable[int] = (1, 2, 3), images: int = 2) -> Path:
    """Float arrays; the nuclei 1, 2, 3 of every image are neoplastic, connective and epithelial."""
    for fold in folds:
        drawn = [draw(10 * fold + index, (256, 256)) for index in range(images)]
        masks = np.zeros((images, 256, 256, 6))
        for index, (_, labels) in enumerate(drawn):
            for number, plane in zip((1, 2, 3), (0, 2, 4), strict=True):
                masks[index, ..., plane] = np.where(labels == number, 40 + number, 0)
            masks[index, ..., 5] = labels == 0
        base = root / f"Fold {fold}"
        save(base / "images" / f"fold{fold}" / "images.npy", np.stack([image for image, _ in drawn]).astype(np.float64))
        save(base / "images" / f"fold{fold}" / "types.npy", np.array(["Breast", "Colon"] * images)[:images])
        save(base / "masks" / f"fold{fold}" / "masks.npy", masks)
    return root


def lizard(root: Path) -> Path:
    labels_folder = root / "lizard_labels" / "Lizard_Labels"
    lines = ["Filename,Source,Split"]
    for seed, (number, stem) in enumerate([(1, "consep_1"), (1, "crag_5"), (2, "glas_7")]):
        image, labels = draw(seed, (90, 70 + seed))
        save(root / f"lizard_images{number}" / f"Lizard_Images{number}" / f"{stem}.png", image)
        save_mat(labels_folder / "Labels" / f"{stem}.mat", labels)
        lines.append(f"{stem},{stem.split('_')[0]},{seed + 1}")
    write(labels_folder / "info.csv", "\n".join(lines) + "\n")
    return root


def save_mat(path: Path, labels: np.ndarray, name: str = "inst_map") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.unique(labels)[1:]
    facts = {"id": ids[:, None], "class": np.ones((len(ids), 1)), "centroid": np.zeros((len(ids), 2))}
    scipy.io.savemat(path, {name: labels, **facts}, do_compression=True)
    return path


def monuseg(root: Path, size: Size = (1000, 1000)) -> Path:
    """Two training images and one test image."""
    train, test = root / "MoNuSeg 2018 Training Data", root / "MoNuSegTestData"
    for seed, (images, xmls, stem) in enumerate(
        [
            (train / "Tissue Images", train / "Annotations", "TCGA-18-5592-01Z-00-DX1"),
            (train / "Tissue Images", train / "Annotations", "TCGA-38-6178-01Z-00-DX1"),
            (test, test, "TCGA-2Z-A9J9-01A-01-TS1"),
        ]
    ):
        image, labels = draw(seed, size)
        save(images / f"{stem}.tif", image)
        write(xmls / f"{stem}.xml", aperio(outlines(labels).values()))
    return root


def aperio(rings: Iterable[np.ndarray]) -> str:
    """XML of outlines (N, 2), x and y with the center of the first pixel at (0, 0)."""
    regions = "".join(
        f'<Region Id="{number}" Type="0"><Attributes/><Vertices>'
        + "".join(f'<Vertex X="{x + 1}" Y="{y + 1}" Z="0"/>' for x, y in ring)
        + "</Vertices></Region>"
        for number, ring in enumerate(rings, start=1)
    )
    annotation = f'<Annotation Id="1"><Regions>{regions}</Regions></Annotation>'
    return f'<Annotations MicronsPerPixel="0.25">{annotation}</Annotations>'


def dsb2018(root: Path) -> Path:
    """Two images of one size and one of another, RGBA as published."""
    for seed, (id, size) in enumerate([("00ae65", (60, 48)), ("4590d7", (60, 48)), ("feffce", (72, 48))]):
        image, labels = draw(seed, size)
        folder = root / "stage1_train" / id
        save(folder / "images" / f"{id}.png", rgba(image))
        for number in range(1, labels.max() + 1):
            save(folder / "masks" / f"nucleus_{number}.png", (labels == number).astype(np.uint8) * 255)
    return root


def qupath(root: Path) -> Path:
    for seed, stem in enumerate(["case 1", "case 2"]):
        image, labels = draw(seed)
        save(root / f"{stem}.tif", image)
        write(root / f"{stem}.geojson", geojson(outlines(labels).values()))
    return root


def geojson(rings: Iterable[np.ndarray]) -> str:
    """A FeatureCollection of outlines (N, 2), x and y with the center of the first pixel at (0, 0)."""
    features = ",".join(
        '{"type":"Feature","geometry":{"type":"Polygon","coordinates":['
        + str([[float(x) + 0.5, float(y) + 0.5] for x, y in [*ring, ring[0]]])
        + ']},"properties":{"objectType":"annotation"}}'
        for ring in rings
    )
    return f'{{"type":"FeatureCollection","features":[{features}]}}'


TREES = {
    "nuinsseg": nuinsseg,
    "tnbc": tnbc,
    "cryonuseg": cryonuseg,
    "monuseg": monuseg,
    "conic": conic,
    "dsb2018": dsb2018,
    "pannuke": pannuke,
    "lizard": lizard,
    "qupath": qupath,
}
