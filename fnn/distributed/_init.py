"""`init`: the processes that torchrun started, as a mesh of devices."""

from __future__ import annotations

import atexit
import datetime
import math
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
        CUDA where there is a device for each process of this machine. One process may use any other device too
    timeout: seconds that an operation of all processes waits for the slowest of them before it raises, where the
        process group is made here
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
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise ValueError(f"distributed.init: timeout is {timeout!r}, expected a number of seconds above 0")
    kind = _device_type(device)
    if not dist.is_initialized():
        index = None if device == "auto" else torch.device(device).index
        _make_group(kind, index, datetime.timedelta(seconds=timeout))
    elif kind not in dist.get_backend_config():
        raise ValueError(
            f"distributed.init: the process group that is there, {dist.get_backend_config()}, has no backend for "
            f"{kind!r}; give the device that it has, or leave making it to distributed.init"
        )
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


def _make_group(kind: str, index: int | None, timeout: datetime.timedelta) -> None:
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {"timeout": timeout}
    if kind == "cuda":
        torch.cuda.set_device(_local_rank() if index is None else index)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}
    else:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        options |= {"store": store_of_attempt(store, rank, count, timeout), "rank": rank, "world_size": count}
    dist.init_process_group(backend, **options)
    _ranks.remember_timeout(timeout)
    atexit.register(_end)


def _end() -> None:
    # Where an error ended the program the others may be in the middle of an operation; nccl would wait for them.
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def _local_rank() -> int:
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "distributed.init: LOCAL_RANK is not set, which says what device of its machine a process has; start the "
            "processes with torchrun, or set it (Slurm: export LOCAL_RANK=$SLURM_LOCALID)"
        )
    return int(os.environ.get("LOCAL_RANK", "0"))


def _device_type(device: torch.device | str) -> str:
    """ "cpu" or "cuda"."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"
    kind, several = torch.device(device).type, int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (kind not in ("cpu", "cuda") or torch.device(device).index is not None):
        raise ValueError(
            f"distributed.init: device is {str(device)!r}, expected 'auto', 'cpu' or 'cuda' in a run of several "
            "processes, each of which takes the device of its local rank"
        )
    if kind not in ("cpu", "cuda"):
        return "cpu"  # one process has nobody to exchange tensors with
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("distributed.init: device is 'cuda', but torch finds none here; give device='cpu', or 'auto'")
    if kind == "cuda" and torch.cuda.device_count() < here:
        raise ValueError(
            f"distributed.init: {here} processes on this machine, but {torch.cuda.device_count()} CUDA devices; start "
            "as many processes as there are devices (torchrun --nproc-per-node), or give device='cpu'"
        )
    return kind
