"""Every kind of image file that users bring, good and bad, made here."""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile

from nuguide.images import GREY, TRANSPARENT, TURNED, list_images, read_image
from nuguide.types import UserError

SUFFIXES = ["png", "jpg", "tif", "bmp"]


@pytest.fixture
def picture() -> np.ndarray:
    """60 x 80 pixels, smooth enough for JPEG, with no symmetry."""
    row, column = np.mgrid[:60, :80]
    return np.stack([3 * column, 4 * row, 2 * column + row], axis=2).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = PIL.Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def refusal(path: Path, **options: int) -> str:
    """The one line with which a file is refused, which names it."""
    with pytest.raises(UserError) as raised:
        read_image(path, **options)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert ";" in text, "what is wrong; what to do"
    return text


# What is read


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rgb_is_read_as_it_is(tmp_path, picture, suffix):
    image = read_image(save(tmp_path / f"a.{suffix}", picture))
    assert image.image_rgb.shape == (60, 80, 3)
    assert image.image_rgb.dtype == np.uint8
    assert image.image_rgb.flags.c_contiguous
    assert image.image_rgb.flags.writeable
    assert (image.mpp, image.notes) == (None, ())
    tolerance = 12 if suffix == "jpg" else 0
    assert np.abs(image.image_rgb.astype(int) - picture).max() <= tolerance


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_of_every_kind_is_read(tmp_path, picture, options):
    image = read_image(save(tmp_path / "a.jpg", picture, **options))
    assert np.abs(image.image_rgb.astype(int) - picture).max() <= 12


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_grey_is_repeated_in_three_channels_and_noted(tmp_path, picture, suffix):
    image = read_image(save(tmp_path / f"a.{suffix}", picture[..., 0]))
    assert image.image_rgb.shape == (60, 80, 3)
    assert (image.image_rgb == image.image_rgb[..., :1]).all()
    assert image.notes == (GREY,)


def test_black_and_white_is_grey(tmp_path, picture):
    image = read_image(save(tmp_path / "a.png", picture, "1"))
    assert set(np.unique(image.image_rgb)) == {0, 255}
    assert image.notes == (GREY,)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_transparency_is_laid_on_white_and_noted(tmp_path, suffix):
    rgba = np.full((2, 3, 4), 100, np.uint8)
    rgba[:, :, 3] = [0, 51, 255]  # clear, a fifth, opaque
    image = read_image(save(tmp_path / f"a.{suffix}", rgba))
    assert image.image_rgb[0, :, 0].tolist() == [255, 224, 100]  # 224 = 0.2 x 100 + 0.8 x 255
    assert image.notes == (TRANSPARENT,)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_opaque_alpha_channel_is_dropped_without_a_note(tmp_path, picture, suffix):
    rgba = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    image = read_image(save(tmp_path / f"a.{suffix}", rgba))
    assert (image.image_rgb == picture).all()
    assert image.notes == ()


def test_premultiplied_alpha_is_not_multiplied_again(tmp_path):
    rgba = np.full((4, 4, 4), 51, np.uint8)  # a fifth of white
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["assocalpha"])
    assert (read_image(path).image_rgb == 255).all()


def test_a_fourth_channel_of_no_stated_meaning_is_left_out(tmp_path, picture):
    path = tmp_path / "a.tif"
    extra = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    tifffile.imwrite(path, extra, photometric="rgb", extrasamples=["unspecified"])
    assert (read_image(path).image_rgb == picture).all()


