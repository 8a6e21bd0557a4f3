"""One run at a time in a folder of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

_held: set[int] = set()


def take_lock(folder: Path) -> int | None:
    """A lock that is held until `give_back`, or until the process ends, however it ends; None where there are no locks.

    Raises `FileExistsError` where another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        give_back(lock)
        raise FileExistsError(
            f"Checkpointer: {folder} is in use by another run; wait for its end, or give another folder"
        ) from error
    except OSError:  # a file system without locks
        give_back(lock)
        return None
    return lock


def give_back(lock: int | None) -> None:
    if lock in _held:
        _held.discard(lock)
        os.close(lock)


def _give_back_all() -> None:
    for lock in list(_held):
        give_back(lock)


if hasattr(os, "register_at_fork"):  # a process that loads data, and outlives a killed run, must not hold its lock
    os.register_at_fork(after_in_child=_give_back_all)
