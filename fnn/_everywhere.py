"""What every process does at the same time, and fails at together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from fnn import _ranks
from fnn._placement import is_parted

T = TypeVar("T")


def everywhere(who: str, action: Callable[[], T]) -> T:
    """What `action` gives on this process; what it raises on one is raised on all. Every process has to call this."""
    if _ranks.count() == 1:
        return action()
    value: list[T] = []
    error: Exception | None = None
    try:
        value.append(action())
    except Exception as raised:
        error = raised
    told = _ranks.gather(who, None if error is None else _ranks._sendable(error))
    if error is not None:
        raise error
    for number, other in enumerate(told):
        if other is not None:
            other.__notes__ = [f"raised on rank {number}"]
            raise other
    return value[0]


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


def placement(leaf: object) -> str:
    """How a parted leaf lies on its mesh, as ``data=2: Shard(dim=0)``."""
    mesh, placements = leaf.device_mesh, leaf.placements  # type: ignore[attr-defined]
    names = mesh.mesh_dim_names or range(mesh.ndim)
    axes = ", ".join(f"{name}={length}" for name, length in zip(names, mesh.shape, strict=True))
    return f"{axes}: {', '.join(map(repr, placements))}"
