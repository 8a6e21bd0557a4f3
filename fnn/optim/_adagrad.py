"""Adagrad: gradients over the root of the sum of all their squares."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, is_zero, start, start_step
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import root
from fnn.tree import Tree, Where


class ScaleByAdagradState(NamedTuple):
    """State of `scale_by_adagrad`. `lr_decay` and `step` are ``()`` where there is no decay."""

    eps: Hyperparameter | Scheduled
    lr_decay: Hyperparameter | Scheduled | tuple[()]
    step: Tensor | tuple[()]
    sum: Tree


def scale_by_adagrad(
    eps: ScalarOrSchedule = 1e-10,
    *,
    lr_decay: ScalarOrSchedule = 0.0,
    initial_accumulator_value: float = 0.0,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Divide the gradients by the root of the sum of their squares.

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad u_t = \frac{1}{1 + (t - 1) d} \, \frac{g_t}{\sqrt{s_t} + \epsilon}

    `lr_decay` is :math:`d`, `initial_accumulator_value` :math:`s_0`; `moment_dtype` is the dtype of :math:`s`, by
    default each parameter's own (float32 for float16). Raises `ValueError` for an `initial_accumulator_value` that is
    no number >= 0.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_adagrad()
        >>> transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    Reference: Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and stochastic optimization,
    2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    given = check(eps=eps, lr_decay=lr_decay)
    if not isinstance(initial_accumulator_value, Real) or not 0 <= initial_accumulator_value < math.inf:
        raise ValueError(f"initial_accumulator_value must be a finite number >= 0, got {initial_accumulator_value!r}")
    decays = not is_zero(lr_decay)
    if not decays:
        del given["lr_decay"]

    def init(params: Tree) -> OptState:
        hyper = {"lr_decay": (), **start(given, params)}
        sums = tree.map(lambda s: torch.full_like(s, initial_accumulator_value), zeros(params, moment_dtype))
        return ScaleByAdagradState(step=start_step(params) if decays else (), sum=sums, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        values, hyper = advance(given, state)
        eps, step = values[0], ()

        def add(s: Tensor, g: Tensor) -> Tensor:
            return (widened(s) + widened(g).square()).to(s.dtype)

        sums = map_same(add, "grads", state.sum, grads)
        updates = tree.map(lambda g, s: widened(g) / (root(widened(s)) + eps), grads, sums)
        if decays:
            scale = 1 / (1 + state.step * values[1])
            updates = tree.map(lambda u: scale * u, updates)
            step = state.step + 1
        return updates, ScaleByAdagradState(step=step, sum=sums, **{"lr_decay": (), **hyper})

    return GradientTransformation(init, update)


def adagrad(
    lr: ScalarOrSchedule,
    eps: ScalarOrSchedule = 1e-10,
    *,
    lr_decay: ScalarOrSchedule = 0.0,
    initial_accumulator_value: float = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adagrad, equal to `torch.optim.Adagrad`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad s_t = s_{t-1} + g_t^2 \\
        p_t &= p_{t-1} - \frac{\eta}{1 + (t - 1) d} \, \frac{g_t}{\sqrt{s_t} + \epsilon}

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        eps: as in the formulas.
        lr_decay: :math:`d`.
        initial_accumulator_value: :math:`s_0`, a number.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`s`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.adagrad(0.1)
        >>> params = {"weight": torch.ones(2)}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([5.0, -0.1])}, opt.init(params))
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([0.9000, 1.1000])}

    Reference: Duchi, Hazan, Singer, Adaptive subgradient methods for online learning and stochastic optimization,
    2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adagrad(
            eps,
            lr_decay=lr_decay,
            initial_accumulator_value=initial_accumulator_value,
            moment_dtype=moment_dtype,
        ),
        scale_by_learning_rate(lr),
    )
