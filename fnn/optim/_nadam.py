"""NAdam: Adam with Nesterov's momentum."""

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


class ScaleByNadamState(NamedTuple):
    """State of `scale_by_nadam`: `step` counts updates, `product` is that of all momentum coefficients so far."""

    step: Tensor
    b1: Hyperparameter | Scheduled
    b2: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    momentum_decay: Hyperparameter | Scheduled
    product: Tensor
    mu: Tree
    nu: Tree


def scale_by_nadam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    momentum_decay: ScalarOrSchedule = 4e-3,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adam's scaling of an average that looks one step ahead.

    .. math::
        \mu_t &= b_1 (1 - \tfrac12 \, 0.96^{t \psi}), \qquad
            m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        u_t &= \left( \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i}
            + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^{t} \mu_i} \right)
            \Big/ \left( \sqrt{v_t / (1 - b_2^t)} + \epsilon \right)

    `momentum_decay` is :math:`\psi`; `moment_dtype` is the dtype of both moments, by default each parameter's own
    (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_nadam()
        >>> updates, state = transformation.update(torch.tensor([3.0, -3.0]), transformation.init(torch.zeros(2)))
        >>> updates
        tensor([ 1.0565, -1.0565])

    Reference: Dozat, Incorporating Nesterov momentum into Adam, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    given = check(b1=b1, b2=b2, eps=eps, momentum_decay=momentum_decay)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        mu, nu = zeros(params, moment_dtype), zeros(params, moment_dtype)
        product = torch.ones_like(hyper["b1"].value)
        return ScaleByNadamState(step=start_step(params), product=product, mu=mu, nu=nu, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (b1, b2, eps, momentum_decay), hyper = advance(given, state)
        step = state.step + 1
        now = b1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
        ahead = b1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
        product = state.product * now
        weight = total_weight(b2, step)
        share_m, share_g = ahead / (1 - product * ahead), (1 - now) / (1 - product)

        def direction(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return (share_m * widened(m) + share_g * widened(g)) / (root(widened(v) / weight) + eps)

        mu = average(b1, state.mu, grads)
        nu = average_of_squares(b2, state.nu, grads)
        updates = tree.map(direction, grads, mu, nu)
        return updates, ScaleByNadamState(step=step, product=product, mu=mu, nu=nu, **hyper)

    return GradientTransformation(init, update)


def nadam(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    momentum_decay: ScalarOrSchedule = 4e-3,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    decoupled_weight_decay: bool = False,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adam with Nesterov's momentum, equal to `torch.optim.NAdam`.

    .. math::
        \mu_t &= b_1 (1 - \tfrac12 \, 0.96^{t \psi}), \qquad
            m_t = b_1 m_{t-1} + (1 - b_1) g_t, \qquad v_t = b_2 v_{t-1} + (1 - b_2) g_t^2 \\
        p_t &= p_{t-1} - \eta \left( \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i}
            + \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^{t} \mu_i} \right)
            \Big/ \left( \sqrt{v_t / (1 - b_2^t)} + \epsilon \right)

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in the formulas.
        momentum_decay: :math:`\psi`.
        weight_decay: :math:`\lambda`; each step adds `weight_decay` of a parameter to its gradient.
        decoupled_weight_decay: take `lr * weight_decay` of a parameter away instead, as `adamw` does.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.nadam(0.1)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(2 * params, opt_state)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(params.abs() < 0.01)
        True

    Reference: Dozat, Incorporating Nesterov momentum into Adam, 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    scaling = scale_by_nadam(b1, b2, eps, momentum_decay, moment_dtype=moment_dtype)
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    first, second = (scaling, decay) if decoupled_weight_decay else (decay, scaling)
    return chain(first, second, scale_by_learning_rate(lr))
