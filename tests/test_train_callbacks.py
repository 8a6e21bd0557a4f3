"""What watches a run: TensorBoard's files read by its own reader, early stopping, a rate that falls on a plateau."""

import io
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fnn import data, losses, nn, optim, random, train, tree
from fnn.train._rates import learning_rates

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Sequential({"fc": nn.Linear(5), "act": nn.tanh, "head": nn.Linear(2)})
OPTIMIZER = optim.sgd(0.05, momentum=0.9)


def loss_fn(params, state, batch, key):
    x, labels = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {"accuracy": (logits.argmax(-1) == labels).float().mean()})


def fit(callback, loss_fn=loss_fn, train_state=None, compile=False, batch_size=8, **options):
    params, state = NET.init(random.key(0), X)
    train_state = train_state or train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)
    step = train.make_step(loss_fn, OPTIMIZER, compile=compile)
    loader = data.Loader((X, Y), batch_size, key=random.key(2))
    callbacks = callback if isinstance(callback, list) else [callback]
    return train.fit(step, train_state, loader, callbacks=callbacks, log_every=2, **options)


# TensorBoard


def read(folder):
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0})  # 0: all
    reader.Reload()
    return reader


class Losses(train.Callback):
    def __init__(self):
        self.seen = {}

    def log(self, run, metrics):
        self.seen[run.step] = metrics


def test_scalars_are_read_back_by_tensorboard_s_reader(tmp_path):
    _, history = fit(train.TensorBoard(tmp_path), epochs=3, eval=lambda ts: {"loss": 0.5})
    fit(watch := Losses(), epochs=3)
    reader = read(tmp_path)
    assert sorted(reader.Tags()["scalars"]) == sorted(
        ["step/loss", "step/accuracy", "step/lr"]
        + [f"epoch/{name}" for name in ("loss", "accuracy", "eval_loss", "seconds", "examples_per_second")]
    )
    for name in ("loss", "accuracy"):
        found = {event.step: event.value for event in reader.Scalars(f"step/{name}")}
        assert found == pytest.approx({step: metrics[name] for step, metrics in watch.seen.items()}, rel=1e-6)
        found = [(event.step, event.value) for event in reader.Scalars(f"epoch/{name}")]
        assert [step for step, _ in found] == history["step"] == [4, 8, 12]
        assert [value for _, value in found] == pytest.approx(history[name], rel=1e-6)
    assert [event.value for event in reader.Scalars("epoch/eval_loss")] == [0.5] * 3
    assert not reader.Tags()["graph"]


def test_a_run_that_goes_on_replaces_what_came_after_its_state(tmp_path):
    train_state, _ = fit(train.TensorBoard(tmp_path), epochs=1)
    kept = train_state.copy()
    fit(train.TensorBoard(tmp_path), train_state=train_state, epochs=3)  # killed here, say
    fit(train.TensorBoard(tmp_path), train_state=kept, epochs=2)
    assert [event.step for event in read(tmp_path).Scalars("epoch/loss")] == [4, 8]


def test_a_run_from_the_start_replaces_what_was_there(tmp_path):
    fit(train.TensorBoard(tmp_path), epochs=3)
    fit(train.TensorBoard(tmp_path, graph=True), epochs=1)
    reader = read(tmp_path)
    assert [event.step for event in reader.Scalars("epoch/loss")] == [4]
    assert [event.step for event in reader.Scalars("step/loss")] == [1, 2, 4]
    assert reader.Tags()["graph"]


def graph_of(folder):
    reader = read(folder)
    assert reader.Tags()["graph"]
    return reader.Graph()


def shapes(node):
    return [[dim.size for dim in shape.dim] for shape in node.attr["_output_shapes"].list.shape]


