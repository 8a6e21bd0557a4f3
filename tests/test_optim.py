"""fnn.optim: schedules, hyper-parameters, compiled steps, parts and errors; values recorded from Optax.

What every optimizer does is in test_optim_table.py.
"""

import math
import pickle

import pytest
import torch
from optimizer_table import GOLDEN, compiled_step, flat, layout, run, start, step, torch_run
from torch.func import grad, vmap
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fnn import optim, tree


def test_vmap_over_a_mixed_tree_keeps_each_dtype():
    params = {"wide": torch.ones(3, dtype=torch.float64), "narrow": torch.tensor(1.0), "half": torch.ones(2).bfloat16()}
    opt = optim.chain(optim.clip_by_global_norm(0.7), optim.clip(0.5), optim.adamw(0.1, weight_decay=0.1))

    def f(p):
        return sum((leaf.double() ** 2).sum() for leaf in tree.leaves(p))

    def train(lr):
        opt_state = optim.set(opt.init(params), lr=lr)
        return run(opt, params, 3, opt_state, f)[0]

    lrs = torch.tensor([0.1, 0.2], dtype=torch.float64)
    together = vmap(train)(lrs)
    for k in range(2):
        tree.check_like(params, tree.map(lambda leaf, k=k: leaf[k], together), "params")
        assert tree.allclose(tree.map(lambda leaf, k=k: leaf[k], together), train(lrs[k]), rtol=1e-6)


# ---- one graph


def test_schedules_on_every_hyperparameter_are_one_graph():
    opt = optim.chain(
        optim.clip_by_global_norm(optim.linear(5.0, 1.0, 6)),
        optim.adamw(
            optim.warmup_cosine(0.0, 0.1, 3, 8),
            optim.linear(0.9, 0.8, 5),
            optim.constant(0.99),
            optim.linear(1e-3, 1e-6, 5),
            weight_decay=optim.cosine(0.1, 5),
            weight_decay_mask="weight",
        ),
    )
    fast = compiled_step(opt, backend="aot_eager")
    params = start()
    opt_state = opt.init(params)
    expected, expected_state = params, opt_state
    shown = []
    params, opt_state = fast(params, opt_state)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(8):
            shown.append(optim.get(opt_state, "lr").item())
            params, opt_state = fast(params, opt_state)
    expected, expected_state = run(opt, expected, 9, expected_state)
    assert tree.allclose((params, opt_state), (expected, expected_state), rtol=1e-12, atol=1e-14)
    lr = optim.warmup_cosine(0.0, 0.1, 3, 8)
    assert shown == lr(torch.arange(8, dtype=torch.float64)).tolist()
    assert optim.get(opt_state, "b1").item() == pytest.approx(0.8)
    assert optim.get(opt_state, "max_norm").item() == pytest.approx(1.0)


@pytest.mark.slow
def test_compiled_vmap_over_learning_rates():
    opt = optim.adam(1.0, weight_decay=0.1)
    params = start()
    lrs = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)
    states = vmap(lambda lr: optim.set(opt.init(params), lr=lr))(lrs)
    many = tree.map(lambda leaf: leaf.expand(3, *leaf.shape), params)
    one_step = torch.compile(
        vmap(lambda p, s: step(opt, p, s)),
        fullgraph=True,
        backend="aot_eager",
    )
    for _ in range(3):
        many, states = one_step(many, states)
    for k, lr in enumerate(lrs.tolist()):
        single, _ = run(optim.adam(lr, weight_decay=0.1), params, 3)
        assert tree.allclose(tree.map(lambda leaf, k=k: leaf[k], many), single, rtol=1e-12)
    # a number sets every row, a tensor of the old shape each its own
    assert optim.get(optim.set(states, lr=0.5), "lr").tolist() == [0.5] * 3
    assert torch.equal(optim.get(optim.set(states, lr=lrs.flip(0)), "lr"), lrs.flip(0))


def graph_size(opt):
    """Operations in the graph of one update."""
    sizes = []

    def count(graph, inputs):
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    params = start()
    torch.compile(opt.update, fullgraph=True, backend=count)(params, opt.init(params), params)
    return sizes[0]


