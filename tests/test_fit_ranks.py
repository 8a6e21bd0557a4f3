"""`fit` in several processes: they do the same, whatever only one of them knows."""

import os
import re
import signal
import types

import pytest
import ranks
import torch

from fnn import _ranks, data, distributed, losses, nn, optim, random, train, tree
from fnn._placement import whole
from fnn.train import _callback, _meter, _together

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Sequential(nn.Linear(8), nn.tanh, nn.Linear(2))


def _run(*callbacks, x=X, y=Y, how="together", lr=0.05, seed=0, loader=None, **options):
    """Six steps an epoch; `how` is "together", "fsdp", "placed", or "alone" for the run of one process."""
    mesh = None if how == "alone" else distributed.init(quiet=False)
    net = distributed.fsdp(NET, mesh) if how == "fsdp" else NET
    params, _ = net.init(random.key(seed), X)
    if how == "placed":
        params = distributed.shard(params, mesh, distributed.fully_sharded)

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    optimizer = optim.adam(lr)
    step = train.make_step(loss_fn, optimizer, compile=False, mesh=None if how == "placed" else mesh)
    loader = data.Loader((x, y), 4, key=random.key(2), shard=mesh) if loader is None else loader
    train_state = train.TrainState.create(params, optimizer, random.key(1))
    return train.fit(step, train_state, loader, callbacks=callbacks, **{"epochs": 2, "log_every": 4, **options})


def _said(action):
    """The message of an error, and its notes."""
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        action()
    return type(caught.value).__name__, str(caught.value)


class Stop(train.Callback):
    """Asks the run to stop, or gets a signal, on one rank at some moment after some step."""

    def __init__(self, rank, moment, step, number=None):
        self.rank, self.moment, self.at, self.number = rank, moment, step, number

    def _act(self, moment, run):
        if self.rank == _ranks.rank() and (moment, run.step) == (self.moment, self.at):
            if self.number is None:
                run.stop("enough")
            else:
                os.kill(os.getpid(), self.number)

    def start(self, run):
        self._act("start", run)

    def step(self, run):
        self._act("step", run)

    def log(self, run, metrics):
        self._act("log", run)

    def epoch(self, run, row):
        self._act("epoch", run)


def kill(rank, step, number=signal.SIGTERM):
    return Stop(rank, "step", step, number)


PARTED = [pytest.param(how, marks=pytest.mark.slow) for how in ("fsdp", "placed")]


def _as_one(how):
    def evaluate(train_state):
        return {"norm": whole(train_state.params["0"]["weight"]).norm()}  # which grows

    plateau = train.ReduceOnPlateau("eval_norm", patience=0)
    stopping = train.EarlyStopping("eval_norm", mode="max", patience=9)
    train_state, history = _run(plateau, stopping, how=how, eval=evaluate, epochs=3)
    assert optim.get(train_state.opt_state, "lr") < 0.05
    return tree.paths(tree.map(whole, train_state)), history.rows


@pytest.mark.parametrize("how", ["together", *PARTED])
def test_a_run_of_two_is_that_of_one_and_its_rows_are_the_same_everywhere(how):
    expected, expected_rows = _as_one("alone")
    (first, rows), (second, others) = ranks.run(2, _as_one, how)
    assert rows == others  # clocks and all
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected_rows], rel=1e-6)
    for path, leaf in expected.items():
        torch.testing.assert_close(first[path], leaf, rtol=1e-5, atol=1e-7)
        assert torch.equal(first[path], second[path]), path


def _ended(patience, log_every, *callbacks):
    _callback._PATIENCE, before = patience, _callback._PATIENCE
    try:
        train_state, history = _run(*callbacks, log_every=log_every)
    finally:
        _callback._PATIENCE = before
    return history.stopped, history["step"], int(train_state.step)


