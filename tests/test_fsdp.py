"""`distributed.fsdp`: the numbers of the layer, whose parameters are parted over processes."""

import functools
import gc
import weakref

import pytest
import ranks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fnn
from fnn import distributed, losses, models, nn, ops, optim, random, train, tree
from fnn._placement import is_parted, whole
from fnn.distributed._axis import sharded_axis

TOKENS = torch.arange(64).reshape(8, 8) % 12


def pixels(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape)


def residual(width):
    return nn.Residual(nn.Sequential(nn.Linear(width), nn.tanh, nn.Dropout(0.5), nn.Linear(width)))


NETS = {
    "mlp": lambda: (models.mlp(hidden=(8, 6)), pixels(8, 12)),
    "lenet5": lambda: (models.lenet5(), pixels(8, 1, 28, 28)),
    "batch norm": lambda: (nn.Sequential(nn.Linear(6), nn.BatchNorm(), nn.tanh, nn.Linear(4)), pixels(8, 3)),
    "gpt": lambda: (models.gpt(12, 8, 2, 2, 4), TOKENS),
    "gpt stacked": lambda: (models.gpt(12, 8, 2, 2, 4, stacked=True), TOKENS),
    # A stage in a stage, state, random numbers, a leaf that cannot be parted (5), a Remat that units replace.
    "mixed": lambda: (
        nn.Sequential(
            nn.Linear(6),
            nn.BatchNorm(),
            nn.Sequential(residual(6), nn.Remat(residual(6))),
            nn.Parallel(nn.Remat(nn.Sequential(nn.Linear(5), nn.relu)), nn.Linear(5)),
            lambda ys: ys[0] * ys[1],
            nn.Linear(4),
        ),
        pixels(8, 3),
    ),
}


def doubled(values):
    return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, values)


def loss_of(net):
    def loss_fn(params, state, batch, key):
        x, labels = batch
        y, state = net.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(y.movedim(-1, 1), labels), (state, {})

    return loss_fn


def problem(name):
    net, x = NETS[name]()
    labels = x if x.dtype == torch.int64 else torch.arange(len(x)) % 4
    return net, (x, labels)


def start(net, batch, optimizer):
    params, state = doubled(net.init(random.key(3), batch[0].float() if batch[0].is_floating_point() else batch[0]))
    return train.TrainState.create(params, optimizer, random.key(1), state=state)


def part(batch, mesh):
    return tree.map(lambda x: x.chunk(mesh.size())[mesh.get_local_rank()], batch)


def gradients(name, compiled, parted):
    """The first step's gradients, whole, and loss, of the net alone or of all processes together."""
    net, batch = problem(name)
    mesh = distributed.init() if parted else None
    if parted:
        net, batch = distributed.fsdp(net, mesh), part(batch, mesh)
    optimizer = optim.sgd(0.1)
    unguarded = train.pure_step(loss_of(net), optimizer, mesh=mesh, sync_batch_norm=parted).unguarded

    def step(parts, batch):
        grads, after, loss, _ = unguarded(train.TrainState(*parts), batch)
        return grads, after.params, loss

    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    begun = start(net, batch, optimizer)
    if parted:
        assert any(is_parted(leaf) for leaf in tree.leaves(begun.params))
    with torch.no_grad():
        found = step(begun.parts, batch)
    for grad in filter(is_parted, tree.leaves(found[0])):  # as torch takes a parted tensor's memory to be
        assert grad.to_local().is_contiguous()
    return tree.map(whole, found)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch norm", "gpt", "gpt stacked"])
def test_gradients_are_those_of_one_process(name):
    expected = gradients(name, False, False)
    for got in ranks.run(2, gradients, name, False, True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_four_processes():
    expected = gradients("gpt", False, False)
    for got in ranks.run(4, gradients, "gpt", False, True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "gpt stacked"])
