"""The learning-rate range test, against torch.optim and a quadratic whose largest stable rate is known."""

import math
import re

import pytest
import torch

from fnn import data, losses, nn, optim, random, train, tree

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Linear(2)


def loss_fn(params, state, batch, key):
    x, labels = batch
    return losses.cross_entropy(NET(params, x), labels), (state, {})


def parts(optimizer=None, **options):
    optimizer = optimizer or optim.sgd(0.3, momentum=0.9)
    params, _ = NET.init(random.key(0), X)
    train_state = train.TrainState.create(params, optimizer, random.key(1))
    return train.make_step(loss_fn, optimizer, **{"compile": False} | options), train_state


def loader():
    return data.Loader((X, Y), 8, key=random.key(2))


def quadratic(curvature, donate=True):
    """f(w) = 1/2 curvature |w|^2, where gradient descent diverges for rates above 2 / curvature."""

    def loss_fn(params, state, batch, key):
        return 0.5 * curvature * (params["w"] ** 2).sum(), (state, {})

    optimizer = optim.sgd(0.1)
    step = train.make_step(loss_fn, optimizer, compile=False, donate=donate)
    return step, train.TrainState.create({"w": torch.ones(3)}, optimizer, random.key(0))


def test_losses_are_those_of_torch_s_sgd_with_these_rates():
    step, train_state = parts()
    curve = train.find_lr(step, train_state, loader(), low=1e-3, high=1.0, steps=30)
    assert curve.lrs == pytest.approx(torch.logspace(-3, 0, 30, dtype=torch.float64).tolist())

    net = torch.nn.Linear(4, 2)
    net.load_state_dict(train_state.params)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    batches = [batch for epoch in range(8) for batch in loader().epoch(epoch)]
    for lr, found, (x, labels) in zip(curve.lrs, curve.losses, batches, strict=False):
        sgd.param_groups[0]["lr"] = lr
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), labels)
        assert found == pytest.approx(float(loss.detach()), rel=1e-4)
        loss.backward()
        sgd.step()


@pytest.mark.parametrize("curvature", [1.0, 100.0])
@pytest.mark.parametrize("donate", [False, True])
def test_it_stops_where_a_quadratic_diverges_and_suggests_a_stable_rate(curvature, donate):
    step, train_state = quadratic(curvature, donate)
    before = train_state.copy()
    curve = train.find_lr(step, train_state, [torch.zeros(1)], low=1e-4 / curvature, high=1e3 / curvature)
    assert 2 / curvature < curve.lrs[-1] < 200 / curvature
    assert len(curve.lrs) == len(curve.losses) < 100
    assert max(curve.losses) < 40 * curve.losses[0]
    # one descent step multiplies w by 1 - lr * curvature; the suggestion must shrink it, and not by next to nothing
    assert 0.01 < curve.suggestion * curvature < 2
    assert tree.allclose(train_state.parts, before.parts, rtol=0, atol=0)


@pytest.mark.parametrize("diverging", [[], [1.0, 1.8, 2.5, 2.8, 2.8, 2.8, 2.3, 1.6, 1.1, 1.1]])
def test_the_suggestion_is_where_a_logistic_curve_is_steepest(diverging):
    """And not where it falls after it has diverged."""
    lrs = [10 ** (-5 + n / 20) for n in range(100)]
    values = [1 + 1 / (1 + math.exp(4 * (math.log10(lr) + 2))) for lr in lrs]
    values[100 - 3 * len(diverging) :] = [value for value in diverging for _ in range(3)]
    falling = iter(values)

    def update(train_state, batch):
        opt_state, step = train_state.opt_state, train_state.step + 1
        return train_state.replace(opt_state=opt_state, step=step), {"loss": torch.tensor(next(falling))}

    step = train.make_step(update=update, compile=False, donate=False)
    curve = train.find_lr(step, parts()[1], loader(), low=lrs[0], high=lrs[-1])
    assert curve.losses == pytest.approx(values)
    assert curve.suggestion == pytest.approx(1e-2, rel=0.15)
    assert max(abs(a - b) for a, b in zip(curve.smoothed[:65], values, strict=False)) < 0.03


def test_a_loss_that_never_falls_has_no_suggestion(tmp_path):
    def update(train_state, batch):
        return train_state.replace(step=train_state.step + 1), {"loss": train_state.step.float() / 100}

    step = train.make_step(update=update, compile=False, donate=False)
    curve = train.find_lr(step, parts()[1], loader(), steps=40)
    assert math.isnan(curve.suggestion)
    curve.plot(tmp_path / "curve.png")


@pytest.mark.slow
def test_one_graph_serves_every_rate(fast_compile):
    counters = torch._dynamo.utils.counters
    counters.clear()
    step, train_state = parts(compile=True)
    train.find_lr(step, train_state, loader(), steps=20)
    train.fit(step, train_state, loader(), steps=2)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_curve_is_drawn(tmp_path):
    step, train_state = parts()
    curve = train.find_lr(step, train_state, loader(), low=1e-4, high=100.0)
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    with pytest.raises(OSError, match=r"LRCurve.plot: cannot write .*nowhere"):
        curve.plot(tmp_path / "nowhere" / "curve.png")


BOTH = optim.by_label({"a": optim.sgd(0.1), "b": optim.sgd(0.2)}, lambda path, leaf: "a" if "bias" in path else "b")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (optim.sgd(lambda step: 0.1), {}, "'2.lr' follows a schedule"),
        (optim.identity(), {}, "no learning rate 'lr'"),
        (BOTH, {}, "several learning rates"),
        (None, {"low": 0.0}, "low is 0.0 and high is 1.0"),
        (None, {"low": 1.0}, "expected 0 < low < high"),
        (None, {"steps": 10}, "steps is 10, expected a whole number of at least 20"),
    ],
)
def test_bad_arguments(optimizer, options, message):
    with pytest.raises(ValueError, match=f"find_lr: .*{re.escape(message)}"):
        train.find_lr(*parts(optimizer), loader(), **options)


def test_batches_that_run_out_or_are_bad():
    with pytest.raises(ValueError, match="an iterator that is used up"):
        train.find_lr(*parts(), iter([(X, Y)]))
    with pytest.raises(ValueError, match=r"not finite in step 0, at the rate 1e-06"):
        train.find_lr(*parts(), [(X * torch.nan, Y)])