def test_zeros_and_flags_leave_no_work_and_no_memory():
    plain = optim.sgd(0.1)
    zeros = optim.sgd(0.1, 0.0, weight_decay=0, nesterov=False)
    assert graph_size(plain) == graph_size(zeros) == 3  # negate lr, multiply two leaves
    assert len(tree.leaves(zeros.init(start()))) == 1
    assert graph_size(optim.adamw(0.1, weight_decay=0.0)) < graph_size(optim.adamw(0.1))
    names = [path.rpartition(".")[0] for path in tree.paths(optim.adam(0.1).init(start()))]
    assert not any("weight_decay" in name for name in names)
    # a tensor zero stays settable
    state = optim.sgd(0.1, weight_decay=torch.tensor(0.0)).init(start())
    assert optim.get(optim.set(state, weight_decay=0.3), "weight_decay") == pytest.approx(0.3)


# ---- against Optax

SCHEDULES = {
    "constant": optim.constant(0.3),
    "linear": optim.linear(1.0, 0.1, 20),
    "linear_begin": optim.linear(0.0, 2.0, 15, 7),
    "cosine": optim.cosine(0.5, 30),
    "cosine_alpha": optim.cosine(0.5, 30, 0.1, 2.0),
    "warmup_cosine": optim.warmup_cosine(0.0, 1.0, 10, 40),
    "warmup_cosine_end": optim.warmup_cosine(0.2, 1.0, 7, 33, 0.05, 1.5),
    "warmup_cosine_none": optim.warmup_cosine(0.2, 1.0, 0, 25, 0.5),
}
OPTAX = {
    "sgd": optim.sgd(0.02),
    "sgd_momentum": optim.sgd(0.02, momentum=0.9),
    "sgd_nesterov": optim.sgd(0.02, momentum=0.8, nesterov=True),
    "adam": optim.adam(0.05, b1=0.8, b2=0.95, eps=1e-6),
    "adamw": optim.adamw(0.05, weight_decay=0.1),
    "adamw_mask": optim.adamw(0.05, weight_decay=0.1, weight_decay_mask="weight"),
    "adamw_scheduled": optim.adamw(optim.warmup_cosine(0.0, 0.1, 10, 50), weight_decay=0.1),
    "clipped_sgd": optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1, momentum=0.9)),
    "clipped_values": optim.chain(optim.clip(0.3), optim.sgd(0.05)),
    "lion": optim.lion(0.02, b1=0.8, b2=0.95, weight_decay=0.1),
    "lion_mask": optim.lion(0.02, weight_decay=0.3, weight_decay_mask="weight"),
    "lars": optim.lars(0.5, weight_decay=0.1, trust_coefficient=0.05),
    "lars_options": optim.lars(
        0.02,
        momentum=0.6,
        nesterov=True,
        trust_coefficient=3.0,
        trust_ratio_mask="weight",
        eps=0.01,
        weight_decay=0.1,
        weight_decay_mask="weight",
    ),
    "lamb": optim.lamb(0.02),
    "lamb_decay": optim.lamb(0.02, b1=0.8, b2=0.95, eps=1e-4, weight_decay=0.1, weight_decay_mask="weight"),
    "schedule_free_sgd": optim.schedule_free_sgd(0.05, b1=0.8, weight_decay=0.1),
    "schedule_free_adamw": optim.schedule_free_adamw(0.05, b2=0.95, eps=1e-6, weight_decay=0.1),
    "schedule_free_warmup": optim.schedule_free(
        optim.identity(), optim.warmup_cosine(0.0, 0.1, 10, 50), b1=0.7, weight_lr_power=1.5
    ),
}


