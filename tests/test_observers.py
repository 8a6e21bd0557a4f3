"""What a run shows and leaves behind: Progress, History's files, Profile, WandB."""

import csv
import io
import json
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
from rich.console import Console

from fnn import data, losses, nn, optim, random, train

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Linear(2)
OPTIMIZER = optim.sgd(0.05)


def loss_fn(params, state, batch, key):
    x, labels = batch
    return losses.cross_entropy(NET(params, x), labels), (state, {})


def fit(*callbacks, loss_fn=loss_fn, optimizer=OPTIMIZER, compile=False, loader=None, log_every=2, **options):
    params, _ = NET.init(random.key(0), X)
    step = train.make_step(loss_fn, optimizer, compile=compile)
    train_state = train.TrainState.create(params, optimizer, random.key(1))
    loader = loader or data.Loader((X, Y), 8, key=random.key(2))
    return train.fit(step, train_state, loader, callbacks=callbacks, log_every=log_every, **options)


# Progress


@pytest.fixture
def no_compile(monkeypatch):
    """A step that is compiled as far as its observers can tell."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_progress_says_what_is_compiled_and_each_row(capsys, no_compile):
    fit(train.Progress(), compile=True, epochs=2, eval=lambda ts: {"loss": 2e-7})
    compiling, compiled, first, second = lines(capsys)
    assert "compiling the training step" in compiling
    assert "10 parameters" in compiling
    pattern = r"training step: compiled in \d+\.\d s for batches of float32 \(8, 4\), int64 \(8,\)"
    assert re.fullmatch(pattern, compiled)
    pattern = r"epoch   {}  loss \d\.\d{{4}}  eval_loss 2\.000e-07  step {}  \d+\.\d s  [\d,]+ examples/s"
    assert re.fullmatch(pattern.format(1, 4), first)
    assert re.fullmatch(pattern.format(2, 8), second)


def test_progress_of_an_eager_step_does_not_speak_of_compiling(capsys):
    fit(train.Progress(), epochs=1)
    (row,) = lines(capsys)
    assert row.startswith("epoch   1  loss")


def test_progress_of_a_resumed_run(tmp_path, capsys):
    for epochs in (1, 2, 2):
        fit(train.Progress(), epochs=epochs, checkpoints=train.Checkpointer(tmp_path), resume=True)
    _, resumed, row, done = lines(capsys)
    assert resumed == "goes on from step 4 of 8"
    assert row.startswith("epoch   2")
    assert done == "at step 8 already: nothing left to do"


class Stop(train.Callback):
    def log(self, run, metrics):
        if run.step == 2:
            run.stop("[red] is enough")


def test_progress_says_why_a_run_ended_and_prints_brackets_as_they_are(capsys):
    fit(train.Progress(), Stop(), epochs=2)
    assert lines(capsys)[-1] == "stopped after step 2: [red] is enough"


def test_progress_counts_skipped_steps(capsys):
    def sometimes(params, state, batch, key):
        loss, rest = loss_fn(params, state, batch, key)
        return torch.where(batch[0][0, 0] > 0, loss, torch.nan), rest

    bad = int((X[::8, 0] <= 0).sum())
    assert 0 < bad < 4
    fit(train.Progress(), loss_fn=sometimes, epochs=1, loader=data.Loader((X, Y), 8))
    assert lines(capsys)[-1].endswith(f"  {bad} step{'s' * (bad > 1)} skipped (not finite)")


def many(params, state, batch, key):
    loss, (state, _) = loss_fn(params, state, batch, key)
    return loss, (state, {f"metric_{n}": loss for n in range(12)})


def test_progress_speaks_up_in_a_long_epoch_with_the_rate_and_of_many_metrics_shows_the_first(capsys, monkeypatch):
    clock = iter([0, 29, 30, 30, 40, 50, 60])  # the start, the logs, one of which prints, and the row
    monkeypatch.setattr("fnn.train._progress.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    optimizer = optim.sgd(lambda step: 0.5 / (1 + step))
    fit(train.Progress(), loss_fn=many, optimizer=optimizer, epochs=1, log_every=1)
    *within, row = lines(capsys)
    assert [line.split()[:2] for line in within] == [["step", "2/4"]]
    assert "  lr 0.25  " in within[0]
    assert all(len(line) < 300 and "metric_6" in line and "metric_7" not in line for line in (within[0], row))
    assert "(+5 more)" in row


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("compile", [True, False])
def test_in_a_terminal_there_is_a_bar(monkeypatch, no_compile, compile):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(force_terminal=True, width=160, **options))
    loader = data.Loader((X, Y), 8) if compile else iter(list(data.Loader((X, Y), 8)))  # one without a length
    fit(train.Progress(), compile=compile, epochs=1, loader=loader)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert bool(re.search(r"compiling.* \d:\d\d:\d\d", shown)) == compile
    assert "4/4" in shown if compile else "4/?" in shown
    assert re.search(r"epoch 1 .* loss \d\.\d{4}  lr 0\.05 ", shown)


def test_a_row_that_a_resumed_run_owes_comes_before_the_bar(monkeypatch, no_compile, tmp_path):
    class Interrupt(train.Callback):
        def log(self, run, metrics):
            if run.step == 4:
                signal.raise_signal(signal.SIGINT)

    options = {"compile": True, "epochs": 2, "resume": True}
    fit(Interrupt(), checkpoints=train.Checkpointer(tmp_path), **options)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("rich.console.Console", lambda **options: Console(force_terminal=True, width=160, **options))
    _, history = fit(train.Progress(), checkpoints=train.Checkpointer(tmp_path), **options)
    assert history["step"] == [4, 8]


# History


ROWS = [
    {"epoch": n, "step": 4 * n, "loss": 3.0**-n, "eval_loss": abs(n - 3) + 0.5, "seconds": 1.0} for n in range(1, 7)
]


def test_a_history_is_its_rows():
    history = train.History(ROWS)
    assert history.rows == ROWS
    assert history.rows[0] is not ROWS[0]
    assert history["eval_loss"][2] == 0.5
    assert history.stopped is None


def axes_of(rows):
    return train.History(rows)._figure().axes


def test_curves_are_labelled():
    rows = [row | {f"eval_{name}": row["epoch"] for name in ("accuracy", "f1", "other", "kind")} for row in ROWS]
    loss, accuracy, _, other, last = axes_of(rows)
    assert loss.get_title() == "loss (log scale)"
    assert loss.get_yscale() == "log"
    assert loss.get_xlabel() == "epoch"
    labels = [line.get_label() for line in loss.lines]
    assert labels == ["training", "evaluation", "best 0.5 at epoch 3"]
    assert np.array_equal(loss.lines[0].get_xydata(), [[n, 3.0**-n] for n in range(1, 7)])
    assert loss.lines[2].get_xydata().tolist() == [[3, 0.5]]
    assert accuracy.lines[1].get_label() == "best 6 at epoch 6"
    assert accuracy.get_yscale() == "linear"
    assert [line.get_label() for line in other.lines] == ["evaluation"]
    assert last.get_subplotspec().rowspan.start == 1  # four in a row


def test_rows_within_epochs_are_drawn_over_steps_and_a_gap_where_a_number_is_not_finite():
    rows = [{"epoch": n / 4, "step": n, "loss": 1.0, "eval_nan": float("nan")} for n in (1, 2, 3)]
    rows[1]["loss"] = float("inf")
    loss, nan = axes_of(rows)
    assert loss.get_xlabel() == "step"
    assert np.array_equal(loss.lines[0].get_ydata(), [1.0, np.nan, 1.0], equal_nan=True)
    assert nan.texts[0].get_text() == "no finite value"


@pytest.mark.parametrize("write", ["to_csv", "plot"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, write, monkeypatch):
    history, path = train.History(ROWS), tmp_path / "file.png"
    getattr(history, write)(path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=rf"History.{write}: cannot write {path}.*No space left") as error:
        getattr(history, write)(path)
    assert error.value.errno == 28
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file.png"]


def test_csv_holds_every_number_exactly(tmp_path):
    rows = [*ROWS, {"epoch": 7, "step": 28, "loss": 0.1 + 0.2, "skipped": 1}]
    train.History(rows).to_csv(tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open() as file:
        found = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert found == rows


def test_nothing_to_draw(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing to draw in 0 rows"):
        train.History().plot(tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fnn\[examples\]"'):
        train.History(ROWS).plot(tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_rows_without_epoch_or_step_are_named(tmp_path):
    for rows in ([{"loss": 1.0}], [*ROWS, {"loss": 1.0, "epoch": 7}]):
        with pytest.raises(ValueError, match="History.plot: a row has no 'epoch' or no 'step'"):
            train.History(rows).plot(tmp_path / "curves.png")


def test_names_of_any_characters(tmp_path):
    rows = [{"epoch": 1, "step": 4, "$loss$_[a/b]^\N{GREEK SMALL LETTER ALPHA}$": 1.0, "eval_$\\x$": 1.0}]
    history = train.History(rows)
    history.stopped = "no better $_$"
    history.plot(tmp_path / "curves.png")
    history.to_csv(tmp_path / "rows.csv")
    header = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.split(",") == list(rows[0])


# Profile


def named(loss_fn, seen):
    """A loss function that notes each of its calls in the trace."""

    def noted(*arguments):
        seen.append(len(seen))
        with torch.profiler.record_function(f"call_{seen[-1]}"):
            return loss_fn(*arguments)

    return noted


def calls(folder):
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("call_")}


def test_a_window_of_steps_is_recorded(tmp_path):
    fit(train.Profile(tmp_path / "profile", start=2, steps=3), loss_fn=named(loss_fn, []), epochs=2)
    assert calls(tmp_path / "profile") == {"call_2", "call_3", "call_4"}
    text = (tmp_path / "profile" / "operators.txt").read_text()
    assert text.startswith("steps 3 to 5")
    assert "aten::" in text
    assert "Self CPU" in text


def test_a_step_that_compiles_is_not_recorded(tmp_path):
    class Recompile(train.Callback):
        def step(self, run):
            if run.step == 4:
                run.step_fn.compile_seconds += 1.0

    fit(Recompile(), train.Profile(tmp_path, start=2, steps=2), loss_fn=named(loss_fn, []), epochs=2)
    assert calls(tmp_path) == {"call_5", "call_6"}  # call_4 warms up again


@pytest.mark.parametrize(("steps", "recorded"), [(1, 0), (2, 0), (3, 1), (6, 4)])
def test_a_run_that_ends_before_the_window_warns(tmp_path, steps, recorded):
    with pytest.warns(RuntimeWarning, match=f"after step {steps}, with {recorded} of 9 steps recorded.*step 11"):
        fit(train.Profile(tmp_path, start=2, steps=9), loss_fn=named(loss_fn, []), steps=steps)
    assert (tmp_path / "trace.json").exists() == bool(recorded)
    if recorded:
        assert calls(tmp_path) == {f"call_{n}" for n in range(2, steps)}


@pytest.mark.parametrize("options", [{"start": 1}, {"steps": 0}, {"start": 2.0}])
def test_bad_arguments_of_profile(options, tmp_path):
    (name,) = options
    with pytest.raises(ValueError, match=f"Profile: {name} is"):
        train.Profile(tmp_path, **options)


# WandB


class FakeWandB(types.ModuleType):
    """Records what would be sent."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **options):
        run = types.SimpleNamespace(options=options, id=options.get("id") or f"run{len(self.runs)}", finished=False)
        run.sent, run.summary, run.axes = [], {}, {}
        run.define_metric = lambda name, step_metric=None: run.axes.update({name: step_metric})
        run.log = run.sent.append
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module := FakeWandB())
    return module


