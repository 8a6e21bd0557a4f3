"""Transformations that wrap optimizers: one table times behaviours, and each against Optax, torch or a plain run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch.func import grad, vmap
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fnn import optim, random, train, tree

GOLDEN = np.load(Path(__file__).parent / "golden" / "transforms.npz")
TARGET = torch.from_numpy(GOLDEN["target"])
SGD = optim.sgd(0.1)
BODY_AND_HEAD = {"weight": "body", "*": "head"}


def groups(lr):
    return optim.by_label({"body": optim.adamw(lr, weight_decay=0.1), "head": optim.sgd(lr, 0.9)}, BODY_AND_HEAD)


WRAPPERS = {
    "freeze": lambda lr: optim.freeze(optim.adamw(lr, weight_decay=0.1), "bias"),
    "masked": lambda lr: optim.chain(optim.masked(optim.clip(0.3), "weight"), optim.sgd(lr, 0.9)),
    "by_label": groups,
    "accumulate": lambda lr: optim.accumulate(2, optim.adamw(lr)),
    "apply_if_finite": lambda lr: optim.apply_if_finite(optim.adam(lr), 2),
    "ema": lambda lr: optim.chain(optim.ema(0.8), optim.sgd(lr)),
    "ema_params": lambda lr: optim.ema_params(optim.adam(lr), 0.9),
    "lookahead": lambda lr: optim.lookahead(optim.adam(lr), 2, 0.4),
    "reduce_on_plateau": lambda lr: optim.reduce_on_plateau(optim.adam(lr), factor=0.5, patience=0, threshold=0.9),
    "several": lambda lr: optim.freeze(optim.accumulate(2, optim.ema_params(optim.adamw(lr), 0.9)), "bias"),
}
EVERY = pytest.mark.parametrize("name", WRAPPERS)


def start(dtype=torch.float64):
    return {name: torch.from_numpy(GOLDEN[name].copy()).to(dtype) for name in ("weight", "bias")}


def loss(params, target=TARGET):
    """The function of tests/golden/record_transforms.py."""
    weight, bias = params["weight"], params["bias"]
    error = weight - target.to(weight.dtype)
    return error.square().sum() + 0.1 * (weight.sin().sum(1) * bias).sum() + (bias**4).sum()


def step(opt, params, opt_state):
    grads, value = torch.func.grad_and_value(loss)(params)
    updates, opt_state = opt.update(grads, opt_state, params, value=value)
    return optim.apply_updates(params, updates), opt_state


def run(opt, params, steps, opt_state=None):
    opt_state = opt.init(params) if opt_state is None else opt_state
    for _ in range(steps):
        params, opt_state = step(opt, params, opt_state)
    return params, opt_state


def rates(opt_state, value):
    """Every learning rate of a state set."""
    names = ["body.2.lr", "head.2.lr"] if isinstance(opt_state, dict) else ["lr"]
    return optim.set(opt_state, **dict.fromkeys(names, value))


def flat(params):
    return torch.cat([params["weight"].reshape(-1), params["bias"]])


def layout(opt_state):
    leaves, structure = tree.flatten(opt_state)
    return structure, [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]


def row(x, k):
    return tree.map(lambda leaf: leaf[k], x)


# ---- every one of them


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_layout_are_kept(name, dtype):
    opt, params = WRAPPERS[name](0.05), start(dtype)
    opt_state = opt.init(params)
    before = layout(opt_state)
    for _ in range(3):
        params, opt_state = step(opt, params, opt_state)
        assert layout(opt_state) == before
    assert {leaf.dtype for leaf in tree.leaves(params)} == {dtype}
    assert flat(params).isfinite().all()
    assert all(isinstance(leaf, torch.Tensor) and leaf.isfinite().all() for leaf in tree.leaves(opt_state))


@EVERY
def test_vmap_over_seeds_and_learning_rates_equals_single_runs(name):
    lrs = torch.tensor([0.05, 0.02], dtype=torch.float64)
    seeds = tree.map(lambda leaf: torch.stack([leaf, leaf + 0.3]), start())

    def trained(params, lr):
        opt = WRAPPERS[name](1.0)
        return run(opt, params, 4, rates(opt.init(params), lr))

    together = vmap(trained)(seeds, lrs)
    for k in range(2):
        single = run(WRAPPERS[name](lrs[k].item()), row(seeds, k), 4)
        assert tree.allclose(row(together, k), single, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [n if n in ("lookahead", "several") else pytest.param(n, marks=pytest.mark.slow) for n in WRAPPERS],
)
def test_one_graph_whatever_changes(name, fast_compile):
    opt, params = WRAPPERS[name](0.05), start()
    fast = torch.compile(lambda params, opt_state: step(opt, params, opt_state), fullgraph=True)
    ours = expected = (params, opt.init(params))
    ours = fast(*ours)
    expected = step(opt, *expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lr in (0.03, 0.02, 0.01):
            ours = fast(ours[0], rates(ours[1], lr))
            expected = step(opt, expected[0], rates(expected[1], lr))
    assert tree.allclose(ours, expected, rtol=1e-11, atol=1e-13)
    assert layout(ours[1]) == layout(expected[1])


def donating(name, compile):
    """Three steps that write into their own memory."""
    opt = WRAPPERS[name](0.05)
    make = train.make_step(lambda p, s, batch, key: (loss(p, batch), (s, {})), opt, compile=compile)
    train_state = train.TrainState.create(start(), opt, random.key(0))
    for _ in range(3):
        train_state, _ = make(train_state, TARGET)
    expected = run(opt, start(), 3)
    assert tree.allclose((train_state.params, train_state.opt_state), expected, rtol=1e-11, atol=1e-12)


@EVERY
def test_in_a_donating_step(name):
    donating(name, compile=False)


@pytest.mark.slow
def test_in_a_compiled_donating_step(fast_compile):
    donating("several", compile=True)


@EVERY
def test_no_state_shares_memory_with_the_parameters(name):
    params = start()
    opt = WRAPPERS[name](0.05)
    first = opt.init(params)
    _, second = step(opt, params, first)
    for opt_state in (first, second):
        places = [leaf.data_ptr() for leaf in tree.leaves(opt_state)]
        assert len(set(places)) == len(places)
        assert not set(places) & {leaf.data_ptr() for leaf in params.values()}


@EVERY
def test_foreign_gradients_and_states_are_named(name):
    params = start()
    opt = WRAPPERS[name](0.05)
    opt_state = opt.init(params)
    value = torch.tensor(1.0)

    def whole_step(grads):
        updates, _ = opt.update(grads, opt_state, params, value=value)
        return optim.apply_updates(params, updates)

    with pytest.raises(ValueError, match="grads: missing 'bias'"):
        whole_step({"weight": params["weight"]})
    with pytest.raises(ValueError, match="grads: unexpected 'scale'"):
        whole_step({**params, "scale": params["bias"]})
    with pytest.raises(ValueError, match=r"leaf 'weight' has shape \(1, 2\), expected shape \(3, 2\)"):
        whole_step({"weight": params["weight"][:1], "bias": params["bias"]})
    with pytest.raises(ValueError, match="opt_state: "):
        opt.update(params, 3, params, value=value)


# ---- freeze and masked

ODD = [-0.0, 0.0, torch.nan, torch.inf, -1e-45]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frozen_leaves_stay_bit_for_bit(dtype):
    for optimizer in (optim.adamw(0.1, weight_decay=0.5), optim.sgd(0.1, 0.9, weight_decay=0.5)):
        frozen = torch.tensor(ODD, dtype=dtype)
        params = {"embedding": {"weight": frozen.clone()}, "head": torch.ones(2, dtype=dtype)}
        opt = optim.freeze(optimizer, "embedding.*")
        opt_state = opt.init(params)
        for _ in range(3):
            updates, opt_state = opt.update(tree.map(torch.ones_like, params), opt_state, params)
            params = optim.apply_updates(params, updates)
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[frozen.element_size()]
        assert torch.equal(params["embedding"]["weight"].view(whole), frozen.view(whole))
        assert (params["head"] < 1).all()


def test_the_others_train_as_if_alone():
    params, opt = start(), optim.adamw(0.05, weight_decay=0.3)
    bias = params["bias"]
    alone, alone_state = {"weight": params["weight"]}, opt.init({"weight": params["weight"]})
    for _ in range(10):
        updates, alone_state = opt.update(grad(lambda p: loss({**p, "bias": bias}))(alone), alone_state, alone)
        alone = optim.apply_updates(alone, updates)
    for where in ("bias", lambda path, leaf: leaf.ndim == 1, {"weight": False, "bias": True}):
        frozen, frozen_state = run(optim.freeze(opt, where), params, 10)
        assert frozen["bias"] is bias
        assert torch.equal(frozen["weight"], alone["weight"])
        assert [leaf.shape for leaf in tree.leaves(frozen_state)] == [leaf.shape for leaf in tree.leaves(alone_state)]


def test_freeze_outermost_leaves_no_memory_anywhere():
    params = {"embedding": torch.zeros(1000), "head": torch.zeros(2)}
    for name in ("accumulate", "apply_if_finite", "ema", "ema_params", "lookahead", "reduce_on_plateau"):
        assert tree.size(optim.freeze(WRAPPERS[name](0.1), "embedding").init(params)) < 100


def test_weight_decay_after_freeze_is_an_error_and_not_decay():
    params = start()
    opt = optim.chain(optim.freeze(optim.adam(0.1), "bias"), optim.add_decayed_weights(0.1))
    with pytest.raises(ValueError, match="missing 'bias'"):
        step(opt, params, opt.init(params))


def matmuls(where, layers=3):
    """Matrix products in the compiled training step of a chain of linear layers."""
    counts = []

    def count(graph, inputs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        counts.append(sum(node.target in products for node in graph.graph.nodes))
        return graph.forward

    params = {str(k): torch.ones(4, 4) for k in range(layers)}
    opt = SGD if where is None else optim.freeze(SGD, where)

    def whole(params, opt_state, x):
        def f(p):
            h = x
            for weight in p.values():
                h = torch.tanh(h @ weight)
            return h.sum()

        updates, opt_state = opt.update(grad(f)(params), opt_state, params)
        return optim.apply_updates(params, updates), opt_state

    with torch.no_grad():
        torch.compile(
            whole,
            fullgraph=True,
            backend=lambda graph, inputs: aot_module_simplified(graph, inputs, fw_compiler=count),
        )(params, opt.init(params), torch.ones(3, 4))
    return counts[0]


def test_no_gradient_is_computed_for_frozen_layers():
    # n products forward; backward n for the weights and n - 1 for the layers' inputs
    assert matmuls(None) == 3 + 3 + 2
    assert matmuls(lambda path, leaf: path != "2") == 3 + 1 + 0
    assert matmuls(lambda path, leaf: path != "0") == 3 + 1 + 2


def test_a_clip_inside_freeze_does_not_see_the_frozen():
    params = {"embedding": torch.zeros(1), "head": torch.zeros(2)}
    grads = {"embedding": torch.tensor([1e6]), "head": torch.tensor([3.0, 4.0])}
    inside = optim.freeze(optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(1.0)), "embedding")
    outside = optim.chain(optim.clip_by_global_norm(1.0), optim.freeze(optim.sgd(1.0), "embedding"))
    assert inside.update(grads, inside.init(params))[0]["head"].tolist() == pytest.approx([-0.6, -0.8])
    assert outside.update(grads, outside.init(params))[0]["head"].abs().max() < 1e-5


def test_masked_is_the_transformation_on_its_leaves():
    params = start()
    grads = grad(loss)(params)
    opt = optim.masked(optim.trace(0.9), "weight")
    updates, opt_state = opt.update(grads, opt.init(params))
    updates, opt_state = opt.update(grads, opt_state)
    assert torch.equal(updates["bias"], grads["bias"])
    torch.testing.assert_close(updates["weight"], 1.9 * grads["weight"])
    assert tree.size(opt_state) == 1 + params["weight"].numel()
    masked = optim.chain(optim.masked(optim.add_decayed_weights(0.3), "weight"), optim.sgd(0.1))
    plain = optim.sgd(0.1, weight_decay=0.3, weight_decay_mask="weight")
    assert torch.equal(flat(run(masked, params, 5)[0]), flat(run(plain, params, 5)[0]))


# ---- by_label


def test_groups_equal_torchs_parameter_groups():
    params = {name: leaf.requires_grad_() for name, leaf in start().items()}
    theirs = torch.optim.AdamW(
        [{"params": [params["weight"]], "lr": 0.05, "weight_decay": 0.3}, {"params": [params["bias"]], "lr": 0.01}]
    )
    for _ in range(20):
        theirs.zero_grad()
        loss(params).backward()
        theirs.step()
    optimizers = {"a": optim.adamw(0.05, weight_decay=0.3), "b": optim.adamw(0.01)}
    for labels in ({"w*": "a", "*": "b"}, lambda path, leaf: "ba"[leaf.ndim - 1], {"weight": "a", "bias": "b"}):
        opt = optim.by_label(optimizers, labels)
        ours, opt_state = run(opt, start(), 20)
        torch.testing.assert_close(flat(ours), flat(params).detach(), rtol=0, atol=1e-12)
        assert set(opt_state) == {"a", "b"}
        assert [leaf.shape for leaf in tree.leaves(opt_state["b"]) if leaf.ndim] == [(3,), (3,)]
    nested = {"net": start()}
    tree_of_labels = {"net": {"weight": "a", "bias": "b"}}
    opt_state = optim.by_label(optimizers, tree_of_labels).init(nested)
    assert [leaf.shape for leaf in tree.leaves(opt_state["b"]) if leaf.ndim] == [(3,), (3,)]


def test_get_and_set_reach_each_group():
    opt_state = groups(0.1).init(start())
    opt_state = optim.set(opt_state, **{"head.2.lr": 0.3})
    assert optim.get(opt_state, "head.2.lr").item() == pytest.approx(0.3)
    assert optim.get(opt_state, "body.2.lr").item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"'lr' is ambiguous.*'body\.2\.lr', 'head\.2\.lr'"):
        optim.get(opt_state, "lr")
    frozen = optim.by_label({"a": optim.freeze(optim.sgd(0.1), "bias.0"), "b": optim.sgd(0.1)}, {"b*": "a", "*": "b"})
    params = {"weight": torch.ones(1), "bias": [torch.ones(1), torch.ones(1)]}
    updates, _ = frozen.update(params, frozen.init(params))
    assert updates["bias"][0] == ()
    assert optim.apply_updates(params, updates)["bias"][0] is params["bias"][0]


# ---- accumulate, apply_if_finite, ema, lookahead against Optax


def recorded(name, opt, each=lambda k, grads: grads, shown=lambda params, opt_state: flat(params)):
    params = start()
    opt_state = opt.init(params)
    for k, expected in enumerate(torch.from_numpy(GOLDEN[f"transformation/{name}"])):
        updates, opt_state = opt.update(each(k, grad(loss)(params)), opt_state, params)
        params = optim.apply_updates(params, updates)
        torch.testing.assert_close(shown(params, opt_state), expected, rtol=0, atol=1e-11)
    return opt_state


def test_accumulate_equals_optax_with_its_schedule():
    opt = optim.accumulate(4, optim.adam(optim.linear(0.1, 0.0, 20)))
    opt_state = recorded("accumulate", opt, lambda k, grads: tree.map(lambda g: g * (1 + k % 4), grads))
    assert opt_state.step == 15
    assert optim.get(opt_state, "lr").item() == pytest.approx(0.1 * (1 - 14 / 20))


def test_apply_if_finite_equals_optax():
    def spoil(k, grads):
        if k in GOLDEN["bad"]:
            grads["bias"][0] = torch.nan
        return grads

    opt_state = recorded("apply_if_finite", optim.apply_if_finite(optim.adam(0.05), 3), spoil)
    assert opt_state.total == len(GOLDEN["bad"])
    assert opt_state.consecutive == 0


@pytest.mark.parametrize("debias", [True, False])
def test_ema_equals_optax(debias):
    recorded("ema" if debias else "ema_biased", optim.chain(optim.ema(0.8, debias), optim.sgd(0.05)))


def test_lookahead_equals_optax_and_shows_the_slow_parameters():
    def shown(params, opt_state):
        return torch.cat([flat(params), flat(optim.eval_params(opt_state, params))])

    recorded("lookahead", optim.lookahead(optim.adam(0.05), 5, 0.3), shown=shown)


def test_every_recorded_transformation_is_compared():
    found = {key.partition("/")[2] for key in GOLDEN if key.startswith("transformation/")}
    assert found == {"accumulate", "apply_if_finite", "ema", "ema_biased", "lookahead"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accumulated_batches_equal_one_big_batch(dtype):
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(8, 3)
    y = x.sum(1).sin()

    def batch_loss(p, x, y):
        return ((x @ p["w"] - y) ** 2).mean()

    small = big = {"w": torch.tensor([-0.0, 0.3, -0.2], dtype=dtype)}
    opt = optim.adamw(optim.linear(0.1, 0.0, 5))
    wrapped = optim.accumulate(4, opt)
    small_state, big_state = wrapped.init(small), opt.init(big)
    for _ in range(3):
        updates, big_state = opt.update(grad(batch_loss)(big, x, y), big_state, big)
        big = optim.apply_updates(big, updates)
        for k in range(4):
            before = small["w"]
            part = slice(2 * k, 2 * k + 2)
            updates, small_state = wrapped.update(grad(batch_loss)(small, x[part], y[part]), small_state, small)
            small = optim.apply_updates(small, updates)
            if k < 3:
                assert torch.equal(small["w"].view(torch.int16), before.view(torch.int16))
    assert torch.allclose(small["w"], big["w"], rtol=1e-12 if dtype == torch.float64 else 2e-2)


def test_apply_if_finite_lets_a_broken_run_show():
    opt, params = optim.apply_if_finite(optim.sgd(0.1), 2), torch.ones(2)
    opt_state = opt.init(params)
    shown = []
    for bad in (True, True, True, False, True):
        updates, opt_state = opt.update(torch.tensor([1.0, torch.inf if bad else 1.0]), opt_state)
        shown.append((bool(updates.isfinite().all()), int(opt_state.consecutive), bool(opt_state.last_finite)))
    assert shown == [(True, 1, False), (True, 2, False), (False, 3, False), (True, 0, True), (True, 1, False)]


# ---- averages of the parameters


def test_ema_params_is_the_average_and_leaves_training_alone():
    opt = optim.ema_params(optim.adam(0.05), 0.9)
    params, plain = start(), start()
    opt_state, plain_state = opt.init(params), optim.adam(0.05).init(plain)
    mean = flat(params)
    for _ in range(10):
        params, opt_state = step(opt, params, opt_state)
        plain, plain_state = step(optim.adam(0.05), plain, plain_state)
        mean = 0.9 * mean + 0.1 * flat(plain)
    assert torch.equal(flat(params), flat(plain))
    torch.testing.assert_close(flat(optim.eval_params(opt_state, params)), mean, rtol=1e-13, atol=1e-14)


def test_ema_params_follows_a_schedule_and_counts_steps_within_accumulate():
    opt = optim.accumulate(2, optim.ema_params(optim.sgd(0.5), lambda k: torch.clamp((1 + k) / (10 + k), max=0.15)))
    params = torch.tensor([1.0], dtype=torch.float64)
    opt_state, mean = opt.init(params), 1.0
    for k in range(6):
        updates, opt_state = opt.update(params, opt_state, params)
        params = optim.apply_updates(params, updates)
        if k % 2:
            decay = min((1 + k // 2) / (10 + k // 2), 0.15)
            mean = decay * mean + (1 - decay) * params.item()
    assert params.item() == pytest.approx(1 / 8)
    assert optim.eval_params(opt_state, params).item() == pytest.approx(mean, rel=1e-12)


def test_eval_params_keep_dtypes_frozen_leaves_and_their_own_memory():
    params = start(torch.bfloat16)
    for wrapped in (
        optim.freeze(optim.ema_params(optim.sgd(0.1), 0.5), "bias"),
        optim.ema_params(optim.freeze(optim.sgd(0.1), "bias"), 0.5),
        optim.by_label({"a": optim.ema_params(optim.sgd(0.1), 0.5), "b": optim.sgd(0.1)}, {"w*": "a", "*": "b"}),
    ):
        stepped, opt_state = step(wrapped, params, wrapped.init(params))
        shown = optim.eval_params(opt_state, stepped)
        tree.check_like(params, shown, "shown")
        assert torch.equal(shown["bias"], stepped["bias"])
        between = (params["weight"].float() + stepped["weight"].float()) / 2
        torch.testing.assert_close(shown["weight"].float(), between, rtol=1e-2, atol=1e-3)
        places = {leaf.data_ptr() for leaf in (*tree.leaves(stepped), *tree.leaves(opt_state))}
        assert not places & {leaf.data_ptr() for leaf in shown.values()}


def test_half_precision_averages_do_not_stand_still():
    params = torch.ones(1, dtype=torch.bfloat16)
    opt = optim.ema_params(optim.sgd(0.0), 0.999)
    opt_state = opt.init(torch.zeros(1, dtype=torch.bfloat16))
    for _ in range(1000):
        _, opt_state = opt.update(torch.zeros_like(params), opt_state, params)
    assert opt_state.ema.item() == pytest.approx(1 - 0.999**1000, rel=1e-3)


# ---- reduce_on_plateau

PLATEAUS = {
    "default": {"patience": 2},
    "max": {"mode": "max", "patience": 1, "factor": 0.5},
    "abs": {"threshold_mode": "abs", "threshold": 0.05, "patience": 1},
    "max_abs": {"mode": "max", "threshold_mode": "abs", "threshold": 0.05, "patience": 0},
    "cooldown": {"patience": 1, "cooldown": 3, "factor": 0.3},
    "min_lr": {"patience": 0, "factor": 0.3, "min_lr": 0.004},
    "eps": {"patience": 0, "factor": 0.5, "eps": 0.01},
}


@pytest.mark.parametrize("name", PLATEAUS)
def test_reduce_on_plateau_equals_torch_step_for_step(name):
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(80, generator=generator, dtype=torch.float64)
    values = 1 / torch.arange(1, 81) + 0.2 * noise
    values[40] = torch.nan
    theirs = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler = ReduceLROnPlateau(theirs, **PLATEAUS[name])
    opt = optim.reduce_on_plateau(optim.sgd(0.1), **PLATEAUS[name])
    params = torch.zeros(1, dtype=torch.float64)
    opt_state = opt.init(params)
    for value in values:
        updates, opt_state = opt.update(torch.ones_like(params), opt_state, value=value)
        assert updates.item() == pytest.approx(-theirs.param_groups[0]["lr"], rel=1e-14)
        theirs.step()
        scheduler.step(value)
        assert optim.get(opt_state, "lr").item() == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-14)
    assert optim.get(opt_state, "lr") < 0.1


def test_reduce_on_plateau_of_means_groups_and_rates_set_by_hand():
    opt = optim.reduce_on_plateau(groups(0.1), patience=0, factor=0.5, accumulation_size=2)
    params = start()
    opt_state = opt.init(params)

    def lrs():
        return [optim.get(opt_state, f"{group}.2.lr").item() for group in ("body", "head")]

    for value, expected in zip((1.0, 3.0, 0.0, 3.9, 1.9, 2.0), (0.1, 0.1, 0.1, 0.1, 0.1, 0.05), strict=True):
        _, opt_state = opt.update(params, opt_state, params, value=value)
        assert lrs() == pytest.approx([expected] * 2)
    opt_state = optim.set(opt_state, **{"head.2.lr": 0.4})
    for value in (2.0, 2.0):
        _, opt_state = opt.update(params, opt_state, params, value=torch.tensor(value))
    assert lrs() == pytest.approx([0.025, 0.2])


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.freeze("bias", SGD), TypeError, "freeze: optimizer is 'bias', expected .* arguments swapped"),
        (lambda: optim.masked(optim.clip, "bias"), TypeError, "masked: transformation is <function clip"),
        (lambda: optim.by_label({"a": optim.sgd}, {"*": "a"}), TypeError, "by_label: the optimizer 'a' is <function"),
        (lambda: optim.by_label({"a.b": SGD}, {"*": "a.b"}), ValueError, "a non-empty string without dots, got 'a.b'"),
        (lambda: optim.by_label({0: SGD}, lambda path, leaf: 0), ValueError, "string without dots, got 0"),
        (lambda: optim.by_label([SGD], {"*": "a"}), TypeError, "optimizers must be a dict of optimizers by label"),
        (lambda: optim.accumulate(0, SGD), ValueError, "accumulate: n must be an int >= 1, got 0"),
        (lambda: optim.accumulate(SGD, 4), ValueError, "accumulate: n must be an int >= 1, got Gradient"),
        (lambda: optim.accumulate(2, optim.sgd), TypeError, "accumulate: optimizer is <function sgd"),
        (lambda: optim.apply_if_finite(SGD, -1), ValueError, "max_consecutive_errors must be an int >= 0, got -1"),
        (lambda: optim.ema(1.0), ValueError, r"decay must be a number in \[0, 1\), got 1.0"),
        (lambda: optim.ema_params(SGD, 2), ValueError, r"decay must be a number in \[0, 1\), got 2"),
        (lambda: optim.ema_params(0.9, 0.9), TypeError, "ema_params: optimizer is 0.9"),
        (lambda: optim.lookahead(SGD, 0), ValueError, "lookahead: sync_period must be an int >= 1, got 0"),
        (lambda: optim.lookahead(SGD, 2, 1.5), ValueError, r"slow_step_size must be a number in \[0, 1\], got 1.5"),
        (lambda: optim.reduce_on_plateau(SGD, "low"), ValueError, "mode must be 'min' or 'max', got 'low'"),
        (lambda: optim.reduce_on_plateau(SGD, factor=1.0), ValueError, r"factor must be a number in \[0, 1\), got 1.0"),
        (lambda: optim.reduce_on_plateau(SGD, patience=-1), ValueError, "patience must be an int >= 0, got -1"),
        (lambda: optim.reduce_on_plateau(SGD, min_lr=-1), ValueError, "min_lr must be a number >= 0 and finite"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (optim.freeze(SGD, "*.kernel"), r"no path matches '\*\.kernel'; paths are 'weight', 'bias'"),
        (optim.freeze(SGD, {"weight": True}), "mask: .*'bias'"),
        (optim.masked(SGD, "weight"), r"masked: the transformation has a learning rate \('2.lr'\).*by_label"),
        (optim.by_label({"a": SGD}, {"weight": "a"}), "no pattern of 'weight' matches the leaf 'bias'"),
        (optim.by_label({"a": SGD}, {"*": "b"}), "the leaf 'weight' has the label 'b', but the optimizers are 'a'"),
        (optim.by_label({"a": SGD, "b": SGD}, {"*": "a", "bias": "b"}), "no leaf has the label 'b'"),
        (optim.by_label({"a": SGD}, {"*": "a", "scale": "a"}), "no path matches 'scale'"),
        (optim.by_label({"a": SGD}, ["a"]), "labels: missing 'weight', 'bias'"),
        (optim.reduce_on_plateau(optim.sgd(optim.constant(0.1))), r"reduce_on_plateau: '2.lr' follows a schedule"),
        (optim.reduce_on_plateau(optim.clip(1.0)), "the optimizer has no learning rate 'lr' to reduce"),
    ],
)
def test_what_does_not_fit_the_parameters_is_named(opt, message):
    with pytest.raises(ValueError, match=message):
        opt.init(start())


def test_what_an_update_needs_is_named():
    params = start()
    for name in ("ema_params", "lookahead"):
        opt = WRAPPERS[name](0.1)
        with pytest.raises(ValueError, match=r"opt\.update\(grads, opt_state, params\)"):
            opt.update(params, opt.init(params))
    opt = optim.reduce_on_plateau(SGD)
    with pytest.raises(ValueError, match=r"reduce_on_plateau needs the value.*value=loss"):
        opt.update(params, opt.init(params), params)
    with pytest.raises(ValueError, match=r"value must be a 0-d tensor, got a tensor of shape \(3,\)"):
        opt.update(params, opt.init(params), params, value=torch.ones(3))
    with pytest.raises(ValueError, match="eval_params: this optimizer averages no parameters"):
        optim.eval_params(SGD.init(params), params)
    averaged = WRAPPERS["ema_params"](0.1).init(params)
    with pytest.raises(ValueError, match=r"average in opt_state: leaf 'bias' has shape \(3,\), expected shape \(2,\)"):
        optim.eval_params(averaged, {**params, "bias": params["bias"][:2]})


def test_accumulate_hands_on_nothing_of_one_batch():
    """A line search of the last batch's loss from the direction of the mean would be silently wrong."""
    params = torch.ones(2)
    f = lambda p: (p**2).sum()
    for inner, missing in (
        (optim.lbfgs(line_search="strong_wolfe"), "value_fn"),
        (optim.reduce_on_plateau(optim.sgd(0.1)), "value"),
    ):
        opt = optim.accumulate(2, inner)
        with pytest.raises(ValueError, match=missing):
            opt.update(params, opt.init(params), params, value=f(params), grad=2 * params, value_fn=f)
    outside = optim.reduce_on_plateau(optim.accumulate(2, optim.sgd(0.1)))
    outside.update(params, outside.init(params), params, value=f(params))
