"""Slides as DICOM (VL Whole Slide Microscopy, TILED_FULL): one file a level, in a folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE_PX = 256


def write_dicom(folder: Path, levels: Sequence[np.ndarray], mpp: float, jpeg: bool = False) -> Path:
    """Write each level (H, W, 3) uint8, finest first, as a file of one series; the path of the first.

    Args:
        mpp: microns per pixel of the first level.
        jpeg: as JPEG at quality 95, else without compression.
    """
    folder.mkdir()
    common = Dataset()
    common.StudyInstanceUID, common.SeriesInstanceUID = generate_uid(), generate_uid()
    common.FrameOfReferenceUID = generate_uid()
    common.Modality, common.PatientName, common.PatientID = "SM", "drawn", "drawn"
    for number, image in enumerate(levels):
        _write(folder / f"level{number}.dcm", number, image, mpp * levels[0].shape[1] / image.shape[1], common, jpeg)
    return folder / "level0.dcm"


def _write(path: Path, number: int, image: np.ndarray, mpp: float, common: Dataset, jpeg: bool) -> None:
    height, width = image.shape[:2]
    rows, columns = -(-height // TILE_PX), -(-width // TILE_PX)
    padded = np.pad(image, ((0, rows * TILE_PX - height), (0, columns * TILE_PX - width), (0, 0)), mode="edge")
    tiles = padded.reshape(rows, TILE_PX, columns, TILE_PX, 3).swapaxes(1, 2).reshape(-1, TILE_PX, TILE_PX, 3)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = UID(generate_uid())
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    slide = Dataset()
    slide.update(common)
    slide.file_meta = meta
    slide.SOPClassUID, slide.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    slide.InstanceNumber = number + 1
    slide.ImageType = ["ORIGINAL" if number == 0 else "DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
    slide.DimensionOrganizationType = "TILED_FULL"
    slide.TotalPixelMatrixColumns, slide.TotalPixelMatrixRows = width, height
    slide.TotalPixelMatrixFocalPlanes = slide.NumberOfOpticalPaths = 1
    slide.Rows = slide.Columns = TILE_PX
    slide.NumberOfFrames = len(tiles)
    slide.SamplesPerPixel, slide.PlanarConfiguration = 3, 0
    slide.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    slide.BitsAllocated = slide.BitsStored = 8
    slide.HighBit, slide.PixelRepresentation = 7, 0
    slide.ImagedVolumeWidth, slide.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    lens = Dataset()
    lens.ObjectiveLensPower = 40
    slide.OpticalPathSequence = Items([lens])
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    measures.SliceThickness = 0.001
    shared.PixelMeasuresSequence = Items([measures])
    slide.SharedFunctionalGroupsSequence = Items([shared])
    if jpeg:
        slide.PixelData = encapsulate([_jpeg(tile) for tile in tiles])
        slide["PixelData"].is_undefined_length = True
    else:
        slide.PixelData = tiles.tobytes()
    slide.save_as(path, enforce_file_format=True)


def _jpeg(tile: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(tile).save(file, "JPEG", quality=95)
    return file.getvalue()
