"""The compiled step: equal to eager and to torch's own loop, one graph, and a state that owns its memory."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import fnn
from fnn import losses, models, nn, optim, random, train, tree

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))
NET = nn.Sequential(nn.Linear(8), nn.BatchNorm(), nn.relu, nn.Dropout(0.2), nn.Linear(3))
# compile in half and in a third of its time, for promises about the state and about the parameters
NORMED, LINEAR = nn.Sequential(nn.Linear(3), nn.BatchNorm()), nn.Linear(3)


def loss_fn(params, state, batch, key):
    x, labels = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {"accuracy": (logits.argmax(-1) == labels).float().mean()})


def start(optimizer, net=NET, x=X):
    params, state = net.init(random.key(0), x)
    return train.TrainState.create(params, optimizer, random.key(1), state=state)


def plain_loss(net):
    def loss_fn(params, state, batch, key):
        x, labels = batch
        logits, state = net.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(logits, labels), (state, {})

    return loss_fn


@pytest.mark.parametrize(
    ("backend", "donate"), [("aot_eager", False), pytest.param("inductor", True, marks=pytest.mark.slow)]
)
def test_compiled_step_equals_eager_over_20_steps(request, backend, donate):
    """Dropout, running statistics, momentum, clipping and a schedule included."""
    if backend == "aot_eager":
        request.getfixturevalue("fast_compile")
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(optim.cosine(0.1, 20), momentum=0.9))
    runs = []
    for options in ({"compile": False, "donate": False}, {"donate": donate}, {"compile": False}):
        step, train_state = train.make_step(loss_fn, optimizer, **options), start(optimizer)
        history = []
        for _ in range(20):
            train_state, metrics = step(train_state, (X, Y))
            history.append(metrics)
        runs.append((torch.stack([m["loss"] for m in history]), train_state))
    (expected, reference), *others = runs
    assert expected[-1] < expected[0]
    for found, train_state in others:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tree.paths(train_state), tree.paths(reference), rtol=1e-4, atol=1e-5)
        assert int(train_state.step) == 20


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_compiled_lenet_equals_a_torch_module_loop_over_50_steps(request, optimizer):
    """From the same weights, 1e-5 on every loss; with Inductor for the optimizer of more arithmetic."""
    if optimizer == "sgd":
        request.getfixturevalue("fast_compile")
    ours = {"sgd": optim.sgd(0.05, momentum=0.9), "adam": optim.adam(1e-3)}[optimizer]
    images = torch.randn(32, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (32,), generator=torch.Generator().manual_seed(1))
    net = models.lenet5()
    params, _ = net.init(random.key(0), images)
    module = torch.nn.Sequential(
        *[torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)],
        *[torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()],
        *[
            torch.nn.Linear(400, 120),
            torch.nn.ReLU(),
            torch.nn.Linear(120, 84),
            torch.nn.ReLU(),
            torch.nn.Linear(84, 10),
        ],
    )
    with torch.no_grad():
        for parameter, leaf in zip(module.parameters(), tree.leaves(params), strict=True):
            parameter.copy_(leaf)
    theirs = {
        "sgd": torch.optim.SGD(module.parameters(), 0.05, momentum=0.9),
        "adam": torch.optim.Adam(module.parameters(), 1e-3),
    }[optimizer]
    step = train.make_step(plain_loss(net), ours)
    train_state = train.TrainState.create(params, ours, random.key(1))
    found, expected = [], []
    for _ in range(50):
        train_state, metrics = step(train_state, (images, labels))
        found.append(metrics["loss"])
        theirs.zero_grad()
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        theirs.step()
        expected.append(loss.detach())
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("remainder", ["drop", pytest.param("pad", marks=pytest.mark.slow)])
def test_one_graph_for_a_whole_run(trace_only, remainder):
    """Changing step count, schedule, clipping, a ragged last batch: nothing recompiles."""
    from fnn import data

    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(optim.warmup_cosine(0.0, 0.1, 3, 12)))
    loader = data.Loader((X, Y), 5, key=random.key(2), remainder=remainder)
    assert len(X) % 5

    def masked_loss(params, state, batch, key):
        x, labels, *mask = batch
        logits, state = NET.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(logits, labels, where=mask[0] if mask else None), (state, {})

    step, train_state = train.make_step(masked_loss, optimizer), start(optimizer)
    train_state, _ = step(train_state, next(loader.epoch(0)))
    rates = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(3):
            for batch in loader.epoch(epoch):
                train_state, _ = step(train_state, batch)
                rates.add(float(optim.get(train_state.opt_state, "lr")))
        assert len(rates) > 5
        with pytest.raises(RuntimeError, match="fail_on_recompile"):  # the alarm itself works
            step(train_state, tree.map(lambda leaf: leaf[:4], next(loader.epoch(0))))


def test_setting_a_learning_rate_recompiles_nothing(trace_only):
    optimizer = optim.sgd(0.1)
    step, train_state = train.make_step(plain_loss(LINEAR), optimizer), start(optimizer, LINEAR)
    train_state, _ = step(train_state, (X, Y))
    with torch.compiler.set_stance("fail_on_recompile"):
        before = train_state.params["weight"].clone()
        train_state = train_state.replace(opt_state=optim.set(train_state.opt_state, lr=0.0))
        train_state, _ = step(train_state, (X, Y))
    assert torch.equal(before, train_state.params["weight"])


def test_dropout_draws_new_numbers_each_step_and_the_same_after_a_resume():
    optimizer = optim.sgd(0.0)
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state, found = start(optimizer), []
    for n in range(4):
        if n == 2:
            saved = train_state.copy()
        train_state, metrics = step(train_state, (X, Y))
        found.append(float(metrics["loss"]))
    assert len(set(found)) == 4
    for n in (2, 3):
        saved, metrics = step(saved, (X, Y))
        assert float(metrics["loss"]) == found[n]


# ---- the state owns its memory: each of these was silently wrong without the rule


@pytest.mark.parametrize("compile", [False, True])
def test_create_copies_so_the_given_params_stay(fast_compile, compile):
    optimizer = optim.sgd(0.1)
    given = NORMED.init(random.key(0), X)
    kept = tree.map(torch.clone, given)
    train_state = train.TrainState.create(given[0], optimizer, random.key(1), state=given[1])
    train.make_step(plain_loss(NORMED), optimizer, compile=compile)(train_state, (X, Y))
    assert tree.allclose(given, kept, rtol=0, atol=0)


def average(decay):
    """An optimizer part that keeps an average of the parameters and starts it as the parameters themselves."""
    return optim.GradientTransformation(
        lambda params: params,
        lambda grads, opt_state, params=None, **extra: (
            grads,
            tree.map(lambda a, p: decay * a + (1 - decay) * p, opt_state, params),
        ),
    )


def keep_previous():
    """An optimizer part whose state is the parameters before the step: a leaf that moves within the state."""
    return optim.GradientTransformation(
        lambda params: tree.zeros_like(params), lambda grads, opt_state, params=None, **extra: (grads, params)
    )


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("part", [average(0.5), keep_previous()], ids=["average", "previous"])
def test_a_state_that_aliases_or_moves_params_trains_as_undonated(fast_compile, part, compile):
    optimizer = optim.chain(part, optim.sgd(0.1))
    runs = []
    for donate in (False, True):
        step = train.make_step(plain_loss(LINEAR), optimizer, compile=compile and donate, donate=donate)
        train_state = start(optimizer, LINEAR)
        for _ in range(3):
            train_state, _ = step(train_state, (X, Y))
        runs.append(tree.paths(train_state))
    torch.testing.assert_close(*runs)
    first = start(optimizer, LINEAR).params["weight"]
    assert not torch.equal(first, runs[1]["params.weight"])


def test_a_state_that_swaps_two_leaves(fast_compile):
    def update(train_state, batch):
        a, b = train_state.params["a"], train_state.params["b"]
        return train_state.replace(params={"a": b, "b": a}, step=train_state.step + 1), {"loss": batch.sum()}

    for compile in (False, True):
        params = {"a": torch.zeros(2), "b": torch.ones(2)}
        train_state = train.TrainState.create(params, optim.sgd(0.1), random.key(0))
        train_state, _ = train.make_step(update=update, compile=compile)(train_state, torch.ones(1))
        assert torch.equal(train_state.params["a"], torch.ones(2))
        assert torch.equal(train_state.params["b"], torch.zeros(2))


def test_leaves_that_are_one_tensor_are_refused_by_name():
    """Copied, they would silently come apart; written in place, they would step twice."""
    optimizer = optim.sgd(0.1)
    train_state = start(optimizer)
    weight = train_state.params["0"]["weight"]
    message = r"leaves 'params\.0\.weight' and 'params\.tied' share memory"
    with pytest.raises(ValueError, match=message):
        train.TrainState.create({"0": {"weight": weight}, "tied": weight}, optimizer, random.key(0))
    with pytest.raises(ValueError, match=message):
        train_state.replace(params={**train_state.params, "tied": weight.view(-1)})
    by_hand = train.TrainState({"a": weight, "b": weight.T}, {}, optimizer.init({}), random.key(0), torch.tensor(0))
    with pytest.raises(ValueError, match=r"leaves 'params\.a' and 'params\.b' share memory"):
        train.make_step(loss_fn, optimizer, compile=False)(by_hand, (X, Y))


def total(params, state, batch, key):
    return sum(leaf.sum() for leaf in tree.leaves(params)), (state, {})


def test_views_of_one_buffer_train_apart():
    buffer = torch.zeros(2, 6)
    params = {"a": buffer[:, :3], "b": buffer[:, 3:], "c": buffer[:, 1:4], "d": buffer[:, 2:].unfold(1, 2, 1)}
    optimizer = optim.sgd(0.1)
    for train_state in (
        train.TrainState.create(params, optimizer, random.key(0)),
        train.TrainState(params, {}, optimizer.init(params), random.key(0), torch.tensor(0)),
    ):
        new, _ = train.make_step(total, optimizer, compile=False)(train_state, torch.ones(1))
        assert all((leaf == -0.1).all() for leaf in tree.leaves(new.params))
    assert not buffer.any()


def test_replace_copies_what_it_is_given_and_ends_with_its_original():
    optimizer = optim.sgd(0.1)
    mine = {"w": torch.zeros(3)}
    step = train.make_step(total, optimizer, compile=False)
    old = train.TrainState.create({"w": torch.ones(3)}, optimizer, random.key(0))
    new = old.replace(params=mine)
    step(new, torch.ones(1))
    assert not mine["w"].any()
    old = train.TrainState.create({"w": torch.ones(3)}, optimizer, random.key(0))
    other = old.replace(opt_state=optim.set(old.opt_state, lr=0.5))
    step(other, torch.ones(1))
    with pytest.raises(RuntimeError, match="given to a donating step"):
        _ = old.params


@pytest.mark.parametrize("compile", [False, True])
def test_an_update_that_changes_the_state_is_refused_before_damage(fast_compile, compile):
    def returning(params):
        return lambda ts, batch: (ts.replace(params=params(ts.params)), {"loss": batch.sum()})

    for params, message in (
        (lambda p: {"b": p["b"] * 1, "a": p["a"] * 1}, "another order"),
        (lambda p: {"a": p["a"].mean(), "b": p["b"]}, r"leaf 'params\.a' has shape \(\), expected \(2,\)"),
        (lambda p: {"a": p["a"].double(), "b": p["b"]}, r"leaf 'params\.a' has dtype torch.float64"),
    ):
        given = {"a": torch.zeros(2), "b": torch.ones(2)}
        train_state = train.TrainState.create(given, optim.sgd(0.1), random.key(0))
        with pytest.raises(ValueError, match=f"the state after the step: .*{message}"):
            train.make_step(update=returning(params), compile=compile)(train_state, torch.ones(1))
        assert tree.allclose(train_state.params, given, rtol=0, atol=0)


def test_the_state_of_another_optimizer_is_refused():
    for made_by, used in ((optim.adam(0.1), optim.sgd(0.1)), (optim.sgd(0.1, momentum=0.9), optim.sgd(0.1))):
        with pytest.raises(ValueError, match="made by another"):
            train.make_step(loss_fn, used, compile=False)(start(made_by), (X, Y))


def test_an_expanded_leaf_gets_memory_of_its_own():
    optimizer = optim.sgd(0.1)
    train_state = start(optimizer)
    wide = train_state.replace(params=tree.at(train_state.params, "4.bias").set(torch.zeros(1).expand(3)))
    new, _ = train.make_step(loss_fn, optimizer, compile=False)(wide, (X, Y))
    assert new.params["4"]["bias"].stride() == (1,)
    assert new.params["4"]["bias"].unique().numel() == 3


@pytest.mark.parametrize("compile", [False, True])
def test_metrics_are_copies(fast_compile, compile):
    optimizer = optim.sgd(0.1)

    def reporting(params, state, batch, key):
        loss, (state, _) = plain_loss(NORMED)(params, state, batch, key)
        return loss, (state, {"weight": params["0"]["weight"][0, 0], "mean": state["1"]["running_mean"][0]})

    step, train_state, history = train.make_step(reporting, optimizer, compile=compile), start(optimizer, NORMED), []
    for _ in range(3):
        train_state, metrics = step(train_state, (X, Y))
        history.append(metrics)
    for name in ("weight", "mean"):
        assert len({float(metrics[name]) for metrics in history}) == 3


def test_a_donated_state_says_so(fast_compile):
    optimizer = optim.sgd(0.1)
    step, old = train.make_step(plain_loss(LINEAR), optimizer), start(optimizer, LINEAR)
    new, _ = step(old, (X, Y))
    for use in (lambda: old.params, lambda: step(old, (X, Y)), lambda: tree.leaves(old), lambda: old.copy()):
        with pytest.raises(RuntimeError, match="given to a donating step, which reused its memory"):
            use()
    assert repr(old) == "TrainState(donated)"
    keeping = train.make_step(plain_loss(LINEAR), optimizer, compile=False, donate=False)
    again, _ = keeping(new, (X, Y))
    assert int(new.step) == 1
    assert int(again.step) == 2


@pytest.mark.parametrize("compile", [False, True])
def test_donation_writes_into_the_old_memory(fast_compile, compile):
    optimizer = optim.sgd(0.1, momentum=0.9)
    for donate in (True, False):
        step = train.make_step(plain_loss(NORMED), optimizer, compile=compile, donate=donate)
        train_state = start(optimizer, NORMED)
        taken = tree.paths(train_state)
        before = {path: leaf.clone() for path, leaf in taken.items()}
        train_state, _ = step(train_state, (X, Y))
        new = tree.paths(train_state)
        expected = new if donate else before
        assert all(torch.equal(taken[path], expected[path]) for path in taken)
        assert not torch.equal(before["params.0.weight"], new["params.0.weight"])


# ---- many networks


@pytest.mark.slow
def test_more_networks_than_the_compiler_takes_for_one_code_object(trace_only):
    """Eight by default, which a sweep over networks would use up."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for activation in (nn.relu, nn.tanh, torch.sin, torch.cos):
            net = nn.Sequential(nn.Linear(3), activation)
            step = train.make_step(plain_loss(net), optim.sgd(0.1))
            eager = train.make_step(plain_loss(net), optim.sgd(0.1), compile=False)
            found, expected = (one(start(optim.sgd(0.1), net), (X, Y))[1] for one in (step, eager))
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_vmap_trains_an_ensemble_in_one_step(fast_compile):
    """Eight networks from eight keys in one compiled step; each row is the network trained alone."""
    optimizer = optim.sgd(0.1, momentum=0.9)
    update = train.pure_step(plain_loss(NET), optimizer)

    def create(key):
        init_key, step_key = random.split(key).unbind()
        params, state = NET.init(init_key, X)
        return train.TrainState.create(params, optimizer, step_key, state=state)

    keys = random.split(random.key(7), 8)
    ensemble = vmap(create)(keys)
    step = train.make_step(update=vmap(update, in_dims=(0, None)))
    history = []
    for _ in range(3):
        ensemble, metrics = step(ensemble, (X, Y))
        history.append(metrics["loss"])
    assert history[0].shape == (8,)
    for row in (0, 5):
        alone = create(keys[row])
        for n in range(3):
            alone, metrics = update(alone, (X, Y))
            torch.testing.assert_close(metrics["loss"], history[n][row], rtol=1e-5, atol=1e-6)
        row_state = tree.map(lambda leaf: leaf[row], ensemble)
        torch.testing.assert_close(tree.paths(alone), tree.paths(row_state), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vmap_over_learning_rates(fast_compile):
    rates = torch.tensor([0.0, 0.01, 0.1])
    update = train.pure_step(plain_loss(LINEAR), optim.sgd(1.0))

    def create(rate):
        return start(optim.sgd(rate), LINEAR)

    step = train.make_step(update=vmap(update, in_dims=(0, None)))
    sweep, _ = step(vmap(create)(rates), (X, Y))
    moved = (sweep.params["weight"] - start(optim.sgd(0.1), LINEAR).params["weight"]).flatten(1).norm(dim=1)
    assert moved[0] == 0
    torch.testing.assert_close(moved[2], 10 * moved[1], rtol=1e-4, atol=0)


# ---- what is not finite changes nothing


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(fast_compile, compile):
    optimizer = optim.adam(0.1)
    step = train.make_step(plain_loss(NORMED), optimizer, compile=compile)
    train_state, _ = step(start(optimizer, NORMED), (X, Y))
    before = tree.paths(train_state.copy())
    bad = X.clone()
    bad[3, 2] = torch.nan
    train_state, metrics = step(train_state, (bad, Y))
    assert torch.isnan(metrics["loss"])
    after = tree.paths(train_state)
    assert {path for path in after if not torch.equal(before[path], after[path])} == {"step"}
    train_state, metrics = step(train_state, (X, Y))
    assert torch.isfinite(metrics["loss"])


def test_an_update_that_is_not_finite_never_reaches_the_state():
    """A gradient at a kink, an update and a second moment that overflow: the loss reads NaN, the state stays finite."""

    def root(params, state, batch, key):
        return (params["w"] - batch).abs().sqrt().sum() + params["v"].sum(), (state, {})

    def steep(params, state, batch, key):
        return 1e20 * params["w"].sum() + params["v"].sum(), (state, {})

    for loss, optimizer in (
        (root, optim.sgd(0.1, momentum=0.9)),
        (root, optim.adam(0.1)),
        (root, optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1))),
        (steep, optim.adam(0.1)),
        (steep, optim.sgd(1e38)),
    ):
        step = train.make_step(loss, optimizer, compile=False)
        train_state = train.TrainState.create({"w": torch.ones(2), "v": torch.ones(2)}, optimizer, random.key(0))
        for _ in range(2):
            train_state, metrics = step(train_state, torch.ones(2))
            assert torch.isnan(metrics["loss"])
        assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(train_state))
        assert torch.equal(train_state.params["w"], torch.ones(2))


