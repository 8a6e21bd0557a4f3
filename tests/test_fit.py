"""The loop around the step: history, evaluation, position, interrupts, and runs that go wrong."""

import csv
import subprocess
import sys
import textwrap

import pytest
import torch

from fnn import data, losses, nn, optim, random, train, tree

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Sequential(nn.Linear(8), nn.tanh, nn.Dropout(0.1), nn.Linear(2))
OPTIMIZER = optim.adam(0.05)


def loss_fn(params, state, batch, key):
    x, labels, *_ = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {"accuracy": (logits.argmax(-1) == labels).float().mean()})


def metric_fn(params, state, batch):
    x, labels, *_ = batch
    logits = NET(params, x, state=state)
    return {"loss": losses.cross_entropy(logits, labels, reduction="none"), "accuracy": logits.argmax(-1) == labels}


def parts(compile=False):
    params, state = NET.init(random.key(0), X)
    train_state = train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)
    return train.make_step(loss_fn, OPTIMIZER, compile=compile), train_state


def loader(**options):
    return data.Loader((X, Y), 16, key=random.key(2), **options)


def test_fit_learns_and_records():
    step, train_state = parts()
    eval_step = train.make_eval(metric_fn, compile=False)
    everything = data.Loader((X, Y), 16, remainder="pad")
    train_state, history = train.fit(
        step, train_state, loader(), epochs=15, eval=lambda ts: train.evaluate(eval_step, ts, everything)
    )
    assert history["epoch"] == list(range(1, 16))
    assert history["step"] == [3 * n for n in range(1, 16)]
    assert history["eval_accuracy"][-1] > 0.95
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["eval_loss"][-1] < 0.5 * history["eval_loss"][0]
    assert history.stopped is None
    assert int(train_state.step) == 45
    with pytest.raises(KeyError, match="no column 'f1'; its columns are"):
        history["f1"]


def test_history_of_an_epoch_is_the_mean_over_its_steps():
    step, train_state = parts()
    expected = []
    for batch in loader().epoch(0):
        train_state, metrics = step(train_state, batch)
        expected.append(float(metrics["loss"]))
    _, history = train.fit(*parts(), loader(), epochs=1)
    assert history["loss"][0] == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_a_run_goes_on_where_it_was_bit_for_bit():
    whole, _ = train.fit(*parts(), loader(), epochs=4)
    step, train_state = parts()
    train_state, history = train.fit(step, train_state, loader(), steps=5)  # in the middle of the second epoch
    assert history["step"] == [3, 5]
    train_state, history = train.fit(step, train_state, loader(), epochs=4)
    assert history["epoch"] == [2, 3, 4]
    for path, leaf in tree.paths(train_state).items():
        assert torch.equal(leaf, tree.paths(whole)[path]), path
    with pytest.warns(RuntimeWarning, match="at step 12 and the run was to end at step 12"):
        train.fit(step, train_state, loader(), epochs=4)


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_evaluate_is_exact_over_a_ragged_last_batch(fast_compile, remainder):
    _, train_state = parts()
    values = metric_fn(train_state.params, train_state.state, (X, Y))
    expected = {name: float(value.double().mean()) for name, value in values.items()}
    eval_step = train.make_eval(metric_fn)
    if remainder == "pad":
        found = train.evaluate(eval_step, train_state, data.Loader((X, Y), 16, remainder="pad"))
    else:
        found = train.evaluate(eval_step, train_state, [(X[:40], Y[:40]), (X[40:], Y[40:])])
    assert found == pytest.approx(expected, rel=1e-6)


def test_any_iterable_of_batches_will_do():
    dataset = torch.utils.data.TensorDataset(X, Y)
    batches = torch.utils.data.DataLoader(dataset, 25)
    _, history = train.fit(*parts(), batches, epochs=2)
    assert history["step"] == [2, 4]
    _, history = train.fit(*parts(), (batch for batch in batches), epochs=1)
    assert history["step"] == [2]

    class Short(list):
        def __len__(self):
            return 5

    with pytest.raises(ValueError, match="has length 5, but gave 2 batches"):
        train.fit(*parts(), Short([(X, Y)] * 2), epochs=1)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset)

    _, history = train.fit(*parts(), torch.utils.data.DataLoader(Stream(), 25), epochs=2)
    assert history["step"] == [2, 4]
    with pytest.raises(ValueError, match="an iterator that is used up"):
        used_up = iter([(X, Y)])
        train.fit(*parts(), used_up, epochs=2)


