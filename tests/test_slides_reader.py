"""Slides of every format give the same pixels, and what cannot be read is told in one line."""

from __future__ import annotations

import builtins
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
from openslide import OpenSlideError

from dicom_slides import write_dicom
from drawn_slide import GLASS_RGB, Truth, write_slide
from mrxs_slides import write_mrxs
from nuguide.slides import reader, vendor
from nuguide.slides.pyramid import PyramidSlide
from nuguide.slides.reader import PlainSlide, open_slide
from nuguide.slides.slide import Slide, levels_of
from nuguide.slides.vendor import VendorSlide
from nuguide.types import UserError

SIZE = (1100, 1500)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A folder with one drawing in each format: without loss, and as JPEG."""
    folder = tmp_path_factory.mktemp("slides")
    truth = write_slide(folder / "zlib.svs", SIZE, compression="zlib")
    write_slide(folder / "jpeg.svs", SIZE)
    write_slide(folder / "zlib.ome.tif", SIZE, compression="zlib")
    write_slide(folder / "jpeg.ome.tif", SIZE)
    with PyramidSlide(folder / "zlib.svs") as slide:
        pixels = whole(slide)
    tiled = {"tile": (256, 256), "photometric": "rgb", "resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}
    deflated = {"compression": "zlib", "compressionargs": {"level": 1}, "predictor": True}
    tifffile.imwrite(folder / "tiled.tif", pixels, metadata=None, **deflated, **tiled)
    tifffile.imwrite(folder / "bare.tif", pixels, metadata=None, **tiled)
    with tifffile.TiffWriter(folder / "pages.tif") as tiff:
        tiff.write(pixels, metadata=None, **tiled)
        tiff.write(pixels[::2, ::2], metadata=None, subfiletype=1, **tiled)
    planes = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(
        folder / "planes.ome.tif", planes, photometric="minisblack", tile=(256, 256), metadata={"axes": "CYX"}
    )
    PIL.Image.fromarray(pixels).save(folder / "plain.png", dpi=(101_600, 101_600), compress_level=1)
    write_dicom(folder / "dicom", [pixels, pixels[::4, ::4]], 0.25)
    return folder, truth


def whole(slide: Slide, level: int = 0) -> np.ndarray:
    return slide.read(level, 0, 0, *slide.levels[level].size_px)


@pytest.mark.parametrize(
    ("name", "kind", "format_name", "levels", "mpp"),
    [
        ("zlib.svs", VendorSlide, "aperio", 3, 0.25),
        ("zlib.ome.tif", PyramidSlide, "ome-tiff", 3, 0.25),
        ("tiled.tif", PyramidSlide, "tiff", 1, 0.25),
        ("bare.tif", PyramidSlide, "tiff", 1, 0.25),
        ("pages.tif", VendorSlide, "generic-tiff", 2, 0.25),
        ("planes.ome.tif", PyramidSlide, "ome-tiff", 1, None),
        ("plain.png", PlainSlide, "png", 1, 0.25),
        ("dicom/level0.dcm", VendorSlide, "dicom", 2, 0.25),
    ],
)
def test_every_format_gives_the_same_pixels(
    drawn: tuple[Path, Truth], name: str, kind: type, format_name: str, levels: int, mpp: float | None
) -> None:
    folder, _ = drawn
    with PyramidSlide(folder / "zlib.svs") as expected, open_slide(folder / name) as slide:
        assert type(slide) is kind
        assert slide.format == format_name
        assert slide.size_px == SIZE
        assert len(slide.levels) == levels
        assert slide.mpp == pytest.approx(mpp) if mpp else slide.mpp is None
        assert np.array_equal(whole(slide), whole(expected))
        assert np.array_equal(slide.read(0, 301, 207, 500, 600), whole(expected)[301:801, 207:807])


def test_openslide_and_tifffile_agree_on_jpeg_and_on_every_level(drawn: tuple[Path, Truth]) -> None:
    with VendorSlide(drawn[0] / "jpeg.svs", "aperio") as one, PyramidSlide(drawn[0] / "jpeg.svs") as other:
        assert one.levels == other.levels
        assert [level.downsample for level in one.levels] == [1, 4, 16]
        assert one.mpp == other.mpp == 0.25
        assert one.objective_power == other.objective_power == 40
        for level in range(3):
            assert np.abs(whole(one, level).astype(int) - whole(other, level)).max() <= 2
    with open_slide(drawn[0] / "jpeg.ome.tif") as slide, open_slide(drawn[0] / "jpeg.svs") as other:
        assert np.array_equal(whole(slide), whole(other))


def test_dicom_of_jpeg_tiles(drawn: tuple[Path, Truth], tmp_path: Path) -> None:
    with open_slide(drawn[0] / "zlib.svs") as slide:
        pixels = whole(slide)
    with open_slide(write_dicom(tmp_path / "jpeg", [pixels, pixels[::4, ::4]], 0.25, jpeg=True)) as slide:
        assert np.abs(whole(slide).astype(int) - pixels).mean() < 2
        assert slide.objective_power == 40


def test_mrxs_counts_from_what_was_scanned(drawn: tuple[Path, Truth], tmp_path: Path) -> None:
    with open_slide(drawn[0] / "zlib.svs") as slide:
        scan = slide.read(0, 0, 0, 1024, 1280)
    with open_slide(write_mrxs(tmp_path / "scan.mrxs", scan, 0.25, at=(2, 4), grid=(14, 13))) as slide:
        assert slide.format == "mirax"
        assert slide.mpp == 0.25
        assert slide.bounds_px == (256, 512)
        assert slide.levels == levels_of([(1024, 1280), (512, 640)])
        assert np.array_equal(whole(slide), scan)
        halved = scan.reshape(512, 2, 640, 2, 3).mean((1, 3))
        assert np.abs(whole(slide, 1) - halved).max() <= 0.5
        assert np.array_equal(slide.read(0, -40, 1200, 100, 200)[40:, :80], scan[:60, 1200:])
        assert (slide.read(0, -40, 1200, 100, 200)[:40] == 255).all()


def test_nuclei_lie_where_the_truth_says(drawn: tuple[Path, Truth]) -> None:
    folder, truth = drawn
    labels = truth.labels()
    assert truth.nuclei == labels.max() == len(truth.centroids_px()) > 50
    assert truth.areas_um2().sum() == pytest.approx((labels > 0).sum() * 0.25**2)
    y, x = np.rint(truth.centroids_px()).astype(int).T
    assert np.array_equal(labels[y, x], np.arange(1, truth.nuclei + 1))
    with open_slide(folder / "zlib.svs") as slide:
        red = whole(slide)[..., 0]
    assert red[labels > 0].mean() < 110
    assert red[labels == 0].mean() > 200


@pytest.mark.parametrize("name", ["zlib.svs", "zlib.ome.tif", "plain.png"])
def test_outside_is_white(drawn: tuple[Path, Truth], name: str) -> None:
    with open_slide(drawn[0] / name) as slide:
        corner = slide.read(0, 1090, 1480, 40, 50)
        assert corner.shape == (40, 50, 3)
        assert np.array_equal(corner[:10, :20], slide.read(0, 1090, 1480, 10, 20))
        assert corner[10:].min() == corner[:, 20:].min() == 255
        before = slide.read(0, -5, -7, 10, 10)
        assert before[:5].min() == before[:, :7].min() == 255
        assert np.abs(before[5:, 7:].astype(int) - GLASS_RGB).max() < 10
        assert slide.read(0, 5000, 5000, 2, 3).tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize("name", ["jpeg.svs", "jpeg.ome.tif", "plain.png"])
def test_the_thumbnail_is_the_area_mean(drawn: tuple[Path, Truth], name: str) -> None:
    with open_slide(drawn[0] / name) as slide:
        small = slide.thumbnail(150)
        assert small.shape == (110, 150, 3)
        cells = whole(slide).reshape(110, 10, 150, 10, 3).mean((1, 3))
        assert np.abs(small - cells)[:, :147].mean() < 1.5  # the reduced levels are rounded down: 93 x 16 = 1488 px
        assert slide.thumbnail(5000).shape == (*SIZE, 3)


def test_several_threads_read_the_same_slide(drawn: tuple[Path, Truth]) -> None:
    for name in ("jpeg.svs", "jpeg.ome.tif"):
        with open_slide(drawn[0] / name) as slide, ThreadPoolExecutor(4) as pool:
            expected = whole(slide)
            places = [(y, x) for y in range(0, 1000, 171) for x in range(0, 1300, 137)]
            windows = pool.map(lambda place, slide=slide: slide.read(0, place[0], place[1], 90, 110), places)
            assert all(
                np.array_equal(window, expected[y : y + 90, x : x + 110])
                for (y, x), window in zip(places, windows, strict=True)
            )


class FakeSlide:
    """Stands for OpenSlide on a scan of 100 x 80 px, of which the file declares a part; pixel (x, y) has that color."""

    level_dimensions = ((100, 80), (50, 40))
    level_downsamples = (1.0, 2.0)

    def __init__(self, **properties: str) -> None:
        self.properties = {f"openslide.{name.replace('_', '-')}": value for name, value in properties.items()}

    def read_region(self, place: tuple[int, int], level: int, size: tuple[int, int]) -> PIL.Image.Image:
        step = int(self.level_downsamples[level])
        image = np.zeros((size[1], size[0], 4), np.uint8)
        image[..., 0] = place[0] + step * np.arange(size[0])
        image[..., 1] = (place[1] + step * np.arange(size[1]))[:, None]
        image[..., 2:] = level, 255
        image[image[..., 0] == 60, 3] = 0  # a column without pixels
        return PIL.Image.fromarray(image)


def faked(monkeypatch: pytest.MonkeyPatch, **properties: str) -> VendorSlide:
    monkeypatch.setattr(VendorSlide, "_open", lambda self: FakeSlide(**properties))
    return VendorSlide(Path("scan.mrxs"), "mirax")


def test_the_declared_rectangle_is_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    slide = faked(monkeypatch, bounds_x="20", bounds_y="10", bounds_width="60", bounds_height="30")
    assert slide.bounds_px == (20, 10)
    assert [level.size_px for level in slide.levels] == [(30, 60), (15, 30)]
    assert slide.read(0, 0, 0, 1, 1).tolist() == [[[20, 10, 0]]]
    assert slide.read(1, 3, 5, 1, 1).tolist() == [[[20 + 2 * 5, 10 + 2 * 3, 1]]]
    assert slide.read(0, 29, 59, 2, 2)[0, 0].tolist() == [79, 39, 0]
    assert slide.read(0, 29, 59, 2, 2)[1, 1].tolist() == [255] * 3  # the scan goes on, the slide does not
    assert slide.read(0, 0, 40, 1, 1).tolist() == [[[255] * 3]]  # transparent


@pytest.mark.parametrize(
    ("x", "y", "mpp", "note"),
    [
        ("0.25", "0.25", 0.25, ""),
        ("0.2501", "0.2541", 0.2521, ""),
        ("0.25", "0.26", None, "not square"),
        ("10", "10", None, "no microscope"),
        ("", "0.25", None, ""),
        ("nan", "abc", None, ""),
        ("0", "0", None, ""),
    ],
)
def test_resolutions_that_openslide_tells(
    monkeypatch: pytest.MonkeyPatch, x: str, y: str, mpp: float | None, note: str
) -> None:
    slide = faked(monkeypatch, mpp_x=x, mpp_y=y, objective_power="20")
    assert slide.mpp == (pytest.approx(mpp) if mpp else None)
    assert note in " ".join(slide.notes)
    assert bool(slide.notes) == bool(note)
    assert slide.objective_power == 20


@pytest.mark.parametrize("name", ["slide.svs", "slide.ome.tif"])
@pytest.mark.parametrize("mpp", [None, 0.1, 0.2527, 0.5, 1.0])
def test_resolutions_of_files(tmp_path: Path, name: str, mpp: float | None) -> None:
    truth = write_slide(tmp_path / name, (320, 320), mpp, block_px=64, blocks=1)
    with open_slide(tmp_path / name) as slide:
        assert slide.mpp == pytest.approx(mpp) if mpp else slide.mpp is None
        if name.endswith(".svs"):
            assert slide.objective_power == (pytest.approx(10 / mpp, rel=1e-4) if mpp else None)
    assert truth.mpp == (mpp or 0.25)


def first_tile_of_tissue(path: Path) -> int:
    """Offset in the file of a tile that only the block at row 1, column 1 shows."""
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages.first.dataoffsets[1 * 6 + 1]


@pytest.mark.parametrize("kind", ["jpeg", "zlib"])
@pytest.mark.parametrize("name", ["slide.svs", "slide.ome.tif"])
def test_a_damaged_tile_is_named_and_the_others_are_read(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    write_slide(path, SIZE, compression=kind, blocks=6)
    with path.open("r+b") as file:
        file.seek(first_tile_of_tissue(path))
        file.write(b"\0" * 400)
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(UserError, match=r"cannot be read at x 250, y 240 of level 0 \(.+\)") as error:
                slide.read(0, 240, 250, 50, 50)
            assert str(error.value).startswith(str(path))
            assert "\n" not in str(error.value)
            assert slide.read(0, 520, 600, 50, 50).mean() < 230  # tissue
            assert slide.read(0, 0, 0, 50, 50).mean() > 235      # glass
        with pytest.raises(UserError, match="cannot be read at"):
            whole(slide)


@pytest.mark.parametrize("name", ["jpeg.svs", "jpeg.ome.tif", "tiled.tif", "plain.png"])
def test_files_cut_short_are_refused_or_read_as_far_as_they_go(
    drawn: tuple[Path, Truth], tmp_path: Path, name: str
) -> None:
    content = (drawn[0] / name).read_bytes()
    path = tmp_path / name
    for share in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=name) as error, open_slide(path) as slide:  # noqa: PT012
            for level in range(len(slide.levels)):
                whole(slide, level)
        assert "\n" not in str(error.value)


def test_a_slide_that_shrinks_while_it_is_read(drawn: tuple[Path, Truth], tmp_path: Path) -> None:
    for name in ("zlib.svs", "zlib.ome.tif"):
        path = tmp_path / name
        path.write_bytes((drawn[0] / name).read_bytes())
        with open_slide(path) as slide:
            path.write_bytes(path.read_bytes()[:2000])
            with pytest.raises(UserError, match="cannot be read at x 0, y 0 of level 0"):
                whole(slide)


class Gone:
    """An open file or an OpenSlide handle whose drive has vanished."""

    def read_region(self, *_: object) -> None:
        raise OpenSlideError("I/O error")

    def seek(self, _: int) -> None:
        raise OSError("I/O error")

    def close(self) -> None:
        """Nothing is left to close."""


def test_a_drive_that_vanishes_and_comes_back(drawn: tuple[Path, Truth], tmp_path: Path) -> None:
    path, away = tmp_path / "zlib.svs", tmp_path / "away"
    path.write_bytes((drawn[0] / "zlib.svs").read_bytes())
    with VendorSlide(path, "aperio") as slide, PyramidSlide(path) as other:
        expected = whole(other)
        away.write_bytes(path.read_bytes()[:100])
        path.rename(tmp_path / "kept")
        away.rename(path)
        slide.close()
        other.close()
        slide._shared = other._file = Gone()  # pyright: ignore[reportAttributeAccessIssue]
        for broken, reason in ((slide, "OpenSlide cannot open it"), (other, "I/O error")):
            with pytest.raises(UserError, match=rf"x 0, y 0 of level 0 \({reason}"):
                whole(broken)
        (tmp_path / "kept").rename(path)
        assert np.array_equal(whole(slide), expected)
        assert np.array_equal(whole(other), expected)


def missing(path: Path) -> None:
    """Nothing is there."""


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.svs", missing, "no such file"),
        ("folder.svs", Path.mkdir, "is a folder"),
        ("empty.svs", Path.touch, "is empty"),
        ("text.svs", lambda path: path.write_text("no slide"), "is not a PNG, JPEG, TIFF or BMP"),
        ("text.ndpi", lambda path: path.write_text("no slide"), "is not recognized as a NDPI slide"),
        ("alone.mrxs", lambda path: PIL.Image.new("RGB", (9, 9)).save(path, "jpeg"), "folders beside it"),
        ("broken.svs", lambda path: path.write_bytes(b"II*\0\x08\0\0\0" + b"\xff" * 99), "damaged or cut short"),
    ],
)
def test_what_is_no_slide_is_told_in_a_line(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        open_slide(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.fixture
def no_openslide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where OpenSlide is not installed."""
    real = builtins.__import__

    def refusing(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "openslide":
            raise ImportError("No module named 'openslide'")
        return real(name, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", refusing)


@pytest.mark.usefixtures("no_openslide")
def test_without_openslide_what_needs_it_says_so_and_the_rest_is_read(
    drawn: tuple[Path, Truth], tmp_path: Path
) -> None:
    assert not vendor.is_installed()
    path = tmp_path / "scan.mrxs"
    path.write_bytes(b"\xff\xd8\xff any")
    with pytest.raises(UserError, match=r"scan.mrxs: needs OpenSlide to be read; pip install 'nuguide\[slides\]'"):
        open_slide(path)
    for name in ("jpeg.svs", "zlib.ome.tif", "pages.tif"):
        with open_slide(drawn[0] / name) as slide:
            assert type(slide) is PyramidSlide
            assert slide.mpp == 0.25
            assert len(slide.levels) > 1


def test_a_tile_that_declares_more_than_memory_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.svs"
    write_slide(path, (320, 320), block_px=64, blocks=1)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
            tiff.pages.first.tags[name].overwrite(100_000)
    with pytest.raises(UserError, match="bomb.svs: .*100000 x 100000 pixels"):
        open_slide(path)
    renamed = path.rename(tmp_path / "bomb.tif")
    with pytest.raises(UserError, match="100000 x 100000 pixels"):
        open_slide(renamed)


def test_a_strip_of_ten_gigapixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages.first.tags[name].overwrite(50_000, dtype="I")
    with pytest.raises(UserError, match=r"strip.tif: declares 50000 x 50000 pixels"):
        open_slide(path)


def test_a_deflated_tile_gives_no_more_than_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    packed = zlib.compress(b"\x07" * 30_000_000)
    tifffile.imwrite(
        path, iter([packed] * 4), shape=(512, 512, 3), dtype=np.uint8, tile=(256, 256), compression="zlib",
        photometric="rgb", metadata=None,
    )
    with open_slide(path) as slide:
        assert type(slide) is PyramidSlide
        tracemalloc.start()
        pixels = whole(slide)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.unique(pixels).tolist() == [7]
    assert peak < 5e6


def test_other_compressions_are_read_by_libtiff(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (150, 130, 3), np.uint8)
    for name, compression in (("lzw", "tiff_lzw"), ("packbits", "packbits"), ("ycbcr", "jpeg")):
        PIL.Image.fromarray(image).save(tmp_path / f"{name}.tif", compression=compression)
        with PyramidSlide(tmp_path / f"{name}.tif") as slide, PlainSlide(tmp_path / f"{name}.tif") as plain:
            assert np.array_equal(whole(slide), whole(plain)), name
            assert np.array_equal(slide.read(0, 77, 5, 60, 70), whole(plain)[77:137, 5:75])


def test_downsamples_are_whole_numbers_where_sizes_were_rounded() -> None:
    levels = levels_of([(1099, 1503), (274, 375), (69, 94), (300, 410)])
    assert [level.downsample for level in levels[:3]] == [1, 4, 16]
    assert levels[3].downsample == pytest.approx((1099 / 300 + 1503 / 410) / 2)


def test_a_slide_wider_than_any_glass_is_refused(drawn: tuple[Path, Truth], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_SIDE_PX", 1499)
    with pytest.raises(UserError, match="declares 1500 x 1100 pixels, more than any slide has"):
        open_slide(drawn[0] / "jpeg.svs")


def test_reading_slides_loads_openslide_only_when_one_is_opened() -> None:
    script = "import sys, nuguide.slides.reader; print('openslide' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