def test_grey_with_transparency_carries_both_notes(tmp_path):
    image = read_image(save(tmp_path / "a.png", np.full((4, 4, 2), (0, 0), np.uint8)))
    assert image.notes == (GREY, TRANSPARENT)
    assert (image.image_rgb == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_palettes_are_looked_up(tmp_path, suffix):
    colors = np.zeros((8, 8, 3), np.uint8)
    colors[:4], colors[4:] = (200, 30, 90), (20, 160, 250)
    image = read_image(save(tmp_path / f"a.{suffix}", colors, "P"))
    assert np.abs(image.image_rgb.astype(int) - colors).max() <= 51  # of the web palette's steps
    assert (image.image_rgb[0, 0] != image.image_rgb[7, 7]).any()
    assert image.notes == ()


def test_a_transparent_palette_is_laid_on_white(tmp_path):
    image = PIL.Image.fromarray(np.zeros((4, 4), np.uint8), "L").convert("P")
    image.save(tmp_path / "a.png", transparency=0)
    assert (read_image(tmp_path / "a.png").image_rgb == 255).all()


def test_white_is_zero_where_a_tiff_says_so(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture[..., 0], photometric="miniswhite")
    assert (read_image(path).image_rgb[..., 0] == 255 - picture[..., 0]).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_compressions(tmp_path, picture, compression, channels):
    pixels = picture if channels == 3 else picture[..., 0]
    image = read_image(save(tmp_path / "a.tif", pixels, compression=compression))
    tolerance = 12 if compression == "jpeg" else 0
    assert np.abs(image.image_rgb.astype(int) - pixels.reshape(60, 80, channels)).max() <= tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 32), "compression": "zlib"},
        {"tile": (32, 32)},
        {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
        {"bigtiff": True},
        {"byteorder": ">"},
    ],
)
def test_tiff_layouts(tmp_path, picture, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", **options)
    assert (read_image(path).image_rgb == picture).all()


def test_tiff_with_one_plane_a_color(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(picture, 2, 0), photometric="rgb", planarconfig="separate")
    assert (read_image(path).image_rgb == picture).all()


def test_three_channels_of_imagej_are_taken_for_rgb_and_noted(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(picture, 2, 0), imagej=True, metadata={"axes": "CYX"})
    image = read_image(path)
    assert (image.image_rgb == picture).all()
    assert "three channels" in image.notes[0]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_of_a_pyramid_the_full_resolution_is_read(tmp_path, picture, compression):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        options = {"photometric": "rgb", "tile": (32, 32), "compression": compression}
        tiff.write(picture, subifds=1, **options)
        tiff.write(picture[::2, ::2], subfiletype=1, **options)
    assert (read_image(path).image_rgb == picture).all()


def test_of_several_images_the_largest_is_read_and_noted(tmp_path, picture):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture[:16, :50], photometric="rgb", metadata=None)
        tiff.write(picture, photometric="rgb", metadata=None)
    image = read_image(path)
    assert (image.image_rgb == picture).all()
    assert image.notes == ("the file holds 2 images; the largest was read",)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_is_obeyed_as_pillow_does(tmp_path, picture, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(picture)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # PIL's numbers of what brings the stored picture upright
    upright = np.asarray(stored.transpose(PIL.Image.Transpose(turns[orientation])) if orientation > 1 else stored)
    stored.save(path, exif=exif)
    image = read_image(path)
    assert image.image_rgb.shape == upright.shape
    assert np.abs(image.image_rgb.astype(int) - upright).max() <= 12
    assert image.notes == ((TURNED,) if orientation > 1 else ())


def test_a_turned_lzw_tiff_is_turned_once(tmp_path, picture):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.tif", picture, exif=exif, compression="tiff_lzw")
    image = read_image(path)
    assert (image.image_rgb == np.rot90(picture, -1)).all()
    assert image.notes == (TURNED,)


def test_the_content_decides_not_the_suffix(tmp_path, picture):
    path = save(tmp_path / "a.png", picture)
    assert (read_image(path.rename(tmp_path / "a.jpg")).image_rgb == picture).all()


# Microns per pixel


def test_mpp_of_the_baseline_tags(tmp_path, picture):
    for name, unit, per_um in (("cm", "CENTIMETER", 1e4), ("inch", "INCH", 25_400)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, picture, photometric="rgb", resolution=(per_um / 0.5, per_um / 0.5), resolutionunit=unit)
        assert read_image(path).mpp == pytest.approx(0.5)


@pytest.mark.parametrize(("unit", "size", "mpp"), [("µm", 0.25, 0.25), ("nm", 250, 0.25), ("mm", 0.00025, 0.25)])
def test_mpp_of_ome(tmp_path, picture, unit, size, mpp):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit}
    metadata |= {"PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, picture, photometric="rgb", metadata=metadata)
    assert read_image(path).mpp == pytest.approx(mpp)


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_mpp_of_imagej(tmp_path, picture, unit):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, imagej=True, resolution=(4, 4), metadata={"unit": unit, "axes": "YXS"})
    assert read_image(path).mpp == pytest.approx(0.25)


def test_mpp_of_aperio(tmp_path, picture):
    path = tmp_path / "a.svs"
    text = "Aperio Image Library v11.2.1 \r\n80x60 |AppMag = 20|MPP = 0.4990|Left = 1"
    tifffile.imwrite(path, picture, photometric="rgb", description=text, metadata=None, tile=(32, 32))
    assert read_image(path).mpp == pytest.approx(0.499)


