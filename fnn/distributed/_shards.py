"""Parameters of which each process holds a part: how they are cut, handed to layers, and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fnn import ops, tree
from fnn._placement import is_parted
from fnn._ranks import data_group
from fnn.distributed._axis import sharded_axis
from fnn.nn._layer import Params
from fnn.ops import ShardedLeaf

# Two processes on one machine, gloo, four leaves: shards of 64 KiB are gathered in 0.4 times the time when packed, of
# 256 KiB in the same, of 1 MiB in 1.3 times.
PACKED = 2**18
"""Bytes of a shard up to which it goes with others in one message, which costs a copy of what comes back."""


def parted(params: Params, mesh: DeviceMesh) -> Params:
    """Plain leaves as DTensors, of which this process holds its part; plain still where the part would be uneven."""
    leaves, structure = tree.flatten(params)
    return tree.unflatten(structure, [_part(*named, mesh) for named in zip(tree.paths(params), leaves, strict=True)])


def _part(path: str, leaf: Tensor, mesh: DeviceMesh) -> Tensor:
    count = mesh.size()
    axis = None if count == 1 or is_parted(leaf) else sharded_axis(leaf.shape, count, path)
    if axis is None:
        return leaf
    # A clone, because a view would keep the whole in memory.
    local = leaf.chunk(count, axis)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return _placed(local, mesh, axis)


def stacked(copies: dict[str, Any]) -> dict[str, Any]:
    """Copies of a tree as that of a stacked `nn.Repeat`: one tree, whose leaves have an axis for them in front."""
    return {"*": tree.map(_stacked, *copies.values())} if copies else {}


def _stacked(*leaves: Any) -> Tensor:
    if not is_parted(leaves[0]):
        return torch.stack(leaves)
    local = torch.stack([leaf.to_local() for leaf in leaves])
    return _placed(local, leaves[0].device_mesh, leaves[0].placements[0].dim + 1)


def _placed(local: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(local, mesh, [Shard(axis)], run_check=False)


def as_shard(leaf: Any) -> Any:
    """A leaf as layers take it: a DTensor that is parted evenly as a shard, and whole where it is parted otherwise."""
    if not is_parted(leaf):
        if _hides_parts(leaf):
            raise TypeError(
                "fsdp: a parameter inside of a transform such as fnn.grad is a DTensor, which hides its parts there; "
                "train with train.make_step(loss_fn, optimizer, mesh=mesh), which gives the layer its shards"
            )
        return leaf
    mesh, placement = leaf.device_mesh, leaf.placements[0]
    if mesh.ndim > 1 or not placement.is_shard() or leaf.shape[placement.dim] % mesh.size():
        return leaf.full_tensor()
    return ShardedLeaf(leaf.to_local(), placement.dim, leaf.shape[placement.dim], data_group(mesh), mesh.size())


def _hides_parts(leaf: Any) -> bool:
    if torch.compiler.is_compiling() or not isinstance(leaf, Tensor):
        return False
    return is_parted(torch.func.debug_unwrap(leaf))


def with_local(leaf: ShardedLeaf, local: Tensor, dim: int | None = None) -> ShardedLeaf:
    """A shard with another tensor in it."""
    return ShardedLeaf(local, leaf.dim if dim is None else dim, leaf.size, leaf.group, leaf.count)


def cast(leaf: ShardedLeaf, dtype: torch.dtype) -> ShardedLeaf:
    """A shard in another floating dtype, which is the one it is then gathered in."""
    return with_local(leaf, leaf.local.to(dtype)) if leaf.local.is_floating_point() else leaf


def gathered(shards: Sequence[ShardedLeaf]) -> list[Tensor]:
    """The whole tensors: small ones of one dtype in one message, each other in one of its own."""
    whole: list[Any] = [None] * len(shards)
    packs: dict[Any, list[int]] = {}
    for index, shard in enumerate(shards):
        small = shard.local.numel() * shard.local.element_size() <= PACKED
        packs.setdefault((shard.dtype, shard.group, shard.count) if small else index, []).append(index)
    for members in packs.values():
        if len(members) == 1:
            whole[members[0]] = shards[members[0]].gather()
            continue
        first = shards[members[0]]
        parts = [shards[index].local.movedim(shards[index].dim, 0) for index in members]
        flat = ops.all_gather(torch.cat([part.reshape(-1) for part in parts]), first.group, first.count)
        pieces = flat.reshape(first.count, -1).split([part.numel() for part in parts], 1)
        for index, part, piece in zip(members, parts, pieces, strict=True):
            whole[index] = piece.reshape(shards[index].size, *part.shape[1:]).movedim(0, shards[index].dim)
    return whole
