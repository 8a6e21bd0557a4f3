"""ResNet-18 and ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fnn import nn
from fnn.nn.initializers import variance_scaling


def resnet18(classes: int = 1000, width: int = 64) -> nn.Sequential:
    """Four stages of two blocks of two convolutions; input (N, C, H, W) -> logits (N, classes).

    `width` is the number of channels of the first stage; each later one doubles it and halves the image. The stem
    halves it twice, so the last stage sees H / 32 by W / 32. Names, shapes and initial distributions are those of
    `torchvision.models.resnet18`. It has BatchNorm, so it needs its state.
    Source: He et al., Deep residual learning for image recognition, 2016, https://arxiv.org/abs/1512.03385.

    Example:
        >>> from fnn import models, random
        >>> net = models.resnet18(classes=10, width=4)
        >>> params, state = net.init(random.key(0), torch.zeros(1, 3, 32, 32))
        >>> net(params, torch.zeros(2, 3, 32, 32), state=state).shape
        torch.Size([2, 10])
        >>> params["layer2"]["0"]["downsample"]["0"]["weight"].shape
        torch.Size([8, 4, 1, 1])
    """
    return _resnet(_basic, (2, 2, 2, 2), 1, classes, width)


def resnet50(classes: int = 1000, width: int = 64) -> nn.Sequential:
    """Four stages of 3, 4, 6 and 3 bottleneck blocks; input (N, C, H, W) -> logits (N, classes).

    A block narrows to `width` channels (twice that in each later stage), convolves, and widens fourfold; the stride
    is in its middle convolution. Names, shapes and initial distributions are those of `torchvision.models.resnet50`.
    Source: He et al., Deep residual learning for image recognition, 2016, https://arxiv.org/abs/1512.03385.

    Example:
        >>> from fnn import models, random
        >>> params, state = models.resnet50().init(random.key(0, device="meta"), torch.zeros(1, 3, 224, 224))
        >>> f"{fnn.tree.size(params):,}"
        '25,557,032'
    """
    return _resnet(_bottleneck, (3, 4, 6, 3), 4, classes, width)


def _resnet(block: Any, stages: Sequence[int], expansion: int, classes: int, width: int) -> nn.Sequential:
    layers: dict[str, Any] = {
        "conv1": _conv(width, 7, 2),
        "bn1": nn.BatchNorm(),
        "relu": nn.relu,
        "maxpool": nn.MaxPool2d(3, 2, padding=1),
    }
    arriving = width
    for index, blocks in enumerate(stages):
        channels, stride = width * 2**index, 1 if index == 0 else 2
        leaving = channels * expansion
        shortcut = _identity
        if stride != 1 or arriving != leaving:
            shortcut = nn.Sequential(_conv(leaving, 1, stride), nn.BatchNorm())
        first, rest = block(channels, stride, shortcut), block(channels, 1, _identity)
        layers[f"layer{index + 1}"] = nn.Sequential(first, *[rest] * (blocks - 1))
        arriving = leaving
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(classes)}
    return nn.Sequential(layers)


def _basic(channels: int, stride: int, shortcut: Any) -> nn.Block:
    def basic(m: Any, x: Tensor) -> Tensor:
        h = nn.relu(m.bn1(m.conv1(x)))
        return nn.relu(m.bn2(m.conv2(h)) + m.downsample(x))

    return nn.Block(
        basic,
        conv1=_conv(channels, 3, stride),
        bn1=nn.BatchNorm(),
        conv2=_conv(channels, 3),
        bn2=nn.BatchNorm(),
        downsample=shortcut,
    )


def _bottleneck(channels: int, stride: int, shortcut: Any) -> nn.Block:
    def bottleneck(m: Any, x: Tensor) -> Tensor:
        h = nn.relu(m.bn1(m.conv1(x)))
        h = nn.relu(m.bn2(m.conv2(h)))
        return nn.relu(m.bn3(m.conv3(h)) + m.downsample(x))

    return nn.Block(
        bottleneck,
        conv1=_conv(channels, 1),
        bn1=nn.BatchNorm(),
        conv2=_conv(channels, 3, stride),
        bn2=nn.BatchNorm(),
        conv3=_conv(4 * channels, 1),
        bn3=nn.BatchNorm(),
        downsample=shortcut,
    )


def _conv(channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    weight_init = variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv2d(channels, size, stride, padding=size // 2, bias=False, weight_init=weight_init)


def _identity(x: Tensor) -> Tensor:
    return x
