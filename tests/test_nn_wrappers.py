"""nn.Repeat, nn.Remat, nn.Cast: the same numbers as the layers they wrap, in other memory, graphs and dtypes."""

import copy
import pickle

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

import fnn
from fnn import losses, nn, optim, random, train, tree

KEY = random.key(3)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def block():
    """Has parameters, running statistics and randomness."""
    return nn.Residual(nn.Sequential(nn.Linear(5), nn.BatchNorm(), nn.tanh, nn.Dropout(0.3), nn.Linear(4)))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def whole(net, x):
    """A scalar function of params and x that sees every output of a training application."""

    def f(params, x):
        _, state = net.init(KEY, x)
        y, state = net.apply(params, state, x, key=KEY, train=True)
        return (y**2).sum(), state

    return lambda params, x: f(params, x)[0]


# ---- Repeat


def test_repeat_is_a_sequence_of_copies():
    x = double(6, 4)
    ours, theirs = nn.Repeat(block(), 3), nn.Sequential(block(), block(), block())
    params, state = ours.init(KEY, x)
    expected, expected_state = theirs.init(KEY, x)
    assert list(tree.paths(params)) == list(tree.paths(expected))
    same(params, expected)
    y, new = ours.apply(params, state, x, key=KEY, train=True)
    z, expected_state = theirs.apply(expected, expected_state, x, key=KEY, train=True)
    same((y, new), (z, expected_state))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stacked_copies_compute_the_same(compiled, fast_compile):
    x = double(6, 4)
    n = 2 if compiled else 3
    plain, stacked = nn.Repeat(block(), n), nn.Repeat(block(), n, stacked=True)
    params, state = plain.init(KEY, x)
    stack, stack_state = stacked.init(KEY, x)
    assert {path: leaf.shape[0] for path, leaf in tree.paths((stack, stack_state)).items()} == dict.fromkeys(
        tree.paths((stack, stack_state)), n
    )
    assert list(stack) == ["*"]
    for index in range(n):
        same(tree.map(lambda leaf, index=index: leaf[index], stack["*"]), params[str(index)])

    def run(net):
        def f(p, s, x):
            y, s = net.apply(p, s, x, key=KEY, train=True)
            return (y**2).sum(), (y, s)

        whole = lambda p, s, x: grad(f, has_aux=True)(p, s, x)
        return torch.compile(whole, fullgraph=True) if compiled and net is stacked else whole

    grads, (y, new) = run(plain)(params, state, x)
    stack_grads, (z, stack_new) = run(stacked)(stack, stack_state, x)
    same(y, z)
    for index in range(n):
        same(tree.map(lambda leaf, index=index: leaf[index], stack_grads["*"]), grads[str(index)])
        same(tree.map(lambda leaf, index=index: leaf[index], stack_new["*"]), new[str(index)])


def test_repeat_gives_named_inputs_to_every_copy():
    scale = nn.Block(lambda m, x, by: m.fc(x) * by, fc=nn.Linear(3))
    net = nn.Repeat(scale, 2)
    x = double(2, 3)
    params, _ = net.init(KEY, x, by=torch.tensor(2.0))
    y = net(params, x, by=torch.tensor(2.0))
    fc = nn.Linear(3)
    same(y, 2 * fc(params["1"]["fc"], 2 * fc(params["0"]["fc"], x)))


def test_copies_of_a_recurrent_layer_hand_on_its_output():
    x, cell = double(2, 4, 3), nn.LSTM(3)
    params, _ = nn.Repeat(cell, 2).init(KEY, x)
    expected = cell(params["1"], cell(params["0"], x)[0])[0]
    same(nn.Repeat(cell, 2)(params, x), expected)
    same(nn.Residual(nn.Repeat(cell, 2))({"body": params}, x), x + expected)
    same(nn.Residual(cell)({"body": params["0"]}, x), x + cell(params["0"], x)[0])


