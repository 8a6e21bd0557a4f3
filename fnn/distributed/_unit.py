"""Layers that gather their parameters where they are used: what `fsdp` puts around the layers of a net."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fnn import nn, tree
from fnn._rules._remat import remat_shards
from fnn.distributed._shards import cast, gathered, parted, stacked, with_local
from fnn.nn._layer import Layer, Params, State, layer
from fnn.nn._wrapper import Wrapper
from fnn.ops import ShardedLeaf


class Around(Wrapper):
    """A layer that shows as what it is around."""

    def __repr__(self) -> str:
        return repr(self.inner)


@layer
class Unit(Around):
    """A layer that gathers its parameters, and in the backward pass gathers and computes again."""

    inner: Layer
    mesh: DeviceMesh

    def __init__(self, inner: Layer, mesh: DeviceMesh):
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(self, "_rematerialized", remat_shards(self._run))

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        params, state = self.inner.init(key, *xs, **inputs)
        return parted(params, self.mesh), state

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        leaves, structure = tree.flatten(params)
        is_shard = [isinstance(leaf, ShardedLeaf) for leaf in leaves]
        shards = [leaf for leaf, shard in zip(leaves, is_shard, strict=True) if shard]
        if not shards:
            return self.inner.apply(params, state, *xs, key=key, train=train, **inputs)
        # What is rematerialized takes trees of tensors, numbers and strings: shards first, then the others, and where
        # in the tree each of them belongs.
        others = [leaf for leaf, shard in zip(leaves, is_shard, strict=True) if not shard]
        numbers = {True: iter(range(len(shards))), False: iter(range(len(shards), len(leaves)))}
        order = tree.unflatten(structure, [next(numbers[shard]) for shard in is_shard])
        parts = [shard.local for shard in shards]
        how = [(shard.dim, shard.size, shard.group, shard.count) for shard in shards]
        return self._rematerialized(parts, others, how, order, state, xs, inputs, key, train)  # type: ignore[attr-defined]

    def _run(
        self, parts: Any, others: Any, how: Any, order: Any, state: State, xs: Any, inputs: Any, key: Any, train: bool
    ) -> tuple[Any, State]:
        shards = [ShardedLeaf(part, *rest) for part, rest in zip(parts, how, strict=True)]
        if isinstance(self.inner, nn.Cast):
            shards = [cast(shard, self.inner.policy.compute) for shard in shards]
        leaves = [*gathered(shards), *others]
        params = tree.map(lambda number: leaves[number], order)
        return self.inner.apply(params, state, *xs, key=key, train=train, **inputs)

    def __reduce__(self) -> tuple[type[Unit], tuple[Layer, DeviceMesh]]:
        return Unit, (self.inner, self.mesh)

    def around(self, inner: Layer) -> Unit:
        return Unit(inner, self.mesh)


@layer
class Stack(Around):
    """A stacked `nn.Repeat` of units: each copy is cut out of the shards of the stack, and gathered alone."""

    inner: Layer

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        params, state = self._copies().init(key, *xs, **inputs)
        return stacked(params), stacked(state)

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        repeat: Any = self.inner
        leaves, structure = tree.flatten(params)
        parts = [leaf.local if isinstance(leaf, ShardedLeaf) else leaf for leaf in leaves]
        copies = repeat._unstack(tree.unflatten(structure, parts), "params")
        copies = {name: _of_copy(leaves, one) for name, one in copies.items()}
        states = repeat._unstack(state, "state")
        y, new = self._copies().apply(copies, states, *xs, key=key, train=train, **inputs)
        return y, stacked(new)

    def _copies(self) -> Layer:
        """The same `nn.Repeat`, but not stacked."""
        copies = copy.copy(self.inner)
        object.__setattr__(copies, "stacked", False)
        return copies


def _of_copy(leaves: Sequence[Any], one: Params) -> Params:
    """Of one copy's parts, cut out of the parts of a stack, shards like those of the stack."""
    parts, structure = tree.flatten(one)
    found = [
        with_local(leaf, part, leaf.dim - 1) if isinstance(leaf, ShardedLeaf) else part
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    return tree.unflatten(structure, found)


@layer
class CastShards(Around):
    """An `nn.Cast` that casts shards too, before they are gathered."""

    inner: Layer

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        return self.inner.init(key, *xs, **inputs)

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        policy: nn.Policy = self.inner.policy  # type: ignore[attr-defined]
        params = tree.map(lambda leaf: cast(leaf, policy.compute) if isinstance(leaf, ShardedLeaf) else leaf, params)
        return self.inner.apply(params, state, *xs, key=key, train=train, **inputs)
