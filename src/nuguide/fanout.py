"""Many files to result files: names that never collide, finished files skipped, bad ones reported at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from . import export
from .images import Image, list_images, read_image
from .quality import inspect
from .types import UserError

if TYPE_CHECKING:
    from .nuclei import Nuclei

ENDINGS = {"labels": ".labels.tif", "geojson": ".geojson", "csv": ".csv", "overlay": ".overlay.png"}
SUMMARY = "summary.csv"
LOCK = ".nuguide.lock"


@dataclass(frozen=True)
class Row:
    """One image in the summary; its result files are called `name` and an ending.

    Seconds: from reading to writing. Warnings: what `quality` found wrong, sentences joined by "; ". Bytes and
    modified: of the source when it was read, to see that it is still the same. Files: the endings that were written,
    separated by spaces. 0 and "" where that was not kept.
    """

    name: str
    nuclei: int
    nuclei_per_mm2: float
    mean_area_um2: float
    mean_probability: float
    seconds: float
    mpp: float
    source: str
    model: str
    warnings: str
    bytes: int = 0
    modified: str = ""
    files: str = ""


@dataclass
class Outcome:
    """What became of a run."""

    rows: list[Row] = field(default_factory=list)       # of every image of this run that is finished
    skipped: int = 0                                    # of those, finished by an earlier run
    failed: list[str] = field(default_factory=list)     # one line each


class Watch(Protocol):
    """Told of a run's progress."""

    def begin(self, images: int) -> None:
        """How many images there are to do."""

    def tiles(self, done: int, total: int) -> None:
        """How far the present image is."""

    def end(self, line: str | None) -> None:
        """One image is done; a line about it, if there is something to say."""


class Silence(Watch):
    """Says nothing."""


def parse_formats(text: str, choices: Iterable[str]) -> tuple[str, ...]:
    """Comma-separated names; raises UserError for any that is no choice, listing the choices."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    choices = list(dict.fromkeys(choices))
    if not names or any(name not in choices for name in names):
        raise UserError(f"--formats {text!r}: choose one or more of {','.join(choices)}, separated by commas")
    return names


class Job(Protocol):
    """What is done to files of one kind.

    Attributes:
        model: what to call it in the summary. mpp: microns per pixel of all files, where the user gave it.
        endings: of every file that a finished one leaves.
    """

    model: str
    mpp: float | None
    endings: Sequence[str]

    def queue(self, file: Path) -> None:
        """Take note, at the start of a run, that a file is one of its files."""

    def do(self, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
        """Segment one file into `stem` plus each ending; its row of the summary, and a line for people."""
        ...

    def differs(self, stem: Path) -> str | None:
        """What an earlier run did otherwise, besides model and microns per pixel; None where nothing."""
        return None

    def skip(self, file: Path, row: Row) -> None:
        """Take note that an earlier run has done a file."""

    def tidy(self, stem: Path) -> None:
        """Let go of what only an unfinished run needs: the file's row is in the summary."""


