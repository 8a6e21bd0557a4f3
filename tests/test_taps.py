"""The taps of `fnn.ops`: against gradients of torch.func, for every way to use a weight, seen and unseen."""

import pytest
import torch
import torch.nn.functional as F

from fnn import ops, tap, tap_grads, tree
from fnn.ops import _taps as taps

DTYPE = torch.float64


def leaf(*shape, seed=0):
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed + sum(shape)))


PARAMS = {
    "w": leaf(4, 4),
    "v": leaf(4, 4, seed=1),
    "b": leaf(4, seed=2),
    "conv1": leaf(6, 2, 2),
    "conv2": leaf(4, 2, 3, 2),
    "conv3": leaf(2, 1, 2, 2, 2),
    "table": leaf(20, 4),
}
X = leaf(3, 5, 4)


class Product(torch.autograd.Function):
    """A use of a weight that no mode sees."""

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


@torch.compiler.allow_in_graph
def opaque(x, w):
    return x @ w.T


def image(x):
    return (x[:, None, :] * x[None, :, :]).repeat(1, 2, 1)[:4]  # (4, 10, 4)


def recurrent(p, x):
    h = torch.zeros(4, dtype=x.dtype)
    for row in x:
        h = torch.tanh(F.linear(row, p["w"], p["b"]) + h @ p["v"])
    return h.sum()


def tied(p, x):
    tokens = (x[:, 0] > 0).long()
    return (torch.tanh(F.embedding(tokens, p["table"])) @ p["table"].t()).square().sum()


def same_weight_in_groups(p, x):
    w = p["conv1"]
    return F.conv1d(x.mT[:2], w).square().sum() + F.conv1d(x.mT, w, groups=2).pow(3).sum()


def written_into(p, x):
    h = x.clone()
    y = F.linear(h, p["w"], p["b"])
    h.mul_(2)  # after the use: what the weight met was the value before
    return y.add_(1).square().sum()


