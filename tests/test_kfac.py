"""KFACOperator against the exact Fisher matrix where the two agree, and against its definition elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from fnn import random, tree
from fnn.diff.operators import FisherOperator, KFACOperator

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def targets_of(likelihood, outputs):
    if likelihood == "categorical":
        return outputs.argmin(1)
    return (outputs > 0).double() if likelihood == "bernoulli" else torch.ones_like(outputs)


def dense_block(params, operator, *names):
    """The rows and columns of an operator's matrix that belong to these leaves, in the order of the names."""
    start, places = 0, {}
    for path, leaf in tree.paths(params).items():
        places[path] = torch.arange(start, start + leaf.numel())
        start += leaf.numel()
    index = torch.cat([places[name] for name in names])
    return operator.to_dense()[index][:, index]


def linear(params, x):
    return F.linear(x, params["weight"], params["bias"])


def mlp(params, x):
    return F.linear(torch.tanh(F.linear(x, params["0"]["weight"], params["0"]["bias"])), params["1"]["weight"])


def mlp_params():
    return {"0": {"weight": normal(0, 3, 2), "bias": normal(1, 3)}, "1": {"weight": normal(2, 2, 3)}}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", ["exact", "empirical", "sampled"])
def test_exact_for_one_layer_and_one_example(likelihood, kind):
    params = {"weight": normal(0, 3, 2), "bias": normal(1, 3)}
    x = normal(2, 1, 2)
    y = targets_of(likelihood, linear(params, x))
    options = {"likelihood": likelihood, "kind": kind, "key": random.key(5), "samples": 2}
    close(KFACOperator(linear, params, x, y, **options).to_dense(), _fisher(linear, params, x, y, options))


def _fisher(model, params, x, y, options):
    if options["kind"] != "sampled":
        options = {key: value for key, value in options.items() if key not in ("key", "samples")}
    return FisherOperator(model, params, x, y, **options).to_dense()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_blocks_of_one_example_are_the_fisher_blocks(likelihood):
    params, x = mlp_params(), normal(3, 1, 2)
    y = targets_of(likelihood, mlp(params, x))
    for kind in ("exact", "empirical"):
        K = KFACOperator(mlp, params, x, y, likelihood=likelihood, kind=kind)
        exact = FisherOperator(mlp, params, x, y, likelihood=likelihood, kind=kind)
        for names in (("0.weight", "0.bias"), ("1.weight",)):
            close(dense_block(params, K, *names), dense_block(params, exact, *names))
    off = K.to_dense()[:9, 9:]
    assert torch.equal(off, torch.zeros_like(off))


def test_exact_for_deep_linear_networks_with_squared_error():
    """Bernacchia, Lengyel and Hennequin 2018: the diagonal blocks of the Fisher matrix are Kronecker products."""
    model = lambda p, x: F.linear(F.linear(F.linear(x, p["a"]), p["b"]), p["c"])
    params = {"a": normal(0, 3, 2), "b": normal(1, 2, 3), "c": normal(2, 2, 2)}
    x = normal(3, 5, 2)
    for reduction in ("mean", "sum"):
        K = KFACOperator(model, params, x, likelihood="gaussian", reduction=reduction)
        exact = FisherOperator(model, params, x, likelihood="gaussian", reduction=reduction)
        for name in params:
            close(dense_block(params, K, name), dense_block(params, exact, name))


def test_the_definition_for_several_examples():
    """A = mean a a.T, G = mean g g.T, block = G kron A in the order of torch's weight, with hand-made a and g."""
    params, x = mlp_params(), normal(3, 4, 2)
    y = torch.tensor([0, 1, 1, 0])
    K = KFACOperator(mlp, params, x, y, kind="empirical")
    hidden = torch.tanh(F.linear(x, params["0"]["weight"], params["0"]["bias"]))
    scores = F.linear(hidden, params["1"]["weight"]).softmax(1) - F.one_hot(y, 2)
    A = hidden.T @ hidden / 4
    G = scores.T @ scores / 4
    close(dense_block(params, K, "1.weight"), torch.kron(G, A))
    g = (scores @ params["1"]["weight"]) * (1 - hidden**2)
    a = torch.cat([x, torch.ones(4, 1).double()], 1)
    first = torch.kron(g.T @ g / 4, a.T @ a / 4)
    order = torch.tensor([0, 1, 3, 4, 6, 7, 2, 5, 8])  # rows of [weight | bias], then the bias apart
    close(dense_block(params, K, "0.weight", "0.bias"), first[order][:, order])
    block = K.blocks[0]
    assert block.paths == ("0.weight", "0.bias")
    close(block.inputs[0], a.T @ a / 4)
    close(block.deltas[0], g.T @ g / 4)


def test_convolution_as_its_definition():
    """Grosse and Martens 2016: A sums patches over positions, G is averaged over positions."""
    model = lambda p, x: F.conv2d(x, p["weight"], p["bias"], padding=1).flatten(1)
    params = {"weight": normal(0, 2, 3, 2, 2), "bias": normal(1, 2)}
    x = normal(2, 3, 3, 2, 2)
    K = KFACOperator(model, params, x, torch.zeros(3, 18).double(), likelihood="gaussian", kind="empirical")
    patches = F.unfold(x, 2, padding=1)  # (3, 12, 9)
    patches = torch.cat([patches, torch.ones(3, 1, 9).double()], 1)
    deltas = model(params, x).reshape(3, 2, 9)
    A = torch.einsum("nkt,nlt->kl", patches, patches) / 3
    G = torch.einsum("nit,njt->ij", deltas, deltas) / (3 * 9)
    close(K.blocks[0].inputs[0], A)
    close(K.blocks[0].deltas[0], G)
    v = tree.map(torch.ones_like, params)
    joint = torch.cat([v["weight"].flatten(1), v["bias"][:, None]], 1)
    expected = G @ joint @ A
    close((K @ v)["weight"], expected[:, :-1].reshape(2, 3, 2, 2))
    close((K @ v)["bias"], expected[:, -1])