# ---- bad input


def bad_steps():
    optimizer = optim.sgd(0.1)
    good = start(optimizer)

    def params(change):
        return good.replace(params=change(good.params))

    x8 = torch.zeros(16, 8)
    missing = lambda p: {**p, "4": {"weight": p["4"]["weight"]}}
    extra = lambda p: {**p, "9": {"weight": torch.zeros(1)}}
    misshaped = lambda p: tree.at(p, "0.bias").set(torch.zeros(9))
    return {
        "wrong input": (good, (x8, Y), r"layer '0' Linear\(8\): .*'weight' has shape \(8, 6\).*\(8, 8\)"),
        "missing leaf": (params(missing), (X, Y), r"layer '4' Linear\(3\): params has no leaf 'bias'"),
        "extra leaf": (params(extra), (X, Y), "params has an unexpected entry '9'"),
        "misshaped leaf": (params(misshaped), (X, Y), r"layer '0' .*leaf 'bias' has shape \(9,\)"),
        "empty batch": (good, (X[:0], Y[:0]), r"batch: leaf '0' has no examples, shape \(0, 6\)"),
        "labels of another shape": (good, (X, Y[:5]), r"labels"),
        "number in the batch": (good, (X, 3), r"batch: leaf '1' is int, expected a tensor"),
        "array in the batch": (good, (X, Y.numpy()), r"batch: leaf '1' is ndarray, expected a tensor"),
    }


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("case", bad_steps())
def test_bad_input_is_reported_by_the_line_that_knows(fast_compile, case, compile):
    train_state, batch, message = bad_steps()[case]
    kept = train_state.copy()
    with pytest.raises((ValueError, TypeError), match=message):
        train.make_step(loss_fn, optim.sgd(0.1), compile=compile)(train_state, batch)
    assert tree.allclose(train_state, kept, rtol=0, atol=0)  # before, not after, damage


