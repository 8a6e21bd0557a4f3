"""Linear systems with symmetric operators: conjugate gradients and MINRES, for all right-hand sides at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fnn.diff.operators._lanczos import check_symmetric

if TYPE_CHECKING:
    from fnn.diff.operators._operator import LinearOperator


@torch.no_grad()
def solve(
    operator: LinearOperator,
    b: Tensor,
    method: str,
    rtol: float,
    maxiter: int | None,
    preconditioner: LinearOperator | None,
) -> Tensor:
    """See `LinearOperator.solve`; b: (n, k)."""
    n = check_symmetric("solve", operator)
    if method not in ("cg", "minres"):
        raise ValueError(f"solve: method must be 'cg' or 'minres', got {method!r}")
    if b.shape[0] != n:
        raise ValueError(f"solve: {operator} needs a b of length {n}, got {tuple(b.shape)}")
    if b.dtype != operator.dtype:
        raise TypeError(f"solve: b is {b.dtype}, expected {operator.dtype}; convert it with .to(A.dtype)")
    if preconditioner is not None and preconditioner.shape != operator.shape:
        raise ValueError(f"solve: the preconditioner is {preconditioner}, expected the shape of {operator}")
    limit = min(10 * n, 1000) if maxiter is None else maxiter
    goal = rtol * b.norm(dim=0)
    x = torch.zeros_like(b)
    residual, used, before = b, 0, float("inf")
    # The residual that an iteration carries along drifts from the true one, so each round ends with the true one, and
    # a further round goes on from there.
    while not bool((residual.norm(dim=0) <= goal).all()):
        left = float((residual.norm(dim=0) / b.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)).max())
        if used >= limit or not left < before / 2:
            reason = f"maxiter={limit} iterations" if used >= limit else f"{used} iterations no more is gained, and"
            raise RuntimeError(
                f"solve: {method} did not converge: after {reason} the residual is {left:.1e} of b, more than "
                f"rtol={rtol:.1e}; give a preconditioner, damping, float64, a larger maxiter or rtol"
            )
        before = left
        rounds = _cg if method == "cg" else _minres
        step = torch.zeros_like(b)
        for step, estimate in rounds(operator, residual, preconditioner, goal):  # noqa: B007
            used += 1
            if used >= limit or bool((estimate <= goal).all()):
                break
        x = x + step
        residual = b - operator @ x
    return x


def _cg(
    operator: LinearOperator, b: Tensor, preconditioner: LinearOperator | None, goal: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x and the norm of the residual that the iteration carries along, per column."""
    x, residual = torch.zeros_like(b), b
    direction = z = residual if preconditioner is None else preconditioner @ residual
    rho = (residual * z).sum(0)
    while True:
        active = residual.norm(dim=0) > goal
        image = operator @ direction
        curvature = (direction * image).sum(0)
        if bool((active & ((curvature <= 0) | (rho <= 0))).any()):
            lowest = float((curvature / (direction * direction).sum(0))[active].min())
            which = "the operator" if lowest <= 0 else "the preconditioner"
            raise ValueError(
                f"solve: cg needs positive definite operators, but {which} is not: {operator} has curvature "
                f"{lowest:.1e} along a direction; use method='minres', or damping="
            )
        alpha = torch.where(active, rho / torch.where(active, curvature, 1.0), 0.0)
        x = x + alpha * direction
        residual = residual - alpha * image
        yield x, residual.norm(dim=0)
        z = residual if preconditioner is None else preconditioner @ residual
        rho, last = (residual * z).sum(0), rho
        direction = z + torch.where(active, rho / torch.where(active, last, 1.0), 0.0) * direction


def _minres(
    operator: LinearOperator, b: Tensor, preconditioner: LinearOperator | None, goal: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x and the norm of its residual (in the preconditioner's norm, scaled to that of b), per column."""
    x, search, search_last = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    # Lanczos: `raw` before and `z` after the preconditioner, of length beta; coupling is beta as an entry of the
    # tridiagonal matrix, which has none above its first row.
    raw_last, raw = torch.zeros_like(b), b
    z = b if preconditioner is None else preconditioner @ b
    beta = _length(b, z)
    beta_last, coupling, largest = torch.ones_like(beta), torch.zeros_like(beta), torch.zeros_like(beta)
    # Two rotations are remembered; `target` is the right-hand side's entry below the triangle: the residual's length.
    cosine_last, sine_last, cosine, sine = (torch.full_like(beta, value) for value in (1.0, 0.0, 1.0, 0.0))
    target, unit = beta, torch.where(beta > 0, b.norm(dim=0) / torch.where(beta > 0, beta, 1.0), 0.0)
    active = torch.ones_like(beta, dtype=torch.bool)
    precision = torch.finfo(b.dtype).eps
    while True:
        active = active & (beta > precision * largest) & (target.abs() * unit > goal)
        scale = torch.where(active, 1 / torch.where(active, beta, 1.0), 0.0)
        v = z * scale
        raw_next = operator @ v - torch.where(active, beta / beta_last, 0.0) * raw_last
        alpha = (v * raw_next).sum(0)
        raw_next = torch.where(active, raw_next - alpha * scale * raw, 0.0)
        z = raw_next if preconditioner is None else preconditioner @ raw_next
        beta_next = _length(raw_next, z)
        largest = torch.maximum(largest, torch.maximum(beta_next, alpha.abs()))

        above = sine_last * coupling
        middle = cosine * cosine_last * coupling + sine * alpha
        below = -sine * cosine_last * coupling + cosine * alpha
        length = torch.hypot(below, beta_next)
        active = active & (length > precision * largest)
        safe = torch.where(active, length, 1.0)
        cosine_last, sine_last, cosine, sine = cosine, sine, below / safe, beta_next / safe
        search_last, search = search, (v - above * search_last - middle * search) / safe
        x = x + torch.where(active, cosine * target, 0.0) * search
        target = torch.where(active, -sine * target, target)
        yield x, target.abs() * unit
        if not bool(active.any()):
            return
        raw_last, raw = raw, raw_next
        beta_last, beta, coupling = torch.where(active, beta, 1.0), beta_next, beta_next


def _length(raw: Tensor, z: Tensor) -> Tensor:
    square = (raw * z).sum(0)
    if bool((square < -torch.finfo(square.dtype).eps * (raw.norm(dim=0) * z.norm(dim=0))).any()):
        raise ValueError("solve: the preconditioner is not positive definite")
    return square.clamp_min(0).sqrt()