@pytest.mark.parametrize(
    ("callbacks", "why", "rows"),
    [
        ([kill(1, 2)], "terminated", [4]),
        ([kill(0, 6), kill(1, 7, signal.SIGINT)], "terminated", [6]),
        ([kill(0, 7, signal.SIGINT), kill(1, 8, signal.SIGINT)], "interrupted", [6, 8]),
        ([kill(1, 12)], "terminated", [6, 12]),
        ([Stop(1, "step", 7)], "enough", [6, 8]),
        ([Stop(0, "log", 8)], "enough", [6, 8]),
        ([Stop(1, "epoch", 6)], "enough", [6]),
    ],
)
def test_what_reaches_one_process_ends_all_after_the_same_step(callbacks, why, rows):
    assert ranks.run(2, _ended, 60.0, 4, *callbacks) == [(why, rows, rows[-1])] * 2


def test_between_readings_that_are_far_apart_signals_are_settled_at_each_step():
    assert ranks.run(2, _ended, 0.0, 100, kill(1, 3)) == [("terminated", [3], 3)] * 2
    stops = Stop(1, "step", 3)
    assert ranks.run(2, _ended, 0.0, 5, stops) == [("enough", [5], 5)] * 2  # the same step each time
    assert ranks.run(2, _ended, 60.0, 100, kill(1, 3)) == [("terminated", [6], 6)] * 2


def _at_start():
    train_state, history = _run(Stop(1, "start", 0))
    return history.stopped, history.rows, int(train_state.step)


def test_a_run_that_is_stopped_before_its_first_step_has_none():
    assert ranks.run(2, _at_start) == [("enough", [], 0)] * 2


class Dies:
    """A loader whose processes die of the signal that this one gets."""

    def __init__(self):
        self.begun = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.begun += 1
        for number in range(6):
            if number == 2 and self.begun == 1 and _ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
            yield X[4 * number : 4 * number + 4], Y[4 * number : 4 * number + 4]


def _dying():
    loader = Dies()
    history = _run(loader=loader)[1]
    return history.stopped, history["step"], loader.begun


def test_a_loader_that_dies_of_the_signal_is_begun_anew_for_the_steps_left():
    assert ranks.run(2, _dying) == [("terminated", [4], 1), ("terminated", [4], 2)]


class Named(train.Callback):
    pass


def _different(what):
    other = _ranks.rank() == 1
    named = [Named()] if other and what == "callbacks" else []
    options = {
        "epochs": {"epochs": 2 + other},
        "lr": {"lr": 0.05 + 0.05 * other},
        "weights": {"seed": int(other)},
        "loader": {"loader": [(X[:4], Y[:4])] * (3 + other)},
    }
    return _said(lambda: _run(*named, **options.get(what, {})))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("epochs", "fit: epochs is 2 on rank 0 and 3 on rank 1; every process has to call fit with the same options"),
        ("lr", r"fit: leaf 'opt_state\..*lr.*' of the state is 0.05\d* on rank 0 and 0.1\d* on rank 1"),
        ("weights", r"leaf 'params.0.weight' of the state is 'float32 \(8, 4\) with checksum"),
        ("loader", r"len\(loader\) is 3 on rank 0 and 4 on rank 1"),
        ("callbacks", r"callbacks is \[\] on rank 0 and \['Named'\] on rank 1"),
    ],
)
def test_other_options_are_an_error_on_every_process(what, message):
    (kind, first), second = ranks.run(2, _different, what)
    assert (kind, first) == second
    assert kind == "ValueError"
    assert re.search(message, first), first


def _apart():
    mesh = distributed.init(quiet=False)
    return _said(lambda: _run(how="alone", loader=data.Loader((X, Y), 4, shard=mesh)))[1]


def test_parted_batches_and_a_step_that_knows_nothing_of_it_are_an_error():
    for message in ranks.run(2, _apart):
        assert "the step would not bring their gradients together; give make_step the mesh" in message


