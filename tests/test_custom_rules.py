"""Rules written by hand: every transform uses them, compiled or not, and says where they do not fit."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import custom_jvp, custom_vjp, stop_gradient

POINT = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
DIRECTION = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


@custom_vjp
def vjp_sin(tree, count):
    return {"y": torch.sin(tree["x"]), "count": count + 1}


def fwd(tree, count):
    return vjp_sin(tree, count), (torch.cos(tree["x"]), "cosine")


def bwd(residuals, cotangent):
    cosine, name = residuals
    assert name == "cosine"
    return {"x": 10 * cotangent["y"] * cosine}, None


vjp_sin.defvjp(fwd, bwd)


@custom_jvp
def jvp_sin(tree, count):
    return {"y": torch.sin(tree["x"]), "count": count + 1}


@jvp_sin.defjvp
def rule(primals, tangents):
    (tree, count), (tangent, of_count) = primals, tangents
    assert of_count is None
    return jvp_sin(tree, count), {"y": 10 * torch.cos(tree["x"]) * tangent["x"], "count": None}


def sin_of(f):
    return lambda x: f({"x": x}, torch.tensor([1, 2, 3]))["y"]


# The rule says that the derivative of sin is 10 cos: so of the sum of its squares, and of the derivative's own.
SIN, COS = torch.sin(POINT), torch.cos(POINT)
JACOBIAN = torch.diag(10 * COS)
GRADIENT = 2 * SIN * 10 * COS
HESSIAN = torch.diag(2 * (10 * COS) ** 2 - 2 * SIN * 10 * SIN)


def squares(f):
    return lambda x: (sin_of(f)(x) ** 2).sum()


def twice(x):
    return torch.stack([x, x])


PROBES = {
    "grad": (lambda f: grad(squares(f)), GRADIENT),
    "vmap": (lambda f: lambda x: vmap(sin_of(f))(twice(x)), twice(SIN)),
    "vmap(grad)": (lambda f: lambda x: vmap(grad(squares(f)))(twice(x)), twice(GRADIENT)),
    "grad(vmap)": (lambda f: grad(lambda x: (vmap(sin_of(f))(twice(x)) ** 2).sum()), 2 * GRADIENT),
    "jacrev": (lambda f: jacrev(sin_of(f)), JACOBIAN),
    "jvp": (lambda f: lambda x: jvp(sin_of(f), (x,), (DIRECTION,))[1], JACOBIAN @ DIRECTION),
    "jvp(vmap)": (
        lambda f: lambda x: jvp(lambda x: vmap(sin_of(f))(twice(x)), (x,), (DIRECTION,))[1],
        twice(JACOBIAN @ DIRECTION),
    ),
    "jacfwd": (lambda f: jacfwd(sin_of(f)), JACOBIAN),
    "hessian": (lambda f: hessian(squares(f)), HESSIAN),
    "jacrev(jacrev)": (lambda f: jacrev(jacrev(squares(f))), HESSIAN),
    "jacrev(jacfwd)": (lambda f: jacrev(jacfwd(squares(f))), HESSIAN),
    "hvp": (lambda f: lambda x: jvp(grad(squares(f)), (x,), (DIRECTION,))[1], HESSIAN @ DIRECTION),
    "vmap(jacrev(grad))": (lambda f: lambda x: vmap(jacrev(grad(squares(f))))(twice(x)), twice(HESSIAN)),
}


@pytest.mark.parametrize("f", [vjp_sin, jvp_sin], ids=["custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("name", [*PROBES, "jacfwd(jacfwd)", "backward"])
def test_wrong_rule_shows(f, name):
    if name == "backward":
        x = POINT.clone().requires_grad_()
        squares(f)(x).backward()
        torch.testing.assert_close(x.grad, GRADIENT)
        return
    probe, expected = PROBES.get(name, (lambda f: jacfwd(jacfwd(squares(f))), HESSIAN))
    torch.testing.assert_close(probe(f)(POINT), expected)


@pytest.mark.parametrize("f", [vjp_sin, jvp_sin], ids=["custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("name", PROBES)
def test_wrong_rule_shows_compiled(f, name, fast_compile):
    probe, expected = PROBES[name]
    torch.testing.assert_close(torch.compile(probe(f), fullgraph=True)(POINT), expected)


@pytest.mark.slow
def test_wrong_rule_shows_in_inductor():
    names = ["grad", "jvp", "hessian", "vmap(grad)"]

    def every(x):
        return [PROBES[name][0](f)(x) for name in names for f in (vjp_sin, jvp_sin)]

    found = torch.compile(every, fullgraph=True)(POINT)
    torch.testing.assert_close(found, [PROBES[name][1] for name in names for _ in range(2)])


def my_relu():
    relu = custom_vjp(lambda x: x.clamp(min=0))
    relu.defvjp(lambda x: (x.clamp(min=0), x), lambda x, g: (torch.where(x < 0, 0, g),))
    return relu


@pytest.mark.parametrize("compiled", [False, True])
def test_my_relu_of_the_notes(compiled, fast_compile):
    relu, x = my_relu(), torch.tensor([[1.0, 1.0]])

    def loss(w, b):
        return relu(x @ w.T + b).square().mul(0.75).sum()

    w, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])
    step = grad(loss, argnums=(0, 1))
    w_grad, b_grad = (torch.compile(step, fullgraph=True) if compiled else step)(w, b)
    torch.testing.assert_close(w_grad, torch.tensor([[4.5, 4.5]]))
    torch.testing.assert_close(b_grad, torch.tensor([[4.5]]))
    jacobian = jacrev(relu)(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(jacobian, torch.diag(torch.tensor([0.0, 1.0])))


def test_a_function_that_returns_its_input():
    clip = custom_vjp(lambda x: x)
    clip.defvjp(lambda x: (x, ()), lambda residuals, g: (g.clamp(-1, 1),))
    torch.testing.assert_close(grad(lambda x: (10 * clip(x)).sum())(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_nondiff_arguments_may_be_functions(compiled, fast_compile):
    of = custom_vjp(lambda f, x, power: f(x) ** power, nondiff_argnums=(0, 2))
    of.defvjp(lambda f, x, power: (f(x) ** power, x), lambda f, power, x, g: (g * power * 100,))

    def step(x):
        return grad(lambda x: of(torch.sin, x, 3))(x)

    step = torch.compile(step, fullgraph=True) if compiled else step
    assert step(torch.tensor(1.0)) == 300


def test_another_function_compiles_anew(fast_compile):
    def scaled(factor):
        f = custom_jvp(lambda x: x * factor)
        f.defjvp(lambda primals, tangents: (primals[0] * factor, tangents[0] * factor * 10))
        return f

    def step(f, x):
        return grad(lambda x: f(x))(x)

    step, x = torch.compile(step, fullgraph=True), torch.tensor(1.0)
    assert [step(scaled(2.0), x).item(), step(scaled(3.0), x).item()] == [20, 30]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tensor_from_outside_is_a_constant(compiled, fast_compile):
    weight = torch.tensor(3.0)
    f = custom_jvp(lambda x: x * weight)
    f.defjvps(lambda tangent, out, x: 10 * tangent * weight)
    step = torch.compile(grad(lambda x: f(x)), fullgraph=True) if compiled else grad(f)
    assert step(torch.tensor(1.0)) == 30


def test_a_differentiated_tensor_from_outside_raises():
    def loss(weight):
        f = custom_vjp(lambda x: x * weight)
        f.defvjp(lambda x: (x * weight, ()), lambda residuals, g: (g,))
        return f(torch.ones(()))

    with pytest.raises(ValueError, match="'weight'.*pass 'weight' as an argument"):
        grad(loss)(torch.tensor(2.0))


def test_a_differentiated_default_raises():
    def of_vjp(w, x):
        f = custom_vjp(lambda x: x * 3)
        f.defvjp(lambda x, w=w: (x * w, ()), lambda residuals, g: (g,))
        return f(x)

    def of_jvp(w, x):
        f = custom_jvp(lambda x: x * 3)
        f.defjvp(lambda primals, tangents, w=w: (primals[0] * w, tangents[0] * w))
        return f(x)

    def of_nondiff(w, x):
        f = custom_jvp(lambda g, x: g(x), nondiff_argnums=0)
        f.defjvp(lambda g, primals, tangents: (g(*primals), g(*tangents)))
        return f(lambda x, w=w: x * w, x)

    for f in (of_vjp, of_jvp, of_nondiff):
        with pytest.raises(ValueError, match="default argument 'w'.*pass 'w' as an argument"):
            grad(lambda w, f=f: f(w, torch.ones(())))(torch.tensor(2.0))
        with pytest.raises(ValueError, match="default argument 'w'"):
            f(torch.tensor(2.0, requires_grad=True), torch.tensor(2.0, requires_grad=True))


def test_a_rule_of_zero():
    of_jvp = custom_jvp(lambda x: x * 2)
    of_jvp.defjvp(lambda primals, tangents: (primals[0] * 2, None))
    of_vjp = custom_vjp(lambda x: x * 2)
    of_vjp.defvjp(lambda x: (x * 2, ()), lambda residuals, g: (None,))
    for f in (of_jvp, of_vjp):
        for jacobian in (jacrev, jacfwd):
            torch.testing.assert_close(jacobian(f)(POINT), torch.zeros(3, 3, dtype=torch.float64))


def of_rule(fwd, bwd, f=lambda x: {"y": x["a"] * 2}):
    f = custom_vjp(f)
    f.defvjp(fwd, bwd)
    return lambda: grad(lambda a: f({"a": a})["y"].sum())(torch.ones(2))


def forward(x):
    return {"y": x["a"] * 2}, ()


@pytest.mark.parametrize(
    ("fwd", "bwd", "error", "match"),
    [
        (lambda x: x["a"], None, TypeError, r"must return \(output, residuals\)"),
        (lambda x: ({"z": x["a"] * 2}, ()), None, ValueError, "missing 'y'"),
        (forward, lambda r, g: g["y"], TypeError, "a tuple of 1.*got Tensor"),
        (forward, lambda r, g: (g["y"], None), TypeError, "a tuple of 1.*got a tuple of 2"),
        (forward, lambda r, g: ({"b": g["y"]},), ValueError, "argument 0: missing 'a'"),
        (forward, lambda r, g: ({"a": g["y"].sum()},), ValueError, r"leaf 'a' has shape \(\), expected \(2,\)"),
    ],
)
def test_rules_that_do_not_fit(fwd, bwd, error, match):
    with pytest.raises(error, match=match):
        of_rule(fwd, bwd or (lambda r, g: (None,)))()


def test_errors_of_custom_jvp():
    f = custom_jvp(lambda x: x * 2)
    with pytest.raises(AttributeError, match="no rule yet"):
        f(torch.ones(2))
    f.defjvp(lambda primals, tangents: (primals[0] * 2, tangents[0].sum()))
    with pytest.raises(ValueError, match=r"has shape \(\), expected \(2,\)"):
        jvp(f, (torch.ones(2),), (torch.ones(2),))
    f.defjvp(lambda primals, tangents: tangents[0])
    with pytest.raises(TypeError, match=r"must return \(output, tangent of the output\)"):
        grad(lambda x: f(x).sum())(torch.ones(2))


def test_errors_of_arguments():
    with pytest.raises(AttributeError, match="no rule yet"):
        custom_vjp(torch.sin)(torch.ones(2))
    with pytest.raises(TypeError, match="argument 0 is in nondiff_argnums and holds a tensor"):
        custom_vjp(torch.add, nondiff_argnums=0)(torch.ones(2), torch.ones(2))


def test_stop_gradient_in_every_mode():
    def f(x):
        return x * stop_gradient({"x": x, "n": 3})["x"]

    x = torch.tensor(3.0)
    assert grad(f)(x) == 3
    assert jvp(f, (x,), (torch.ones(()),))[1] == 3
    assert jacfwd(jacrev(f))(x) == 0
    assert jacrev(jacrev(f))(x) == 0


def test_a_new_rule_is_used_by_programs_compiled_before(fast_compile):
    forward = custom_jvp(lambda x: 2 * x)
    reverse = custom_vjp(lambda x: 2 * x)
    gradient = torch.compile(lambda x: [grad(lambda x: f(x).sum())(x) for f in (forward, reverse)], fullgraph=True)
    for factor in (3.0, 5.0):
        forward.defjvp(lambda primals, tangents, factor=factor: (2 * primals[0], factor * tangents[0]))
        reverse.defvjp(lambda x: (2 * x, None), lambda _, cotangent, factor=factor: (factor * cotangent,))
        for found in gradient(torch.ones(2)):
            assert torch.equal(found, torch.full((2,), factor))
