"""`bilaplacian`: the Laplacian of the Laplacian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fnn.diff._arguments import Argnums
from fnn.diff._laplacian import laplacian


def bilaplacian(f: Callable[..., Any], argnums: Argnums = 0, *, chunk_size: int | None = None) -> Callable[..., Any]:
    """The biharmonic operator: for each element of the output, the sum over i, j of d^4 f / (d x_i^2 d x_j^2).

    `bilaplacian(f)(x)` has the structure and shapes of `f(x)`; x is a tensor or a tree of n elements in all. It is
    `laplacian` of `laplacian`; where `f` consists of layers, products and activations both are forward passes, of
    which the outer one carries the derivatives of the inner one along: about n^2 values for each value of `f`.
    chunk_size: how many directions at once, in each of the two; all by default.

    Raises what `laplacian` raises.

    Example:
        >>> fnn.bilaplacian(lambda x: (x**4).sum())(torch.tensor([1.0, 2.0]))
        tensor(48.)

    Source: Dangel, Siebert, Zeinhofer and Walther, Collapsing Taylor mode automatic differentiation, 2025, which
    saves more by passing on sums of the fourth derivatives.
    """
    return laplacian(laplacian(f, argnums, chunk_size=chunk_size), argnums, chunk_size=chunk_size)