def test_repeat_names_what_is_wrong():
    scale = nn.Repeat(nn.Block(lambda m, x, by=1.0: m.fc(x) * by, fc=nn.Linear(3)), 2)
    for call in (scale.init, lambda key, *xs: scale(scale.init(key, xs[0])[0], *xs)):
        with pytest.raises(ValueError, match="takes one input, .* got 2; give others by name, they go to every copy"):
            call(KEY, double(2, 3), torch.tensor(2.0))
    with pytest.raises(ValueError, match="n must be a number of copies >= 1, got 0"):
        nn.Repeat(nn.Linear(3), 0)
    with pytest.raises(ValueError, match=r"layer '0' Linear\(5\): .* shape \(2, 5\) for shape \(2, 4\)"):
        nn.Repeat(nn.Linear(5), 2).init(KEY, double(2, 4))
    net = nn.Repeat(nn.Linear(4), 2, stacked=True)
    params, _ = net.init(KEY, double(2, 4))
    with pytest.raises(ValueError, match=r"with the entry '\*', got \['0', '1'\]"):
        net({"0": {}, "1": {}}, double(2, 4))
    with pytest.raises(ValueError, match=r"leaf '\*\.weight' has shape \(1, 4, 4\); expected 2, the number of copies"):
        net(tree.map(lambda leaf: leaf[:1], params), double(2, 4))
    with pytest.raises(ValueError, match=r"leaf '\*\.weight' is int; expected 2, the number of copies, first"):
        net({"*": {"weight": 3, "bias": params["*"]["bias"]}}, double(2, 4))


# ---- Remat


def test_remat_changes_no_number():
    x = double(6, 4)
    plain, ours = block(), nn.Remat(block())
    params, _ = plain.init(KEY, x)
    same(ours.init(KEY, x)[0], params)
    f, g = whole(plain, x), whole(ours, x)
    tangents = tree.map(torch.ones_like, params)
    same(grad(g, argnums=(0, 1))(params, x), grad(f, argnums=(0, 1))(params, x))
    same(jvp(lambda p: g(p, x), (params,), (tangents,)), jvp(lambda p: f(p, x), (params,), (tangents,)))
    xs = double(2, 6, 4)
    same(vmap(grad(g), (None, 0))(params, xs), vmap(grad(f), (None, 0))(params, xs))
    small = nn.Remat(nn.Sequential(nn.Linear(2), nn.tanh))
    x = double(3, 2)
    p, _ = small.init(KEY, x)
    same(hessian(lambda p: small(p, x).sum())(p), hessian(lambda p: small.inner(p, x).sum())(p))


@pytest.mark.slow
def test_remat_in_a_compiled_step_keeps_state_and_randomness(fast_compile):
    x = double(6, 4)
    results = []
    for net in (nn.Sequential(block(), nn.tanh), nn.Sequential(nn.Remat(block()), nn.tanh)):

        def loss_fn(params, state, batch, key, net=net):
            y, state = net.apply(params, state, batch, key=key, train=True)
            return losses.mse(y, torch.zeros_like(y)), (state, {})

        params, state = net.init(KEY, x)
        optimizer = optim.sgd(0.1)
        step = train.make_step(loss_fn, optimizer, compile=isinstance(net.children[0][1], nn.Remat))
        train_state = train.TrainState.create(params, optimizer, KEY, state=state)
        for _ in range(2):
            train_state, metrics = step(train_state, x)
        results.append((train_state.params, train_state.state, metrics["loss"]))
    same(*results)


def test_remat_compiles_without_a_key_and_with_inputs_that_are_none(fast_compile):
    masked = nn.Block(lambda m, x, mask=None: m.fc(x) if mask is None else m.fc(x) * mask, fc=nn.Linear(3))
    net, x = nn.Remat(masked), double(2, 3)
    params, _ = net.init(KEY, x)

    def run(net, params, x):
        loss = lambda p, mask: net(p, x, mask=mask).square().sum()
        return net(params, x), grad(loss)(params, None), grad(loss)(params, x > 0)

    compiled = torch.compile(lambda params, x: run(net, params, x), fullgraph=True)
    same(compiled(params, x), run(masked, params, x))


