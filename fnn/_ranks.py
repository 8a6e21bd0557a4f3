"""The processes of a run: which one this is, and how they agree. Without a process group there is one, of rank 0."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
DATA, MODEL = "data", "model"
"""The axes of a mesh: over one batches are parted, over the other the layers."""

_timeout: datetime.timedelta | None = None


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files: rank 0, or the first that torchrun has started."""
    return rank() == 0 and (count() > 1 or os.environ.get("RANK", "0") == "0")


def data_axis(who: str, mesh: Any) -> tuple[int, int]:
    """This process's place on the axis of `mesh` over which batches are parted, and that axis's length.

    It is the axis called "data", or the only one. Raises `TypeError` or `ValueError`, headed by `who`.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{who}: mesh is {type(mesh).__name__}, expected a DeviceMesh; see fnn.distributed.init")
    if mesh.ndim == 1:
        return mesh.get_local_rank(0), mesh.size(0)
    names = mesh.mesh_dim_names or ()
    if DATA not in names:
        raise ValueError(f"{who}: no axis of the mesh is called {DATA!r}, its axes are {list(names)}")
    return mesh.get_local_rank(DATA), mesh.size(names.index(DATA))


def data_group(mesh: DeviceMesh) -> str:
    """The name of the process group along that axis."""
    return mesh.get_group(0 if mesh.ndim == 1 else DATA).group_name


def sum_over(who: str, values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of `values` of the processes along that axis, on each of them; on the CPU."""
    group = mesh.get_group(0 if mesh.ndim == 1 else DATA)
    total = values.clone().to(mesh.device_type)
    with waiting(who):
        dist.all_reduce(total, group=group)
    return total.cpu()


def gather(who: str, value: Any) -> list[Any]:
    """The values of all processes, by rank; every process has to call this. Values are pickled."""
    if count() == 1:
        return [value]
    values = [None] * count()
    with waiting(who):
        dist.all_gather_object(values, value)
    return values


def on_main(who: str, action: Callable[[], T]) -> T:
    """What `action` gives, or raises, on rank 0, which alone runs it; every process has to call this."""
    if count() == 1:
        return action()
    told: list[Any] = [None, None]
    error: Exception | None = None
    if is_main():
        try:
            told[0] = action()
        except Exception as raised:
            error, told[1] = raised, _sendable(raised)
    with waiting(who):
        dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise told[1]
    return told[0]


def everywhere(who: str, action: Callable[[], T]) -> T:
    """What `action` gives on this process; what it raises on one is raised on all. Every process has to call this."""
    if count() == 1:
        return action()
    value: list[T] = []
    error: Exception | None = None
    try:
        value.append(action())
    except Exception as raised:
        error = raised
    told = gather(who, None if error is None else _sendable(error))
    if error is not None:
        raise error
    for other in told:
        if other is not None:
            raise other
    return value[0]


def check_same(who: str, values: dict[str, Any], cure: str) -> None:
    """Raise `ValueError`, on every process, where an entry is not the same on all; every process has to call this."""
    everyone = gather(who, values)
    for number, other in enumerate(everyone):
        for name in {**everyone[0], **other}:
            first, here = everyone[0].get(name), other.get(name)
            if first != here:
                raise ValueError(f"{who}: {name} is {first!r} on rank 0 and {here!r} on rank {number}; {cure}")


@contextlib.contextmanager
def waiting(who: str) -> Iterator[None]:
    """Says of an error inside that the processes were waiting for each other, and for how long they would have."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(f"{who}: {explain_wait()}")
        raise


def explain_wait() -> str:
    """What to think of an error in a collective operation."""
    limit = "" if _timeout is None else f"for at most {_timeout.total_seconds():g} s "
    return (
        f"rank {rank()} of {count()} was waiting for the other processes {limit}"
        "(distributed.init(timeout=)); one of them has ended, or never comes here, where each of them has to: look at "
        "its own message"
    )


def remember_timeout(limit: datetime.timedelta) -> None:
    """For messages: how long an operation of all processes waits."""
    global _timeout
    _timeout = limit


def _sendable(error: Exception) -> Exception:
    """An error as other processes get it: of its class where that is made of a message, and with its rank."""
    kind = type(error)
    built_in = kind.__module__ == "builtins" and not isinstance(error, UnicodeError | ExceptionGroup)
    copy = kind(str(error)) if built_in else RuntimeError(f"{kind.__name__}: {error}")
    copy.add_note(f"raised on rank {rank()}")
    return copy
