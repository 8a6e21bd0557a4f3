"""One graph for a whole run: what would compile another is named."""

import contextlib
import warnings

import pytest
import torch

from fnn import losses, nn, optim, random, train
from fnn.train._strict import changed, described

NET, OPTIMIZER = nn.Linear(1), optim.sgd(0.1)


def loss_fn(params, state, batch, key):
    x, y = batch
    return losses.mse(NET(params, x), y), (state, {})


def start(strict):
    params, _ = NET.init(random.key(0), torch.zeros(1, 3))
    step = train.make_step(loss_fn, OPTIMIZER, strict=strict)
    return step, train.TrainState.create(params, OPTIMIZER, random.key(1))


def batch(size=8):
    return torch.linspace(-1, 1, 3 * size).reshape(size, 3), torch.ones(size, 1)


def test_strict_step_names_what_changed_and_compiles_nothing(fast_compile):
    step, train_state = start(strict=True)
    train_state, _ = step(train_state, batch())
    x, y = batch()
    autocast = torch.autocast("cpu", torch.bfloat16)
    table = [
        (
            batch(4),
            None,
            r"batch leaf '0' was float32 \(8, 3\) on cpu, is float32 \(4, 3\) on cpu \(and 1 more changed\)",
        ),
        ((x, y.double()), None, r"batch leaf '1' was float32 \(8, 1\) on cpu, is float64 \(8, 1\) on cpu"),
        ((x, y, y), None, r"batch leaf '2' was absent, is float32"),
        ([x, y], None, r"batch was .*tuple.*, is .*list"),
        ((x.T.contiguous().T, y), None, r"batch\[0\].*stride"),
        ((x.clone().requires_grad_(), y), None, r"batch\[0\].*requires_grad"),
        ((x, y), autocast, r"autocast"),
    ]
    for given, context, message in table:
        with context or contextlib.nullcontext(), pytest.raises(train.RecompileError, match=message):
            step(train_state, given)
    train_state, _ = step(train_state, batch())
    assert step.graphs == 1
    assert int(train_state.step) == 2


def test_second_graph_is_one_warning_that_names_the_cause(fast_compile):
    step, train_state = start(strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train_state, _ = step(train_state, batch())
    assert step.graphs == 1
    x, y = batch()
    columns = x.T.contiguous().T, y
    with pytest.warns(RuntimeWarning, match=r"step: compiled another graph, in .* s: .*batch\[0\].*stride") as caught:
        train_state, _ = step(train_state, columns)
    assert caught[0].filename == __file__
    assert step.graphs == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        step(train_state, columns)


def test_strict_evaluation_names_the_mask(fast_compile):
    _, train_state = start(strict=True)
    eval_step = train.make_eval(lambda params, state, batch: {"y": NET(params, batch[0])}, strict=True)
    eval_step(train_state, batch())
    with pytest.raises(train.RecompileError, match=r"evaluation: .*mask was None, is bool \(8,\)"):
        eval_step(train_state, batch(), torch.ones(8, dtype=torch.bool))
    assert eval_step.graphs == 1


def test_changes_are_said_by_path():
    before = described({"batch": {"x": torch.zeros(2), "y": torch.zeros(3)}, "state": torch.zeros(1)})
    now = described({"batch": {"x": torch.zeros(2)}, "state": torch.zeros(1)})
    assert changed(before, now) == "batch leaf 'y' was float32 (3,) on cpu, is absent"
    assert changed(before, before | {"state": "int64 (1,) on cpu"}) == (
        "state was float32 (1,) on cpu, is int64 (1,) on cpu"
    )


def test_eager_step_takes_any_shape():
    params, _ = NET.init(random.key(0), torch.zeros(1, 3))
    step = train.make_step(loss_fn, OPTIMIZER, compile=False, strict=True)
    train_state = train.TrainState.create(params, OPTIMIZER, random.key(1))
    for size in (8, 4):
        train_state, _ = step(train_state, batch(size))
    assert step.graphs == 0
    assert step.compile_seconds == 0.0
