"""Adamax: Adam with a decaying maximum in the place of the second moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start, start_step
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import average, total_weight
from fnn.tree import Tree, Where


class ScaleByAdamaxState(NamedTuple):
    """State of `scale_by_adamax`: `step` counts updates; the average `mu` and the maximum `nu` are like the params."""

    step: Tensor
    b1: Hyperparameter | Scheduled
    b2: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    mu: Tree
    nu: Tree


def scale_by_adamax(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Divide an average of the gradients by their decaying maximum.

    .. math::
        m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = \max(b_2 v_{t-1}, |g_t| + \epsilon), \qquad
        u_t = \frac{m_t / (1 - b_1^t)}{v_t}

    `moment_dtype` is the dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_adamax()
        >>> updates, state = transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))
        >>> updates
        tensor([ 1.0000, -1.0000])

    Reference: Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980
    """
    given = check(b1=b1, b2=b2, eps=eps)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        mu, nu = zeros(params, moment_dtype), zeros(params, moment_dtype)
        return ScaleByAdamaxState(step=start_step(params), mu=mu, nu=nu, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (b1, b2, eps), hyper = advance(given, state)
        step = state.step + 1
        weight = total_weight(b1, step)

        def largest(v: Tensor, g: Tensor) -> Tensor:
            return torch.maximum(b2 * widened(v), widened(g).abs() + eps).to(v.dtype)

        mu = average(b1, state.mu, grads)
        nu = map_same(largest, "grads", state.nu, grads)
        updates = tree.map(lambda m, v: (widened(m) / weight) / widened(v), mu, nu)
        return updates, ScaleByAdamaxState(step=step, mu=mu, nu=nu, **hyper)

    return GradientTransformation(init, update)


def adamax(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adamax, equal to `torch.optim.Adamax`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1} \\
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = \max(b_2 v_{t-1}, |g_t| + \epsilon) \\
        p_t &= p_{t-1} - \eta \, \frac{m_t / (1 - b_1^t)}{v_t}

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in the formulas.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.adamax(0.1)
        >>> params = {"weight": torch.ones(2)}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([5.0, -0.1])}, opt.init(params))
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([0.9000, 1.1000])}

    Reference: Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adamax(b1, b2, eps, moment_dtype=moment_dtype),
        scale_by_learning_rate(lr),
    )
