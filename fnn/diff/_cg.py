"""`cg`: conjugate gradients as a pure function of tensors, for use inside of transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cg(matvec: Callable[[Tensor], Tensor], b: Tensor, *, steps: int | None = None, rtol: float | None = None) -> Tensor:
    """x with `matvec(x) = b`, for a symmetric positive definite matrix, by conjugate gradients.

    b, and the result: (n,). It takes `steps` steps, 2 n by default, and stops moving once the residual is `rtol` times
    the norm of b (by default machine epsilon to the power 2/3). Where it has not come so far the result is NaN. It is
    made for `implicit_diff(..., solve=fnn.cg)`: nothing in it depends on values, so `vmap` and the compiler take it,
    the steps unrolled. `LinearOperator.solve` ends early, and reports, outside of transforms.

    Example:
        >>> fnn.cg(lambda x: torch.tensor([2.0, 4.0]) * x, torch.tensor([2.0, 2.0]))
        tensor([1.0000, 0.5000])

    Source: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952.
    """
    if b.dim() != 1 or not b.is_floating_point():
        raise ValueError(f"cg: b must be a floating-point vector (n,), got {b.dtype} of shape {tuple(b.shape)}")
    tolerance = torch.finfo(b.dtype).eps ** (2 / 3) if rtol is None else rtol
    x, residual, direction = torch.zeros_like(b), b, b
    squared = (b * b).sum()
    goal = tolerance**2 * squared
    for _ in range(2 * b.numel() if steps is None else steps):
        moving = squared > goal
        image = matvec(direction)
        length = torch.where(moving, squared / torch.where(moving, (direction * image).sum(), 1), 0)
        x, residual = x + length * direction, residual - length * image
        before, squared = squared, (residual * residual).sum()
        direction = residual + torch.where(moving, squared / torch.where(moving, before, 1), 0) * direction
    return torch.where(squared <= goal, x, torch.nan)