def test_callbacks_see_the_run_and_can_stop_it():
    class Stop(train.Callback):
        seen = []

        def start(self, run):
            self.seen.append("start")

        def log(self, run, metrics):
            self.seen.append(("log", run.step, sorted(metrics)))

        def epoch(self, run, row):
            self.seen.append(("epoch", row["epoch"]))
            if row["epoch"] == 2:
                run.stop("enough")

        def end(self, run):
            self.seen.append("end")

    train_state, history = train.fit(*parts(), loader(), epochs=9, callbacks=[Stop()], log_every=2)
    names = ["accuracy", "loss"]
    assert Stop.seen == [
        "start",
        ("log", 1, names),
        ("log", 2, names),
        ("epoch", 1),
        *[("log", 4, names), ("log", 6, names), ("epoch", 2), "end"],
    ]
    assert history.stopped == "enough"
    assert int(train_state.step) == 6


@pytest.mark.parametrize("where", ["leaf", "labels", "loss"])
def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_good_weights(fast_compile, where):
    x, labels = X.clone(), Y.clone()
    if where == "leaf":
        x[7, 1] = torch.inf
    if where == "labels":
        labels[7] = 9
    bad_batch = 7 // 16

    def sometimes(params, state, batch, key):
        loss, aux = loss_fn(params, state, batch, key)
        return torch.where((batch[0] == X[7]).all(1).any(), torch.nan, loss), aux

    chosen = sometimes if where == "loss" else loss_fn
    _, train_state = parts()
    step = train.make_step(chosen, OPTIMIZER)
    message = {
        "leaf": r"in step 0; its batch holds values that are not finite, in leaf '0'",
        "labels": r"step 0; run eagerly, it says: .*9",
        "loss": r"step 0; the loss is nan; try a lower learning rate",
    }[where]
    with pytest.raises(train.NonFiniteError, match=message) as caught:
        train.fit(step, train_state, data.Loader((x, labels), 16), epochs=2, nonfinite_limit=1)
    error = caught.value
    assert error.step == bad_batch
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(error.train_state) if leaf.is_floating_point())


def bad_in(*steps):
    """A step whose loss is not finite at these steps."""

    def update(train_state, batch):
        bad = torch.stack([train_state.step == step for step in steps]).any()

        def sometimes(params, state, batch, key):
            loss, aux = loss_fn(params, state, batch, key)
            return torch.where(bad, torch.inf, loss), aux

        return train.pure_step(sometimes, OPTIMIZER)(train_state, batch)

    return train.make_step(update=update, compile=False)


