"""Colorings against their definitions, and against the known fewest colors of matrices of simple shape."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnn.diff._sparse.coloring import color_columns, color_rows, color_symmetric
from fnn.diff._sparse.pattern import SparsityPattern


def pattern(dense):
    return SparsityPattern.of(np.asarray(dense, bool))


def count(colors):
    return int(colors.max()) + 1


def grid(n):
    """The 5-point stencil on an n x n grid without wrap-around."""
    line = np.eye(n, k=1) + np.eye(n, k=-1)
    return np.kron(line, np.eye(n)) + np.kron(np.eye(n), line) + np.eye(n * n)


def arrow(n):
    dense = np.eye(n)
    dense[0] = dense[:, 0] = 1
    return dense


def band(n, width):
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= width


@pytest.mark.parametrize(
    ("dense", "columns", "symmetric"),
    [
        (np.eye(9), 1, 1),
        (band(12, 1), 3, 3),
        (band(15, 2), 5, 5),
        (np.ones((6, 6)), 6, 6),
        (arrow(10), 10, 2),
        (np.zeros((4, 4)), 1, 1),
    ],
    ids=["diagonal", "tridiagonal", "pentadiagonal", "dense", "arrowhead", "empty"],
)
def test_the_fewest_colors(dense, columns, symmetric):
    assert count(color_columns(pattern(dense))) == columns
    assert count(color_rows(pattern(dense))) == columns
    assert count(color_symmetric(pattern(dense))) == symmetric


def test_a_stencil_needs_fewer_colors_by_stars():
    # 5 is the least for columns: a point and its four neighbours are pairwise in one row
    columns, stars = (count(color(pattern(grid(10)))) for color in (color_columns, color_symmetric))
    assert 5 <= columns <= 8
    assert stars <= 6


def test_one_dense_row_costs_columns_everything_and_rows_two():
    dense = np.eye(8)
    dense[3] = 1
    assert count(color_columns(pattern(dense))) == 8
    assert count(color_rows(pattern(dense))) == 2


matrices = st.integers(1, 8).flatmap(
    lambda m: st.integers(1, 8).flatmap(
        lambda n: st.lists(st.booleans(), min_size=m * n, max_size=m * n).map(lambda b: np.array(b).reshape(m, n))
    )
)


@settings(max_examples=200, deadline=None)
@given(matrices)
def test_columns_of_one_color_share_no_row(dense):
    colors = color_columns(pattern(dense))
    for color in range(count(colors)):
        assert dense[:, colors == color].sum(1).max(initial=0) <= 1
    assert count(colors) >= dense.sum(1).max()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.booleans(), min_size=n * n, max_size=n * n)))
def test_a_star_coloring_leaves_no_path_of_four_in_two_colors(bits):
    n = int(len(bits) ** 0.5)
    dense = np.array(bits).reshape(n, n)
    dense = dense | dense.T
    colors = color_symmetric(pattern(dense))
    for i, j in itertools.combinations(range(n), 2):
        assert not dense[i, j] or colors[i] != colors[j]
    for a, b, c, d in itertools.permutations(range(n), 4):
        if dense[a, b] and dense[b, c] and dense[c, d]:
            assert len({colors[a], colors[b], colors[c], colors[d]}) >= 3


def test_against_networkx_on_a_random_graph():
    networkx = pytest.importorskip("networkx")
    rng = np.random.default_rng(0)
    dense = rng.random((60, 60)) < 0.05
    graph = networkx.from_numpy_array((dense.T.astype(int) @ dense > 0) & ~np.eye(60, dtype=bool))
    theirs = networkx.greedy_color(graph, strategy="largest_first")
    assert count(color_columns(pattern(dense))) <= max(theirs.values()) + 1
