"""`remat` changes what is kept in memory, and no value and no derivative."""

import functools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import nn, random, remat

POINT = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def block(params, x, *, power=1):
    return {"y": torch.sin(params["w"] * x) ** power, "seen": torch.arange(3) + 1}


def of(f):
    return lambda x: (f({"w": POINT.exp(), "count": torch.tensor(3)}, x, power=2)["y"] ** 2).sum()


TRANSFORMS = {
    "grad": grad,
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "vmap(grad)": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "grad(vmap)": lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_equal_derivatives(name, compiled, fast_compile):
    transform = TRANSFORMS[name]
    run = transform(of(remat(block)))
    run = torch.compile(run, fullgraph=True) if compiled else run
    torch.testing.assert_close(run(POINT), transform(of(block))(POINT))


@pytest.mark.parametrize("compiled", [False, True])
def test_random_numbers_are_the_same_in_both_runs(compiled, fast_compile):
    def noisy(w, key, x):
        mask = random.bernoulli(key, 0.5, x.shape)
        return torch.where(mask, torch.sin(w * x), 0), {"mean": x.mean()}

    def run(f):
        return grad(lambda w: (f(w, random.key(0), POINT)[0] ** 2).sum())

    step = run(remat(noisy))
    step = torch.compile(step, fullgraph=True) if compiled else step
    torch.testing.assert_close(step(POINT.exp()), run(noisy)(POINT.exp()))


VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(VERSION < (2, 13), reason="older torch takes no function that the compiled one defines")
def test_inside_of_a_compiled_function(fast_compile):
    def step(x):
        return grad(lambda x: remat(torch.sin)(remat(lambda x: x * x)(x)).sum())(x)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(POINT), 2 * POINT * torch.cos(POINT**2))


def test_a_function_of_the_program_raises(fast_compile):
    def step(x):
        scale = x.sum()
        return grad(lambda y: remat(lambda y: y * scale)(y).sum())(x)

    with pytest.raises(Exception, match=r"functions_defined_outside_the_compiled_function|id\(\) with unsupported"):
        torch.compile(step, fullgraph=True)(POINT)
    with pytest.raises(ValueError, match="pass 'scale' as an argument"):
        grad(lambda scale: remat(lambda y: y * scale)(torch.ones(())))(torch.tensor(2.0))


class Scale:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x * self.w

    def method(self, x):
        return x * self.w


def with_keyword_default(w):
    def f(x, *, w=w):
        return x * w

    return f


OUTSIDE = {
    "closure": (lambda w: lambda x: x * w, "reads 'w'.*pass 'w'"),
    "default": (lambda w: lambda x, w=w: x * w, "default argument 'w'.*pass 'w'"),
    "keyword default": (with_keyword_default, "default argument 'w'"),
    "partial": (lambda w: functools.partial(torch.mul, w), r"an argument of functools\.partial.*pass it"),
    "partial keyword": (lambda w: functools.partial(torch.mul, other=w), r"an argument of functools\.partial"),
    "bound method": (lambda w: Scale(w).method, "'w' of Scale"),
    "object": (Scale, "'w' of Scale"),
    "object in a closure": (lambda w: (lambda scale: lambda x: x * scale.w)(Scale(w)), "'w' of Scale"),
    "method of a tensor": (lambda w: w.mul, "the Tensor whose method"),
    "inner remat": (lambda w: remat(lambda x, w=w: x * w), "default argument 'w'"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_differentiated_tensor_from_outside_raises(name):
    make, match = OUTSIDE[name]
    with pytest.raises(ValueError, match=match):
        grad(lambda w: remat(make(w))(POINT).sum())(POINT)
    with pytest.raises(ValueError, match=match):
        remat(make(POINT.clone().requires_grad_()))(POINT.clone().requires_grad_())
    x = POINT.clone().requires_grad_()
    remat(make(POINT))(x).sum().backward()  # a constant may come from outside
    torch.testing.assert_close(x.grad, POINT)


WEIGHT = torch.ones(3, dtype=torch.float64, requires_grad=True)
NET = torch.nn.Linear(3, 3, dtype=torch.float64)


def reads_weight(x):
    return (lambda: x * WEIGHT)()


GLOBALS = {
    "global": (reads_weight, "global 'WEIGHT'"),
    "global in a function": (lambda x: reads_weight(x), "global 'WEIGHT'"),
    "module": (NET, "'weight' of Linear"),
    "method of a module": (NET.forward, "'weight' of Linear"),
    "module in a function": (lambda x: NET(x), "'weight' of Linear"),
}


@pytest.mark.parametrize("name", GLOBALS)
def test_a_parameter_from_outside_raises(name):
    f, match = GLOBALS[name]
    with pytest.raises(ValueError, match=match):
        remat(f)(POINT.clone().requires_grad_())
    with pytest.raises(ValueError, match=match):
        grad(lambda x: remat(f)(x).sum())(POINT)
    with torch.no_grad():
        torch.testing.assert_close(remat(f)(POINT), f(POINT))


def test_what_has_no_derivative_may_come_from_outside():
    weight = torch.nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)
    torch.testing.assert_close(grad(lambda x: remat(weight)(x).sum())(POINT), weight.weight.sum(0))
    count = grad(remat(lambda x: x.sum() * NET.in_features * WEIGHT.shape[0]))(POINT)
    torch.testing.assert_close(count, torch.full_like(POINT, 9))
    layer = nn.Linear(2)
    x = torch.ones(1, 3)
    params, _ = layer.init(random.key(0), x)
    loss = lambda f: lambda p: (f(p, x) ** 2).sum()
    torch.testing.assert_close(grad(loss(remat(layer)))(params), grad(loss(layer))(params))


def test_forward_mode_of_integers():
    value, tangent = jvp(remat(lambda x: x.argmax()), (POINT,), (POINT,))
    assert value == 2
    assert tangent == 0


def test_unused_inputs_have_zero_gradients():
    unused = jacrev(lambda p: remat(lambda p, x: x * torch.ones_like(p))(p, POINT))(POINT)
    torch.testing.assert_close(unused, torch.zeros(3, 3, dtype=torch.float64))


def test_backward_of_autograd():
    x = POINT.clone().requires_grad_()
    of(remat(block))(x).backward()
    torch.testing.assert_close(x.grad, grad(of(block))(POINT))


@pytest.mark.slow
def test_peak_memory_falls():
    from benchmarks.remat_memory import measure

    plain, remat_ = (measure(remat, blocks=8, width=128, batch=512) for remat in (False, True))
    assert remat_["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert remat_["peak_mib"] < 0.7 * plain["peak_mib"]
