"""`interop.from_module` / `to_module`: equal to the module itself, and pure."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fnn
from fnn import interop, nn, optim, random, train, tree

KEY = random.key(3)


class Everything(torch.nn.Module):
    """Buffers of every kind, a tied weight, an index, and a draw as torchvision's stochastic depth makes it."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.last = torch.nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.register_buffer("index", torch.tensor([3, 1, 0, 2]))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x, shift=None):
        x += 1  # writes into its input
        h = F.relu(self.norm(self.first(x)[:, self.index] * self.scale), inplace=True)
        if self.training:
            noise = torch.empty((len(h), 1), dtype=h.dtype).bernoulli_(0.5)
            h = h * noise.div_(0.5)
        h = h if shift is None else h + shift
        return {"out": self.last(h), "hidden": (h, None)}


class Recurrent(torch.nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 2, 2, dropout=dropout, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def everything():
    return Everything(), torch.randn(5, 4)


def convolutions():
    parts = [
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=None),
        torch.nn.ReLU(inplace=True),
        torch.nn.Dropout2d(0.3, inplace=True),
        torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(16),
        torch.nn.Linear(16, 2),
    ]
    return torch.nn.Sequential(*parts), torch.randn(4, 2, 4, 4)


def encoder():
    return torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), torch.randn(2, 3, 4)


def parametrized():
    norm = torch.nn.utils.parametrizations
    parts = (
        norm.weight_norm(torch.nn.Linear(3, 4)),
        torch.nn.AlphaDropout(0.2),
        norm.spectral_norm(torch.nn.Linear(4, 2)),
    )
    return torch.nn.Sequential(*parts, torch.nn.RReLU(), torch.nn.GroupNorm(1, 2)), torch.randn(5, 3)


MODULES = [everything, convolutions, encoder, parametrized]


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    module, x = make()
    module, x = module.to(dtype), x.to(dtype)
    return module, x, *interop.from_module(module)


def out(y):
    return y["out"] if isinstance(y, dict) else y


def largest(a, b):
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    pairs = [(u.detach().double(), v.detach().double()) for u, v in pairs if isinstance(u, torch.Tensor)]
    return max((float((u - v).abs().max()) for u, v in pairs), default=0.0)


def test_names_kinds_and_ties():
    _, _, net, params, state = made(everything)
    assert list(tree.paths(params)) == ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.bias"]
    assert list(tree.paths(state)) == ["index", "norm.running_mean", "norm.running_var"]
    assert repr(net) == "from_module(Everything)"
    _, _, _, _, state = made(convolutions)
    assert list(state["1"]) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(state["4"]) == ["running_mean", "running_var"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", MODULES, ids=lambda make: make.__name__)
def test_evaluation_equals_the_module(make, dtype):
    module, x, net, params, state = made(make, dtype)
    module.eval()
    if make is parametrized:  # its power iteration is run when the module is made, and then in training only
        net, params, state = interop.from_module(module)
    y, after = net.apply(params, state, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert largest(out(y), out(module(x.clone()))) < tolerance
    assert largest(after, state) == 0


def without_randomness(module):
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
        if isinstance(part, torch.nn.MultiheadAttention):
            part.dropout = 0.0
    return module


@pytest.mark.parametrize("make", [convolutions, encoder], ids=lambda make: make.__name__)
def test_training_and_its_state_equal_the_module(make):
    module, x, *_ = made(make)
    without_randomness(module)
    net, params, state = interop.from_module(module)
    for _ in range(3):
        y, state = net.apply(params, state, x, train=True)
        loss = module(x).square().sum()
        x = x * 1.5
    assert largest(y.square().sum(), loss) < 1e-10
    found = dict(module.named_buffers())
    for path, leaf in tree.paths(state).items():
        assert leaf.dtype == found[path].dtype
        torch.testing.assert_close(leaf, found[path], rtol=1e-12, atol=1e-12)
    grads = fnn.grad(lambda p: net.apply(p, state, x, train=True)[0].square().sum())(params)
    module.zero_grad()
    module(x).square().sum().backward()
    for path, leaf in tree.paths(grads).items():
        torch.testing.assert_close(leaf, module.get_parameter(path).grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make", [*MODULES, lambda: (Recurrent(), torch.randn(2, 3, 3))], ids=lambda make: make.__name__
)
def test_nothing_is_touched_and_the_key_decides(make):
    module, x, net, params, state = made(make)
    given = copy.deepcopy((x, params, state, module.state_dict()))
    generator = torch.get_rng_state()
    y, after = net.apply(params, state, x, key=KEY, train=True)
    again, _ = net.apply(params, state, x, key=KEY, train=True)
    other, _ = net.apply(params, state, x, key=random.key(4), train=True)
    assert largest(out(y), out(again)) == 0
    assert largest(out(y), out(other)) > 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert largest(given, (x, params, state, module.state_dict())) == 0
    assert module.training
    tree.check_like(state, after, "state")
    with pytest.raises(ValueError, match=r"needs a key in training.*train=True"):
        net.apply(params, state, x, train=True)


def test_a_missing_key_names_the_submodule():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout()))
    net, params, state = interop.from_module(module)
    with pytest.raises(ValueError, match=r"Sequential: submodule '1.0' \(Dropout\): dropout needs a key"):
        net.apply(params, state, torch.ones(1, 2), train=True)


