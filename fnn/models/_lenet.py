"""LeNet-5."""

from __future__ import annotations

from fnn import nn


def lenet5(classes: int = 10) -> nn.Sequential:
    """Two convolutions with max pooling, then 400-120-84-classes; input (N, C, 32, 32) -> logits (N, classes).

    Pooling comes before ReLU: the maximum commutes with a monotone function, so values and gradients are those of
    the usual order, and ReLU runs on a quarter of the elements. Source: LeCun et al., 1998, with max pooling and ReLU.

    Example:
        >>> import torch
        >>> from fnn import random
        >>> params, _ = lenet5().init(random.key(0), torch.zeros(1, 1, 32, 32))
        >>> params["fc1"]["weight"].shape
        torch.Size([120, 400])
    """
    return nn.Sequential(
        {
            "conv1": nn.Conv2d(6, 5),
            "pool1": nn.MaxPool2d(2),
            "relu1": nn.relu,
            "conv2": nn.Conv2d(16, 5),
            "pool2": nn.MaxPool2d(2),
            "relu2": nn.relu,
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(120),
            "relu3": nn.relu,
            "fc2": nn.Linear(84),
            "relu4": nn.relu,
            "fc3": nn.Linear(classes),
        }
    )
