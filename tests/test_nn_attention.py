"""fnn.nn attention: torch.nn.MultiheadAttention by name, masks, grouped heads, rotary positions, transforms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import nn, random, tree
from fnn.ops import _taps

KEY = random.key(0)
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def double(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def booleans(*shape):
    return double(*shape) > 0


def nested(module):
    """A module's parameters as params, by name."""
    params = {}
    for path, value in module.named_parameters():
        *parents, name = path.split(".")
        functools.reduce(lambda d, part: d.setdefault(part, {}), parents, params)[name] = value.detach().clone()
    return params


def theirs(width, heads, **options):
    module = torch.nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(double(*parameter.shape) / 2)
    return module


def masks(batch, heads, length, size, which):
    """A mask and a padding mask that leave a key to each query."""
    if which == "none":
        return None, None
    shape = (length, size) if which == "two" else (batch, heads, length, size)
    first = torch.arange(size) == 0
    return booleans(*shape) | first, booleans(batch, size) | first


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    inputs=st.sampled_from(["self", "memory", "narrow memory", "keys and values"]),
    which=st.sampled_from(["none", "two", "four"]),
    causal=st.booleans(),
    bias=st.booleans(),
)
def test_equals_torch_by_name_in_value_and_gradient(heads, width, sizes, inputs, which, causal, bias):
    batch, length, size = sizes
    embedding = heads * width
    size = length if inputs == "self" else size
    causal = causal and size == length
    xs = {
        "self": [double(batch, length, embedding)],
        "memory": [double(batch, length, embedding), double(batch, size, embedding)],
        "narrow memory": [double(batch, length, embedding), double(batch, size, 5)],
        "keys and values": [double(batch, length, embedding), double(batch, size, 4), double(batch, size, 7)],
    }[inputs]
    query, key, value = (xs * 3)[:3] if len(xs) != 2 else [*xs, xs[1]]
    module = theirs(embedding, heads, bias=bias, kdim=key.shape[-1], vdim=value.shape[-1])
    layer = nn.MultiHeadAttention(heads, causal=causal, bias=bias)
    mask, padding = masks(batch, heads, length, size, which)

    params, state = layer.init(KEY, *xs)
    assert state == {}
    shapes = {name: p.shape for name, p in tree.paths(params).items()}
    assert list(shapes.items()) == [(name, p.shape) for name, p in module.named_parameters()]
    params = nested(module)

    forbidden = None if mask is None else ~mask
    if causal:
        later = ~torch.ones(length, size, dtype=torch.bool).tril()
        forbidden = later if forbidden is None else forbidden | later
    if which == "four":
        assert forbidden is not None
        forbidden = forbidden.reshape(-1, length, size)
    options = {"attn_mask": forbidden, "key_padding_mask": None if padding is None else ~padding}
    for x in (query, key, value):
        x.requires_grad_()
    expected = module(query, key, value, **options, need_weights=False)[0]
    weights = double(*expected.shape, seed=1)
    by_torch = torch.autograd.grad((expected * weights).sum(), [*xs, *module.parameters()])
    for x in (query, key, value):
        x.requires_grad_(False)

    close(layer(params, *xs, mask=mask, padding_mask=padding), expected.detach())
    loss = lambda p, xs: (layer(p, *xs, mask=mask, padding_mask=padding) * weights).sum()
    by_params, by_xs = grad(loss, argnums=(0, 1))(params, xs)
    close([*by_xs, *tree.leaves(by_params)], list(by_torch))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    masked=st.booleans(),
)
def test_grouped_heads_equal_torchs(kv_heads, group, sizes, masked):
    batch, length, size = sizes
    q, k = double(batch, kv_heads * group, length, 2), double(batch, kv_heads, size, 2)
    v = double(batch, kv_heads, size, 3)
    mask = booleans(length, size) | (torch.arange(size) == 0) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    close(nn.dot_product_attention(q, k, v, mask=mask), expected)