def test_one_position_of_a_grouped_convolution_is_exact():
    model = lambda p, x: F.conv2d(x, p["weight"], p["bias"], groups=2).flatten(1)
    params = {"weight": normal(0, 4, 2, 2, 2), "bias": normal(1, 4)}
    x = normal(2, 1, 4, 2, 2)
    K = KFACOperator(model, params, x, likelihood="gaussian")
    exact = FisherOperator(model, params, x, likelihood="gaussian")
    for group in range(2):
        rows = torch.cat([torch.arange(16) + 16 * group, torch.arange(2) + 32 + 2 * group])
        close(K.to_dense()[rows][:, rows], exact.to_dense()[rows][:, rows])


def test_other_layouts_and_leaves():
    """`x @ w + b`: the bias is a leaf of its own, with its exact block; an embedding; a scale."""
    params = {"table": normal(0, 5, 3), "scale": normal(1, 3), "w": normal(2, 3, 2), "b": normal(3, 2)}
    model = lambda p, x: (F.embedding(x, p["table"]) * p["scale"]) @ p["w"] + p["b"]
    x, y = torch.tensor([4]), torch.tensor([1])
    K = KFACOperator(model, params, x, y)
    exact = FisherOperator(model, params, x, y)
    for name in params:
        close(dense_block(params, K, name), dense_block(params, exact, name))
    several = KFACOperator(model, params, torch.tensor([4, 0, 1]))
    exact = FisherOperator(model, params, torch.tensor([4, 0, 1]))
    for name in ("scale", "b"):
        close(dense_block(params, several, name), dense_block(params, exact, name))


def test_a_weight_used_twice_has_one_block_of_both_uses():
    model = lambda p, x: F.linear(torch.tanh(F.linear(x, p)), p)
    w, x = normal(0, 2, 2), normal(1, 3, 2)
    K = KFACOperator(model, w, x, torch.zeros(3, 2).double(), likelihood="gaussian", kind="empirical")
    hidden = torch.tanh(x @ w.T)
    last = hidden @ w.T
    first = (last @ w) * (1 - hidden**2)
    a, g = torch.cat([x, hidden]), torch.cat([first, last])
    close(K.to_dense(), torch.kron(g.T @ g / (2 * 3), a.T @ a / 3))


def test_a_bias_that_is_used_elsewhere_is_refused():
    model = lambda p, x: F.linear(x, p["w"], p["b"]) * p["b"]
    with pytest.raises(ValueError, match="'b' is used by more than the layer of 'w'"):
        KFACOperator(model, {"w": normal(0, 2, 2), "b": normal(1, 2)}, normal(2, 3, 2), likelihood="gaussian")


def test_large_dense_blocks_are_refused():
    with pytest.raises(ValueError, match="'s' is not the weight of a layer"):
        KFACOperator(lambda p, x: x * p["s"], {"s": torch.ones(3000)}, torch.ones(1, 3000), likelihood="gaussian")


def test_a_loader_gives_the_factors_of_all_its_data():
    params, x = mlp_params(), normal(3, 4, 2)
    whole = KFACOperator(mlp, params, x)
    loaded = KFACOperator(mlp, params, loader=iter([(x[:1], None), (x[1:], None)]))
    close(loaded.to_dense(), whole.to_dense())


def test_the_inverse():
    K = KFACOperator(mlp, mlp_params(), normal(3, 4, 2))
    damped = K.to_dense() + 0.1 * torch.eye(K.shape[0], dtype=torch.float64)
    close(K.inverse(0.1).to_dense(), torch.linalg.inv(damped))
    with pytest.raises(ValueError, match="positive damping"):
        K.inverse(0.0)


def test_the_inverse_as_a_preconditioner_saves_iterations():
    params, x = mlp_params(), normal(3, 20, 2)
    F_ = FisherOperator(mlp, params, x)
    K = KFACOperator(mlp, params, x)
    b = normal(4, F_.shape[0])
    solution = F_.solve(b, damping=1e-3, rtol=1e-8, preconditioner=K.inverse(1e-3))
    close((F_ @ solution) + 1e-3 * solution, b, 1e-6)


@pytest.mark.slow
def test_compiled(fast_compile):
    K = KFACOperator(mlp, mlp_params(), normal(3, 4, 2))
    v = normal(4, K.shape[0])
    close(torch.compile(lambda u: K @ u, fullgraph=True)(v), K @ v)


def test_a_leaf_used_both_ways_round_is_refused():
    tied = {"e": torch.randn(5, 3)}
    model = lambda p, i: torch.nn.functional.embedding(i, p["e"]).tanh() @ p["e"].t()
    with pytest.raises(ValueError, match="'e' is used both ways round"):
        KFACOperator(model, tied, torch.tensor([0, 1, 2]))
