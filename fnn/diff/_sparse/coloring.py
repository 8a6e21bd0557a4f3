"""Groups of columns (or rows) that one product recovers together.

Gebremedhin, Manne, Pothen: What color is your Jacobian? Graph coloring for computing derivatives. SIAM Review 47, 2005.
A set of colors is a Python integer, one bit a color, so that the colors a vertex must avoid are one bitwise "or".
"""

from __future__ import annotations

import numpy as np

from fnn.diff._sparse.pattern import SparsityPattern

_ROUNDS = 8


def color_columns(pattern: SparsityPattern) -> np.ndarray:
    """(n,) colors from 0 such that no two columns of one color share a row.

    Greedy, the columns that meet most others first, then improved by coloring whole color classes again in another
    order (Culberson's iterated greedy), which never takes more colors.
    """
    rows_of = _lists(pattern.T)
    row_sizes = np.diff(pattern.starts)
    crowd = np.bincount(pattern.cols, weights=row_sizes[pattern.rows], minlength=pattern.shape[1])
    fewest = int(row_sizes.max(initial=0))
    orders = [np.argsort(-crowd, kind="stable"), np.arange(pattern.shape[1])]
    best = min((_greedy(rows_of, order, pattern.shape[0]) for order in orders), key=_count)
    for round_ in range(_ROUNDS):
        if _count(best) <= max(fewest, 1):
            break
        # classes in reverse, or largest first, by turns
        sizes = np.bincount(best)
        key = -best if round_ % 2 == 0 else -sizes[best] * (len(sizes) + 1) + best
        best = _greedy(rows_of, np.argsort(key, kind="stable"), pattern.shape[0])
    return best


def color_rows(pattern: SparsityPattern) -> np.ndarray:
    """(m,) colors from 0 such that no two rows of one color share a column."""
    return color_columns(pattern.T)


def color_symmetric(pattern: SparsityPattern) -> np.ndarray:
    """(n,) colors of a star coloring: neighbours differ, and every path of four vertices has three colors or more.

    Every entry of the symmetric matrix can then be read from one product, its own or its mirror image's.
    pattern: symmetric. Greedy, vertices with most neighbours first.
    """
    n = pattern.shape[0]
    off = pattern.rows != pattern.cols
    neighbours = _split(pattern.cols[off], np.bincount(pattern.rows[off], minlength=n))
    colors = [-1] * n
    seen = [0] * n  # the colors among a vertex's neighbours
    leaves: list[dict[int, list[int]]] = [{} for _ in range(n)]  # by color: the neighbours that have it
    hubs = [0] * n  # the colors of neighbours that see this vertex's color on another neighbour too
    sizes = np.array([len(each) for each in neighbours], dtype=np.int64)
    for v in np.argsort(-sizes, kind="stable").tolist():
        forbidden = seen[v]
        for w in neighbours[v]:
            if colors[w] >= 0:
                # v between two neighbours of one color, or at the end of a path that begins w, hub, leaf
                forbidden |= seen[w] if len(leaves[v][colors[w]]) > 1 else hubs[w]
        color = _lowest_free(forbidden)
        colors[v] = color
        for same in leaves[v].values():
            if len(same) > 1:
                for w in same:
                    hubs[w] |= 1 << color
        for w in neighbours[v]:
            seen[w] |= 1 << color
            same = leaves[w].setdefault(color, [])
            same.append(v)
            if colors[w] >= 0 and len(same) > 1:
                for each in same if len(same) == 2 else (v,):
                    hubs[each] |= 1 << colors[w]
    return np.array(colors, dtype=np.int64)


def _greedy(rows_of: list[list[int]], order: np.ndarray, rows: int) -> np.ndarray:
    taken = [0] * rows  # the colors of the columns in each row
    colors = np.zeros(len(rows_of), dtype=np.int64)
    for j in order.tolist():
        forbidden = 0
        for i in rows_of[j]:
            forbidden |= taken[i]
        color = _lowest_free(forbidden)
        colors[j] = color
        for i in rows_of[j]:
            taken[i] |= 1 << color
    return colors


def _lowest_free(forbidden: int) -> int:
    return (~forbidden & (forbidden + 1)).bit_length() - 1


def _count(colors: np.ndarray) -> int:
    return int(colors.max(initial=-1)) + 1


def _lists(pattern: SparsityPattern) -> list[list[int]]:
    """Of each row its columns."""
    return _split(pattern.cols, np.diff(pattern.starts))


def _split(values: np.ndarray, sizes: np.ndarray) -> list[list[int]]:
    ends = np.cumsum(sizes).tolist()
    flat = values.tolist()
    return [flat[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
