"""`shard`: a tree whose leaves lie where rules say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fnn import _ranks, tree
from fnn._placement import content, is_parted
from fnn.distributed._rules import Placement, Rules, matched
from fnn.tree import Tree


def shard(values: Tree, mesh: DeviceMesh, rules: Rules) -> Tree:
    """`values` with every leaf a `DTensor`, of which each process holds the part that `rules` give it.

    A training step over such parameters is the same program, run where they lie: data parallel, fully sharded or tensor
    parallel by the rules alone. The optimizer's state, made of them, lies as they do.

    values: a tree of tensors, the same on every process, which all call this
    mesh: see `distributed.init`
    rules: `{pattern: {axis of the mesh: axis of the leaf}}`, such as ``{"h.*.mlp.c_fc.weight": {"model": 1}}``; a
        pattern is matched with a leaf's path, the first that matches counts, and ``*`` is any text. A leaf is whole on
        every process along an axis of the mesh that is not named, or where no pattern matches. Or a function
        `(values, mesh)` that gives such rules: `replicated`, `fully_sharded`, `tensor_parallel("gpt")`. Parts may be of
        unequal size.

    Raises `ValueError` for a pattern that matches nothing, an axis that the leaf or the mesh lacks, and for values
    that differ between processes; `TypeError` for leaves that are no tensors.

    Example:
        >>> from fnn import distributed
        >>> params = {"weight": torch.ones(4, 8), "bias": torch.zeros(4)}
        >>> placed = distributed.shard(params, distributed.init(), {"weight": {"data": 0}})
        >>> placed["weight"].placements, placed["bias"].placements
        ((Shard(dim=0),), (Replicate(),))
    """
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"distributed.shard: mesh is {type(mesh).__name__}, expected a DeviceMesh; see fnn.distributed.init"
        )
    leaves = tree.paths(values)
    for path, leaf in leaves.items():
        if not isinstance(leaf, Tensor) or is_parted(leaf):
            raise TypeError(f"distributed.shard: leaf {path!r} is {type(leaf).__name__}, expected a plain tensor")
    chosen = matched(values, rules if isinstance(rules, Mapping) else rules(values, mesh))
    placements = {path: _placements(path, leaf, mesh, chosen.get(path, {})) for path, leaf in leaves.items()}
    _ranks.check_same(
        "distributed.shard",
        {f"leaf {path!r}": content(leaf) for path, leaf in leaves.items()},
        "every process has to start from the same values: the same key, or the same file",
    )
    over = [number for number in range(mesh.ndim) if mesh.size(number) > 1] or list(range(mesh.ndim))
    if len(over) < mesh.ndim:  # torch plans over each axis of the mesh, also where there is nothing to cut
        mesh = mesh[tuple((mesh.mesh_dim_names or ())[number] for number in over)]
    parted = []
    for path, leaf in leaves.items():
        where = [placements[path][number] for number in over]
        # Each process cuts its own copy: they were found the same.
        parted.append(distribute_tensor(leaf.detach().to(mesh.device_type), mesh, where, src_data_rank=None))
    return tree.unflatten(tree.flatten(values)[1], parted)


def _placements(path: str, leaf: Tensor, mesh: DeviceMesh, placement: Placement) -> list[Any]:
    """By axis of the mesh, torch's name for how the leaf lies over it."""
    from torch.distributed.tensor import Replicate, Shard

    names = list(mesh.mesh_dim_names or ())
    where = f"distributed.shard: the rule of leaf {path!r}, shape {tuple(leaf.shape)}"
    if unknown := [name for name in placement if name not in names]:
        cure = "; distributed.init(model=n) makes one" if unknown[0] == _ranks.MODEL else ""
        raise ValueError(f"{where}, names the mesh's axis {unknown[0]!r}, but its axes are {names}{cure}")
    found: list[Any] = []
    for name in names:
        axis = placement.get(name)
        if axis is None:
            found.append(Replicate())
            continue
        if not -leaf.dim() <= axis < leaf.dim():
            raise ValueError(f"{where}, cuts axis {axis}, which it lacks")
        found.append(Shard(axis % leaf.dim()))
    return found