def test_a_rematerialized_layer_keeps_less(fast_compile):
    """Of three blocks of tanh, autograd keeps one activation each instead of all."""
    net = nn.Sequential(*[nn.tanh] * 6)
    kept = []
    for layer in (net, nn.Remat(net)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer({}, torch.randn(4, 4, requires_grad=True))
        kept.append(len(saved))
    assert kept[0] == 6
    assert kept[1] <= 1


# ---- Cast


def test_cast_computes_in_the_policys_dtype():
    seen = []

    def look(x):
        seen.append(x.dtype)
        return x

    policy = nn.Policy(compute=torch.bfloat16)
    net = nn.Cast(nn.Sequential(nn.Linear(4), look, nn.BatchNorm(), nn.Dropout(0.5)), policy)
    x = torch.randn(6, 3)
    params, state = net.init(KEY, x)
    assert {leaf.dtype for leaf in tree.leaves((params, state))} == {torch.float32}
    y, new = net.apply(params, state, x, key=KEY, train=True)
    assert (y.dtype, seen[-1]) == (torch.float32, torch.bfloat16)
    assert {leaf.dtype for leaf in tree.leaves(new)} == {torch.float32}
    grads = grad(lambda p: net.apply(p, state, x, key=KEY, train=True)[0].square().sum())(params)
    assert {leaf.dtype for leaf in tree.leaves(grads)} == {torch.float32}

    linear = nn.Cast(nn.Linear(4), policy)
    half = {name: leaf.bfloat16() for name, leaf in params["0"].items()}
    expected = torch.nn.functional.linear(x.bfloat16(), half["weight"], half["bias"]).float()
    torch.testing.assert_close(linear(params["0"], x), expected, rtol=0, atol=0)


def test_cast_takes_integers_and_other_parameter_dtypes():
    net = nn.Cast(nn.Linear(4), nn.Policy(torch.float64, torch.float32, torch.float16))
    params, _ = net.init(KEY, torch.zeros(2, 3))
    assert params["weight"].dtype == torch.float64
    assert net(params, torch.zeros(2, 3)).dtype == torch.float16
    pick = nn.Cast(nn.Block(lambda m, i: m.table()[i], table=nn.Parameter((5, 2))), nn.Policy(compute=torch.bfloat16))
    params, _ = pick.init(KEY, torch.tensor([1, 4]))
    assert pick(params, torch.tensor([1, 4])).shape == (2, 2)


@pytest.mark.slow
def test_a_cast_net_trains_and_its_per_sample_norms_are_right(fast_compile):
    net = nn.Cast(nn.Sequential(nn.Linear(8), nn.tanh, nn.Linear(1)), nn.Policy(compute=torch.bfloat16))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    params, _ = net.init(KEY, x)
    loss = lambda p, x: net(p, x).square().sum()
    norms = fnn.per_sample_grad_norm(loss)(params, x)
    expected = vmap(lambda x: optim.global_norm(grad(loss)(params, x)))(x)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-5)

    def loss_fn(params, state, batch, key):
        return losses.mse(net(params, batch[0]), batch[1]), (state, {})

    optimizer = optim.adam(0.02)
    step = train.make_step(loss_fn, optimizer)
    train_state = train.TrainState.create(params, optimizer, KEY)
    history = []
    for _ in range(60):
        train_state, metrics = step(train_state, (x, x.sum(1, keepdim=True)))
        history.append(metrics["loss"].item())
    assert history[-1] < 0.1 * history[0]
    assert {leaf.dtype for leaf in tree.leaves(train_state.params)} == {torch.float32}


def test_policies_and_wrapped_layers_are_checked():
    with pytest.raises(TypeError, match="compute must be a floating dtype such as torch.bfloat16, got torch.int32"):
        nn.Policy(compute=torch.int32)
    with pytest.raises(TypeError, match=r"Cast: policy must be an nn\.Policy, got torch.bfloat16"):
        nn.Cast(nn.Linear(2), torch.bfloat16)
    with pytest.raises(TypeError, match="must be a layer or a pure tensor function, got 3"):
        nn.Remat(3)


def test_wrappers_print_and_are_transparent_to_summary():
    net = nn.Sequential(nn.Remat(nn.Linear(3)), nn.Repeat(nn.Cast(nn.Linear(3), nn.Policy()), 2, stacked=True))
    summary = fnn.summary(net, torch.zeros(1, 3))
    assert [row.path for row in summary.rows] == ["0", "1.0", "1.1"]
    assert [row.parameters for row in summary.rows] == [12, 12, 12]
    assert summary.parameters == 36
    assert repr(nn.Remat(nn.Linear(3))) == "Remat(Linear(3))"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Remat(nn.Sequential(nn.Embedding(4, 3), nn.Linear(2))),
        nn.Cast(nn.Repeat(nn.Linear(3), 2, stacked=True), nn.Policy(compute=torch.bfloat16)),
        nn.Residual(
            nn.Sequential(nn.Conv2d(4, 3), nn.BatchNorm(), nn.relu, nn.MaxPool2d(2)), nn.Parallel(nn.Linear(2))
        ),
    ],
    ids=["remat", "cast", "containers"],
)
def test_layers_are_pickled_and_copied(layer):
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert other == layer
        assert hash(other) == hash(layer)
        assert repr(other) == repr(layer)
    if isinstance(layer, nn.Remat):
        ids = torch.tensor([[0, 3]])
        params, _ = layer.init(KEY, ids)
        same(pickle.loads(pickle.dumps(layer))(params, ids), layer(params, ids))
