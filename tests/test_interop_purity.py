"""A converted module is a pure function: what it writes becomes state, or is taken back, or is an error."""

import copy
import threading

import pytest
import torch

from fnn import interop, random, tree

KEY = random.key(3)


class Averages(torch.nn.Module):
    """Buffers of three kinds, written in place and set anew."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("odd", torch.tensor(False))

    def forward(self, x):
        y = self.linear(x)
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.calls += 1
        self.odd = ~self.odd
        return y - self.average * self.calls


def test_buffers_that_are_written_into_are_state():
    torch.manual_seed(0)
    module, x = Averages(), torch.randn(3, 2)
    net, params, state = interop.from_module(module)
    given = copy.deepcopy(state)
    ours = state
    for _ in range(3):
        y, ours = net.apply(params, ours, x, train=True)
        torch.testing.assert_close(y, module(x))
    assert tree.allclose(ours, dict(module.named_buffers()), 1e-6, 1e-6)
    assert tree.allclose(state, given, 0, 0)

    def loss(params):
        y, after = net.apply(params, state, x)
        return y.sum(), after

    grad, after = torch.func.grad(loss, has_aux=True)(params)
    assert int(after["calls"]) == 1
    assert torch.equal(grad["linear"]["bias"], torch.full((2,), 3.0))
    many = tree.map(lambda leaf: torch.stack([leaf, leaf]), state)
    averages = torch.vmap(lambda state, x: net.apply(params, state, x)[1]["average"])(many, torch.stack([x, 2 * x]))
    assert torch.equal(averages[0], after["average"])
    assert not torch.equal(averages[0], averages[1])


def test_and_compiled_too(fast_compile):
    net, params, state = interop.from_module(Averages())
    x = torch.randn(3, 2)
    f = lambda params, state, x: net.apply(params, state, x, train=True)
    compiled = torch.compile(f, fullgraph=True)
    y, after = compiled(params, compiled(params, state, x)[1], x)
    expected, new = f(params, f(params, state, x)[1], x)
    torch.testing.assert_close(y, expected)
    assert tree.allclose(after, new, 1e-6, 1e-6)
    assert int(state["calls"]) == 0


def test_the_power_iteration_of_spectral_norm_goes_on():
    module = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 5))
    with torch.no_grad():
        module.parametrizations.weight.original.normal_()
    net, params, state = interop.from_module(module)
    x = torch.randn(2, 5)
    for _ in range(3):
        y, state = net.apply(params, state, x, train=True)
        torch.testing.assert_close(y, module(x))
    found = dict(module.named_buffers())
    for path, leaf in tree.paths(state).items():
        torch.testing.assert_close(leaf, found[path])


class Writes(torch.nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.weight = torch.nn.Parameter(torch.full((2,), 3.0))
        self.plain = torch.zeros(2)

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return x * self.weight + self.plain


@pytest.mark.parametrize(
    ("write", "what"),
    [(lambda m: m.weight.clamp_(max=1), "parameter 'weight'"), (lambda m: m.plain.add_(1), "attribute 'plain'")],
)
def test_writes_into_what_is_no_state_are_an_error(write, what):
    net, params, _ = interop.from_module(Writes(write))
    with pytest.raises(ValueError, match=f"Writes: the module wrote into its {what}"):
        net(params, torch.ones(2))
    # functorch has a message of its own for writes into constants
    with pytest.raises((ValueError, RuntimeError), match=f"{what}|mutate a captured Tensor"):
        torch.func.grad(lambda p: net(p, torch.ones(2)).sum())(net.init(KEY)[0])


def test_what_a_call_sets_is_taken_back():
    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.cache, self.calls = None, 0

        def forward(self, x):
            self.calls += 1
            if self.cache is None:
                self.cache = self.linear(x)
            self.linear.last = self.cache
            return self.cache * self.calls

    net, params, _ = interop.from_module(Cached())
    first, second = net(params, torch.zeros(1, 2)), net(tree.map(lambda leaf: leaf * 2, params), torch.zeros(1, 2))
    assert torch.equal(second, first * 2)
    assert not hasattr(net.evaluation.module.linear, "last")


@pytest.mark.parametrize("bag", [False, True])
def test_an_embedding_with_max_norm_leaves_its_weight(bag):
    make = torch.nn.EmbeddingBag if bag else torch.nn.Embedding
    module = make(4, 3, max_norm=0.5)
    with torch.no_grad():
        module.weight[0] *= 0.1
    net, params, state = interop.from_module(module)
    x = torch.tensor([[0, 1], [1, 2]])
    given = params["weight"].clone()
    y = net(params, x)
    grad = torch.func.grad(lambda p: net(p, x).square().sum())(params)["weight"]
    assert torch.equal(params["weight"], given)
    torch.testing.assert_close(y, module(x))
    module(x).square().sum().backward()
    torch.testing.assert_close(grad, module.weight.grad)
    with pytest.raises(TypeError, match="max_norm=None"):
        net.apply(params, state, x, train=True)


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(3, 4), lambda: torch.nn.Conv1d(3, 4, 2)])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_has_every_derivative(make, dim):
    module = torch.nn.utils.parametrizations.weight_norm(make().double(), dim=dim)
    x = torch.randn(2, 3, 2 if isinstance(module, torch.nn.Conv1d) else 3, dtype=torch.float64)
    net, params, _ = interop.from_module(module)
    torch.testing.assert_close(net(params, x), module(x))
    loss = lambda p: net(p, x).square().sum()
    direction = tree.map(torch.ones_like, params)
    slope = torch.func.jvp(loss, (params,), (direction,))[1]
    grads = torch.func.grad(loss)(params)
    torch.testing.assert_close(slope, sum(leaf.sum() for leaf in tree.leaves(grads)))


def test_synchronised_batch_norm_takes_its_own_batch():
    for momentum in (0.1, None):
        module = torch.nn.SyncBatchNorm(3, momentum=momentum)
        net, params, state = interop.from_module(module)
        x = torch.randn(5, 3)
        for _ in range(2):
            y, state = net.apply(params, state, x, train=True)
            torch.testing.assert_close(y, module(x))
        torch.testing.assert_close(state["running_var"], module.running_var)
        assert type(interop.to_module(module, params, state)) is torch.nn.SyncBatchNorm


def test_threads_take_turns():
    net, params, _ = interop.from_module(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)]))
    many = [tree.map(lambda leaf, factor=factor: leaf * factor, params) for factor in (1, 2, 3)]
    x = torch.ones(32, 8)
    expected, wrong = [net(one, x) for one in many], []

    def work(index):
        for _ in range(100):
            try:
                wrong.extend([] if torch.equal(net(many[index], x), expected[index]) else [index])
            except TypeError as error:  # another thread's call has emptied the slots
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