@pytest.mark.parametrize("compile", [False, True])
def test_labels_out_of_range_never_train(fast_compile, compile):
    optimizer = optim.sgd(0.1)
    step = train.make_step(plain_loss(LINEAR), optimizer, compile=compile)
    train_state = start(optimizer, LINEAR)
    kept = train_state.params["weight"].clone()
    wrong = Y.clone()
    wrong[2] = 3
    if not compile:
        with pytest.raises(ValueError, match="labels"):
            step(train_state, (X, wrong))
        return
    train_state, metrics = step(train_state, (X, wrong))
    assert torch.isnan(metrics["loss"])
    assert torch.equal(train_state.params["weight"], kept)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss, state: loss, r"must return \(loss, \(state, metrics\)\)"),
        (lambda loss, state: (loss, state), r"must return \(loss, \(state, metrics\)\)"),
        (lambda loss, state: (loss.expand(3), (state, {})), "0-d floating tensor"),
        (lambda loss, state: (loss, (state, {"rows": loss.expand(3)})), "metric 'rows' must be a 0-d tensor"),
        (lambda loss, state: (loss, (state, {"loss": loss})), 'must not contain "loss"'),
        (lambda loss, state: (loss, ({}, {})), "the state after the step: missing"),
        (
            lambda loss, state: (loss, (tree.map(torch.Tensor.double, state), {})),
            r"leaf 'state\.1\.running_mean' has dtype",
        ),
    ],
)
def test_a_loss_function_that_breaks_the_contract(fast_compile, returned, message):
    def broken(params, state, batch, key):
        loss, (state, _) = loss_fn(params, state, batch, key)
        return returned(loss, state)

    for compile in (False, True):
        with pytest.raises((ValueError, TypeError), match=message):
            train.make_step(broken, optim.sgd(0.1), compile=compile)(start(optim.sgd(0.1)), (X, Y))