def test_mpp_of_png_and_jpeg_density(tmp_path, picture):
    assert read_image(save(tmp_path / "a.png", picture, dpi=(50_800, 50_800))).mpp == pytest.approx(0.5, abs=1e-4)
    assert read_image(save(tmp_path / "a.jpg", picture, dpi=(50_800, 50_800))).mpp == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_the_density_of_a_screen_or_printer_is_no_mpp(tmp_path, picture, suffix, dpi):
    assert read_image(save(tmp_path / f"a.{suffix}", picture, dpi=(dpi, dpi))).mpp is None


def test_unequal_or_absurd_scales_are_no_mpp(tmp_path, picture):
    assert read_image(save(tmp_path / "a.png", picture, dpi=(50_800, 25_400))).mpp is None
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", description="MPP = 25.0.1", metadata=None)
    assert read_image(tmp_path / "a.tif").mpp is None


# What is refused


def test_missing_folder_and_empty_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "a.png")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "b.png").touch()
    assert "0 bytes" in refusal(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_a_text_file_with_the_name_of_an_image(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("id,area\n1,20\n")
    assert "is not a PNG, JPEG, TIFF or BMP" in refusal(path)


@pytest.mark.parametrize("kept", [0.002, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["png", "jpg", "progressive.jpg", "bmp", "tif", "zlib.tif", "lzw.tif", "jpeg.tif"])
def test_a_file_cut_short(tmp_path, kind, kept):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    options = {"zlib.tif": {"compression": "tiff_adobe_deflate"}, "lzw.tif": {"compression": "tiff_lzw"}}
    options |= {"jpeg.tif": {"compression": "jpeg"}}
    path = save(tmp_path / f"a.{kind}", noise, progressive=kind == "progressive.jpg", **options.get(kind, {}))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(int(len(whole) * kept), 10)])
    refusal(path)


def test_a_tiff_by_tifffile_cut_short(tmp_path, picture):
    for compression in (None, "zlib"):
        path = tmp_path / f"{compression}.tif"
        tifffile.imwrite(path, picture, photometric="rgb", compression=compression, rowsperstrip=10)
        path.write_bytes(path.read_bytes()[:-100])
        assert "cut short" in refusal(path)


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_lzw"])
def test_a_tiff_with_damaged_pixels(tmp_path, compression):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    path = save(tmp_path / "a.tif", noise, compression=compression)
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 500] = bytes([255]) * 500
    path.write_bytes(damaged)
    assert "damaged" in refusal(path)


def test_random_damage_never_ends_in_a_traceback(tmp_path, picture):
    """A hundred times twenty bytes are overwritten: the file is read or refused, and nothing else."""
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "tif", "bmp"):
        path = save(tmp_path / f"a.{suffix}", picture, **({"compression": "tiff_lzw"} if suffix == "tif" else {}))
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(25):
            damaged = whole.copy()
            reach = len(whole) if rng.random() < 0.5 else min(200, len(whole))  # anywhere, or in the header
            damaged[rng.integers(4, reach, 20)] = rng.integers(0, 256, 20)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(UserError):
                read_image(path, max_pixels=10**6)


def test_cmyk(tmp_path, picture):
    assert "CMYK" in refusal(save(tmp_path / "a.jpg", picture, "CMYK"))
    assert "CMYK" in refusal(save(tmp_path / "a.tif", picture, "CMYK"))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint32", "bool"])
def test_tiff_values_other_than_8_bits(tmp_path, picture, dtype):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture[..., 0].astype(dtype), photometric="minisblack")
    assert "8 bits per channel" in refusal(path)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bytes(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_in_every_color_type(tmp_path, color, channels):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(4, 4, 16, color, (b"\0" + bytes(4 * channels * 2)) * 4))
    assert "16 bits" in refusal(path)


def test_stacks_and_many_channels(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([picture] * 4), photometric="rgb")
    assert "stack" in refusal(path)
    tifffile.imwrite(path, np.stack([picture[..., 0]] * 5), imagej=True, metadata={"axes": "CYX"})
    assert "5 channels" in refusal(path)
    tifffile.imwrite(path, np.dstack([picture, picture]), photometric="rgb", planarconfig="contig")
    assert "6 channels" in refusal(path)