def test_every_recorded_case_is_compared():
    recorded = {key for key in GOLDEN if "/" in key}
    averages = {f"averages/{name}" for name in OPTAX if name.startswith("schedule_free")}
    assert recorded == {f"schedule/{n}" for n in SCHEDULES} | {f"optimizer/{n}" for n in OPTAX} | averages


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_optax(name):
    expected = torch.from_numpy(GOLDEN[f"schedule/{name}"])
    schedule = SCHEDULES[name]
    steps = torch.arange(len(expected))
    torch.testing.assert_close(schedule(steps.double()), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(schedule(steps), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vmap(schedule)(steps.double()), expected, rtol=1e-14, atol=1e-15)
    assert schedule(torch.tensor(3, dtype=torch.float64)).shape == ()


@pytest.mark.parametrize("name", OPTAX)
def test_optimizers_equal_optax(name):
    expected = torch.from_numpy(GOLDEN[f"optimizer/{name}"])
    params, opt_state = start(), None
    opt_state = OPTAX[name].init(params)
    for k, row in enumerate(expected):
        params, opt_state = run(OPTAX[name], params, 10, opt_state)
        torch.testing.assert_close(flat(params), row, rtol=0, atol=1e-10)
        if name.startswith("schedule_free"):
            average = torch.from_numpy(GOLDEN[f"averages/{name}"][k])
            torch.testing.assert_close(flat(optim.eval_params(opt_state, params)), average, rtol=0, atol=1e-10)


# ---- hyper-parameters


def test_schedules_equal_torch_with_a_changing_learning_rate():
    def decay(k):
        return 0.1 * (1 - k / 60) + 0.01

    def each(k, optimizer):
        optimizer.param_groups[0]["lr"] = decay(k)

    theirs = torch_run(lambda p: torch.optim.AdamW(p, 1.0), 60, each=each)
    ours, opt_state = run(optim.adamw(decay), start(), 60)  # any function of the step will do
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-10)
    assert optim.get(opt_state, "lr").item() == pytest.approx(decay(59), abs=1e-15)


def test_set_equals_torch_with_a_learning_rate_set_by_hand():
    def each(k, optimizer):
        if k == 20:
            optimizer.param_groups[0].update(lr=0.01, weight_decay=0.3)

    theirs = torch_run(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1), 60, each=each)
    opt = optim.adamw(0.1, weight_decay=0.1)
    params, opt_state = run(opt, start(), 20)
    ours, _ = run(opt, params, 40, optim.set(opt_state, lr=0.01, weight_decay=torch.tensor(0.3, dtype=torch.float64)))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-10)


def test_hyperparameters_have_the_width_of_the_params():
    def dtypes(params):
        state = optim.adamw(0.1).init(params)
        return {optim.get(state, name).dtype for name in ("lr", "b1", "b2", "eps", "weight_decay")}

    assert dtypes(torch.zeros(2)) == dtypes(torch.zeros(2, dtype=torch.bfloat16)) == {torch.float32}
    assert dtypes([torch.zeros(2), torch.zeros(2, dtype=torch.float64)]) == dtypes(start()) == {torch.float64}
    assert optim.get(optim.sgd(0.1).init(torch.zeros(2, device="meta")), "lr").device.type == "meta"
    assert optim.sgd(optim.constant(1.0)).init(start())[2].lr.step.dtype == torch.int64


def test_scheduled_value_before_and_after_steps():
    opt = optim.sgd(lambda step: 1 / (1 + step))
    opt_state = opt.init(torch.zeros(1))
    assert optim.get(opt_state, "lr") == 1
    for expected in (1, 1 / 2, 1 / 3):
        updates, opt_state = opt.update(torch.ones(1), opt_state)
        assert optim.get(opt_state, "lr").item() == -updates.item() == pytest.approx(expected)
    assert isinstance(opt_state[2].lr, optim.Scheduled)
    assert opt_state[2].lr.step == 3


def test_steps_are_counted_beyond_float32():
    opt = optim.sgd(lambda step: step)
    opt_state = opt.init(torch.zeros(1, dtype=torch.float64))
    far = tree.at(opt_state, "2.lr.step").set(torch.tensor(2**24))
    for _ in range(3):
        _, far = opt.update(torch.ones(1, dtype=torch.float64), far)
    assert optim.get(far, "lr") == 2**24 + 2


def test_get_and_set_own_their_memory():
    lr = torch.tensor(0.5)
    state = optim.sgd(lr).init(torch.zeros(2))
    new = torch.tensor(0.25)
    other = optim.set(state, lr=new)
    shown = optim.get(other, "lr")
    lr.zero_(), new.zero_()
    assert optim.get(state, "lr") == 0.5
    assert optim.get(other, "lr") == 0.25
    other[2].lr.value.mul_(2)
    assert shown == 0.25


