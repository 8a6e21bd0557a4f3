"""Ctrl-C and SIGTERM during `fit`."""

import os
import signal
import threading

import pytest
import torch

from fnn import losses, nn, optim, random, train

NET = nn.Linear(2)
OPTIMIZER = optim.sgd(0.1)
BATCH = (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)


def loss_fn(params, state, batch, key):
    return losses.cross_entropy(NET(params, batch[0]), batch[1]), (state, {})


def run(*callbacks, steps=6, loader=(BATCH, BATCH), **options):
    params, state = NET.init(random.key(0), BATCH[0])
    train_state = train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    return train.fit(step, train_state, loader, steps=steps, callbacks=callbacks, **options)[1]


class After(train.Callback):
    """Signals to this process after some step."""

    def __init__(self, step, *numbers):
        self.at, self.numbers = step, numbers

    def step(self, run):
        if run.step == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    try:
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "why"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_the_run_ends_after_its_step(number, why):
    history = run(After(3, number))
    assert history.stopped == why
    assert history["step"] == [2, 3]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(first):
    with pytest.raises(KeyboardInterrupt):
        run(After(3, first, signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        run(After(3, first, signal.SIGTERM))
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run(After(3, number)).stopped is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_run_inside_a_run_ends_both():
    inner = []

    class Inner(train.Callback):
        def epoch(self, _, row):
            inner.append(run(After(1, signal.SIGTERM)))

    history = run(Inner())
    assert [history.stopped, inner[0].stopped] == ["terminated"] * 2
    assert history["step"] == [2]


def test_a_loader_that_dies_of_the_same_signal_is_no_error(tmp_path):
    class Dies:
        def __len__(self):
            return 4

        def __iter__(self):
            yield from [BATCH] * 3
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    class Lives(Dies):
        def __iter__(self):
            yield from [BATCH] * 4

    history = run(loader=Dies(), checkpoints=train.Checkpointer(tmp_path))
    assert history.stopped == "terminated"
    assert history["step"] == [3]
    resumed = run(loader=Lives(), checkpoints=train.Checkpointer(tmp_path), resume=True)
    assert resumed["loss"] == run(loader=Lives())["loss"]


def test_a_run_in_a_thread_leaves_signals_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found[0]["step"] == [2, 4, 6]
