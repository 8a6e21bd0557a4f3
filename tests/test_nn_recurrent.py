"""fnn.nn recurrent layers: equal to torch.nn by name, packed lengths, carries, transforms, errors."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fnn import nn, random, tree
from fnn.ops import _taps

KEY = random.key(0)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
KINDS = {
    "LSTM": (nn.LSTM, torch.nn.LSTM),
    "GRU": (nn.GRU, torch.nn.GRU),
    "tanh": (functools.partial(nn.RNN, nonlinearity="tanh"), torch.nn.RNN),
    "relu": (functools.partial(nn.RNN, nonlinearity="relu"), functools.partial(torch.nn.RNN, nonlinearity="relu")),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def double(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def carry_of(kind, *shape):
    return (double(*shape), double(*shape, seed=1)) if kind == "LSTM" else double(*shape)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    hidden=st.integers(1, 3),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch=st.one_of(st.none(), st.integers(1, 3)),
    length=st.integers(1, 4),
    given_carry=st.booleans(),
    packed=st.booleans(),
)
def test_equals_torch_by_name_in_value_and_gradient(
    kind, hidden, layers, bidirectional, bias, batch, length, given_carry, packed
):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    ours, theirs = KINDS[kind]
    layer, module = ours(hidden, **options), theirs(2, hidden, batch_first=True, dtype=torch.float64, **options)
    axes = () if batch is None else (batch,)
    x = double(*axes, length, 2)
    carry = carry_of(kind, layers * (1 + bidirectional), *axes, hidden) if given_carry else None
    lengths = torch.randint(1, length + 1, axes, generator=torch.Generator().manual_seed(length)) if packed else None
    if batch is None:
        lengths = None

    params, state = layer.init(KEY, x)
    assert state == {}
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert list(shapes.items()) == [(name, p.shape) for name, p in params.items()]
    params = {name: p.detach().clone() for name, p in module.named_parameters()}

    leaves = [leaf.requires_grad_() for leaf in (x, *tree.leaves(() if carry is None else carry))]
    if lengths is None:
        expected = module(x, carry)
    else:
        pack = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, end = module(pack, carry)
        expected = (pad_packed_sequence(y, batch_first=True, total_length=length)[0], end)
    weights = tree.map(lambda y: double(*y.shape, seed=2), expected)
    total = lambda ys: torch.stack(
        [(a * b).sum() for a, b in zip(tree.leaves(ys), tree.leaves(weights), strict=True)]
    ).sum()
    by_torch = torch.autograd.grad(total(expected), [*leaves, *module.parameters()])
    for leaf in leaves:
        leaf.requires_grad_(False)

    close(layer(params, x, carry, lengths=lengths), tree.map(torch.Tensor.detach, expected))
    loss = lambda p, x, carry: total(layer(p, x, carry, lengths=lengths))
    if carry is None:
        by_params, by_x = grad(lambda p, x: loss(p, x, None), argnums=(0, 1))(params, x)
        by_carry = ()
    else:
        by_params, by_x, by_carry = grad(loss, argnums=(0, 1, 2))(params, x, carry)
    close([by_x, *tree.leaves(by_carry), *by_params.values()], list(by_torch))


@each_kind
def test_the_carry_continues_a_sequence(kind):
    layer = KINDS[kind][0](3, num_layers=2)
    x = double(2, 6, 4)
    params, _ = layer.init(KEY, x)
    y, end = layer(params, x)
    first, carry = layer(params, x[:, :2])
    second, last = layer(params, x[:, 2:], carry)
    close(torch.cat((first, second), 1), y)
    close(last, end)
    once, _ = nn.Sequential(layer, nn.Linear(2)).apply({"0": params, "1": nn.Linear(2).init(KEY, y)[0]}, {}, x)
    assert once.shape == (2, 6, 2)


def test_lengths_of_zero_and_beyond():
    layer = nn.LSTM(3, bidirectional=True)
    x, carry = double(2, 4, 2), carry_of("LSTM", 2, 2, 3)
    params, _ = layer.init(KEY, x)
    y, end = layer(params, x, carry, lengths=torch.tensor([0, 9]))
    whole, whole_end = layer(params, x, carry)
    assert not y[0].any()
    close(y[1], whole[1])
    for part, start, full in zip(end, carry, whole_end, strict=True):
        close(part, torch.stack((start[:, 0], full[:, 1]), 1))


@each_kind
def test_under_transforms(kind):
    layer = KINDS[kind][0](3, num_layers=2, bidirectional=True, dropout=0.3)
    x, carry, lengths = double(2, 3, 2), carry_of(kind, 4, 2, 3), torch.tensor([2, 3])
    params, _ = layer.init(KEY, x)
    f = lambda p, x, c: layer.apply(p, {}, x, c, key=KEY, train=True, lengths=lengths)[0]
    copies, xs, carries = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), (params, x, carry))
    batched = vmap(f)(copies, xs, carries)
    for row in range(2):
        close(tree.map(lambda leaf: leaf[row], batched), f(*tree.map(lambda leaf: leaf[row], (copies, xs, carries))))

    part = lambda v: f(params, torch.cat([v, x.flatten()[4:]]).reshape(x.shape), carry)[0]
    small = x.flatten()[:4]
    close(jacfwd(part)(small), jacrev(part)(small))
    cubic = lambda v: part(v).pow(3).sum()
    second = hessian(cubic)(small)
    close(second, jacrev(jacrev(cubic))(small))
    close(vmap(hessian(cubic))(torch.stack([small, 2 * small]))[0], second)
    torch.autograd.gradgradcheck(cubic, small.requires_grad_())


def test_per_example_gradients_by_vmap_equal_a_batchs():
    layer, x = nn.GRU(3), double(4, 3, 2)
    params, _ = layer.init(KEY, x)
    loss = lambda p, x: layer(p, x)[0].square().sum()
    single = vmap(grad(loss), in_dims=(None, 0))(params, x)
    close(tree.map(lambda g: g.sum(0), single), grad(loss)(params, x))


def test_compiles_to_the_eager_result(fast_compile):
    layer = nn.LSTM(3)
    x, lengths = double(2, 2, 2), torch.tensor([1, 2])
    params, _ = layer.init(KEY, x)
    f = grad(lambda p, x: layer(p, x, lengths=lengths)[0].square().sum())
    close(torch.compile(f, fullgraph=True)(params, x), f(params, x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_transforms_compile_to_the_eager_result(kind, fast_compile):
    layer = KINDS[kind][0](2)
    x, carry = double(2, 2, 2), carry_of(kind, 1, 2, 2)
    params, _ = layer.init(KEY, x)
    tangent = tree.map(lambda p: torch.ones_like(p) / 3, params)

    def everything(params, x, carry):
        loss = lambda p: layer(p, x, carry)[0].square().sum()
        one = lambda p, x: layer(p, x)[0].square().sum()
        return {
            "vmap(grad)": vmap(grad(one), in_dims=(None, 0))(params, x),
            "hvp": jvp(grad(loss), (params,), (tangent,)),
            "hessian": hessian(lambda b: loss({**params, "bias_hh_l0": b}))(params["bias_hh_l0"]),
        }

    eager = everything(params, x, carry)
    compiled = torch.compile(everything, fullgraph=True)(params, x, carry)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)


def test_dropout_is_between_layers_and_by_key():
    layer = nn.RNN(40, num_layers=2, dropout=0.5, nonlinearity="relu")
    assert layer.uses_key
    assert not nn.RNN(4, num_layers=2).uses_key
    x = double(2, 3, 4)
    params, _ = layer.init(KEY, x)
    run = lambda key: layer.apply(params, {}, x, key=key, train=True)[0]
    assert torch.equal(run(KEY)[0], run(KEY)[0])
    assert not torch.equal(run(KEY)[0], run(random.key(1))[0])
    # The first layer's end is untouched, and the last layer's outputs, its own end among them, are not dropped.
    y, end = run(KEY)
    clean, clean_end = layer.apply(params, {}, x, key=KEY)[0]
    assert torch.equal(end[0], clean_end[0])
    assert torch.equal(y[:, -1], end[1])
    assert not torch.equal(y, clean)
    assert torch.equal(clean, nn.RNN(40, num_layers=2, nonlinearity="relu")(params, x)[0])
    # What the second layer got is the first one's output with half of it gone and the other half doubled.
    first = nn.RNN(40, nonlinearity="relu")({n: p for n, p in params.items() if "l0" in n}, x)[0]
    dropped, _ = nn.Dropout(0.5).apply({}, {}, first, key=random.fold_in(KEY, 0), train=True)
    second = {n.replace("l1", "l0"): p for n, p in params.items() if "l1" in n}
    close(nn.RNN(40, nonlinearity="relu")(second, dropped)[0], y)
    with pytest.raises(ValueError, match="Dropout needs a key in training"):
        layer.apply(params, {}, x, train=True)
    with pytest.raises(ValueError, match="dropout is between layers, and num_layers=1 has no such place"):
        nn.RNN(4, dropout=0.5)


def test_starts_from_torchs_distribution():
    params, _ = nn.LSTM(100).init(KEY, torch.zeros(1, 50))
    for name, theirs in torch.nn.LSTM(50, 100).named_parameters():
        torch.testing.assert_close(params[name].std(), theirs.std(), rtol=0.1, atol=0)
        torch.testing.assert_close(params[name].abs().max(), theirs.abs().max(), rtol=0.03, atol=0)
    half, _ = nn.GRU(4).init(KEY, torch.zeros(2, 3, 8, device="meta", dtype=torch.bfloat16))
    assert {(leaf.dtype, leaf.device.type) for leaf in tree.leaves(half)} == {(torch.bfloat16, "cpu")}


def test_taps_see_the_weights():
    layer, x = nn.LSTM(3), double(2, 4)
    params, _ = layer.init(KEY, x)
    plan = _taps.plan(lambda p, x: layer(p, x)[0].sum(), params, x)
    assert [tap.path for tap in plan.taps] == ["weight_ih_l0"] + ["weight_hh_l0"] * 2
    assert [plan.paths[index] for index in plan.free] == ["bias_ih_l0", "bias_hh_l0"]


def test_in_a_block_the_carry_is_at_hand():
    block = nn.Block(lambda m, x: m.head(m.rnn(x)[1][0][-1]), rnn=nn.LSTM(3), head=nn.Linear(2))
    x = double(2, 5, 4)
    params, _ = block.init(KEY, x)
    y, _ = nn.LSTM(3)(params["rnn"], x)
    close(block(params, x), nn.Linear(2)(params["head"], y[:, -1]))


X = double(2, 3, 4)
ERRORS = [
    ("carry must be a pair of tensors, each \\(1, 2, 5\\) .*got \\[\\(2, 5\\), \\(1, 2, 5\\)\\]", nn.LSTM(5),
     {"carry": (double(2, 5), double(1, 2, 5))}),
    ("carry must be a pair of tensors, .*got Tensor", nn.LSTM(5), {"carry": double(1, 2, 5)}),
    ("carry must be a tensor of shape \\(1, 2, 5\\) .*got \\[\\(2, 5\\)\\]", nn.GRU(5), {"carry": double(2, 5)}),
    ("carry must be a tensor of shape .*got \\['tuple'\\]", nn.RNN(5), {"carry": (double(1, 2, 5),)}),
    ("lengths must be an integer tensor of shape \\(2,\\).*shape \\(3,\\)", nn.GRU(5),
     {"lengths": torch.ones(3).int()}),
    ("lengths must be an integer .*got torch.float32", nn.GRU(5), {"lengths": torch.ones(2)}),
    ("lengths must be an integer .*got list", nn.GRU(5), {"lengths": [1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "layer", "inputs"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(message, layer, inputs):
    params, _ = layer.init(KEY, X)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: {message}"):
        layer(params, X, **inputs)


def test_a_carry_of_another_dtype_is_named():
    """A wider cell would widen the outputs."""
    layer, zeros = nn.LSTM(5), torch.zeros(1, 2, 5)
    params, _ = layer.init(KEY, X.float())
    for carry in ((zeros, zeros.double()), (zeros.double(), zeros), (zeros.bfloat16(), zeros)):
        with pytest.raises(TypeError, match="LSTM: carry must have the dtype of the params, torch.float32, got"):
            layer(params, X.float(), carry)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="positional arguments"):
        nn.LSTM(10, 20)  # type: ignore[misc]
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        nn.RNN(4, nonlinearity="gelu")
    with pytest.raises(ValueError, match="GRU: hidden_size and num_layers must be at least 1, got 4 and 0"):
        nn.GRU(4, num_layers=0)
    with pytest.raises(
        ValueError, match=r"expected an input of shape \(..., T, features\), T at least 1, got \(2, 0, 3\)"
    ):
        nn.GRU(4).init(KEY, double(2, 0, 3))
    params, _ = nn.LSTM(5).init(KEY, X)
    with pytest.raises(ValueError, match="'weight_ih_l0' has shape \\(20, 4\\), but this input needs \\(15, 4\\)"):
        nn.GRU(5)(params, X)
    with pytest.raises(ValueError, match="no leaf 'weight_ih_l0_reverse'"):
        nn.LSTM(5, bidirectional=True)(params, X)
