"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fnn import nn
from fnn.nn.initializers import Initializer, fan_in_uniform


def mlp(
    hidden: Sequence[int] = (512, 512),
    classes: int = 10,
    activation: Callable[..., Any] = nn.relu,
    *,
    weight_init: Initializer = fan_in_uniform,
    bias_init: Initializer | None = None,
) -> nn.Sequential:
    """Flatten, then linear layers of the widths `hidden` with an activation each, then one to `classes` logits.

    Input (N, ...) -> logits (N, classes). `weight_init` and `bias_init` are those of `nn.Linear`.

    Example:
        >>> mlp((256, 64))
        Sequential(Flatten(), Linear(256), relu, Linear(64), relu, Linear(10))
    """

    def linear(width: int) -> nn.Linear:
        return nn.Linear(width, weight_init=weight_init, bias_init=bias_init)

    layers: list[Any] = [nn.Flatten()]
    for width in hidden:
        layers += [linear(width), activation]
    return nn.Sequential(*layers, linear(classes))
