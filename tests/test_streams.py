"""Streams: the same results as one after another, in order, and torch's threads as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from nuguide.streams import side_by_side


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_as_many_threads_each_with_its_share():
    meet = threading.Barrier(2, timeout=30)         # passed by two at a time, or not at all
    seen = set()

    def one(number: int) -> int:
        meet.wait()
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return number * number

    assert list(side_by_side(one, range(6), 2)) == [0, 1, 4, 9, 16, 25]
    assert len(seen) == 2
    assert {threads for _, threads in seen} == {2}
    assert torch.get_num_threads() == 4
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


def test_one_stream_or_one_thread_computes_here_when_asked():
    done = []

    def one(number: int) -> int:
        done.append(threading.get_ident())
        return number

    results = side_by_side(one, range(3), 1)
    assert next(results) == 0
    assert len(done) == 1
    torch.set_num_threads(1)
    assert list(side_by_side(one, range(3), 2)) == [0, 1, 2]
    assert set(done) == {threading.get_ident()}


def test_no_more_than_twice_as_many_results_wait_as_there_are_streams():
    started = []
    results = side_by_side(started.append, range(100), 2)
    next(results)
    assert len(started) <= 4
    results.close()
    assert len(started) <= 4
    assert torch.get_num_threads() == 4


def test_an_error_of_one_item_comes_out_and_the_rest_is_not_begun():
    begun = []

    def one(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("item 1")
        return number

    with pytest.raises(ValueError, match="item 1"):
        list(side_by_side(one, range(100), 2))
    assert len(begun) <= 6
    assert torch.get_num_threads() == 4