def test_the_graph_event_holds_the_step_by_layer(tmp_path):
    fit(train.TensorBoard(tmp_path, graph=True), steps=2)
    graph = graph_of(tmp_path)
    assert isinstance(graph, GraphDef)
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node)
    for node in graph.node:
        assert set(node.input) <= set(nodes), node.name

    leaves = {name.removeprefix("train_state/params/") for name in nodes if name.startswith("train_state/params/")}
    assert leaves == {"fc/weight", "fc/bias", "head/weight", "head/bias"}
    assert {name for name in nodes if name.startswith(("batch/", "metrics/"))} == {
        "batch/0", "batch/1", "metrics/loss", "metrics/accuracy"
    }  # fmt: skip
    assert shapes(nodes["train_state/params/fc/weight"]) == [[5, 4]]
    assert shapes(nodes["Sequential/act/tanh"]) == [[8, 5]]
    assert {name.split("/")[0] for name in nodes} == {
        "train_state", "batch", "Sequential", "loss", "backward", "optimizer", "keep_finite", "step", "new_state",
        "metrics",
    }  # fmt: skip

    def upstream(name):
        found, todo = set(), [name]
        while todo:
            todo += [given for given in nodes[todo.pop()].input if given not in found and not found.add(given)]
        return found

    forward = upstream("metrics/accuracy")
    assert {"batch/0", "batch/1", "Sequential/act/tanh", "train_state/params/head/bias"} <= forward
    assert not any(name.startswith(("backward", "optimizer")) for name in forward)
    update = upstream("new_state/params/fc/weight")
    assert any(name.startswith("backward/") for name in update)
    assert any(name.startswith("optimizer/") for name in update)
    assert "train_state/params/head/weight" in upstream("new_state/params/fc/bias")  # through the backward pass
    used = set().union(*(node.input for node in graph.node))
    assert all(node.op in ("Input", "Output") or name in used for name, node in nodes.items())


def test_layers_within_layers_and_blocks_are_scopes(tmp_path, monkeypatch):
    inner = nn.Sequential(nn.Linear(4), nn.relu)
    block = nn.Block(lambda m, x: m.out(x + m.body(x)), body=inner, out=nn.Linear(2))
    monkeypatch.setitem(globals(), "NET", block)
    fit(train.TensorBoard(tmp_path, graph=True), steps=1)
    scopes = {node.name.rpartition("/")[0] for node in graph_of(tmp_path).node}
    assert {"Block/body/0", "Block/body/1", "Block/out"} <= scopes


def test_histograms_of_the_parameters_come_every_so_many_rows(tmp_path):
    states = {}
    watch = train.Callback()
    watch.epoch = lambda run, row: states.update({run.step: run.train_state.copy()})
    fit([train.TensorBoard(tmp_path, histograms=2), watch], epochs=4)
    reader = read(tmp_path)
    names = ("fc/weight", "fc/bias", "head/weight", "head/bias")
    assert reader.Tags()["histograms"] == [f"params/{name}" for name in names]
    events = reader.Histograms("params/fc/weight")
    assert [event.step for event in events] == [8, 16]
    for event in events:
        weight, found = states[event.step].params["fc"]["weight"].double(), event.histogram_value
        assert (found.num, found.min, found.max) == (20, weight.min(), weight.max())
        assert found.sum == pytest.approx(float(weight.sum()))
        assert sum(found.bucket) == 20


def test_images_are_drawn_at_each_row(tmp_path):
    ramp = torch.linspace(0, 1, 4 * 12).reshape(4, 1, 3, 4)

    def images(run):
        scaled = ramp * 6 - 3
        return {"ramp": ramp, "scaled": scaled, "coloured": (ramp.expand(4, 3, 3, 4) * 255).round().byte()}

    fit(train.TensorBoard(tmp_path, images=images), epochs=2)
    reader = read(tmp_path)
    assert sorted(reader.Tags()["images"]) == ["coloured", "ramp", "scaled"]
    drawn = {}
    for name in ("ramp", "scaled", "coloured"):
        events = reader.Images(name)
        assert [event.step for event in events] == [4, 8]
        drawn[name] = torch.tensor(np.asarray(Image.open(io.BytesIO(events[-1].encoded_image_string)))).long()
    grid = torch.cat(list(ramp), 2)[0] * 255  # four in a row
    for pixels in drawn.values():
        assert (pixels[..., 0] - grid).abs().max() <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4), "have shape (2, 3, 4), expected (n, 1 or 3, h, w)"),
        (torch.zeros(2, 4, 4, 4), "have shape (2, 4, 4, 4)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "are torch.int64, expected uint8 or floating"),
    ],
)
def test_images_that_cannot_be_drawn(tmp_path, images, message):
    with pytest.raises(ValueError, match=re.escape(f"TensorBoard: images 'x' {message}")):
        fit(train.TensorBoard(tmp_path, images=lambda run: {"x": images}), epochs=1)


def hyperparameters(folder):
    """What the HPARAMS tab reads: by tag, the plugin's message."""
    found = {}
    for tag, content in read(folder).summary_metadata.items():
        if content.plugin_data.plugin_name == "hparams":
            found[tag.rpartition("/")[2]] = HParamsPluginData.FromString(content.plugin_data.content)
    return found


