"""Regions of slides on a Dask cluster: processes of this machine, or whatever runs behind a scheduler's address.

Workers write parts into the folder of the run, so all have to see the same disk, and the slides under the same names.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .slide_run import Engine, OpenedSlide, SlideTask, compute_regions
from .slides.layout import Region
from .types import UserError
from .whole_slide import Stages

if TYPE_CHECKING:
    from distributed import Client

ANSWER_SECONDS = 10             # for a scheduler
WAIT_SECONDS = 30               # for the first worker behind a scheduler
RETRIES = 2                     # of a task that raises something else than our own errors
TASKS_PER_WORKER = 4            # at least, so that all end at about the same time
MOST_REGIONS = 16               # of a task; what a worker that dies loses is one region, but it starts the slide anew


@dataclass
class OnCluster(Engine):
    """The workers of a Dask client."""

    client: Client

    def compute(
        self, task: SlideTask, opened: OpenedSlide, regions: Sequence[Region], done: Callable[[int], None]
    ) -> Stages:
        """Compute the regions in tasks of a few neighbors each.

        Raises:
            UserError: a region cannot be computed, or the cluster lost too many workers over it; what is done stays.
        """
        from distributed import as_completed

        stages = Stages()
        workers = len(self.client.nthreads())  # pyright: ignore[reportArgumentType]  of a client that waits
        chunks = divided(regions, max(1, workers))
        tasks = [
            self.client.submit(compute_safely, task, [region.number for region in chunk], pure=False, retries=RETRIES)
            for chunk in chunks
        ]
        try:
            # the loop, for the client is not Dask's default one
            for future in as_completed(tasks, loop=self.client.loop):
                counts, spent, failure = result_of(future, task)
                if failure is not None:
                    raise UserError(failure)
                for name, seconds in vars(spent).items():
                    setattr(stages, name, getattr(stages, name) + seconds)
                done(len(counts))
        finally:
            self.client.cancel(tasks)
        return stages


def divided(regions: Sequence[Region], workers: int) -> list[list[Region]]:
    """Regions in runs of neighbors in a row, short enough that every worker gets several."""
    size = min(MOST_REGIONS, max(1, math.ceil(len(regions) / (workers * TASKS_PER_WORKER))))
    chunks: list[list[Region]] = []
    for region in regions:
        last = chunks[-1] if chunks else []
        if last and len(last) < size and last[-1].row == region.row and last[-1].column + 1 == region.column:
            last.append(region)
        else:
            chunks.append([region])
    return chunks


def compute_safely(task: SlideTask, numbers: Sequence[int]) -> tuple[list[int], Stages, str | None]:
    """`compute_regions`; our own errors as text, for they are answers, which no retry would change."""
    try:
        return *compute_regions(task, numbers), None
    except UserError as error:
        return [], Stages(), str(error)
    except MemoryError as error:
        return [], Stages(), f"{task.path}: a worker ran out of memory ({error}); use fewer workers, or lower --batch"


def result_of(future: Any, task: SlideTask) -> tuple[list[int], Stages, str | None]:
    """What a task came to; UserError where it never ended."""
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise UserError(
            f"{task.path}: workers died over one of its tasks again and again ({error.task}); give them more memory, "
            "or use fewer; the same command goes on from what is done"
        ) from error
    except futures.CancelledError as error:
        raise UserError(
            f"{task.path}: the connection to the workers was lost; the same command goes on from what is done"
        ) from error
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError, TypeError, LookupError) as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{task.path}: a worker failed ({told}); see that it has the same nuguide and sees the same disks, "
            "then the same command goes on from what is done"
        ) from error


def local_workers(workers: int | None) -> int:
    """How many processes to start on this machine: as asked, or one for every two cores."""
    return workers or max(1, (os.cpu_count() or 1) // 2)


def threads_of(scheduler: str | None, workers: int | None) -> int:
    """Threads for each worker: its share of this machine, or, behind a scheduler, what its own environment says (0)."""
    return 0 if scheduler is not None else max(1, (os.cpu_count() or 1) // local_workers(workers))


@contextlib.contextmanager
def connected(scheduler: str | None, workers: int | None) -> Iterator[OnCluster]:
    """A cluster: the one behind an address, or processes of this machine, which end with the block.

    It does not become Dask's default: what else this process computes with Dask stays where it was.

    Args:
        scheduler: such as tcp://host:8786. workers: processes to start here; by default one for every two cores.

    Raises:
        UserError: Dask is not installed, nothing answers at the address, or no workers could be started.
    """
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise UserError(f"--engine dask needs {error.name}; install it with: pip install 'nuguide[cluster]'") from error
    # it tells of every connection; what goes wrong with a task comes back with the task
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout=ANSWER_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise UserError(f"--scheduler {scheduler}: nothing answers there; start it with: dask scheduler") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=WAIT_SECONDS)
            except (OSError, TimeoutError) as error:
                raise UserError(
                    f"--scheduler {scheduler}: has no workers; start some with: dask worker {scheduler}"
                ) from error
            yield OnCluster(client)
        return
    with contextlib.ExitStack() as running:
        try:
            started = running.enter_context(distributed.LocalCluster(
                n_workers=local_workers(workers), threads_per_worker=1, processes=True, silence_logs=50,
                dashboard_address="127.0.0.1:0",
                # a limit would only pause a worker, for good, whose memory is the model's and not of results
                memory_limit=0,
            ))
            client = running.enter_context(distributed.Client(started, set_as_default=False))
        except (OSError, RuntimeError, TimeoutError, ValueError) as error:
            told = " ".join(str(error).split())[:150]
            raise UserError(f"no Dask workers could be started here ({told}); leave out --engine dask") from error
        yield OnCluster(client)
