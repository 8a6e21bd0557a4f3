"""Rules of operations that index with tensors: exact where indices are constants, whole lines where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn.diff._sparse.call import Call, Unknown, moved, shape_of
from fnn.diff._sparse.index_sets import IndexSets, collect, in_one_family, reduce, union


def gather(call: Call) -> IndexSets:
    sets, dim, at = call.args[:3]
    sets, (at,) = _with_constants(sets, [dim], [at])
    return moved(lambda x: torch.gather(x, dim, at), (sets,)) if sets.shape else sets.broadcast(shape_of(call.result))


def index_select(call: Call) -> IndexSets:
    sets, dim, at = call.args[:3]
    sets, (at,) = _with_constants(sets, [dim], [at])
    return moved(lambda x: torch.index_select(x, dim, at), (sets,))


def index(call: Call) -> IndexSets:
    sets, indices = call.args[:2]
    sets, indices = _with_constants(sets, _indexed(indices), indices)
    return moved(lambda x: torch.ops.aten.index(x, indices), (sets,))


def index_put(call: Call) -> IndexSets:
    base, indices, values = call.args[:3]
    accumulate = bool(call.argument(3, call.kwargs.get("accumulate", False)))
    shape = tuple(call.result.shape)
    if any(isinstance(each, Unknown) for each in indices):
        if isinstance(values, IndexSets):
            values = reduce(values, None, False).broadcast(shape)
        return _united(base, values, shape)
    targets = torch.ops.aten.index(_numbers(shape), [each if each is None else each.cpu() for each in indices]).numpy()
    if isinstance(values, IndexSets):
        values = values.broadcast(targets.shape)
    return _put(base, targets, values, shape, keep=accumulate)


def scatter(call: Call) -> IndexSets:
    """scatter and scatter_add along one dimension."""
    base, dim, at, source = call.args[:4]
    shape, keep = tuple(call.result.shape), "scatter_add" in str(call.target)
    if isinstance(at, Unknown) or "reduce" in call.kwargs or len(call.args) > 4 or not shape:
        if isinstance(source, IndexSets) and shape:
            lines = reduce(source, [dim], True)
            ids = np.zeros(shape, np.int64)
            region = tuple(slice(None) if d == dim % len(shape) else slice(n) for d, n in enumerate(lines.shape))
            ids[region] = lines.ids
            source = lines.replace(ids)
        return _united(base, source, shape)
    targets = torch.gather(_numbers(shape), dim, at.cpu()).numpy()
    if isinstance(source, IndexSets):
        source = source.replace(source.ids[tuple(slice(n) for n in targets.shape)])
    return _put(base, targets, source, shape, keep)


def _with_constants(sets: IndexSets, dims: list[int], indices: Any) -> tuple[IndexSets, list[Any]]:
    """Where an index is unknown, all elements along the indexed dimensions get one set, and the index is zeros."""
    if any(isinstance(each, Unknown) for each in indices):
        if sets.shape:
            sets = reduce(sets, dims, True).broadcast(sets.shape)
        indices = [
            torch.zeros(shape_of(each), dtype=torch.int64, device="cpu") if each is not None else None
            for each in indices
        ]
    return sets, [each if each is None else each.cpu() for each in indices]


def _indexed(indices: Any) -> list[int]:
    return [d for d, each in enumerate(indices) if each is not None]


def _numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(int(np.prod(shape, dtype=np.int64)), device="cpu").reshape(shape)


def _united(base: Any, source: Any, shape: tuple[int, ...]) -> IndexSets:
    parts = [each for each in (base, source) if isinstance(each, IndexSets)]
    return (union(*parts) if len(parts) == 2 else parts[0]).broadcast(shape)


def _put(base: Any, targets: np.ndarray, source: Any, shape: tuple[int, ...], keep: bool) -> IndexSets:
    """The elements `source` at `targets` of base: added to what is there (`keep`), or in its place."""
    targets = targets.ravel()
    is_base, is_source = isinstance(base, IndexSets), isinstance(source, IndexSets)
    (ids, family) = in_one_family([each for each in (base, source) if isinstance(each, IndexSets)])
    below = ids[0].ravel().copy() if is_base else np.zeros(int(np.prod(shape, dtype=np.int64)), np.int64)
    above = ids[-1].ravel() if is_source else np.zeros(len(targets), np.int64)
    if not keep:
        below[targets] = 0
    groups = np.concatenate([np.arange(len(below)), targets])
    united = collect(groups, np.concatenate([below, above]), len(below), family)
    return united.replace(united.ids.reshape(shape))