def test_hyper_parameters_stand_beside_the_columns_of_the_history(tmp_path):
    config = {"optimizer": {"lr": 0.05, "name": "sgd"}, "layers": (5, 2), "augment": True}
    fit(train.TensorBoard(tmp_path, config=config), epochs=2, eval=lambda ts: {"loss": 0.5})
    (file,) = tmp_path.iterdir()  # no folder of their own
    assert file.is_file()
    found = hyperparameters(tmp_path)
    values = found["session_start_info"].session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in values.items()} == {
        "optimizer.lr": 0.05, "optimizer.name": "sgd", "layers": "(5, 2)", "augment": "True"
    }  # fmt: skip
    metrics = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert metrics == [f"epoch/{name}" for name in ("loss", "accuracy", "eval_loss", "seconds", "examples_per_second")]
    assert set(metrics) <= set(read(tmp_path).Tags()["scalars"])
    assert found["session_end_info"].session_end_info.status


def test_a_resumed_run_keeps_every_kind_of_what_came_before(tmp_path):
    board = {"histograms": 1, "images": lambda run: {"x": torch.rand(1, 1, 2, 2)}, "config": {"lr": 0.05}}
    for epochs in (1, 3):
        checkpoints = train.Checkpointer(tmp_path / "checkpoints")
        fit(train.TensorBoard(tmp_path / "board", **board), epochs=epochs, checkpoints=checkpoints, resume=True)
    reader = read(tmp_path / "board")
    for events in (reader.Scalars("epoch/loss"), reader.Histograms("params/fc/bias"), reader.Images("x")):
        assert [event.step for event in events] == [4, 8, 12]
    assert [event.step for event in reader.Scalars("step/lr")] == [1, 2, 4, 5, 6, 8, 10, 12]
    assert "session_end_info" in hyperparameters(tmp_path / "board")


@pytest.mark.parametrize("histograms", [0, 1.5, True])
def test_bad_arguments_of_tensorboard(tmp_path, histograms):
    with pytest.raises(ValueError, match="TensorBoard: histograms is"):
        train.TensorBoard(tmp_path, histograms=histograms)
    with pytest.raises(TypeError, match=r"TensorBoard: config is list, expected a dict \(dataclasses\.asdict\)"):
        train.TensorBoard(tmp_path, config=[1])


def test_without_a_folder_it_is_torch_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = train.TensorBoard(graph=True)
    fit(board, steps=1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (tmp_path / board.folder) == folder
    assert read(folder).Tags()["graph"]


def test_the_file_is_closed_where_the_run_fails(tmp_path):
    def broken(train_state):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fit(train.TensorBoard(tmp_path), epochs=1, eval=broken)
    assert [event.step for event in read(tmp_path).Scalars("step/loss")] == [1, 2, 4]


def test_without_tensorboard_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "fnn\[log\]"'):
        train.TensorBoard("runs")


# EarlyStopping


def scripted(values, name="loss"):
    """An evaluation that gives these values, one an epoch."""
    values = iter(values)
    return lambda train_state: {name: next(values)}


class States(train.Callback):
    """A copy of the state after each epoch."""

    def __init__(self, then):
        self.states, self.then = [], then

    def start(self, run):
        self.then.start(run)

    def epoch(self, run, row):
        self.states.append(run.train_state.copy())
        self.then.epoch(run, row)

    def end(self, run):
        self.then.end(run)


def equal(a, b):
    return tree.allclose(a.parts, b.parts, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "values", "best", "epochs"),
    [
        ({"patience": 2}, [3, 2, 2.5, 1, 1, 1.5, 0], 4, 6),
        ({"patience": 1}, [3, 2, 2.5, 0], 2, 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.6, 0], 1, 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.4, 2.4, 2.4, 0], 3, 5),
        ({"patience": 2, "mode": "max"}, [0.5, 0.7, 0.6, 0.7, 0.9], 2, 4),
        ({"patience": 2}, [3, float("nan"), float("inf"), 0], 1, 3),
        ({"patience": 2}, [float("nan"), 2, 3, 4, 0], 2, 4),
        ({"patience": 9}, [3, 1, 2, 2], 2, 4),
    ],
)
def test_it_stops_in_time_and_goes_back_to_the_best(options, values, best, epochs):
    stopping = train.EarlyStopping(**options)
    watch = States(stopping)
    train_state, history = fit(watch, epochs=len(values), eval=scripted(values))
    assert len(history.rows) == epochs
    assert (stopping.best_epoch, stopping.best_value) == (best, values[best - 1])
    assert equal(stopping.best, watch.states[best - 1])
    assert equal(train_state, watch.states[best - 1])
    assert int(train_state.step) == 4 * best
    assert not equal(train_state, watch.states[-1])
    patience = options["patience"]
    value = values[best - 1]
    stopped = None if epochs == len(values) else f"no better eval_loss than {value:.4g} for {patience} epochs"
    assert history.stopped == stopped


