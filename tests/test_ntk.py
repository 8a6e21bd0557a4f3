"""The neural tangent kernel: every method against the Jacobians of torch.func, and closed forms."""

import pytest
import torch
import torch.nn.functional as F

from fnn import nn, ntk, ntk_cost, random, tree

DTYPE = torch.float64
METHODS = ("structured", "products", "contraction")


def leaf(*shape, seed=0):
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed + sum(shape)))


PARAMS = {
    "w": leaf(4, 4),
    "v": leaf(4, 4, seed=1),
    "a": leaf(4, seed=2),
    "b": leaf(4, seed=3),
    "conv": leaf(4, 2, 2),
    "table": leaf(30, 4),
}
X1, X2 = leaf(3, 5, 4), leaf(2, 5, 4, seed=4)


def recurrent(p, x):
    h = torch.zeros(4, dtype=x.dtype)
    for row in x[:3]:
        h = torch.tanh(F.linear(row, p["w"], p["b"]) + h @ p["v"])
    return h[:2]


FUNCTIONS = {
    "mlp": lambda p, x: F.linear(F.linear(x[0], p["w"], p["a"]).tanh(), p["v"], p["b"]),
    "one bias twice": lambda p, x: F.linear(F.linear(x[0], p["w"], p["a"]).tanh(), p["v"], p["a"]),
    "one layer twice": lambda p, x: F.linear(F.linear(x[0], p["w"], p["a"]).tanh(), p["w"], p["a"]),
    "bias elsewhere": lambda p, x: F.linear(F.linear(x[0], p["w"], p["a"]).tanh(), p["v"], p["b"]) * p["b"].sum(),
    "linear": lambda p, x: F.linear(F.linear(x[0], p["w"]), p["v"]),
    "matrix output": lambda p, x: torch.tanh(x[:2] @ p["v"] + p["b"]) @ p["w"].t(),
    "sequence, wide": lambda p, x: F.linear(x[:2], p["table"], None).tanh().sum(0)[:3],
    "conv, groups": lambda p, x: F.conv1d(
        F.conv1d(x.mT, p["conv"], p["a"], groups=2).tanh(), p["conv"], p["a"], groups=2
    )[:3, 0],
    "embedding": lambda p, x: (F.embedding((x[:, 0] > 0).long() + 1, p["table"], padding_idx=1) * x).sum(0)[:2],
    "tied": lambda p, x: (torch.tanh(F.embedding((x[:, 0] > 0).long(), p["table"])).sum(0) @ p["table"].t())[:3],
    "recurrent": recurrent,
    "penalty": lambda p, x: F.linear(x[0], p["w"]) + p["w"].square().sum(),
    "scalar": lambda p, x: F.linear(x, p["w"]).square().sum(),
}


def reference(f, params, x1, x2):
    def jacobian(x):
        rows = torch.vmap(torch.func.jacrev(lambda p, x: f(p, x).reshape(-1)), (None, 0))(params, x)
        return torch.cat([leaf.flatten(2) for leaf in tree.leaves(rows)], 2)

    return torch.einsum("iap,jbp->ijab", jacobian(x1), jacobian(x2))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * want.abs().max().item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_methods_are_the_contraction_of_jacobians(name, method):
    f = FUNCTIONS[name]
    kernel = reference(f, PARAMS, X1, X2)
    traces = kernel.diagonal(dim1=2, dim2=3).sum(-1)
    close(ntk(f, PARAMS, X1, X2, method=method), kernel)
    close(ntk(f, PARAMS, X1, X2, method=method, trace_outputs=True, chunk_size=2), traces)
    close(ntk(f, PARAMS, X1, method=method), reference(f, PARAMS, X1, X1))
    pairs = torch.stack([kernel[i, i] for i in range(2)])
    close(ntk(f, PARAMS, X1[:2], X2, method=method, diagonal=True), pairs)
    close(ntk(f, PARAMS, X1[:2], X2, method=method, diagonal=True, trace_outputs=True, chunk_size=1), traces.diagonal())


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("tied", marks=pytest.mark.slow), pytest.param("conv, groups", marks=pytest.mark.slow)]
)
def test_structured_compiles(name, fast_compile):
    f = FUNCTIONS[name]
    compiled = torch.compile(lambda p, a, b: ntk(f, p, a, b, method="structured"), fullgraph=True)
    close(compiled(PARAMS, X1, X2), reference(f, PARAMS, X1, X2))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles(method, fast_compile):
    f = FUNCTIONS["mlp"]
    params = {name: PARAMS[name] for name in "wvab"}
    for diagonal in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda p, a, b: ntk(f, p, a, b, method=method, diagonal=diagonal), fullgraph=True)
        kernel = reference(f, params, X1[:2], X2)
        close(compiled(params, X1[:2], X2), torch.stack([kernel[0, 0], kernel[1, 1]]) if diagonal else kernel)


