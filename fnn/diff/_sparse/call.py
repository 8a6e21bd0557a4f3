"""One operation of the graph, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fnn.diff._sparse.index_sets import IndexSets, in_one_family


@dataclass(frozen=True, eq=False)
class Unknown:
    """A tensor that does not depend on the seed but may differ from call to call: only its metadata counts."""

    like: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """An operation with its arguments: `IndexSets` where they depend on the seed, `Unknown`, or constant tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    """Tensors of the result's shapes and dtypes: one, or a tuple."""
    first: Any
    """Of the first argument alike: it has the strides."""

    @property
    def dependent(self) -> list[IndexSets]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, IndexSets)]

    def argument(self, index: int, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else default


def shape_of(value: Any) -> tuple[int, ...]:
    """Of an argument of any of the three kinds."""
    return tuple(value.like.shape) if isinstance(value, Unknown) else tuple(value.shape)


def moved(run: Callable[..., Any], args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """What `run`, an operation that only moves data, does to the sets of its arguments.

    It is run on numbers that stand for the elements; 0 stands for all that does not depend on the seed. Tensors that
    index must be bound in `run`: every tensor among `args` is data.
    """
    kwargs = kwargs or {}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    sets = [leaf for leaf in leaves if isinstance(leaf, IndexSets)]
    ids, family = in_one_family(sets)
    table = np.concatenate([np.zeros(1, np.int64), *[each.ravel() for each in ids]])
    last, k = 1, 0
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, IndexSets):
            size = ids[k].size
            # float64 holds integers up to 2**53, and every operation that moves data accepts it
            leaves[i] = torch.arange(last, last + size, dtype=torch.float64, device="cpu").reshape(leaf.shape)
            last, k = last + size, k + 1
        elif isinstance(leaf, Unknown | Tensor):
            leaves[i] = torch.zeros(shape_of(leaf), dtype=torch.float64, device="cpu")
    arguments, options = pytree.tree_unflatten(leaves, structure)
    results = run(*arguments, **options)

    def to_sets(positions: Tensor) -> IndexSets:
        return IndexSets(table[positions.to(torch.int64).numpy()], family)

    return to_sets(results) if isinstance(results, Tensor) else tuple(to_sets(result) for result in results)
