"""Sparse derivatives against dense ones, SciPy's closed forms, and patterns that are wrong."""

import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch

import fnn
from fnn import SparsityPattern, sparse_hessian, sparse_jacobian


def brusselator(y, a=1.0, b=3.4, diffusion=10.0):
    """The right-hand side on a periodic n x n grid; y: (2 n^2,), the two concentrations one after the other."""
    n = int((y.shape[0] // 2) ** 0.5)
    u, v = y.reshape(2, n, n)
    spread = diffusion * (n - 1) ** 2 / 100

    def laplacian(w):
        return (w.roll(1, 0) + w.roll(-1, 0) + w.roll(1, 1) + w.roll(-1, 1) - 4 * w) * spread

    du = b + u * u * v - (a + 1) * u + laplacian(u)
    dv = a * u - u * u * v + laplacian(v)
    return torch.stack([du, dv]).reshape(-1)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def squares(x):
    return (x[1:] - x[:-1]) ** 2 * x[0]


def vector(n, dtype=torch.float64):
    return torch.linspace(0.3, 1.7, n, dtype=dtype) ** 2


def close(actual, expected, rtol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brusselator_equals_the_dense_jacobian(mode, chunk_size, dtype):
    y = vector(50, dtype)
    jacobian = sparse_jacobian(brusselator, mode=mode, chunk_size=chunk_size)
    matrix = jacobian(y)
    assert matrix.layout == torch.sparse_coo
    assert matrix.is_coalesced()
    assert matrix._nnz() == 50 * 6
    close(matrix.to_dense(), torch.func.jacrev(brusselator)(y), 1e-12 if dtype == torch.float64 else 1e-6)


def test_the_brusselator_of_the_benchmark():
    y = torch.rand(2048, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    jacobian = sparse_jacobian(brusselator).prepare(y)
    assert str(jacobian) == f"SparseJacobian(2048x2048, nnz=12288, {jacobian.count} colors by JVP)"
    assert jacobian.count <= 12
    dense = torch.func.jacrev(brusselator, chunk_size=256)(y)
    close(jacobian(y).to_dense(), dense)


def test_rosenbrock_equals_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    x = vector(30)
    hessian = sparse_hessian(rosenbrock).prepare(x)
    assert str(hessian) == "SparseHessian(30x30, nnz=88, 3 colors by HVP)"
    close(hessian(x).to_dense(), torch.from_numpy(optimize.rosen_hess(x.numpy())))


def test_an_arrowhead_hessian_takes_two_products():
    f = lambda x: (x[0] * x[1:].sin() + x[1:] ** 4).sum() + x[0] ** 3
    x = vector(20)
    hessian = sparse_hessian(f).prepare(x)
    assert hessian.count == 2
    close(hessian(x).to_dense(), torch.func.hessian(f)(x))


def test_the_mode_of_fewer_products():
    x = vector(12)
    wide = sparse_jacobian(lambda x: torch.stack([x.sum(), (x**2).sum()])).prepare(x)
    tall = sparse_jacobian(lambda x: x[0] * torch.linspace(0, 1, 9, dtype=x.dtype)).prepare(x)
    assert (wide.mode, wide.count) == ("rev", 2)
    assert (tall.mode, tall.count) == ("fwd", 1)
    assert "2 colors by VJP" in str(wide)


def test_an_operation_without_forward_mode_takes_reverse(monkeypatch):
    def jvp(*_, **__):
        raise NotImplementedError("Trying to use forward AD")

    x = vector(6)
    expected = torch.func.jacrev(squares)(x)
    second = torch.func.hessian(rosenbrock)(x)
    monkeypatch.setattr(torch.func, "jvp", jvp)
    for pattern in (None, expected != 0):
        jacobian = sparse_jacobian(squares, pattern=pattern).prepare(x)
        assert jacobian.mode == "rev"
        close(jacobian(x).to_dense(), expected)
    close(sparse_hessian(rosenbrock)(x).to_dense(), second)
    with pytest.raises(NotImplementedError):
        sparse_jacobian(squares, mode="fwd")(x)


class State(NamedTuple):
    position: torch.Tensor
    velocity: torch.Tensor


def test_pytrees_in_leaf_order():
    def f(state, scale):
        return {"v": state.velocity * scale, "a": [state.position.sin() - state.velocity[0]]}

    state = State(vector(3).reshape(3, 1), vector(6).reshape(2, 3)[:, :1].reshape(2, 1).expand(2, 3).clone())
    scale = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    dense = torch.func.jacrev(f)(state, scale)
    rows = [dense["v"], dense["a"][0]]
    expected = torch.cat([torch.cat([leaf.flatten(-2).flatten(0, -2) for leaf in row], 1) for row in rows])
    jacobian = sparse_jacobian(f)(state, scale)
    close(jacobian.to_dense(), expected)
    both = sparse_jacobian(f, argnums=(0, 1))(state, scale)
    assert both.shape == (15, 11)
    close(both.to_dense()[:, :9], expected)


def test_value_and_aux():
    def f(x):
        return squares(x), {"last": x[-1]}

    x = vector(5)
    value, aux, dense = squares(x), {"last": x[-1]}, torch.func.jacrev(squares)(x)
    for mode in ("fwd", "rev"):
        v, j = sparse_jacobian(squares, mode=mode, value=True)(x)
        close(v, value)
        close(j.to_dense(), dense)
        j, a = sparse_jacobian(f, mode=mode, has_aux=True)(x)
        close(j.to_dense(), dense)
        close(a["last"], aux["last"])
        (v, a), entries = sparse_jacobian(f, mode=mode, has_aux=True, value=True).values(x)
        close(v, value)
        close(a["last"], aux["last"])
        assert entries.shape == (dense.count_nonzero(),)
    (v, a), h = sparse_hessian(lambda x: (rosenbrock(x), x[0]), has_aux=True, value=True)(x)
    close(v, rosenbrock(x))
    close(a, x[0])
    close(h.to_dense(), torch.func.hessian(rosenbrock)(x))


def test_scipy_and_derivatives_of_the_entries():
    sparse = pytest.importorskip("scipy.sparse")
    x = vector(7)
    jacobian = sparse_jacobian(squares).prepare(x)
    entries = jacobian.values(x)
    matrix = jacobian.to_scipy(entries)
    assert isinstance(matrix, sparse.csr_array)
    assert matrix.has_canonical_format
    np.testing.assert_allclose(matrix.toarray(), torch.func.jacrev(squares)(x).numpy(), rtol=1e-12)
    gradient = torch.func.grad(lambda x: (jacobian.values(x) ** 2).sum())(x)
    close(gradient, torch.func.grad(lambda x: (torch.func.jacrev(squares)(x) ** 2).sum())(x))


def test_a_function_of_nothing():
    x = vector(4)
    value, jacobian = sparse_jacobian(lambda x: torch.ones(3, dtype=x.dtype), value=True)(x)
    assert jacobian._nnz() == 0
    assert value.tolist() == [1, 1, 1]
    assert sparse_hessian(lambda x: x.sum()).prepare(x).count == 0


@pytest.mark.parametrize("transform", [sparse_jacobian, sparse_hessian])
def test_compiled_and_batched(transform, fast_compile):
    f = squares if transform is sparse_jacobian else rosenbrock
    x = vector(6)
    lazy = transform(f)
    prepared = lazy.prepare(x)
    expected = prepared.values(x + 1)
    close(torch.compile(prepared.values, fullgraph=True)(x + 1), expected)
    lazy(x)
    close(torch.compile(lambda x: lazy.values(x) * 2, fullgraph=True)(x + 1), 2 * expected)
    batch = torch.stack([x, x + 1])
    close(torch.vmap(prepared.values)(batch)[1], expected)
    if transform is sparse_jacobian:
        close(torch.compile(torch.vmap(prepared.values), fullgraph=True)(batch)[1], expected)


@pytest.mark.slow
def test_compiled_by_inductor():
    y = vector(32)
    jacobian = sparse_jacobian(brusselator).prepare(y)
    close(torch.compile(jacobian.values, fullgraph=True)(y), jacobian.values(y))


def test_what_only_runs_outside():
    x = vector(4)
    lazy = sparse_jacobian(squares)
    with pytest.raises(RuntimeError, match=r"prepare outside, J = fnn.sparse_jacobian\(f\).prepare"):
        torch.vmap(lazy)(x[None])
    with pytest.raises(Exception, match="prepare outside"):
        torch.compile(lambda x: lazy.values(x), fullgraph=True, backend="eager")(x)
    lazy(x)
    with pytest.raises(RuntimeError, match="vmap has no sparse matrices"):
        torch.vmap(lazy)(x[None])
    with pytest.raises(Exception, match="torch.compile cannot build sparse matrices"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(lambda x: lazy(x), fullgraph=True, backend="eager")(x)


def test_a_function_prepares_once_for_each_shape():
    lazy = sparse_jacobian(squares)
    assert str(lazy) == "sparse_jacobian(not prepared yet)"
    for n in (4, 5, 4):
        assert lazy(vector(n)).shape == (n - 1, n)
    assert len(lazy._prepared) == 2
    with pytest.raises(ValueError, match=r"prepared for inputs of shapes \(\(4,\),\), got \(\(5,\),\)"):
        lazy.prepare(vector(4))(vector(5))


def test_a_given_pattern():
    x = vector(6)
    dense = torch.func.jacrev(squares)(x)
    # no trace is made, so control flow is allowed
    jacobian = sparse_jacobian(lambda x: squares(x) if x.sum() > 0 else x, pattern=dense != 0)
    close(jacobian(x).to_dense(), dense)
    with pytest.raises(ValueError, match=r"has shape \(5, 6\), but the derivative is \(6, 6\)"):
        sparse_jacobian(torch.sin, pattern=dense != 0)(x)
    with pytest.raises(ValueError, match="must be symmetric"):
        sparse_hessian(rosenbrock, pattern=torch.ones(6, 6).triu())(x)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_missed_nonzero_is_found_and_named(mode, dtype):
    x = vector(5, dtype)
    full = torch.func.jacrev(squares)(x) != 0
    for row, column in full.nonzero().tolist():
        pattern = full.clone()
        pattern[row, column] = False
        with pytest.raises(ValueError, match=rf"row {row}\b.*column {column} |column {column} .*row {row}\b"):
            sparse_jacobian(squares, mode=mode, pattern=pattern)(x)


def test_a_missed_second_derivative_names_the_leaf():
    def f(tree):
        return tree["a"][0] * tree["b"][1] ** 2 + tree["a"].pow(4).sum()

    args = {"a": vector(2), "b": vector(2)}
    with pytest.raises(ValueError, match=r"row 0, column 3 \(input element 1 of 'b'\): the derivative there is 5.78"):
        sparse_hessian(f, pattern=torch.eye(4))(args)
    wrong = sparse_hessian(f, pattern=torch.eye(4), check=False)(args)
    assert wrong._nnz() == 4


def test_a_function_that_changes_is_found():
    calls = []

    def f(x):
        calls.append(1)
        return x * len(calls)

    with pytest.raises(ValueError, match="differs from call to call"):
        sparse_jacobian(f, pattern=torch.eye(3))(vector(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sparse_jacobian(lambda x: x > 0)(x), TypeError, "the output is torch.bool"),
        (lambda x: sparse_jacobian(lambda x: {"n": x.long()})(x), TypeError, "leaf 'n' of the output is torch.int64"),
        (lambda x: sparse_jacobian(lambda x: x.to(torch.complex128))(x), TypeError, "real floating-point"),
        (lambda x: sparse_jacobian(torch.sin)(x.to(torch.complex128)), TypeError, "complex inputs"),
        (lambda x: sparse_jacobian(torch.sin)(x.long()), TypeError, "int64"),
        (lambda x: sparse_jacobian(lambda x: 3.0)(x), TypeError, "expected a tensor"),
        (lambda x: sparse_hessian(torch.sin)(x), ValueError, r"scalar output of shape \(\), got \(3,\)"),
        (lambda x: sparse_jacobian(torch.sin, mode="forward")(x), ValueError, "mode must be"),
        (lambda x: sparse_jacobian(torch.sin, chunk_size=0)(x), ValueError, "chunk_size must be"),
        (lambda x: sparse_jacobian(torch.compile(torch.sin))(x), TypeError, "already compiled"),
        (lambda x: sparse_jacobian(x), TypeError, "expected a function"),
        (lambda x: sparse_jacobian(torch.sin, argnums=1)(x), ValueError, "argnums=1"),
        (lambda x: sparse_jacobian(lambda x: x[5])(x), IndexError, "out of bounds"),
        (lambda x: sparse_jacobian(torch.sin, pattern=([0], [0], [1.0]))(x), TypeError, "pattern: expected"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(vector(3))


def test_a_pattern_may_be_detected_once_and_given_again():
    x = vector(6)
    found = sparse_jacobian(squares).prepare(x).pattern
    assert isinstance(found, SparsityPattern)
    close(sparse_jacobian(squares, pattern=found)(x).to_dense(), torch.func.jacrev(squares)(x))


def test_prepared_for_one_structure():
    """Leaves of one shape in another order are other arguments."""
    f = lambda p: torch.stack([p["a"][0] * p["b"][1], p["b"][0] ** 2])
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    J = sparse_jacobian(f)
    J({"a": a, "b": b})
    other = {"b": b, "a": a}
    torch.testing.assert_close(J(other).to_dense(), fnn.jacobian(f, flat=True)(other))
    with pytest.raises(ValueError, match="another structure"):
        J.prepare({"a": a, "b": b}).values(other)


def test_leaves_of_two_dtypes():
    mixed = {"a": torch.randn(3), "b": torch.randn(3, dtype=torch.float64)}
    f = lambda p: (p["a"].double() * p["b"] ** 2).sum()
    expected = fnn.hessian(f, flat=True)(mixed)
    torch.testing.assert_close(sparse_hessian(f)(mixed).to_dense().to(expected.dtype), expected, rtol=1e-6, atol=1e-6)
