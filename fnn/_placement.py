"""Tensors that are parted over processes (`DTensor`), without importing their package where there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fnn import tree


def is_parted(leaf: Any) -> bool:
    """Whether a leaf is a `DTensor`. Not inside a transform, which hides what kind of tensor it differentiates."""
    return isinstance(leaf, Tensor) and type(leaf).__name__ == "DTensor"


def local(leaf: Any) -> Any:
    """What this process holds of a leaf."""
    return leaf.to_local() if is_parted(leaf) else leaf


def whole(leaf: Any) -> Any:
    """A leaf as a plain tensor of its whole shape; all processes have to call this."""
    return leaf.full_tensor() if is_parted(leaf) else leaf


def mesh_of(values: Any) -> Any:
    """The mesh of the first parted leaf, None where there is none."""
    for leaf in tree.leaves(values):
        if is_parted(leaf):
            return leaf.device_mesh
    return None


_replicating = False


@contextlib.contextmanager
def implicit_replication() -> Iterator[None]:
    """Inside, a plain tensor that meets a parted one counts as the same on all processes.

    Torch's own ends an outer one when it ends.
    """
    global _replicating
    if _replicating:
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    _replicating = True
    try:
        with implicit_replication():
            yield
    finally:
        _replicating = False
