"""Divergences and Hessian diagonals: closed forms, torch's Jacobian and Hessian, and estimates by their variance."""

import pytest
import torch

import fnn
from fnn import divergence, hessian_diagonal

DOUBLE = torch.float64
KEY = fnn.random.key(0)
X = torch.tensor([0.5, -1.2, 0.8], dtype=DOUBLE)
POINTS = torch.stack([X, 2 * X - 0.3])
A = torch.tensor([[2.0, 1.0, 0.0], [-3.0, 0.5, 1.0], [0.2, 0.4, -1.0]], dtype=DOUBLE)


def field(x):
    return torch.sin(A @ x) * x


def energy(x):
    return (x @ A @ x) ** 2 + x.exp().cumsum(0).prod()


def trace(x):
    return torch.func.jacrev(field)(x).trace()


def diagonal(x):
    return torch.func.hessian(energy)(x).diagonal()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_exact(chunk_size):
    torch.testing.assert_close(divergence(field, chunk_size=chunk_size)(X), trace(X))
    torch.testing.assert_close(hessian_diagonal(energy, chunk_size=chunk_size)(X), diagonal(X))


def test_closed_forms():
    position = lambda x: x / x.norm() ** 3  # of a point charge in space
    assert abs(divergence(position)(X)) < 1e-12
    torch.testing.assert_close(divergence(lambda x: A @ x)(X), A.trace())
    torch.testing.assert_close(hessian_diagonal(lambda x: x @ A @ x)(X), 2 * A.diagonal())
    torch.testing.assert_close(hessian_diagonal(lambda x: (x**4).sum())(X.float()), 12 * X.float() ** 2)


def test_over_points_and_compiled(fast_compile):
    for f, expected in ((divergence(field), trace), (hessian_diagonal(energy), diagonal)):
        expected = torch.stack([expected(x) for x in POINTS])
        torch.testing.assert_close(torch.vmap(f)(POINTS), expected)
        torch.testing.assert_close(torch.compile(torch.vmap(f), fullgraph=True)(POINTS), expected)


def test_differentiable_by_parameters():
    loss = lambda a: divergence(lambda x: torch.sin(a @ x) * x)(X) ** 2
    expected = lambda a: torch.func.jacrev(lambda x: torch.sin(a @ x) * x)(X).trace() ** 2
    torch.testing.assert_close(torch.func.grad(loss)(A), torch.func.grad(expected)(A))


def test_trees_argnums_and_value():
    x = {"a": X, "b": [torch.tensor(2.0, dtype=DOUBLE)]}
    swirl = lambda scale, x: {"a": scale * x["a"] ** 2 * x["b"][0], "b": [x["b"][0] ** 3 + x["a"].sum()]}
    value, found = divergence(swirl, 1, value=True)(3.0, x)
    torch.testing.assert_close(found, (3 * 2 * X * 2).sum() + 12)
    assert fnn.tree.allclose(value, swirl(3.0, x))
    f = lambda scale, x: scale * (x["a"] ** 3).sum() * x["b"][0] ** 2
    value, found = hessian_diagonal(f, 1, value=True)(3.0, x)
    expected = {"a": 3 * 6 * X * 4, "b": [3 * (X**3).sum() * 2]}
    assert fnn.tree.allclose(found, expected)
    assert value == f(3.0, x)


def test_estimates_repeat_and_are_unbiased():
    """The mean of many probes is within five standard errors, by the variances that the docstrings state."""
    samples = 4000
    options = {"method": "hutchinson", "key": KEY, "samples": samples}
    jacobian, hessian = torch.func.jacrev(field)(X), torch.func.hessian(energy)(X)
    symmetric = jacobian + jacobian.mT
    error = (divergence(field, **options)(X) - jacobian.trace()).abs()
    variance = symmetric.triu(1).square().sum() / samples
    assert 0 < error < 5 * variance.sqrt()
    error = (hessian_diagonal(energy, **options)(X) - hessian.diagonal()).abs()
    variance = (hessian.square().sum(1) - hessian.diagonal().square()) / samples
    assert (error < 5 * variance.sqrt()).all()
    assert (error > 0).any()
    for f in (divergence(field, **options), hessian_diagonal(energy, **options)):
        assert torch.equal(f(X), f(X))
    few = {**options, "samples": 5}
    torch.testing.assert_close(divergence(field, **few, chunk_size=2)(X), divergence(field, **few)(X))
    other = {**few, "key": fnn.random.key(1)}
    assert divergence(field, **few)(X) != divergence(field, **other)(X)


def test_one_probe_is_exact_for_a_diagonal_matrix(fast_compile):
    f = lambda x: (x**4).sum()
    options = {"method": "hutchinson", "key": KEY}
    torch.testing.assert_close(hessian_diagonal(f, **options)(X), 12 * X**2)
    torch.testing.assert_close(divergence(lambda x: x**3, **options)(X), 3 * (X**2).sum())
    keys = fnn.random.split(KEY, 2)
    each = torch.vmap(lambda x, key: hessian_diagonal(energy, method="hutchinson", key=key, samples=3)(x))
    rows = [
        hessian_diagonal(energy, method="hutchinson", key=k, samples=3)(x) for x, k in zip(POINTS, keys, strict=True)
    ]
    torch.testing.assert_close(each(POINTS, keys), torch.stack(rows))
    torch.testing.assert_close(torch.compile(each, fullgraph=True)(POINTS, keys), torch.stack(rows))


def test_arguments_without_elements():
    empty = torch.zeros(0, dtype=DOUBLE)
    assert hessian_diagonal(lambda x: x.sum())(empty).shape == (0,)
    assert divergence(lambda x: 2 * x)(empty) == 0
    assert fnn.laplacian(lambda x, y: x.sum() + y**2)(empty, X).tolist() == [0, 0, 0]


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(\)"):
        divergence(energy)(X)
    with pytest.raises(ValueError, match="divergence: expected an output"):
        divergence(lambda x: {"y": x})(X)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        hessian_diagonal(lambda x: 1.0)(X)
    with pytest.raises(ValueError, match=r"one number, got shape \(3,\).*jacobian\(fnn.jacobian\(f\)\)"):
        hessian_diagonal(field)(X)
    for transform, f in ((divergence, field), (hessian_diagonal, energy)):
        with pytest.raises(TypeError, match="int64"):
            transform(f)(torch.arange(3))
        with pytest.raises(TypeError, match="complex"):
            transform(f)(X.to(torch.complex128))
        with pytest.raises(ValueError, match="'exact', 'hutchinson'"):
            transform(f, method="forward")
        with pytest.raises(TypeError, match="key=fnn.random.key"):
            transform(f, method="hutchinson")
        with pytest.raises(TypeError, match="draws nothing"):
            transform(f, key=KEY)
        with pytest.raises(ValueError, match="samples"):
            transform(f, method="hutchinson", key=KEY, samples=0)
        with pytest.raises(ValueError, match="chunk_size"):
            transform(f, chunk_size=-1)
        with pytest.raises(TypeError, match="already compiled"):
            transform(torch.compile(f))
