"""`KFold`: k ways to hold out one k-th of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn import random
from fnn.data._arrays import check_labels, common_length, take

Tree = Any


class KFold:
    """Pairs (training part, validation part) of `data`, one for each of `k` folds: every example validates once.

    data: a pytree of tensors and numpy arrays that share the length n of their first axis; ``torch.arange(n)`` gives
        the indices, for a `torch.utils.data.Subset` for example
    k: folds, from 2 to n; their sizes differ by at most one
    key: shuffles before the folds are cut; None keeps the order
    stratify: (n,) integer labels; the folds then differ by at most one in how many examples of a label they hold

    ``len(folds)`` is k, ``folds[i]`` is pair i, and iterating gives all pairs. Each part keeps the (shuffled) order.

    Raises `TypeError` or `ValueError` for data that is empty or of unequal lengths, a bad k, or labels that do not fit.

    Example:
        >>> folds = KFold((torch.arange(6.0), torch.arange(6) % 2), 3)
        >>> [validation[0].tolist() for _, validation in folds]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        >>> len(KFold(torch.arange(100), 5, key=random.key(0))[0][0])
        80

    Source: `sklearn.model_selection.KFold` and `StratifiedKFold`.
    """

    def __init__(
        self, data: Tree, k: int = 5, *, key: Tensor | None = None, stratify: Tensor | np.ndarray | None = None
    ):
        self.size = common_length(data, "KFold")
        if not isinstance(k, int) or isinstance(k, bool) or not 2 <= k <= self.size:
            raise ValueError(
                f"KFold: k is {k!r}, expected a whole number from 2 to {self.size}, the number of examples"
            )
        self.k = k
        self._data = data
        self._order = torch.arange(self.size) if key is None else random.permutation(key, self.size).cpu()
        if stratify is None:
            small, larger = divmod(self.size, k)
            sizes = torch.tensor([small + (fold < larger) for fold in range(k)])
            self._fold = torch.arange(k).repeat_interleave(sizes)
        else:
            # The examples of each label are dealt to the folds in turn, going on where the label before ended.
            by_label = check_labels(stratify, self.size, "KFold")[self._order].argsort(stable=True)
            self._fold = torch.empty(self.size, dtype=torch.int64)
            self._fold[by_label] = torch.arange(self.size) % k

    def __len__(self) -> int:
        return self.k

    def __getitem__(self, fold: int) -> tuple[Tree, Tree]:
        if not -self.k <= fold < self.k:
            raise IndexError(f"KFold: there is no fold {fold}, expected 0 to {self.k - 1}")
        held_out = self._fold == fold % self.k
        return take(self._data, self._order[~held_out]), take(self._data, self._order[held_out])

    def __iter__(self) -> Iterator[tuple[Tree, Tree]]:
        return (self[fold] for fold in range(self.k))

    def __repr__(self) -> str:
        return f"KFold({self.size} examples, {self.k} folds)"