def test_wandb_gets_metrics_rates_and_rows(wandb):
    board = train.WandB("digits", {"lr": 0.05}, name="first")
    assert not wandb.runs
    _, history = fit(board, Stop(), epochs=2)
    (run,) = wandb.runs
    assert run.options == {"project": "digits", "config": {"lr": 0.05}, "name": "first", "resume": "allow"}
    assert run.axes == {"steps": None, "*": "steps"}
    first, second, row = run.sent
    assert (first["steps"], second["steps"], row["steps"]) == (1, 2, 2)
    assert set(first) == {"step/loss", "step/lr", "steps"}
    assert first["step/lr"] == pytest.approx(0.05)
    assert row["epoch/loss"] == history["loss"][0]
    assert run.summary == {"stopped": "[red] is enough"}
    assert run.finished


def test_wandb_goes_on_under_the_same_id(wandb, tmp_path):
    for epochs in (1, 2):
        fit(train.WandB("digits"), epochs=epochs, checkpoints=train.Checkpointer(tmp_path), resume=True)
    first, second = wandb.runs
    assert "id" not in first.options
    assert second.options["id"] == first.id == "run0"
    assert [sent["steps"] for sent in second.sent] == [5, 6, 8, 8]


def test_without_wandb_what_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train.WandB("digits")


def test_wandb_goes_on_under_an_id_of_one_s_own(wandb, tmp_path):
    for epochs in (1, 2):
        fit(train.WandB("digits", id="mine"), epochs=epochs, checkpoints=train.Checkpointer(tmp_path), resume=True)
    assert [run.id for run in wandb.runs] == ["mine", "mine"]


def test_a_config_of_wandb_that_is_no_dict(wandb):
    with pytest.raises(TypeError, match=r"WandB: config is list, expected a dict \(dataclasses\.asdict\)"):
        train.WandB("digits", config=[1])