@dataclass
class ImageJob(Job):
    """Images that fit into memory, each segmented in one go.

    Attributes:
        segment: (image (H, W, 3) uint8, mpp, progress) -> Nuclei. model: what to call it in the summary.
        mpp: microns per pixel of all images; where not given, what each file says, else `default_mpp` with a note.
        formats: keys of `ENDINGS`.
    """

    segment: Callable[[np.ndarray, float, Callable[[int, int], None]], Nuclei]
    model: str
    mpp: float | None = None
    default_mpp: float = 0.25
    formats: Sequence[str] = tuple(ENDINGS)

    @property
    def endings(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the formats."""
        return [ENDINGS[name] for name in self.formats]

    def do(self, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
        """Segment one image and write its results."""
        start = time.perf_counter()
        image = read_image(file)
        used_mpp = self.mpp or image.mpp or self.default_mpp
        notes = list(image.notes)
        if not self.mpp:
            notes.append(
                f"{image.mpp:.4g} microns per pixel, from the file"
                if image.mpp
                else f"the file states no scale: {self.default_mpp} microns per pixel assumed (--mpp sets it)"
            )
        try:
            nuclei = self.segment(image.image_rgb, used_mpp, watch.tiles)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        write_results(nuclei, image, stem, self.formats)
        quality = inspect(image.image_rgb, used_mpp, nuclei.table)
        count, mm2 = len(nuclei), image.image_rgb.shape[0] * image.image_rgb.shape[1] * used_mpp**2 / 1e6
        row = Row(
            name=stem.name,
            nuclei=count,
            nuclei_per_mm2=round(count / mm2, 1),
            mean_area_um2=round(float(np.mean(nuclei.table["area_um2"])), 2) if count else 0.0,
            mean_probability=round(float(np.mean(nuclei.table["probability"])), 4) if count else 0.0,
            seconds=round(time.perf_counter() - start, 2),
            mpp=used_mpp,
            source=str(file.resolve()),
            model=self.model,
            warnings=joined(quality.warnings),
        )
        return row, f"{file.name}: {count} nuclei in {row.seconds:.1f} s" + "".join(f"; {note}" for note in notes)


def segment_files(
    inputs: Sequence[Path],
    out: Path,
    job_for: Callable[[Path], Job],
    overwrite: bool = False,
    watch: Watch | None = None,
    at_once: int = 1,
) -> Outcome:
    """Segment files, each into `OUT/NAME` plus the endings of its job, and `OUT/summary.csv`.

    The summary is rewritten after every file, so a run that is cut goes on where it stopped: a file is skipped when
    its row and all its results are there. Files that no run of ours made are not replaced, unless asked to; nor do two
    runs write into one OUT at a time.

    Args:
        inputs: files or folders.
        job_for: what to do to a file; UserError where it cannot be told.
        overwrite: do finished files again, and replace files that are in the way.
        at_once: how many files are under way at a time, each in a thread.

    Raises:
        UserError: OUT cannot be made, its summary not be read, or another run writes there. What is wrong with one
            input is in `Outcome.failed`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made here ({error.strerror}); choose another --out") from error
    with alone_in(out):
        return _segment_files(inputs, out, job_for, overwrite, watch or Silence(), at_once)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """No other run writes into OUT meanwhile; the system lets go of the lock of a run that is killed."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{out}: another run is writing here; wait for it, or choose another --out") from error
    except (OSError, NotImplementedError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{out}: cannot be written ({said}); choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (out / LOCK).unlink()
        lock.release()


def _segment_files(
    inputs: Sequence[Path], out: Path, job_for: Callable[[Path], Job], overwrite: bool, watch: Watch, at_once: int
) -> Outcome:
    outcome = Outcome()
    found: dict[Path, Path] = {}                        # the absolute path of each file, and as it was given
    for given in inputs:
        try:
            for file in list_images([given]):
                found.setdefault(file.resolve(), file)
        except UserError as error:
            outcome.failed.append(str(error))
    files = list(found.values())
    before = read_summary(out / SUMMARY)
    names = name_results(files, {row.source: row.name for row in before.values()})
    if files:
        watch.begin(len(files))
    for file in files:
        with suppress(UserError):                       # which is told when it is the file's turn
            job_for(file).queue(file)
    turn = threading.Lock()

    def one(file: Path, name: str) -> None:
        source = str(file.resolve())
        row, line = before.get(source), None
        try:
            job = job_for(file)
            if not overwrite and finished(row, out, job):
                assert row is not None
                job.skip(file, row)
                with turn:
                    outcome.skipped += 1
            else:
                kept = [] if row is None or overwrite else made(row, job)
                if not overwrite:
                    refuse_others(out / name, job, kept)
                grows = any(with_ending(out / name, ending).exists() for ending in kept)
                with turn:                              # cut from here on, it is not finished
                    begun(out / name).touch()
                    if not grows and before.pop(source, None) is not None:      # else what there is stays as sound
                        write_summary(out / SUMMARY, before.values())
                row, line = do_begun(job, file, out / name, watch)
                row = dataclasses.replace(row, files=" ".join(dict.fromkeys([*kept, *job.endings])))
                with turn:
                    before[source] = row
                    write_summary(out / SUMMARY, before.values())
                    begun(out / name).unlink(missing_ok=True)
            job.tidy(out / name)
            outcome.rows.append(row)
        except UserError as error:
            outcome.failed.append(str(error))
            line = f"failed: {error}"
        except OSError as error:
            outcome.failed.append(f"{out / name}: cannot be written ({error.strerror}); choose another --out")
            line = f"failed: {outcome.failed[-1]}"
        watch.end(line)

    if at_once == 1:
        for file, name in zip(files, names, strict=True):
            one(file, name)
        return outcome
    pool = ThreadPoolExecutor(at_once)
    try:
        list(pool.map(one, files, names))
    except BaseException:                               # such as Ctrl-C, which may not wait for slides to end
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return outcome


def do_begun(job: Job, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
    """`do`, its row with the state of the file; one that fails before its first result is not begun."""
    size, modified = state_of(file)
    try:
        row, line = do(job, file, stem, watch)
    except BaseException:
        if not there(stem, job):
            begun(stem).unlink(missing_ok=True)
        raise
    return dataclasses.replace(row, bytes=size, modified=modified), line


def do(job: Job, file: Path, stem: Path, watch: Watch) -> tuple[Row, str]:
    """`Job.do`, with troubles that any file may have as UserError."""
    source = str(file.resolve())
    try:
        source.encode()
    except UnicodeEncodeError as error:                 # bytes that are no text, which no result file could state
        raise UserError(f"{source!a}: this name is no valid text; rename the file") from error
    try:
        return job.do(file, stem, watch)
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise UserError(
            f"{file}: does not fit into memory; cut it into smaller images, or lower --batch"
        ) from error


def begun(stem: Path) -> Path:
    """A file that is there from the first result of an image or slide on until its row is in the summary."""
    return stem.with_name(f".{stem.name}.begun")


def made(row: Row, job: Job) -> list[str]:
    """The endings of the results that a row stands for; those of the job where an older summary does not tell."""
    return row.files.split() or list(job.endings)


def refuse_others(stem: Path, job: Job, ours: Collection[str]) -> None:
    """UserError where a result file would replace one that no run of ours is known to have made.

    Args:
        ours: endings that an earlier run of ours made.
    """
    if begun(stem).exists():
        return
    mine = {with_ending(stem, ending) for ending in ours}
    if others := [path for path in there(stem, job) if path not in mine]:
        raise UserError(f"{others[0]}: is there already and not in {SUMMARY}; choose another --out, or --overwrite it")


def there(stem: Path, job: Job) -> list[Path]:
    """The result files of an image or slide that exist."""
    return [path for ending in job.endings if (path := with_ending(stem, ending)).exists()]


def state_of(file: Path) -> tuple[int, str]:
    """Size in bytes and time of the last change, to the second, of a file; (0, "") where they cannot be known."""
    try:
        facts = file.stat()
    except OSError:
        return 0, ""
    return facts.st_size, datetime.fromtimestamp(int(facts.st_mtime), UTC).isoformat()


def write_results(nuclei: Nuclei, image: Image, stem: Path, formats: Sequence[str]) -> None:
    """Every asked-for format of the results of one image, as `stem` plus its ending; all at a time, for most of the
    work is compression, which threads share.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "labels": nuclei.to_labels,
        "geojson": lambda path: nuclei.to_geojson(path, image_name=stem.name),
        "csv": nuclei.to_csv,
        "overlay": lambda path: nuclei.to_overlay(path, image.image_rgb),
    }
    with ThreadPoolExecutor(max(len(formats), 1)) as pool:
        for writing in [pool.submit(writers[name], with_ending(stem, ENDINGS[name])) for name in formats]:
            writing.result()


