"""Operators made of operators: sums, multiples, products, and the identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fnn import tree
from fnn.diff.operators._operator import LinearOperator


class IdentityOperator(LinearOperator):
    """The identity on the space of a tree: `H + 0.1 * IdentityOperator(params)` is a damped H.

    Example:
        >>> from fnn.diff.operators import IdentityOperator
        >>> (2 * IdentityOperator({"w": torch.ones(2)})).to_dense()
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(self, domain: Any) -> None:
        super().__init__(lambda v: v, domain, symmetric=True)


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        for side, ours, theirs in (
            ("domain", left.domain, right.domain),
            ("codomain", left.codomain, right.codomain),
        ):
            tree.check_like(ours, theirs, f"{left} + {right}: the second {side}")
        self._parts = left, right
        chunk = _smallest_chunk([left, right])
        self._set_spaces(left.domain, left.codomain, left.symmetric and right.symmetric, chunk)

    def _vector(self, v: Tensor) -> Tensor:
        return self._parts[0]._vector(v) + self._parts[1]._vector(v)

    def _block(self, columns: Tensor) -> Tensor:
        return self._parts[0]._block(columns) + self._parts[1]._block(columns)

    def _transpose(self) -> LinearOperator:
        return Sum(self._parts[0].T, self._parts[1].T)

    def compile(self) -> LinearOperator:
        return Sum(self._parts[0].compile(), self._parts[1].compile())


class Scaled(LinearOperator):
    """A times a number."""

    def __init__(self, operator: LinearOperator, scalar: Any) -> None:
        self._operator, self._scalar = operator, scalar
        self._set_spaces(operator.domain, operator.codomain, operator.symmetric, operator.chunk_size)

    def _vector(self, v: Tensor) -> Tensor:
        return self._scalar * self._operator._vector(v)

    def _block(self, columns: Tensor) -> Tensor:
        return self._scalar * self._operator._block(columns)

    def _transpose(self) -> LinearOperator:
        return Scaled(self._operator.T, self._scalar)

    def compile(self) -> LinearOperator:
        return Scaled(self._operator.compile(), self._scalar)


class Product(LinearOperator):
    """A @ B @ ..., symmetric where it reads the same transposed, as J.T @ H @ J does."""

    def __init__(self, factors: list[LinearOperator]) -> None:
        self._factors = [part for factor in factors for part in getattr(factor, "_factors", [factor])]
        for left, right in zip(self._factors[:-1], self._factors[1:], strict=True):
            tree.check_like(left.domain, right.codomain, f"{left} @ {right}: the second codomain")
        symmetric = all([a.T is b for a, b in zip(self._factors, self._factors[::-1], strict=True)])
        chunk = _smallest_chunk(self._factors)
        self._set_spaces(self._factors[-1].domain, self._factors[0].codomain, symmetric, chunk)

    def _vector(self, v: Tensor) -> Tensor:
        for factor in reversed(self._factors):
            v = factor._vector(v.to(factor.dtype))
        return v.to(self.dtype)

    def _block(self, columns: Tensor) -> Tensor:
        for factor in reversed(self._factors):
            columns = factor._block(columns.to(factor.dtype))
        return columns.to(self.dtype)

    def _transpose(self) -> LinearOperator:
        return Product([factor.T for factor in reversed(self._factors)])

    def compile(self) -> LinearOperator:
        compiled = {id(factor): factor.compile() for factor in self._factors}
        for factor in self._factors:
            if not factor.symmetric and id(factor.T) in compiled:
                compiled[id(factor.T)] = compiled[id(factor)].T
        return Product([compiled[id(factor)] for factor in self._factors])


def _smallest_chunk(operators: list[LinearOperator]) -> int | None:
    sizes = [operator.chunk_size for operator in operators if operator.chunk_size is not None]
    return min(sizes) if sizes else None
