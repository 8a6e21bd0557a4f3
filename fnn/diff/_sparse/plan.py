"""Which products recover a matrix of a known pattern, and where in them each entry stands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fnn.diff._sparse.coloring import color_columns, color_rows, color_symmetric
from fnn.diff._sparse.pattern import SparsityPattern


@dataclass(frozen=True, eq=False)
class Plan:
    """mode: "fwd" for products with columns' seeds, "rev" with rows'. colors: of each column (or row).

    count: how many colors. places: (nnz,) positions of the pattern's entries in the products, (count, m) or (count, n),
    taken row after row.
    """

    mode: str
    colors: np.ndarray
    count: int
    places: np.ndarray


def plan_jacobian(pattern: SparsityPattern, modes: tuple[str, ...]) -> Plan:
    """With the fewest colors over `modes`, forward if equal."""
    plans = [_by_columns(pattern) if mode == "fwd" else _by_rows(pattern) for mode in modes]
    return min(plans, key=lambda plan: plan.count)


def plan_hessian(pattern: SparsityPattern, mode: str) -> Plan:
    """By a star coloring, with Hessian-vector products."""
    n = pattern.shape[0]
    colors = color_symmetric(pattern)
    count = _count(pattern, colors)
    rows, cols = pattern.rows, pattern.cols
    # H[i, j] stands alone in row i of the product of j's color, or else in row j of the product of i's
    seen, inverse = np.unique(rows * max(count, 1) + colors[cols], return_inverse=True)
    alone = np.bincount(inverse, minlength=len(seen))[inverse] == 1
    places = np.where(alone, colors[cols] * n + rows, colors[rows] * n + cols)
    return Plan(mode, colors, count, places)


def _by_columns(pattern: SparsityPattern) -> Plan:
    colors = color_columns(pattern)
    return Plan("fwd", colors, _count(pattern, colors), colors[pattern.cols] * pattern.shape[0] + pattern.rows)


def _by_rows(pattern: SparsityPattern) -> Plan:
    colors = color_rows(pattern)
    return Plan("rev", colors, _count(pattern, colors), colors[pattern.rows] * pattern.shape[1] + pattern.cols)


def _count(pattern: SparsityPattern, colors: np.ndarray) -> int:
    return int(colors.max(initial=-1)) + 1 if pattern.nnz else 0