def test_errors_of_get_and_set_name_what_exists():
    one = optim.adamw(0.1).init(start())
    with pytest.raises(KeyError, match=r"no hyper-parameter 'learning_rate'.*'0.b1'.*'2.lr'"):
        optim.get(one, "learning_rate")
    with pytest.raises(KeyError, match="there is none"):
        optim.set((), lr=0.1)
    two = (one, optim.sgd(0.2).init(start()))
    with pytest.raises(ValueError, match=r"'lr' is ambiguous.*'0\.2\.lr', '1\.2\.lr'"):
        optim.get(two, "lr")
    assert optim.get(two, "1.2.lr") == pytest.approx(0.2)
    assert optim.get(optim.set(two, **{"0.2.lr": 0.7}), "0.2.lr") == pytest.approx(0.7)
    assert optim.get(optim.set(two, **{"0.2.lr": 0.7}), "1.2.lr") == pytest.approx(0.2)
    nested = (two, optim.sgd(0.3).init(start()))  # "1.2.lr" is a path, and the end of "0.1.2.lr"
    assert optim.get(nested, "1.2.lr") == pytest.approx(0.3)
    scheduled = optim.sgd(optim.constant(0.1)).init(start())
    with pytest.raises(ValueError, match=r"'2\.lr' follows a schedule"):
        optim.set(scheduled, lr=0.1)
    with pytest.raises(ValueError, match="lr must be a finite number >= 0, got -1"):
        optim.set(one, lr=-1.0)
    with pytest.raises(
        ValueError, match=r"lr must be a number or a tensor, got a torch.float32 tensor of shape \(2,\)"
    ):
        optim.set(one, lr=torch.ones(2))
    with pytest.raises(TypeError, match="lr must be a number or a tensor, got"):
        optim.set(one, lr=optim.constant(0.1))


def test_params_called_like_hyperparameters_are_told_apart():
    params = {"lr": torch.ones(2), "value": {"lr": torch.ones(1)}, "step": torch.ones(1)}
    state = optim.adam(0.1).init(params)
    assert optim.get(optim.set(state, lr=0.2), "lr") == pytest.approx(0.2)
    assert torch.equal(optim.set(state, lr=0.2)[1].mu["lr"], torch.zeros(2))


def test_states_pickle():
    state = optim.adamw(optim.constant(0.1)).init(start())
    again = pickle.loads(pickle.dumps(state))
    assert layout(again) == layout(state)


# ---- parts


def test_clipping_equals_torch():
    def clipped_by_norm(ps):
        clip_grad_norm_(ps, 0.8)

    theirs = torch_run(lambda p: torch.optim.SGD(p, 0.05, 0.9), 50, before=clipped_by_norm)
    ours, _ = run(optim.chain(optim.clip_by_global_norm(0.8), optim.sgd(0.05, 0.9)), start(), 50)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-5)  # torch divides by norm + 1e-6
    theirs = torch_run(lambda p: torch.optim.Adam(p, 0.05), 50, before=lambda ps: clip_grad_value_(ps, 0.2))
    ours, _ = run(optim.chain(optim.clip(0.2), optim.adam(0.05)), start(), 50)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-10)


def test_clip_by_global_norm_at_its_edges():
    opt = optim.clip_by_global_norm(1.0)

    def clipped(grads):
        return opt.update(grads, opt.init(grads))[0]

    small = {"a": torch.tensor([0.1, -0.3]), "b": ()}
    assert torch.equal(clipped(small)["a"], small["a"])
    assert torch.equal(clipped(torch.zeros(3)), torch.zeros(3))
    assert clipped(torch.tensor([math.inf, 1.0])).isnan().any()
    assert clipped(torch.tensor([math.nan, 1.0])).isnan().all()
    # the norm, 1e5, overflows float16
    assert torch.allclose(clipped(torch.full((100,), 1e4, dtype=torch.float16)), torch.full((100,), 0.1))


def test_global_norm():
    parts = {"a": torch.randn(3, 2, dtype=torch.float64), "b": (torch.randn(4), ())}
    expected = math.sqrt(sum((leaf.double() ** 2).sum().item() for leaf in tree.leaves(parts)))
    assert optim.global_norm(parts).item() == pytest.approx(expected, rel=1e-7)
    assert optim.global_norm(parts).dtype == torch.float64
    assert optim.global_norm({"a": ()}) == 0
    assert torch.equal(grad(optim.global_norm)(torch.zeros(3)), torch.zeros(3))


