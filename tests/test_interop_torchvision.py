"""`interop.from_module` of torchvision's models: their values, states and gradients."""

import pytest
import torch

from fnn import interop, random, tree
from fnn.data._torchvision import torchvision

KEY = random.key(3)


def vision(name):
    models = torchvision().models
    torch.manual_seed(0)
    return {
        "resnet18": lambda: models.resnet18(num_classes=3),
        "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=3, dropout=0.0),
        "vit": lambda: models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3),
        "swin": lambda: models.SwinTransformer(
            [2, 2], 8, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=3
        ),
        "googlenet": lambda: models.GoogLeNet(3, init_weights=False, dropout=0.0, dropout_aux=0.0),
    }[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit", "swin", "googlenet"])
def test_torchvisions_models(name):
    """Values in float32 and float64, the state after a training pass, and the gradient."""
    x = torch.randn(4, 3, 64, 64) if name in ("resnet18", "googlenet") else torch.randn(4, 3, 32, 32)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        module, x = vision(name).to(dtype), x.to(dtype)
        net, params, state = interop.from_module(module)
        first = lambda y: y if isinstance(y, torch.Tensor) else y[0]
        torch.testing.assert_close(first(net(params, x, state=state)), module.eval()(x), rtol=tolerance, atol=tolerance)
    module.train()

    def loss(params):
        y, new = net.apply(params, state, x, key=KEY, train=True)
        return first(y).square().mean(), new

    grads, (value, after) = torch.func.grad_and_value(loss, has_aux=True)(params)
    expected = first(module(x)).square().mean()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    buffers = dict(module.named_buffers())
    for path, leaf in tree.paths(after).items():
        torch.testing.assert_close(leaf, buffers[path], rtol=1e-9, atol=1e-9)
    for path, leaf in tree.paths(grads).items():
        other = module.get_parameter(path).grad
        torch.testing.assert_close(leaf, torch.zeros_like(leaf) if other is None else other, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_stochastic_depth_of_swin_follows_the_key():
    models = torchvision().models
    module = models.SwinTransformer([2, 2], 8, [2], [2], [4, 4], stochastic_depth_prob=0.5, num_classes=3)
    net, params, state = interop.from_module(module)
    x = torch.randn(2, 3, 16, 16)
    y, z, w = (net.apply(params, state, x, key=key, train=True)[0] for key in (KEY, KEY, random.key(9)))
    assert torch.equal(y, z)
    assert not torch.equal(y, w)