def test_compiled_gradients_are_those_of_one_process(name):
    expected = gradients(name, False, False)
    for got in ranks.run(2, gradients, name, True, True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def same_batch(compiled):
    """Gradients over the whole batch with one key on every process: those of the net alone, drawn numbers included."""
    net, batch = problem("mixed")
    mesh = distributed.init()
    parted = distributed.fsdp(net, mesh)
    state = start(parted, batch, optim.sgd(0.1))
    assert is_parted(state.params["2"]["0"]["body"]["0"]["weight"])
    assert not is_parted(state.params["3"]["1"]["bias"])

    def of(net):
        def loss(params):
            value, (new, _) = loss_of(net)(params, state.state, batch, random.key(7))
            return value, new

        return fnn.value_and_grad(loss, has_aux=True)

    def shards(params):
        return tree.map(
            lambda leaf, like: (
                ops.ShardedLeaf(
                    leaf, like.placements[0].dim, like.shape[like.placements[0].dim], mesh.get_group().group_name, 2
                )
                if is_parted(like)
                else leaf
            ),
            params,
            state.params,
        )

    def step(parts):
        loss = lambda parts: of_net(shards(parts))
        return fnn.value_and_grad(loss, has_aux=True)(parts)

    def of_net(params):
        value, (new, _) = loss_of(parted)(params, state.state, batch, random.key(7))
        return value, new

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    parts = tree.map(lambda leaf: leaf.to_local() if is_parted(leaf) else leaf, state.params)
    (value, new), grads = run(parts)
    (expected, new_expected), whole_grads = of(net)(tree.map(whole, state.params))
    torch.testing.assert_close((value, new), (expected, new_expected))

    def own(grad, like):  # the sum of two processes' equal losses has twice the gradient
        return 2 * grad.chunk(2, like.placements[0].dim)[mesh.get_local_rank()] if is_parted(like) else grad

    torch.testing.assert_close(grads, tree.map(own, whole_grads, state.params), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_state_random_numbers_and_plain_leaves(compiled):
    ranks.run(2, same_batch, compiled)


def derivatives(compiled):
    """Forward mode, and forward over reverse, whose gradient gathers twice as well."""
    net, x = nn.Sequential(nn.Linear(6), nn.tanh, nn.Linear(4)), pixels(4, 2)
    mesh = distributed.init()
    parted = distributed.fsdp(net, mesh)
    params = doubled(parted.init(random.key(0), x)[0])
    tangent = tree.map(torch.sin, params)
    group = mesh.get_group().group_name

    def box(part, like):
        (placement,) = like.placements
        return ops.ShardedLeaf(part, placement.dim, like.shape[placement.dim], group, 2)

    def of(f):
        first = lambda params, tangent: fnn.jvp(f, (params,), (tangent,))[1]
        second = lambda params, tangent: fnn.jvp(fnn.grad(f), (params,), (tangent,))[1]
        return lambda params, tangent: (first(params, tangent), second(params, tangent))

    run = of(lambda parts: (parted(tree.map(box, parts, params), x) ** 2).mean())
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    local = lambda values: tree.map(lambda leaf: leaf.to_local(), values)
    got = run(local(params), local(tangent))
    all_whole = lambda values: tree.map(whole, values)
    first, second = of(lambda params: (net(params, x) ** 2).mean())(all_whole(params), all_whole(tangent))
    mine = lambda grad, like: 2 * grad.chunk(2, like.placements[0].dim)[mesh.get_local_rank()]
    torch.testing.assert_close(got, (first, tree.map(mine, second, params)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_mode_and_second_derivatives(compiled):
    ranks.run(2, derivatives, compiled)


HOLDS = {"clone", "expand", "getitem", "permute", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view"}


def gathers_of_a_graph():
    """How often a graph gathers, and how many whole weights of the forward pass the backward pass finds there still."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.compile_utils import fx_graph_cse

    graphs = []

    def keep(module, _):
        graphs.append(fx_graph_cse(module.graph))  # a compiler may make but once what is the same twice
        return make_boxed_func(module.forward)

    mesh, x = distributed.init(), torch.ones(16, 8)  # larger than the shards
    net = distributed.fsdp(nn.Sequential(nn.Linear(8), nn.tanh, nn.Linear(8), nn.tanh, nn.Linear(8)), mesh)
    params, _ = net.init(random.key(0), x)
    group = mesh.get_group().group_name

    def loss(parts, x):
        return net(tree.map(lambda part: ops.ShardedLeaf(part, 0, 8, group, 2), parts), x).square().mean()

    step = torch.compile(fnn.grad(loss, argnums=(0, 1)), fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        step(tree.map(lambda leaf: leaf.to_local(), params), x)
    (graph,) = graphs
    nodes = list(graph.nodes)
    gathers = [index for index, node in enumerate(nodes) if node.target is torch.ops.fnn.all_gather.default]
    kept = 0
    for forward in gathers[: len(gathers) // 2]:
        whole = {nodes[forward]}
        for index, node in enumerate(nodes):
            if whole.isdisjoint(node.all_input_nodes):
                continue
            if getattr(node.target, "__name__", "").partition(".")[0].removeprefix("_unsafe_") in HOLDS:
                whole.add(node)
            elif index > gathers[len(gathers) // 2]:
                kept += 1
    return len(gathers), kept


@pytest.mark.slow
def test_units_are_gathered_again_in_the_backward_pass():
    assert ranks.run(2, gathers_of_a_graph) == [(6, 0)] * 2  # three units, one message each


def training(name, compiled, parted):
    """Losses of 20 steps, and the parameters after them."""
    net, batch = problem(name)
    mesh = distributed.init() if parted else None
    if parted:
        net, batch = distributed.fsdp(net, mesh), part(batch, mesh)
        torch.compile = functools.partial(COMPILE, backend="aot_eager")
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.adam(1e-2))
    step = train.make_step(loss_of(net), optimizer, mesh=mesh, compile=compiled)
    state, seen = start(net, batch, optimizer), []
    for _ in range(20):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    torch.compile = COMPILE
    return seen, tree.map(whole, state.params), step.graphs


COMPILE = torch.compile


@pytest.mark.parametrize(("name", "compiled"), [("gpt", False), pytest.param("mlp", True, marks=pytest.mark.slow)])
def test_training_is_that_of_one_process(name, compiled):
    losses, params, _ = training(name, False, False)
    first, second = ranks.run(2, training, name, compiled, True)
    assert first[0] == second[0]
    assert first[2] == compiled
    torch.testing.assert_close(first[0], losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(first[1], params, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)


def initialised(name):
    net, (x, _) = problem(name)
    params, state = distributed.fsdp(net, distributed.init()).init(random.key(3), x)
    expected = net.init(random.key(3), x)
    assert list(tree.paths(params)) == list(tree.paths(expected[0]))
    torch.testing.assert_close((tree.map(whole, params), state), expected, rtol=0, atol=0)
    axes = {path: leaf.placements[0].dim if is_parted(leaf) else None for path, leaf in tree.paths(params).items()}
    assert axes == {path: sharded_axis(leaf.shape, 2, path) for path, leaf in tree.paths(params).items()}
    assert all(leaf.to_local().is_contiguous() for leaf in tree.leaves(params) if is_parted(leaf))


@pytest.mark.parametrize("name", NETS)
def test_init_is_that_of_the_layer(name):
    ranks.run(2, initialised, name)


def test_sharded_axis():
    assert sharded_axis((4, 6), 2) == 1
    assert sharded_axis((6, 6), 2) == 0
    assert sharded_axis((4, 9), 2) == 0
    assert sharded_axis((3, 5), 2) is None
    assert sharded_axis((), 2) is None
    assert sharded_axis((8, 4, 6), 2, "h.*.weight") == 2
    assert sharded_axis((8, 3), 2, "h.*.bias") is None


def units_alive_in_init():
    alive, most = set(), 0

    def ones(key, shape, dtype):
        nonlocal most
        made = torch.ones(shape, dtype=dtype)
        gc.collect()
        most = max(most, 1 + sum(other() is not None for other in alive))
        alive.add(weakref.ref(made))
        return made

    net = nn.Block(lambda m, x: m.h(x), h=nn.Repeat(nn.Linear(4, weight_init=ones, bias=False), 6, stacked=True))
    distributed.fsdp(net, distributed.init()).init(random.key(0), torch.ones(1, 4))
    return most


def test_init_holds_one_unit_at_a_time():
    assert ranks.run(2, units_alive_in_init) == [1, 1]


class Messages(TorchDispatchMode):
    """Size and dtype of what is gathered."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "fnn::all_gather":
            self.sent.append((args[0].numel(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def messages():
    mesh = distributed.init()

    def sent(net, x):
        net = distributed.fsdp(net, mesh)
        params, _ = net.init(random.key(0), x)
        with Messages() as seen:
            y = net(params, x)
        return seen.sent, y

    policy, x = nn.Policy(compute=torch.bfloat16), torch.ones(2, 4)
    linear = nn.Sequential(nn.Linear(4), nn.Linear(2))
    half = [(10, torch.bfloat16), (5, torch.bfloat16)]
    found, y = sent(nn.Cast(linear, policy), x)
    assert (found, y.dtype) == (half, torch.float32)
    assert sent(nn.Sequential(*[nn.Cast(layer, policy) for _, layer in linear.children]), x)[0] == half
    # The embeddings and the last norm (88 numbers), then the two blocks (244 each).
    assert sent(NETS["gpt"]()[0], TOKENS)[0] == [(44, torch.float32)] + 2 * [(122, torch.float32)]


def test_one_message_for_each_unit_in_the_dtype_of_the_computation():
    ranks.run(2, messages)


def wrong_uses():
    mesh = distributed.init()
    net = distributed.fsdp(nn.Sequential(nn.Linear(4)), mesh)
    x = torch.ones(2, 4)
    params, _ = net.init(random.key(0), x)
    with pytest.raises(TypeError, match=r"is a DTensor.*train\.make_step\(loss_fn, optimizer, mesh=mesh\)"):
        fnn.grad(lambda params: net(params, x).sum())(params)
    optimizer = optim.sgd(0.1)
    loss_fn = lambda params, state, x, key: (net(params, x).sum(), (state, {}))
    searching = optim.lbfgs(line_search="strong_wolfe")
    step = train.make_step(loss_fn, searching, mesh=mesh, compile=False)
    with pytest.raises(TypeError, match="once more, at parameter '0.weight', which is parted: a line search"):
        step(train.TrainState.create(params, searching, random.key(0)), x)
    step = train.make_step(loss_fn, optimizer)
    with pytest.raises(TypeError, match=r"mesh=mesh"):
        step(train.TrainState.create(params, optimizer, random.key(0)), x)
    with pytest.raises(ValueError, match=r"fsdp: init: key is \[0, 0\] on rank 0 and \[0, 1\] on rank 1"):
        net.init(random.key(mesh.get_local_rank()), x)


def test_wrong_uses():
    ranks.run(2, wrong_uses)
    with pytest.raises(TypeError, match="fsdp: mesh is int, expected a DeviceMesh"):
        distributed.fsdp(nn.Linear(2), 2)


def alone():
    net = distributed.fsdp(NETS["mlp"]()[0], distributed.init())
    params, _ = net.init(random.key(0), torch.ones(1, 12))
    return any(is_parted(leaf) for leaf in tree.leaves(params)), repr(net), fnn.summary(net, torch.ones(1, 12))


def test_one_process_has_plain_parameters():
    net = NETS["mlp"]()[0]
    parted, shown, summary = ranks.run(1, alone)[0]
    assert not parted
    assert shown == f"fsdp({net!r})"
    assert str(summary) == str(fnn.summary(net, torch.ones(1, 12)))