def test_an_ensemble_under_vmap():
    f = FUNCTIONS["mlp"]
    params = {name: PARAMS[name] for name in "wvab"}
    many = tree.map(lambda x: torch.stack([x, -2 * x]), params)
    got = torch.vmap(lambda p: ntk(f, p, X1, X2, method="structured"))(many)
    close(got, torch.stack([reference(f, tree.map(lambda x, i=i: x[i], many), X1, X2) for i in range(2)]))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_functions_that_do_not_use_params_examples_or_rows(method, trace):
    zeros = torch.zeros((3, 2) if trace else (3, 2, 2, 2), dtype=DTYPE)
    for f in (
        lambda p, x: torch.stack([x.sum(), x.sum()]),
        lambda p, x: torch.ones(2, dtype=DTYPE),
        lambda p, x: F.linear(x[:0], p["w"], p["a"]).sum(0)[:2],
    ):
        close(ntk(f, PARAMS, X1, X2, method=method, trace_outputs=trace), zeros)
    f = lambda p, x: p["w"][:2].sum(1)
    want = zeros + (8.0 if trace else 4 * torch.eye(2, dtype=DTYPE))
    close(ntk(f, PARAMS, X1, X2, method=method, trace_outputs=trace), want)


def test_attention_of_torch_has_every_method():
    def f(p, x):
        q, k, v = (F.linear(x, p[name])[None] for name in ("w", "v", "w"))
        return F.scaled_dot_product_attention(q, k, v)[0, 0]

    params = {name: PARAMS[name] for name in "wv"}
    want = ntk(f, params, X1, X2, method="contraction")
    for method in METHODS:
        close(ntk(f, params, X1, X2, method=method), want)


def test_closed_form_of_one_linear_layer():
    f = lambda p, x: F.linear(x, p["w"], p["b"])
    x = leaf(3, 6)
    kernel = ntk(f, {"w": leaf(2, 6), "b": leaf(2)}, x)
    close(kernel, (x @ x.T + 1)[:, :, None, None] * torch.eye(2, dtype=DTYPE))


def test_a_layer_with_a_norm_and_a_tree_of_inputs():
    net = nn.Sequential(nn.Linear(6), nn.LayerNorm(), nn.tanh, nn.Linear(2))
    params, _ = net.init(random.key(0), X1[:, 0])
    f = lambda p, x: net(p, x["x"]) * x["scale"]
    x = {"x": X1[:, 0], "scale": leaf(3)}
    for method in METHODS:
        close(ntk(f, params, x, method=method), reference(f, params, x, x))


def test_auto_takes_what_costs_least():
    net = nn.Sequential(nn.Linear(256), nn.tanh, nn.Linear(10))
    x = torch.zeros(64, 784)
    params, _ = net.init(random.key(0), x)
    cost = ntk_cost(net, params, x, x)
    assert cost.cheapest() == "structured"
    # 2 x 64 examples forward and 10 rows back each, and the products of 640 x 640 deltas and 64 x 64 inputs.
    layer = 784 * 256 + 256 * 10
    exact = 2 * 128 * 11 * layer + 2 * 640 * 640 * 256 + 2 * 64 * 64 * (784 + 256)
    assert cost["structured"].flops == exact
    size = layer + 266
    assert cost["contraction"].flops == 2 * 128 * 21 * layer + 2 * 640 * 640 * size
    assert cost["contraction"].memory == 4 * 128 * 10 * size
    lines = str(cost).splitlines()
    assert lines[0].split() == ["method", "GFLOP", "MB"]
    assert [line.split()[0] for line in lines[1:]] == list(cost)
    assert ntk_cost(net, params, x, x, diagonal=True)["contraction"].flops < cost["contraction"].flops


WRONG = {
    "method must be": {"method": "fast"},
    "argument 1 has no examples": {"x1": X1[:0]},
    "pairs x1[i] with x2[i]": {"diagonal": True},
    "must return one tensor, got tuple": {"f": lambda p, x: (x, x)},
    "leaf 'w' of params is int": {"params": {"w": 1}},
    "expected a function": {"f": PARAMS},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_came(message):
    arguments = {"f": FUNCTIONS["mlp"], "params": PARAMS, "x1": X1, "x2": X2, **WRONG[message]}
    with pytest.raises((ValueError, TypeError)) as error:
        ntk(**arguments)
    assert message in str(error.value)


def test_a_bias_that_broadcasts():
    params = {"w": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(1, dtype=torch.float64)}
    f = lambda p, x: torch.nn.functional.linear(x, p["w"], p["b"]).tanh()
    x = torch.randn(4, 3, dtype=torch.float64)
    structured, contracted = (ntk(f, params, x, method=method) for method in ("structured", "contraction"))
    torch.testing.assert_close(structured, contracted)
