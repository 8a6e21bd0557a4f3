"""ResNet-20, the small one for 32 x 32 images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fnn import nn
from fnn.nn.initializers import variance_scaling


def resnet20(classes: int = 10, width: int = 16) -> nn.Sequential:
    """Three stages of three blocks of two 3 x 3 convolutions; input (N, C, H, W) -> logits (N, classes).

    `width` is the number of channels of the first stage; each later one doubles it and halves the image, which the
    stem leaves as it is. Where a stage begins, the shortcut has no parameters: it takes every other pixel, and the new
    channels of what it adds are zero. It has BatchNorm, so it needs its state.

    Names are those of `resnet18`: ``conv1.weight`` (width, C, 3, 3), ``bn1``, ``layer1.0.conv1.weight``, ...,
    ``layer3.2.bn2``, ``fc.weight`` (classes, 4 * width); so are the initial distributions.
    Source: He et al., Deep residual learning for image recognition, 2016, section 4.2,
    https://arxiv.org/abs/1512.03385.

    Example:
        >>> from fnn import models, random
        >>> params, state = models.resnet20().init(random.key(0), torch.zeros(1, 3, 32, 32))
        >>> f"{fnn.tree.size(params):,}"
        '269,722'
        >>> models.resnet20()(params, torch.zeros(2, 3, 32, 32), state=state).shape
        torch.Size([2, 10])
    """
    layers: dict[str, Any] = {"conv1": _conv(width), "bn1": nn.BatchNorm(), "relu": nn.relu}
    for index in range(3):
        channels = width * 2**index
        first = _block(channels, 1 if index == 0 else 2)
        layers[f"layer{index + 1}"] = nn.Sequential(first, *[_block(channels)] * 2)
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(classes)}
    return nn.Sequential(layers)


def _block(channels: int, stride: int = 1) -> nn.Block:
    def block(m: Any, x: Tensor) -> Tensor:
        h = m.bn2(m.conv2(nn.relu(m.bn1(m.conv1(x)))))
        if stride == 1:
            return nn.relu(h + x)
        new = channels - x.shape[1]
        return nn.relu(h + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, new // 2, new - new // 2)))

    return nn.Block(block, conv1=_conv(channels, stride), bn1=nn.BatchNorm(), conv2=_conv(channels), bn2=nn.BatchNorm())


def _conv(channels: int, stride: int = 1) -> nn.Conv2d:
    weight_init = variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv2d(channels, 3, stride, padding=1, bias=False, weight_init=weight_init)