def test_a_grouped_layer_is_an_attention_with_repeated_rows():
    x = double(2, 5, 12)
    layer = nn.MultiHeadAttention(6, num_kv_heads=2, causal=True, rotary=100.0)
    params, _ = layer.init(KEY, x)
    assert params["in_proj_weight"].shape == (12 + 2 * 2 * 2, 12)
    assert params["in_proj_bias"].shape == (12 + 2 * 2 * 2,)
    params["in_proj_bias"] = double(20)
    q, k, v = params["in_proj_weight"].split((12, 4, 4))
    bq, bk, bv = params["in_proj_bias"].split((12, 4, 4))
    repeat = lambda rows: rows.unflatten(0, (2, 2)).repeat_interleave(3, 0).flatten(0, 1)
    full = {
        **params,
        "in_proj_weight": torch.cat((q, repeat(k), repeat(v))),
        "in_proj_bias": torch.cat((bq, repeat(bk), repeat(bv))),
    }
    close(layer(params, x), nn.MultiHeadAttention(6, causal=True, rotary=100.0)(full, x))
    memory = double(2, 3, 7)
    narrow, _ = nn.MultiHeadAttention(6, num_kv_heads=2).init(KEY, x, memory)
    assert [narrow[f"{name}_proj_weight"].shape for name in "qkv"] == [(12, 12), (4, 7), (4, 7)]


def turned(y, base):
    """The halves of y (T, d) as complex numbers, turned by their positions."""
    half = torch.arange(y.shape[1] // 2, dtype=torch.float64)
    angles = torch.arange(y.shape[0])[:, None] / base ** (half / len(half))
    return torch.complex(*y.chunk(2, -1)) * torch.exp(1j * angles)


@pytest.mark.parametrize("base", [10000.0, 10.0])
def test_rotary_positions_are_turns_of_complex_numbers(base):
    x, size = double(5, 6), 6
    layer = nn.MultiHeadAttention(1, rotary=base, bias=False)
    params, _ = layer.init(KEY, x)
    wq, wk, wv = params["in_proj_weight"].split(size)
    scores = (turned(x @ wq.T, base) @ turned(x @ wk.T, base).mH).real
    weights = torch.softmax(scores / size**0.5, -1)
    close(layer(params, x), weights @ (x @ wv.T) @ params["out_proj"]["weight"].T)


def test_rotary_scores_depend_on_the_distance_only():
    from fnn.nn._rotary import rotate

    q, k = double(8), double(8, seed=1)
    scores = rotate(q.expand(7, 8), 50.0) @ rotate(k.expand(7, 8), 50.0).T
    for distance in range(-6, 7):
        diagonal = scores.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    assert len({round(scores.diagonal(distance)[0].item(), 6) for distance in range(-6, 7)}) == 13
    assert rotate(q.expand(7, 8).bfloat16(), 50.0).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 4), (2, 3, 0, 4)])
def test_empty_batches_and_sequences(shape):
    layer, x = nn.MultiHeadAttention(2, causal=True, rotary=100.0), double(*shape)
    params, _ = layer.init(KEY, x)
    assert layer(params, x).shape == shape
    assert not any(leaf.any() for leaf in tree.leaves(grad(lambda p: layer(p, x).square().sum())(params)))


def test_an_empty_memory_gives_the_bias():
    x, memory = double(2, 3, 4), double(2, 0, 4)
    layer = nn.MultiHeadAttention(2)
    params, _ = layer.init(KEY, x, memory)
    params["out_proj"]["bias"] = double(4)
    assert torch.equal(layer(params, x, memory), params["out_proj"]["bias"].expand(2, 3, 4))


