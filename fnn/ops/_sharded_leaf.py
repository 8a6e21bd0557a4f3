"""`ShardedLeaf`: one process's part of a parameter, where a loss expects the parameter."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fnn import tree
from fnn.ops._collectives import all_gather


class ShardedLeaf:
    """A parameter of which each process of a group holds an equal part along one axis. It is a leaf of a pytree.

    local: this process's part
    dim: the axis along which the parameter is cut
    size: the parameter's length along it
    group, count: the process group's name, and how many processes are in it

    Nothing computes with it but what gathers it first; its gradient is this process's part of the parameter's.
    Everything else that is done to a tensor raises `TypeError`, with the cure.

    Raises ValueError where `count` parts of this length do not make `size`.

    Example:
        >>> from fnn import ops
        >>> leaf = ops.ShardedLeaf(torch.ones(2, 3), dim=0, size=2, group="alone", count=1)
        >>> leaf.shape, leaf.gather().shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(self, local: Tensor, dim: int, size: int, group: str, count: int) -> None:
        if local.shape[dim] * count != size:
            raise ValueError(
                f"a parameter of length {size} along axis {dim} cannot be cut into {count} equal parts; this process "
                f"holds {local.shape[dim]}"
            )
        self.local, self.dim, self.size, self.group, self.count = local, dim, size, group, count

    @property
    def shape(self) -> torch.Size:
        """That of the whole parameter."""
        shape = list(self.local.shape)
        shape[self.dim] = self.size
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameter."""
        return self.local.dtype

    def gather(self) -> Tensor:
        """The whole parameter; every process of the group has to call this."""
        return all_gather(self.local, self.group, self.count, self.dim)

    def __repr__(self) -> str:
        return (
            f"one of {self.count} shards of a parameter of shape {tuple(self.shape)} "
            "(wrap the net with distributed.fsdp(net, mesh), or make the step without mesh=)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"ShardedLeaf has no attribute {name!r}")
        _refuse(self, name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        leaf = next(x for x in tree.leaves((args, kwargs or {})) if isinstance(x, ShardedLeaf))
        _refuse(leaf, getattr(function, "__name__", str(function)))


def _refuse(leaf: ShardedLeaf, name: str) -> NoReturn:
    raise TypeError(f"{name}: expected a tensor, got {leaf!r}")


def _refused(name: str) -> Any:
    def refuse(self: ShardedLeaf, *_: Any) -> NoReturn:
        _refuse(self, name)

    return refuse


ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
OTHERS = "eq ne lt le gt ge neg pos abs invert bool int float len iter getitem setitem contains array"

for _name in [*ARITHMETIC.split(), *(f"r{name}" for name in ARITHMETIC.split()), *OTHERS.split()]:
    setattr(ShardedLeaf, f"__{_name}__", _refused(_name))
