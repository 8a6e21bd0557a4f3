"""What the processes of one start of a group share, apart from those of the starts before it."""

from __future__ import annotations

import datetime
import time
import uuid

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError


def store_of_attempt(store: Store, rank: int, count: int, timeout: datetime.timedelta) -> Store:
    """`store` under a name that the processes which have just been started agree on; each of them calls this.

    Where a process ends, torchrun starts all of them again and gives them the same store, in which the addresses of
    those that have ended still stand. Its own count of restarts is no name: machines count differently. So each process
    says hello with a word that it has just made up, and waits until rank 0 answers that very word.

    Raises `RuntimeError` naming the ranks that have not come within `timeout`.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fnn/hello/{rank}", word)
        try:
            store.wait([f"fnn/answer/{word}"], timeout)
        except DistError as error:
            raise _missing([0], count, timeout) from error
        name = store.get(f"fnn/answer/{word}").decode()
        store.set(f"fnn/{name}/{rank}", "here")
        return PrefixStore(f"fnn/{name}", store)
    missing, until = set(range(1, count)), time.monotonic() + timeout.total_seconds()
    heard: dict[int, bytes] = {}
    while missing:
        for other in sorted(missing):
            if store.check([f"fnn/{word}/{other}"]):
                missing.discard(other)
            elif store.check([f"fnn/hello/{other}"]):
                hello = store.get(f"fnn/hello/{other}")
                if heard.get(other) != hello:  # which may still be that of a process that has ended
                    heard[other] = hello
                    store.set(f"fnn/answer/{hello.decode()}", word)
        if missing and time.monotonic() > until:
            raise _missing(sorted(missing), count, timeout)
        time.sleep(0.01 if missing else 0.0)
    return PrefixStore(f"fnn/{word}", store)


def _missing(ranks: list[int], count: int, timeout: datetime.timedelta) -> RuntimeError:
    return RuntimeError(
        f"distributed.init: rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {count} did not come within "
        f"{timeout.total_seconds():g} s (timeout=); look at their own messages"
    )
