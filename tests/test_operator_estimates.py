"""Traces, diagonals, eigenvalues, solves and determinants of operators, against dense algebra and SciPy."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from fnn import random, tree
from fnn.diff.operators import HessianOperator, IdentityOperator, LinearOperator


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


def rotated(spectrum, seed=0):
    """A symmetric matrix with these eigenvalues."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    q = torch.linalg.qr(normal(seed, len(spectrum), len(spectrum))).Q
    return q @ torch.diag(spectrum) @ q.T


def operator(A, symmetric=True):
    """A matrix as an operator that counts its products in `.products`."""

    def apply(v):
        return A @ v

    found = LinearOperator(apply, A[0], A[:, 0], transpose=lambda w: A.T @ w, symmetric=symmetric)
    found.products = 0
    block = found._block

    def counted(columns):
        found.products += columns.shape[1]
        return block(columns)

    found._block = counted
    return found


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- traces and diagonals ---

TRACES = (("hutchinson", 6), ("hutch++", 6), ("xtrace", 6))
DIAGONALS = (("hutchinson", 6), ("xdiag", 6))


def test_exact_trace_and_diagonal():
    A = normal(0, 7, 7)
    for chunk in (None, 3):
        found = LinearOperator(lambda v: A @ v, A[0], A[:, 0], chunk_size=chunk)
        close(found.trace(), A.trace())
        close(found.diag(), A.diagonal())


@pytest.mark.parametrize(("method", "samples"), TRACES)
def test_trace_estimates_are_unbiased_and_cost_what_they_say(method, samples):
    A = normal(1, 8, 8) + rotated(range(8))
    found = operator(A, symmetric=False)
    estimates = torch.stack([found.trace(method, key=random.key(seed), samples=samples) for seed in range(400)])
    assert found.products == 400 * samples
    error = estimates.std() / 400**0.5
    assert abs(estimates.mean() - A.trace()) < 4 * error
    assert estimates.std() > 0


@pytest.mark.parametrize(("method", "samples"), DIAGONALS)
def test_diagonal_estimates_are_unbiased(method, samples):
    A = normal(1, 8, 8) + rotated(range(8))
    found = operator(A, symmetric=False)
    estimates = torch.stack([found.diag(method, key=random.key(seed), samples=samples) for seed in range(400)])
    error = estimates.std(0) / 400**0.5
    assert bool(((estimates.mean(0) - A.diagonal()).abs() < 4.5 * error).all())


def test_hutchinson_is_exact_for_a_diagonal_matrix():
    A = torch.diag(normal(0, 6))
    close(operator(A).trace("hutchinson", key=random.key(0), samples=1), A.trace())
    close(operator(A).diag("hutchinson", key=random.key(0), samples=1), A.diagonal())


@pytest.mark.parametrize(("method", "samples"), [("hutch++", 9), ("hutch++", 30), ("xtrace", 8), ("xtrace", 40)])
def test_estimates_are_exact_for_a_low_rank(method, samples):
    """Also where the products of the test vectors are linearly dependent."""
    A = rotated([3.0, -2.0, 1.0] + [0.0] * 17)
    close(operator(A).trace(method, key=random.key(0), samples=samples), A.trace())


@pytest.mark.parametrize("samples", [8, 40])
def test_xdiag_is_exact_for_a_low_rank(samples):
    A = rotated([3.0, -2.0, 1.0] + [0.0] * 17)
    close(operator(A).diag("xdiag", key=random.key(0), samples=samples), A.diagonal())


def test_estimates_of_zero_are_zero():
    A = torch.zeros(5, 5).double()
    for method, samples in TRACES:
        assert operator(A).trace(method, key=random.key(0), samples=samples) == 0
    assert torch.equal(operator(A).diag("xdiag", key=random.key(0), samples=4), A[0])


