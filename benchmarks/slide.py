"""Whole slides: seconds per mm2, shares of the stages, memory against size, seams, a naive loop, and a cluster.

    python benchmarks/slide.py growth [--sizes 8192x6144 16384x12288] [--network default|color]
    python benchmarks/slide.py naive [--size 8192x6144] [--network default|color]
    python benchmarks/slide.py cluster [--size 16384x12288]
    python benchmarks/slide.py seams
    python benchmarks/slide.py all                       # all of these, on slides that take minutes
    python benchmarks/slide.py plot LINES.jsonl PICTURE.png

Each prints JSON lines. Slides are drawn (drawn_slide.py): sizes are width x height in pixels at 0.25 microns per pixel.
Every measured run is a process of its own, whose peak memory the operating system tells.

* growth: `nuguide segment` on slides of growing size. The network "color" tells nuclei by their color instead of by
  learned weights: with it a slide of 100000x80000 pixels and a million nuclei takes minutes, and everything but the
  network is what it always is.
* naive: the same slide by a loop as one writes it first: read a tile, run the network (plain eager fp32), label,
  append; polygons in a list, labels in an array of the size of the slide. With the network "color" it shows the memory
  that it takes on a large slide; times are compared with the default network.
* cluster: the same slide by one and by two Dask workers of one thread each.
* seams: a picture in regions against the same picture in one piece.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drawn_slide import write_slide
from nuguide import checkpoint
from nuguide.checkpoint import ModelSpec
from nuguide.predict import TILE_PX, Predictor

HERE = Path(__file__).resolve()
MPP = 0.25
NAIVE_TILE_PX = 1024
COLOR = ModelSpec("color", separation={"min_area_um2": 8.0})


class ColorNetwork(nn.Module):
    """Tells nuclei by color: logits (162 - red) / 30 of a 3 x 3 mean, and of the least within 3 pixels for interior."""

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 2, H, W) of images (B, 3, H, W), RGB 0..255."""
        nucleus = F.avg_pool2d((162 - image[:, :1]) / 30, 3, stride=1, padding=1)
        return torch.cat([nucleus, -F.max_pool2d(-nucleus, 7, stride=1, padding=3)], dim=1)


def facts(name: str) -> dict[str, Any]:
    """What every line says."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent)
    return {
        "benchmark": f"slide {name}", "torch": torch.__version__, "machine": platform.machine(),
        "cores": os.cpu_count(), "commit": commit.stdout.strip(),
    }


def measured(*arguments: object) -> dict[str, Any]:
    """What this script prints when it is run as a child with these arguments."""
    done = subprocess.run(
        [sys.executable, str(HERE), *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> int:
    """Peak memory of this process and of those that it waited for, in megabytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) // 1024


def draw(folder: Path, size: str) -> tuple[Path, dict[str, Any]]:
    """A drawn slide of "width x height", and its truth."""
    width, height = (int(side) for side in size.split("x"))
    path = folder / f"{size}.svs"
    truth = write_slide(path, (height, width), MPP, block_px=1024)
    return path, {"slide_px": [height, width], "nuclei_drawn": truth.nuclei, "tissue_mm2": round(truth.tissue_mm2, 3)}


