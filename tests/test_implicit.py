"""The derivative of what a solver finds: closed forms, and SciPy's root with finite differences."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from fnn import cg, implicit_diff

THETA = torch.tensor([4.0, 9.0], dtype=torch.float64)


@implicit_diff(lambda x, theta: {"root": x["root"] ** 2 - theta["value"]})
def newton(x0, theta):
    x = x0["root"]
    for _ in range(30):
        x = (x + theta["value"] / x) / 2
    return {"root": x}


def sqrt(theta):
    return newton({"root": torch.ones(2, dtype=torch.float64)}, {"value": theta})["root"]


FIRST = torch.diag(0.5 * THETA**-0.5)
SECOND = torch.diag_embed(torch.diag(-0.25 * THETA**-1.5))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (jacrev, FIRST),
        (jacfwd, FIRST),
        (hessian, SECOND),
        (lambda f: jacrev(jacrev(f)), SECOND),
        (lambda f: lambda x: vmap(jacrev(f))(torch.stack([x, x])), torch.stack([FIRST, FIRST])),
    ],
)
def test_square_root_by_newton(transform, expected, compiled, fast_compile):
    run = transform(sqrt)
    run = torch.compile(run, fullgraph=True) if compiled else run
    torch.testing.assert_close(run(THETA), expected)


@pytest.mark.parametrize("solve", [None, cg])
def test_ridge_regression(solve):
    torch.manual_seed(0)
    data, labels = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def closed(strength):
        return torch.linalg.solve(data.T @ data + strength * torch.eye(3, dtype=torch.float64), data.T @ labels)

    def gradient(w, strength):
        return data.T @ (data @ w - labels) + strength * w

    solver = implicit_diff(gradient, solve=solve)(lambda w0, strength: closed(strength).detach())
    strength, w0 = torch.tensor(0.7, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(jacrev(lambda s: solver(w0, s))(strength), jacrev(closed)(strength))
    torch.testing.assert_close(
        grad(grad(lambda s: solver(w0, s).sum()))(strength), grad(grad(lambda s: closed(s).sum()))(strength)
    )


def test_fixed_point_of_a_contraction():
    @implicit_diff(lambda x, a: torch.cos(a * x), fixed_point=True)
    def iterate(x0, a):
        x = x0
        while (torch.cos(a * x) - x).abs() > 1e-13:
            x = torch.cos(a * x)
        return x

    def derivative(a, x):  # of x = cos(a x)
        return -x * torch.sin(a * x) / (1 + a * torch.sin(a * x))

    a, x0 = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(grad(lambda a: iterate(x0, a))(a), derivative(a, iterate(x0, a)))
    assert grad(lambda x0: iterate(x0, a))(x0) == 0


def test_the_start_has_derivative_zero():
    two = implicit_diff(lambda x: x**2 - 4)(lambda x0: 0 * x0 + 2)
    x0 = torch.ones(2, dtype=torch.float64)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(two)(x0), torch.zeros(2, 2, dtype=torch.float64))
    x0.requires_grad_()
    two(x0).sum().backward()
    torch.testing.assert_close(x0.grad, torch.zeros_like(x0))


def test_a_differentiated_default_raises():
    def root(a, b):
        residual = lambda x, b, a=a: x**2 - a * b
        return implicit_diff(residual)(lambda x0, b: (3 * b).sqrt())(torch.ones(()), b)

    with pytest.raises(ValueError, match="default argument 'a'"):
        grad(lambda a: root(a, a * 1))(torch.tensor(3.0))
    with pytest.raises(ValueError, match="default argument 'a'"):
        root(torch.tensor(3.0, requires_grad=True), torch.tensor(1.0, requires_grad=True))
    b = torch.tensor(1.0, requires_grad=True)
    root(torch.tensor(3.0), b).backward()
    torch.testing.assert_close(b.grad, torch.tensor(3.0).sqrt() / 2)


def test_scipy_root():
    optimize = pytest.importorskip("scipy.optimize")

    def equations(x, a):
        return torch.stack([x[0] + 0.5 * (x[0] - x[1]) ** 3 - a[0], 0.5 * (x[1] - x[0]) ** 3 + x[1] * a[1]])

    def by_scipy(a):
        found = optimize.root(lambda x: equations(torch.tensor(x), a).numpy(), [0.5, 0.2], tol=1e-13)
        return torch.tensor(found.x)

    solver = implicit_diff(equations)(lambda x0, a: by_scipy(a))
    a, x0 = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    ours = torch.stack([grad(lambda a: solver(x0, a)[i])(a) for i in range(2)])
    h = 1e-5 * torch.eye(2, dtype=torch.float64)
    differences = torch.stack([(by_scipy(a + h[i]) - by_scipy(a - h[i])) / 2e-5 for i in range(2)], dim=1)
    torch.testing.assert_close(ours, differences, rtol=1e-6, atol=1e-8)


def test_errors():
    x0, a = torch.ones(()), torch.tensor(2.0)
    lazy = implicit_diff(lambda x, a: x**2 - a)(lambda x0, a: x0)
    with pytest.raises(ValueError, match="no root: the largest residual is 1"):
        grad(lambda a: lazy(x0, a))(a)
    other = implicit_diff(lambda x, a: {"r": x**2 - a})(lambda x0, a: torch.sqrt(a))
    with pytest.raises(ValueError, match="the residual must return a tree like x"):
        grad(lambda a: other(x0, a))(a)


def test_cg(fast_compile):
    draws = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=draws)
    matrix, b = root @ root.mT + torch.eye(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, b.mT).mT
    solve = torch.vmap(lambda b: cg(lambda x: matrix @ x, b))
    torch.testing.assert_close(solve(b), expected)
    torch.testing.assert_close(torch.compile(solve, fullgraph=True)(b), expected)
    assert torch.equal(cg(lambda x: matrix @ x, torch.zeros_like(b[0])), torch.zeros_like(b[0]))
    assert cg(lambda x: matrix @ x, b[0], steps=1).isnan().all()  # never a wrong number
    assert cg(lambda x: torch.tensor([1.0, -1.0]) * x, torch.ones(2)).isnan().all()
    with pytest.raises(ValueError, match=r"vector \(n,\), got torch.float32 of shape \(1, 2\)"):
        cg(lambda x: x, torch.ones(1, 2))