def test_xtrace_and_hutch_plus_plus_beat_hutchinson_on_a_decaying_spectrum():
    A = rotated([0.5**i for i in range(30)])
    errors = {}
    for method in ("hutchinson", "hutch++", "xtrace"):
        found = [operator(A).trace(method, key=random.key(seed), samples=12) - A.trace() for seed in range(20)]
        errors[method] = float(torch.stack(found).square().mean().sqrt())
    assert errors["hutch++"] < errors["hutchinson"] / 3
    assert errors["xtrace"] < errors["hutch++"]


def test_the_same_key_gives_the_same_estimate():
    A = operator(rotated(range(6)))
    first, again = (A.trace("xtrace", key=random.key(3), samples=4) for _ in range(2))
    assert torch.equal(first, again)


# --- eigenvalues ---


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (6, 6), (40, 3), (120, 4)])
def test_eigsh_equals_dense_and_scipy(which, n, k):
    A = rotated(normal(5, n))
    values, vectors = operator(A).eigsh(k, which)
    if k < n - 1:
        expected = np.sort(scipy.sparse.linalg.eigsh(A.numpy(), k, which=which, return_eigenvectors=False))
    else:
        dense = np.linalg.eigvalsh(A.numpy())
        order = np.argsort({"LM": -np.abs(dense), "LA": -dense, "SA": dense}[which])
        expected = np.sort(dense[order[:k]])
    close(values, torch.from_numpy(expected))
    close(A @ vectors, vectors * values, 1e-6)
    close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), 1e-8)


def test_eigsh_finds_repeated_eigenvalues():
    """Lanczos from one vector finds each value once; the GGN of several outputs repeats every value."""
    A = rotated([5.0, 5.0, 5.0, -5.0, 1.0, 1.0] + [0.0] * 30)
    close(operator(A).eigsh(4, "LA").values, torch.tensor([1.0, 5.0, 5.0, 5.0]).double())
    close(operator(A).eigsh(5).values, torch.tensor([-5.0, 1.0, 5.0, 5.0, 5.0]).double())
    close(IdentityOperator(torch.zeros(7).double()).eigsh(3).values, torch.ones(3).double())
    close(operator(torch.zeros(4, 4).double()).eigsh(2).values, torch.zeros(2).double())


def test_eigsh_restarts_and_saves_products():
    A = rotated(torch.cat([torch.linspace(0, 1, 397), torch.tensor([2.0, 3.0, 4.0])]))
    found = operator(A)
    close(found.eigsh(3).values, torch.tensor([2.0, 3.0, 4.0]).double())
    assert found.products < 100
    inner = operator(rotated(torch.linspace(0, 1, 300)))
    close(inner.eigsh(2, rtol=1e-4).values, torch.linspace(0, 1, 300)[-2:].double(), 1e-4)
    assert inner.products > 80  # more than the basis holds: it has restarted


def test_eigsh_in_float32_and_of_another_key():
    A = rotated(range(10)).float()
    close(operator(A).eigsh(2).values, torch.tensor([8.0, 9.0]), 1e-4)
    first, second = (operator(A).eigsh(2, key=random.key(seed)) for seed in (1, 1))
    assert torch.equal(first.vectors, second.vectors)


def test_eigsh_of_a_hessian():
    H = HessianOperator(lambda p: (p["a"] ** 4).sum() + 3 * (p["b"] ** 2).sum(), {"a": normal(0, 3), "b": normal(1, 2)})
    close(H.eigsh(5).values, torch.linalg.eigvalsh(H.to_dense()))


def test_eigsh_that_does_not_converge_raises():
    A = rotated(torch.linspace(0, 1, 300))
    with pytest.raises(RuntimeError, match="maxiter=3 products"):
        operator(A).eigsh(1, maxiter=3)
    with pytest.raises(RuntimeError, match="not finite"):
        operator(A * float("nan")).eigsh(1)