def test_a_loss_that_reads_values_cannot_compile_and_says_so(trace_only):
    def reading(params, state, batch, key):
        loss, aux = loss_fn(params, state, batch, key)
        return (loss if loss > 0 else -loss), aux

    with pytest.raises(ValueError, match="reads the value of a tensor"):
        train.make_step(reading, optim.sgd(0.1))(start(optim.sgd(0.1)), (X, Y))


def test_make_step_and_create_say_what_they_need():
    with pytest.raises(TypeError, match="needs loss_fn and optimizer, or update="):
        train.make_step(loss_fn)
    module = torch.optim.SGD([torch.ones(1)], 0.1)
    with pytest.raises(TypeError, match=r"torch\.optim\.sgd\.SGD; expected one of fnn\.optim"):
        train.make_step(loss_fn, module)
    with pytest.raises(TypeError, match=r"torch\.optim\.sgd\.SGD; expected one of fnn\.optim"):
        train.TrainState.create({"w": torch.ones(1)}, module, random.key(0))
    with pytest.raises(TypeError, match="not both"):
        train.make_step(loss_fn, optim.sgd(0.1), update=lambda s, b: (s, {}))
    with pytest.raises(TypeError, match="expected a TrainState, got dict"):
        train.make_step(loss_fn, optim.sgd(0.1))({}, (X, Y))
    with pytest.raises(TypeError, match=r"leaf 'params\.w' is float"):
        train.TrainState.create({"w": 1.0}, optim.sgd(0.1), random.key(0))
    with pytest.raises(TypeError, match="key"):
        train.TrainState.create({"w": torch.ones(1)}, optim.sgd(0.1), 0)
    with pytest.raises(TypeError, match="no field 'parameters'"):
        start(optim.sgd(0.1)).replace(parameters={})