def test_the_best_outlives_donating_steps_on_what_fit_returned():
    stopping = train.EarlyStopping(patience=1)
    train_state, _ = fit(stopping, epochs=3, eval=scripted([1, 2]))
    kept = stopping.best.copy()
    fit(train.Callback(), train_state=train_state, epochs=4)
    assert equal(stopping.best, kept)


def test_a_number_that_is_never_finite_ends_the_run_as_it_is():
    stopping = train.EarlyStopping(patience=2)
    train_state, history = fit(stopping, epochs=5, eval=scripted([float("nan")] * 5))
    assert history.stopped == "no finite eval_loss for 2 epochs"
    assert stopping.best is None
    assert int(train_state.step) == 8


def test_without_restore_the_last_state_is_returned():
    stopping = train.EarlyStopping("eval_f1", mode="max", patience=1, restore=False)
    watch = States(stopping)
    train_state, _ = fit(watch, epochs=5, eval=scripted([0.5, 0.4], "f1"))
    assert equal(train_state, watch.states[1])
    assert equal(stopping.best, watch.states[0])


def test_a_column_of_training_can_be_watched_and_each_run_starts_anew():
    stopping = train.EarlyStopping("loss", patience=3)
    for _ in range(2):
        _, history = fit(stopping, epochs=2)
        assert history.stopped is None
        assert stopping.best_value == min(history["loss"])


def test_an_epoch_broken_off_is_not_judged():
    class Interrupt(States):
        def log(self, run, metrics):
            if run.step == 6:
                run.stop("interrupted")

    stopping = train.EarlyStopping(patience=1)
    train_state, history = fit(Interrupt(stopping), epochs=5, eval=scripted([1, 2]))
    assert history.stopped == "interrupted"
    assert stopping.best_epoch == 1
    assert int(train_state.step) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"patience": 2.0}, "patience is 2.0"),
        ({"patience": 2, "mode": "least"}, "mode is 'least', expected 'min' or 'max'"),
        ({"patience": 2, "min_delta": -1}, "min_delta is -1"),
    ],
)
def test_bad_arguments_of_early_stopping(options, message):
    with pytest.raises(ValueError, match=f"EarlyStopping: {re.escape(message)}"):
        train.EarlyStopping(**options)


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"no column 'eval_loss' to monitor; its columns are .*'loss'.*fit\(eval="
    ) as e:
        fit(train.EarlyStopping(patience=2), epochs=2)
    assert int(e.value.train_state.step) == 4


# In a run that goes on from a checkpoint


VALUES = [3, 1, 2, 1.5, 0.9, 0.95, 2, 2, 2, 2]


