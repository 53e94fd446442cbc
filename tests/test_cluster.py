"""Regions of a slide on real Dask workers: the same files as here, whatever dies, and troubles told in one line."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import PLAIN, nuguide
from drawn_slide import draw_block, write_slide
from nuguide import checkpoint, cluster
from nuguide.checkpoint import ModelSpec
from nuguide.cluster import MOST_REGIONS, OnCluster, divided, local_workers, result_of, threads_of
from nuguide.fanout import Silence
from nuguide.slide_run import Engine, Here, SlideJob, SlideOptions, SlideTask
from nuguide.slides.layout import Layout
from nuguide.types import UserError

distributed = pytest.importorskip("distributed")
dask_config = pytest.importorskip("dask.config")

pytestmark = [
    # a worker's sockets and event loop are let go of when the interpreter gets to it
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZE = (2816, 4864)         # 2 x 3 regions of the default tiles, whose cores end at these places
CUT_Y, CUTS_X = 2400, (2400, 4416)
FORMATS = ("parquet", "csv", "geojson")


def trained(folder: Path) -> Path:
    """A model folder: a small U-Net with random weights, but its last layer fitted to drawn tissue."""
    torch.manual_seed(0)
    spec = ModelSpec("unet", {"width": 2})
    network = checkpoint.build(spec).eval()
    block = draw_block(128, 0.5, np.random.default_rng(0))
    seen: list[torch.Tensor] = []
    head = network.get_submodule("head")
    assert isinstance(head, torch.nn.Conv2d)
    head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        network(torch.from_numpy(block.image_rgb).permute(2, 0, 1)[None].float())
        features = torch.cat([seen[0][0], torch.ones(1, 128, 128)]).flatten(1).T
        wanted = torch.from_numpy((block.labels > 0) * 8.0 - 4.0).float().reshape(-1, 1)
        weights = torch.linalg.lstsq(features, wanted).solution[:, 0]
        score, nucleus = features @ weights, wanted[:, 0] > 0
        middle = (score[nucleus].mean() + score[~nucleus].mean()) / 2
        head.weight.copy_(4 * weights[:-1].reshape(1, -1, 1, 1).expand_as(head.weight))
        assert head.bias is not None
        head.bias.fill_(4 * (weights[-1] - middle))
    return checkpoint.save(folder, network, spec)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A slide, a model, and how many nuclei there are in the squares of `roi`."""
    folder = tmp_path_factory.mktemp("drawn")
    truth = write_slide(folder / "slide.svs", SIZE, 0.5, block_px=256)
    y, x = truth.centroids_px().T
    inside = [(abs(y - CUT_Y) < 150) & (abs(x - cut) < 150) for cut in CUTS_X]
    rings = [[[cut - 150, CUT_Y - 150], [cut + 150, CUT_Y - 150], [cut + 150, CUT_Y + 150], [cut - 150, CUT_Y + 150]]
             for cut in CUTS_X]
    polygons = {"type": "MultiPolygon", "coordinates": [[[*ring, ring[0]]] for ring in rings]}
    (folder / "roi.geojson").write_text(json.dumps({"type": "Feature", "geometry": polygons, "properties": {}}))
    return folder / "slide.svs", trained(folder / "model"), int(np.sum(inside))


def roi(slide: Path) -> str:
    """Squares where regions meet: all have something to do, and none has much."""
    return str(slide.with_name("roi.geojson"))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes that stand in another folder than this one."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0",
            silence_logs=50, memory_limit=0,
        ) as workers,
        distributed.Client(workers, set_as_default=False) as client,
    ):
        client.run(os.chdir, "/")
        yield client


def job(slide: Path, model: Path, engine: Engine) -> SlideJob:
    given = SlideOptions(str(model), roi=roi(slide), device="cpu", precision="fp32", threads=1)
    return SlideJob(given.anywhere(), "fitted", FORMATS, engine)


def files(stem: Path) -> dict[str, bytes]:
    return {ending: stem.with_name(stem.name + ending).read_bytes() for ending in (".parquet", ".csv", ".geojson")}


