"""Laplacians: closed forms, the trace of torch's Hessian in float64, and what a forward pass must not miss."""

import math

import pytest
import torch
import torch.nn.functional as F

import fnn
from fnn import bilaplacian, explain_laplacian, laplacian, nn, ops

DOUBLE = torch.float64


def draw(seed, *shape):
    return 0.3 + fnn.random.uniform(fnn.random.key(seed), shape, DOUBLE)


X, W, B, V = draw(0, 3), draw(1, 4, 3) - 0.8, draw(2, 4), draw(3, 3, 3)
POINTS = draw(4, 2, 3)


def trace(f, x):
    return torch.func.hessian(f)(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def compiled(f):
    return torch.compile(f, fullgraph=True)


def fast_where(names, *fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


# Name: function, value, Laplacian; of x with n elements.
CLOSED_FORMS = {
    "quadratic": (lambda x: x @ V @ x, lambda x: 2 * V.trace()),
    "quartic": (lambda x: (x**4).sum(), lambda x: 12 * (x**2).sum()),
    "gaussian": (lambda x: torch.exp(-x.dot(x)), lambda x: (4 * x.dot(x) - 2 * x.numel()) * torch.exp(-x.dot(x))),
    "sines": (lambda x: torch.sin(2 * x[0]) * torch.sin(x[1]), lambda x: -5 * torch.sin(2 * x[0]) * torch.sin(x[1])),
    "harmonic polynomial": (lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2, lambda x: 0 * x[0]),
    "harmonic exponential": (lambda x: torch.exp(x[0]) * torch.cos(x[1]), lambda x: 0 * x[0]),
    "Newton's potential": (lambda x: 1 / x.norm(), lambda x: 0 * x[0]),
    "norm": (lambda x: x.norm(), lambda x: (x.numel() - 1) / x.norm()),
    "logarithm": (lambda x: torch.log(x).sum(), lambda x: -(x**-2).sum()),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("method", ["forward", "products"])
def test_closed_forms(name, method):
    f, expected = CLOSED_FORMS[name]
    torch.testing.assert_close(laplacian(f, method=method)(X), expected(X), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(
        torch.vmap(laplacian(f, method=method))(POINTS),
        torch.stack([expected(x) for x in POINTS]),
        rtol=1e-12,
        atol=1e-11,
    )


def sum_of(*functions):
    return lambda x: sum(function(x * V).sum() for function in functions)


# Functions with rules, against the trace of the Hessian.
RULES = {
    "activations": sum_of(
        torch.tanh, torch.sigmoid, F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.softplus, F.logsigmoid,
        lambda x: F.gelu(x, approximate="tanh"), lambda x: F.softplus(x, beta=3, threshold=2),
    ),
    "elementary": sum_of(
        torch.exp, torch.expm1, torch.log, torch.log1p, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh,
        torch.cosh, torch.erf, torch.sqrt, torch.rsqrt, torch.square, torch.reciprocal, torch.abs, torch.neg,
        lambda x: x.clamp(0.3, 0.8) ** 3, lambda x: x**0.5 + x**-1 + x**1 + x**0 + 2**x,
    ),
    "arithmetic": lambda x: (
        (1 - x) * V + x / V - 2 / x + x * x[0] / x[1] + torch.add(x, x * x, alpha=2) - torch.sub(1.0, x * x, alpha=3)
    ).mean(),
    "products": lambda x: (
        V @ x @ V @ x + torch.outer(x, x).trace() + torch.einsum("i,ij,j->", x, V, x) * x.sum()
        + (x @ V).dot(x.exp()) + (x[None] @ V.mT)[0, 0] ** 2 + torch.bmm((x * V)[None], (x + V)[None]).sum()
    ),
    "shapes": lambda x: (
        torch.cat([x * x, V[0]]).reshape(2, 3).permute(1, 0)[1:].sum(-1).sum() + x.exp()[[0, 2]].sum()
        + torch.stack([x, x.exp()], -1).unsqueeze(0).transpose(0, 1).flatten().square().sum()
        + (x[:, None] * x[None]).diagonal().sum() + x.sin().flip(0).cumsum(0).mean() + (x.exp()[None].mT * V).sum()
    ),
    "several results": lambda x: (lambda a, b, c: a * b * c * a)(*x.exp().unbind()) + x.square().split(2)[0].sum(),
    "where": lambda x: torch.where(x > 0.6, x**2, x * 0.3).sum() + torch.where(x > 0.6, 0.0, x**3).sum(),
    "softmax": lambda x: (
        (F.softmax(x * V, -1) * V).sum() + torch.log_softmax(V * x, 0)[1].square().sum()
        + torch.logsumexp(V * x * x, (0, 1)) + (ops.softmax(x) * x).sum()
    ),
    "norms": lambda x: torch.linalg.vector_norm(V * x, dim=-1).sum() + F.layer_norm(V * x, (3,), V[0], V[1])[0, 0],
    "weights that depend on x": lambda x: F.linear(x, x * V, x).square().sum() + torch.addmm(x, V * x, V).sum(),
    "convolution": lambda x: F.conv1d(x.exp()[None, None], W[:2, None], B[:2]).square().sum(),
    "metadata": lambda x: x.square().sum() * (len(x) + x.shape[0] + x.dim()) + x.new_zeros(3).sum(),
    "conversions": lambda x: x.square().sum().clone().view(1).squeeze(0).to(torch.float64, copy=True),
    "ops": lambda x: ops.linear(ops.linear(x, W, B, activation="silu"), W.T)[0] + ops.matmul(x[None] ** 2, V).sum(),
    "keywords": lambda x: (
        (V * x).exp().sum(axis=0)[1] + torch.mean(input=V * x * x, axis=-1, keepdims=True).square().sum()
        + torch.linalg.norm(x, ord=2) + torch.linalg.vector_norm(V * x, ord=2) + torch.softmax(V * x, axis=0)[0, 1]
        + F.gelu(input=x).sum() + torch.matmul(x, other=torch.add(x, other=x)) + torch.pow(self=2, exponent=x).sum()
        + torch.where(x > 0.6, input=x**2, other=x**3).sum() + torch.cat(tensors=[x * x, V[0]], axis=0).square().sum()
        + F.layer_norm(V * x, normalized_shape=(3,))[0, 0] + torch.cross(x, x**2, dim=0).dot(x**3)
        + torch.addmm(input=x, mat1=V * x, mat2=V * x, beta=2, alpha=3).sum()
    ),
    "a constant branch": lambda x: (x.detach() * x * torch.sign(x - 0.5)).square().sum() + x.square().sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    f = RULES[name]
    expected = trace(f, X)
    assert explain_laplacian(f, X) == "forward"
    torch.testing.assert_close(laplacian(f)(X), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(laplacian(f, chunk_size=2)(X), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.vmap(laplacian(f))(POINTS), torch.stack([trace(f, x) for x in POINTS]), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", fast_where(RULES, "arithmetic", "where", "norms", "ops", "keywords"))
def test_rules_compiled_over_points(name, fast_compile):
    f = RULES[name]
    expected = torch.stack([trace(f, x) for x in POINTS])
    torch.testing.assert_close(compiled(torch.vmap(laplacian(f)))(POINTS), expected, rtol=1e-10, atol=1e-10)


class WrongRule(torch.autograd.Function):
    """The identity, whose derivative is said to be 7: so a pass that looks inside gives another result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 7 * grad


def reverse_trace(f, x):
    """By reverse mode alone: forward mode takes no notice of `torch.no_grad`."""
    return torch.func.jacrev(torch.func.jacrev(f))(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def without_gradient(x):
    with torch.no_grad():
        factor = x.exp()
    return (factor * x * x).sum()


def in_place(x):
    y = x * x
    y[0] = x[1] ** 3
    y += x
    return (y * y).sum()


# Functions of which a part has no rule, with the words that say so.
FALLBACKS = {
    "no rule": (lambda x: x.exp().cumsum(0).prod(), "prod"),
    "a transform inside": (lambda x: (x * torch.func.grad(lambda z: z.pow(3).sum())(x)).sum(), "torch.func"),
    "vmap inside": (lambda x: (torch.vmap(torch.tanh)(x) * x).sum(), "torch.func"),
    "in place": (in_place, "__setitem__"),
    "grad mode": (without_gradient, "grad mode"),
    "an output that ignores x": (lambda x: V.sum(), "output"),
    "a spectral norm": (lambda x: torch.linalg.norm(V * x, ord=2), "spectral"),
    "bounds": (lambda x: torch.clamp(V, min=x).square().sum(), "clamp"),
    "an option": (lambda x: torch.layer_norm(x**3, (3,), cudnn_enable=False)[0], "layer_norm with these arguments"),
    "pow of two tensors": (lambda x: (x**x).sum(), "pow"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_anything_else_falls_back(name):
    f, words = FALLBACKS[name]
    assert explain_laplacian(f, X).startswith("products: ")
    assert words in explain_laplacian(f, X)
    expected = torch.stack([reverse_trace(f, x) for x in POINTS])
    torch.testing.assert_close(torch.vmap(laplacian(f))(POINTS), expected)
    of_vector = lambda x: f(x) * V[0]
    torch.testing.assert_close(laplacian(f)(X), reverse_trace(f, X))
    torch.testing.assert_close(laplacian(of_vector)(X), reverse_trace(of_vector, X))


# Of a keyword that a rule does not know the compiler makes an error of its own.
COMPILABLE = [name for name in FALLBACKS if name != "an option"]


@pytest.mark.parametrize("name", fast_where(COMPILABLE, "no rule", "in place", "grad mode"))
def test_anything_else_falls_back_compiled(name, fast_compile):
    f, _ = FALLBACKS[name]
    of_vector = lambda x: f(x) * V[0]
    both = compiled(torch.vmap(lambda x: (laplacian(f)(x), laplacian(of_vector)(x))))
    for found, function in zip(both(POINTS), (f, of_vector), strict=True):
        torch.testing.assert_close(found, torch.stack([reverse_trace(function, x) for x in POINTS]))


def test_an_autograd_function_keeps_its_rule():
    f = lambda x: WrongRule.apply(x.exp()).sum()
    assert "products" in explain_laplacian(f, X)
    torch.testing.assert_close(laplacian(f)(X), 7 * X.exp().sum())
    torch.testing.assert_close(torch.vmap(laplacian(f))(POINTS), 7 * POINTS.exp().sum(-1))


def test_where_nothing_is_recorded():
    weight = B[:3].clone().requires_grad_()
    f = lambda x: WrongRule.apply(x.exp()).sum()
    g = lambda x: ((weight * weight * x**3).sum(), weight * 2)
    with torch.no_grad():
        torch.testing.assert_close(laplacian(f)(X), 7 * X.exp().sum())
        torch.testing.assert_close(laplacian(without_gradient)(X), 2 * X.exp().sum())
        assert explain_laplacian(g, X, has_aux=True) == "forward"
        (value, aux), found = laplacian(g, has_aux=True, value=True)(X)
    torch.testing.assert_close(found, (6 * weight.detach() ** 2 * X).sum())
    assert not any(out.requires_grad or out.grad_fn for out in (value, aux, found))


def test_where_nothing_is_recorded_compiled(fast_compile):
    with torch.no_grad():
        both = compiled(torch.vmap(lambda x: (laplacian(without_gradient)(x), laplacian(RULES["norms"])(x))))
        expected = 2 * POINTS.exp().sum(-1), torch.stack([trace(RULES["norms"], x) for x in POINTS])
        torch.testing.assert_close(both(POINTS), expected)


def test_rules_of_ones_own_are_seen_by_the_pass_while_compiling(fast_compile):
    cube = fnn.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3, x), lambda x, cotangent: (3 * x**2 * cotangent,))
    square = fnn.remat(lambda x: x**2)
    for f, g in ((cube, lambda x: x**3), (square, lambda x: x**2)):
        expected = torch.stack([trace(lambda x: g(x).sum() * x[0], x) for x in POINTS])
        of_points = torch.vmap(laplacian(lambda x: f(x).sum() * x[0]))
        torch.testing.assert_close(of_points(POINTS), expected)
        torch.testing.assert_close(compiled(of_points)(POINTS), expected)


def test_an_operator_of_another_library_is_not_taken_for_one_of_torch():
    library = torch.library.Library("test_laplacian", "DEF")
    library.define("tanh(Tensor x) -> Tensor")
    library.impl("tanh", lambda x: x**3, "CompositeImplicitAutograd")
    f = lambda x: torch.ops.test_laplacian.tanh(x).sum()
    assert explain_laplacian(f, X).startswith("products: ")
    torch.testing.assert_close(laplacian(f)(X), 6 * X.sum())


def test_what_no_mode_sees_is_nan_and_never_a_number_without_derivatives():
    f = torch.jit.trace(lambda x: x * x, X)  # runs in torch's own interpreter
    assert laplacian(lambda x: (x * f(x)).sum())(X).isnan()


def test_an_operator_that_the_compiler_hides_is_nan_or_right(fast_compile):
    f = lambda x: (abs(x) * x.exp()).sum()
    found = compiled(laplacian(f))(X)
    assert found.isnan() or torch.allclose(found, trace(f, X))
    torch.testing.assert_close(laplacian(f)(X), trace(f, X))


def test_output_of_any_structure():
    f = lambda x: {"scalar": x[0] * x[1] ** 2, "matrix": [x**3 * V, x.sum()]}
    found = laplacian(f)(X)
    torch.testing.assert_close(found["scalar"], 2 * X[0])
    torch.testing.assert_close(found["matrix"][0], 6 * X * V)
    assert found["matrix"][1] == 0
    slow = laplacian(f, method="products", chunk_size=2)(X)
    assert fnn.tree.allclose(found, slow)


def test_trees_and_argnums():
    x = {"a": draw(5, 2), "b": (draw(6), draw(7, 1, 2))}
    f = lambda scale, x: scale * (x["a"].sum() ** 2 * x["b"][0] ** 2 + (x["b"][1] ** 3).sum())
    expected = 2.0 * (2 * 2 * x["b"][0] ** 2 + 2 * x["a"].sum() ** 2 + 6 * x["b"][1].sum())
    for method in ("forward", "products"):
        torch.testing.assert_close(laplacian(f, 1, method=method)(2.0, x), expected)
    g = lambda x, y: (x**2).sum() * (y**3).sum()
    both = laplacian(g, (0, 1))(X, V)
    torch.testing.assert_close(both, 6 * (V**3).sum() + (X**2).sum() * 6 * V.sum())


def test_value_and_aux():
    f = lambda x: ((x**2).sum(), {"twice": 2 * x, "name": "f"})
    for method in ("forward", "products"):
        found, aux = laplacian(f, has_aux=True, method=method)(X)
        assert found == 6
        torch.testing.assert_close(aux["twice"], 2 * X)
        (value, aux), found = laplacian(f, has_aux=True, value=True, method=method)(X)
        assert found == 6
        assert aux["name"] == "f"
        torch.testing.assert_close(value, (X**2).sum())


def network():
    net = nn.Sequential(nn.Linear(5), nn.tanh, nn.Linear(4), nn.silu, nn.Linear(1))
    params, _ = net.init(fnn.random.key(8), X)
    return net, params


def residual(net, params, x):
    """Of a Poisson equation; x one point."""
    value, lap = laplacian(lambda z: net(params, z).squeeze(-1), value=True)(x)
    return (lap + value - torch.sin(x).sum()) ** 2


def reference(net, params, x):
    f = lambda z: net(params, z).squeeze(-1)
    return (trace(f, x) + f(x) - torch.sin(x).sum()) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradient_of_a_residual_by_parameters(dtype):
    net, params = network()
    params = fnn.tree.map(lambda p: p.to(dtype), params)
    loss = lambda params, of: torch.vmap(lambda x: of(net, params, x))(POINTS.to(dtype)).mean()
    assert explain_laplacian(lambda z: net(params, z), X.to(dtype)) == "forward"
    expected = torch.func.grad(loss)(fnn.tree.map(lambda p: p.double(), params), reference) if dtype is DOUBLE else None
    found = torch.func.grad(loss)(params, residual)
    if dtype is torch.float32:
        expected = torch.func.grad(loss)(params, reference)
    tolerance = 1e-10 if dtype is DOUBLE else 1e-4
    assert fnn.tree.allclose(found, expected, rtol=tolerance, atol=tolerance)
    leaves = fnn.tree.map(lambda p: p.clone().requires_grad_(), params)
    loss(leaves, residual).backward()
    assert fnn.tree.allclose(fnn.tree.map(lambda p: p.grad, leaves), expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_a_residual_for_each_point_compiled(fast_compile):
    net, params = network()
    rows = lambda of: torch.vmap(torch.func.grad(lambda p, x: of(net, p, x)), (None, 0))
    expected = rows(reference)(params, POINTS)
    assert fnn.tree.allclose(rows(residual)(params, POINTS), expected, rtol=1e-10, atol=1e-10)
    assert fnn.tree.allclose(compiled(rows(residual))(params, POINTS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradient_of_a_residual_by_inductor():
    net, params = network()
    loss = lambda params, of: torch.vmap(lambda x: of(net, params, x))(POINTS).mean()
    expected = torch.func.grad(loss)(params, reference)
    found = compiled(lambda p: torch.func.grad(loss)(p, residual))(params)
    assert fnn.tree.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_the_directions_stay_one_until_the_first_nonlinearity():
    """Under vmap the first layer's Jacobian is its weight, once for all points."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in func.__name__ or "product" in func.__name__:
                sizes.append(out.numel())
            return out

    with Sizes():
        torch.vmap(laplacian(lambda x: F.linear(x, W).tanh().sum()))(draw(9, 50, 3))
    assert sorted(sizes) == [3 * 4, 50 * 4]


def test_bilaplacian(fast_compile):
    def gaussian(x):
        return torch.exp(-x.dot(x))

    def of_gaussian(x):
        n, r2 = x.numel(), x.dot(x)
        return (16 * r2 * r2 - 16 * (n + 2) * r2 + 4 * n * (n + 2)) * gaussian(x)

    sines = lambda x: torch.sin(x[0]) * torch.sin(x[1]) * torch.sin(x[2])
    biharmonic = lambda x: x.dot(x) * (x[0] ** 2 - x[1] ** 2)
    cases = ((gaussian, of_gaussian), (sines, lambda x: 9 * sines(x)), (biharmonic, lambda x: 0 * x[0]))
    for f, expected in cases:
        expected = torch.stack([expected(x) for x in POINTS])
        assert explain_laplacian(laplacian(f), X) == "forward"
        torch.testing.assert_close(torch.vmap(bilaplacian(f))(POINTS), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        compiled(torch.vmap(bilaplacian(gaussian)))(POINTS), torch.stack([*map(of_gaussian, POINTS)])
    )
    f = lambda x: F.linear(x, W, B).tanh().cumsum(0).prod()
    expected = trace(lambda x: trace(f, x), X)
    torch.testing.assert_close(bilaplacian(f)(X), expected)
    torch.testing.assert_close(bilaplacian(f, chunk_size=2)(X), expected)


def test_empty_input():
    assert laplacian(lambda x: x.sum() ** 2)(torch.zeros(0)) == 0


def test_errors():
    f = lambda x: (x**2).sum()
    with pytest.raises(TypeError, match="int64"):
        laplacian(f)(torch.arange(3))
    with pytest.raises(TypeError, match="complex64"):
        laplacian(f)(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'forward', 'products'"):
        laplacian(f, method="hessian")
    with pytest.raises(TypeError, match="chunk_size"):
        laplacian(f, chunk_size="auto")
    with pytest.raises(ValueError, match="chunk_size"):
        laplacian(f, chunk_size=0)
    with pytest.raises(NotImplementedError, match="prod"):
        laplacian(lambda x: x.prod(), method="forward")(X)
    with pytest.raises(TypeError, match="already compiled"):
        laplacian(torch.compile(f))
    with pytest.raises(TypeError, match="output is float"):
        laplacian(lambda x: 3.0)(X)
    with pytest.raises(TypeError, match="has_aux"):
        laplacian(f, has_aux=True)(X)
    assert math.isfinite(laplacian(f)(X))
