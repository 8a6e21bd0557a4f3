"""The step of several processes against that of one."""

import functools

import pytest
import ranks
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fnn import _ranks, data, distributed, losses, models, nn, optim, random, train, tree

STEPS = 4


def _case(name):
    """(net, the examples of all processes)"""
    if name == "mlp":
        x = random.normal(random.key(1), (16, 12))
        return models.mlp((16, 8)), (x, torch.arange(16) % 10)
    if name == "bn":
        x = random.normal(random.key(1), (16, 12))
        # No bias: its gradient is 0 but for rounding, which adam makes steps of.
        net = nn.Sequential(nn.Linear(16, bias=False), nn.BatchNorm(), nn.relu, nn.Linear(10))
        return net, (x, torch.arange(16) % 10)
    tokens = random.randint(random.key(1), (8, 8), 0, 32)
    return models.gpt(vocab_size=32, context=8, layers=2, heads=2, width=8), (tokens, tokens.roll(-1, 1))


def _loss_fn(net):
    def loss_fn(params, state, batch, key):
        x, y = batch
        logits, state = net.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(logits.flatten(0, -2), y.flatten()), (state, {"largest": logits.amax(-1).mean()})

    return loss_fn


def _train(case, mode, compile, count=None, optimizer="adam"):
    """Losses, metrics and the state after some steps: in one process, or in all with `mode`."""
    net, batch = _case(case)
    params, state = net.init(random.key(0), batch[0][:1])
    optimizer = {
        "adam": optim.adam(1e-2),
        "line search": optim.chain(optim.sgd(4.0, 0.5), optim.strong_wolfe()),
        "clipped": optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1, 0.9)),
    }[optimizer]
    options = {}
    if mode is not None:
        mesh = distributed.init(quiet=False)
        place, count = _ranks.data_axis("test", mesh)
        batch = tree.map(lambda x: x.chunk(count)[place], batch)
        if mode in ("explicit", "synchronised"):
            options = {"mesh": mesh, "sync_batch_norm": mode == "synchronised"}
        else:
            params = tree.map(lambda p: distribute_tensor(p, mesh, _placements(p, mode, count)), params)
    if compile:
        torch.compile, before = functools.partial(torch.compile, backend="aot_eager"), torch.compile
    try:
        step = train.make_step(_loss_fn(net), optimizer, compile=compile, **options)
        train_state = train.TrainState.create(params, optimizer, random.key(2), state=state)
        seen = []
        for _ in range(STEPS):
            train_state, metrics = step(train_state, batch)
            seen.append({name: float(value) for name, value in metrics.items()})
    finally:
        if compile:
            torch.compile = before
    full = tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, train_state)
    kinds = {path: type(leaf).__name__ for path, leaf in tree.paths(train_state.opt_state).items()}
    return seen, tree.paths(full), step.graphs, kinds


def _placements(leaf, mode, count):
    axes = [axis for axis in range(leaf.dim()) if leaf.shape[axis] % count == 0]
    return [Shard(axes[0]) if mode == "sharded" and axes else Replicate()]


def _check(case, mode, compile, optimizer="adam", tolerance=1e-6):
    expected, state, _, _ = _train(case, None, False, optimizer=optimizer)
    for seen, found, graphs, kinds in ranks.run(2, _train, case, mode, compile, None, optimizer):
        for here, there in zip(seen, expected, strict=True):
            assert here == pytest.approx(there, rel=tolerance)
        for path, leaf in state.items():
            torch.testing.assert_close(found[path], leaf, rtol=0, atol=1e-5, msg=path)
        assert graphs == (1 if compile else 0)
        assert ("DTensor" in kinds.values()) == (mode in ("replicated", "sharded"))


@pytest.mark.parametrize("case", ["mlp", "gpt"])
@pytest.mark.parametrize("mode", ["explicit", "replicated", "sharded"])
def test_several_processes_train_as_one_does(case, mode):
    _check(case, mode, compile=False)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), [("mlp", "explicit"), ("mlp", "replicated"), ("gpt", "sharded")])
def test_a_compiled_step_of_several_processes_is_one_graph(case, mode):
    _check(case, mode, compile=True)


@pytest.mark.parametrize("mode", ["explicit", "sharded"])
def test_the_optimizer_sees_the_norm_of_the_whole(mode):
    _check("mlp", mode, False, "clipped")


@pytest.mark.parametrize(("mode", "compile"), [("explicit", False), ("explicit", True), ("sharded", False)])
def test_a_line_search_goes_as_far_on_every_process(mode, compile):
    _check("mlp", mode, compile, "line search", tolerance=1e-5)