@pytest.mark.slow
def test_without_a_compiler_the_step_warns_once_and_runs_eagerly(tmp_path):
    program = """
        import warnings, torch
        from fnn import losses, nn, optim, random, train
        net, optimizer = nn.Linear(1), optim.sgd(0.1)
        params, _ = net.init(random.key(0), torch.zeros(1, 3))
        def loss_fn(params, state, batch, key):
            return losses.mse(net(params, batch), torch.ones(8, 1)), (state, {})
        step = train.make_step(loss_fn, optimizer)
        train_state = train.TrainState.create(params, optimizer, random.key(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                train_state, metrics = step(train_state, torch.ones(8, 3))
        caught = [w for w in caught if "compiler" in str(w.message)]
        print(len(caught), "apt install g++" in str(caught[0].message), step.compiled, int(train_state.step))
    """
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-such-compiler"),
        "PATH": os.path.dirname(sys.executable),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", "True", "False", "3"], done.stderr


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_line_search_sees_the_loss_of_the_batch(compiled, trace_only):
    """L-BFGS with a line search reaches the least-squares solution in a few steps, whatever the scale."""
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 9, 0.2]
    )
    y = x @ torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)

    def loss_fn(params, state, batch, key):
        return losses.mse(batch[0] @ params, batch[1]), (state, {})

    optimizer = optim.lbfgs(line_search="strong_wolfe")
    step = train.make_step(loss_fn, optimizer, compile=compiled)
    train_state = train.TrainState.create(torch.zeros(3, 1, dtype=torch.float64), optimizer, random.key(0))
    for _ in range(12):
        train_state, _ = step(train_state, (x, y))
    expected = torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    torch.testing.assert_close(train_state.params, expected, rtol=1e-6, atol=1e-6)


