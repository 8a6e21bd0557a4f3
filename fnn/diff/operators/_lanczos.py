"""Eigenvalues and log-determinants of symmetric operators, by Lanczos."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fnn import random
from fnn.diff.operators._trace import check_square, rademacher

if TYPE_CHECKING:
    from fnn.diff.operators._operator import LinearOperator


class Eigenpairs(NamedTuple):
    """What `eigsh` returns: `values` (k,), ascending, and `vectors` (n, k), one a column."""

    values: Tensor
    vectors: Tensor


def check_symmetric(name: str, operator: LinearOperator) -> int:
    """The size of a symmetric operator; raises `ValueError` for another one."""
    n = check_square(name, operator)
    if not operator.symmetric:
        raise ValueError(
            f"{name}: {operator} is not known to be symmetric; A.T @ A and A + A.T are, and "
            "LinearOperator(apply, domain, symmetric=True) says so of a map of your own"
        )
    return n


@torch.no_grad()
def eigsh(
    operator: LinearOperator, k: int, which: str, key: Tensor | None, rtol: float | None, maxiter: int
) -> Eigenpairs:
    """See `LinearOperator.eigsh`."""
    n = check_symmetric("eigsh", operator)
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"eigsh: k must be an int from 1 to {n}, the size of the operator, got {k!r}")
    if which not in ("LM", "LA", "SA"):
        raise ValueError(f"eigsh: which must be 'LM', 'LA' or 'SA', got {which!r}")
    precision = torch.finfo(operator.dtype).eps
    tolerance = precision**0.5 if rtol is None else rtol
    start = random.normal(random.key(0) if key is None else key, (n, k), operator.dtype).to(operator.device)
    basis, projected = start.new_zeros(n, 0), start.new_zeros(0, 0)
    block = torch.linalg.qr(start).Q
    residuals, scale = start.new_zeros(k), start.new_zeros(())
    for _ in range(maxiter):
        image = operator @ block
        if not image.isfinite().all():
            raise RuntimeError(f"eigsh: a product of {operator} is not finite")
        # A in the basis and the new block: exact products, not the three-term recurrence, so restarts fit in.
        basis = torch.cat([basis, block], 1)
        coupling = basis.T @ image
        old = projected.shape[0]
        projected = torch.cat([torch.cat([projected, coupling[:old].T], 0), coupling], 1)
        projected = (projected + projected.T) / 2
        values, rotations = torch.linalg.eigh(projected)
        order = _wanted_first(values, which)
        chosen = order[:k]
        scale = values.abs().amax()

        remainder = image - basis @ coupling
        remainder = remainder - basis @ (basis.T @ remainder)
        residuals = (remainder @ rotations[old:, chosen]).norm(dim=0)
        complete = basis.shape[1] == n
        if complete or (len(values) >= k and bool((residuals <= tolerance * scale).all())):
            ascending = chosen[values[chosen].argsort()]
            return Eigenpairs(values[ascending], basis @ rotations[:, ascending])

        if basis.shape[1] + k > max(6 * k, 40):
            kept = order[: max(3 * k, 20)]
            basis, projected = basis @ rotations[:, kept], torch.diag(values[kept])
        block = _next_block(remainder, basis, precision * scale * n**0.5)
    worst = float((residuals / scale).max())
    raise RuntimeError(
        f"eigsh: after maxiter={maxiter} products with {k} vectors the largest residual is {worst:.1e} of the largest "
        f"eigenvalue, more than rtol={tolerance:.1e}; raise maxiter or rtol, or ask for fewer or more eigenvalues"
    )


def _wanted_first(values: Tensor, which: str) -> Tensor:
    weights = {"LM": values.abs(), "LA": values, "SA": -values}[which]
    return weights.argsort(descending=True, stable=True)


def _next_block(remainder: Tensor, basis: Tensor, noise: Tensor) -> Tensor:
    """An orthonormal basis of what the products have outside of `basis`, without directions that are rounding alone."""
    left, sizes, _ = torch.linalg.svd(remainder, full_matrices=False)
    count = int((sizes > noise).sum())
    if count == 0:
        # The basis is invariant. Any other direction may hold further eigenvalues.
        key = random.fold_in(random.key(1), basis.shape[1])
        left, count = random.normal(key, (basis.shape[0], 1), basis.dtype).to(basis.device), 1
    block = left[:, :count]
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block[:, : basis.shape[0] - basis.shape[1]]


@torch.no_grad()
def logdet(operator: LinearOperator, method: str, key: Tensor | None, samples: int, steps: int) -> Tensor:
    """See `LinearOperator.logdet`."""
    n = check_symmetric("logdet", operator)
    if method == "exact":
        factor, info = torch.linalg.cholesky_ex(operator.to_dense())
        if int(info) != 0:
            raise _indefinite(operator)
        return 2 * factor.diagonal().log().sum()
    if method != "lanczos":
        raise ValueError(f"logdet: method must be 'exact' or 'lanczos', got {method!r}")
    if key is None:
        raise ValueError("logdet(method='lanczos') draws random vectors and needs a key: key=fnn.random.key(0)")
    for name, value in (("samples", samples), ("steps", steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"logdet: {name} must be a positive int, got {value!r}")
    diagonals, off_diagonals = _tridiagonal(operator, rademacher(operator, key, samples), min(steps, n))
    matrices = torch.diag_embed(diagonals)
    matrices += torch.diag_embed(off_diagonals, 1) + torch.diag_embed(off_diagonals, -1)
    values, vectors = torch.linalg.eigh(matrices)
    if bool((values <= 0).any()):
        raise _indefinite(operator, float(values.min()))
    return n * (vectors[:, 0, :] ** 2 * values.log()).sum(1).mean()


def _tridiagonal(operator: LinearOperator, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The diagonals `(samples, steps)` and off-diagonals `(samples, steps - 1)` of Lanczos from each column."""
    current = starts / starts.norm(dim=0)
    basis = current[None]
    diagonals, off_diagonals = [], []
    scale = torch.zeros_like(current[0])
    alive = torch.ones_like(current[0], dtype=torch.bool)
    for step in range(steps):
        image = operator @ current
        alpha = (current * image).sum(0)
        # A sequence that has ended goes on as the identity, apart from the rest, where the logarithm is 0.
        diagonals.append(torch.where(alive, alpha, 1.0))
        if step == steps - 1:
            break
        scale = torch.maximum(scale, image.norm(dim=0))
        for _ in range(2):
            image = image - torch.einsum("snk,sk->nk", basis, torch.einsum("snk,nk->sk", basis, image))
        beta = image.norm(dim=0)
        alive = alive & (beta > 10 * torch.finfo(beta.dtype).eps * scale * starts.shape[0] ** 0.5)
        off_diagonals.append(torch.where(alive, beta, 0.0))
        current = torch.where(alive, image / torch.where(alive, beta, 1.0), 0.0)
        basis = torch.cat([basis, current[None]])
    alphas = torch.stack(diagonals, 1)
    return alphas, torch.stack(off_diagonals, 1) if off_diagonals else alphas[:, :0]


def _indefinite(operator: LinearOperator, smallest: float | None = None) -> ValueError:
    found = "" if smallest is None else f", it has values down to {smallest:.1e}"
    return ValueError(f"logdet: {operator} is not positive definite{found}; damping= adds a multiple of the identity")
