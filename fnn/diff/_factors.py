"""The gradient of one leaf for one example, as factors or as a whole, whichever takes less arithmetic.

A leaf with taps has the gradient sum_t left_t outer right_t, over the T positions at which it was used. Its norm is
that of the T x T Gram matrices, <L L', R R'>, which are small where T is, and the sum itself is small where T is large.
Rows of an embedding's left factor are one-hot: there `left` is (1, T) integers, their indices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fnn import ops
from fnn.ops._taps import Plan


class Factors(NamedTuple):
    """left: (groups, T, n) or (1, T) indices, right: (groups, T, k), of one example."""

    left: Tensor
    right: Tensor


def factors(plan: Plan, leaf: int, inputs: list[Tensor], deltas: list[Tensor]) -> list[Factors]:
    """The factors of a structured leaf's gradient, whose sum it is: of its lookups, and of its products by groups."""
    alike: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for tap, met, delta in zip(plan.taps, inputs, deltas, strict=True):
        if tap.leaf == leaf:
            given, taken = tap.rows(met, delta)
            left_first = tap.kind == "embedding" or tap.options[0] == "io"
            key = ("lookup" if tap.kind == "embedding" else "product", tap.groups)
            alike.setdefault(key, []).append((given, taken) if left_first else (taken, given))
    return [
        Factors(joined([row[0] for row in rows], 1), joined([row[1] for row in rows], 1)) for rows in alike.values()
    ]


def joined(tensors: list[Tensor], axis: int) -> Tensor:
    """Concatenation, without a copy of one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def is_whole(plan: Plan, leaf: int) -> bool:
    """Whether a leaf's whole gradient is cheaper than Gram matrices: T n k multiply-adds against T^2 (n + k)."""
    taps = [tap for tap in plan.taps if tap.leaf == leaf]
    groups, positions = taps[0].groups, sum([tap.positions for tap in taps])
    n, k = taps[0].weight[0] // groups, 1
    for size in taps[0].weight[1:]:
        k *= size
    return n * k <= positions * (n + k) or any([tap.groups != groups for tap in taps])


def whole(parts: list[Factors], shape: torch.Size) -> Tensor:
    """The gradient of `shape` that the factors stand for."""
    total = None
    for left, right in parts:
        if left.is_floating_point():
            part = (left.mT @ right).reshape(shape)
        else:
            part = right.new_zeros(shape).index_add(0, left[0], right[0])
        total = part if total is None else total + part
    assert total is not None
    return total


def widened(x: Tensor) -> Tensor:
    """A tensor of half precision as float32, where squares do not overflow; any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def squared_norm(parts: list[Factors]) -> Tensor:
    """Of the gradient that the factors stand for, with the terms between lookups and products."""
    parts = [Factors(widened(left), widened(right)) for left, right in parts]
    total = inner(parts[0], parts[0])
    for part in parts[1:]:
        total = total + inner(part, part) + 2 * inner(parts[0], part)
    return total


def inner(a: Factors, b: Factors) -> Tensor:
    """The inner product of two gradients of one leaf."""
    return (gram(a.left, b.left) * gram(a.right, b.right)).sum()


def gram(a: Tensor, b: Tensor) -> Tensor:
    """All inner products of rows, (groups, S, T); integers stand for one-hot rows."""
    if not a.is_floating_point():
        if not b.is_floating_point():
            return a.unsqueeze(-1) == b.unsqueeze(-2)
        return b.index_select(-1, a[0]).mT
    if not b.is_floating_point():
        return a.index_select(-1, b[0])
    if a.shape[1] == 1 and b.shape[1] == 1:  # a sum that the compiler fuses, not a product of one number
        return (a * b).sum(-1, keepdim=True)
    return ops.matmul(a, b.mT) if a.shape[0] > 1 else ops.matmul(a[0], b[0].mT).unsqueeze(0)


def over_examples(parts: list[Factors], weights: Tensor) -> list[Factors]:
    """Factors of the weighted sum of gradients, from those of the examples, with a leading axis for them."""
    summed = []
    for left, right in parts:
        left, right = widened(left), widened(right) * weights.reshape(-1, *[1] * (right.dim() - 1))
        summed.append(Factors(left.transpose(0, 1).flatten(1, 2), right.transpose(0, 1).flatten(1, 2)))
    return summed
