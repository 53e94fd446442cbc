"""A whole slide becomes its files, whatever cuts the run, and what cannot be done is told in one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import tifffile

from conftest import PLAIN, draw_tissue, names, nuguide, segment
from dicom_slides import write_dicom
from drawn_slide import Truth, write_slide
from fakes import ByColor
from mrxs_slides import write_mrxs
from nuguide import checkpoint, images, slide_run
from nuguide.checkpoint import ModelSpec
from nuguide.export import read_polygons
from nuguide.images import declared_px
from nuguide.measure import COLUMNS_WITH_FLIPS
from nuguide.metrics import panoptic_quality
from nuguide.slide_run import Manifest, OpenedSlide, SlideJob, SlideOptions
from nuguide.slides.parts import PartStore
from nuguide.slides.pyramid import PyramidSlide
from nuguide.slides.reader import is_slide
from nuguide.slides.roi import Roi

SIZE = (640, 768)           # 2 x 3 regions of tiles of 192 px, as `small_regions` has them
TISSUE_PX = 128             # where tissue begins, all around
ALWAYS = ["slides.json", "slide.summary.json", "slide.tissue.png", "summary.csv"]


@pytest.fixture(autouse=True)
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuguide.predict.TILE_PX", 192)
    monkeypatch.setattr("nuguide.whole_slide.REGION_TILES", 0.4)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    """A slide at 0.5 microns per pixel, so that the network sees its pixels as they are."""
    path = tmp_path_factory.mktemp("drawn") / "slide.svs"
    return path, write_slide(path, SIZE, 0.5, block_px=128, compression="zlib")


@pytest.fixture
def slide(drawn: tuple[Path, Truth]) -> Path:
    return drawn[0]


@pytest.fixture(scope="module")
def pixels(drawn: tuple[Path, Truth]) -> np.ndarray:
    with PyramidSlide(drawn[0]) as slide:
        return slide.read(0, 0, 0, *SIZE)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what was complained of."""
    return capsys.readouterr().err.splitlines()[-1]


def summary(out: Path, name: str = "slide") -> dict:
    return json.loads((out / f"{name}.summary.json").read_text())


def table(out: Path, name: str = "slide") -> pd.DataFrame:
    return pd.read_csv(out / f"{name}.csv")


