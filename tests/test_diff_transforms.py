"""grad, value_and_grad, vjp, jvp, linearize, hvp and gnvp: closed forms, call forms, and functions they refuse."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import rosen_der, rosen_hess_prod

import fnn
from fnn import diff, nn

X = torch.tensor([1.3, 0.7, 0.8, 1.9], dtype=torch.float64)
V = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def powell(x):
    return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def powell_gradient(x):
    a, b, c, d = x[0] + 10 * x[1], x[2] - x[3], x[1] - 2 * x[2], x[0] - x[3]
    return torch.stack(
        [2 * a + 40 * d**3, 20 * a + 4 * c**3, 10 * b - 8 * c**3, -10 * b - 40 * d**3],
    )


class Pair(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def eager(f):
    return f


def compiled(f):
    return torch.compile(f, fullgraph=True)


def vmapped(f):
    def once(*args):
        batch = [torch.stack([a, a + 1]) for a in args]
        return fnn.tree.map(lambda leaf: leaf[0], torch.vmap(f)(*batch))

    return once


WAYS = [eager, compiled, vmapped, lambda f: compiled(vmapped(f))]
ways = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize(
    ("f", "gradient", "way"),
    [
        *((rosenbrock, lambda x: torch.as_tensor(rosen_der(x.numpy())), way) for way in WAYS),
        *((powell, powell_gradient, way) for way in (eager, vmapped)),
        *((lambda x: torch.logsumexp(x, 0), lambda x: torch.softmax(x, 0), way) for way in (eager, vmapped)),
    ],
)
def test_gradients_in_closed_form(way, f, gradient, fast_compile):
    want = gradient(X)
    torch.testing.assert_close(way(diff.grad(f))(X), want)
    value, got = way(diff.value_and_grad(f))(X)
    torch.testing.assert_close((value, got), (f(X), want))
    output, pulled = way(lambda x: (diff.vjp(f, x)[0], diff.vjp(f, x)[1](torch.ones_like(x[0]))))(X)
    torch.testing.assert_close((output, pulled), (f(X), (want,)))
    torch.testing.assert_close(way(lambda x, v: diff.jvp(f, x, v))(X, V), (f(X), want @ V))

    def linearized(x, v):
        output, f_jvp = diff.linearize(f, x)
        return output, f_jvp(v), f_jvp(2 * v)

    torch.testing.assert_close(way(linearized)(X, V), (f(X), want @ V, 2 * want @ V))


@ways
def test_hessian_vector_products(way, fast_compile):
    want = torch.as_tensor(rosen_hess_prod(X.numpy(), V.numpy()))
    torch.testing.assert_close(way(lambda x, v: diff.hvp(rosenbrock, x, v))(X, V), want)
    value, (got,) = way(lambda x, v: diff.hvp(rosenbrock, (x,), (v,), value=True))(X, V)
    torch.testing.assert_close((value, got), (rosenbrock(X), want))


@ways
def test_gauss_newton_products(way, fast_compile):
    a = torch.arange(12, dtype=torch.float64).reshape(3, 4).sin()

    def model(w):
        return torch.tanh(a @ w)

    def loss(y):
        return (y**4).sum()

    y = model(X)
    jacobian = (1 - y**2)[:, None] * a
    want = jacobian.T @ ((12 * y**2) * (jacobian @ V))
    value, got = way(lambda x, v: diff.gnvp(model, loss, x, v, value=True))(X, V)
    torch.testing.assert_close((value, got), (loss(y), want))
    product, aux = diff.gnvp(lambda w: (model(w), 2 * w), loss, (X,), (V,), has_aux=True)
    torch.testing.assert_close((product, aux), ((want,), 2 * X))


def test_call_forms(fast_compile):
    def f(p, x, *, scale):
        z = x @ p.weight + p.bias["b"]
        return (z**2).sum() * scale, {"z": z}

    p = Pair(torch.ones(2, dtype=torch.float64), {"b": torch.tensor(0.5)})
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    z = x @ p.weight + 0.5
    for way in (eager, compiled):
        (loss, aux), (by_p, by_x) = way(diff.value_and_grad(f, argnums=(0, -1), has_aux=True))(p, x, scale=3.0)
        torch.testing.assert_close((loss, aux["z"]), (3 * (z**2).sum(), z))
        assert isinstance(by_p, Pair)
        torch.testing.assert_close(by_p.weight, 6 * z @ x)
        torch.testing.assert_close(by_p.bias["b"], (6 * z).sum().float())
        torch.testing.assert_close(by_x, 6 * z[:, None] * p.weight)
    assert diff.grad(f, has_aux=True)(p, x, scale=3.0)[1]["z"].shape == (2,)
    output, pullback, aux = diff.vjp(lambda x, y: (x * y, x), X, V, has_aux=True)
    torch.testing.assert_close((pullback(X), aux, output), ((X * V, X * X), X, X * V))
    output, tangent, aux = diff.jvp(lambda p: (p["a"] ** 2, p["a"]), {"a": X}, {"a": V}, has_aux=True)
    torch.testing.assert_close((tangent, aux), (2 * X * V, X))
    output, f_jvp, aux = diff.linearize(lambda x, y: ({"o": x * y}, x), X, V, has_aux=True)
    torch.testing.assert_close((f_jvp(V, X)["o"], aux), (V * V + X * X, X))
    torch.testing.assert_close(torch.vmap(lambda t: f_jvp(t, X * 0)["o"])(torch.eye(4).double()), torch.diag(V))


def test_nested_gradients(fast_compile):
    third = diff.grad(diff.grad(diff.grad(lambda x: x**5)))
    x = torch.tensor(2.0, dtype=torch.float64)
    for way in (eager, compiled, vmapped):
        torch.testing.assert_close(way(third)(x), 60 * x**2)


def test_a_layer_and_a_module_are_functions():
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(2)
    params, _ = layer.init(fnn.random.key(0), x)
    grads = diff.grad(lambda p, x: layer(p, x).sum())(params, x)
    torch.testing.assert_close(grads, {"weight": x.expand(2, 3), "bias": torch.ones(2)}, check_stride=False)
    module = torch.nn.Linear(3, 2)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    grads = diff.grad(lambda p: torch.func.functional_call(module, p, x).sum())(weights)
    torch.testing.assert_close(grads["weight"], x.expand(2, 3), check_stride=False)
    # Parameters that require gradients keep their graph: a penalty on the gradient can be trained.
    penalty = diff.grad(lambda x: module(x).pow(2).sum())(x).pow(2).sum()
    want = torch.autograd.grad((2 * module(x) @ module.weight).pow(2).sum(), module.weight)
    torch.testing.assert_close(torch.autograd.grad(penalty, module.weight), want)


def test_a_gradient_keeps_no_second_graph():
    from fnn.diff._chunk import LiveBytes

    def deep(x):
        for _ in range(20):
            x = torch.tanh(x)
        return x.sum()

    x = torch.ones(1000)
    peaks = []
    for gradient in (torch.func.grad, diff.grad):
        gradient(deep)(x)
        with LiveBytes() as memory:
            gradient(deep)(x)
        peaks.append(memory.peak)
    assert peaks[1] < 0.7 * peaks[0]


def attention(q):
    return F.scaled_dot_product_attention(q, 2 * q, q.sin())


def plain_attention(q):
    return torch.softmax(q @ (2 * q).mT / q.shape[-1] ** 0.5, -1) @ q.sin()


@pytest.mark.parametrize("way", [eager, compiled])
def test_every_derivative_of_attention(way, fast_compile):
    q = torch.linspace(-1, 1, 24).reshape(2, 1, 3, 4)

    def derivatives(f):
        def square(q):
            return f(q).pow(2).sum()

        return lambda q: (
            diff.grad(square)(q),
            diff.jvp(f, q, q.cos())[1],
            diff.linearize(f, q)[1](q.cos()),
            diff.hvp(square, q, q.cos()),
            diff.grad(lambda q: diff.grad(square)(q).pow(2).sum())(q),
        )

    got, want = way(derivatives(attention))(q), derivatives(plain_attention)(q)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


def test_more_functions_than_the_compiler_allows_for_one(trace_only):
    with torch._dynamo.config.patch(recompile_limit=2):  # eight by default
        for f, slope in ((torch.sin, X.cos()), (torch.cos, -X.sin()), (torch.exp, X.exp()), (torch.square, 2 * X)):
            gradient = torch.compile(diff.grad(lambda x, f=f: f(x).sum()), fullgraph=True)
            torch.testing.assert_close(gradient(X), slope)


def overwritten(x):
    x.add_(1)
    return (x * x).sum()


OUTSIDE = torch.ones(4, dtype=torch.float64)


def captured(x):
    OUTSIDE.add_(x)
    return (x * OUTSIDE).sum()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: diff.grad(lambda x: x)(X), ValueError, "got shape .4,.*sum.*fnn.jacobian.*fnn.vjp"),
        (lambda: diff.grad(lambda x: 3)(X), TypeError, "scalar tensor, got int"),
        (lambda: diff.grad(lambda x: (x * 1j).sum())(X), TypeError, "complex128; take its real part"),
        (lambda: diff.grad(lambda p: p["a"].sum())({"a": torch.arange(3)}), TypeError, "leaf 'a'.*int64.*argnums"),
        (lambda: diff.grad(lambda p: p["a"])({"a": 1.0}), TypeError, "leaf 'a'.*float, .*torch.tensor"),
        (lambda: diff.grad(lambda p: p["a"])({"a": X[0], "b": None}), TypeError, "leaf 'b'.*NoneType"),
        (lambda: diff.grad(lambda x: x.sum(), argnums=1)(X), ValueError, "argnums=1.*1 arguments"),
        (lambda: diff.grad(lambda x: x.sum(), has_aux=True)(X), TypeError, r"\(output, aux\)"),
        (lambda: diff.grad(X), TypeError, "takes the function first"),
        (lambda: diff.grad(torch.compile(torch.sum)), TypeError, "compile the outside"),
        (lambda: diff.jvp(torch.sin, {"a": X}, {"b": X}), ValueError, "tangents: missing '0.a'"),
        (lambda: diff.jvp(lambda p: p["a"], {"a": X}, {"a": X[:2]}), ValueError, r"'0.a' has shape \(2,\), expected"),
        (lambda: diff.jvp(torch.sin, X, X.float()), ValueError, "dtype torch.float32, expected torch.float64"),
        (lambda: diff.jvp(torch.sin, (X,), X), TypeError, "tangents must be, got Tensor"),
        (lambda: diff.jvp(lambda x: None, X, V), TypeError, "output is NoneType"),
        (lambda: diff.vjp(lambda x: {"o": x}, X)[1]({"o": X[:1]}), ValueError, r"cotangent.*'o' has shape \(1,\)"),
        (lambda: diff.vjp(lambda x: {"o": x}, X)[1](X), ValueError, "cotangent.*missing 'o'"),
        (lambda: diff.linearize(torch.sin, X)[1](X, X), ValueError, "tangents of f_jvp"),
        (lambda: diff.hvp(rosenbrock, X, X[:2]), ValueError, r"hvp: tangents.*\(2,\)"),
        (lambda: diff.gnvp(torch.sin, torch.cos, X, X), ValueError, "gnvp: the function must return one number"),
        (lambda: diff.grad(overwritten)(X.clone()), RuntimeError, r"in place.*x = x \+ 1"),
        (lambda: diff.jvp(overwritten, X.clone(), V), RuntimeError, r"in place.*x = x \+ 1"),
        (lambda: diff.grad(captured)(X), RuntimeError, "tensor from outside.*has_aux"),
        (lambda: diff.grad(lambda x: F.dropout(x).sum())(X), TypeError, "global generator.*fnn.random.*key"),
        (lambda: diff.jvp(lambda x: x * torch.rand(4), X, V), TypeError, "aten.rand.*fnn.random"),
        (lambda: diff.hvp(lambda x: F.dropout(x).pow(2).sum(), X, V), TypeError, "hvp: aten.bernoulli"),
        (lambda: torch.vmap(diff.grad(lambda x: x.sum() if x[0] > 0 else x.prod()))(X[None]), RuntimeError, "where"),
        (lambda: diff.grad(torch.sum, argnums=1.0)(X), TypeError, "tuple of ints, got 1.0"),
        (lambda: diff.jacobian(torch.sin, argnums=True)(X), TypeError, "tuple of ints, got True"),
        (lambda: diff.hessian(torch.sum, argnums=None)(X), TypeError, "tuple of ints, got None"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_argument_written_to_is_named():
    with pytest.raises(RuntimeError, match="leaf 'a' of argument 0 in place"):
        diff.jvp(lambda p: p["a"].mul_(2), {"a": X.clone()}, {"a": V})


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.dropout(x).sum(),
        lambda x: x.bernoulli().sum(),
        pytest.param(
            lambda x: (x * torch.randn(4)).sum(),
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.11."), reason="the compiler of 2.11 shows no mode this call"
            ),
        ),
    ],
)
def test_random_numbers_without_a_key_are_refused_while_compiling(f, fast_compile):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fnn.random"):
        torch.compile(diff.grad(f), fullgraph=True)(X)


def test_random_numbers_from_a_key_and_dropout_that_is_off_are_not_refused(fast_compile):
    key = fnn.random.key(0)

    def f(x):
        return (F.dropout(x, training=False) * fnn.random.normal(key, (4,), torch.float64)).sum()

    want = fnn.random.normal(key, (4,), torch.float64)
    torch.testing.assert_close(diff.grad(f)(X), want)
    torch.testing.assert_close(torch.compile(diff.grad(f), fullgraph=True)(X), want)


def test_numbers_drawn_elsewhere_meanwhile_are_not_the_functions():
    drawn = []

    def f(x):
        if not drawn:
            drawn.append(torch.rand(1))  # as another thread would, once
        return (x * x).sum()

    torch.testing.assert_close(diff.grad(f)(X), 2 * X)


@pytest.mark.parametrize("way", [eager, pytest.param(compiled, marks=pytest.mark.slow)])
def test_primals_that_share_memory(way, fast_compile):
    base = torch.arange(12.0, dtype=torch.float64)
    f = lambda w: w.mT.sin().sum()
    view, ones = base[2:8].view(2, 3), torch.ones(2, 3, dtype=torch.float64)
    expanded = base[1].expand(2, 3)
    for primal in (view, expanded):
        want = primal.cos().sum()
        torch.testing.assert_close(way(lambda w: diff.jvp(f, w, ones)[1])(primal), want)
        torch.testing.assert_close(way(diff.jacobian(f, mode="fwd"))(primal), primal.cos())
        torch.testing.assert_close(way(lambda w: diff.hvp(f, w, ones))(primal), -primal.sin())
    torch.testing.assert_close(way(lambda b: diff.jvp(f, b[2:8].view(2, 3), ones)[1])(base), view.cos().sum())


def test_methods_that_the_compiler_cannot_trace_under_a_mode(fast_compile):
    x = torch.randn(2, 6)
    for transform in (diff.grad, diff.hessian):
        got = compiled(transform(lambda x: x.unflatten(-1, (2, 3)).sin().sum()))(x)
        torch.testing.assert_close(got, transform(lambda x: x.sin().sum())(x))


@pytest.mark.slow
def test_inductor():
    def several(x, v):
        _, f_jvp = diff.linearize(lambda x: x**3, x)
        products = f_jvp(v), torch.vmap(f_jvp)(torch.eye(4, dtype=torch.float64))
        return diff.grad(rosenbrock)(x), diff.hvp(rosenbrock, x, v), products

    gradient, product, products = compiled(several)(X, V)
    torch.testing.assert_close(gradient, torch.as_tensor(rosen_der(X.numpy())))
    torch.testing.assert_close(product, torch.as_tensor(rosen_hess_prod(X.numpy(), V.numpy())))
    torch.testing.assert_close(products, (3 * X**2 * V, torch.diag(3 * X**2)))


def test_dropout_that_drops_nothing_is_allowed(fast_compile):
    """In evaluation a module calls dropout with its switch off, by position."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).eval()
    params, x = dict(module.named_parameters()), torch.ones(1, 2)
    loss = lambda params: torch.func.functional_call(module, params, (x,)).sum()
    gradient = torch.compile(fnn.grad(loss), fullgraph=True)(params)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(params))
    module.train()
    with pytest.raises(Exception, match="global generator"):
        torch.compile(fnn.grad(lambda params: loss(params) + 0), fullgraph=True)(params)


def test_a_function_kept_from_the_compiler_is_not_a_compiled_one():
    assert torch.equal(fnn.grad(torch.compiler.disable(lambda x: x.sum()))(torch.zeros(2)), torch.ones(2))
