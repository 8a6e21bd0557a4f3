"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fnn import nn


def mlp(
    hidden: Sequence[int] = (512, 512), classes: int = 10, activation: Callable[..., Any] = nn.relu
) -> nn.Sequential:
    """Flatten, then linear layers of the widths `hidden` with an activation each, then one to `classes` logits.

    Input (N, ...) -> logits (N, classes).

    Example:
        >>> mlp((256, 64))
        Sequential(Flatten(), Linear(256), relu, Linear(64), relu, Linear(10))
    """
    layers: list[Any] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(width), activation]
    return nn.Sequential(*layers, nn.Linear(classes))