def test_single_steps_that_are_not_finite_are_skipped_and_counted():
    _, train_state = parts()
    train_state, history = train.fit(
        bad_in(1, 4, 5), train_state, loader(), epochs=3, nonfinite_limit=3, log_every=4, eval=lambda ts: {"one": 1}
    )
    assert [row.get("skipped", 0) for row in history.rows] == [1, 2, 0]
    good, reference = [], parts()[1]
    step, guarded = parts()[0], bad_in(1, 4, 5)
    for number in range(6):
        batch = next(loader().epoch(number // 3, start=number % 3))
        if number in (1, 4, 5):
            reference, metrics = guarded(reference, batch)
            assert not torch.isfinite(metrics["loss"])
        else:
            reference, metrics = step(reference, batch)
            good.append(float(metrics["loss"]))
    assert history["loss"][:2] == pytest.approx([sum(good[:2]) / 2, good[2]], rel=1e-6)


@pytest.mark.parametrize("log_every", [1, 2, 5, 100])
def test_too_many_in_a_row_end_the_run(log_every):
    _, train_state = parts()
    with pytest.raises(train.NonFiniteError, match="3 steps in a row, 4 to 6, were not finite") as caught:
        train.fit(bad_in(1, 4, 5, 6), train_state, loader(), epochs=4, nonfinite_limit=3, log_every=log_every)
    assert caught.value.step == 4


def test_a_run_whose_steps_are_all_bad_is_no_success():
    _, train_state = parts()
    with pytest.raises(train.NonFiniteError, match="3 steps in a row, 0 to 2, were not finite"):
        train.fit(bad_in(0, 1, 2), train_state, loader(), steps=3)


def test_the_first_bad_leaf_is_named():
    def spoilt(params, state, batch, key):
        bias = params["3"]["bias"]
        return loss_fn(params | {"3": params["3"] | {"bias": bias + (bias * 0).sqrt()}}, state, batch, key)

    _, train_state = parts()
    step = train.make_step(spoilt, OPTIMIZER, compile=False)
    message = r"3 steps in a row, 0 to 2.*the loss is finite, the gradient of 'params.3.bias' is not"
    with pytest.raises(train.NonFiniteError, match=message):
        train.fit(step, train_state, loader(), epochs=1, nonfinite_limit=5)


def test_rows_every_so_many_steps():
    seen = []
    _, history = train.fit(
        *parts(), loader(), steps=7, eval_every=2, eval=lambda ts: seen.append(int(ts.step)) or {"seen": len(seen)}
    )
    assert history["step"] == seen == [2, 4, 6, 7]
    assert history["epoch"] == [0.6667, 1.3333, 2.0, 2.3333]
    batches = (batch for batch in loader())
    _, history = train.fit(*parts(), batches, epochs=1, eval_every=2)
    assert history["step"] == [2, 3]


def test_any_error_carries_the_trained_state():
    def broken_eval(train_state):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as caught:
        train.fit(*parts(), loader(), epochs=2, eval=broken_eval)
    assert int(caught.value.train_state.step) == 3
    assert caught.value.history.stopped == "OSError"
    assert "error.train_state" in caught.value.__notes__[0]


def test_history_means_do_not_lose_digits():
    def constant(params, state, batch, key):
        loss, (state, _) = loss_fn(params, state, batch, key)
        one = torch.ones((), dtype=torch.bfloat16)
        return loss, (state, {"one": one, "yes": one > 0, "many": torch.tensor(200, dtype=torch.uint8)})

    _, train_state = parts()
    many = data.Loader((X, Y), 1, remainder="drop")
    step = train.make_step(constant, OPTIMIZER, compile=False)
    _, history = train.fit(step, train_state, [batch for _ in range(8) for batch in many], epochs=1)
    assert [history[name][0] for name in ("one", "yes", "many")] == [1.0, 1.0, 200.0]


def test_the_step_named_is_the_one_in_the_middle_of_the_epoch():
    x = X.clone()
    x[40] = torch.nan
    step, train_state = parts()
    with pytest.raises(train.NonFiniteError, match="step 2;"):
        train.fit(step, train_state, data.Loader((x, Y), 16), epochs=1)


def test_arguments_are_checked():
    for options, message in (
        ({}, "either epochs= or steps="),
        ({"epochs": 1, "steps": 1}, "either epochs= or steps="),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
        ({"epochs": 1, "log_every": 0}, "log_every must be a positive integer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            train.fit(*parts(), loader(), **options)
    with pytest.raises(ValueError, match="the loader has no batches"):
        train.fit(*parts(), [], epochs=1)
    with pytest.raises(ValueError, match="evaluate: the loader has no batches"):
        train.evaluate(train.make_eval(metric_fn, compile=False), parts()[1], [])
    with pytest.raises(ValueError, match="leaves examples out; make it with remainder='pad'"):
        train.evaluate(train.make_eval(metric_fn, compile=False), parts()[1], data.Loader((X, Y), 16))
    with pytest.raises(ValueError, match="'loss' needs one value for each of the 50 examples"):
        mean = train.make_eval(lambda params, state, batch: {"loss": batch[0].mean()}, compile=False)
        train.evaluate(mean, parts()[1], [(X, Y)])


def test_history_writes_csv_and_png(tmp_path):
    _, history = train.fit(*parts(), loader(), epochs=2, eval=lambda ts: {"loss": 0.5})
    history.to_csv(tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history["loss"]
    assert [row["eval_loss"] for row in rows] == ["0.5", "0.5"]
    history.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_progress_prints_a_line_an_epoch_where_there_is_no_terminal(capsys):
    train.fit(*parts(), loader(), epochs=2, callbacks=[train.Progress()])
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("epoch")] == [
        ["epoch", "1", "loss"],
        ["epoch", "2", "loss"],
    ]
    assert "examples/s" in out
    assert "\x1b" not in out


def test_import_is_light():
    """`import fnn` brings in nothing optional."""
    program = """
        import sys, torch
        before = set(sys.modules)
        import fnn
        heavy = ("triton", "torchvision", "tensorboard", "matplotlib", "sklearn", "rich", "tyro", "torch._inductor",
                 "torch.utils.tensorboard", "pandas", "torch.distributed.tensor",
                 "torch.distributed.checkpoint")
        print([name for name in heavy if name in set(sys.modules) - before])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
