"""Tensors that are parted over processes (`DTensor`), without importing their package where there are none."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnn import _ranks, tree


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


def check_same_leaves(who: str, leaves: dict[str, Tensor], cure: str) -> None:
    """Raise `ValueError`, on every process, where dtype, shape or placement of a leaf is not the same on all."""
    if _ranks.count() == 1:
        return
    described = {f"leaf {path!r}": describe(leaf) for path, leaf in leaves.items()}
    digest = hashlib.sha256(repr(described).encode()).hexdigest()
    if len(set(_ranks.gather(who, digest))) > 1:  # the whole list, which is long, goes round only where it is needed
        _ranks.check_same(who, described, cure)


def describe(leaf: Tensor) -> str:
    """Dtype and shape of a leaf, and how it lies on its mesh."""
    kind = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    if not is_parted(leaf):
        return kind
    return f"{kind} {placement(leaf)}"


def content(leaf: Tensor) -> str:
    """What `describe` says of a leaf, and a sum of the bits that this process holds of it."""
    here = local(leaf).detach().contiguous().reshape(-1)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(here.element_size(), torch.int64)
    checksum = int(here.view(words).sum(dtype=torch.int64)) % 2**32
    return f"{describe(leaf)} with checksum {checksum:08x}"


def placement(leaf: object) -> str:
    """How a parted leaf lies on its mesh, as ``data=2: Shard(dim=0)``."""
    mesh, placements = leaf.device_mesh, leaf.placements  # type: ignore[attr-defined]
    names = mesh.mesh_dim_names or range(mesh.ndim)
    axes = ", ".join(f"{name}={length}" for name, length in zip(names, mesh.shape, strict=True))
    return f"{axes}: {', '.join(map(repr, placements))}"