def nearest_px(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance of each of `found` (n, 2) to the nearest of `truth` (m, 2)."""
    return np.sqrt(((found[:, None] - truth[None]) ** 2).sum(2)).min(1)


def write_tiff(path: Path, pixels: np.ndarray, levels: int, bad_px: tuple[int, int] | None = None) -> Path:
    """An OME-TIFF in tiles of 64 px, each four times smaller level in it too; one tile of the first is damaged."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for level in range(levels):
            tiff.write(
                pixels[:: 4**level, :: 4**level],
                tile=(64, 64),
                photometric="rgb",
                compression="zlib",
                subifds=levels - 1 if level == 0 else None,
                metadata={"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5} if level == 0 else None,
            )
    if bad_px is not None:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            number = bad_px[0] // 64 * (page.imagewidth // 64) + bad_px[1] // 64
            offset = page.dataoffsets[number]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"no zlib!")
    return path


# What is written


def test_a_slide_becomes_the_files_that_the_help_promises_and_they_agree(tmp_path, out, model, capsys):
    truth = write_slide(tmp_path / "slide.svs", (1280, 1536), 0.25, block_px=256)
    formats = "parquet,csv,geojson,labels,heatmap"
    assert segment(tmp_path / "slide.svs", out, model, "--formats", formats) == 0
    endings = (".parquet", ".csv", ".geojson", ".labels.ome.tif", ".heatmap.png", ".summary.json", ".tissue.png")
    assert names(out) == sorted(["slides.json", "summary.csv", *(f"slide{ending}" for ending in endings)])

    found = pd.read_parquet(out / "slide.parquet")
    centers = found[["centroid_y_px", "centroid_x_px"]].to_numpy()
    assert len(found) == pytest.approx(truth.nuclei, rel=0.03)
    assert np.median(nearest_px(truth.centroids_px(), centers)) < 0.5
    areas = found["area_um2"].to_numpy()
    assert np.median(areas) == pytest.approx(np.median(truth.areas_um2()), rel=0.15)
    np.testing.assert_allclose(table(out)["area_um2"].to_numpy(), areas, rtol=0, atol=6e-4)

    rings = [polygon[0] for polygon in read_polygons(out / "slide.geojson")]
    moments = [cv2.moments(ring.astype(np.float32)) for ring in rings]
    middles = np.array([(m["m01"] / m["m00"], m["m10"] / m["m00"]) for m in moments]) - 0.5    # QuPath's frame
    assert np.abs(middles - centers).max() < 0.7
    assert (nearest_px(middles, truth.centroids_px()) < 2).mean() > 0.97

    labels = tifffile.imread(out / "slide.labels.ome.tif")
    assert labels.shape == (1280, 1536)
    assert np.array_equal(np.unique(labels), np.arange(len(found) + 1))
    assert np.bincount(labels.ravel())[1:] * 0.25**2 == pytest.approx(found["area_um2"].to_numpy())
    assert panoptic_quality(truth.labels(), labels).pq > 0.75

    row = pd.read_csv(out / "summary.csv").iloc[0]
    facts = summary(out)
    assert (row["name"], row["nuclei"], row["mpp"]) == ("slide", len(found), 0.25)
    assert row["source"] == facts["source"] == str((tmp_path / "slide.svs").resolve())
    assert row["model"].startswith(f"{model} (")
    assert (facts["nuclei"], facts["not_read"]) == (len(found), [])
    assert facts["searched"] == {"roi": None, "tissue_mask": True}
    assert truth.tissue_mm2 < facts["tissue_mm2"] < 0.262 * 0.326   # 25 um around 192 x 256 um, and 10 more
    assert facts["resolution"] == "level 0 (0.25 mpp), reduced 2 times to 0.5 microns per pixel"
    state = json.loads((out / "slides.json").read_text())
    assert state == {str(tmp_path / "slide.svs"): {"state": "done", "nuclei": len(found)}}
    assert f"slide.svs: {len(found)} nuclei in {facts['tissue_mm2']:.2f} mm2" in capsys.readouterr().out


def test_the_slide_way_and_the_image_way_find_the_same_nuclei(tmp_path, pixels, out, model):
    file = write_tiff(tmp_path / "slide.ome.tif", pixels, 2)
    formats = ["--formats", "labels,csv"]
    assert segment(file, out, model, *formats) == 0
    assert segment(file, tmp_path / "image", model, *formats, "--treat-as", "image") == 0
    assert names(tmp_path / "image") == ["slide.ome.csv", "slide.ome.labels.tif", "summary.csv"]
    one, other = table(out, "slide.ome"), table(tmp_path / "image", "slide.ome")
    assert len(one) == len(other) > 150
    places = ["centroid_y_px", "centroid_x_px"]
    assert nearest_px(one[places].to_numpy(), other[places].to_numpy()).max() < 0.1
    maps = tifffile.imread(out / "slide.ome.labels.ome.tif"), tifffile.imread(tmp_path / "image/slide.ome.labels.tif")
    assert ((maps[0] > 0) != (maps[1] > 0)).mean() < 1e-5         # the slide's maps are rounded to fp16
    assert panoptic_quality(*maps).pq > 0.999


def test_scanners_formats_give_the_same_nuclei_counted_from_what_was_scanned(tmp_path, slide, pixels, out, model):
    files = {
        "slide": slide,
        "level0": write_dicom(tmp_path / "dicom", [pixels, pixels[::4, ::4]], 0.5),
        "scan": write_mrxs(tmp_path / "scan.mrxs", pixels, 0.5, at=(2, 4), grid=(12, 11)),
    }
    for file in files.values():
        assert segment(file, out, model, "--formats", "csv,geojson", "--no-tissue-mask") == 0
    expected, rings = table(out), read_polygons(out / "slide.geojson")
    assert len(expected) > 150
    for name in ("level0", "scan"):
        pd.testing.assert_frame_equal(table(out, name), expected)
        for ring, other in zip(rings, read_polygons(out / f"{name}.geojson"), strict=True):
            np.testing.assert_array_equal(ring[0], other[0])


def test_with_flips_every_table_has_the_agreement(tmp_path, slide, out, model):
    assert segment(slide, out, model, "--flips", "--formats", "parquet,csv,geojson") == 0
    found = pd.read_parquet(out / "slide.parquet")
    assert tuple(found.columns) == tuple(table(out).columns) == COLUMNS_WITH_FLIPS
    assert found["agreement"].between(0, 1).all()
    assert found["agreement"].mean() > 0.9
    features = json.loads((out / "slide.geojson").read_text())["features"]
    told = [feature["properties"]["measurements"]["Agreement of mirror images"] for feature in features]
    assert told == pytest.approx(found["agreement"].tolist(), abs=1e-3)


def test_images_and_slides_of_one_folder_get_each_their_own_files(tmp_path, slide, out, model, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "slide.svs").symlink_to(slide)
    PIL.Image.fromarray(draw_tissue(0, (160, 200), 20)[0]).save(folder / "image.png")
    assert segment(folder, out, model, "--mpp", 0.5) == 0
    image = [f"image{ending}" for ending in (".csv", ".geojson", ".labels.tif", ".overlay.png")]
    of_slide = ["slide.parquet", "slide.geojson", "slide.heatmap.png"]
    assert names(out) == sorted([*image, *of_slide, *ALWAYS])
    assert pd.read_csv(out / "summary.csv")["name"].tolist() == ["image", "slide"]

    capsys.readouterr()
    assert segment(folder, tmp_path / "b", model, "--mpp", 0.5, "--formats", "overlay") == 1
    said_now = said(capsys)
    assert said_now.startswith(f"failed: {folder / 'slide.svs'}: none of --formats overlay can be written of it; ")
    assert names(tmp_path / "b") == ["image.overlay.png", "summary.csv"]
    assert segment(folder, tmp_path / "c", model, "--mpp", 0.5, "--formats", "parquet") == 1
    assert f"failed: {folder / 'image.png'}: none of --formats parquet can be written of it; " in said(capsys)
    treated = segment(folder / "image.png", tmp_path / "d", model, "--mpp", 0.5, "--treat-as", "slide")
    assert treated == 0
    assert "image.summary.json" in names(tmp_path / "d")


def test_an_image_of_64_megapixels_goes_the_way_of_slides(tmp_path, pixels, out, model, monkeypatch, capsys):
    path = tmp_path / "slide.png"
    PIL.Image.fromarray(pixels).save(path, compress_level=1)
    monkeypatch.setattr("nuguide.slides.reader.declared_px", lambda path: 64_000_000)
    assert segment(path, out, model, "--formats", "csv") == 2
    assert said(capsys).startswith(f"failed: {path}: states no microns per pixel; give them with --mpp (0.25 for most")
    assert segment(path, out, model, "--formats", "csv", "--mpp", 0.5) == 0
    assert names(out) == sorted(["slide.csv", *ALWAYS])


# Again


def test_again_it_is_skipped_and_what_was_asked_otherwise_is_refused(slide, out, model, tmp_path, capsys):
    other = checkpoint.save(tmp_path / "other", ByColor(), ModelSpec("by_color", mpp=0.25))
    csv = ["--formats", "csv"]
    assert segment(slide, out, model, *csv) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert segment(slide, out, model, *csv) == 0
    assert "(1 finished before)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for changed, told in (
        (["--mpp", 0.4], "at 0.5 microns per pixel"),
        (["--model", other], f"were made by {model} ("),
        (["--roi", "0,0,300,300"], "were made with no --roi and the tissue mask"),
        (["--no-tissue-mask"], "were made with no --roi and the tissue mask"),
    ):
        assert segment(slide, out, model, *csv, *changed) == 2
        line = said(capsys)
        assert line.startswith(f"failed: {slide}: ")
        assert told in line
        assert line.endswith("; choose another --out, or --overwrite them")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert segment(slide, out, model, *csv, "--roi", "0,0,300,300", "--overwrite") == 0
    assert 0 < len(table(out)) < before["slide.csv"].count(b"\n") / 2
    assert segment(slide, out, model, *csv) == 2
    assert "were made with --roi 0,0,300,300 and the tissue mask" in said(capsys)


