"""`distributed.shard`: the same step, run where its parameters lie, gives the numbers of one process."""

import functools

import pytest
import ranks
import torch

from fnn import distributed, losses, models, nn, optim, random, train, tree
from fnn._placement import whole
from fnn.ops import _whole

slow = pytest.mark.slow


def images(batch=8, channels=1, size=8):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 4


def tokens(batch=4, length=6):
    x = torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(0))
    return x, x.roll(-1, 1)


def gpt(dropout=0.0, stacked=False):
    return models.gpt(vocab_size=12, context=6, layers=2, heads=2, width=8, dropout=dropout, stacked=stacked)


NETS = {
    "mlp": lambda: (models.mlp((8, 6), 4), images()),
    "gpt": lambda: (gpt(), tokens()),
    "gpt with dropout": lambda: (gpt(0.2), tokens()),
    "stacked gpt": lambda: (gpt(stacked=True), tokens()),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 3, padding=1),
            nn.BatchNorm(),
            nn.relu,
            nn.MaxPool2d(2),
            nn.Conv2d(8, 3, padding="same", groups=4),
            nn.GroupNorm(2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4),
        ),
        images(),
    ),
    "decoder": lambda: (
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(16),
            functools.partial(torch.unflatten, dim=1, sizes=(4, 2, 2)),
            nn.ConvTranspose2d(2, 3, stride=2),
            nn.Flatten(),
            nn.Linear(4),
        ),
        images(),
    ),
    "norms": lambda: (
        nn.Sequential(nn.Flatten(), nn.Linear(8), nn.LayerNorm(), nn.gelu, nn.RMSNorm(), nn.Dropout(0.3), nn.Linear(4)),
        images(),
    ),
    "attention": lambda: (nn.Sequential(nn.Embedding(12, 8), nn.MultiHeadAttention(2), nn.Linear(12)), tokens()),
    "recurrent": lambda: (nn.Sequential(nn.Embedding(12, 8), nn.LSTM(6), nn.GRU(6), nn.Linear(12)), tokens(length=3)),
}
RULES = {
    "replicated": lambda: distributed.replicated,
    "fully sharded": lambda: distributed.fully_sharded,
    "tensor parallel gpt": lambda: distributed.tensor_parallel("gpt"),
    "tensor parallel mlp": lambda: distributed.tensor_parallel("mlp"),
    "two axes gpt": lambda: distributed.tensor_parallel("gpt", fully_sharded=True),
    "two axes mlp": lambda: distributed.tensor_parallel("mlp", fully_sharded=True),
    "embeddings": lambda: {"wte.weight": {"model": 0}},
}
OPTIMIZERS = {
    "momentum": lambda: optim.sgd(0.1, momentum=0.9),
    "clipped": lambda: optim.chain(optim.clip_by_global_norm(0.05), optim.adamw(1e-2, eps=1e-3)),
    "muon": lambda: optim.by_label(
        {"muon": optim.muon(1e-2, compute_dtype=None), "adamw": optim.adamw(1e-3, eps=1e-3)},
        lambda path, leaf: "muon" if leaf.ndim == 2 else "adamw",
    ),
    "lion": lambda: optim.lion(1e-3),
    "lamb": lambda: optim.lamb(1e-2, eps=1e-3),
    "rmsprop": lambda: optim.rmsprop(1e-3, eps=1e-3),
}


def steps(net, rules, model=1, optimizer="momentum", compile=False, count=2):
    """The loss, parameters and layer state of some steps, placed and on one process; and the number of graphs."""
    (layer, (x, y)), optimizer = NETS[net](), OPTIMIZERS[optimizer]()
    mesh = distributed.init(model=model, device="cpu", quiet=False)
    params, state = layer.init(random.key(0), x[:1])

    def loss_fn(params, state, batch, key):
        x, y = batch
        logits, state = layer.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)), (state, {})

    parts, part = mesh["data"].size(), mesh["data"].get_local_rank()
    mine = tuple(leaf.chunk(parts)[part] for leaf in (x, y))
    placed = (distributed.shard(params, mesh, RULES[rules]()), distributed.shard(state, mesh, distributed.replicated))
    found = []
    for start, batch in ((placed, mine), ((params, state), (x, y))):
        compiler, torch.compile = torch.compile, functools.partial(torch.compile, backend="aot_eager")
        step = train.make_step(loss_fn, optimizer, compile=compile and batch is mine)
        torch.compile = compiler
        train_state = train.TrainState.create(start[0], optimizer, random.key(1), state=start[1])
        record = []
        for _ in range(count):
            train_state, metrics = step(train_state, batch)
            record.append(whole(metrics["loss"]))
        ended = {"params": train_state.params, "state": train_state.state}
        if batch is mine:
            for before, after in zip(tree.leaves(placed), tree.leaves(ended), strict=True):
                assert after.placements == before.placements
            graphs = step.graphs
        found.append((record, tree.map(whole, ended)))
    return found, graphs


def check(answers):
    for (placed, alone), _ in answers:
        torch.testing.assert_close(placed[0], alone[0], rtol=1e-6, atol=0)
        assert tree.allclose(placed[1], alone[1], rtol=1e-5, atol=1e-6)
    (first, _), _ = answers[0]
    for (other, _), _ in answers:
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(other), strict=True))


