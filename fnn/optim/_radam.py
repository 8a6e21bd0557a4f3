"""RAdam: Adam without its scaling for as long as the second moment says little."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start, start_step
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import average, average_of_squares, root, total_weight
from fnn.tree import Tree, Where


class ScaleByRadamState(NamedTuple):
    """State of `scale_by_radam`: `step` counts updates; the moments `mu` and `nu` have the parameters' structure."""

    step: Tensor
    b1: Hyperparameter | Scheduled
    b2: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    mu: Tree
    nu: Tree


def scale_by_radam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adam's scaling times a rectification of its variance; no scaling while the variance is not tractable.

    .. math::
        m_t &= b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2, \qquad
            \hat m_t = m_t / (1 - b_1^t) \\
        \rho_\infty &= \tfrac{2}{1 - b_2} - 1, \qquad \rho_t = \rho_\infty - \tfrac{2 t b_2^t}{1 - b_2^t} \\
        u_t &= \hat m_t \, \frac{\sqrt{1 - b_2^t}}{\sqrt{v_t} + \epsilon}
            \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}}
            \text{ where } \rho_t > 5, \text{ else } \hat m_t

    `moment_dtype` is the dtype of both moments, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_radam()
        >>> updates, state = transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))
        >>> updates
        tensor([ 3.0000, -0.2000])

    Reference: Liu et al., On the variance of the adaptive learning rate and beyond, 2020,
    https://arxiv.org/abs/1908.03265
    """
    given = check(b1=b1, b2=b2, eps=eps)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        mu, nu = zeros(params, moment_dtype), zeros(params, moment_dtype)
        return ScaleByRadamState(step=start_step(params), mu=mu, nu=nu, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (b1, b2, eps), hyper = advance(given, state)
        step = state.step + 1
        weight = total_weight(b1, step)
        tractable, scale = _rectification(b2, step)

        def direction(m: Tensor, v: Tensor) -> Tensor:
            m = widened(m) / weight
            return torch.where(tractable, m * (scale / (root(widened(v)) + eps)), m)

        mu = average(b1, state.mu, grads)
        nu = average_of_squares(b2, state.nu, grads)
        updates = tree.map(direction, mu, nu)
        return updates, ScaleByRadamState(step=step, mu=mu, nu=nu, **hyper)

    return GradientTransformation(init, update)


def _rectification(b2: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the variance is tractable, and the factor of the update where it is.

    In float64: the two terms of rho are near 2000 for the default b2, and their difference, near the step, is
    compared with 5, where the factor jumps.
    """
    wide = b2.double()
    weight = total_weight(wide, step)
    limit = 2 / (1 - wide) - 1
    rho = limit - 2 * step * wide**step / weight
    tractable = rho > 5
    # a value that gives no NaN where the factor is not used
    rho, limit = torch.where(tractable, rho, 6), torch.where(tractable, limit, 6)
    factor = (weight * (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).sqrt()
    return tractable, factor.to(b2.dtype)


def radam(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled_weight_decay: bool = False,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Rectified Adam, equal to `torch.optim.RAdam`. The first few steps are those of SGD with momentum.

    The updates are :math:`p_t = p_{t-1} - \eta u_t` with :math:`u_t` of `scale_by_radam`.

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in `scale_by_radam`.
        weight_decay: each step adds `weight_decay` of a parameter to its gradient.
        decoupled_weight_decay: take `lr * weight_decay` of a parameter away instead, as `adamw` does.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of the two moments, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.radam(0.1)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(2 * params, opt_state)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(params.abs() < 0.05)
        True

    Reference: Liu et al., On the variance of the adaptive learning rate and beyond, 2020,
    https://arxiv.org/abs/1908.03265
    """
    scaling = scale_by_radam(b1, b2, eps, moment_dtype=moment_dtype)
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    first, second = (scaling, decay) if decoupled_weight_decay else (decay, scaling)
    return chain(first, second, scale_by_learning_rate(lr))