@pytest.mark.parametrize(("mode", "compile"), [("synchronised", False), ("synchronised", True), ("replicated", False)])
def test_statistics_are_those_of_the_whole_batch(mode, compile):
    _check("bn", mode, compile, tolerance=1e-5)


def _evaluate(mode):
    net, batch = _case("mlp")
    batch = tree.map(lambda x: x[:13], batch)
    params, _ = net.init(random.key(0), batch[0][:1])
    mesh = distributed.init(quiet=False)
    if mode in ("replicated", "sharded"):
        count = _ranks.data_axis("test", mesh)[1]
        params = tree.map(lambda p: distribute_tensor(p, mesh, _placements(p, mode, count)), params)

    def metric_fn(params, state, batch):
        x, y, _ = batch
        logits = net(params, x)
        return {"loss": losses.cross_entropy(logits, y, reduction="none"), "right": logits.argmax(-1) == y}

    eval_step = train.make_eval(metric_fn, compile=False, mesh=mesh if mode == "explicit" else None)
    train_state = train.TrainState.create(params, optim.sgd(0.1), random.key(2))
    loader = data.Loader(batch, 8, remainder="pad", shard=mesh)  # the second part of the last batch is padding
    return train.evaluate(eval_step, train_state, loader)


@pytest.mark.parametrize("mode", ["plain", "explicit", "sharded"])
def test_evaluation_is_over_the_examples_of_all_processes(mode):
    expected = _evaluate("plain")
    for found in ranks.run(2, _evaluate, mode):
        assert found == pytest.approx(expected, rel=1e-6)


def _refusals():
    net, batch = _case("mlp")
    params, _ = net.init(random.key(0), batch[0][:1])
    mesh = distributed.init(quiet=False)
    said = []

    def loss_fn(params, state, batch, key):
        return net(params, batch[0]).square().mean(), (state, {"count": (batch[1] > 2).sum()})

    for where, given in ((mesh, [Replicate()]), (mesh, [Shard(0)])):
        placed = tree.map(lambda p, given=given: distribute_tensor(p, where, given), params)
        step = train.make_step(loss_fn, optim.sgd(0.1), compile=False, mesh=mesh)
        try:
            step(train.TrainState.create(placed, optim.sgd(0.1), random.key(0)), batch)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_what_would_be_wrong_is_refused():
    counted, sharded = ranks.run(2, _refusals)[1]
    assert counted == (
        "loss_fn: metric 'count' is torch.int64; metrics are averaged over the processes, so give a mean, of a "
        "floating dtype"
    )
    assert "wrap the net with distributed.fsdp(net, mesh), or make the step without mesh=" in sharded
    with pytest.raises(ValueError, match="sync_batch_norm needs mesh="):
        train.make_step(lambda *_: None, optim.sgd(0.1), sync_batch_norm=True)
    with pytest.raises(TypeError, match="mesh is int, expected a DeviceMesh; see fnn.distributed.init"):
        train.make_step(lambda *_: None, optim.sgd(0.1), mesh=2)


def _unlike(what):
    """What a step says to processes that do not bring the same."""
    mesh, rank = distributed.init(quiet=False), _ranks.rank()
    params = {"w": torch.full((2, 1), float(rank) if what == "state" else 1.0)}
    if what == "parted":
        params = distributed.shard(params, mesh, distributed.replicated)

    def loss_fn(params, state, batch, key):
        seen = {"seen": state["seen"] + (batch > 2).sum()} if what == "count" else state
        return (batch @ params["w"]).square().mean(), (seen, {})

    step = train.make_step(loss_fn, optim.sgd(0.1), compile=False, mesh=None if what == "parted" else mesh)
    state = {"seen": torch.zeros((), dtype=torch.int64)}
    train_state = train.TrainState.create(params, optim.sgd(0.1), random.key(0), state=state)
    sizes = {"later": (4, 4, 2 + rank), "parted": (5 - rank,)}.get(what, (4,))
    with pytest.raises(ValueError, match="on rank 0 and") as raised:
        for size in sizes:
            train_state, _ = step(train_state, torch.full((size, 2), 3.0 * rank))
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("later", "step: the number of examples in the batch is 2 on rank 0 and 3 on rank 1; give every process as"),
        ("parted", "step: the number of examples in the batch is 5 on rank 0 and 4 on rank 1; give every process as"),
        ("state", "step: leaf 'params.w' of the state is 'float32 (2, 1) with checksum"),
        ("count", "step: leaf 'seen' of the new layer state is 0 on rank 0 and 8 on rank 1; what depends on"),
    ],
)
def test_processes_that_do_not_bring_the_same_are_told(what, said):
    assert all(answer.startswith(said) for answer in ranks.run(2, _unlike, what))
