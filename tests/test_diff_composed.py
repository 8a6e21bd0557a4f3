"""Derivatives of derivatives of operators that torch differentiates wrongly when transforms are nested."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from fnn import diff
from fnn.diff._composed import by_operators

DOUBLE = {"dtype": torch.float64}
STEP = 1e-3
_draws = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=_draws, **DOUBLE)


X, DIRECTION = draw(4, 3), draw(4, 3)
W, ALONG = 3 * torch.eye(3, **DOUBLE) + 0.5 * draw(3, 3), draw(3, 3)

MODULE = torch.nn.LayerNorm(3, **DOUBLE)

NETS = {
    "layer norm": lambda w, x: F.layer_norm(x @ w, (3,), w[0], w[1]).sin(),
    "layer norm module": lambda w, x: MODULE(x @ w).sin(),
    "batch norm": lambda w, x: F.batch_norm(x @ w, None, None, w[0], w[1], training=True).sin(),
    "instance norm": lambda w, x: F.instance_norm((x @ w)[None], weight=w[0].repeat(2)[:4])[0].sin(),
    "solve": lambda w, x: torch.linalg.solve(w, x.mT).mT.sin(),
    "solve from the right": lambda w, x: torch.linalg.solve(w, x, left=False).sin(),
    "det": lambda w, x: x.sin() * torch.linalg.det(w) / 9,
    "slogdet": lambda w, x: x.sin() * torch.linalg.slogdet(w).logabsdet * w.slogdet()[0] + torch.logdet(w @ w.mT),
}
QUANTITIES = {
    "grad": lambda f: lambda w: diff.grad(lambda x: (f(w, x) ** 2).sum())(X),
    "jvp": lambda f: lambda w: diff.jvp(lambda x: f(w, x), X, DIRECTION)[1],
    "jacobian by rows": lambda f: lambda w: diff.jacobian(lambda v: f(v, X)[0], mode="rev")(w),
    "jacobian by columns": lambda f: lambda w: diff.jacobian(lambda v: f(v, X)[0], mode="fwd")(w),
    "hvp": lambda f: lambda w: diff.hvp(lambda v: (f(v, X) ** 2).sum(), w, ALONG.mT),
    "linearize": lambda f: lambda w: diff.linearize(lambda x: f(w, x), X)[1](DIRECTION),
    "vmap of a pullback": lambda f: lambda w: vmap(diff.vjp(lambda v: f(v, X), w)[1])(torch.stack([X, DIRECTION]))[0],
    "laplacian": lambda f: lambda w: diff.laplacian(lambda x: f(w, x))(X),
    "laplacian by products": lambda f: lambda w: diff.laplacian(lambda x: f(w, x), method="products")(X),
    "hessian_diagonal": lambda f: lambda w: diff.hessian_diagonal(lambda x: (f(w, x) ** 2).sum())(X),
    "divergence": lambda f: lambda w: diff.divergence(lambda x: f(w, x))(X),
}


def slope(f):
    """The derivative of `f` at W along ALONG, by differences of fourth order."""
    at = lambda steps: f(W + steps * STEP * ALONG)
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)


def by_backward(f, w):
    w = w.clone().requires_grad_()
    return torch.autograd.grad(f(w), w)[0]


WAYS = {
    "grad": lambda f, w: (diff.grad(f)(w) * ALONG).sum(),
    "jvp": lambda f, w: diff.jvp(f, w, ALONG)[1],
    "torch.func": lambda f, w: (torch.func.grad(f)(w) * ALONG).sum(),
    "backward": lambda f, w: (by_backward(f, w) * ALONG).sum(),
}


def squared(quantity, net):
    return lambda w: (QUANTITIES[quantity](NETS[net])(w) ** 2).sum()


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("net", NETS)
def test_the_derivative_of_a_derivative(net, quantity):
    f = squared(quantity, net)
    want = slope(f)
    for way in WAYS.values():
        torch.testing.assert_close(way(f, W), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_the_hessian(net):
    f = lambda w: (NETS[net](w, X) ** 2).sum()
    want = torch.func.jvp(torch.func.grad(f), (W,), (ALONG,))[1]  # right in torch, and so checked in the other order
    torch.testing.assert_close(want, slope(diff.grad(f)), rtol=1e-6, atol=1e-6)
    for mode in ("fwd", "rev"):
        H = diff.hessian(f, flat=True, mode=mode)(W)
        torch.testing.assert_close((H @ ALONG.reshape(-1)).reshape(3, 3), want)
        for other in ("fwd", "rev"):
            torch.testing.assert_close(diff.jacobian(diff.jacobian(f, mode=mode), mode=other, flat=True)(W), H)


@pytest.mark.parametrize(
    ("net", "quantity"),
    [
        ("layer norm", "jvp"),
        ("slogdet", "laplacian by products"),
        *(
            pytest.param(*names, marks=pytest.mark.slow)
            for names in (
                ("layer norm", "jacobian by rows"),
                ("batch norm", "hvp"),
                ("solve", "jvp"),
                ("layer norm module", "laplacian"),
            )
        ),
    ],
)
def test_compiled(net, quantity, fast_compile):
    f = squared(quantity, net)
    torch.testing.assert_close(torch.compile(diff.grad(f), fullgraph=True)(W), diff.grad(f)(W))


def test_the_compositions_are_the_operators():
    image, matrices, weight = draw(2, 3, 4), draw(2, 3, 3), draw(3)
    mean, var = draw(3), draw(3).square()
    calls = [
        lambda: F.layer_norm(image, (3, 4), image[0], image[1], 1e-2),
        lambda: torch.layer_norm(image.half(), (4,)),
        lambda: F.batch_norm(image, mean, var, weight),
        lambda: F.batch_norm(image, mean.clone(), var.clone(), bias=weight, training=True),
        lambda: F.batch_norm(image[..., 0], None, None, weight, weight, True, eps=0.1),
        lambda: F.instance_norm(image, mean, var, weight, weight, use_input_stats=False),
        lambda: F.instance_norm(image, weight=weight, eps=0.1),
        lambda: torch.linalg.solve(matrices, image),
        lambda: torch.linalg.solve(matrices, image[..., 0]),
        lambda: torch.linalg.solve(matrices[0], weight),
        lambda: torch.linalg.solve(matrices.to(torch.complex128), matrices + 1j, left=False),
        lambda: matrices.det(),
        lambda: torch.linalg.slogdet(matrices * 1j)[0],
        lambda: torch.slogdet(matrices).logabsdet,
        lambda: (matrices @ matrices.mT).logdet(),
        lambda: torch.linalg.det(torch.zeros(0, 0)),
    ]
    for call in calls:
        with by_operators():
            got = call()
        torch.testing.assert_close(got, call())


def test_running_averages_are_updated_as_torch_updates_them():
    averages = [torch.zeros(3, **DOUBLE), torch.ones(3, **DOUBLE)]
    expected = [average.clone() for average in averages]
    F.batch_norm(X, *expected, training=True)
    with by_operators():
        F.batch_norm(X, *averages, training=True)
    torch.testing.assert_close(averages, expected)


# torch has no forward derivative of these losses' gradients.
LOSSES = {
    "mse": lambda y, t: F.mse_loss(y, t),
    "mse, summed": lambda y, t: F.mse_loss(y, t, reduction="sum"),
    "huber": lambda y, t: F.huber_loss(y, t, "mean", 0.3),
    "soft margin": lambda y, t: F.soft_margin_loss(y, t.sign()),
    "mse module": lambda y, t: torch.nn.MSELoss()(y, t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_forward_derivative_of_their_gradient(name, fast_compile):
    model, loss = lambda w: torch.tanh(w.mT @ X[0]), lambda y: LOSSES[name](y, DIRECTION[0])
    value = loss(model(W))
    with by_operators():
        torch.testing.assert_close(loss(model(W)), value)
    gradient = torch.func.grad(lambda v: loss(model(v)))
    expected = torch.func.jacrev(gradient)(W)
    J = torch.func.jacrev(model)(W).flatten(1)
    gauss_newton = (J.mT @ torch.func.jacrev(torch.func.grad(loss))(model(W)) @ J @ ALONG.flatten()).reshape(3, 3)
    product = torch.einsum("ijkl,kl->ij", expected, ALONG)

    def everything(w, along):
        f = lambda v: loss(model(v))
        return diff.hessian(f)(w), diff.hvp(f, w, along), diff.gnvp(model, loss, w, along)

    results = {
        "eager": everything(W, ALONG),
        "compiled": torch.compile(everything, fullgraph=True)(W, ALONG),
        "vmapped": tuple(out[0] for out in torch.compile(vmap(everything), fullgraph=True)(W[None], ALONG[None])),
    }
    for way, found in results.items():
        torch.testing.assert_close(found, (expected, product, gauss_newton), msg=way)


def test_edges_of_the_compositions():
    residuals = torch.tensor([0.0, 0.3, 2.0])
    curvature = diff.hessian(lambda x: F.huber_loss(x, torch.zeros(3), reduction="sum"))(residuals)
    assert torch.equal(curvature, torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    singular = torch.ones(2, 2)
    assert diff.jacobian(torch.linalg.det, mode="rev", value=True)(singular)[0] == 0
    with pytest.raises(RuntimeError, match="normalized_shape"):
        diff.jacobian(lambda x: F.layer_norm(x, (7,)))(torch.ones(5))


def test_weight_norm_curves_as_its_formula():
    size = draw(3, 1)
    f = lambda v: torch._weight_norm(v, size, 0).sin().sum()
    expected = torch.func.hessian(lambda v: (v * (size / v.norm(dim=1, keepdim=True))).sin().sum())(W)
    torch.testing.assert_close(diff.hessian(f)(W), expected)
    torch.testing.assert_close(diff.hvp(f, W, ALONG), torch.einsum("ijkl,kl->ij", expected, ALONG))


def test_a_hessian_takes_reverse_mode_where_there_is_no_other():
    grid = torch.full((1, 2, 2, 2), 0.1, **DOUBLE)
    f = lambda x: F.grid_sample(x[None, None], grid, align_corners=False).square().sum()
    torch.testing.assert_close(diff.hessian(f)(W), diff.hessian(f, mode="rev")(W))
    with pytest.raises(NotImplementedError):
        diff.hessian(f, mode="fwd")(W)
