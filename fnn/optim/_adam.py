"""Adam: an average of the gradients over the root of an average of their squares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, is_zero, start, start_step
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import average, average_of_squares, root, total_weight
from fnn.tree import Tree, Where


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`: `step` counts updates; the moments `mu` and `nu` have the parameters' structure.

    `b1` and `mu` are ``()`` where there is no first moment.
    """

    step: Tensor
    b1: Hyperparameter | Scheduled | tuple[()]
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

    `moment_dtype` is the dtype of both moments, by default each parameter's own (float32 for float16); `torch.float32`
    is worth its memory for bfloat16 parameters, whose second moment would lose nearly every increment. A `b1` that is
    a Python zero leaves no first moment in memory: :math:`m_t = g_t`.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_adam()
        >>> updates, state = transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))
        >>> updates
        tensor([ 1.0000, -1.0000])

    Reference: Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980
    """
    given = check(b2=b2, eps=eps, b1=b1)
    averaged = not is_zero(b1)
    if not averaged:
        del given["b1"]

    def init(params: Tree) -> OptState:
        hyper = {"b1": (), **start(given, params)}
        mu = zeros(params, moment_dtype) if averaged else ()
        return ScaleByAdamState(step=start_step(params), mu=mu, nu=zeros(params, moment_dtype), **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        values, hyper = advance(given, state)
        b2, eps = values[:2]
        step = state.step + 1
        weight2 = total_weight(b2, step)

        def scaled(m: Tensor, v: Tensor) -> Tensor:
            return widened(m) / (root(widened(v) / weight2) + eps)

        mu = average(values[2], state.mu, grads) if averaged else ()
        nu = average_of_squares(b2, state.nu, grads)
        if averaged:
            weight1 = total_weight(values[2], step)
            updates = tree.map(lambda m, v: scaled(widened(m) / weight1, v), mu, nu)
        else:
            updates = tree.map(scaled, grads, nu)
        return updates, ScaleByAdamState(step=step, mu=mu, nu=nu, **{"b1": (), **hyper})

    return GradientTransformation(init, update)


def adam(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adam, equal to `torch.optim.Adam`: weight decay is added to the gradients.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1} \\
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        p_t &= p_{t-1} - \eta \, \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in the formulas.
        weight_decay: :math:`\lambda`. `adamw` keeps it apart from the moments, which is usually better.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.adam(0.1)
        >>> params = {"weight": torch.ones(2)}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([5.0, -0.1])}, opt.init(params))
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([0.9000, 1.1000])}

    Reference: Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        scale_by_learning_rate(lr),
    )


def adamw(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 1e-2,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adam with decoupled weight decay, equal to `torch.optim.AdamW`.

    .. math::
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        p_t &= p_{t-1} - \eta \left(\frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon}
            + \lambda p_{t-1}\right)

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in the formulas.
        weight_decay: :math:`\lambda`; each step takes `lr * weight_decay` of a parameter away.
        weight_decay_mask: which leaves decay, all by default: a path pattern (``"*.weight"``), a predicate
            `(path, leaf) -> bool`, or a tree of bools.
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.adamw(0.1, weight_decay=0.5, weight_decay_mask=lambda path, leaf: leaf.ndim > 1)
        >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> grads = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> updates, opt_state = opt.update(grads, opt.init(params), params)
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([[0.8500]]), 'bias': tensor([0.9000])}

    Reference: Loshchilov and Hutter, Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101
    """
    return chain(
        scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(lr),
    )
