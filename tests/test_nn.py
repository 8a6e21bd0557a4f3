"""fnn.nn: the layer contract, every layer against torch.nn in float64, containers, blocks, errors with paths."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import models, nn, random, tree

KEY = random.key(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS = [
    (nn.Linear(5), torch.nn.Linear(7, 5), (3, 7)),
    (nn.Linear(5, bias=False), torch.nn.Linear(7, 5, bias=False), (2, 3, 7)),
    (nn.Conv2d(6, 3), torch.nn.Conv2d(4, 6, 3), (2, 4, 8, 9)),
    (
        nn.Conv2d(6, (3, 2), stride=2, padding=1, dilation=2, groups=2, bias=False),
        torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, groups=2, bias=False),
        (2, 4, 9, 9),
    ),
    (nn.Conv2d(6, 3, padding="same"), torch.nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 6)),
    (nn.MaxPool2d(2), torch.nn.MaxPool2d(2), (2, 3, 7, 8)),
    (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), torch.nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 3, 7, 8)),
    (nn.AvgPool2d(2), torch.nn.AvgPool2d(2), (2, 3, 7, 8)),
    (
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        (2, 3, 7, 8),
    ),
    (nn.AdaptiveAvgPool2d((2, 3)), torch.nn.AdaptiveAvgPool2d((2, 3)), (2, 3, 7, 8)),
    (nn.BatchNorm(), torch.nn.BatchNorm2d(4), (3, 4, 5, 6)),
    (nn.BatchNorm(affine=False, momentum=0.3, eps=1e-3), torch.nn.BatchNorm1d(4, 1e-3, 0.3, affine=False), (6, 4)),
    (nn.LayerNorm(), torch.nn.LayerNorm(6), (3, 4, 6)),
    (nn.LayerNorm(2, bias=False, eps=1e-3), torch.nn.LayerNorm((4, 6), 1e-3, bias=False), (3, 4, 6)),
    (nn.LayerNorm(affine=False), torch.nn.LayerNorm(6, elementwise_affine=False), (3, 4, 6)),
    (nn.Flatten(), torch.nn.Flatten(), (3, 4, 6)),
    (nn.Flatten(0, 1), torch.nn.Flatten(0, 1), (3, 4, 6)),
]


@pytest.mark.parametrize(("layer", "module", "shape"), LAYERS, ids=lambda value: " ".join(repr(value).split())[:40])
def test_layer_equals_torch_in_value_gradient_and_state(layer, module, shape):
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = double(*shape)
    params, state = layer.init(KEY, x)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in module.named_parameters()}
    assert list(state) == [n for n, b in module.named_buffers() if b.is_floating_point()]
    params = {name: value.detach().clone() for name, value in module.named_parameters()}

    for train in (True, False):
        module.train(train)
        theirs = module(x)
        ours, state = layer.apply(params, state, x, train=train)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        for name, value in state.items():
            torch.testing.assert_close(value, module.get_buffer(name), rtol=1e-10, atol=1e-12)
        weights = torch.randn_like(theirs)
        leaves = [x.requires_grad_(), *module.parameters()]
        expected = torch.autograd.grad((module(x) * weights).sum(), leaves)
        if train:  # that forward pass moved the buffers once more
            module.load_state_dict(state, strict=False)
        x = x.detach()
        loss = lambda p, x: (layer.apply(p, state, x, train=train)[0] * weights).sum()
        by_params, by_x = grad(loss, argnums=(0, 1))(params, x)
        torch.testing.assert_close([by_x, *by_params.values()], list(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("layer", "module", "shape"), LAYERS, ids=lambda value: " ".join(repr(value).split())[:40])
def test_layer_under_transforms(layer, module, shape):
    x = double(*shape)
    params, state = layer.init(KEY, x)
    copies = tree.map(lambda p: torch.stack([p, 2 * p, p + 1]), (params, state))
    xs = torch.stack([x, x + 1, 2 * x])
    batched = vmap(lambda p, s, x: layer.apply(p, s, x, train=True))(*copies, xs)
    for row in range(3):
        p, s = tree.map(lambda leaf: leaf[row], copies)
        single = layer.apply(p, s, xs[row], train=True)
        torch.testing.assert_close(tree.map(lambda leaf: leaf[row], batched), single, rtol=1e-10, atol=1e-10)

    small = x.flatten()[:6]
    f = lambda v: layer.apply(params, state, torch.cat([v, x.flatten()[6:]]).reshape(shape), train=True)[0]
    torch.testing.assert_close(jacfwd(f)(small), jacrev(f)(small))
    second = hessian(lambda v: f(v).pow(3).sum())(small)
    torch.testing.assert_close(second, second.T)
    torch.autograd.gradgradcheck(lambda v: f(v).pow(3).sum(), small.requires_grad_())


NET = nn.Sequential(
    nn.Conv2d(3, 3),
    nn.BatchNorm(),
    nn.relu,
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.LayerNorm(),
    nn.Dropout(0.3),
    nn.Linear(4),
)


def test_every_transform_compiles_to_the_eager_result():
    x = torch.randn(4, 2, 8, 8)
    params, state = NET.init(KEY, x)
    params = tree.map(lambda p: torch.randn_like(p) * 0.3, params)
    tangent = tree.map(torch.randn_like, params)

    def loss(params, x=x):
        y, _ = NET.apply(params, state, x, key=KEY, train=True)
        return y.square().mean()

    def everything(params, x):
        per_example = lambda p, one: NET(p, one[None], state=state).square().sum()
        return {
            "grad": grad(loss)(params),
            "vmap": vmap(lambda one: NET(params, one[None], state=state))(x),
            "vmap(grad)": vmap(grad(per_example), in_dims=(None, 0))(params, x),
            "jvp": jvp(loss, (params,), (tangent,)),
            "hvp": jvp(grad(loss), (params,), (tangent,))[1],
            "jacrev": jacrev(lambda b: NET(tree.at(params, "7.bias").set(b), x, state=state))(params["7"]["bias"]),
            "jacfwd": jacfwd(lambda b: NET(tree.at(params, "7.bias").set(b), x, state=state))(params["7"]["bias"]),
            "hessian": hessian(lambda b: loss(tree.at(params, "5.bias").set(b)))(params["5"]["bias"]),
            "state": NET.apply(params, state, x, key=KEY, train=True)[1],
        }

    eager = everything(params, x)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(params, x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_defaults_are_torchs_distribution():
    weight = nn.Linear(400).init(KEY, torch.zeros(1, 300))[0]["weight"]
    bound = 300**-0.5
    assert weight.abs().max() <= bound
    torch.testing.assert_close(weight.std(), torch.tensor(bound / 3**0.5), rtol=0.01, atol=0)
    bias = nn.Conv2d(500, 3).init(KEY, torch.zeros(1, 8, 9, 9))[0]["bias"]
    bound = (8 * 9) ** -0.5
    assert bound * 0.95 < bias.abs().max() <= bound


def test_init_takes_dtype_from_input_device_from_key_and_needs_no_data():
    for dtype, expected in ((torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.int64, torch.float32)):
        params, _ = nn.Sequential(lambda x: x, nn.Linear(2)).init(KEY, torch.empty(3, 4, dtype=dtype, device="meta"))
        assert params["1"]["weight"].dtype == expected
        assert params["1"]["weight"].device.type == "cpu"
    params, state = NET.init(torch.empty(2, dtype=torch.int32, device="meta"), torch.zeros(1, 2, 8, 8))
    assert all(leaf.is_meta for leaf in tree.leaves((params, state)))
    real = NET.init(KEY, torch.zeros(1, 2, 8, 8))
    assert [leaf.shape for leaf in tree.leaves((params, state))] == [leaf.shape for leaf in tree.leaves(real)]


def test_vmap_of_init_is_init():
    x = torch.zeros(1, 2, 8, 8)
    keys = random.split(KEY, 3)
    many = vmap(lambda key: NET.init(key, x)[0])(keys)
    assert tree.allclose(tree.map(lambda leaf: leaf[1], many), NET.init(keys[1], x)[0], rtol=0, atol=0)


def test_sequential_names_and_empty_children():
    net = nn.Sequential({"fc": nn.Linear(3), "act": nn.relu, "out": nn.Linear(2)})
    params, state = net.init(KEY, torch.zeros(1, 4))
    assert list(tree.paths(params)) == ["fc.weight", "fc.bias", "out.weight", "out.bias"]
    assert state == {}
    x = torch.randn(5, 4)
    expected = F.linear(F.linear(x, *params["fc"].values()).relu(), *params["out"].values())
    torch.testing.assert_close(net(params, x), expected)


def test_parallel_and_residual():
    x = torch.randn(5, 4)
    net = nn.Sequential(nn.Parallel(nn.Linear(3), nn.relu), lambda ys: torch.cat(ys, -1))
    params, _ = net.init(KEY, x)
    assert net(params, x).shape == (5, 7)
    named = nn.Parallel({"a": nn.Linear(3), "b": nn.tanh})
    params, _ = named.init(KEY, x)
    assert list(named(params, x)) == ["a", "b"]
    assert list(params) == ["a"]

    net = nn.Residual(nn.Linear(4))
    params, _ = net.init(KEY, x)
    torch.testing.assert_close(net(params, x), F.linear(x, *params["body"].values()) + x)
    net = nn.Residual(nn.Linear(6), shortcut=nn.Linear(6))
    params, _ = net.init(KEY, x)
    assert list(params) == ["body", "shortcut"]
    with pytest.raises(ValueError, match=r"body gives shape \(5, 1\), the shortcut \(5, 4\)"):
        net = nn.Residual(nn.Linear(1))
        net(net.init(KEY, x)[0], x)


def cross(m, x, context):
    scores = m.query(x) @ m.key(context).mT
    return m.drop(scores.softmax(-1) @ m.value(context))


CROSS = nn.Block(cross, query=nn.Linear(8), key=nn.Linear(8), value=nn.Linear(8), drop=nn.Dropout(0.5))


def test_block_takes_several_inputs_and_is_sequentials_child():
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    net = nn.Sequential(CROSS, nn.Linear(4))
    params, state = net.init(KEY, x, context)
    assert net(params, x, context).shape == (2, 3, 4)
    assert list(params["0"]) == ["query", "key", "value"]
    y, _ = net.apply(params, state, x, context, key=KEY, train=True)
    again, _ = net.apply(params, state, x, context, key=KEY, train=True)
    other, _ = net.apply(params, state, x, context, key=random.key(1), train=True)
    assert torch.equal(y, again)
    assert not torch.equal(y, other)


def test_block_ties_a_weight_as_one_leaf():
    def tied(m, x):
        return F.linear(torch.tanh(m.wte(x)), m.wte.params["weight"].T)

    net = nn.Block(tied, wte=nn.Linear(3, bias=False))
    x = double(5, 4)
    params, _ = net.init(KEY, x)
    assert list(tree.paths(params)) == ["wte.weight"]
    w = params["wte"]["weight"].clone().requires_grad_()
    expected = torch.autograd.grad(F.linear(torch.tanh(F.linear(x, w)), w.T).square().sum(), w)[0]
    ours = grad(lambda p: net(p, x).square().sum())(params)["wte"]["weight"]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_block_with_a_training_only_head_and_state_threading():
    def f(m, x):
        h = m.norm(m.norm(x))
        return (h, m.head(h)) if m.train else h

    net = nn.Block(f, head=nn.Linear(2), norm=nn.BatchNorm())
    x = double(6, 3)
    params, state = net.init(KEY, x)
    assert list(params) == ["head", "norm"]
    (h, aux), new = net.apply(params, state, x, train=True)
    assert aux.shape == (6, 2)
    module = torch.nn.BatchNorm1d(3).double()
    torch.testing.assert_close(h, module(module(x)))
    torch.testing.assert_close(new["norm"]["running_mean"], module.running_mean)
    torch.testing.assert_close(new["norm"]["running_var"], module.running_var)
    assert net.apply(params, new, x)[1] == new


def test_a_layer_called_twice_draws_twice():
    net = nn.Block(lambda m, x: (m.drop(x), m.drop(x)), drop=nn.Dropout(0.5))
    params, state = net.init(KEY, torch.ones(100))
    (a, b), _ = net.apply(params, state, torch.ones(100), key=KEY, train=True)
    assert not torch.equal(a, b)
    # Turn 1 of a child must not meet child 1 of turn 0.
    body = nn.Parallel(nn.Dropout(0.5), nn.Parallel(nn.Dropout(0.5)))
    net = nn.Block(lambda m, x: (m.body(x), m.body(x)), body=body)
    params, state = net.init(KEY, torch.ones(100))
    ((a, (b,)), (c, (d,))), _ = net.apply(params, state, torch.ones(100), key=KEY, train=True)
    masks = [a, b, c, d]
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_functions_may_close_over_tensors():
    position = torch.arange(3.0)
    net = nn.Sequential(nn.Linear(3), lambda x: x + position, lambda x: x * torch.arange(3))
    x = torch.randn(2, 4)
    params, _ = net.init(KEY, x)
    expected = (F.linear(x, *params["0"].values()) + position) * position
    torch.testing.assert_close(net(params, x), expected)
    block = nn.Block(lambda m, x: m.a(x + position), a=nn.Linear(2))
    assert block(block.init(KEY, x[:, :3])[0], x[:, :3]).shape == (2, 2)


def test_batch_norm_starts_from_one_example_and_keeps_float32_statistics():
    net = nn.Sequential(nn.Linear(3), nn.BatchNorm())
    params, state = net.init(KEY, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert params["1"]["weight"].dtype == torch.bfloat16
    assert state["1"]["running_mean"].dtype == torch.float32
    with pytest.raises(ValueError, match="more than one value per channel"):
        net.apply(params, state, torch.zeros(1, 4, dtype=torch.bfloat16), train=True)


def test_dropout_keeps_the_mean_and_is_the_identity_in_evaluation():
    x = torch.ones(200, 200)
    y, _ = nn.Dropout(0.3).apply({}, {}, x, key=KEY, train=True)
    assert set(y.unique().tolist()) == {0.0, x[0, 0].div(0.7).item()}
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert nn.Dropout(0.3)({}, x) is x
    assert not nn.Dropout(1.0).apply({}, {}, x, key=KEY, train=True)[0].any()
    with pytest.raises(ValueError, match="Dropout needs a key in training"):
        nn.Dropout(0.3).apply({}, {}, x, train=True)
    with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\], got 1\.5"):
        nn.Dropout(1.5)


def test_keys_are_folded_only_where_they_are_used():
    assert not nn.Sequential(nn.Linear(3), nn.relu).uses_key
    assert nn.Sequential(nn.Linear(3), nn.Sequential(nn.relu, nn.Dropout())).uses_key
    net = nn.Sequential(nn.Linear(3), nn.Dropout(0.5))
    x = torch.ones(1, 4)
    params, state = net.init(KEY, x)
    y, _ = net.apply(params, state, x, key=KEY, train=True)
    h = nn.Linear(3)(params["0"], x)
    expected, _ = nn.Dropout(0.5).apply({}, {}, h, key=random.fold_in(KEY, 1), train=True)
    assert torch.equal(y, expected)


def test_custom_layer_and_partial():
    @dataclasses.dataclass(frozen=True)
    class Scale(nn.Layer):
        start: float = 1.0
        uses_key = False

        def init(self, key, x):
            return {"weight": torch.full((x.shape[-1],), self.start, device=key.device)}, {}

        def apply(self, params, state, x, *, key=None, train=False):
            return params["weight"] * x, state

    net = nn.Sequential(Scale(2.0), functools.partial(nn.leaky_relu, negative_slope=0.5))
    params, _ = net.init(KEY, torch.zeros(1, 3))
    torch.testing.assert_close(net(params, torch.tensor([[1.0, -1.0, 0.0]])), torch.tensor([[2.0, -1.0, 0.0]]))


def test_printing():
    assert repr(nn.Conv2d(6, 5, padding="same")) == "Conv2d(6, 5, padding='same')"
    assert repr(models.mlp((8,))) == "Sequential(Flatten(), Linear(8), relu, Linear(10))"
    assert repr(nn.Sequential(functools.partial(nn.leaky_relu, negative_slope=0.2))) == (
        "Sequential(leaky_relu(negative_slope=0.2))"
    )
    shown = repr(models.lenet5())
    assert shown.startswith("Sequential({\n    'conv1': Conv2d(6, 5),\n")
    assert eval(shown, {**vars(nn)}) == models.lenet5()
    deep = nn.Sequential(nn.Residual(nn.Sequential(*[nn.Linear(100)] * 9)), nn.relu)
    assert eval(repr(deep), {**vars(nn)}) == deep
    assert hash(deep) == hash(eval(repr(deep), {**vars(nn)}))


def test_errors_name_the_layer_and_its_path():
    net = models.lenet5()
    params, _ = net.init(KEY, torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"layer 'fc1' Linear\(120\): .*'weight' has shape \(120, 400\).*\(120, 256\)"):
        net(params, torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"layer 'conv1' Conv2d\(6, 5\): .*\(6, 1, 5, 5\).*\(6, 3, 5, 5\)"):
        net(params, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"layer 'conv1' .*expected an input of shape \(N, C, H, W\)"):
        net(params, torch.zeros(32, 32))
    with pytest.raises(ValueError, match=r"layer '0\.body\.1' Linear\(2\)"):
        deep = nn.Sequential(nn.Residual(nn.Sequential(nn.relu, nn.Linear(2))))
        deep(deep.init(KEY, torch.zeros(1, 2))[0], torch.zeros(1, 3))

    missing = tree.at(params, "fc2").set({"weight": params["fc2"]["weight"]})
    with pytest.raises(ValueError, match="layer 'fc2' .*no leaf 'bias'"):
        net(missing, torch.zeros(1, 1, 32, 32))
    without = {name: value for name, value in params.items() if name != "fc2"}
    with pytest.raises(ValueError, match="layer 'fc2' .*no leaf 'weight'"):
        net(without, torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="layer 'fc2' .*unexpected leaf 'scale'"):
        net(tree.at(params, "fc2").set({**params["fc2"], "scale": torch.ones(1)}), torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="Sequential: params has an unexpected entry 'fc4'"):
        net({**params, "fc4": params["fc3"]}, torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"layer 'conv2' .*'bias' has shape \(1,\)"):
        net(tree.at(params, "conv2.bias").set(torch.zeros(1)), torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="params must be a dict"):
        net(params["fc1"]["weight"], torch.zeros(1, 1, 32, 32))


def test_other_errors_say_what_to_do():
    norm = nn.BatchNorm()
    params, state = norm.init(KEY, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"BatchNorm needs its state: net\(params, x, state=state\)"):
        norm(params, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm.apply(params, state, torch.zeros(1, 3), train=True)
    with pytest.raises(ValueError, match="f never calls the layer 'spare'"):
        nn.Block(lambda m, x: m.a(x), a=nn.Linear(2), spare=nn.Linear(2)).init(KEY, torch.zeros(1, 2))
    with pytest.raises(AttributeError, match=r"no layer 'b'; its layers are \['a'\]"):
        nn.Block(lambda m, x: m.b(x), a=nn.Linear(2)).init(KEY, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"m\.a\.params is read before"):
        nn.Block(lambda m, x: x @ m.a.params["weight"], a=nn.Linear(2)).init(KEY, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="cannot be called 'train'"):
        nn.Block(lambda m, x: x, train=nn.Linear(2))
    with pytest.raises(TypeError, match="'0' is the torch module Linear"):
        nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="'0' must be a layer or a pure tensor function, got 3"):
        nn.Sequential(3)
    with pytest.raises(TypeError, match=r"'2' must be .* got 'rleu'; activations are functions such as nn.relu"):
        models.mlp(activation="rleu")
    with pytest.raises(ValueError, match="non-empty string without dots and stars, got 'a.b'"):
        nn.Sequential({"a.b": nn.relu})
    with pytest.raises(ValueError, match="Sequential needs at least one layer"):
        nn.Sequential()
    with pytest.raises(TypeError, match=r"leaf 'weight' must be a tensor .*got <function"):
        nn.Linear(2, weight_init=nn.initializers.he_normal).init(KEY, torch.zeros(1, 2))
    with pytest.raises(TypeError, match="Linear: bias must be True or False, got 128"):
        nn.Linear(64, 128)
    with pytest.raises(TypeError, match="init: x must be a tensor, an example of the input, got int"):
        nn.Sequential(nn.Linear(2)).init(KEY, (4, 3))
    with pytest.raises(TypeError, match="Residual: adds tensors, got tuple"):
        nn.Residual(nn.Parallel(nn.relu)).init(KEY, torch.zeros(1, 2))
        nn.Residual(nn.Parallel(nn.relu))({}, torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"key"):
        nn.Sequential(nn.Linear(2)).init(0, torch.zeros(1, 2))


@pytest.mark.parametrize("draw", [F.dropout, lambda x: x + torch.rand_like(x), lambda x: x * torch.randn(3)])
def test_a_function_that_draws_from_the_global_generator_is_refused(draw):
    with pytest.raises(TypeError, match="layer '1'.*global generator"):
        nn.Sequential(nn.Linear(3), draw).init(KEY, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="global generator"):
        nn.Block(lambda m, x: draw(m.a(x)), a=nn.Linear(3)).init(KEY, torch.zeros(2, 3))


def test_attention_without_dropout_is_not_refused():
    attend = lambda x: F.scaled_dot_product_attention(x, x, x)
    nn.Sequential(nn.Linear(4), attend).init(KEY, torch.zeros(1, 2, 3, 4))


def test_lenet_is_the_notes_network():
    """1-6-16-400-120-84-10, ReLU before pooling as there; same weights, same values and gradients."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(1, 6, 5)
            self.conv2 = torch.nn.Conv2d(6, 16, 5)
            self.fc1 = torch.nn.Linear(16 * 5 * 5, 120)
            self.fc2 = torch.nn.Linear(120, 84)
            self.fc3 = torch.nn.Linear(84, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
            return self.fc3(x)

    x = double(4, 1, 32, 32)
    net, module = models.lenet5(), Net().double()
    params, _ = net.init(KEY, x)
    flat = tree.paths(params)
    assert {n: p.shape for n, p in flat.items()} == {n: p.shape for n, p in module.named_parameters()}
    torch.testing.assert_close(functional_call(module, flat, x), net(params, x), rtol=1e-10, atol=1e-12)
    theirs = grad(lambda p: functional_call(module, p, x).square().sum())(flat)
    ours = tree.paths(grad(lambda p: net(p, x).square().sum())(params))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# ---- named inputs, bare parameters, carries


def masked(m, x, mask=None):
    y = m.fc(x)
    return y if mask is None else torch.where(mask, y, 0.0)


def test_named_inputs_reach_the_layers_that_take_them():
    x, mask = double(2, 3), torch.tensor([[True], [False]])
    inner = nn.Block(masked, fc=nn.Linear(3))
    for net in (
        inner,
        nn.Sequential(inner, nn.Linear(3)),
        nn.Block(lambda m, x, mask: m.inner(x, mask=mask), inner=inner),
        nn.Parallel(inner, inner),
        nn.Residual(inner),
    ):
        params, state = net.init(KEY, x, mask=mask)
        assert tree.leaves(net.init(KEY, x, mask=mask)[0])[0].dtype == torch.float64
        free = net(params, x, mask=torch.ones_like(mask))
        held, _ = net.apply(params, state, x, mask=mask)
        held, free = tree.leaves(held)[0], tree.leaves(free)[0]
        assert torch.equal(held[0], free[0])
        assert not torch.equal(held[1], free[1])
    params, _ = inner.init(KEY, x)
    assert torch.equal(inner(params, x, mask=None), inner(params, x))
    with pytest.raises(TypeError, match="layer '0' Linear\\(3\\): .*unexpected keyword argument 'mask'"):
        nn.Sequential(nn.Linear(3)).init(KEY, x, mask=mask)


def test_a_parameter_is_a_bare_tensor_at_its_name():
    net = nn.Block(lambda m, x: m.fc(x) * m.scale(x) + m.shift(), scale=nn.Parameter((3,), nn.initializers.ones),
                   shift=nn.Parameter((1, 3)), fc=nn.Linear(3))  # fmt: skip
    x = double(2, 4)
    params, _ = net.init(KEY, x)
    assert list(tree.paths(params)) == ["scale", "shift", "fc.weight", "fc.bias"]
    assert (params["scale"].dtype, params["shift"].dtype) == (torch.float64, torch.float32)
    grads = grad(lambda p: net(p, x).sum())(params)
    torch.testing.assert_close(grads["scale"], nn.Linear(3)(params["fc"], x).sum(0))
    with pytest.raises(ValueError, match=r"layer 'scale' .* tensor of shape \(3,\), got one of shape \(4,\)"):
        net({**params, "scale": torch.ones(4)}, x)
    with pytest.raises(ValueError, match=r"layer 'scale' .* must be a tensor of shape \(3,\), got dict"):
        net({"fc": params["fc"]}, x)


def test_sequential_drops_a_carry():
    @dataclasses.dataclass(frozen=True)
    class Sum(nn.Layer):
        uses_key = False
        carries = True

        def apply(self, params, state, x, *, key=None, train=False):
            return (x.cumsum(1), x.sum(1)), state

    net = nn.Sequential(Sum(), nn.Linear(2))
    params, _ = net.init(KEY, double(2, 5, 3))
    assert net(params, double(2, 5, 3)).shape == (2, 5, 2)


def test_names_with_stars_are_refused():
    with pytest.raises(ValueError, match="without dots and stars"):
        nn.Sequential({"*": nn.Linear(2)})


def test_a_dropout_that_drops_nothing_costs_no_key():
    assert not nn.Sequential(nn.Linear(2), nn.Dropout(0.0)).uses_key
    assert nn.Dropout(0.1).uses_key