class Stream:
    """Batches without a number."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([(X[:4], Y[:4])] * self.count)


def _streams(uneven):
    loader = Stream(3 + uneven * _ranks.rank())
    if uneven:
        return _said(lambda: _run(loader=loader))[1]
    return _run(loader=loader)[1]["step"]


def test_streams_of_unequal_length_are_an_error_on_every_process():
    assert ranks.run(2, _streams, 0) == [[3, 6]] * 2
    first, second = ranks.run(2, _streams, 1)
    assert "after step 3 the loader of rank 0 has ended, unlike that of another rank" in first
    assert "after step 3 the loader of rank 1 has another batch, unlike that of another rank" in second


def _not_finite(what, how):
    x = X.clone()
    if what == "batch":
        x[random.permutation(random.fold_in(random.key(2), 0), 24)[11], 1] = torch.nan  # in the third batch, last row
    return _said(lambda: _run(x=x, how=how, lr=1e38 if what == "lr" else 0.05))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("batch", "in step 2; the part of its batch that rank 1 has holds values that are not finite, in leaf '0'"),
        ("lr", "11 steps in a row, 1 to 11, were not finite; the loss is nan, and the gradient of 'params.0.weight'"),
    ],
)
@pytest.mark.parametrize("how", ["together", *PARTED])
def test_all_processes_raise_what_one_has_found(what, message, how):
    first, second = ranks.run(2, _not_finite, what, how)
    assert first == second
    assert first[0] == "NonFiniteError"
    assert message in first[1]


def _observed(folder, how):
    folder = folder / str(_ranks.rank())
    folder.mkdir()
    record = train.Record(folder / "config.json", {})
    board = train.TensorBoard(folder / "board", histograms=1, graph=True, images=lambda run: {"x": X.view(1, 1, 24, 4)})
    _, history = _run(train.Progress(), board, record, train.Profile(folder / "profile", start=2, steps=2), how=how)
    history.to_csv(folder / "history.csv")
    history.plot(folder / "history.png")
    record.write("finished")
    train.LRCurve([0.1, 0.2], [1.0, 2.0], 0.1).plot(folder / "rates.png")
    return record.status(), sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["together", "placed"])
def test_rank_0_alone_writes(tmp_path, how):
    names = ["board", "config.json", "history.csv", "history.png", "profile", "rates.png"]
    assert ranks.run(2, _observed, tmp_path, how) == [("finished", names), ("finished", [])]


def _speed(alone):
    """Examples a second by a clock that goes on by one at each look."""
    _meter.time, before = types.SimpleNamespace(perf_counter=iter(range(1000)).__next__), _meter.time
    try:
        loader = data.Loader((X, Y), 4) if alone else None
        return _run(loader=loader, epochs=1)[1]["examples_per_second"][0]
    finally:
        _meter.time = before


def test_speed_counts_the_examples_of_all_processes():
    assert ranks.run(2, _speed, False) == ranks.run(2, _speed, True)  # unsharded, each process has whole batches


def _rates():
    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(NET(params, batch[0]), batch[1]), (state, {})

    mesh = distributed.init(quiet=False)
    optimizer = optim.sgd(1e-3)
    params, _ = NET.init(random.key(0), X)
    step = train.make_step(loss_fn, optimizer, compile=False, mesh=mesh)
    loader = data.Loader((X, Y), 4, shard=mesh)
    return train.find_lr(step, train.TrainState.create(params, optimizer, random.key(1)), loader, steps=30)


def test_all_processes_find_the_same_learning_rate():
    first, second = ranks.run(2, _rates)
    assert (first.lrs, first.losses) == (second.lrs, second.losses)


def _explained():
    errors = [RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), RuntimeError("no such thing")]
    for error in errors:
        _together.explain(error)
        _together.explain(error)
    return [getattr(error, "__notes__", []) for error in errors]


def test_an_error_of_a_collective_operation_says_who_was_waiting():
    for rank, (notes, none) in enumerate(ranks.run(2, _explained)):
        assert len(notes) == 1
        assert f"rank {rank} of 2 was waiting for the other processes for at most {ranks.TIMEOUT:g} s" in notes[0]
        assert none == []