def test_weight_decay_mask_in_its_three_forms():
    params = start()

    def run3(opt):
        return run(opt, params, 3, f=lambda p: (p["weight"] ** 2).sum() + (p["bias"] ** 4).sum())[0]

    expected = run3(optim.adamw(0.1, weight_decay=0.5, weight_decay_mask=lambda path, leaf: leaf.ndim > 1))
    for mask in ("weight", "w*", {"weight": True, "bias": False}):
        assert tree.allclose(run3(optim.adamw(0.1, weight_decay=0.5, weight_decay_mask=mask)), expected, 0, 0)
    undecayed, everywhere = run3(optim.adam(0.1)), run3(optim.adamw(0.1, weight_decay=0.5))
    assert torch.equal(expected["bias"], undecayed["bias"])
    assert torch.equal(expected["weight"], everywhere["weight"])
    assert not torch.allclose(everywhere["weight"], undecayed["weight"])
    for make in (optim.sgd, optim.adam):
        masked = run3(make(0.1, weight_decay=0.5, weight_decay_mask="weight"))
        assert torch.equal(masked["bias"], run3(make(0.1))["bias"])
        assert torch.equal(masked["weight"], run3(make(0.1, weight_decay=0.5))["weight"])


@pytest.mark.parametrize("make", [lambda **o: optim.adam(1e-3, **o), lambda **o: optim.sgd(1e-4, 0.99, **o)])
def test_moments_wider_than_half_precision_params(make):
    params = start(torch.bfloat16)
    narrow, wide = make(), make(moment_dtype=torch.float32)
    state = wide.init(params)
    before = layout(state)
    moments = [leaf for leaf in tree.leaves(state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {torch.float32}
    assert {leaf.dtype for leaf in tree.leaves(narrow.init(params)) if leaf.ndim} == {torch.bfloat16}
    exact = make().init(start())
    narrow_state = narrow.init(params)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        grads = tree.map(lambda p: torch.randn(p.shape, generator=generator).bfloat16(), params)
        _, state = wide.update(grads, state)
        _, narrow_state = narrow.update(grads, narrow_state)
        _, exact = make().update(tree.map(torch.Tensor.double, grads), exact)
    assert layout(state) == before

    def error(other):
        pairs = zip(tree.leaves(other), tree.leaves(exact), strict=True)
        return max(((a.double() - b).abs() / b.abs()).max().item() for a, b in pairs if b.ndim)

    assert error(state) < 1e-4 < 1e-3 < error(narrow_state)


def test_own_transformations_and_extra_values_in_a_chain():
    seen = []

    def update(grads, opt_state, params=None, *, value, **extra):
        seen.append((value, sorted(extra)))
        return tree.map(torch.sign, grads), opt_state + 1

    own = optim.GradientTransformation(lambda params: torch.tensor(0), update)
    opt = optim.chain(optim.clip(1.0), own, optim.identity(), optim.sgd(0.5))
    updates, state = opt.update(torch.tensor([3.0, -0.2]), opt.init(torch.zeros(2)), value=7, other=8)
    assert updates.tolist() == [-0.5, 0.5]
    assert seen == [(7, ["other"])]
    assert state[1] == 1
    assert optim.chain().init(start()) == ()


def test_updates_are_differentiable():
    """The gradient with respect to a learning rate, through five steps, is the closed form of SGD on p**2."""

    def final(lr):
        return run(optim.sgd(lr), torch.tensor(1.0, dtype=torch.float64), 5, f=lambda p: p**2)[0]

    lr = torch.tensor(0.1, dtype=torch.float64)
    assert grad(final)(lr).item() == pytest.approx(5 * (1 - 0.2) ** 4 * -2, rel=1e-12)


def test_apply_updates_rounds_once():
    params = torch.ones(1, dtype=torch.bfloat16)
    # a little more than half a unit of bfloat16 at 1; rounded to bfloat16 itself it would be exactly half, and lost
    update = torch.full((1,), 2**-8 * (1 + 2**-12), dtype=torch.float32)
    assert optim.apply_updates(params, update).item() == 1 + 2**-7


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.sgd(-0.1), ValueError, "lr must be a finite number >= 0, got -0.1"),
        (lambda: optim.sgd(math.nan), ValueError, "lr must be a finite number >= 0, got nan"),
        (lambda: optim.adam("0.1"), TypeError, "lr must be a float, a 0-d tensor or a schedule, got '0.1'"),
        (lambda: optim.adam(0.1, True), TypeError, "b1 must be a float, .* got True"),
        (lambda: optim.adam(torch.ones(3)), ValueError, r"lr must be .* got a torch.float32 tensor of shape \(3,\)"),
        (lambda: optim.adam(0.1, b1=1.0), ValueError, r"b1 must be a number in \[0, 1\), got 1.0"),
        (lambda: optim.adamw(0.1, b2=-0.1), ValueError, r"b2 must be a number in \[0, 1\), got -0.1"),
        (lambda: optim.adam(0.1, eps=-1e-8), ValueError, "eps must be a finite number >= 0"),
        (lambda: optim.adamw(0.1, weight_decay=-1), ValueError, "weight_decay must be a finite number >= 0, got -1"),
        (lambda: optim.sgd(0.1, -0.9), ValueError, "momentum must be a finite number >= 0, got -0.9"),
        (lambda: optim.sgd(0.1, nesterov=True), ValueError, "nesterov=True needs momentum > 0 and dampening 0, got"),
        (lambda: optim.sgd(0.1, 0.9, nesterov=True, dampening=0.1), ValueError, "dampening=0.1"),
        (lambda: optim.sgd(0.1, 0.9, dampening=2), ValueError, r"dampening must be a number in \[0, 1\], got 2"),
        (lambda: optim.clip(0.0), ValueError, "max_value must be a finite number > 0"),
        (lambda: optim.clip_by_global_norm(0), ValueError, "max_norm must be a finite number > 0, got 0"),
        (lambda: optim.chain(optim.sgd), TypeError, "chain: argument 0 is <function sgd"),
        (lambda: optim.linear(0, 1, 0), ValueError, "linear: transition_steps must be a number of steps >= 1, got 0"),
        (lambda: optim.cosine(1, -5), ValueError, "cosine: decay_steps must be .* >= 1, got -5"),
        (lambda: optim.warmup_cosine(0, 1, 10, 10), ValueError, "warmup_cosine: decay_steps must be .* >= 11, got 10"),
        (lambda: optim.constant(math.inf), ValueError, "constant: value must be a finite number, got inf"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_untrainable_params_are_named():
    for leaf, kind in ((torch.tensor(3), "torch.int64"), (None, "NoneType"), (torch.ones(1) * 1j, "torch.complex64")):
        params = {"0": {"weight": torch.ones(2), "count": leaf}}
        with pytest.raises(TypeError, match=rf"params: leaf '0\.count' is {kind}, expected a real floating tensor"):
            optim.adam(0.1).init(params)


def test_missing_params_and_foreign_states_are_errors():
    params = start()
    opt = optim.adamw(0.1)
    with pytest.raises(ValueError, match=r"weight decay needs the parameters: opt\.update\(grads, opt_state, params\)"):
        opt.update(params, opt.init(params))
    with pytest.raises(ValueError, match=r"opt_state: expected a tuple of 3 states .* got dict"):
        opt.update(params, params)
    with pytest.raises(ValueError, match=r"opt_state: expected a tuple of 3 states .* got tuple of 2"):
        opt.update(params, opt.init(params)[:2], params)
    with pytest.raises(ValueError, match="ScaleByAdamState does not hold the constant 'momentum'"):
        optim.sgd(0.1, 0.9).update(params, optim.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match="ScaleByLearningRateState does not hold the schedule 'lr'"):
        optim.sgd(optim.constant(0.1)).update(params, optim.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="no path matches"):
        optim.adamw(0.1, weight_decay_mask="*.kernel").init(params)
    with pytest.raises(ValueError, match=r"the schedule of lr must return a 0-d tensor .* shape \(2,\)"):
        optim.sgd(lambda step: torch.ones(2)).init(params)
