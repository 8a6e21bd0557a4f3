"""fnn.models against torchvision: names, shapes, starting distributions, and one step of SGD from the same weights."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fnn import interop, losses, models, nn, optim, random, train, tree
from fnn.data._torchvision import torchvision

KEY = random.key(0)
META = random.key(0, device="meta")
CLASSES = 7


def vgg():
    """torchvision's, with narrow hidden linear layers: of the usual width they hold 120 million numbers."""
    with torch.device("meta"):
        module = torchvision().models.vgg11(init_weights=False, dropout=0.0)
    module.features = torchvision().models.vgg.make_layers(torchvision().models.vgg.cfgs["A"])
    for index, (wide, narrow) in {0: (512 * 7 * 7, 8), 3: (8, 8), 6: (8, CLASSES)}.items():
        module.classifier[index] = torch.nn.Linear(wide, narrow)
    return module


def googlenet():
    options = {"init_weights": False, "transform_input": True, "dropout": 0.0, "dropout_aux": 0.0}
    return torchvision().models.googlenet(num_classes=CLASSES, **options)


def vit():
    """vit_b_16 in widths, not in depth and image."""
    return torchvision().models.VisionTransformer(32, 16, 2, 12, 768, 3072, num_classes=CLASSES)


PAIRS = {
    "vgg11": (models.vgg11(CLASSES, 0.0, hidden=8), vgg, (2, 3, 32, 32)),
    "googlenet": (models.googlenet(CLASSES, 0.0, 0.0, transform_input=True), googlenet, (8, 3, 64, 64)),
    "resnet18": (
        models.resnet18(CLASSES),
        lambda: torchvision().models.resnet18(num_classes=CLASSES),
        (4, 3, 48, 48),
    ),
    "resnet50": (
        models.resnet50(CLASSES),
        lambda: torchvision().models.resnet50(num_classes=CLASSES),
        (3, 3, 40, 40),
    ),
    "vit": (models.vit(CLASSES, image_size=32, layers=2), vit, (3, 3, 32, 32)),
}


def described(named):
    return [(name, tuple(leaf.shape)) for name, leaf in named if not name.endswith("num_batches_tracked")]


def total_loss(outputs, labels, cross_entropy):
    """The paper's: a third output or none."""
    if isinstance(outputs, tuple):
        logits, aux2, aux1 = (cross_entropy(logits, labels) for logits in outputs)
        return logits + 0.3 * (aux1 + aux2)
    return cross_entropy(outputs, labels)


FULL = {
    "vgg11": "vgg11",
    "vgg16": "vgg16",
    "googlenet": "googlenet",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vit": "vit_b_16",
}


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        options = {"init_weights": False} if name in ("vgg11", "vgg16", "googlenet") else {}
        module = getattr(torchvision().models, FULL[name])(**options)
    params, state = getattr(models, name)().init(META, torch.zeros(1, 3, 224, 224))
    assert described(tree.paths(params).items()) == described(module.named_parameters())
    assert described(tree.paths(state).items()) == described(module.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in PAIRS] + [(name, torch.float32) for name in PAIRS if name != "resnet50"],
    ids=str,
)
def test_forward_and_one_step_of_sgd_equal_torchvisions(name, dtype):
    # Where float32 takes another side of a ReLU or a maximum than float64, as it does in torchvision's too, a gradient
    # is wrong by up to 0.1; so float32 takes a smaller step.
    tolerance, lr = (1e-4, 1e-3) if dtype == torch.float32 else (1e-10, 0.1)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    net, make_module, shape = PAIRS[name]
    torch.manual_seed(2)
    module = make_module().double()
    with torch.no_grad():
        for leaf in module.parameters():
            if not leaf.any():  # a head that starts at zero would hide what comes before it
                leaf.normal_(std=0.05)
    x, labels = torch.randn(shape, dtype=torch.float64).to(dtype), torch.randint(CLASSES, shape[:1])
    module = module.to(dtype)
    copied = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    params, state = interop.from_state_dict(copied, *net.init(META, x))
    close(net(params, x, state=state), module.eval()(x).detach())

    def loss_fn(params, state, batch, key):
        outputs, state = net.apply(params, state, batch[0], key=key, train=True)
        return total_loss(outputs, batch[1], losses.cross_entropy), (state, {})

    optimizer = optim.sgd(lr)
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state, metrics = step(train.TrainState.create(params, optimizer, KEY, state=state), (x, labels))

    theirs = torch.optim.SGD(module.parameters(), lr)
    loss = total_loss(module.train()(x), labels, F.cross_entropy)
    loss.backward()
    theirs.step()
    close(metrics["loss"], loss.detach())
    before = tree.paths(params) | tree.paths(state)
    after = tree.paths(train_state.params) | tree.paths(train_state.state)
    expected = dict(module.named_parameters()) | dict(module.named_buffers())
    for path, leaf in after.items():
        close(leaf, expected[path].detach())
        assert not torch.equal(leaf, before[path])


