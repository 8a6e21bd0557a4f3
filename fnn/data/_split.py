"""Splitting data into parts by a key."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn import random
from fnn.data._arrays import check_labels, common_length, take

Tree = Any


def split(
    data: Tree, fractions: Sequence[float], key: Tensor | None = None, stratify: Tensor | np.ndarray | None = None
) -> tuple[Tree, ...]:
    """Split the examples of `data` into parts: every example in exactly one of them.

    data: a pytree of tensors and numpy arrays that share the length n of their first axis
    fractions: the share of each part; they sum to 1. The sizes are the nearest whole numbers that sum to n
    key: shuffles before the split; None keeps the order, so the parts are cut one after the other
    stratify: (n,) integer labels; each part then has of each label its share, rounded to a whole number
    returns one tree like `data` for each fraction

    Raises `ValueError` for lengths that differ, fractions that do not sum to 1, and a part that would be empty.

    Example:
        >>> train, test = split({"x": torch.arange(10)}, (0.8, 0.2))
        >>> train["x"].tolist(), test["x"].tolist()
        ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])
    """
    size = common_length(data, "split")
    borders = _borders(size, fractions)
    order = torch.arange(size) if key is None else random.permutation(key, size).cpu()
    if stratify is None:
        chosen = [order[start:stop] for start, stop in pairwise(borders)]
    else:
        ranks = _spread(check_labels(stratify, size, "split")[order])
        # Sorted, a part keeps the shuffled order instead of going round the labels.
        chosen = [order[ranks[start:stop].sort().values] for start, stop in pairwise(borders)]
    return tuple(take(data, index) for index in chosen)


def _borders(size: int, fractions: Sequence[float]) -> list[int]:
    shares = [float(fraction) for fraction in fractions]
    if not shares or min(shares) <= 0 or not abs(sum(shares) - 1) <= 1e-6:  # NaN is not within
        raise ValueError(
            f"split: fractions are {tuple(fractions)}, expected positive numbers that sum to 1, such as (0.8, 0.2)"
        )
    borders = [0]
    for n in range(1, len(shares)):
        borders.append(round(size * sum(shares[:n])))
    borders.append(size)
    for share, (start, stop) in zip(shares, pairwise(borders), strict=True):
        if start == stop:
            raise ValueError(f"split: the fraction {share} of {size} examples leaves an empty part; make it larger")
    return borders


def _spread(labels: Tensor) -> Tensor:
    """Positions ordered so that any stretch of them holds each label in its overall share.

    The r-th of the m examples of a label goes to the place (r + 1/2) / m of the way (systematic sampling).
    """
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return place.argsort(stable=True)