def test_slides_that_wait_are_pending_and_those_done_before_stay_done(tmp_path):
    manifest = Manifest(tmp_path / "slides.json")
    job = SlideJob(SlideOptions(), "m", manifest=manifest)
    manifest.note(tmp_path / "b.svs", "done", nuclei=7)
    for name in ("a.svs", "b.svs"):
        job.queue(tmp_path / name)
    states = json.loads((tmp_path / "slides.json").read_text())
    assert states == {
        str(tmp_path / "b.svs"): {"state": "done", "nuclei": 7}, str(tmp_path / "a.svs"): {"state": "pending"}
    }


def test_the_manifest_keeps_what_earlier_runs_did(tmp_path, slide, out, model):
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    assert segment([tmp_path / "broken.svs", slide], out, model, "--formats", "csv") == 1
    assert segment(slide, out, model, "--formats", "csv", "--overwrite") == 0
    states = json.loads((out / "slides.json").read_text())
    assert {path: state["state"] for path, state in states.items()} == {
        str(tmp_path / "broken.svs"): "failed", str(slide): "done"
    }
    assert states[str(tmp_path / "broken.svs")]["error"].startswith(f"{tmp_path / 'broken.svs'}: is not a PNG, JPEG")


# Cut


START = """
import sys, time
import nuguide.predict, nuguide.whole_slide
from fakes import ByColor
from nuguide import cli, networks

class Slow(ByColor):
    def forward(self, image):
        time.sleep(0.3)
        return super().forward(image)

nuguide.predict.TILE_PX, nuguide.whole_slide.REGION_TILES = 192, 0.4
networks.NETWORKS["by_color"] = lambda classes: Slow()
cli.main(sys.argv[1:])
"""
THREE = ["--formats", "csv,geojson,labels"]
FILES = ("slide.csv", "slide.geojson", "slide.labels.ome.tif")