STARTS = {
    "resnet18": (models.resnet18(CLASSES), lambda: torchvision().models.resnet18(num_classes=CLASSES)),
    "vit": (
        models.vit(CLASSES, 32, layers=1),
        lambda: torchvision().models.VisionTransformer(32, 16, 1, 12, 768, 3072),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_starting_distributions_are_torchvisions(name):
    """By the deviation and, which tells a uniform from a normal, by the fourth power of it."""
    net, make_module = STARTS[name]
    torch.manual_seed(0)
    theirs = dict(make_module().named_parameters())
    params, _ = net.init(KEY, torch.zeros(2, 3, 32, 32))
    for path, leaf in tree.paths(params).items():
        other = theirs[path].detach()
        if leaf.numel() < 1000:
            torch.testing.assert_close(leaf.std(), other.std(), rtol=0.8, atol=1e-8)
            continue
        torch.testing.assert_close(leaf.std(), other.std(), rtol=0.1, atol=0)
        torch.testing.assert_close(_kurtosis(leaf), _kurtosis(other), rtol=0.2, atol=0.0)


@pytest.mark.slow
def test_vgg_starts_as_torchvisions():
    params, _ = models.vgg11(hidden=64).init(KEY, torch.zeros(1, 3, 32, 32))
    for path, leaf in tree.paths(params).items():
        expected = 0.01 if path.startswith("classifier") else (2 / (9 * len(leaf))) ** 0.5
        assert float(leaf.std()) == pytest.approx(0.0 if path.endswith("bias") else expected, rel=0.1)


def test_googlenet_starts_as_torchvisions():
    """Normal of deviation 0.01, whose cut at 200 deviations is none; the biases are torch's."""
    net = nn.Sequential(models._googlenet._inception(8, 8, 8, 8, 8, 8), models._googlenet._head(CLASSES, 0.7))
    params, _ = net.init(KEY, torch.zeros(2, 64, 8, 8))
    for path, leaf in tree.paths(params).items():
        if leaf.dim() > 1:
            assert float(leaf.std()) == pytest.approx(0.01, rel=0.1)
            assert abs(float(_kurtosis(leaf)) - 3) < 0.8
        elif "fc" in path:
            assert float(leaf.abs().max()) == pytest.approx(2048**-0.5 if "fc1" in path else 1024**-0.5, rel=0.3)


def _kurtosis(x):
    return (x - x.mean()).pow(4).mean() / x.var().square().clamp(min=1e-30)


def test_vits_errors():
    with pytest.raises(ValueError, match="vit: patch_size=5 must divide image_size=32"):
        models.vit(image_size=32, patch_size=5)
    net = models.vit(3, 8, 4, 1, 2, 4, 8)
    params, _ = net.init(KEY, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"vit: expected images \(N, C, 8, 8\), got \(2, 3, 8, 12\)"):
        net(params, torch.zeros(2, 3, 8, 12))
    with pytest.raises(ValueError, match="num_heads=3 must divide"):
        models.vit(3, 8, 4, 1, 3, 4, 8).init(KEY, torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
def test_googlenet_gives_its_heads_in_training_only():
    net = models.googlenet(3)
    x = torch.zeros(2, 3, 32, 32)
    params, state = net.init(random.key(0, device="meta"), x)
    params, state = tree.map(lambda leaf: torch.zeros(leaf.shape), (params, state))
    assert net(params, x, state=state).shape == (2, 3)
    outputs, _ = net.apply(params, state, x, key=KEY, train=True)
    assert type(outputs) is models.GoogLeNetOutputs
    assert [tuple(logits.shape) for logits in outputs] == [(2, 3)] * 3
    alone = models.googlenet(3, aux_logits=False)
    without = {name: leaf for name, leaf in params.items() if not name.startswith("aux")}
    rest = {name: leaf for name, leaf in state.items() if not name.startswith("aux")}
    assert alone.apply(without, rest, x, key=KEY, train=True)[0].shape == (2, 3)