# --- solves ---


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_solve_equals_dense(method):
    A = rotated(torch.linspace(0.5, 3, 20))
    b = normal(1, 20, 3)
    b[:, 1] = 0
    x = operator(A).solve(b, method, rtol=1e-10)
    close(x, torch.linalg.solve(A, b), 1e-8)
    close(operator(A).solve(b[:, 0], method, rtol=1e-10), x[:, 0], 1e-8)
    damped = operator(A).solve(b, method, rtol=1e-10, damping=0.5)
    close(damped, torch.linalg.solve(A + 0.5 * torch.eye(20, dtype=torch.float64), b), 1e-8)


def test_minres_of_an_indefinite_operator_needs_no_more_products_than_scipy():
    A = rotated(torch.cat([torch.linspace(-2, -0.3, 30), torch.linspace(0.2, 3, 50)]))
    b = normal(1, 80)
    found = operator(A)
    x = found.solve(b, "minres", rtol=1e-8)
    close(x, torch.linalg.solve(A, b), 1e-6)
    steps = []
    scipy.sparse.linalg.minres(A.numpy(), b.numpy(), rtol=1e-8, callback=steps.append)
    assert found.products <= len(steps) + 10


def test_cg_needs_no_more_products_than_scipy():
    A = rotated(torch.linspace(0.05, 3, 80))
    b = normal(1, 80)
    found = operator(A)
    x = found.solve(b, rtol=1e-8)
    expected, steps = None, []
    expected, _ = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-8, callback=steps.append)
    close(x, torch.from_numpy(expected), 1e-5)
    assert found.products <= len(steps) + 3


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_preconditioner_saves_products(method):
    scales = torch.logspace(0, 3, 40, dtype=torch.float64)
    A = rotated(torch.linspace(1, 2, 40)) * scales.sqrt() * scales.sqrt()[:, None]
    b = normal(1, 40)
    plain, helped = operator(A), operator(A)
    M = operator(torch.diag(1 / scales))
    close(plain.solve(b, method, rtol=1e-9), torch.linalg.solve(A, b), 1e-6)
    close(helped.solve(b, method, rtol=1e-9, preconditioner=M), torch.linalg.solve(A, b), 1e-6)
    assert helped.products < plain.products / 2


def test_solve_of_a_tree():
    params = {"a": normal(0, 3), "b": normal(1, 2)}
    H = HessianOperator(lambda p: (p["a"] ** 4).sum() + 3 * (p["b"] ** 2).sum(), params)
    x = H.solve(params, rtol=1e-12)
    close(x["a"], 1 / (12 * params["a"]))
    close(x["b"], params["b"] / 6)


def test_a_consistent_singular_system():
    A = rotated([0.0, 1.0, 2.0, 3.0])
    b = A @ normal(2, 4)
    for method in ("cg", "minres"):
        close(A @ operator(A).solve(b, method, rtol=1e-10), b, 1e-8)


def test_solves_that_fail_say_so():
    A = rotated([1.0, -1.0, 2.0, 3.0])
    b = normal(1, 4)
    with pytest.raises(ValueError, match="curvature .* method='minres', or damping="):
        operator(A).solve(b)
    with pytest.raises(RuntimeError, match="maxiter=2 iterations the residual is"):
        operator(rotated(torch.linspace(0.01, 3, 50))).solve(normal(1, 50), maxiter=2)
    inconsistent = torch.diag(torch.tensor([1.0, 0.0, 2.0])).double()
    with pytest.raises(RuntimeError, match="did not converge"):
        operator(inconsistent).solve(torch.ones(3).double(), "minres")
    with pytest.raises(RuntimeError, match="did not converge"):
        operator(rotated([1.0, 2.0]) * float("nan")).solve(b[:2], "minres")
    with pytest.raises(ValueError, match="preconditioner is not"):
        operator(rotated([1.0, 2.0, 3.0, 4.0])).solve(b, preconditioner=operator(-torch.eye(4).double()))


# --- determinants ---


