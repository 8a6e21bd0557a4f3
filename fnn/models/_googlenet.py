"""GoogLeNet."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import nn
from fnn.nn.initializers import normal


class GoogLeNetOutputs(NamedTuple):
    """What `googlenet` gives in training: the logits, and those of the two auxiliary heads, all (N, classes)."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


def googlenet(
    classes: int = 1000,
    dropout: float = 0.2,
    aux_dropout: float = 0.7,
    *,
    aux_logits: bool = True,
    transform_input: bool = False,
) -> nn.Block:
    """Nine Inception modules, with BatchNorm; input (N, C, H, W) -> logits (N, classes).

    With `aux_logits`, training gives `GoogLeNetOutputs` instead: two heads on inner layers, whose losses the paper
    adds with weight 0.3 each. Evaluation gives the logits alone. `dropout` is that of the last layer, `aux_dropout`
    that of the heads. H and W are at least 15.

    Names, shapes and initial distributions are those of `torchvision.models.googlenet`. Its pretrained weights saw
    images scaled in another way: `transform_input` turns images normalised with ImageNet's means and deviations,
    (N, 3, H, W), into those, (x - 0.5) / 0.5.
    Source: Szegedy et al., Going deeper with convolutions, 2015, https://arxiv.org/abs/1409.4842; the third branch of
    a module convolves with 3 x 3 as torchvision's does, not 5 x 5.

    Example:
        >>> from fnn import models, random
        >>> net = models.googlenet(classes=10)
        >>> params, state = net.init(random.key(0, device="meta"), torch.zeros(1, 3, 64, 64))
        >>> params["inception4a"]["branch2"]["0"]["conv"]["weight"].shape
        torch.Size([96, 480, 1, 1])
    """

    def forward(m: Any, x: Tensor) -> Tensor | GoogLeNetOutputs:
        if transform_input:
            x = _transform_input(x)
        x = m.maxpool1(m.conv1(x))
        x = m.maxpool2(m.conv3(m.conv2(x)))
        x = m.maxpool3(m.inception3b(m.inception3a(x)))
        from_4a = m.inception4a(x)
        from_4d = m.inception4d(m.inception4c(m.inception4b(from_4a)))
        x = m.maxpool4(m.inception4e(from_4d))
        logits = m.fc(m.dropout(m.avgpool(m.inception5b(m.inception5a(x)))))
        if not (aux_logits and m.train):
            return logits
        return GoogLeNetOutputs(logits, m.aux2(from_4d), m.aux1(from_4a))

    heads = {"aux1": _head(classes, aux_dropout), "aux2": _head(classes, aux_dropout)} if aux_logits else {}
    return nn.Block(
        forward,
        conv1=_conv(64, 7, stride=2, padding=3),
        maxpool1=nn.MaxPool2d(3, 2, ceil_mode=True),
        conv2=_conv(64, 1),
        conv3=_conv(192, 3, padding=1),
        maxpool2=nn.MaxPool2d(3, 2, ceil_mode=True),
        inception3a=_inception(64, 96, 128, 16, 32, 32),
        inception3b=_inception(128, 128, 192, 32, 96, 64),
        maxpool3=nn.MaxPool2d(3, 2, ceil_mode=True),
        inception4a=_inception(192, 96, 208, 16, 48, 64),
        inception4b=_inception(160, 112, 224, 24, 64, 64),
        inception4c=_inception(128, 128, 256, 24, 64, 64),
        inception4d=_inception(112, 144, 288, 32, 64, 64),
        inception4e=_inception(256, 160, 320, 32, 128, 128),
        maxpool4=nn.MaxPool2d(2, 2, ceil_mode=True),
        inception5a=_inception(256, 160, 320, 32, 128, 128),
        inception5b=_inception(384, 192, 384, 48, 128, 128),
        **heads,
        avgpool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        dropout=nn.Dropout(dropout),
        fc=_linear(classes),
    )


def _inception(one: int, three_from: int, three: int, five_from: int, five: int, pool: int) -> nn.Block:
    """Four views of one input beside each other; the numbers are channels, in the paper's order."""
    branches = {
        "branch1": _conv(one, 1),
        "branch2": nn.Sequential(_conv(three_from, 1), _conv(three, 3, padding=1)),
        "branch3": nn.Sequential(_conv(five_from, 1), _conv(five, 3, padding=1)),
        "branch4": nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), _conv(pool, 1)),
    }

    def inception(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.branch1(x), m.branch2(x), m.branch3(x), m.branch4(x)], 1)

    return nn.Block(inception, **branches)


def _head(classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        {
            "avgpool": nn.AdaptiveAvgPool2d(4),
            "conv": _conv(128, 1),
            "flatten": nn.Flatten(),
            "fc1": _linear(1024),
            "relu": nn.relu,
            "dropout": nn.Dropout(dropout),
            "fc2": _linear(classes),
        }
    )


def _conv(channels: int, size: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    conv = nn.Conv2d(channels, size, stride, padding, bias=False, weight_init=normal(0.01))
    return nn.Sequential({"conv": conv, "bn": nn.BatchNorm(eps=1e-3), "relu": nn.relu})


def _linear(width: int) -> nn.Linear:
    return nn.Linear(width, weight_init=normal(0.01))


def _transform_input(x: Tensor) -> Tensor:
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    return x * (std / 0.5).reshape(3, 1, 1) + ((mean - 0.5) / 0.5).reshape(3, 1, 1)