def test_queries_without_any_key_give_the_bias_and_no_gradient():
    x, memory = double(2, 3, 4), double(2, 5, 4)
    layer = nn.MultiHeadAttention(2)
    params, _ = layer.init(KEY, x, memory)
    params["out_proj"]["bias"] = double(4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    padding = torch.tensor([[True] * 5, [False] * 5])
    f = lambda p, x, memory: layer(p, x, memory, mask=mask, padding_mask=padding)
    y = f(params, x, memory)
    assert torch.equal(y[0, 1], params["out_proj"]["bias"])
    assert torch.equal(y[1], params["out_proj"]["bias"].expand(3, 4))
    close(y[0, [0, 2]], layer(params, x[:1, [0, 2]], memory[:1])[0])
    _, by_x, by_memory = grad(lambda p, x, m: f(p, x, m).square().sum(), argnums=(0, 1, 2))(params, x, memory)
    assert not by_x[0, 1].any()
    assert not by_x[1].any()
    assert not by_memory[1].any()
    assert by_x[0, 0].all()
    second = hessian(lambda x: f(params, x, memory).pow(3).sum())(x)
    assert second.isfinite().all()
    with pytest.raises(ValueError, match="causal attention is that of a sequence to itself, got 3 queries and 5 keys"):
        nn.MultiHeadAttention(2, causal=True)(params, x, memory)


CASES = [
    nn.MultiHeadAttention(2),
    nn.MultiHeadAttention(4, num_kv_heads=2, causal=True, rotary=100.0, dropout=0.3),
]


@pytest.mark.parametrize("layer", CASES, ids=repr)
def test_under_transforms(layer):
    x = double(2, 3, 8)
    params, _ = layer.init(KEY, x)
    padding = torch.tensor([[True, True, False], [True, True, True]])
    f = lambda p, x: layer.apply(p, {}, x, key=KEY, train=True, padding_mask=padding)[0]
    copies = tree.map(lambda p: torch.stack([p, 2 * p]), params)
    xs = torch.stack([x, 2 * x])
    batched = vmap(f)(copies, xs)
    for row in range(2):
        close(batched[row], f(tree.map(lambda p: p[row], copies), xs[row]))

    part = lambda v: f(params, torch.cat([v, x.flatten()[4:]]).reshape(x.shape))
    small = x.flatten()[:4]
    close(jacfwd(part)(small), jacrev(part)(small))
    close(jvp(part, (small,), (small,))[1], torch.einsum("ntej,j->nte", jacrev(part)(small), small))
    cubic = lambda v: part(v).pow(3).sum()
    second = hessian(cubic)(small)
    close(second, jacrev(jacrev(cubic))(small))
    close(vmap(hessian(cubic))(torch.stack([small, 2 * small]))[0], second)
    torch.autograd.gradgradcheck(cubic, small.requires_grad_())


def test_compiles_to_the_eager_result(fast_compile):
    layer = nn.MultiHeadAttention(4, num_kv_heads=2, causal=True, rotary=100.0)
    x, mask = double(2, 3, 8), torch.tensor([[True, True, False], [True, True, True]])
    params, _ = layer.init(KEY, x)
    f = grad(lambda p, x, mask: layer(p, x, padding_mask=mask).square().sum())
    close(torch.compile(f, fullgraph=True)(params, x, mask), f(params, x, mask))


@pytest.mark.slow
def test_transforms_compile_to_the_eager_result(fast_compile):
    layer, x = CASES[1], double(2, 3, 8)
    params, _ = layer.init(KEY, x)
    padding = torch.tensor([[True, True, False], [True, True, True]])
    tangent = tree.map(lambda p: torch.ones_like(p) / 3, params)

    def everything(params, x, padding, key):
        f = lambda p, x, padding: layer.apply(p, {}, x, key=key, train=True, padding_mask=padding)[0]
        loss = lambda p: f(p, x, padding).square().sum()
        one = lambda p, x, padding: f(p, x, padding).square().sum()
        return {
            "vmap(grad)": vmap(grad(one), in_dims=(None, 0, 0))(params, x, padding),
            "hvp": jvp(grad(loss), (params,), (tangent,)),
        }

    eager = everything(params, x, padding, KEY)
    compiled = torch.compile(everything, fullgraph=True)(params, x, padding, KEY)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_inductor_gives_the_eager_gradient():
    layer = nn.MultiHeadAttention(2, num_kv_heads=1, causal=True, rotary=100.0)
    x = torch.randn(2, 4, 8)
    params, _ = layer.init(KEY, x)
    f = grad(lambda p, x: layer(p, x).square().sum())
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(params, x), f(params, x), rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_weights_and_by_key():
    layer = nn.MultiHeadAttention(2, dropout=0.5)
    assert layer.uses_key
    assert not nn.MultiHeadAttention(2).uses_key
    x = torch.ones(1, 200, 4, dtype=torch.float64)
    params, _ = layer.init(KEY, x)
    run = lambda key: layer.apply(params, {}, x, key=key, train=True)[0]
    assert torch.equal(run(KEY), run(KEY))
    assert not torch.equal(run(KEY), run(random.key(1)))
    expected = nn.MultiHeadAttention(2)(params, x)
    assert torch.equal(layer.apply(params, {}, x, key=KEY)[0], expected)
    # Equal rows: each output is the expected one times the share kept of 200 weights, one share a head.
    wv = params["in_proj_weight"][8:]
    shares = torch.linalg.lstsq(
        (params["out_proj"]["weight"] * (wv @ x[0, 0])).unflatten(1, (2, 2)).sum(-1), run(KEY)[0].T
    ).solution
    torch.testing.assert_close(shares.mean(), torch.tensor(1.0, dtype=torch.float64), rtol=0.02, atol=0)
    kept = shares * 200 / 2
    close(kept, kept.round(), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="Dropout needs a key in training"):
        layer.apply(params, {}, x, train=True)
    with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\], got 1\.5"):
        nn.MultiHeadAttention(2, dropout=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_softmax_float32(dtype):
    layer = nn.MultiHeadAttention(2, causal=True, rotary=100.0)
    x = double(2, 6, 8)
    params, _ = layer.init(KEY, x)
    half = tree.map(lambda p: p.to(dtype), params)
    y = layer(half, x.to(dtype))
    assert y.dtype == dtype
    exact = layer(tree.map(torch.Tensor.double, half), x.to(dtype).double())
    assert (y.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps
    seen = []
    q = torch.ones(1, 2, 3, dtype=dtype)
    nn.dot_product_attention(q, q, q, drop=lambda w: seen.append(w.dtype) or w)
    assert seen == [torch.float32]


def test_starts_from_torchs_distribution():
    params, _ = nn.MultiHeadAttention(4).init(KEY, torch.zeros(1, 2, 200))
    theirs = torch.nn.MultiheadAttention(200, 4)
    for ours, other in (
        (params["in_proj_weight"], theirs.in_proj_weight),
        (params["out_proj"]["weight"], theirs.out_proj.weight),
    ):
        torch.testing.assert_close(ours.std(), other.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(ours.abs().max(), other.abs().max(), rtol=0.01, atol=0)
    assert not params["in_proj_bias"].any()
    assert not params["out_proj"]["bias"].any()
    half, _ = nn.MultiHeadAttention(4).init(KEY, torch.zeros(2, 8, device="meta", dtype=torch.bfloat16))
    assert {(leaf.dtype, leaf.device.type) for leaf in tree.leaves(half)} == {(torch.bfloat16, "cpu")}


def test_taps_see_the_packed_weight_of_self_attention():
    layer = nn.MultiHeadAttention(2, causal=True)
    x = double(3, 4)
    params, _ = layer.init(KEY, x)
    plan = _taps.plan(lambda p, x: layer(p, x).sum(), params, x)
    assert [tap.path for tap in plan.taps] == ["in_proj_weight", "out_proj.weight"]
    params, _ = layer.init(KEY, x, double(5, 6))
    plan = _taps.plan(lambda p, x: nn.MultiHeadAttention(2)(p, x, double(5, 6)).sum(), params, x)
    assert [tap.path for tap in plan.taps] == [f"{n}_proj_weight" for n in "qkv"] + ["out_proj.weight"]


def test_in_a_block_with_named_masks():
    block = nn.Block(
        lambda m, x, memory, mask=None: x + m.cross(m.norm(x), memory, mask=mask),
        norm=nn.LayerNorm(), cross=nn.MultiHeadAttention(2),
    )  # fmt: skip
    x, memory, mask = double(2, 3, 4), double(2, 5, 6), booleans(3, 5)
    params, _ = block.init(KEY, x, memory, mask=mask)
    assert "cross.out_proj.weight" in tree.paths(params)
    assert block(params, x, memory, mask=mask).shape == x.shape
    assert nn.Sequential(nn.MultiHeadAttention(2), nn.Linear(3)).init(KEY, x)[0]["1"]["weight"].shape == (3, 4)
    assert not torch.equal(block(params, x, memory, mask=mask), block(params, x, memory))


X = double(2, 3, 8)
TWO = nn.MultiHeadAttention(2)
MASKS = "mask must have shape \\(3, 3\\) \\(queries, keys\\) or \\(2, 2, 3, 3\\)"
ERRORS = [
    (ValueError, "num_heads=3 must divide the width of the queries, 8", nn.MultiHeadAttention(3), {}),
    (ValueError, "rotary positions turn pairs, but a head has 1 features", nn.MultiHeadAttention(8, rotary=9.0), {}),
    (ValueError, MASKS + ".*got \\(3, 4\\)", TWO, {"mask": booleans(3, 4)}),
    (ValueError, MASKS + ".*got \\(2, 3, 3\\).*mask\\[:, None\\]", TWO, {"mask": booleans(2, 3, 3)}),
    (TypeError, "mask must be a bool tensor, .*float64", TWO, {"mask": double(3, 3)}),
    (TypeError, "mask must be a bool tensor, .*str", TWO, {"mask": "causal"}),
    (ValueError, "padding_mask must have shape \\(2, 3\\).*got \\(3, 2\\)", TWO, {"padding_mask": booleans(3, 2)}),
    (TypeError, "padding_mask must be a bool .*got torch.float64", TWO, {"padding_mask": double(2, 3)}),
    (TypeError, "padding_mask must be a bool .*got list", TWO, {"padding_mask": [True]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "layer", "inputs"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(kind, message, layer, inputs):
    params, _ = nn.MultiHeadAttention(2).init(KEY, X)
    with pytest.raises(kind, match=f"MultiHeadAttention: {message}"):
        layer(params, X, **inputs)


def test_bad_shapes_and_arguments_are_named():
    layer = nn.MultiHeadAttention(2)
    params, _ = layer.init(KEY, X)
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide num_heads=4"):
        nn.MultiHeadAttention(4, num_kv_heads=3)
    for wrong in (True, 0.0, 1, float("nan"), "x"):
        with pytest.raises(ValueError, match=f"rotary must be None or the base .* > 1 such as 10000.0, got {wrong!r}"):
            nn.MultiHeadAttention(4, rotary=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional arguments"):
        nn.MultiHeadAttention(8, 2)  # type: ignore[misc]
    with pytest.raises(TypeError, match="bias must be True or False, got 8"):
        nn.MultiHeadAttention(2, bias=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keys \(..., S, K\).*got \(2, 3, 8\), \(3, 3, 8\) and \(3, 3, 8\)"):
        layer(params, X, double(3, 3, 8))
    with pytest.raises(ValueError, match=r"got \(2, 3, 8\), \(2, 4, 8\) and \(2, 5, 8\)"):
        layer(params, X, double(2, 4, 8), double(2, 5, 8))
    with pytest.raises(ValueError, match="has an unexpected leaf 'in_proj_weight'|has no leaf 'q_proj_weight'"):
        layer(params, X, double(2, 4, 6))
    with pytest.raises(ValueError, match="params must be a dict with .*'out_proj'"):
        layer({"in_proj_weight": params["in_proj_weight"], "in_proj_bias": params["in_proj_bias"]}, X)
    with pytest.raises(ValueError, match="'in_proj_weight' has shape \\(24, 8\\), but this input needs \\(16, 8\\)"):
        nn.MultiHeadAttention(4, num_kv_heads=2)(params, X)
    with pytest.raises(ValueError, match="dot_product_attention: expected queries .*got"):
        nn.dot_product_attention(double(2, 3, 4), double(3, 3, 4), double(3, 3, 4))
    with pytest.raises(ValueError, match=r"dot_product_attention: expected queries .*got \(3, 4\), \(3, 4\)"):
        nn.dot_product_attention(double(3, 4), double(3, 4), double(3, 4))
