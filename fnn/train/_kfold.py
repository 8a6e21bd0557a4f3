"""`KFold`: k ways to hold out one k-th of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn import random, tree

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
        >>> from fnn import random, train
        >>> folds = train.KFold((torch.arange(6.0), torch.arange(6) % 2), 3)
        >>> [validation[0].tolist() for _, validation in folds]
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
        >>> len(train.KFold(torch.arange(100), 5, key=random.key(0))[0][0])
        80

    Source: `sklearn.model_selection.KFold` and `StratifiedKFold`.
    """

    def __init__(
        self, data: Tree, k: int = 5, *, key: Tensor | None = None, stratify: Tensor | np.ndarray | None = None
    ):
        self.size = _common_length(data)
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
            by_label = _labels(stratify, self.size)[self._order].argsort(stable=True)
            self._fold = torch.empty(self.size, dtype=torch.int64)
            self._fold[by_label] = torch.arange(self.size) % k

    def __len__(self) -> int:
        return self.k

    def __getitem__(self, fold: int) -> tuple[Tree, Tree]:
        if not -self.k <= fold < self.k:
            raise IndexError(f"KFold: there is no fold {fold}, expected 0 to {self.k - 1}")
        held_out = self._fold == fold % self.k
        return self._take(self._order[~held_out]), self._take(self._order[held_out])

    def __iter__(self) -> Iterator[tuple[Tree, Tree]]:
        return (self[fold] for fold in range(self.k))

    def __repr__(self) -> str:
        return f"KFold({self.size} examples, {self.k} folds)"

    def _take(self, index: Tensor) -> Tree:
        def one(leaf: Tensor | np.ndarray) -> Tensor | np.ndarray:
            return leaf.index_select(0, index.to(leaf.device)) if isinstance(leaf, Tensor) else leaf[index.numpy()]

        return tree.map(one, self._data)


def _common_length(data: Tree) -> int:
    lengths = {}
    for path, leaf in tree.paths(data).items():
        if not isinstance(leaf, Tensor | np.ndarray) or leaf.ndim == 0:
            what = "a single number" if isinstance(leaf, Tensor | np.ndarray) else type(leaf).__name__
            raise TypeError(
                f"KFold: {f'leaf {path!r} of data' if path else 'data'} is {what}, expected a tensor or numpy array "
                f"with a first axis over the examples; for indices give torch.arange(n)"
            )
        lengths[path] = len(leaf)
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"KFold: the leaves of data have the lengths {lengths} along the first axis, expected one length for all"
        )
    return next(iter(lengths.values()))


def _labels(stratify: Tensor | np.ndarray, size: int) -> Tensor:
    if isinstance(stratify, np.ndarray) and stratify.dtype.kind not in "biuf":
        raise TypeError(
            f"KFold: stratify has dtype {stratify.dtype}, expected integer labels; "
            "np.unique(labels, return_inverse=True)[1] numbers them"
        )
    labels = torch.as_tensor(stratify).cpu()
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"KFold: stratify has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected one integer label for "
            f"each of the {size} examples: ({size},)"
        )
    return labels