def test_compiled_evaluation(fast_compile):
    _, x, net, params, state = made(everything)
    compiled = torch.compile(lambda params, x: net(params, x, state=state), fullgraph=True)
    assert largest(compiled(params, x)["out"], net(params, x, state=state)["out"]) < 1e-12


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 3, "vdim": 5}], ids=repr
)
@pytest.mark.parametrize("batched", [True, False])
def test_attention_with_dropout_has_torchs_mean(options, batched):
    """Dropout of the attention weights keeps their mean, and at a rate of nearly 0 the value itself."""
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(4, 2, dropout=1e-12, dtype=torch.float64, **options)
    sizes = [4, options.get("kdim", 4), options.get("vdim", 4)]
    xs = [torch.randn((3, 2, size) if batched else (3, size), dtype=torch.float64) for size in sizes]
    net, params, state = interop.from_module(module)
    y = net.apply(params, state, *xs, key=KEY, train=True)[0]
    assert largest(y, module.eval()(*xs)) < 1e-10


def test_recurrent_layers_with_dropout():
    module, x, net, params, state = made(lambda: (Recurrent(1e-12), torch.randn(2, 3, 3)))
    assert largest(net.apply(params, state, x, key=KEY, train=True)[0], module.eval()(x)) < 1e-10
    assert largest(net(params, x, state=state), module(x)) == 0


@pytest.mark.parametrize("make", [everything, convolutions, encoder], ids=lambda make: make.__name__)
def test_vmap_over_members_and_keys(make):
    _, x, net, params, state = made(make)
    many = tree.map(lambda leaf: torch.stack([leaf, leaf * 2 if leaf.is_floating_point() else leaf]), (params, state))
    keys = random.split(KEY, 2)

    def step(params, state, key):
        y, state = net.apply(params, state, x, key=key, train=True)
        return out(y), state

    both = torch.vmap(step, in_dims=(0, 0 if tree.leaves(state) else None, 0))(*many, keys)
    for index in range(2):
        one = step(*tree.map(lambda leaf: leaf[index], many), keys[index])
        assert largest(tree.map(lambda leaf: leaf[index], both), one) < 1e-12
    shared = torch.vmap(step, in_dims=(0, None, 0))(many[0], state, keys)  # one state in, one for each member out
    assert largest(tree.map(lambda leaf: leaf[0], shared), step(params, state, keys[0])) < 1e-12


@pytest.mark.parametrize("make", [convolutions, encoder], ids=lambda make: make.__name__)
def test_derivatives_of_torchs_transforms_too(make):
    _, x, net, params, state = made(make)
    loss = lambda x: net.apply(params, state, x, key=KEY, train=True)[0].square().sum()
    direction = torch.randn_like(x)
    step = 1e-5
    slope = lambda x: torch.func.jvp(torch.func.grad(loss), (x,), (direction,))[1]
    numeric = (torch.func.grad(loss)(x + step * direction) - torch.func.grad(loss)(x - step * direction)) / (2 * step)
    if make is convolutions:  # fused attention has no forward derivative outside of fnn.diff
        torch.testing.assert_close(slope(x), numeric, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fnn.hvp(loss, x, direction), numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [everything, encoder], ids=lambda make: make.__name__)
def test_training_compiled_in_one_graph(make, fast_compile):
    _, x, net, params, state = made(make)

    def loss(params, state, x, key):
        y, new = net.apply(params, state, x, key=key, train=True)
        return out(y).square().sum(), new

    f = torch.func.grad_and_value(loss, has_aux=True) if make is everything else loss
    compiled = torch.compile(lambda *values: f(*values), fullgraph=True)
    assert largest(compiled(params, state, x, KEY), f(params, state, x, KEY)) < 1e-10


@pytest.mark.slow
def test_a_donated_training_step(fast_compile):
    parts = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=None)  # dropout is compiled above
    _, x, net, params, state = made(lambda: (torch.nn.Sequential(*parts), torch.randn(5, 3)))

    def loss_fn(params, state, batch, key):
        y, state = net.apply(params, state, batch, key=key, train=True)
        return y.square().mean(), (state, {})

    optimizer = optim.sgd(0.1)
    ends = []
    for compile in (True, False):
        step = train.make_step(loss_fn, optimizer, compile=compile)
        train_state = train.TrainState.create(params, optimizer, KEY, state=state)
        for _ in range(2):
            train_state, _ = step(train_state, x)
        ends.append(train_state)
    assert int(ends[0].state["1"]["num_batches_tracked"]) == 2
    assert largest((ends[0].params, ends[0].state), (ends[1].params, ends[1].state)) < 1e-10


