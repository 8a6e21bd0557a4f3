"""Embedding and Bilinear against torch.nn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import KEY, check_against_torch, check_compiled, check_transforms, double, name
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fnn
from fnn import nn, tree

IDS = torch.tensor([[0, 2, 1], [3, 2, 2]])

BILINEAR = [
    (nn.Bilinear(2), torch.nn.Bilinear(2, 3, 2), (4, 2), (4, 3)),
    (nn.Bilinear(4), torch.nn.Bilinear(2, 3, 4), (2, 2, 2), (2, 2, 3)),
    (nn.Bilinear(3, bias=False), torch.nn.Bilinear(4, 2, 3, bias=False), (4,), (2,)),
    (nn.Bilinear(1, bias=False), torch.nn.Bilinear(1, 2, 1, bias=False), (3, 1), (3, 2)),
]


@pytest.mark.parametrize(("layer", "module", "first", "second"), BILINEAR, ids=name)
def test_bilinear_equals_torch(layer, module, first, second):
    check_against_torch(layer, module, first, second)


@pytest.mark.parametrize(("layer", "module", "first", "second"), BILINEAR, ids=name)
def test_bilinear_under_transforms(layer, module, first, second):
    check_transforms(layer, module, first, second)


@pytest.mark.slow
def test_bilinear_compiles(fast_compile):
    check_compiled([(nn.Bilinear(2), (2, 2), (2, 3)), (nn.Bilinear(3), (2, 3), (2, 2))])


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    bias=st.booleans(),
)
def test_bilinear_of_any_shape(lead, sizes, bias):
    out, in1, in2 = sizes
    x1, x2, module = double(*lead, in1), double(*lead, in2), torch.nn.Bilinear(in1, in2, out, bias).double()
    params = {n: p.detach() for n, p in module.named_parameters()}
    torch.testing.assert_close(nn.Bilinear(out, bias)(params, x1, x2), module(x1, x2), rtol=1e-10, atol=1e-10)


def test_bilinear_starts_like_torch():
    ours, _ = nn.Bilinear(30).init(KEY, torch.zeros(1, 25), torch.zeros(1, 16))
    theirs = torch.nn.Bilinear(25, 16, 30)
    for leaf, module_leaf in ((ours["weight"], theirs.weight), (ours["bias"], theirs.bias)):
        assert leaf.shape == module_leaf.shape
        for tensor in (leaf, module_leaf):
            assert 0.15 < tensor.abs().max() <= 0.2
    torch.testing.assert_close(ours["weight"].std(), theirs.weight.std(), rtol=0.03, atol=0)


def embedding(padding_idx):
    """The layer, torch's module, and params with the module's weight in float64."""
    module = torch.nn.Embedding(4, 3, padding_idx=padding_idx).double()
    with torch.no_grad():
        module.weight.copy_(double(4, 3))
    return nn.Embedding(4, 3, padding_idx), module, {"weight": module.weight.detach().clone()}


@pytest.mark.parametrize("padding_idx", [None, 2, -1, 0])
@pytest.mark.parametrize("ids", [IDS, IDS.int(), IDS.byte(), torch.tensor(2), IDS[:0]], ids=str)
def test_embedding_equals_torch(padding_idx, ids):
    layer, module, params = embedding(padding_idx)
    theirs = module(ids.long())
    torch.testing.assert_close(layer(params, ids), theirs, rtol=0, atol=0)
    loss = lambda p: (layer(p, ids) ** 3).sum()
    (expected,) = torch.autograd.grad((theirs**3).sum(), module.weight)
    torch.testing.assert_close(grad(loss)(params)["weight"], expected, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), width=st.integers(1, 3))
def test_embedding_of_any_ids(data, rows, width):
    padding_idx = data.draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, rows), min_size=1, max_size=4)))
    layer, weight = nn.Embedding(rows, width, padding_idx), double(rows, width).requires_grad_()
    if ids.min() < 0 or ids.max() >= rows:
        with pytest.raises(IndexError, match=rf"ids must be in \[0, {rows}\)"):
            layer({"weight": weight}, ids)
        return
    ours, theirs = layer({"weight": weight}, ids), torch.nn.functional.embedding(ids, weight, padding_idx)
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_embedding_starts_normal_with_a_zero_row():
    weight = nn.Embedding(300, 50, padding_idx=-2).init(KEY, IDS)[0]["weight"]
    assert weight.dtype == torch.float32
    assert not weight[298].any()
    rest = torch.cat([weight[:298], weight[299:]])
    assert rest.any(1).all()
    torch.testing.assert_close(rest.mean(), torch.tensor(0.0), rtol=0, atol=0.03)
    torch.testing.assert_close(rest.std(), torch.tensor(1.0), rtol=0.03, atol=0)
    custom = nn.Embedding(4, 2, 1, nn.initializers.ones).init(KEY, IDS)[0]["weight"]
    assert custom.tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_under_transforms(padding_idx):
    layer, _, params = embedding(padding_idx)
    weight = params["weight"]
    f = lambda w: layer({"weight": w}, IDS)
    cubed = lambda w: f(w).pow(3).sum()
    counts = torch.bincount(IDS.flatten(), minlength=4).double()
    if padding_idx is not None:
        counts[padding_idx] = 0
    chosen = torch.nn.functional.one_hot(IDS, 4).double() * (counts > 0)
    direct = torch.einsum("abr,ij->abirj", chosen, torch.eye(3).double())
    torch.testing.assert_close(jvp(f, (weight,), (weight,))[1], chosen @ weight)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(f)(weight), direct)
    second = torch.einsum("ri,rs,ij->risj", 6 * counts[:, None] * weight, *map(torch.eye, (4, 3))).double()
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(transform(cubed)(weight), second)
    tables = torch.stack([weight, -weight, weight + 1])
    torch.testing.assert_close(vmap(jacrev(jacrev(cubed)))(tables)[0], second)
    ids = torch.stack([IDS, IDS.flip(0), IDS % 2])
    both = vmap(lambda w, ids: grad(lambda w: layer({"weight": w}, ids).pow(3).sum())(w))(tables, ids)
    for row in range(3):
        expected = grad(lambda w: layer({"weight": w}, ids[row]).pow(3).sum())(tables[row])
        torch.testing.assert_close(both[row], expected)
    nested = vmap(vmap(lambda ids: layer(params, ids)))(ids)
    assert torch.equal(nested, layer(params, ids))


@pytest.mark.slow
def test_embedding_compiles(fast_compile):
    layer, _, params = embedding(2)

    def run(params, ids):
        f = lambda p: layer(p, ids)
        loss = lambda p: f(p).pow(3).sum()
        per_example = lambda p, ids: layer(p, ids).square().sum()
        return {
            "y": f(params),
            "grad": grad(loss)(params),
            "jvp": jvp(f, (params,), (params,))[1],
            "hvp": jvp(grad(loss), (params,), (params,))[1],
            "vmap(grad)": vmap(grad(per_example), in_dims=(None, 0))(params, ids),
            "hessian": hessian(lambda w: loss({"weight": w}))(params["weight"]),
        }

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(params, IDS), run(params, IDS))


@pytest.mark.slow
def test_embedding_compiles_with_inductor_and_marks_ids_out_of_range():
    layer, _, params = embedding(0)
    run = torch.compile(lambda w, ids: (layer({"weight": w}, ids), grad(lambda w: layer({"weight": w}, ids).sum())(w)))
    for _ in range(2):
        y, gradient = run(params["weight"], IDS)
        torch.testing.assert_close(y, layer(params, IDS))
        assert gradient[:, 0].tolist() == [0, 1, 3, 1]
    for wrong in (4, -1, -4, 2**40):
        y, _ = run(params["weight"], torch.tensor([[1, wrong, 0], [3, 2, 2]]))
        assert y[0, 1].isnan().all()
        assert torch.equal(y[1], layer(params, IDS)[1])


@pytest.mark.parametrize("wrong", [-1, 4])
def test_ids_out_of_range_are_refused_in_every_eager_mode(wrong):
    layer, _, params = embedding(None)
    ids = torch.tensor([[1, wrong], [0, 0]])
    tables = torch.stack([params["weight"], params["weight"]])
    message = rf"Embedding: ids must be in \[0, 4\), got ids from {wrong} to {wrong}"
    for call in (
        lambda: layer(params, ids),
        lambda: vmap(lambda ids: layer(params, ids))(ids),
        lambda: vmap(lambda w: layer({"weight": w}, ids))(tables),
        # torch reads row 0 of the second table for id 4 of the first
        lambda: vmap(lambda w, ids: layer({"weight": w}, ids))(tables, ids),
        lambda: grad(lambda p: layer(p, ids).sum())(params),
        lambda: vmap(grad(lambda p, ids: layer(p, ids).sum()), (None, 0))(params, ids),
        lambda: jacfwd(lambda p: layer(p, ids))(params),
    ):
        with pytest.raises(IndexError, match=message):
            call()


def test_ids_out_of_range_are_nan_where_they_are_traced(fast_compile):
    layer, _, params = embedding(1)
    tables = torch.stack([params["weight"], params["weight"]])
    ids = torch.tensor([[1, 4], [0, -1]])
    run = torch.compile(vmap(lambda w, ids: layer({"weight": w}, ids)), fullgraph=True)
    y = run(tables, ids)
    assert y[:, 1].isnan().all()
    assert torch.equal(y[:, 0], params["weight"][ids[:, 0]])


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_taps_see_the_table(padding_idx):
    net = nn.Sequential(
        nn.Embedding(6, 3, padding_idx),
        lambda h: h.mT,
        nn.Conv1d(4, 2),
        nn.MaxPool1d(2),
        nn.relu,
        nn.Flatten(0),
        nn.Linear(1),
    )
    ids = torch.tensor([[1, 2, 2, 5, 1], [0, 1, 3, 3, 4], [1, 1, 1, 1, 1]])
    params = tree.map(torch.Tensor.double, net.init(KEY, ids[0])[0])
    loss = lambda p, ids: net(p, ids).square().sum()
    each = [grad(loss)(params, one) for one in ids]
    assert not each[2]["0"]["weight"].any() or padding_idx is None
    norms = fnn.per_sample_grad_norm(loss)(params, ids)
    torch.testing.assert_close(norms, torch.stack([tree.ravel(g)[0].norm() for g in each]), rtol=1e-10, atol=0)
    plan = fnn.ops._taps.plan(loss, params, ids[0])
    assert {tap.path for tap in plan.taps} == {"0.weight", "2.weight", "6.weight"}
    assert [plan.paths[i] for i in plan.free] == ["2.bias", "6.bias"]


def test_a_tied_head_uses_the_one_table():
    net = nn.Block(lambda m, ids: m.wte(ids) @ m.wte.params["weight"].mT, wte=nn.Embedding(4, 3, padding_idx=0))
    params = tree.map(torch.Tensor.double, net.init(KEY, IDS)[0])
    assert list(tree.paths(params)) == ["wte.weight"]
    weight = params["wte"]["weight"].requires_grad_()
    head = torch.nn.functional.embedding(IDS, weight, 0) @ weight.T
    (expected,) = torch.autograd.grad(head.square().sum(), weight)
    ours = grad(lambda p: net(p, IDS).square().sum())({"wte": {"weight": weight.detach()}})
    torch.testing.assert_close(ours["wte"]["weight"], expected, rtol=1e-10, atol=1e-12)


def test_errors():
    layer, _, params = embedding(None)
    for ids in (IDS.float(), IDS.bool()):
        with pytest.raises(TypeError, match=f"Embedding: ids must be integers, got {ids.dtype}; .* ids.long"):
            layer(params, ids)
        with pytest.raises(TypeError, match="ids must be integers"):
            layer.init(KEY, ids)
    with pytest.raises(ValueError, match="padding_idx must be one of the 4 ids, got 4"):
        nn.Embedding(4, 3, 4)
    with pytest.raises(ValueError, match="num_embeddings must be a whole number of at least 1, got 0"):
        nn.Embedding(0, 3)
    with pytest.raises(ValueError, match="features must be a whole number of at least 1, got 0"):
        nn.Embedding(3, 0)
    with pytest.raises(ValueError, match=r"leaf 'weight' has shape \(4, 3\), but this input needs \(5, 3\)"):
        nn.Embedding(5, 3)(params, IDS)
    bilinear = nn.Bilinear(2)
    with pytest.raises(ValueError, match=r"equal leading axes, got \(2, 3\) and \(3, 3\)"):
        bilinear.init(KEY, torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"equal leading axes, got \(3,\) and \(\)"):
        bilinear.init(KEY, torch.zeros(3), torch.zeros(()))
    with pytest.raises(TypeError, match="Bilinear: bias must be True or False, got 4"):
        nn.Bilinear(2, 4)
    with pytest.raises(TypeError, match="Bilinear: expected floating values, got torch.int64"):
        bilinear(
            bilinear.init(KEY, torch.zeros(2, 3), torch.zeros(2, 3))[0], torch.zeros(2, 3), torch.ones(2, 3).long()
        )