@pytest.fixture(scope="module")
def here(drawn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that this process makes of the slide."""
    slide, model, nuclei = drawn
    out = tmp_path_factory.mktemp("here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        row, _ = job(slide, model, Here()).do(slide, out / "slide", Silence())
    finally:
        torch.set_num_threads(threads)
    assert nuclei > 60
    assert 0.5 * nuclei < row.nuclei < 2 * nuclei, "the network finds something"
    return files(out / "slide")


def test_workers_give_the_files_that_this_process_gives(drawn, here, client, tmp_path, monkeypatch):
    """With paths that are relative to a folder in which the workers are not."""
    slide, model, _ = drawn
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    Path("slide.svs").symlink_to(slide)
    heard: list[tuple[int, int]] = []

    class Heard(Silence):
        def tiles(self, done: int, total: int) -> None:
            heard.append((done, total))

    Path("roi.geojson").symlink_to(roi(slide))
    job(Path("slide.svs"), Path("model"), OnCluster(client)).do(Path("slide.svs"), Path("slide"), Heard())
    assert heard[0] == (0, 6)
    assert heard[-1] == (6, 6)
    assert files(Path("slide")) == here
    facts = json.loads(Path("slide.summary.json").read_text())
    assert min(facts["stage_seconds"].values()) > 0


def test_a_worker_that_is_killed_costs_its_region_and_nothing_else(drawn, here, client, tmp_path):
    slide, model, _ = drawn
    parts = tmp_path / "slide.parts"
    processes = client.run(os.getpid)
    killed: list[dict[str, int]] = []

    def kill_one() -> None:
        patience = time.monotonic() + 100
        while not list(parts.glob("region_*.npz")) and time.monotonic() < patience:
            time.sleep(0.005)
        killed.append({path.name: path.stat().st_mtime_ns for path in parts.glob("region_*.npz")})
        os.kill(next(iter(processes.values())), signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    job(slide, model, OnCluster(client)).do(slide, tmp_path / "slide", Silence())
    thread.join()
    assert files(tmp_path / "slide") == here
    after = {path.name: path.stat().st_mtime_ns for path in parts.glob("region_*.npz")}
    assert len(after) == 6
    assert 0 < len(killed[0]) < 6, "it was at work"
    assert {name: after[name] for name in killed[0]} == killed[0], "none was done again"
    client.wait_for_workers(2, timeout=60)


def test_what_a_worker_cannot_read_is_told_in_one_line(drawn, client, tmp_path, capsys):
    """A slide whose last tile of tissue is no JPEG; this process reads its thumbnail only."""
    import tifffile

    slide, model, _ = drawn
    broken = tmp_path / "broken.svs"
    broken.write_bytes(slide.read_bytes())
    with tifffile.TiffFile(broken) as tiff:
        page = tiff.pages.first
        across = -(-page.imagewidth // 256)
        number = 8 * across + across - 2                # in the last region; its content stands elsewhere too
        offset, count = page.dataoffsets[number], page.databytecounts[number]
    with broken.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    address = client.scheduler.address
    out = tmp_path / "out"
    options = [*PLAIN, "--engine", "dask", "--scheduler", address, "--roi", roi(slide)]
    assert nuguide("segment", broken, "--out", out, "--model", model, "--formats", "csv", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"failed: {broken}: cannot be read at x ")
    assert not any("Traceback" in line for line in lines)
    assert (out / "broken.parts" / "plan.json").is_file()


def test_where_nothing_answers_or_dask_is_missing_one_line_says_so(drawn, tmp_path, monkeypatch, capsys):
    slide, model, _ = drawn
    command = ["segment", slide, "--out", tmp_path / "out", "--model", model, "--engine", "dask"]
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "127.0.0.1:9", "tcp://127.0.0.1", "nonsense://127.0.0.1:9"):
        assert nuguide(*command, "--scheduler", address) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"nuguide: --scheduler {address}: nothing answers there; start it with: dask scheduler"
        # else all that this process computes with Dask from now on would ask a cluster that there is not
        assert dask_config.get("scheduler", None) is None
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert nuguide(*command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "nuguide: --engine dask needs distributed; install it with: pip install 'nuguide[cluster]'"
    assert not (tmp_path / "out").exists()


def test_a_scheduler_without_workers_is_told(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 0.2)
    with distributed.LocalCluster(
        n_workers=0, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
    ) as empty:
        address = empty.scheduler_address
        command = ["segment", drawn[0], "--out", tmp_path / "out", "--model", drawn[1], "--engine", "dask"]
        assert nuguide(*command, "--scheduler", address) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"nuguide: --scheduler {address}: has no workers; start some with: dask worker {address}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CancelledError(), "the connection to the workers was lost"),
        (FileNotFoundError(2, "No such file", "/a.svs"), "a worker failed ([Errno 2] No such file: '/a.svs')"),
        (ModuleNotFoundError("No module named 'nuguide'"), "a worker failed (No module named 'nuguide')"),
        (distributed.KilledWorker("region", None, 3), "workers died over one of its tasks"),
    ],
)
def test_however_a_task_fails_the_line_names_the_slide(error, told):
    def fail() -> None:
        raise error

    task = SlideTask(Path("a.svs"), Path("a.parts"), SlideOptions())
    with pytest.raises(UserError, match=r"^a.svs: .*; the same command goes on|then the same command goes on") as stop:
        result_of(SimpleNamespace(result=fail), task)
    assert told in str(stop.value)


@pytest.mark.parametrize("workers", [1, 3, 100])
@pytest.mark.parametrize("step", [1, 3])
def test_regions_are_divided_in_order_each_once_into_neighbors(workers, step):
    layout = Layout((20_000, 40_000), 0.5, (20_000, 40_000), 0.5, 1, 576, 128)
    regions = [region for region in layout.regions if region.number % 7 != 3][::step]
    chunks = divided(regions, workers)
    assert [region for chunk in chunks for region in chunk] == regions
    assert all(0 < len(chunk) <= MOST_REGIONS for chunk in chunks)
    for chunk in chunks:
        assert [one.number for one in chunk] == list(range(chunk[0].number, chunk[0].number + len(chunk)))
        assert len({one.row for one in chunk}) == 1
    assert len(chunks) >= min(4 * workers, len(regions))
    assert divided([], workers) == []


def test_cores_are_shared_by_the_workers_started_here(monkeypatch):
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 8)
    assert (local_workers(None), local_workers(3)) == (4, 3)
    assert (threads_of(None, None), threads_of(None, 3), threads_of(None, 20)) == (2, 2, 1)
    assert threads_of("tcp://a:1", None) == 0