def test_logdet():
    A = rotated(torch.linspace(0.5, 3, 60))
    expected = torch.linalg.slogdet(A).logabsdet
    close(operator(A).logdet(), expected)
    estimates = [operator(A).logdet("lanczos", key=random.key(seed), samples=20) for seed in range(5)]
    estimates = torch.stack(estimates)
    assert abs(estimates.mean() - expected) < 4 * estimates.std() / 5**0.5 + 1e-8
    assert estimates.std() < 0.1 * abs(expected)
    close(operator(A).logdet(damping=1.0), torch.linalg.slogdet(A + torch.eye(60, dtype=torch.float64)).logabsdet)


def test_logdet_by_quadrature_is_exact_where_lanczos_ends_early():
    """Few distinct eigenvalues, or a diagonal matrix of full Krylov spaces: no error is left but the samples'."""
    close(
        operator(3 * torch.eye(6).double()).logdet("lanczos", key=random.key(0), samples=3),
        torch.tensor(3.0).double().log() * 6,
    )
    diagonal = torch.diag(torch.linspace(1, 2, 8, dtype=torch.float64))
    close(operator(diagonal).logdet("lanczos", key=random.key(0), samples=2), diagonal.diagonal().log().sum())


def test_logdet_of_an_indefinite_operator_raises():
    for options in ({}, {"method": "lanczos", "key": random.key(0)}):
        with pytest.raises(ValueError, match="not positive definite"):
            operator(rotated([1.0, -1.0, 2.0])).logdet(**options)


# --- arguments ---

SYMMETRIC = operator(rotated([1.0, 2.0, 3.0]))
ERRORS = {
    "square trace": (lambda: operator(normal(0, 2, 3), False).trace(), "expected a square operator"),
    "square eigsh": (lambda: operator(normal(0, 2, 3), False).eigsh(1), "expected a square operator"),
    "symmetric eigsh": (lambda: operator(normal(0, 3, 3), False).eigsh(1), "not known to be symmetric"),
    "symmetric solve": (lambda: operator(normal(0, 3, 3), False).solve(normal(0, 3)), "not known to be symmetric"),
    "symmetric logdet": (lambda: operator(normal(0, 3, 3), False).logdet(), "not known to be symmetric"),
    "k": (lambda: SYMMETRIC.eigsh(4), "k must be an int from 1 to 3"),
    "which": (lambda: SYMMETRIC.eigsh(1, "SM"), "which must be"),
    "trace method": (lambda: SYMMETRIC.trace("hutch"), "got 'hutch'"),
    "diag method": (lambda: SYMMETRIC.diag("hutch++"), "got 'hutch[+][+]'"),
    "solve method": (lambda: SYMMETRIC.solve(normal(0, 3), "gmres"), "got 'gmres'"),
    "logdet method": (lambda: SYMMETRIC.logdet("slq"), "got 'slq'"),
    "trace key": (lambda: SYMMETRIC.trace("xtrace", samples=2), "needs a key"),
    "logdet key": (lambda: SYMMETRIC.logdet("lanczos"), "needs a key"),
    "samples": (lambda: SYMMETRIC.trace("hutch++", key=random.key(0), samples=4), "a multiple of 3, got 4"),
    "too many": (lambda: SYMMETRIC.trace("xtrace", key=random.key(0), samples=8), "take at most 6"),
    "b length": (lambda: SYMMETRIC.solve(normal(0, 4)), "length 3"),
    "b tree": (lambda: SYMMETRIC.solve({"w": normal(0, 3)}), "b: unexpected 'w'|b: missing"),
    "preconditioner": (
        lambda: SYMMETRIC.solve(normal(0, 3), preconditioner=IdentityOperator(normal(0, 2))),
        "the preconditioner is",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_operator_of_a_tree_has_its_order():
    params = {"a": torch.ones(1).double(), "b": torch.ones(1).double()}
    H = HessianOperator(lambda p: (p["a"] ** 2 + 3 * p["b"] ** 2).sum(), params)
    values, vectors = H.eigsh(1)
    close(values, torch.tensor([6.0]).double())
    top = tree.ravel(params)[1](vectors[:, 0])
    close(top["b"].abs(), torch.ones(1).double())