@pytest.mark.parametrize("rules", ["replicated", "fully sharded"])
@pytest.mark.parametrize(
    "net", [name if "gpt" not in name and name != "recurrent" else pytest.param(name, marks=slow) for name in NETS]
)
def test_one_process_and_two_give_the_same_numbers(net, rules):
    check(ranks.run(2, steps, net, rules))


@pytest.mark.parametrize(
    ("net", "rules"),
    [
        ("mlp", "tensor parallel mlp"),
        ("gpt with dropout", "tensor parallel gpt"),
        pytest.param("stacked gpt", "tensor parallel gpt", marks=slow),
        pytest.param("gpt", "embeddings", marks=slow),
    ],
)
def test_tensor_parallel(net, rules):
    check(ranks.run(2, steps, net, rules, 2))


@slow
@pytest.mark.parametrize("net", ["mlp", "gpt"])
def test_tensor_parallel_and_fully_sharded(net):
    check(ranks.run(4, steps, net, f"two axes {net}", 2))


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "momentum"])
@pytest.mark.parametrize("rules", ["fully sharded", "tensor parallel mlp"])
def test_state_of_an_optimizer_follows_its_parameter(optimizer, rules):
    check(ranks.run(2, steps, "mlp", rules, 2 if "tensor" in rules else 1, optimizer))


@pytest.mark.parametrize(
    ("net", "rules"),
    [
        ("mlp", "fully sharded"),
        ("mlp", "tensor parallel mlp"),
        pytest.param("convolutions", "fully sharded", marks=slow),
        pytest.param("gpt", "tensor parallel gpt", marks=slow),
    ],
)
def test_one_graph(net, rules):
    answers = ranks.run(2, steps, net, rules, 2 if "tensor" in rules else 1, "momentum", True)
    check(answers)
    assert [graphs for _, graphs in answers] == [1, 1]


def placements(shapes, rules, model):
    mesh = distributed.init(model=model, device="cpu", quiet=False)
    values = {name: torch.arange(float(torch.Size(shape).numel())).reshape(shape) for name, shape in shapes.items()}
    try:
        parted = distributed.shard(values, mesh, RULES[rules]() if isinstance(rules, str) else rules)
    except ValueError as error:
        return str(error)
    for name, leaf in parted.items():
        assert torch.equal(leaf.full_tensor(), values[name])
    return {name: (str(leaf.placements), tuple(leaf.to_local().shape)) for name, leaf in parted.items()}


def test_rules():
    shapes = {"a.weight": (4, 6), "a.bias": (5,), "b.weight": (3,), "count": ()}
    rules = {"a.weight": {"data": -1}, "*.weight": {"data": 0}}
    assert ranks.run(2, placements, shapes, rules, 1)[0] == {
        "a.weight": ("(Shard(dim=1),)", (4, 3)),
        "a.bias": ("(Replicate(),)", (5,)),
        "b.weight": ("(Shard(dim=0),)", (2,)),
        "count": ("(Replicate(),)", ()),
    }
    assert ranks.run(2, placements, {**shapes, "c": (7, 2)}, "fully sharded", 1)[1] == {
        "a.weight": ("(Shard(dim=1),)", (4, 3)),
        "a.bias": ("(Replicate(),)", (5,)),
        "b.weight": ("(Replicate(),)", (3,)),
        "count": ("(Replicate(),)", ()),
        "c": ("(Shard(dim=1),)", (7, 1)),
    }


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"a.wieght": {"data": 0}}, "no path of the tree matches 'a.wieght'; nearest are 'a.weight'"),
        ({"a.bias": {"data": 1}}, "leaf 'a.bias', shape (5,), cuts axis 1, which it lacks"),
        ({"a.bias": {"model": 0}}, "'model', but its axes are ['data']; distributed.init(model=n)"),
        ("tensor parallel gpt", "no path of the tree matches 'h.*.attn.c_proj.weight'"),
    ],
)
def test_errors_name_the_leaf(rules, said):
    assert all(said in answer for answer in ranks.run(2, placements, {"a.weight": (4, 6), "a.bias": (5,)}, rules, 1))


def unequal():
    mesh = distributed.init(device="cpu", quiet=False)
    with pytest.raises(ValueError, match="leaf 'a'.* is .* on rank 0 and .* on rank 1; every process has to"):
        distributed.shard({"a": torch.full((2,), float(mesh.get_local_rank()))}, mesh, distributed.replicated)


def test_values_that_differ_between_processes_are_found():
    ranks.run(2, unequal)


def test_unknown_model():
    with pytest.raises(ValueError, match="model must be one of 'gpt', 'mlp', got 'gpt2'"):
        distributed.tensor_parallel("gpt2")


def test_operators_of_placed_tensors_have_every_derivative():
    a, b = (torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for f, values in (
        (lambda a: _whole.identity(a, True), (a,)),
        (_whole.multiply, (a, b)),
    ):
        torch.autograd.gradcheck(f, values, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(f, values)
        batched = torch.vmap(f)(*[value[None] for value in values])
        torch.testing.assert_close(batched[0], f(*values))
    assert _whole.whole(a) is a
