"""Many files to result files: names that never collide, finished files skipped, bad ones reported at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import cv2
import pandas as pd
from filelock import FileLock, Timeout

from . import export
from .images import list_images
from .types import UserError

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
        return _Run(out, job_for, overwrite, watch or Silence()).all(inputs, at_once)


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


class _Run:
    """One call of `segment_files`, which has OUT for itself; its arguments are told there.

    Attributes:
        outcome: so far. rows: of the summary, by source, those of earlier runs too; changed and written by one thread
            at a time.
    """

    def __init__(self, out: Path, job_for: Callable[[Path], Job], overwrite: bool, watch: Watch):
        self.out, self.job_for, self.overwrite, self.watch = out, job_for, overwrite, watch
        self.outcome = Outcome()
        self.rows = read_summary(out / SUMMARY)
        self.turn = threading.Lock()

    def all(self, inputs: Sequence[Path], at_once: int) -> Outcome:
        """Every file of the inputs."""
        files = self.listed(inputs)
        names = name_results(files, {row.source: row.name for row in self.rows.values()})
        if files:
            self.watch.begin(len(files))
        for file in files:
            with suppress(UserError):                       # which is told when it is the file's turn
                self.job_for(file).queue(file)
        if at_once == 1:
            for file, name in zip(files, names, strict=True):
                self.one(file, name)
            return self.outcome
        pool = ThreadPoolExecutor(at_once)
        try:
            list(pool.map(self.one, files, names))
        except BaseException:                               # such as Ctrl-C, which may not wait for slides to end
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return self.outcome

    def listed(self, inputs: Sequence[Path]) -> list[Path]:
        """The files of the inputs as they were given, each once; notes the inputs that are none."""
        found: dict[Path, Path] = {}
        for given in inputs:
            try:
                for file in list_images([given]):
                    found.setdefault(file.resolve(), file)
            except UserError as error:
                self.outcome.failed.append(str(error))
        return list(found.values())

    def one(self, file: Path, name: str) -> None:
        """Skip or segment one file; what is wrong with it is noted."""
        line = None
        try:
            job, row = self.job_for(file), self.rows.get(str(file.resolve()))
            if not self.overwrite and finished(row, self.out, job):
                assert row is not None
                job.skip(file, row)
                with self.turn:
                    self.outcome.skipped += 1
            else:
                row, line = self.segment(job, file, name, row)
            job.tidy(self.out / name)
            self.outcome.rows.append(row)
        except UserError as error:
            self.outcome.failed.append(str(error))
            line = f"failed: {error}"
        except OSError as error:
            self.outcome.failed.append(
                f"{self.out / name}: cannot be written ({error.strerror}); choose another --out"
            )
            line = f"failed: {self.outcome.failed[-1]}"
        self.watch.end(line)

    def segment(self, job: Job, file: Path, name: str, before: Row | None) -> tuple[Row, str]:
        """Do one file, and put its row into the summary in the place of the one from before; the row, and a line."""
        source, stem = str(file.resolve()), self.out / name
        kept = [] if before is None or self.overwrite else made(before, job)
        if not self.overwrite:
            refuse_others(stem, job, kept)
        grows = any(with_ending(stem, ending).exists() for ending in kept)
        with self.turn:                                     # cut from here on, it is not finished
            begun(stem).touch()
            if not grows and self.rows.pop(source, None) is not None:       # else what there is stays as sound
                write_summary(self.out / SUMMARY, self.rows.values())
        row, line = do_begun(job, file, stem, self.watch)
        row = dataclasses.replace(row, files=" ".join(dict.fromkeys([*kept, *job.endings])))
        with self.turn:
            self.rows[source] = row
            write_summary(self.out / SUMMARY, self.rows.values())
            begun(stem).unlink(missing_ok=True)
        return row, line


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
