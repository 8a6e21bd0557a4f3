"""What the forward pass carries for each value: its Jacobian and its Laplacian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Unsupported(Exception):
    """The pass met something that has no rule; its text says what."""


class Carried:
    """A value with its first derivatives along every direction, and the sum of the second ones.

    value: any shape. jacobian: (directions, *shape). laplacian: of the value's shape, or None for zero.
    """

    def __init__(self, value: Tensor, jacobian: Tensor, laplacian: Tensor | None) -> None:
        self.value = value
        self.jacobian = jacobian
        self.laplacian = laplacian

    def rows(self, dims: int) -> Tensor:
        """The Jacobian, ready to broadcast against values of `dims` axes."""
        missing = dims - self.value.dim()
        if missing <= 0:
            return self.jacobian
        return self.jacobian.reshape(self.jacobian.shape[0], *[1] * missing, *self.value.shape)


Operand = Carried | Tensor | float | int | bool | complex


def result(value: Tensor, jacobian: Tensor, laplacian: Tensor | None) -> Carried:
    """A `Carried` of one shape and dtype, those of `value`: torch promotes numbers and 0-d tensors by their rank."""
    if not value.is_floating_point():
        raise Unsupported(f"a result of {value.dtype}")
    shape = (jacobian.shape[0], *value.shape)
    jacobian = jacobian.to(value.dtype)
    jacobian = jacobian if jacobian.shape == shape else jacobian.expand(shape)
    if laplacian is not None:
        laplacian = laplacian.to(value.dtype)
        laplacian = laplacian if laplacian.shape == value.shape else laplacian.expand(value.shape)
    return Carried(value, jacobian, laplacian)


def values(x: Operand) -> Tensor:
    return x.value if isinstance(x, Carried) else x  # type: ignore[return-value]


def total(terms: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of the terms that are not None, or None."""
    out = None
    for term in terms:
        if term is not None:
            out = term if out is None else out + term
    return out


def zeros(x: Tensor) -> Tensor:
    """Zeros of a tensor's shape that no `vmap` has batched."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
