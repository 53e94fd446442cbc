"""Work side by side on the cores of one machine.

Where all cores share each operation, each waits at its end for the slowest, and for those that some other thread of
the program just has. Streams take an item each instead and never wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

STREAMS = 2         # each holds the maps of its tile, about half a gigabyte at the default size

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], streams: int) -> Generator[Result]:
    """`function` of each item, in order, computed by that many threads, each with its share of torch's threads.

    No more than twice as many results as streams wait to be taken. With one stream everything happens in the caller's
    thread, when it asks. How many threads share an operation can change the last digits of its result, so that what has
    to be repeatable needs the same number of streams, however few the items.

    Args:
        function: may run in several threads at once.
    """
    threads = torch.get_num_threads()
    if streams < 2 or threads < 2:
        yield from map(function, items)
        return
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque()
    share = max(1, threads // streams)
    with ThreadPoolExecutor(streams, "stream", torch.set_num_threads, (share,)) as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 2 * streams))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown()
            # a thread's number is its own, but the last one set is what threads begun later take
            torch.set_num_threads(threads)
