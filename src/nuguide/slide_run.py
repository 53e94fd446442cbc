"""Slides to result files: planned, computed region by region, resumable, here or on a cluster."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from . import __version__, export
from .checkpoint import CONFIG, MODELS, WEIGHTS, model_folder
from .fanout import Job, Row, Watch, joined, with_ending
from .measure import COLUMNS, COLUMNS_WITH_FLIPS
from .predict import Predictor, load
from .quality import FINE_MPP, WINDOW_PX, WINDOWS
from .slides.grid import Grid
from .slides.layout import Layout, Region
from .slides.parts import SUFFIX, PartStore
from .slides.reader import open_slide
from .slides.roi import Roi
from .slides.slide import Slide
from .slides.summary import summarize
from .slides.tissue import Tissue, picture, slide_tissue
from .slides.writers import WRITERS, About
from .types import UserError
from .whole_slide import Area, SlideRegions, Stages, lay_out

PLAN, MANIFEST = "plan.json", "slides.json"
PARTS, TISSUE_PICTURE, SUMMARY = ".parts", ".tissue.png", ".summary.json"
DEFAULT_FORMATS = ("parquet", "geojson", "heatmap")
# what the facts of a plan are called where an unfinished run differs in them
CALLED = {
    "slide": "place of the slide",
    "bytes": "the slide itself",
    "modified_ns": "the slide itself",
    "code": "the version of nuguide",
    "model": "--model, --flips or --min-probability",
    "thresholds": "the model's config.json",
    "precision": "--precision",
    "layout": "--mpp",
    "searched": "--roi or --tissue-mask",
    "skip_bad": "--skip-bad-tiles",
}


@dataclass(frozen=True)
class SlideOptions:
    """How slides are segmented; every process that takes part gets the same.

    Attributes:
        model: name or folder. mpp: microns per pixel of level 0, whatever the slide says; None asks the slide.
        roi: "x,y,w,h" in level-0 pixels, or the path of a GeoJSON file with polygons.
        tissue: leave glass out. skip_bad: go on where a slide cannot be read.
        device, precision, batch, flips, min_probability: of the predictor.
        threads: of each worker; 0 leaves it to torch.
    """

    model: str = "default"
    mpp: float | None = None
    roi: str | None = None
    tissue: bool = True
    skip_bad: bool = False
    device: str = "auto"
    precision: str = "auto"
    batch: int = 1
    flips: bool = False
    min_probability: float = 0.0
    threads: int = 0

    def anywhere(self) -> SlideOptions:
        """The same with absolute paths, for processes that stand in other folders."""
        folder = model_folder(self.model)
        model = folder.name if folder.parent == MODELS else str(folder.resolve())
        roi = str(Path(self.roi).resolve()) if self.roi is not None and Path(self.roi).is_file() else self.roi
        return replace(self, model=model, roi=roi)

    def searched(self) -> dict[str, Any]:
        """What of a slide is searched, as JSON; a file of polygons by its name and the SHA-256 of its content."""
        roi = self.roi
        if roi is not None and Path(roi).is_file():
            try:
                code = hashlib.sha256(Path(roi).read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"--roi {roi}: cannot be read ({error.strerror}); check its permissions") from error
            roi = f"{Path(roi).name} ({code[:8]})"
        return {"roi": roi, "tissue_mask": self.tissue}


@dataclass(frozen=True)
class SlideTask:
    """One slide, and the folder for its parts; small, and the same for every process."""

    path: Path
    parts: Path
    options: SlideOptions

    def store(self, opened: OpenedSlide) -> PartStore:
        """Its parts."""
        return PartStore(self.parts, opened.layout, COLUMNS_WITH_FLIPS if self.options.flips else COLUMNS)


@dataclass
class OpenedSlide:
    """A slide made ready: how it is divided, and what of it is searched."""

    slide: Slide
    grid: Grid
    layout: Layout
    areas: list[Area]
    tissue: Tissue | None
    thumbnail_rgb: np.ndarray

    @property
    def searched_mm2(self) -> float:
        """Area that is searched for nuclei: of the tissue, or of the slide."""
        if self.tissue is not None and len(self.areas) == 1:
            return self.tissue.area_mm2
        # where areas meet: counted on a raster of 2,000 points a side at most, over what holds the ROI
        whole = 0.0, 0.0, *self.layout.slide_px
        top, left, bottom, right = next((area.box for area in self.areas if isinstance(area, Roi)), whole)
        height, width = bottom - top, right - left
        steps = min(2000, max(math.ceil(height), 1)), min(2000, max(math.ceil(width), 1))
        y = top + (np.arange(steps[0]) + 0.5) * height / steps[0]
        x = left + (np.arange(steps[1]) + 0.5) * width / steps[1]
        inside = 0
        for row in y:
            held = np.ones(len(x), bool)
            for area in self.areas:
                held &= area.holds(np.full(len(x), row), x)
            inside += int(held.sum())
        return inside / (steps[0] * steps[1]) * height * width * self.layout.mpp**2 / 1e6

    def regions(self, predictor: Predictor, skip_bad: bool) -> SlideRegions:
        """What computes its regions."""
        return SlideRegions(self.grid, self.layout, predictor, self.areas, skip_bad)


def open_task(path: Path, options: SlideOptions, predictor: Predictor) -> OpenedSlide:
    """A slide, its grids and areas; the same wherever it is opened.

    Raises:
        UserError: it cannot be opened, states no microns per pixel and none are given, or the ROI is not on it.
    """
    with contextlib.ExitStack() as opening:
        slide = opening.enter_context(open_slide(path))
        mpp = options.mpp or slide.mpp
        if mpp is None:
            raise UserError(
                f"{path}: states no microns per pixel; give them with --mpp (0.25 for most 40x scans, 0.5 for 20x)"
            )
        layout = lay_out(slide.size_px, mpp, predictor)
        grid = Grid(slide, mpp, predictor.spec.mpp)
        roi: list[Area] = [] if options.roi is None else [Roi.parse(options.roi, slide.size_px)]
        tissue, thumbnail = slide_tissue(slide, mpp, options.skip_bad)
        areas = [tissue, *roi] if options.tissue else roi
        opening.pop_all()                               # whoever asked for it closes it
        return OpenedSlide(slide, grid, layout, areas, tissue if options.tissue else None, thumbnail)


def predictor_for(options: SlideOptions) -> Predictor:
    """The predictor of this process, loaded once, and anew where the files of the model are others than before."""
    folder = model_folder(options.model)
    stamp = tuple((folder / name).stat().st_mtime_ns for name in (WEIGHTS, CONFIG))
    how = options.device, options.precision, options.batch, options.flips, options.min_probability
    return loaded(options.model, *how, stamp)


@lru_cache(maxsize=1)
def loaded(
    model: str, device: str, precision: str, batch: int, flips: bool, min_probability: float, stamp: tuple[int, ...]
) -> Predictor:
    """The last predictor asked for; `stamp` tells files of one name apart."""
    return load(model, device, precision, batch, flips=flips, min_probability=min_probability)


def compute_regions(task: SlideTask, numbers: Sequence[int]) -> tuple[list[int], Stages]:
    """Compute regions of a slide by number, but for those whose parts are there already; their counts of nuclei.

    This is what a worker of a cluster does. One that dies leaves the parts that it had finished.
    """
    if task.options.threads:
        torch.set_num_threads(task.options.threads)
    opened = opened_for(task.path, task.path.stat().st_mtime_ns, task.options)
    store = task.store(opened)
    work = opened.regions(predictor_for(task.options), task.options.skip_bad)
    wanted = [opened.layout.regions[number] for number in numbers]
    work.run([region for region in wanted if not store.has(region)], store, lambda region, count: None)
    return [store.count(region) for region in wanted], work.stages


@lru_cache(maxsize=2)
def opened_for(path: Path, modified_ns: int, options: SlideOptions) -> OpenedSlide:
    """The slides that this worker is at, opened once, and anew where the file is another than before.

    Two, for a run begins a slide while the one before is at its last regions.
    """
    return open_task(path, options, predictor_for(options))


class Engine(Protocol):
    """Where regions are computed."""

    def compute(
        self, task: SlideTask, opened: OpenedSlide, regions: Sequence[Region], done: Callable[[int], None]
    ) -> Stages:
        """Compute the regions of a slide and keep their parts; `done` is told of every number of regions finished."""
        ...


@dataclass
class Here(Engine):
    """This process, region after region."""

    def compute(
        self, task: SlideTask, opened: OpenedSlide, regions: Sequence[Region], done: Callable[[int], None]
    ) -> Stages:
        """Compute the regions in order."""
        work = opened.regions(predictor_for(task.options), task.options.skip_bad)
        work.run(regions, task.store(opened), lambda region, count: done(1))
        return work.stages


@dataclass
class SlideJob(Job):
    """A slide to its files: `NAME` plus the ending of each format, NAME.tissue.png and NAME.summary.json.

    While it is computed its parts lie in NAME.parts; a run that was cut goes on from them. They are deleted once the
    slide is in the summary of the run.

    Attributes:
        options: how. model: what to call it in the summary. formats: keys of `WRITERS`. engine: where.
        manifest: told of what becomes of each slide, or None.
    """

    options: SlideOptions
    model: str
    formats: Sequence[str] = DEFAULT_FORMATS
    engine: Engine = field(default_factory=Here)
    manifest: Manifest | None = None
    overwrite: bool = False

    @property
    def mpp(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As given."""
        return self.options.mpp

    @property
    def endings(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the formats, the picture of the tissue and the summary."""
        return [*(WRITERS[name].ending for name in self.formats), TISSUE_PICTURE, SUMMARY]

    def queue(self, file: Path) -> None:
        """Note the slide as pending, unless an earlier run has done it."""
        if self.manifest is not None and self.manifest.state(file) != "done":
            self.manifest.note(file, "pending")

    def do(self, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
        """Segment one slide and write its files."""
        roi = None if self.options.roi is None else Path(self.options.roi).resolve()
        if roi in {with_ending(stem, ending).resolve() for ending in self.endings}:
            raise UserError(f"--roi {self.options.roi}: is where a result would be written; choose another --out")
        tell = self.manifest or Manifest(None)
        try:
            for name in self.formats:
                WRITERS[name].check()                   # now, and not when all else is done
            tell.note(file, "running")
            row, line = self._do(file, stem, watch, tell)
        except (UserError, MemoryError) as error:
            with contextlib.suppress(UserError):        # what failed first is to be told, even if the disk is full
                tell.note(file, "failed", error=str(error))
            raise
        tell.note(file, "done", nuclei=row.nuclei)
        return row, line

    def differs(self, stem: Path) -> str | None:
        """Whether something else of the slide was searched; what was is not known without its summary."""
        if not with_ending(stem, SUMMARY).exists():
            return None
        try:
            before = json.loads(with_ending(stem, SUMMARY).read_text())["searched"]
            before = dict(before)
        except (OSError, ValueError, LookupError, TypeError):
            return "in a way that their summary does not tell"
        if before == self.options.searched():
            return None
        roi, mask = before.get("roi"), before.get("tissue_mask")
        return f"with {f'--roi {roi}' if roi else 'no --roi'} and {'the tissue mask' if mask else '--no-tissue-mask'}"

    def skip(self, file: Path, row: Row) -> None:
        """Note the slide as done."""
        if self.manifest is not None and self.manifest.state(file) != "done":
            self.manifest.note(file, "done", nuclei=row.nuclei)

    def tidy(self, stem: Path) -> None:
        """Delete the parts."""
        with contextlib.suppress(OSError):
            clear(with_ending(stem, PARTS))

    def _do(self, file: Path, stem: Path, watch: Watch, tell: Manifest) -> tuple[Row, str]:
        start = time.perf_counter()
        task = SlideTask(file.resolve(), with_ending(stem.resolve(), PARTS), self.options)
        with_predictor = predictor_for(self.options)
        opened = open_task(task.path, self.options, with_predictor)
        with opened.slide:
            work = opened.regions(with_predictor, self.options.skip_bad)
            begin(task, opened, self.model, self.overwrite)
            store = task.store(opened)
            todo = [region for region in work.wanted if not store.has(region)]
            total, finished = len(work.wanted), len(work.wanted) - len(todo)
            again = f"; {finished} of {total} regions were done before" if finished else ""

            def step(count: int) -> None:
                nonlocal finished
                finished += count
                watch.tiles(finished, total)
                tell.note(file, "running", regions_done=finished, regions=total)

            step(0)
            stages = self.engine.compute(task, opened, todo, step)
            windows = windows_of(opened)
        if missing := [region.name for region in work.wanted if not store.has(region)]:
            raise UserError(
                f"{task.parts}: {len(missing)} parts are not there though workers wrote them ({missing[0]}); "
                "give an --out that all of them see under the same name"
            )
        about = About(stem.name, self.model, opened.slide.bounds_px, opened.thumbnail_rgb)
        shown = opened.thumbnail_rgb if opened.tissue is None else picture(opened.thumbnail_rgb, opened.tissue.mask)
        export.write_picture(with_ending(stem, TISSUE_PICTURE), shown)
        begun = time.perf_counter()
        for name in self.formats:
            writer = WRITERS[name]
            writer.write(store, with_ending(stem, writer.ending), about)
        stages.add("write", begun)
        facts = summarize(store, about, opened.searched_mm2, time.perf_counter() - start, windows)
        facts |= {"source": str(task.path), "resolution": opened.grid.describe(), "notes": list(opened.slide.notes)}
        facts["searched"] = self.options.searched()
        bad = [box for region in work.wanted for box in store.read(region, labels=False).facts.get("bad", [])]
        facts["not_read"] = sorted(set(map(tuple, bad)))
        facts["stage_seconds"] = {name: round(seconds, 2) for name, seconds in asdict(stages).items()}
        with export.replacing(with_ending(stem, SUMMARY)) as summary:
            summary.write((json.dumps(facts, indent=1) + "\n").encode())
        return self._row(stem.name, task, opened, facts), told(file, facts, opened, again)

    def _row(self, name: str, task: SlideTask, opened: OpenedSlide, facts: dict[str, Any]) -> Row:
        return Row(
            name=name,
            nuclei=facts["nuclei"],
            nuclei_per_mm2=round(facts["nuclei_per_mm2"] or 0.0, 1),
            mean_area_um2=round(facts["area_um2_mean"] or 0.0, 2),
            mean_probability=round(facts["probability_mean"] or 0.0, 4),
            seconds=round(facts["seconds"], 2),
            mpp=opened.layout.mpp,
            source=str(task.path),
            model=self.model,
            warnings=joined(facts["warnings"]),
        )


def windows_of(opened: OpenedSlide) -> list[np.ndarray]:
    """Windows (h, w, 3) uint8 of a slide's tissue at `FINE_MPP`, or its own resolution where it has no more.

    What cannot be read is left out: it has been told of where nuclei were looked for.
    """
    mpp = opened.layout.mpp
    grid = Grid(opened.slide, mpp, max(mpp, FINE_MPP))
    mask = np.ones((16, 16), bool) if opened.tissue is None else opened.tissue.mask
    cells = np.argwhere(mask)
    some = cells[((np.arange(WINDOWS) + 0.5) * len(cells) / WINDOWS).astype(int)] if len(cells) else cells
    windows = []
    for middle in np.unique((some + 0.5) / mask.shape * grid.shape, axis=0):
        top, left = (max(0, int(at) - WINDOW_PX // 2) for at in middle)
        with contextlib.suppress(UserError):
            windows.append(grid.read(top, left, *np.minimum((top + WINDOW_PX, left + WINDOW_PX), grid.shape).tolist()))
    return windows


def told(file: Path, facts: dict[str, Any], opened: OpenedSlide, again: str) -> str:
    """The line about a finished slide for people."""
    line = f"{file.name}: {facts['nuclei']} nuclei in {facts['tissue_mm2']:.2f} mm2, {facts['seconds']:.1f} s"
    line += f"; {opened.layout.mpp:.4g} microns per pixel, {opened.grid.describe()}{again}"
    for note in opened.slide.notes:
        line += f"; {note}"
    if facts["not_read"]:
        line += f"; {len(facts['not_read'])} places could not be read and were left out"
    if not facts["nuclei"] and opened.tissue is not None and not opened.tissue.mask.any():
        line += "; no tissue was found (--no-tissue-mask searches everything)"
    return line


def begin(task: SlideTask, opened: OpenedSlide, model: str, overwrite: bool) -> None:
    """Make the folder of a slide's parts, or find it as an earlier run left it.

    Raises:
        UserError: the folder holds parts that were made in another way, or cannot be made.
    """
    plan = task.parts / PLAN
    facts = {
        "slide": str(task.path),
        "bytes": task.path.stat().st_size,
        "modified_ns": task.path.stat().st_mtime_ns,
        "code": __version__,
        "model": model,
        "thresholds": hashlib.sha256((model_folder(task.options.model) / CONFIG).read_bytes()).hexdigest()[:8],
        "precision": task.options.precision,
        "layout": opened.layout.to_dict(),
        "searched": task.options.searched(),
        "skip_bad": task.options.skip_bad,
    }
    facts = json.loads(json.dumps(facts))
    try:
        before = json.loads(plan.read_text()) if plan.is_file() else None
        if not isinstance(before, dict | None):
            raise ValueError("it is no plan")
    except ValueError as error:
        if not overwrite:
            raise UserError(f"{plan}: is damaged; delete {task.parts} and start again") from error
        before = {}
    except OSError as error:
        raise UserError(f"{plan}: cannot be read ({error.strerror})") from error
    differ = [name for name in facts if before is not None and facts[name] != before.get(name)]
    if overwrite and differ:                            # else they are parts of this very run, which was cut
        try:
            clear(task.parts)
        except OSError as error:
            raise UserError(f"{error.filename or plan}: cannot be replaced ({error.strerror})") from error
        before = None
    # what was read without leaving anything out is as good where something may be left out
    if before is None or (differ == ["skip_bad"] and task.options.skip_bad):
        try:
            task.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{task.parts}: cannot be made ({error.strerror}); choose another --out") from error
        with export.replacing(plan) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
    elif differ:
        raise UserError(
            f"{task.parts}: holds an unfinished run that differs in "
            f"{', '.join(dict.fromkeys(CALLED[name] for name in differ))}; "
            "give the same options, choose another --out, or --overwrite it"
        )


def clear(parts: Path) -> None:
    """Delete the parts of a slide and their folder, but nothing else in it; OSError where that fails.

    The plan goes last: as long as there are parts it says how they were made.
    """
    if not parts.is_dir():
        return
    for path in (*parts.glob(f"region_*{SUFFIX}"), *parts.glob(".*.part"), parts / PLAN):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):                  # what is not ours stays
        parts.rmdir()


class Manifest:
    """What became of each slide, as JSON by its path: pending, running, done or failed, with counts and errors.

    Args:
        path: of the file, rewritten at most once a second but for changes of state; what earlier runs left in it
            stays. None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.states: dict[str, dict[str, Any]] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):       # there is none, or none of ours
                self.states = dict(json.loads(path.read_text()))
        self._turn, self._written = threading.Lock(), 0.0

    def state(self, file: Path) -> str | None:
        """One slide's state; None where nothing is known of it."""
        return self.states.get(str(file.resolve()), {}).get("state")

    def note(self, file: Path, state: str, **facts: Any) -> None:
        """One slide's state, and more about it."""
        source = str(file.resolve())
        with self._turn:
            before = self.states.get(source, {})
            changed = before.get("state") != state
            self.states[source] = {"state": state, **facts} if changed else {**before, **facts}
            if self.path is None or (not changed and time.monotonic() - self._written < 1):
                return
            self._written = time.monotonic()
            with export.replacing(self.path) as out:
                out.write((json.dumps(self.states, indent=1) + "\n").encode())
