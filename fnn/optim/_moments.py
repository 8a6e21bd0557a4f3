"""Decaying averages of gradients and of their squares, as most optimizers keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from fnn.optim._contract import map_same, widened
from fnn.tree import Tree


def average(decay: Tensor, moments: Tree, grads: Tree) -> Tree:
    """``decay * moments + (1 - decay) * grads``, rounded to the dtype of the moments."""
    share = 1 - decay

    def step(m: Tensor, g: Tensor) -> Tensor:
        return (decay * widened(m) + share * widened(g)).to(m.dtype)

    return map_same(step, "grads", moments, grads)


def average_of_squares(decay: Tensor, moments: Tree, grads: Tree) -> Tree:
    """``decay * moments + (1 - decay) * grads ** 2``, rounded to the dtype of the moments."""
    share = 1 - decay

    def step(v: Tensor, g: Tensor) -> Tensor:
        return (decay * widened(v) + share * widened(g).square()).to(v.dtype)

    return map_same(step, "grads", moments, grads)


def root(x: Tensor) -> Tensor:
    """The square root of what should not be negative; its derivative at 0 is 0, where that of `sqrt` is infinite.

    Of a leaf that has no gradient yet, such as an unused row, a derivative through the training would else be NaN.
    """
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def total_weight(decay: Tensor, step: Tensor) -> Tensor:
    """``1 - decay ** step``, what the weights in an average of `step` samples sum to.

    In float32 it would lose its digits for a decay near 1 and small steps unless taken by expm1.
    """
    return -torch.expm1(step.to(decay.dtype) * torch.log(decay))
