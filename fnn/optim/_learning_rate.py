"""The learning rate: the last link of nearly every chain."""

from __future__ import annotations

from typing import Any, NamedTuple

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, widened
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start
from fnn.tree import Tree


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`."""

    lr: Hyperparameter | Scheduled


def scale_by_learning_rate(lr: ScalarOrSchedule) -> GradientTransformation:
    """Multiply by `-lr`, so that adding the updates descends.

    Example:
        >>> import torch
        >>> from fnn import optim
        >>> transformation = optim.scale_by_learning_rate(0.5)
        >>> transformation.update(torch.ones(2), transformation.init(torch.zeros(2)))[0]
        tensor([-0.5000, -0.5000])
    """
    given = check(lr=lr)

    def init(params: Tree) -> OptState:
        return ScaleByLearningRateState(**start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (lr,), hyper = advance(given, state)
        scale = -lr
        return tree.map(lambda g: scale * widened(g), grads), ScaleByLearningRateState(**hyper)

    return GradientTransformation(init, update)
