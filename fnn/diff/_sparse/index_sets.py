"""Which inputs each element of a tensor depends on: sets of indices, shared wherever elements have the same set.

A movement of data then moves ids and no sets, and a sum over many elements makes one set however often it is
broadcast afterwards; so a function of 100,000 variables with local dependence takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 2**26
"""Entries that one step may produce, half a GiB of indices: beyond it the pattern is dense in all but name."""


@dataclass(frozen=True, eq=False)
class Family:
    """Sets of input indices. Set k is `members[starts[k]:starts[k + 1]]`, sorted; set 0 is empty."""

    starts: np.ndarray
    members: np.ndarray
    inputs: int

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, eq=False)
class IndexSets:
    """The dependence of one tensor: `ids`, of the tensor's shape, numbers each element's set in `family`."""

    ids: np.ndarray
    family: Family

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ids.shape

    def replace(self, ids: np.ndarray) -> IndexSets:
        """Elements with other sets of the same family."""
        return IndexSets(ids, self.family)

    def broadcast(self, shape: Sequence[int]) -> IndexSets:
        return self.replace(np.broadcast_to(self.ids, shape))


def identity(shape: Sequence[int]) -> IndexSets:
    """Every element depends on itself alone."""
    size = int(np.prod(shape, dtype=np.int64))
    starts = np.concatenate([[0], np.arange(size + 1)])
    return IndexSets(np.arange(1, size + 1).reshape(shape), Family(starts, np.arange(size), size))


def in_one_family(sets: Sequence[IndexSets]) -> tuple[list[np.ndarray], Family]:
    """The ids of several tensors, renumbered for one family that holds all their sets."""
    families: list[Family] = []
    for each in sets:
        if not any(each.family is family for family in families):
            families.append(each.family)
    if len(families) == 1:
        return [each.ids for each in sets], families[0]
    starts, offsets, last = [np.zeros(1, np.int64)], [], 0
    for family in families:
        offsets.append(sum(len(other) - 1 for other in families[: len(offsets)]))
        starts.append(family.starts[1:] + last)
        last += int(family.starts[-1])
    # each family's empty set 0 is the merged one's: its other sets follow those of the families before it
    merged_starts = np.concatenate([starts[0], *[part if i == 0 else part[1:] for i, part in enumerate(starts[1:])]])
    merged = Family(merged_starts, np.concatenate([f.members for f in families]), families[0].inputs)
    ids = []
    for each in sets:
        offset = next(o for o, family in zip(offsets, families, strict=True) if family is each.family)
        ids.append(np.where(each.ids == 0, 0, each.ids + offset))
    return ids, merged


def union(a: IndexSets, b: IndexSets) -> IndexSets:
    """Elementwise union, with broadcasting."""
    (ids_a, ids_b), family = in_one_family([a, b])
    ids_a, ids_b = np.broadcast_arrays(ids_a, ids_b)
    if ((ids_a == ids_b) | (ids_a == 0) | (ids_b == 0)).all():
        return IndexSets(np.maximum(ids_a, ids_b), family)
    pairs, inverse = np.unique(ids_a.ravel() * len(family) + ids_b.ravel(), return_inverse=True)
    first, second = np.divmod(pairs, len(family))
    groups = np.arange(len(pairs))
    united = collect(np.concatenate([groups, groups]), np.concatenate([first, second]), len(pairs), family)
    return united.replace(united.ids[inverse].reshape(ids_a.shape))


def union_all(sets: Sequence[IndexSets], shape: Sequence[int]) -> IndexSets:
    """Elementwise union of tensors that broadcast to `shape`."""
    result = sets[0]
    for other in sets[1:]:
        result = union(result, other)
    return result.broadcast(shape)


def collect(groups: np.ndarray, ids: np.ndarray, count: int, family: Family) -> IndexSets:
    """`count` sets: the g-th is the union of all `ids[i]` with `groups[i] == g`.

    Raises `OverflowError` where the sets would have more than `LIMIT` entries together.
    """
    some = ids != 0
    pairs = np.unique(groups[some] * len(family) + ids[some])
    groups, ids = np.divmod(pairs, len(family))
    sizes = family.starts[ids + 1] - family.starts[ids]
    total = int(sizes.sum())
    check_size(total)
    places = np.arange(total) + np.repeat(family.starts[ids] - (np.cumsum(sizes) - sizes), sizes)
    keys = np.unique(np.repeat(groups * family.inputs, sizes) + family.members[places])
    owners, members = np.divmod(keys, max(family.inputs, 1))
    counts = np.bincount(owners, minlength=count)
    starts = np.concatenate([[0, 0], np.cumsum(counts)])
    new = Family(starts, members, family.inputs)
    return IndexSets(np.where(counts > 0, np.arange(1, count + 1), 0), new)


def check_size(entries: int) -> None:
    """Raise `OverflowError` for more entries than `LIMIT`."""
    if entries > LIMIT:
        raise OverflowError(f"{entries:,} index entries")


def reduce(sets: IndexSets, dims: Sequence[int] | None, keepdim: bool) -> IndexSets:
    """Union along `dims` (None or no dims: along all), as `sum` adds."""
    rank = len(sets.shape)
    dims = sorted({d % rank for d in dims}) if dims and rank else list(range(rank))
    kept = [d for d in range(rank) if d not in dims]
    rows = [sets.shape[d] for d in kept]
    count = int(np.prod(rows, dtype=np.int64))
    flat = sets.ids.transpose(*kept, *dims).reshape(count, -1) if sets.ids.size else np.zeros((count, 0), np.int64)
    groups = np.broadcast_to(np.arange(count)[:, None], flat.shape)
    united = collect(groups.ravel(), flat.ravel(), count, sets.family)
    shape = [1 if d in dims else sets.shape[d] for d in range(rank)] if keepdim else rows
    return united.replace(united.ids.reshape(shape))


def rows_and_columns(sets: IndexSets) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (element, input), sorted. Raises `OverflowError` beyond `LIMIT` of them."""
    ids = sets.ids.ravel()
    united = collect(np.arange(len(ids)), ids, len(ids), sets.family)
    starts = united.family.starts
    sizes = np.diff(starts)[1:]
    return np.repeat(np.arange(len(ids)), sizes), united.family.members
