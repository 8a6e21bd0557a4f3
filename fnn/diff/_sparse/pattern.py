"""Which entries of a matrix may differ from zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SparsityPattern:
    """The places of a matrix that may hold a nonzero, sorted by row and then by column.

    shape: (m, n). rows, cols: (nnz,) int64 arrays. conservative: names of operations whose dependence was not known, so
    that everything was assumed to depend on everything; rows and cols then hold more than they need to.

    Example:
        >>> pattern = SparsityPattern.of(torch.eye(3))
        >>> pattern, pattern.cols
        (SparsityPattern(3x3, nnz=3), array([0, 1, 2]))
    """

    shape: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray
    conservative: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, value: Any, shape: tuple[int, int] | None = None) -> SparsityPattern:
        """A pattern from a SciPy or torch sparse matrix, a dense matrix (nonzero: True), or `(rows, cols)` and a shape.

        Stored zeros of a sparse matrix belong to the pattern. Raises `TypeError` or `ValueError` for anything else.
        """
        if isinstance(value, cls):
            found = value
        else:
            if isinstance(value, tuple) and len(value) == 2:
                if shape is None:
                    raise ValueError("pattern: (rows, cols) needs shape=(m, n), which they do not say")
                size, (rows, cols) = shape, (_indices(each) for each in value)
            elif isinstance(value, Tensor) and value.layout != torch.strided:
                size, (rows, cols) = _matrix_shape(value), value.detach().to_sparse_coo()._indices().cpu().numpy()
            elif isinstance(value, Tensor | np.ndarray):
                dense = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
                size = _matrix_shape(dense)
                rows, cols = np.nonzero(dense)
            elif (to_coo := getattr(value, "tocoo", None)) is not None:
                coo = to_coo()
                size, rows, cols = _matrix_shape(value), coo.row, coo.col
            else:
                raise TypeError(
                    "pattern: expected a SparsityPattern, a SciPy or torch sparse matrix, a dense boolean matrix, or "
                    f"(rows, cols); got {type(value).__name__}"
                )
            found = sorted_pattern(size, rows, cols)
        if shape is not None and found.shape != tuple(shape):
            raise ValueError(f"pattern: has shape {found.shape}, but the derivative is {tuple(shape)}")
        return found

    @property
    def nnz(self) -> int:
        """How many entries may differ from zero."""
        return len(self.rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """(m + 1,): row i holds entries `starts[i]` to `starts[i + 1]`, as in the CSR format."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=self.shape[0]))]).astype(np.int64)

    @property
    def T(self) -> SparsityPattern:
        """The transposed pattern."""
        return sorted_pattern((self.shape[1], self.shape[0]), self.cols, self.rows, self.conservative)

    def is_symmetric(self) -> bool:
        """Whether every entry's mirror image is in the pattern."""
        other = self.T
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.cols, other.cols)

    def to_dense(self) -> Tensor:
        """(m, n) bools."""
        dense = torch.zeros(self.shape, dtype=torch.bool)
        dense[torch.from_numpy(self.rows), torch.from_numpy(self.cols)] = True
        return dense

    def __repr__(self) -> str:
        note = f", conservative at {', '.join(self.conservative)}" if self.conservative else ""
        return f"SparsityPattern({self.shape[0]}x{self.shape[1]}, nnz={self.nnz}{note})"


def sorted_pattern(shape: tuple[int, int], rows: Any, cols: Any, conservative: tuple[str, ...] = ()) -> SparsityPattern:
    """The pattern of entries in any order and of any multiplicity. Raises `ValueError` where they do not fit."""
    if rows.shape != cols.shape or rows.ndim != 1:
        raise ValueError(f"pattern: rows {rows.shape} and cols {cols.shape} must be vectors of one length")
    m, n = shape
    if rows.size and not (rows.min() >= 0 and rows.max() < m and cols.min() >= 0 and cols.max() < n):
        raise ValueError(
            f"pattern: rows {rows.min()}..{rows.max()} and cols {cols.min()}..{cols.max()} do not fit into {m}x{n}"
        )
    rows, cols = np.divmod(np.unique(rows.astype(np.int64) * n + cols), max(n, 1))
    return SparsityPattern((m, n), rows, cols, conservative)


def _indices(value: Any) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"pattern: rows and cols must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _matrix_shape(value: Any) -> tuple[int, int]:
    if len(value.shape) != 2:
        raise ValueError(f"pattern: expected a matrix, got shape {tuple(value.shape)}")
    return int(value.shape[0]), int(value.shape[1])