def test_a_tiff_whose_pages_run_in_a_circle_is_read_to_an_end(tmp_path, picture):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for pixels in (picture, picture[::2, ::2]):
            tiff.write(pixels, photometric="rgb", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        last = tiff.pages[1].offset
    content = bytearray(path.read_bytes())
    (tags,) = struct.unpack_from("<H", content, last)
    struct.pack_into("<I", content, last + 2 + 12 * tags, last)  # after the last page comes the last page
    path.write_bytes(content)
    assert (read_image(path).image_rgb == picture).all()


def overwrite(path: Path, **tags: int) -> None:
    """Change tags of the first page of a TIFF, and nothing else."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name, value in tags.items():
            tiff.pages.first.tags[name].overwrite(value)


def test_a_tiff_that_no_one_here_can_decode(tmp_path, picture):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", tile=(32, 32), metadata=None)
    overwrite(path, Compression=33005)  # Aperio's JPEG 2000
    assert "imagecodecs" in refusal(path)


def bomb(path: Path, suffix: str) -> Path:
    """A small file that declares 60000 x 60000 pixels, 10.8 GB."""
    if suffix == "png":
        path.write_bytes(png_bytes(60_000, 60_000, 8, 2, bytes(1000)))
    elif suffix == "tif":
        tifffile.imwrite(path, np.zeros((8, 8, 3), np.uint8), photometric="rgb", metadata=None)
        overwrite(path, ImageWidth=60_000, ImageLength=60_000)
    else:
        PIL.Image.new("RGB", (8, 8)).save(path)
        content = bytearray(path.read_bytes())
        if suffix == "jpg":
            frame = content.index(b"\xff\xc0") + 5
            content[frame : frame + 4] = struct.pack(">HH", 60_000, 60_000)
        else:
            content[18:26] = struct.pack("<ii", 60_000, 60_000)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_decompression_bomb_is_refused_without_memory(tmp_path, suffix):
    path = bomb(tmp_path / f"a.{suffix}", suffix)
    assert path.stat().st_size < 4000
    tracemalloc.start()
    text = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "60000 x 60000" in text
    assert "NUGUIDE_MAX_PIXELS" in text
    assert peak < 2_000_000


def test_the_limit_is_an_argument_or_a_variable(tmp_path, picture, monkeypatch):
    path = save(tmp_path / "a.png", picture)
    assert "80 x 60" in refusal(path, max_pixels=4799)
    assert read_image(path, max_pixels=4800).image_rgb.shape == (60, 80, 3)
    monkeypatch.setenv("NUGUIDE_MAX_PIXELS", "4e3")
    assert "80 x 60" in refusal(path)
    monkeypatch.setenv("NUGUIDE_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="NUGUIDE_MAX_PIXELS=many"):
        read_image(path)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make `Path.name` fail as for a user without permission; root, who may run the tests, has every one."""

    def denied(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, name, denied)


def test_a_file_without_permission(tmp_path, picture, monkeypatch):
    path = save(tmp_path / "a.png", picture)
    forbid(monkeypatch, "open")
    assert "permissions" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_as_a_user(tmp_path, picture):
    path = save(tmp_path / "a.png", picture)
    path.chmod(0)
    assert "permissions" in refusal(path)


# Lists of files


def test_a_folder_gives_its_images_by_name(tmp_path):
    for name in ("b.PNG", "a.tiff", "c.jpeg", "d.bmp", "e.txt", ".hidden.png", "a.overlay.png", "a.labels.tif"):
        (tmp_path / name).touch()
    (tmp_path / "deeper.png").mkdir()
    (tmp_path / "deeper.png" / "f.png").touch()
    assert [file.name for file in list_images([tmp_path])] == ["a.tiff", "b.PNG", "c.jpeg", "d.bmp"]


def test_a_file_is_taken_whatever_its_name_and_only_once(tmp_path):
    named, other = tmp_path / "named.dat", tmp_path / "a.png"
    named.touch()
    other.touch()
    assert list_images([named, other, tmp_path, named]) == [named, other]


def test_every_bad_input_is_named_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError) as raised:
        list_images([tmp_path / "gone.png", empty])
    text = str(raised.value)
    assert f"{tmp_path / 'gone.png'}: there is no such file" in text
    assert f"{empty}: holds no image" in text
    assert "\n" not in text


def test_an_unreadable_folder(tmp_path, monkeypatch):
    forbid(monkeypatch, "iterdir")
    with pytest.raises(UserError, match="cannot be looked into"):
        list_images([tmp_path])
