"""What every loss shares: which values count, and how they become one number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def reduced(name: str, values: Tensor, reduction: str, counted: Tensor | None, shares: Tensor | None = None) -> Tensor:
    """Mean, sum or all of the values, of those `counted`; a mean divides by the sum of their `shares`, 1 by default."""
    check_reduction(name, reduction, REDUCTIONS)
    if counted is not None:
        values = torch.where(counted, values, 0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    check_not_empty(name, values.shape)
    if counted is None:
        return values.mean()
    total = counted.sum() if shares is None else widened(torch.where(counted, shares, 0)).sum()
    mean = widened(values).sum() / torch.where(total == 0, 1, total)
    return mean.to(values.dtype)


def expanded(name: str, where: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`where`, which speaks of the leading dimensions, in the full shape of the values."""
    if where is None:
        return None
    if not isinstance(where, Tensor) or where.dtype != torch.bool:
        got = where.dtype if isinstance(where, Tensor) else type(where).__name__
        raise TypeError(f"{name}: where must be a bool tensor, got {got}")
    if where.shape != shape[: where.ndim]:
        raise ValueError(
            f"{name}: where has shape {tuple(where.shape)}, expected {tuple(shape)} or its leading dimensions"
        )
    return where.reshape(where.shape + (1,) * (len(shape) - where.ndim)).expand(shape)


def hidden(x: Tensor, counted: Tensor | None, axis: int | None = None) -> Tensor:
    """`x` with 1 in place of what does not count: in the domain of every loss, so that no derivative there is NaN."""
    if counted is None:
        return x
    return torch.where(counted if axis is None else counted.unsqueeze(axis), x, 1)


def check_reduction(name: str, reduction: str, allowed: tuple[str, ...]) -> None:
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, allowed))}, got {reduction!r}")


def check_not_empty(name: str, shape: torch.Size) -> None:
    if 0 in shape:
        raise ValueError(f"{name}: the mean of no values (shape {tuple(shape)}) is undefined; is the batch empty?")


def widened(x: Tensor) -> Tensor:
    """Sums of half-precision numbers are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
