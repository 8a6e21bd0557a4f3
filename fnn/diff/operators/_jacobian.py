"""The Jacobian as a linear operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fnn._rules._checks import check_function
from fnn.diff._purity import call
from fnn.diff._transforms import pushforward
from fnn.diff.operators._operator import LinearOperator
from fnn.diff.operators._vectors import check_real


class JacobianOperator(LinearOperator):
    """The Jacobian of f at x: `J @ v` is a Jacobian-vector product, `J.T @ w` a vector-Jacobian product.

    Args:
        f: a function of one tree of tensors, with a tree of tensors as its value.
        x: the point. The Jacobian is `(m, n)`: m elements of f(x), n of x, in the order of `fnn.tree`'s leaves.
        chunk_size: as in `LinearOperator`.

    Raises `TypeError` for leaves of x or f(x) that are not real floating tensors, `ValueError` where f is random.

    Example:
        >>> from fnn.diff.operators import JacobianOperator
        >>> J = JacobianOperator(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> J @ torch.ones(2), J.T.shape
        (tensor([2., 4.]), (2, 2))
    """

    def __init__(self, f: Callable[[Any], Any], x: Any, *, chunk_size: int | None = None) -> None:
        check_real("JacobianOperator", x, "x")
        check_function("JacobianOperator", f)
        value = call("JacobianOperator", f, x)

        def forward(v: Any) -> Any:
            return pushforward("JacobianOperator", f, (x,), (v,), False)[1]

        def backward(w: Any) -> Any:
            return torch.func.vjp(f, x)[1](w)[0]

        super().__init__(forward, x, value, transpose=backward, chunk_size=chunk_size)
