"""Where a step runs: in one process, over parted tensors, or as the program of one process among several.

Each of these says what of a state and a batch the loss sees, and how what comes of it belongs to the whole:

    differentiated, batch, key = layout.inside(params, batch, key)
    loss_fn(layout.for_loss(differentiated, params), state, batch, key)
    grads, new_state, loss, metrics = layout.whole(grads, params, state, new_state, loss, metrics)
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._placement import implicit_replication, is_parted, mesh_of, whole
from fnn._ranks import DATA, MODEL


class Alone:
    """One process: everything is as it is."""

    def inside(self, params: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
        return params, batch, key

    def for_loss(self, differentiated: Any, params: Any) -> Any:
        return differentiated

    def whole(
        self, grads: Any, params: Any, state: Any, new_state: Any, loss: Tensor, metrics: Any
    ) -> tuple[Any, Any, Tensor, Any]:
        return grads, new_state, loss, metrics

    def mean(self, loss: Tensor) -> Tensor:
        """The loss of all processes from that of this one."""
        return loss

    def once_more(self, params: Any, like: Any) -> Any:
        """What the loss of all processes is computed of at other parameters than `like`, those of the step."""
        return params

    def losses(self) -> AbstractContextManager[Any]:
        """Entered around a loss while it is traced."""
        return contextlib.nullcontext()


class Placed(Alone):
    """The program of one process over the whole batch, which torch carries out where the parameters lie.

    The batch becomes a `DTensor` as the parameters are, and their placements are propagated through all operators.
    """

    def __init__(self, mesh: Any):
        self.mesh = mesh

    def inside(self, params: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
        return params, spread(batch, self.mesh), key

    def whole(
        self, grads: Any, params: Any, state: Any, new_state: Any, loss: Tensor, metrics: Any
    ) -> tuple[Any, Any, Tensor, Any]:
        return settle(grads, params), new_state, whole(loss), tree.map(whole, metrics)


_alone = Alone()


def layout_of(params: Any) -> Alone:
    """That of a step without mesh: where its parameters are parted decides."""
    mesh = mesh_of(params)
    return _alone if mesh is None else Placed(mesh)


def around(params: Any, layout: Alone) -> AbstractContextManager[Any]:
    """What a step over such parameters is called in, compiled or not: how parted tensors meet others."""
    if mesh_of(params) is None:
        return contextlib.nullcontext()
    if isinstance(layout, Placed):
        from fnn.ops._whole import placed

        return placed()
    return implicit_replication()


def spread(batch: Any, mesh: Any) -> Any:
    """A batch whose plain leaves are this process's part, along axis 0, as the batch of all processes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    over = over_batch(mesh)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_parted(leaf):
            return leaf
        placements = [Shard(0) if parted and leaf.dim() else Replicate() for parted in over]
        return DTensor.from_local(leaf, mesh, placements, run_check=False)

    return tree.map(one, batch)


def over_batch(mesh: Any) -> list[bool]:
    """Of each axis of a mesh whether batches are parted over it."""
    return [name == DATA or (mesh.ndim == 1 and name != MODEL) for name in mesh.mesh_dim_names or ("",)]


def settle(new: Any, old: Any) -> Any:
    """`new` with each leaf placed as that of `old` is: its sum taken where processes hold terms, then parted."""
    return tree.map(_settle, new, old)


def _settle(new: Any, old: Any) -> Any:
    if not is_parted(old):
        return whole(new)
    if not is_parted(new):
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = [Replicate()] * old.device_mesh.ndim
        new = DTensor.from_local(new, old.device_mesh, everywhere, run_check=False)
    return new.redistribute(old.device_mesh, old.placements)


def on_all(good: Tensor, params: Any) -> Tensor:
    """Whether a 0-d bool is True on every process, where parameters are parted."""
    mesh = mesh_of(params)
    if mesh is None:
        return good
    from torch.distributed.tensor import DTensor, Partial

    bad = torch.where(good, 0.0, 1.0)
    return DTensor.from_local(bad, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor() == 0
