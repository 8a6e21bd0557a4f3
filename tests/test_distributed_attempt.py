"""Processes that torchrun starts again share a store with those that have ended."""

import datetime
import threading

import pytest
from torch._C._distributed_c10d import HashStore

from fnn.distributed._attempt import store_of_attempt

LIMIT = datetime.timedelta(seconds=10)


def start(store, count, name):
    """What each process finds under "address" once all have agreed and rank 0 has written its own."""
    found = [None] * count

    def process(rank):
        mine = store_of_attempt(store, rank, count, LIMIT)
        if rank == 0:
            mine.set("address", name)
        mine.wait(["address"], LIMIT)
        found[rank] = mine.get("address").decode()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in reversed(threads):  # rank 0 comes last
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_start_sees_nothing_of_those_before_it():
    store = HashStore()
    assert [start(store, 3, name) for name in ("first", "second")] == [["first"] * 3, ["second"] * 3]


def test_a_hello_of_a_process_that_has_ended_counts_for_nothing():
    store = HashStore()
    store.set("fnn/hello/1", "of another start")
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 did not come within 0.2 s \(timeout=\)"):
        store_of_attempt(store, 0, 2, datetime.timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 did not come within 0.2 s \(timeout=\)"):
        store_of_attempt(store, 1, 2, datetime.timedelta(seconds=0.2))
    assert start(store, 2, "first") == ["first"] * 2
