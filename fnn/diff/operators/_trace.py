"""Traces and diagonals of operators, exact and estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fnn import random

if TYPE_CHECKING:
    from fnn.diff.operators._operator import LinearOperator


@torch.no_grad()
def trace(operator: LinearOperator, method: str, key: Tensor | None, samples: int | None) -> Tensor:
    """See `LinearOperator.trace`."""
    n = check_square("trace", operator)
    if method == "exact":
        return _exact_diagonal(operator).sum()
    methods = {"hutchinson": (_hutchinson, 1), "hutch++": (_hutch_plus_plus, 3), "xtrace": (_xtrace, 2)}
    if method not in methods:
        raise ValueError(f"trace: method must be 'exact', 'hutchinson', 'hutch++' or 'xtrace', got {method!r}")
    estimate, share = methods[method]
    checked_key, count = _check_samples(f"trace(method={method!r})", key, samples, share, n)
    return estimate(operator, checked_key, count)


@torch.no_grad()
def diag(operator: LinearOperator, method: str, key: Tensor | None, samples: int | None) -> Tensor:
    """See `LinearOperator.diag`."""
    n = check_square("diag", operator)
    if method == "exact":
        return _exact_diagonal(operator)
    methods = {"hutchinson": (_hutchinson_diagonal, 1), "xdiag": (_xdiag, 2)}
    if method not in methods:
        raise ValueError(f"diag: method must be 'exact', 'hutchinson' or 'xdiag', got {method!r}")
    estimate, share = methods[method]
    checked_key, count = _check_samples(f"diag(method={method!r})", key, samples, share, n)
    return estimate(operator, checked_key, count)


def check_square(name: str, operator: LinearOperator) -> int:
    """The size n of an operator of shape (n, n); raises `ValueError` for another shape."""
    m, n = operator.shape
    if m != n:
        raise ValueError(f"{name}: expected a square operator, got {operator}; A.T @ A and A @ A.T are square")
    return n


def rademacher(operator: LinearOperator, key: Tensor, columns: int) -> Tensor:
    """`(n, columns)` signs, each +1 or -1 with probability one half."""
    signs = random.bernoulli(key, 0.5, (operator.shape[1], columns))
    return signs.to(device=operator.device, dtype=operator.dtype) * 2 - 1


def _check_samples(name: str, key: Tensor | None, samples: int | None, share: int, n: int) -> tuple[Tensor, int]:
    if key is None:
        raise ValueError(f"{name} draws random vectors and needs a key: key=fnn.random.key(0)")
    random.check_key(key)
    if not isinstance(samples, int) or samples < share or samples % share:
        multiple = f", a multiple of {share}" if share > 1 else ""
        raise ValueError(f"{name}: samples must be a number of products{multiple}, got {samples!r}")
    if share > 1 and samples // share > n:
        raise ValueError(
            f"{name}: {samples} products span more than the {n} dimensions there are; take at most {share * n}, "
            "or method='exact'"
        )
    return key, samples


def _exact_diagonal(operator: LinearOperator) -> Tensor:
    n, chunk = operator.shape[1], operator.columns_at_once()
    parts = []
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        units = torch.zeros(n, size, dtype=operator.dtype, device=operator.device)
        units.diagonal(-start).fill_(1)
        parts.append((operator @ units).diagonal(-start))
    return torch.cat(parts)


def _hutchinson(operator: LinearOperator, key: Tensor, samples: int) -> Tensor:
    return _hutchinson_diagonal(operator, key, samples).sum()


def _hutchinson_diagonal(operator: LinearOperator, key: Tensor, samples: int) -> Tensor:
    signs = rademacher(operator, key, samples)
    return (signs * (operator @ signs)).mean(1)


def _hutch_plus_plus(operator: LinearOperator, key: Tensor, samples: int) -> Tensor:
    # A third of the products finds the range, a third gives the trace in it, a third estimates the rest.
    third = samples // 3
    range_key, rest_key = random.split(key)
    basis = torch.linalg.qr(operator @ rademacher(operator, range_key, third)).Q
    inside = (basis * (operator @ basis)).sum()
    rest = rademacher(operator, rest_key, third)
    rest = rest - basis @ (basis.T @ rest)
    return inside + (rest * (operator @ rest)).sum() / third


def _xtrace(operator: LinearOperator, key: Tensor, samples: int) -> Tensor:
    # Each vector in turn estimates what the range of the others leaves; Q is projected to leave it out.
    n, count = operator.shape[1], samples // 2
    tests = random.normal(key, (n, count), operator.dtype).to(operator.device)
    products = operator @ tests
    q, r, left_out = _leave_one_out(products)
    image = operator @ q
    h, coordinates = q.T @ image, q.T @ tests
    inside = h.trace() - (left_out * (h @ left_out)).sum(0)
    within = coordinates - left_out * (left_out * coordinates).sum(0)
    rest = (
        (tests * products).sum(0)
        - (within * (image.T @ tests)).sum(0)
        - (within * r).sum(0)
        + (within * (h @ within)).sum(0)
    )
    # Outside of the range the direction of a test vector is uniform; its length is normalised, so it adds no variance.
    whole = (tests * tests).sum(0)
    length = whole - (within * within).sum(0)
    # Where the products depend on each other nothing of a vector may be left, nor of A.
    left = length > n * torch.finfo(whole.dtype).eps * whole
    outside = torch.where(left, rest / torch.where(left, length, 1.0), 0.0)
    return (inside + (n - count + 1) * outside).mean()


def _xdiag(operator: LinearOperator, key: Tensor, samples: int) -> Tensor:
    count = samples // 2
    signs = rademacher(operator, key, count)
    q, r, left_out = _leave_one_out(operator @ signs)
    back = operator.T @ q
    directions = q @ left_out
    inside = (q * back).sum(1) - (directions * (back @ left_out)).sum(1) / count
    return inside + (signs * directions * (left_out * r).sum(0)).mean(1)


def _leave_one_out(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R of the products, and (columns) the direction within Q that is lost when a product is left out."""
    q, r = torch.linalg.qr(products)
    # Of products that depend on each other R is singular; the directions then lie outside of their span, where A is 0.
    pivots = r.diagonal()
    largest = pivots.abs().amax()
    smallest = torch.where(largest > 0, torch.finfo(r.dtype).eps * largest, 1.0)
    pivots = torch.where(pivots.abs() < smallest, smallest, pivots)
    r_regular = r.triu(1) + torch.diag(pivots)
    identity = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(r_regular, identity, upper=True)
    return q, r, inverse.T / inverse.T.norm(dim=0)