def of_step(values):
    """An evaluation that depends on the step alone, as that of a resumed run must."""
    return lambda train_state: {"loss": values[int(train_state.step) // 4 - 1]}


@pytest.mark.parametrize("patience", [2, 4])
@pytest.mark.parametrize("broken_off_after", [1, 3, 6])
def test_early_stopping_of_a_resumed_run(tmp_path, broken_off_after, patience):
    undisturbed = train.EarlyStopping(patience=patience)
    expected, whole = fit(undisturbed, epochs=10, eval=of_step(VALUES))
    for epochs in (broken_off_after, 10):
        stopping = train.EarlyStopping(patience=patience)
        checkpoints = train.Checkpointer(tmp_path)
        train_state, history = fit(stopping, epochs=epochs, eval=of_step(VALUES), checkpoints=checkpoints, resume=True)
    assert history["step"] == whole["step"]
    assert (
        history.stopped == whole.stopped == f"no better eval_loss than {stopping.best_value:.4g} for {patience} epochs"
    )
    assert (stopping.best_epoch, stopping.best_value) == (undisturbed.best_epoch, undisturbed.best_value)
    assert equal(stopping.best, undisturbed.best)
    assert equal(train_state, expected)


# ReduceOnPlateau


def torch_rates(values, **options):
    """The learning rates of torch's scheduler after each value."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


class Rates(train.Callback):
    def __init__(self):
        self.rates = []

    def epoch(self, run, row):
        self.rates.append(float(optim.get(run.train_state.opt_state, "lr")))


NOISY = [5, 4, 4, 4.5, 4, 3, 3.1, 3.2, 2.9999, 3, 3, float("nan"), 3, 0.5, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 2},
        {"patience": 0, "factor": 0.5},
        {"patience": 1, "cooldown": 2, "factor": 0.5},
        {"patience": 1, "min_lr": 0.01, "factor": 0.3},
        {"patience": 1, "threshold": 0.3, "threshold_mode": "abs"},
        {"patience": 1, "threshold": 0.3},
        {"patience": 2, "mode": "max", "factor": 0.5},
        {"patience": 1, "mode": "max", "threshold": 0.3, "threshold_mode": "abs"},
        {"patience": 0, "factor": 0.1, "eps": 1e-3},
    ],
)
def test_the_rate_falls_as_torch_s_scheduler_lets_it(options):
    watch = Rates()
    fit([train.ReduceOnPlateau(**options), watch], epochs=len(NOISY), eval=scripted(NOISY), batch_size=32)
    assert watch.rates == pytest.approx(torch_rates(NOISY, **options), rel=1e-6)
    assert len(set(watch.rates)) > 1


@pytest.mark.parametrize("broken_off_after", [1, 3, 5])
def test_the_rate_of_a_resumed_run_falls_when_that_of_an_undisturbed_one_does(tmp_path, broken_off_after):
    values, options = [1, 2, 2, 2, 2, 2, 2, 2], {"patience": 1, "cooldown": 1, "factor": 0.5}
    rates = []
    for epochs in (broken_off_after, 8):
        plateau, watch, checkpoints = train.ReduceOnPlateau(**options), Rates(), train.Checkpointer(tmp_path)
        fit([plateau, watch], epochs=epochs, eval=of_step(values), checkpoints=checkpoints, resume=True)
        rates += watch.rates
    assert rates == pytest.approx(torch_rates(values, **options))


@pytest.mark.slow
def test_a_rate_that_falls_does_not_compile_again(fast_compile):
    counters = torch._dynamo.utils.counters
    counters.clear()
    watch = Rates()
    fit([train.ReduceOnPlateau(patience=0, factor=0.5), watch], compile=True, epochs=4, eval=scripted([1, 2, 3, 4]))
    assert watch.rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    assert counters["stats"]["unique_graphs"] == 1


def test_of_several_rates_all_fall(monkeypatch):
    parts = {"body": optim.adam(0.1), "head": optim.sgd(0.4)}
    optimizer = optim.by_label(parts, lambda path, leaf: "head" if path.startswith("head") else "body")
    monkeypatch.setitem(globals(), "OPTIMIZER", optimizer)
    train_state, _ = fit(train.ReduceOnPlateau(patience=0, factor=0.5), epochs=2, eval=scripted([1, 2]))
    assert sorted(learning_rates(train_state.opt_state).values()) == pytest.approx([0.05, 0.2])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optim.sgd(lambda step: 0.1), "'2.lr' follows a schedule"),
        (optim.identity(), "no learning rate 'lr'"),
    ],
)
def test_a_rate_that_cannot_fall(monkeypatch, optimizer, message):
    monkeypatch.setitem(globals(), "OPTIMIZER", optimizer)
    with pytest.raises(ValueError, match=f"ReduceOnPlateau: .*{re.escape(message)}"):
        fit(train.ReduceOnPlateau(), epochs=1)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": -1}, {"patience": 1.0}, {"mode": "least"}, {"factor": 1.0}, {"threshold": -1}, {"cooldown": -1},
        {"threshold_mode": "relative"}, {"min_lr": float("nan")},
    ],
)  # fmt: skip
def test_bad_arguments_of_reduce_on_plateau(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"ReduceOnPlateau: {name} is {options[name]!r}"):
        train.ReduceOnPlateau(**options)


def test_reduce_on_plateau_names_the_columns():
    with pytest.raises(ValueError, match=r"no column 'eval_loss' to monitor; its columns are .*'loss'.*fit\(eval="):
        fit(train.ReduceOnPlateau(), epochs=1)