def joined(warnings: Sequence[str]) -> str:
    """Warnings as one cell of the summary."""
    return "; ".join(warnings)


def with_ending(stem: Path, ending: str) -> Path:
    """`stem` plus an ending; a stem may hold dots."""
    return stem.with_name(stem.name + ending)


def finished(row: Row | None, out: Path, job: Job) -> bool:
    """Whether a file was done by an earlier run, with all that the job would write.

    Raises:
        UserError: it was, if only in part, but in another way, such as by another model, so that neither keeping nor
            replacing is safe.
    """
    if row is None:
        return False
    kept = {ending for ending in made(row, job) if with_ending(out / row.name, ending).exists()}
    if not kept:
        return False
    if row.model != job.model or (job.mpp is not None and abs(row.mpp - job.mpp) > 1e-4):
        raise UserError(
            f"{row.source}: {out / row.name}.* were made by {row.model} at {row.mpp} microns per pixel; "
            "choose another --out, or --overwrite them"
        )
    if row.modified and (row.bytes, row.modified) != state_of(Path(row.source)):
        raise UserError(
            f"{row.source}: was changed after {out / row.name}.* were made; choose another --out, or --overwrite them"
        )
    if differs := job.differs(out / row.name):
        raise UserError(
            f"{row.source}: {out / row.name}.* were made {differs}; choose another --out, or --overwrite them"
        )
    return kept.issuperset(job.endings)


def name_results(files: Sequence[Path], taken: dict[str, str]) -> list[str]:
    """A name for the results of each file: its stem, made longer where another file has the same.

    A file keeps the name that an earlier run gave it.

    Args:
        taken: names that are in use, by the absolute path of the file that uses each.
    """
    stems = Counter(file.stem.casefold() for file in files)      # some disks do not tell A from a
    used = {name.casefold() for name in taken.values()} | {Path(SUMMARY).stem}
    names = []
    for file in files:
        source = str(file.resolve())
        if source in taken:
            names.append(taken[source])
            continue
        choices = [f"{file.parent.resolve().name}_{file.stem}", f"{file.stem}_{file.suffix[1:]}"]
        if stems[file.stem.casefold()] == 1:
            choices.insert(0, file.stem)
        choices.append(f"{file.stem}_{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}")
        name = next(name for name in choices if name.casefold() not in used)
        used.add(name.casefold())
        names.append(name)
    return names


def read_summary(path: Path) -> dict[str, Row]:
    """The rows of a summary by source; none where there is no summary yet."""
    if not path.exists():
        return {}
    types = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False)  # pyright: ignore[reportCallIssue, reportArgumentType]
        later = {"warnings": "", "bytes": 0, "modified": "", "files": ""}          # an older summary has none
        for name, nothing in later.items():
            table = table if name in table else table.assign(**{name: nothing})
        return {row["source"]: Row(**row) for row in table[list(types)].to_dict("records")}  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is no summary of ours; move it away or choose another --out") from error


def write_summary(path: Path, rows: object) -> None:
    """All rows as CSV; the file is replaced as a whole."""
    columns = [field.name for field in dataclasses.fields(Row)]
    export.write_table(path, pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=columns))  # pyright: ignore