# name: (function of one example, the leaves that are structured)
STRUCTURED = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]).tanh().sum(), {"w"}),
    "keywords": (lambda p, x: F.linear(x, weight=p["w"], bias=p["b"]).tanh().sum(), {"w"}),
    "vector": (lambda p, x: F.linear(x[0], p["w"], p["b"]).tanh().sum(), {"w"}),
    "ops.linear": (lambda p, x: ops.linear(x, p["w"], p["b"], activation="gelu").sum(), {"w"}),
    "ops.matmul": (lambda p, x: ops.matmul(x, p["v"]).tanh().sum(), {"v"}),
    "x @ w": (lambda p, x: (x @ p["v"] + p["b"]).tanh().sum(), {"v"}),
    "x @ w.t()": (lambda p, x: (x @ p["w"].t()).square().sum(), {"w"}),
    "w @ x": (lambda p, x: (p["w"] @ x[0] + p["b"]).square().sum(), {"w"}),
    "w @ matrix": (lambda p, x: (p["w"] @ x.mT).square().sum(), {"w"}),
    "w.t() @ x": (lambda p, x: torch.mv(p["w"].t(), x[0]).square().sum(), {"w"}),
    "conv1d": (lambda p, x: F.conv1d(x.mT[:2], p["conv1"], stride=2, padding=1).square().sum(), {"conv1"}),
    "conv2d same": (
        lambda p, x: F.conv2d(image(x), p["conv2"], p["b"], padding="same", dilation=2, groups=2).tanh().pow(2).sum(),
        {"conv2"},
    ),
    "conv2d": (
        lambda p, x: F.conv2d(image(x)[None], p["conv2"], p["b"], (2, 1), (1, 2), (2, 1), 2).tanh().square().sum(),
        {"conv2"},
    ),
    "conv3d": (lambda p, x: F.conv3d(image(x)[None, :2], p["conv3"], padding=1).square().sum(), {"conv3"}),
    "embedding": (
        lambda p, x: (F.embedding((x[:, 0] > 0).long(), p["table"], padding_idx=-20) * x).square().sum(),
        {"table"},
    ),
    "lookup": (lambda p, x: (p["table"][-(x[:, 0] > 0).long()] * x).square().sum(), {"table"}),
    "tied": (tied, {"table"}),
    "twice": (lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["w"], p["b"]).square().sum(), {"w"}),
    "both layouts": (lambda p, x: (F.linear(x, p["table"]).tanh() @ p["table"]).square().sum(), {"table"}),
    "recurrent": (recurrent, {"w", "v"}),
    "groups": (same_weight_in_groups, {"conv1"}),
    "unflatten": (
        lambda p, x: F.linear(x, p["w"]).unflatten(-1, (2, 2)).tanh().sum(1).square().sum(),
        {"w"},
    ),
    "norm": (
        lambda p, x: (F.layer_norm(F.linear(x, p["w"]), (4,), p["b"]) @ p["v"]).square().sum(),
        {"w", "v"},
    ),
}
# Every use but the first cannot be tapped, so the leaf is not structured.
FREE = {
    "penalty": lambda p, x: F.linear(x, p["w"]).square().sum() + p["w"].square().sum(),
    "slice": lambda p, x: F.linear(x, p["w"]).sum() + F.linear(x, p["w"][:2]).square().sum(),
    "cast": lambda p, x: F.linear(x, p["w"]).sum() + F.linear(x.float(), p["w"].float()).square().sum().double(),
    "view": lambda p, x: F.linear(x, p["w"]).sum() + F.linear(x, p["w"].reshape(2, 8)[:, :4]).square().sum(),
    "normalised": lambda p, x: F.linear(x, p["w"]).sum() + F.linear(x, p["w"] / p["w"].norm()).square().sum(),
    "einsum": lambda p, x: F.linear(x, p["w"]).sum() + torch.einsum("ti,io->to", x, p["w"]).square().sum(),
    "vmap": lambda p, x: torch.vmap(lambda row: F.linear(row, p["w"], p["b"]))(x).square().sum(),
    "grad": lambda p, x: torch.func.grad(lambda z: F.linear(z, p["w"]).tanh().sum())(x).square().sum(),
    "opaque": lambda p, x: F.linear(x, p["w"]).sum() + opaque(x, p["w"]).square().sum(),
    "function": lambda p, x: F.linear(x, p["w"]).sum() + Product.apply(x, p["w"]).square().sum(),
}


def gradients(f):
    """Per-sample gradients of all leaves through the taps."""

    def of_batch(params, x):
        plan = taps.plan(f, params, x[0])

        def one(x):
            out, pullback, inputs = plan.vjp(f, params, x)
            deltas, grads = pullback(torch.ones_like(out))
            found = dict(zip(plan.free, grads, strict=True))
            for tapped, met, delta in zip(plan.taps, inputs, deltas, strict=True):
                share = tapped.gradient(*tapped.rows(met, delta))
                found[tapped.leaf] = found[tapped.leaf] + share if tapped.leaf in found else share
            return [found[i] for i in range(len(found))]

        return torch.vmap(one)(x)

    return of_batch


def expected(f):
    return tree.leaves(torch.vmap(torch.func.grad(f), (None, 0))(PARAMS, X))


def structured(f, params=PARAMS):
    plan = taps.plan(f, params, X[0])
    return {plan.paths[i] for i in plan.structured}


