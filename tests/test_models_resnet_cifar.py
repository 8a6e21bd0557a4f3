"""resnet20 against the paper's description, written in torch.nn."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fnn import interop, losses, models, random, tree

WIDTH = 4


class Block(torch.nn.Module):
    """Two convolutions; where the image halves, the shortcut pads the missing channels with zeros (option A)."""

    def __init__(self, arriving, leaving):
        super().__init__()
        self.stride = 1 if arriving == leaving else 2
        self.conv1 = torch.nn.Conv2d(arriving, leaving, 3, self.stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(leaving)
        self.conv2 = torch.nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(leaving)

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = torch.zeros_like(h)
        new = h.shape[1] - x.shape[1]
        short[:, new // 2 : new // 2 + x.shape[1]] = F.max_pool2d(x, 1, self.stride)
        return F.relu(h + short)


class ResNet20(torch.nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        for stage, (arriving, leaving) in enumerate(itertools.pairwise(widths), 1):
            blocks = Block(arriving, leaving), Block(leaving, leaving), Block(leaving, leaving)
            setattr(self, f"layer{stage}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def test_it_has_the_paper_s_number_of_parameters():
    params, _ = models.resnet20().init(random.key(0, device="meta"), torch.zeros(1, 3, 32, 32))
    assert tree.size(params) == sum(p.numel() for p in ResNet20(10, 16).parameters())
    assert round(tree.size(params) / 1e6, 2) == 0.27  # table 6


@pytest.mark.parametrize("train", [False, True])
def test_outputs_gradients_and_statistics_are_torchs(train):
    module = ResNet20(5, WIDTH).double().train(train)
    net = models.resnet20(5, WIDTH)
    x, labels = random.normal(random.key(1), (6, 3, 16, 16), torch.float64), torch.arange(6) % 5
    params, state = net.init(random.key(0), x)
    module.load_state_dict(interop.to_state_dict(params, state))

    def loss(params):
        logits, new = net.apply(params, state, x, train=train)
        return losses.cross_entropy(logits, labels), new

    grads, new = torch.func.grad(loss, has_aux=True)(params)
    F.cross_entropy(module(x), labels).backward()
    wanted = {name: p.grad for name, p in module.named_parameters()}
    assert tree.paths(grads).keys() == wanted.keys()
    for path, grad in tree.paths(grads).items():
        torch.testing.assert_close(grad, wanted[path])
    for path, leaf in tree.paths(new).items():
        torch.testing.assert_close(leaf, module.get_buffer(path))


def test_it_starts_like_the_other_residual_networks():
    params, _ = models.resnet20().init(random.key(0), torch.zeros(1, 3, 8, 8))
    weight = params["layer3"]["1"]["conv1"]["weight"]
    assert float(weight.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