def test_inside_of_containers_and_init():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    layer, params, _ = interop.from_module(module)
    net = nn.Sequential(layer, nn.relu, nn.Linear(2))
    x = torch.randn(5, 3)
    all_params, state = net.init(KEY, x[:1])
    assert torch.equal(all_params["0"]["0"]["weight"], module[0].weight)
    assert all_params["0"]["0"]["weight"].data_ptr() != params["0"]["weight"].data_ptr()
    y, _ = net.apply(all_params, state, x, key=KEY, train=True)
    assert y.shape == (5, 2)
    meta, _ = layer.init(KEY.to("meta"), x)
    assert meta["0"]["weight"].is_meta


def test_keyword_inputs():
    module, x, net, params, state = made(everything)
    module.eval()
    expected = module(x.clone(), shift=torch.ones(4))["out"]
    assert largest(net.apply(params, state, x, shift=torch.ones(4))[0]["out"], expected) < 1e-12
    assert largest(net(params, x, state=state, shift=torch.ones(4))["out"], expected) < 1e-12


def test_back_to_a_module():
    module, x, net, params, state = made(everything)
    changed = tree.map(lambda leaf: leaf * 3 if leaf.is_floating_point() else leaf, params)
    before = copy.deepcopy(module.state_dict())
    back = interop.to_module(module, changed, state).eval()
    assert back.last.weight is back.first.weight
    assert largest(back(x.clone())["out"], net(changed, x, state=state)["out"]) < 1e-12
    assert largest(before, module.state_dict()) == 0
    assert largest(interop.from_module(back).params, changed) == 0
    with pytest.raises(ValueError, match=r"params has no leaf 'first.bias'"):
        interop.to_module(module, {"first": {"weight": torch.ones(4, 4)}})


def test_params_that_do_not_fit():
    _, x, net, params, state = made(everything)
    with pytest.raises(ValueError, match=r"leaf 'first.bias' has shape \(3,\), but the module's has \(4,\)"):
        net(tree.at(params, "first.bias").set(torch.ones(3)), x, state=state)
    with pytest.raises(ValueError, match=r"unexpected leaf 'extra'"):
        net({**params, "extra": torch.ones(1)}, x, state=state)
    with pytest.raises(ValueError, match=r"Everything needs its state"):
        net(params, x)


def linear_with(change):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    return change(module) or module


class Cached(torch.nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.write(self)
        return x + self.seen


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: torch.nn.LazyLinear(2), "no shape yet"),
        (lambda: torch.nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: torch.compile(torch.nn.Linear(2, 2)), "is compiled"),
        (lambda: torch.jit.script(torch.nn.Linear(2, 2)), "TorchScript"),
        (lambda: torch.nn.DataParallel(torch.nn.Linear(2, 2)), "module.module"),
        (lambda: linear_with(lambda m: m[0].register_full_backward_hook(print) and None), "'0'.*backward hooks"),
        (lambda: linear_with(lambda m: m[0].weight.register_hook(print) and None), "'weight' has a hook"),
        (lambda: linear_with(lambda m: setattr(m[0], "cached", m[0].weight * 2)), "cannot be copied"),
        (lambda: torch.nn.functional.relu, "expected a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_modules_that_cannot_be_converted(module, words):
    with pytest.raises((TypeError, ValueError), match=words):
        interop.from_module(module())


@pytest.mark.parametrize("write", [lambda m: m.seen.add_(1), lambda m: setattr(m, "seen", m.seen + 1)])
def test_constants_that_change_are_an_error(write):
    net, params, state = interop.from_module(Cached(write))
    with pytest.raises(ValueError, match=r"changed its buffer 'seen'.*persistent=True"):
        net.apply(params, state, torch.ones(1))
    with pytest.raises(ValueError, match="changed its buffer"):  # and the failed call has left nothing behind
        net.apply(params, state, torch.ones(1))


def test_per_sample_gradient_norms():
    module, x, *_ = made(convolutions)
    for index in (1, 3, 4):
        module[index] = torch.nn.Identity()
    net, params, _ = interop.from_module(module)
    loss = lambda params, x: net(params, x[None]).square().sum()
    norms = fnn.per_sample_grad_norm(loss)(params, x)
    grads = fnn.per_sample_grad(loss)(params, x)
    expected = sum(leaf.flatten(1).square().sum(1) for leaf in tree.leaves(grads)).sqrt()
    torch.testing.assert_close(norms, expected)