def test_a_step_may_be_a_transform_of_ones_own(fast_compile):
    """The rehearsal has no data, which `fnn.value_and_grad` would look at."""

    def update(train_state, batch):
        value, grads = fnn.value_and_grad(lambda params: losses.mse(batch @ params["w"], batch.sum(1)))(
            train_state.params
        )
        updates, opt_state = optimizer.update(grads, train_state.opt_state, train_state.params)
        params = optim.apply_updates(train_state.params, updates)
        return train_state.replace(params=params, opt_state=opt_state, step=train_state.step + 1), {"loss": value}

    optimizer = optim.sgd(0.1)
    start = train.TrainState.create({"w": torch.ones(3)}, optimizer, random.key(0))
    batch = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    compiled, _ = train.make_step(update=update, donate=False)(start, batch)
    eager, _ = train.make_step(update=update, donate=False, compile=False)(start, batch)
    assert tree.allclose(compiled.params, eager.params, rtol=1e-6)


def test_a_step_on_a_cpu_keeps_the_layout_of_its_weights(monkeypatch):
    from torch._inductor import config

    seen = []

    def backend(graph, inputs):
        seen.append(config.layout_optimization)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    before, optimizer = config.layout_optimization, optim.sgd(0.1)
    step = train.make_step(lambda params, state, batch, key: ((params["w"] * batch).sum(), (state, {})), optimizer)
    start = train.TrainState.create({"w": torch.ones(3)}, optimizer, random.key(0))
    step(start, torch.ones(3))
    assert seen == [False]
    assert config.layout_optimization is before
