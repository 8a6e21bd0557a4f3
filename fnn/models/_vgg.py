"""VGG-11 and VGG-16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fnn import nn
from fnn.nn.initializers import normal, variance_scaling, zeros


def vgg11(classes: int = 1000, dropout: float = 0.5, hidden: int = 4096) -> nn.Sequential:
    """Eight convolutions in five stages, then three linear layers; input (N, C, H, W) -> logits (N, classes).

    H and W are at least 32. `hidden` is the width of the two hidden linear layers, `dropout` what they drop in
    training. Names, shapes and initial distributions are those of `torchvision.models.vgg11`.
    Source: Simonyan and Zisserman, Very deep convolutional networks, 2015, https://arxiv.org/abs/1409.1556, column A.

    Example:
        >>> from fnn import models, random
        >>> net = models.vgg11(classes=10, hidden=8)
        >>> params, _ = net.init(random.key(0, device="meta"), torch.zeros(1, 3, 32, 32))
        >>> params["features"]["0"]["weight"].shape, params["classifier"]["6"]["weight"].shape
        (torch.Size([64, 3, 3, 3]), torch.Size([10, 8]))
    """
    return _vgg((1, 1, 2, 2, 2), classes, dropout, hidden)


def vgg16(classes: int = 1000, dropout: float = 0.5, hidden: int = 4096) -> nn.Sequential:
    """Thirteen convolutions in five stages, then three linear layers; input (N, C, H, W) -> logits (N, classes).

    The arguments are those of `vgg11`; names and shapes are those of `torchvision.models.vgg16`.
    Source: Simonyan and Zisserman, Very deep convolutional networks, 2015, https://arxiv.org/abs/1409.1556, column D.

    Example:
        >>> from fnn import models, random
        >>> params, _ = models.vgg16().init(random.key(0, device="meta"), torch.zeros(1, 3, 224, 224))
        >>> f"{fnn.tree.size(params):,}"
        '138,357,544'
    """
    return _vgg((2, 2, 3, 3, 3), classes, dropout, hidden)


def _vgg(stages: Sequence[int], classes: int, dropout: float, hidden: int) -> nn.Sequential:
    def linear(width: int) -> nn.Linear:
        return nn.Linear(width, weight_init=normal(0.01), bias_init=zeros)

    features: list[Any] = []
    for channels, convolutions in zip((64, 128, 256, 512, 512), stages, strict=True):
        for _ in range(convolutions):
            weight_init = variance_scaling(2.0, "fan_out", "normal")
            features += [nn.Conv2d(channels, 3, padding=1, weight_init=weight_init, bias_init=zeros), nn.relu]
        # The maximum commutes with ReLU, so pooling goes before the last one, which then has a quarter of the work.
        features.insert(-1, nn.MaxPool2d(2))
    return nn.Sequential(
        {
            "features": nn.Sequential(*features),
            "avgpool": nn.AdaptiveAvgPool2d(7),
            "flatten": nn.Flatten(),
            "classifier": nn.Sequential(
                linear(hidden),
                nn.relu,
                nn.Dropout(dropout),
                linear(hidden),
                nn.relu,
                nn.Dropout(dropout),
                linear(classes),
            ),
        }
    )