def growth(sizes: Sequence[str], network: str) -> Iterator[dict[str, Any]]:
    """Ours on slides of each size."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path, truth = draw(Path(folder), size)
            found = measured("child", "ours", path, Path(folder) / "out", "--network", network)
            seconds = found["seconds"]
            yield {
                **facts("growth"), "network": network, **truth, **found,
                "seconds_per_mm2": round(seconds / truth["tissue_mm2"], 2),
            }


def naive(size: str, network: str) -> Iterator[dict[str, Any]]:
    """Ours and the loop on one slide."""
    with tempfile.TemporaryDirectory() as folder:
        path, truth = draw(Path(folder), size)
        ours = measured("child", "ours", path, Path(folder) / "out", "--network", network)
        loop = measured("child", "naive", path, Path(folder) / "naive", "--network", network)
        yield {
            **facts("naive"), "network": network, **truth, "ours": ours, "naive": loop,
            "times_faster": round(loop["seconds"] / ours["seconds"], 2),
            "memory_share": round(ours["peak_mb"] / loop["peak_mb"], 2),
        }


def cluster(size: str) -> Iterator[dict[str, Any]]:
    """One worker against two."""
    with tempfile.TemporaryDirectory() as folder:
        path, truth = draw(Path(folder), size)
        runs = {
            workers: measured("child", "cluster", path, Path(folder) / f"out{workers}", "--workers", workers)
            for workers in (1, 2)
        }
        yield {
            **facts("cluster"), **truth, "one": runs[1], "two": runs[2],
            "times_faster": round(runs[1]["seconds"] / runs[2]["seconds"], 2),
            "same_nuclei": runs[1]["nuclei"] == runs[2]["nuclei"],
        }


def child_ours(path: Path, out: Path, network: str) -> dict[str, Any]:
    """`nuguide segment` of a slide in this process."""
    from nuguide import cli, slide_run

    if network == "color":
        predictor = Predictor(ColorNetwork(), None, COLOR, precision="fp32")
        slide_run.predictor_for = lambda options: predictor  # pyright: ignore[reportAttributeAccessIssue]
    start = time.perf_counter()
    run_cli(cli, path, out, "--formats", "parquet,geojson.gz,heatmap")
    return report(out, path, time.perf_counter() - start)


def child_cluster(path: Path, out: Path, workers: int) -> dict[str, Any]:
    """The same by a cluster of this machine, each worker with one thread."""
    from nuguide import cli, cluster

    cluster.threads_of = lambda scheduler, workers: 1  # pyright: ignore[reportAttributeAccessIssue]
    start = time.perf_counter()
    run_cli(cli, path, out, "--formats", "parquet", "--engine", "dask", "--workers", str(workers))
    return report(out, path, time.perf_counter() - start)


def run_cli(cli: Any, path: Path, out: Path, *more: str) -> None:
    """A command, its words kept off the standard output."""
    sys.stdout, kept = sys.stderr, sys.stdout
    try:
        cli.main(["segment", str(path), "--out", str(out), *more])
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout = kept


def report(out: Path, path: Path, seconds: float) -> dict[str, Any]:
    """What a run took."""
    summary = json.loads((out / f"{path.stem}.summary.json").read_text())
    stages = summary["stage_seconds"]
    total = sum(stages.values())
    return {
        "nuclei": summary["nuclei"], "seconds": round(seconds, 1), "stage_seconds": stages,
        "share": {name: round(spent / total, 3) for name, spent in stages.items()}, "peak_mb": peak_mb(),
    }


def child_naive(path: Path, out: Path, network: str) -> dict[str, Any]:
    """The loop as one writes it first."""
    import openslide
    import pandas as pd
    from scipy import ndimage
    from skimage.measure import label, regionprops
    from skimage.segmentation import watershed

    start = time.perf_counter()
    model, guide, spec = (ColorNetwork(), None, COLOR) if network == "color" else checkpoint.load("default")
    model.eval()
    slide = openslide.OpenSlide(str(path))
    width, height = slide.dimensions
    labels = np.zeros((height, width), np.uint32)
    rows: list[dict[str, Any]] = []
    polygons: list[np.ndarray] = []
    for top in range(0, height, NAIVE_TILE_PX):
        for left in range(0, width, NAIVE_TILE_PX):
            tile = np.asarray(slide.read_region((left, top), 0, (NAIVE_TILE_PX, NAIVE_TILE_PX)).convert("RGB"))
            small = cv2.resize(tile, None, fx=MPP / spec.mpp, fy=MPP / spec.mpp, interpolation=cv2.INTER_AREA)
            with torch.inference_mode():
                image = torch.from_numpy(small).permute(2, 0, 1)[None].float()
                logits = model(image) if guide is None else model(image, guide(image))
            nucleus, interior = logits.sigmoid()[0].numpy()
            mask = nucleus > 0.5
            seeds = label(mask if network == "color" else mask & (interior > spec.separation["interior"]))
            depth = np.asarray(ndimage.distance_transform_edt(mask))
            small_labels = watershed(-depth, seeds, mask=mask)
            here = cv2.resize(small_labels.astype(np.uint16), (NAIVE_TILE_PX,) * 2, interpolation=cv2.INTER_NEAREST)
            here = np.asarray(here)[: height - top, : width - left].astype(np.uint32)
            for one in regionprops(here):
                y, x = one.centroid
                rows.append({"x": left + x, "y": top + y, "area_um2": one.area * MPP**2, "solidity": one.solidity})
                outline = cv2.findContours(one.image.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
                polygons.append(outline[0][:, 0] + [left + one.bbox[1], top + one.bbox[0]])
            first = len(rows) - len(np.unique(here)) + 1
            labels[top : top + NAIVE_TILE_PX, left : left + NAIVE_TILE_PX] = np.where(here, here + first, 0)
    out.mkdir()
    pd.DataFrame(rows).to_csv(out / "table.csv", index=False)
    shapes = [{"type": "Polygon", "coordinates": [ring.tolist()]} for ring in polygons]
    features = [{"type": "Feature", "geometry": shape} for shape in shapes]
    (out / "nuclei.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return {"nuclei": len(rows), "seconds": round(time.perf_counter() - start, 1), "peak_mb": peak_mb()}


def seams() -> Iterator[dict[str, Any]]:
    """A real picture, mirrored to four times its area, in regions of one stride against in one piece."""
    from nuguide.images import read_image
    from nuguide.metrics import panoptic_quality
    from nuguide.slides.layout import Layout
    from nuguide.slides.parts import PartStore
    from nuguide.tiling import middles
    from nuguide.whole_slide import SlideRegions, lay_out
    from seams import BAND_PX, fates
    from speed import large_image

    predictor = Predictor(*checkpoint.load("default"), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        image = predictor.prepared(read_image(large_image(Path(folder) / "image.png")).image_rgb, MPP)
        image = np.concatenate([image, image[::-1]])
        image = np.concatenate([image, image[:, ::-1]], axis=1)
        predictor.tile_px = max(image.shape[:2]) + 128
        whole = predictor.label(*predictor.probabilities(image))
        predictor.tile_px = TILE_PX
        layout = lay_out(image.shape[:2], predictor.spec.mpp, predictor)
        layout = Layout(**{**layout.to_dict(), "region_tiles": 1})

        class Held:
            """The picture."""

            def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
                """A window of it."""
                return image[top:bottom, left:right]

        store = PartStore(Path(folder), layout)
        work = SlideRegions(Held(), layout, predictor)
        work.run(work.wanted, store, lambda region, count: None)
        labels = np.zeros(image.shape[:2], np.int32)
        for _, first, part in store.all():
            window = labels[part.top : part.top + len(part.labels), part.left : part.left + part.labels.shape[1]]
            np.copyto(window, part.labels + first, where=(part.labels > 0) & (window == 0))
    near = np.zeros(image.shape[:2], bool)
    for region in layout.regions:
        if region.window.core_top:
            near[region.window.core_top - BAND_PX : region.window.core_top + BAND_PX] = True
        if region.window.core_left:
            near[:, region.window.core_left - BAND_PX : region.window.core_left + BAND_PX] = True
    _, y, x = middles(whole)
    in_band = near[y, x]
    quality = panoptic_quality(whole, labels)
    rates = {
        name: {"seam": round(float(fate[in_band].mean()), 4), "elsewhere": round(float(fate[~in_band].mean()), 4)}
        for name, fate in fates(whole, labels).items()
    }
    yield {
        **facts("seams"), "image_px": image.shape[:2], "regions": len(layout.regions), "pq": round(quality.pq, 4),
        "nuclei": int(whole.max()), "nuclei_in_bands": int(in_band.sum()), **rates, "precision": predictor.precision,
    }


def everything() -> Iterator[dict[str, Any]]:
    """Every part, one after another."""
    yield from growth(["8192x6144", "12288x10240"], "default")
    yield from growth(["8192x6144", "16384x12288", "24576x18432"], "color")
    yield from naive("12288x10240", "default")
    yield from cluster("12288x10240")
    yield from seams()


def plot(lines: Path, picture: Path) -> None:
    """Memory and time against the area of tissue."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = [row for row in rows if row["benchmark"] == "slide growth"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    memory, clock = figure.subplots(1, 2)
    for network in sorted({row["network"] for row in rows}):
        some = sorted((row for row in rows if row["network"] == network), key=lambda row: row["tissue_mm2"])
        area = [row["tissue_mm2"] for row in some]
        memory.plot(area, [row["peak_mb"] / 1000 for row in some], "o-", label=f"network: {network}")
        clock.plot(area, [row["seconds"] for row in some], "o-", label=f"network: {network}")
    for axes, what in ((memory, "peak memory, GB"), (clock, "seconds")):
        axes.set(xlabel="tissue, mm2", ylabel=what, ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("growth")
    one.add_argument("--sizes", nargs="+", default=["8192x6144", "16384x12288"])
    one.add_argument("--network", choices=["default", "color"], default="default")
    for name, size in (("naive", "8192x6144"), ("cluster", "16384x12288")):
        one = commands.add_parser(name)
        one.add_argument("--size", default=size)
        if name == "naive":
            one.add_argument("--network", choices=["default", "color"], default="default")
    commands.add_parser("seams")
    commands.add_parser("all")
    one = commands.add_parser("plot")
    one.add_argument("lines", type=Path)
    one.add_argument("picture", type=Path)
    one = commands.add_parser("child")
    one.add_argument("what", choices=["ours", "naive", "cluster"])
    one.add_argument("slide", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--network", default="default")
    one.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    if options.command == "plot":
        plot(options.lines, options.picture)
    elif options.command == "child":
        run = {
            "ours": lambda: child_ours(options.slide, options.out, options.network),
            "naive": lambda: child_naive(options.slide, options.out, options.network),
            "cluster": lambda: child_cluster(options.slide, options.out, options.workers),
        }
        print(json.dumps(run[options.what]()))
    else:
        lines = {
            "growth": lambda: growth(options.sizes, options.network),
            "naive": lambda: naive(options.size, options.network),
            "cluster": lambda: cluster(options.size),
            "seams": seams,
            "all": everything,
        }[options.command]()
        for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
