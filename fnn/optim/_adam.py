"""The first and second moments of Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened, zeros
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start, start_step
from fnn.tree import Tree


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`: `step` counts updates; the moments `mu` and `nu` have the parameters' structure."""

    step: Tensor
    b1: Hyperparameter | Scheduled
    b2: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    mu: Tree
    nu: Tree


def scale_by_adam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Divide an average of the gradients by the root of an average of their squares, as Adam does.

    .. math::
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}

    `moment_dtype` is the dtype of both moments, by default each parameter's own; `torch.float32` is worth its
    memory for bfloat16 parameters, whose second moment would lose nearly every increment.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_adam()
        >>> updates, state = transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))
        >>> updates
        tensor([ 1.0000, -1.0000])

    Reference: Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980
    """
    given = check(b1=b1, b2=b2, eps=eps)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        mu, nu = zeros(params, moment_dtype), zeros(params, moment_dtype)
        return ScaleByAdamState(step=start_step(params), mu=mu, nu=nu, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (b1, b2, eps), hyper = advance(given, state)
        step = state.step + 1
        share1, share2 = 1 - b1, 1 - b2
        weight1, weight2 = _total_weight(b1, step), _total_weight(b2, step)

        def first(m: Tensor, g: Tensor) -> Tensor:
            return (b1 * widened(m) + share1 * widened(g)).to(m.dtype)

        def second(v: Tensor, g: Tensor) -> Tensor:
            return (b2 * widened(v) + share2 * widened(g).square()).to(v.dtype)

        def direction(m: Tensor, v: Tensor) -> Tensor:
            return (widened(m) / weight1) / ((widened(v) / weight2).sqrt() + eps)

        mu = map_same(first, "grads", state.mu, grads)
        nu = map_same(second, "grads", state.nu, grads)
        updates = tree.map(direction, mu, nu)
        return updates, ScaleByAdamState(step=step, mu=mu, nu=nu, **hyper)

    return GradientTransformation(init, update)


def _total_weight(b: Tensor, step: Tensor) -> Tensor:
    """``1 - b ** step``, which loses its digits in float32 for b near 1 and small steps unless taken by expm1."""
    return -torch.expm1(step.to(b.dtype) * torch.log(b))
