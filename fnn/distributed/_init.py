"""`init`: the processes that torchrun started, as a mesh of devices."""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fnn import _ranks
from fnn.distributed._attempt import store_of_attempt


def init(
    *, model: int = 1, device: torch.device | str = "auto", timeout: float = 600.0, quiet: bool = True
) -> DeviceMesh:
    """The mesh of all processes of this run, one device each; the process group is made if there is none.

    model: over how many processes each layer is parted (tensor parallelism). 1 gives a mesh with the one axis
        ("data",), over which batches are parted; n gives the axes ("data", "model"), of which "model" has length n and
        is made of neighbours
    device: "cpu" (backend gloo), "cuda" (nccl, and gloo for what lies in the host's memory), or "auto", which takes
        CUDA where there is a device for each process of this machine
    timeout: seconds that an operation of all processes waits for the slowest of them before it raises
    quiet: whether standard output of ranks other than 0 goes nowhere

    Reads what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, ...). Without torchrun it is a run of one process, in which
    everything works the same. On CUDA the process's device is made the current one, ``torch.device("cuda")``.

    Raises `ValueError` where `model` does not divide the number of processes, or a device is not there.

    Example:
        >>> from fnn import distributed
        >>> mesh = distributed.init()
        >>> mesh.mesh_dim_names, mesh.size()
        (('data',), 1)
    """
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise ValueError(f"distributed.init: timeout is {timeout!r}, expected a number of seconds above 0")
    kind = _device_type(device)
    if not dist.is_initialized():
        _make_group(kind, datetime.timedelta(seconds=timeout))
    count = dist.get_world_size()
    if not isinstance(model, int) or isinstance(model, bool) or model < 1 or count % model:
        raise ValueError(
            f"distributed.init: model is {model!r}, expected a whole number that divides the {count} processes"
        )
    if quiet and dist.get_rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if model == 1:
        return init_device_mesh(kind, (count,), mesh_dim_names=("data",))
    return init_device_mesh(kind, (count // model, model), mesh_dim_names=("data", "model"))


def _make_group(kind: str, timeout: datetime.timedelta) -> None:
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {"timeout": timeout}
    if kind == "cuda":
        torch.cuda.set_device(_local_rank())
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}
    else:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        options |= {"store": store_of_attempt(store, rank, count, timeout), "rank": rank, "world_size": count}
    dist.init_process_group(backend, **options)
    _ranks.remember_timeout(timeout)
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _device_type(device: torch.device | str) -> str:
    """ "cpu" or "cuda"."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"distributed.init: device is {str(device)!r}, expected 'auto', 'cpu' or 'cuda'")
    if kind == "cuda" and torch.cuda.device_count() < here:
        raise ValueError(
            f"distributed.init: {here} processes on this machine, but {torch.cuda.device_count()} CUDA devices; start "
            "as many processes as there are devices (torchrun --nproc-per-node), or give device='cpu'"
        )
    return kind
