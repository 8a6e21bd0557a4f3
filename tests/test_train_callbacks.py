"""What watches a run: TensorBoard's files read by its own reader, early stopping; and k-fold cross validation."""

import re
import sys

import numpy as np
import pytest
import torch
from sklearn import model_selection
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef

from fnn import data, losses, nn, optim, random, train, tree

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Sequential({"fc": nn.Linear(5), "act": nn.tanh, "head": nn.Linear(2)})
OPTIMIZER = optim.sgd(0.05, momentum=0.9)


def loss_fn(params, state, batch, key):
    x, labels = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {"accuracy": (logits.argmax(-1) == labels).float().mean()})


def fit(callback, loss_fn=loss_fn, train_state=None, compile=False, **options):
    params, state = NET.init(random.key(0), X)
    train_state = train_state or train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)
    step = train.make_step(loss_fn, OPTIMIZER, compile=compile)
    loader = data.Loader((X, Y), 8, key=random.key(2))
    return train.fit(step, train_state, loader, callbacks=[callback], log_every=2, **options)


# TensorBoard


def read(folder):
    reader = EventAccumulator(str(folder))
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
        ["step/loss", "step/accuracy"]
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


# KFold


@pytest.mark.parametrize("key", [None, 0, 1])
@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 3), (7, 7), (23, 2)])
def test_folds_are_disjoint_and_cover_everything(n, k, stratify, key):
    labels = torch.arange(n) % 3 if stratify else None
    folds = train.KFold(torch.arange(n), k, key=None if key is None else random.key(key), stratify=labels)
    pairs = list(folds)
    assert len(pairs) == len(folds) == k
    assert torch.equal(torch.cat([validation for _, validation in pairs]).sort().values, torch.arange(n))
    for fold, (training, validation) in enumerate(pairs):
        assert torch.equal(torch.cat([training, validation]).sort().values, torch.arange(n))
        assert len(validation) in (n // k, -(-n // k))
        assert all(torch.equal(a, b) for a, b in zip(folds[fold], (training, validation), strict=True))
    assert torch.equal(folds[-1][1], pairs[-1][1])


@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 3), (7, 2)])
def test_without_a_key_the_folds_are_scikit_learn_s(n, k):
    expected = model_selection.KFold(k).split(np.zeros(n))
    for ours, theirs in zip(train.KFold(np.arange(n), k), expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("key", [None, 0])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_stratified_folds_hold_of_each_label_what_scikit_learn_s_do(k, key):
    labels = np.repeat([4, 0, -2], [50, 23, 6])[np.random.default_rng(0).permutation(79)]
    folds = train.KFold(labels, k, key=None if key is None else random.key(key), stratify=labels)
    theirs = model_selection.StratifiedKFold(k).split(labels, labels)
    for label in (4, 0, -2):
        ours = [int((validation == label).sum()) for _, validation in folds]
        assert max(ours) - min(ours) <= 1
    ours = sorted(len(validation) for _, validation in folds)
    assert ours == sorted(len(validation) for _, validation in theirs)


def test_folds_are_a_function_of_the_key():
    first, again, other = (list(train.KFold(torch.arange(20), 4, key=random.key(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[1].sort().values, b[1].sort().values) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.cat([validation for _, validation in first]), random.permutation(random.key(0), 20))


def test_the_parts_are_trees_like_the_data_and_a_loader_takes_them():
    tensors = {"x": torch.arange(12.0).reshape(6, 2), "y": np.arange(6)}
    for training, validation in train.KFold(tensors, 3, key=random.key(0)):
        assert isinstance(training["y"], np.ndarray)
        assert torch.equal(validation["x"][:, 0], 2.0 * torch.from_numpy(validation["y"]))
        assert next(iter(data.Loader(training, 4)))["x"].shape == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((torch.arange(6), 1), {}, ValueError, "k is 1, expected a whole number from 2 to 6"),
        ((torch.arange(6), 7), {}, ValueError, "k is 7"),
        ((torch.arange(6), 2.0), {}, ValueError, "k is 2.0"),
        ((6, 2), {}, TypeError, "data is int, expected a tensor or numpy array"),
        (((torch.arange(6), torch.arange(5)), 2), {}, ValueError, "lengths {'0': 6, '1': 5}"),
        (({"x": torch.tensor(1.0)}, 2), {}, TypeError, "leaf 'x' of data is a single number"),
        (((), 2), {}, ValueError, "lengths {}"),
        ((torch.arange(6), 2), {"stratify": torch.zeros(6)}, ValueError, "stratify has shape (6,) and dtype"),
        ((torch.arange(6), 2), {"stratify": torch.arange(5)}, ValueError, "stratify has shape (5,)"),
        ((torch.arange(6), 2), {"stratify": np.array(["a", "b"] * 3)}, TypeError, "return_inverse"),
        ((torch.arange(6), 2), {"key": 0}, TypeError, "key"),
    ],
)
def test_bad_arguments_of_kfold(arguments, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        train.KFold(*arguments, **options)
    with pytest.raises(IndexError, match="no fold 2, expected 0 to 1"):
        train.KFold(torch.arange(6), 2)[2]