@pytest.mark.parametrize("name", STRUCTURED)
def test_gradients_come_from_inputs_and_deltas(name):
    f, leaves = STRUCTURED[name]
    assert structured(f) == leaves
    torch.testing.assert_close(gradients(f)(PARAMS, X), expected(f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FREE)
def test_another_use_of_a_weight_makes_it_free(name):
    f = FREE[name]
    assert structured(f) == (set() if name != "opaque" else {"w"})  # opaque to the compiler only
    torch.testing.assert_close(gradients(f)(PARAMS, X), expected(f), rtol=1e-6 if name == "cast" else 1e-10, atol=1e-6)


SLOW = pytest.mark.slow
COMPILED = ["tied", "unflatten"] + [
    pytest.param(name, marks=SLOW) for name in ("ops.linear", "x @ w.t()", "conv2d", "recurrent")
]


@pytest.mark.parametrize("name", COMPILED)
def test_taps_compile(name, fast_compile):
    f, leaves = STRUCTURED[name]

    def found(params, x):
        plan = taps.plan(f, params, x[0])
        return gradients(f)(params, x), [plan.paths[i] for i in plan.structured]

    result, names = torch.compile(found, fullgraph=True)(PARAMS, X)
    assert set(names) == leaves
    torch.testing.assert_close(result, expected(f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["slice", *[pytest.param(name, marks=SLOW) for name in ("opaque", "vmap", "function")]]
)
def test_hidden_uses_are_found_compiled(name, fast_compile):
    f = FREE[name]
    result = torch.compile(gradients(f), fullgraph=True)(PARAMS, X)
    torch.testing.assert_close(result, expected(f), rtol=1e-10, atol=1e-12)


def test_a_transposed_attribute_is_right_compiled(fast_compile):
    def f(p, x):  # Dynamo does not show `.T` to a mode
        return (F.embedding((x[:, 0] > 0).long(), p["table"]) @ p["table"].T).square().sum()

    assert structured(f) == {"table"}
    result = torch.compile(gradients(f), fullgraph=True)(PARAMS, X)
    torch.testing.assert_close(result, expected(f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_weight_met_may_be_written_into(compiled, fast_compile):
    got = gradients(written_into)
    got = (torch.compile(got, fullgraph=True) if compiled else got)(PARAMS, X)
    want = expected(lambda p, x: (F.linear(x, p["w"], p["b"]) + 1).square().sum())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_leaf_that_the_function_also_holds_as_a_constant_is_not_mistaken():
    def f(p, x):
        return (F.linear(x, p["w"]).tanh() * F.linear(x, PARAMS["w"])).sum()

    assert structured(f) == {"w"}
    torch.testing.assert_close(gradients(f)(PARAMS, X), expected(f), rtol=1e-10, atol=1e-12)


def test_one_tensor_at_two_paths_is_two_leaves():
    w = leaf(4, 4, seed=9)
    params = {"one": w, "two": w}

    def f(p, x):
        return F.linear(F.linear(x, p["one"]).tanh(), p["two"]).square().sum()

    got = gradients(f)(params, X)
    want = tree.leaves(torch.vmap(torch.func.grad(f), (None, 0))(params, X))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_weights_of_their_own_for_each_example():
    f, _ = STRUCTURED["twice"]
    many = tree.map(lambda x: torch.stack([x, 2 * x]), PARAMS)
    got = torch.vmap(gradients(f), (0, None))(many, X)
    rows = [torch.vmap(torch.func.grad(f), (None, 0))(tree.map(lambda x, i=i: x[i], many), X) for i in range(2)]
    want = [torch.stack(pair) for pair in zip(*map(tree.leaves, rows), strict=True)]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_second_derivatives_reach_the_weights():
    f, _ = STRUCTURED["linear"]
    total = lambda g: lambda p: sum(leaf.square().sum() for leaf in tree.leaves(g(p)))
    got = torch.func.grad(total(lambda p: gradients(f)(p, X)))(PARAMS)
    want = torch.func.grad(total(lambda p: torch.vmap(torch.func.grad(f), (None, 0))(p, X)))(PARAMS)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_biases_on_request():
    plan = taps.plan(lambda p, x: F.linear(x, p["w"], p["b"]).sum(), PARAMS, X[0], biases=True)
    assert [plan.paths[i] for i in plan.biases] == ["b"]
    assert plan.last is None
    plan = taps.plan(lambda p, x: F.linear(x, p["w"], p["b"]) * p["b"].sum(), PARAMS, X[0], biases=True)
    assert plan.biases == []
    plan = taps.plan(lambda p, x: F.linear(x, p["w"], p["b"]), PARAMS, X[0], biases=True)
    assert plan.last == 0


def test_a_function_that_changes_between_runs_is_refused():
    calls = []

    def f(p, x):
        calls.append(0)
        return F.linear(x, p["w"] if len(calls) < 3 else p["v"]).sum()

    with pytest.raises(RuntimeError, match="in the same way in each call"):
        gradients(f)(PARAMS, X)


def test_outside_a_recording_linear_is_untouched():
    assert not taps.recorders
    with pytest.raises(ZeroDivisionError):
        taps.plan(lambda p, x: F.linear(x, p["w"]).sum() / (1 // 0), PARAMS, X[0])
    assert not taps.recorders


# tap and tap_grads


def difference_squared(x):
    x = tap(x, "x")
    y1, y2 = tap(x + 1, "y1"), tap(2 * x, "y2")
    return tap((y1 - y2) ** 2, "loss")


@pytest.mark.parametrize("compiled", [False, True])
def test_tap_grads_of_a_worked_example(compiled, fast_compile):
    f = tap_grads(difference_squared)
    f = torch.compile(f, fullgraph=True) if compiled else f
    values, grads = f(torch.tensor(3.0))
    assert {name: value.item() for name, value in values.items()} == {"x": 3, "y1": 4, "y2": 6, "loss": 4}
    assert {name: grad.item() for name, grad in grads.items()} == {"x": 4, "y1": -4, "y2": 4, "loss": 1}


def test_tap_grads_is_what_retain_grad_is():
    def hidden(x):
        h = torch.tanh(F.linear(x, PARAMS["w"]))
        return h, {"a": h * 2, "b": (h.sum(), h.square())}

    def f(x):
        h, rest = hidden(x)
        h, rest = tap(h, "h"), tap(rest, "rest")
        return (rest["a"] * rest["b"][1]).sum() + rest["b"][0] * h.sum()

    _, grads = tap_grads(f)(X)
    h, rest = hidden(X)
    h, rest = h.detach().requires_grad_(), tree.map(lambda x: x.detach().requires_grad_(), rest)
    ((rest["a"] * rest["b"][1]).sum() + rest["b"][0] * h.sum()).backward()
    want = {"h": h.grad, "rest": tree.map(lambda x: x.grad, rest)}
    torch.testing.assert_close(grads, want)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=SLOW)])
def test_tap_grads_under_vmap_grad_and_itself(compiled, fast_compile):
    x = torch.arange(3.0)
    wrap = (lambda f: torch.compile(f, fullgraph=True)) if compiled else lambda f: f
    _, grads = wrap(torch.vmap(tap_grads(difference_squared)))(x)
    assert grads["x"].tolist() == [-2, 0, 2]  # 2 (x - 1)
    assert wrap(torch.func.grad(lambda x: tap_grads(difference_squared)(x)[1]["y1"]))(x[1]).item() == -2
    outer = tap_grads(lambda x: tap_grads(difference_squared)(tap(2 * x, "twice"))[1]["x"])
    assert wrap(outer)(x[2])[1]["twice"].item() == 2


def test_tap_outside_and_values_without_gradients():
    value = {"a": torch.ones(2)}
    assert tap(value, "name") is value

    def f(x):
        tap(x.argmax(), "index")
        tap(x * 2, "unused")
        return x.sum()

    values, grads = tap_grads(f)(torch.tensor([1.0, 3.0]))
    assert values["index"].item() == 1
    assert list(grads) == ["unused"]
    assert grads["unused"].tolist() == [0, 0]


MISUSED = {
    "two values": lambda x: tap(x, "a").sum() + tap(2 * x, "a").sum(),
    "inside a transform": lambda x: torch.vmap(lambda row: tap(row, "a"))(x).sum(),
    "(vmap, grad": lambda x: torch.func.grad(lambda z: tap(z, "a").square().sum())(x).sum(),
    "must return a scalar, got shape": lambda x: tap(x, "a"),
    "must return a scalar tensor, got tuple": lambda x: (x.sum(), x),
}


@pytest.mark.parametrize("message", MISUSED)
def test_tap_grads_says_what_is_wrong(message):
    with pytest.raises((ValueError, TypeError)) as error:
        tap_grads(MISUSED[message])(torch.ones(2))
    assert message in str(error.value)


def test_no_tap_where_nothing_is_recorded():
    def f(x):
        with torch.no_grad():
            return tap(x, "a").sum()

    with pytest.raises(ValueError, match="no_grad"):
        tap_grads(f)(torch.ones(2))
