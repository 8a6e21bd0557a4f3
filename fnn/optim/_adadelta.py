"""Adadelta: steps as large as the average step before, over gradients as large as the average gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import average_of_squares, root
from fnn.tree import Tree, Where


class ScaleByAdadeltaState(NamedTuple):
    """State of `scale_by_adadelta`: `nu` averages the squares of the gradients, `delta` those of the updates."""

    rho: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    nu: Tree
    delta: Tree


def scale_by_adadelta(
    rho: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Scale the gradients by the root mean square of earlier updates over their own.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
        u_t = \frac{\sqrt{d_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} \, g_t, \qquad
        d_t = \rho d_{t-1} + (1 - \rho) u_t^2

    `moment_dtype` is the dtype of :math:`v` and :math:`d`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_adadelta(rho=0.75, eps=1e-2)
        >>> transformation.update(torch.tensor([3.0, -3.0]), transformation.init(torch.zeros(2)))[0]
        tensor([ 0.1996, -0.1996])

    Reference: Zeiler, ADADELTA: an adaptive learning rate method, 2012, https://arxiv.org/abs/1212.5701
    """
    given = check(rho=rho, eps=eps)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        nu, delta = zeros(params, moment_dtype), zeros(params, moment_dtype)
        return ScaleByAdadeltaState(nu=nu, delta=delta, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (rho, eps), hyper = advance(given, state)
        nu = average_of_squares(rho, state.nu, grads)

        def scaled(g: Tensor, v: Tensor, d: Tensor) -> Tensor:
            return root(widened(d) + eps) / root(widened(v) + eps) * widened(g)

        updates = tree.map(scaled, grads, nu, state.delta)
        delta = average_of_squares(rho, state.delta, updates)
        return updates, ScaleByAdadeltaState(nu=nu, delta=delta, **hyper)

    return GradientTransformation(init, update)


def adadelta(
    lr: ScalarOrSchedule = 1.0,
    rho: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Adadelta, equal to `torch.optim.Adadelta`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1}, \qquad v_t = \rho v_{t-1} + (1 - \rho) g_t^2 \\
        u_t &= \frac{\sqrt{d_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} \, g_t, \qquad
            d_t = \rho d_{t-1} + (1 - \rho) u_t^2 \\
        p_t &= p_{t-1} - \eta \, u_t

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        rho, eps: as in the formulas.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`v` and :math:`d`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.adadelta(eps=1e-2)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(2 * params, opt_state)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(params.abs() < 0.01)
        True

    Reference: Zeiler, ADADELTA: an adaptive learning rate method, 2012, https://arxiv.org/abs/1212.5701
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps, moment_dtype=moment_dtype),
        scale_by_learning_rate(lr),
    )
