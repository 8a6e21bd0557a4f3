"""Bounds on the gradients, by element and by norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, widened
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start
from fnn.tree import Tree


class ClipState(NamedTuple):
    """State of `clip`."""

    max_value: Hyperparameter | Scheduled


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    max_norm: Hyperparameter | Scheduled


def clip(max_value: ScalarOrSchedule) -> GradientTransformation:
    """Clip every element of the gradients to `[-max_value, max_value]`.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.clip(1.0)
        >>> transformation.update(torch.tensor([3.0, -0.5]), transformation.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -0.5000])
    """
    given = check(max_value=max_value)

    def init(params: Tree) -> OptState:
        return ClipState(**start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (bound,), hyper = advance(given, state)
        return tree.map(lambda g: torch.clamp(widened(g), -bound, bound), grads), ClipState(**hyper)

    return GradientTransformation(init, update)


def clip_by_global_norm(max_norm: ScalarOrSchedule) -> GradientTransformation:
    r"""Scale all gradients together so that their `global_norm` is at most `max_norm`.

    :math:`u = g \cdot n / \max(\lVert g \rVert, n)`: gradients below the bound pass bit for bit. A gradient that
    is not finite makes all updates NaN, so that it is seen.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.clip_by_global_norm(1.0)
        >>> transformation.update(torch.tensor([3.0, 4.0]), transformation.init(torch.zeros(2)))[0]
        tensor([0.6000, 0.8000])

    Reference: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013,
    https://arxiv.org/abs/1211.5063
    """
    given = check(max_norm=max_norm)

    def init(params: Tree) -> OptState:
        return ClipByGlobalNormState(**start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (bound,), hyper = advance(given, state)
        scale = bound / torch.maximum(global_norm(grads).to(bound.dtype), bound)
        return tree.map(lambda g: scale * widened(g), grads), ClipByGlobalNormState(**hyper)

    return GradientTransformation(init, update)


def global_norm(x: Tree) -> Tensor:
    """The Euclidean norm of all leaves taken as one vector: a 0-d tensor, float32 or wider. Its gradient at 0 is 0.

    Example:
        >>> from fnn import optim
        >>> optim.global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        tensor(5.)
    """
    norms = [torch.linalg.vector_norm(widened(leaf)) for leaf in tree.leaves(x)]
    if not norms:
        return torch.zeros(())
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]))
