"""Operators that are a mean or a sum over data: one batch, or every batch of a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fnn import tree
from fnn.diff._composed import by_operators
from fnn.diff._purity import call
from fnn.diff.operators._operator import LinearOperator
from fnn.diff.operators._vectors import check_real, over_columns

Reduction = Literal["mean", "sum"]


class DataOperator(LinearOperator):
    """An operator over the parameters whose product is a weighted sum over batches."""

    def __init__(
        self,
        product: Callable[..., Any],
        params: Any,
        data: tuple[Any, ...],
        loader: Iterable[Any] | None,
        reduction: Reduction,
        chunk_size: int | None,
    ) -> None:
        name = type(self).__name__
        check_real(name, params, "params")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {reduction!r}")
        if loader is not None and data:
            raise ValueError(f"{name}: expected one batch, as arguments, or loader=, got both")
        self._set_spaces(params, params, True, chunk_size)
        self._data, self._loader, self._weights = data, loader, [1.0]
        if loader is not None:
            sizes = _sizes_of_two_passes(name, loader)
            total = sum(sizes) if reduction == "mean" else 1
            self._weights = [size / total if reduction == "mean" else 1.0 for size in sizes]
        self._apply_transposed = None

        def without_fused_attention(v: Any, *batch: Any) -> Any:
            with by_operators():
                return product(v, *batch)

        self._product = self._of_trees(without_fused_attention)
        self._block_product = over_columns(self._product)

    def _vector(self, v: Tensor) -> Tensor:
        return self._over_batches(self._product, v)

    def _block(self, columns: Tensor) -> Tensor:
        return self._over_batches(self._block_product, columns)

    def _over_batches(self, product: Callable[..., Tensor], v: Tensor) -> Tensor:
        name = type(self).__name__
        if self._loader is None:
            return call(name, product, v, *next(self._batches()))
        total = torch.zeros_like(v)
        for weight, batch in zip(self._weights, self._batches(), strict=True):
            total = total + weight * call(name, product, v, *batch)
        return total

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        return iter([self._data]) if self._loader is None else map(as_arguments, self._loader)


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """A batch of a loader as arguments: the members of a tuple or list, or the batch itself."""
    plain = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
    return tuple(batch) if plain else (batch,)


def _sizes_of_two_passes(name: str, loader: Iterable[Any]) -> list[int]:
    """The sizes of the batches; raises `ValueError` unless a second pass gives the same batches."""
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name}: loader must be an iterable of batches, got {type(loader).__name__}")
    if iter(loader) is loader:
        raise ValueError(
            f"{name}: the loader ends after one pass, and every product needs one; pass a list or a loader"
        )
    sizes, first = [], []
    for batch in loader:
        leaves = [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]
        if not leaves or leaves[0].ndim == 0:
            raise ValueError(f"{name}: batch {len(sizes)} of the loader has no leading axis of examples")
        sizes.append(leaves[0].shape[0])
        first.append(_fingerprint(leaves))
    if not sizes:
        raise ValueError(f"{name}: the loader has no batches")
    second = [_fingerprint([leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]) for batch in loader]
    if first != second:
        index = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))
        raise ValueError(
            f"{name}: two passes over the loader differ, first in batch {index}; every product needs the same batches, "
            "so turn off shuffling and augmentation, or pass list(loader)"
        )
    return sizes


def _fingerprint(leaves: list[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for leaf in leaves:
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.digest()