@pytest.fixture(scope="module")
def unbroken(drawn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing cut."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nuguide.predict.TILE_PX", 192)
        patch.setattr("nuguide.whole_slide.REGION_TILES", 0.4)
        patch.setitem(checkpoint.build_network.__globals__["NETWORKS"], "by_color", lambda classes: ByColor())
        model = checkpoint.save(folder / "model", ByColor(), ModelSpec("by_color"))
        assert segment(drawn[0], folder / "out", model, *THREE) == 0
    return {name: (folder / "out" / name).read_bytes() for name in FILES}


def outputs(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_a_run_that_was_killed_goes_on_from_its_parts_and_ends_as_an_unbroken_one(
    slide, out, model, unbroken, monkeypatch, capsys
):
    command = [sys.executable, "-c", START, "segment", slide, "--out", out, "--model", model, *PLAIN, *THREE]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    running = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE)
    parts = out / "slide.parts"
    patience = time.monotonic() + 120
    while len(list(parts.glob("region_*.npz"))) < 2 and running.poll() is None and time.monotonic() < patience:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.communicate()[1] is not None
    assert running.returncode == -signal.SIGKILL, "it was at work"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("region_*.npz")}
    assert 2 <= len(before) < 6
    assert not (out / "slide.csv").exists()

    seen, delete = [], slide_run.clear

    def look_first(folder: Path) -> None:
        seen.append({path.name: path.stat().st_mtime_ns for path in folder.glob("region_*.npz")})
        delete(folder)

    monkeypatch.setattr(slide_run, "clear", look_first)
    assert segment(slide, out, model, *THREE) == 0
    assert f"; {len(before)} of 6 regions were done before" in capsys.readouterr().out
    assert len(seen[0]) == 6
    assert {name: seen[0][name] for name in before} == before, "none was done again"
    assert outputs(out) == unbroken
    assert names(out) == sorted([*FILES, *ALWAYS])


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does."""


def test_killed_again_and_again_at_any_of_its_writes_it_ends_as_an_unbroken_one(
    slide, out, model, unbroken, monkeypatch
):
    """The first run is killed at its first write, the second at its second, and so on until one ends."""
    replace, written = os.replace, []

    def deadly(source: Path, target: Path) -> None:
        if left == len(written):
            raise Killed
        replace(source, target)
        written.append(Path(target).name)

    monkeypatch.setattr(os, "replace", deadly)
    computed = []
    keep = PartStore.write
    monkeypatch.setattr(PartStore, "write", lambda *given: (keep(*given), computed.append(given[1].number)))
    for left in range(30):                              # noqa: B007  `deadly` looks at it
        written.clear()
        try:
            assert segment(slide, out, model, *THREE) == 0
            break
        except Killed:
            continue
    assert left >= 8, "of plan, parts, pictures, files, summaries"
    assert sorted(computed) == list(range(6)), "no region was done twice"
    assert outputs(out) == unbroken
    assert [name for name in names(out) if not name.startswith(".")] == sorted([*FILES, *ALWAYS])


def cut(slide: Path, out: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> Path:
    """The parts of a run that was killed after its second region."""
    keep, kept = PartStore.write, []

    def deadly(*given) -> None:
        if len(kept) == 2:
            raise Killed
        kept.append(keep(*given))

    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "write", deadly)
        with pytest.raises(Killed):
            segment(slide, out, model, "--formats", "csv", *more)
    parts = out / "slide.parts"
    assert names(parts) == ["plan.json", "region_0000_0000.npz", "region_0000_0001.npz"]
    return parts


def test_parts_of_another_run_are_not_mixed_in(slide, out, model, tmp_path, monkeypatch, capsys):
    parts = cut(slide, out, model, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    other = checkpoint.save(tmp_path / "other", ByColor(), ModelSpec("by_color", exposure=True))
    for changed, told in (
        (["--model", other], "--model, --flips or --min-probability, the model's config.json"),
        (["--min-probability", 0.5], "--model, --flips or --min-probability"),
        (["--mpp", 0.45], "--mpp"),
        (["--roi", "0,0,300,300"], "--roi or --tissue-mask"),
        (["--no-tissue-mask"], "--roi or --tissue-mask"),
        (["--precision", "auto"], "--precision"),
    ):
        assert segment(slide, out, model, "--formats", "csv", *changed) == 2
        assert said(capsys) == (
            f"failed: {parts}: holds an unfinished run that differs in {told}; "
            "give the same options, choose another --out, or --overwrite it"
        )
    config = model / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"separation": {}', '"separation": {"nucleus": 0.6}'))
    assert config.read_text() != text
    assert segment(slide, out, model, "--formats", "csv") == 2
    assert "an unfinished run that differs in the model's config.json; " in said(capsys)
    config.write_text(text)
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before
    assert segment(slide, out, model, "--formats", "csv", "--no-tissue-mask", "--overwrite") == 0
    assert "regions were done before" not in capsys.readouterr().out
    assert names(out) == sorted(["slide.csv", *ALWAYS])


def test_a_damaged_plan_or_part_is_named_and_files_that_are_not_ours_stay(slide, out, model, monkeypatch, capsys):
    parts = cut(slide, out, model, monkeypatch)
    plan = (parts / "plan.json").read_bytes()
    for content in (b"{", b"[]"):
        (parts / "plan.json").write_bytes(content)
        assert segment(slide, out, model, "--formats", "csv") == 2
        told = f"failed: {parts / 'plan.json'}: is damaged; delete {parts} and start again"
        assert said(capsys) == told
    (parts / "plan.json").write_bytes(plan)
    (parts / "region_0000_0001.npz").write_bytes(b"PK")
    assert segment(slide, out, model, "--formats", "csv") == 2
    assert said(capsys).startswith(f"failed: {parts / 'region_0000_0001.npz'}: is damaged; delete it and run")
    (parts / "region_0000_0001.npz").unlink()
    (parts / "notes.txt").write_text("mine")
    assert segment(slide, out, model, "--formats", "csv") == 0
    assert names(parts) == ["notes.txt"]


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_later(slide, out, model, unbroken, monkeypatch, capsys):
    replace, write = os.replace, Path.open

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refused(victim: str) -> None:
        assert segment(slide, out, model, *THREE) == 2
        line = said(capsys)
        assert line.startswith(f"failed: {out}")
        assert line.endswith(f"{victim}: not written (No space left on device); free some space or write elsewhere")
        assert not list(out.rglob("*.part"))
        assert all((out / name).read_bytes() == unbroken[name] for name in FILES if (out / name).exists())
        assert (out / "slide.parts").exists() == (victim != "slides.json")

    victims = ["slides.json", "plan.json", "region_0001_0000.npz", "slide.geojson", "slide.summary.json", "summary.csv"]
    for victim in victims:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *to, name=victim: (full if to[1].name == name else replace)(*to))
            refused(victim)
    with monkeypatch.context() as patch:                # not even a temporary file can be made
        patch.setattr(Path, "open", lambda path, *how: (full if path.suffix == ".part" else write)(path, *how))
        assert segment(slide, out, model, *THREE) == 2
        assert "slides.json: not written (No space left on device)" in said(capsys)
    assert segment(slide, out, model, *THREE) == 0
    assert "; 6 of 6 regions were done before" in capsys.readouterr().out
    assert outputs(out) == unbroken
    assert names(out) == sorted([*FILES, *ALWAYS])


# What is searched


def test_a_slide_that_states_no_scale_asks_for_it_and_the_option_wins(tmp_path, out, model, slide, capsys):
    nameless = tmp_path / "nameless.svs"
    write_slide(nameless, SIZE, None, block_px=128)
    assert segment(nameless, out, model, "--formats", "csv") == 2
    assert said(capsys) == (
        f"failed: {nameless}: states no microns per pixel; give them with --mpp (0.25 for most 40x scans, 0.5 for 20x)"
    )
    assert segment(slide, out, model, "--formats", "csv", "--mpp", 0.25) == 0
    assert pd.read_csv(out / "summary.csv")["mpp"].tolist() == [0.25]
    assert summary(out)["resolution"] == "level 0 (0.25 mpp), reduced 2 times to 0.5 microns per pixel"


def geojson(path: Path, *rings: Sequence[Sequence[float]]) -> Path:
    """Annotations as QuPath exports them, each a Polygon."""
    features = [
        {
            "type": "Feature",
            "id": f"6a4bb0d4-0000-4000-8000-{number:012}",
            "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
            "properties": {"objectType": "annotation", "name": "tumor"},
        }
        for number, ring in enumerate(rings)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_a_region_of_interest_is_a_rectangle_or_what_qupath_exports(tmp_path, drawn, out, model):
    slide, truth = drawn
    csv = ["--formats", "csv"]
    assert segment(slide, out / "rectangle", model, *csv, "--roi", "200,150,240,260") == 0
    found = table(out / "rectangle")
    x, y = found["centroid_x_px"], found["centroid_y_px"]
    assert x.between(198, 442).all()
    assert y.between(148, 412).all()
    real_y, real_x = truth.centroids_px().T
    inside = ((real_x > 200) & (real_x < 440) & (real_y > 150) & (real_y < 410)).sum()
    assert len(found) == pytest.approx(inside, abs=4)
    assert inside > 40
    assert summary(out / "rectangle")["tissue_mm2"] == pytest.approx(240 * 260 * 0.25 / 1e6, rel=0.02)

    ring = [[200, 150], [440, 150], [440, 410], [200, 410]]
    hole = [[300, 200], [400, 200], [400, 300], [300, 300]]
    same = geojson(tmp_path / "same.geojson", ring, [[220, 160], [230, 160], [230, 170]])      # the second lies in it
    assert segment(slide, out / "same", model, *csv, "--roi", same) == 0
    assert (out / "same" / "slide.csv").read_bytes() == (out / "rectangle" / "slide.csv").read_bytes()
    holed = geojson(tmp_path / "holed.geojson", ring)
    document = json.loads(holed.read_text())
    document["features"][0]["geometry"]["coordinates"].append([*hole, hole[0]])
    holed.write_text(json.dumps(document))
    assert segment(slide, out / "holed", model, *csv, "--roi", holed) == 0
    left = table(out / "holed")
    in_hole = x.between(300, 400, inclusive="neither") & y.between(200, 300, inclusive="neither")
    assert len(left) == len(found) - in_hole.sum()
    assert in_hole.sum() > 3


def test_the_area_of_a_small_region_on_a_large_slide_is_its_own():
    whole = SimpleNamespace(slide_px=(80_000, 100_000), mpp=0.25)
    roi = Roi.parse("70011,50003,83,61", whole.slide_px)
    opened = OpenedSlide(None, None, whole, [roi], None, None)  # pyright: ignore[reportArgumentType]
    assert opened.searched_mm2 == pytest.approx(83 * 61 * 0.0625 / 1e6, rel=0.02)
    beyond = Roi.parse("99900,-50,200,100", whole.slide_px)             # a quarter of it is on the slide
    opened = OpenedSlide(None, None, whole, [beyond], None, None)  # pyright: ignore[reportArgumentType]
    assert opened.searched_mm2 == pytest.approx(100 * 50 * 0.0625 / 1e6, rel=0.02)


def test_a_cut_run_that_was_to_overwrite_goes_on_with_the_same_command(slide, out, model, monkeypatch, capsys):
    assert segment(slide, out, model, "--formats", "csv") == 0
    parts = cut(slide, out, model, monkeypatch, "--overwrite")
    assert names(out) == sorted(["slide.csv", "slide.parts", ".slide.begun", *ALWAYS])
    assert len(pd.read_csv(out / "summary.csv")) == 0           # what lies there counts no longer
    capsys.readouterr()
    assert segment(slide, out, model, "--formats", "csv", "--overwrite") == 0
    assert "2 of 6 regions were done before" in capsys.readouterr().out
    assert not parts.exists()


def test_a_region_of_interest_that_is_none_is_refused(tmp_path, slide, out, model, capsys):
    points = tmp_path / "points.geojson"
    points.write_text('{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}')
    (tmp_path / "text.geojson").write_text("here")
    for roi, told in (
        ("5000,0,10,10", "--roi 5000,0,10,10: lies off the slide, which has 768 x 640 pixels"),
        ("1,2,3,x", "--roi 1,2,3,x: is not x,y,width,height in level-0 pixels"),
        ("1,2,0,5", "--roi 1,2,0,5: width and height must be above 0"),
        ("nan,2,5,5", "--roi nan,2,5,5: width and height must be above 0"),
        ("1,2,3", "1,2,3: cannot be read (No such file or directory); check the name"),
        (tmp_path / "text.geojson", f"{tmp_path / 'text.geojson'}: is not GeoJSON of polygons"),
        (points, f"--roi {points}: holds no polygon; draw an area in QuPath"),
        (geojson(tmp_path / "off.geojson", [[-9, -9], [-5, -9], [-5, -5]]), "lies off the slide"),
    ):
        assert segment(slide, out, model, "--formats", "csv", "--roi", roi) == 2
        line = said(capsys)
        assert line.startswith("failed: ")
        assert told in line
    assert names(out) == ["slides.json"]
    drawn_by_hand = geojson(out / "slide.geojson", [[200, 150], [440, 150], [440, 410]])
    before = drawn_by_hand.read_bytes()
    assert segment(slide, out, model, "--formats", "geojson", "--roi", drawn_by_hand, "--overwrite") == 2
    assert f"--roi {drawn_by_hand}: is where a result would be written" in said(capsys)
    assert drawn_by_hand.read_bytes() == before
    image = tmp_path / "image.png"
    PIL.Image.fromarray(draw_tissue(0, (160, 200), 20)[0]).save(image)
    assert segment(image, out, model, "--roi", "0,0,9,9") == 2
    assert said(capsys) == f"failed: {image}: --roi is for slides; leave it out, or give --treat-as slide"


def test_a_region_with_thousands_of_corners_is_no_trouble():
    """As drawn by hand with a wand: its area on a raster of 2,000 rows took minutes once."""
    turn = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    wobble = 40_000 + 500 * np.sin(400 * turn)
    ring = np.stack([50_000 + wobble * np.cos(turn), 50_000 + wobble * np.sin(turn)], axis=1)
    roi = Roi([[ring]], (100_000, 100_000))
    start = time.process_time()
    x = np.arange(100, 100_000, 1000.0)
    rows = np.arange(25, 100_000, 1000.0)
    share = np.mean([roi.holds(np.full(len(x), row), x).mean() for row in rows])
    assert share == pytest.approx(np.pi * 0.4**2, rel=0.01)
    assert time.process_time() - start < 1


def test_glass_is_searched_only_where_the_mask_is_off(tmp_path, pixels, out, model, capsys):
    """Nuclei alone on glass make no tissue: the mask leaves them out."""
    glass = np.full((640, 768, 3), (243, 242, 244), np.uint8)
    glass += np.random.default_rng(0).integers(0, 2, glass.shape, np.uint8)
    lone = glass.copy()
    cv2.circle(lone, (384, 320), 6, (95, 60, 140), -1)
    file = write_tiff(tmp_path / "slide.ome.tif", lone, 2)
    assert segment(file, out, model, "--formats", "csv") == 0
    told = capsys.readouterr().out
    assert "0 nuclei in 0.00 mm2" in told
    assert "no tissue was found (--no-tissue-mask searches everything)" in told
    assert segment(file, out / "all", model, "--formats", "csv", "--no-tissue-mask") == 0
    found = pd.read_csv(out / "all" / "slide.ome.csv")
    assert len(found) == 1
    assert found.loc[0, ["centroid_x_px", "centroid_y_px"]].tolist() == pytest.approx([384, 320], abs=0.3)
    assert summary(out / "all", "slide.ome")["tissue_mm2"] == pytest.approx(640 * 768 * 0.25 / 1e6)


def test_a_slide_of_glass_gives_valid_empty_files_of_every_kind(tmp_path, out, model):
    glass = np.full((640, 768, 3), (243, 242, 244), np.uint8)
    file = write_tiff(tmp_path / "glass.ome.tif", glass, 2)
    formats = "parquet,csv,geojson,geojson.gz,labels,ome-zarr,ome-zarr-0.5,heatmap"
    assert segment(file, out, model, "--formats", formats) == 0
    zarr = pytest.importorskip("zarr")
    name = "glass.ome"
    assert summary(out, name)["nuclei"] == 0
    assert summary(out, name)["warnings"]
    assert (len(pd.read_parquet(out / f"{name}.parquet")), len(table(out, name))) == (0, 0)
    assert json.loads((out / f"{name}.geojson").read_text())["features"] == []
    labels = tifffile.imread(out / f"{name}.labels.ome.tif")
    assert (labels.shape, labels.max()) == ((640, 768), 0)
    for ending in (".ome.zarr", ".v0.5.ome.zarr"):
        array = zarr.open_group(out / f"{name}{ending}", mode="r")["labels/nuclei/0"]
        assert (array.shape, np.asarray(array[:]).max()) == ((640, 768), 0)
    assert images.read_image(out / f"{name}.heatmap.png").image_rgb.shape[2] == 3


# Damage


def test_a_corrupt_tile_stops_the_slide_but_its_parts_stay_and_it_can_be_left_out(
    tmp_path, pixels, drawn, out, model, capsys
):
    broken = write_tiff(tmp_path / "slide.ome.tif", pixels, 2, bad_px=(450, 600))
    image = tmp_path / "image.png"
    PIL.Image.fromarray(draw_tissue(0, (160, 200), 20)[0]).save(image)
    csv = ["--formats", "csv"]
    assert segment(broken, out, model, *csv) == 2
    line = said(capsys)
    assert line.startswith(f"failed: {broken}: cannot be read at x ")
    assert line.endswith("or leave such places out with --skip-bad-tiles")
    parts = out / "slide.ome.parts"
    kept = len(list(parts.glob("region_*.npz")))
    assert 1 <= kept < 6
    assert json.loads((out / "slides.json").read_text())[str(broken)]["state"] == "failed"
    assert segment([broken, image], out, model, *csv) == 1
    capsys.readouterr()
    assert segment(broken, out, model, *csv, "--skip-bad-tiles") == 0
    told = capsys.readouterr().out
    assert f"{kept} of 6 regions were done before" in told
    places = summary(out, "slide.ome")["not_read"]
    assert f"{len(places)} places could not be read and were left out" in told
    assert all(top < 512 and bottom > 448 and left < 640 and right > 576 for top, left, bottom, right in places)
    assert min(place[0] for place in places) <= 448
    assert max(place[3] for place in places) >= 640
    y, x = drawn[1].centroids_px().T
    lost = ((y > 384) & (y < 512) & (x > 512) & (x < 640)).sum()       # 128 x 128 px are left out, with the tile in it
    assert len(table(out, "slide.ome")) == pytest.approx(len(y) - lost, abs=4)
    assert not parts.exists()


def test_what_cannot_be_read_is_reported_even_where_a_region_has_no_nuclei(tmp_path, out, model):
    """A slide of one level, so that the thumbnail meets the damage too, and of glass, so that nothing is found."""
    glass = np.full((640, 768, 3), (243, 242, 244), np.uint8)
    file = write_tiff(tmp_path / "glass.ome.tif", glass, 1, bad_px=(20, 20))
    more = ["--formats", "csv", "--treat-as", "slide", "--no-tissue-mask"]
    assert segment(file, out, model, *more) == 2
    assert segment(file, out, model, *more, "--skip-bad-tiles") == 0
    assert summary(out, "glass.ome")["not_read"] == [[0, 0, 128, 128]]


def test_a_model_that_measures_exposure_can_leave_out_what_cannot_be_read(tmp_path, pixels, out, model):
    checkpoint.save(model, ByColor(), ModelSpec("by_color", exposure=True))
    file = write_tiff(tmp_path / "slide.ome.tif", pixels, 2, bad_px=(320, 384))
    assert segment(file, out, model, "--formats", "csv", "--skip-bad-tiles") == 0
    assert len(table(out, "slide.ome")) > 100
    assert summary(out, "slide.ome")["not_read"]


# What is a slide


FORMATS: dict[str, tuple[Callable[[Path, np.ndarray], object], bool]] = {
    "plain.png": (lambda path, pixels: PIL.Image.fromarray(pixels).save(path), False),
    "plain.jpg": (lambda path, pixels: PIL.Image.fromarray(pixels).save(path), False),
    "plain.bmp": (lambda path, pixels: PIL.Image.fromarray(pixels).save(path), False),
    "plain.tif": (lambda path, pixels: tifffile.imwrite(path, pixels, photometric="rgb"), False),
    "tiled.tif": (lambda path, pixels: tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64)), False),
    "one level.ome.tif": (lambda path, pixels: write_tiff(path, pixels, 1), False),
    "pyramid.ome.tif": (lambda path, pixels: write_tiff(path, pixels, 2), True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_slides_are_told_from_images_and_sizes_read_without_decoding(name, tmp_path):
    write, expected = FORMATS[name]
    path = tmp_path / name
    write(path, draw_tissue(0, (160, 200), 5)[0])
    assert is_slide(path) == expected
    assert declared_px(path) == 160 * 200
    path.write_bytes(path.read_bytes()[:-2000])
    assert declared_px(path) in (160 * 200, 0)
    assert is_slide(path) in (expected, False)
    for size in (0, 1, 3, 4, 8, 20, 60):
        path.write_bytes(path.read_bytes()[:60][:size])
        assert not is_slide(path)
        assert declared_px(path) == 0


def test_scanner_formats_are_slides_by_their_name_and_missing_files_are_none(tmp_path, slide):
    assert is_slide(slide)
    assert declared_px(slide) == SIZE[0] * SIZE[1]
    for suffix in (".ndpi", ".MRXS", ".scn", ".bif", ".vms", ".dcm"):
        (tmp_path / f"a{suffix}").write_bytes(b"anything")
        assert is_slide(tmp_path / f"a{suffix}")
    assert not is_slide(tmp_path / "missing.tif")
    assert not is_slide(tmp_path)
    assert declared_px(tmp_path) == declared_px(tmp_path / "missing.png") == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", 2], "--scheduler and --workers are for --engine dask; name it too, or leave them out"),
        (["--scheduler", "tcp://a:1"], "--scheduler and --workers are for --engine dask"),
        (["--engine", "dask", "--workers", 0], "--workers 0: how many to start here, 1 or more"),
        (["--engine", "dask", "--workers", 2, "--scheduler", "tcp://a:1"], "leave it out with --scheduler"),
    ],
)
def test_engine_options_that_do_not_fit_are_refused(arguments, told, slide, out, capsys):
    assert nuguide("segment", slide, "--out", out, *arguments) == 2
    assert told in said(capsys)
    assert not out.exists()
