"""Stochastic gradient descent."""

from __future__ import annotations

import torch

from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import ScalarOrSchedule
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._momentum import trace
from fnn.tree import Where


def sgd(
    lr: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.0,
    *,
    nesterov: bool = False,
    dampening: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Stochastic gradient descent, equal to `torch.optim.SGD`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + (1 - d) g_t, \quad b_1 = g_1 \\
        p_t &= p_{t-1} - \eta \, b_t, \quad \text{with nesterov } p_{t-1} - \eta \, (g_t + \mu b_t)

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        momentum: :math:`\mu`.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        dampening: :math:`d`.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`b`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.sgd(0.1, momentum=0.9)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(2 * params, opt_state)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(params.abs() < 0.01)
        True

    Reference: Sutskever, Martens, Dahl, Hinton, On the importance of initialization and momentum in deep learning,
    2013, https://proceedings.mlr.press/v28/sutskever13.html
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        trace(momentum, nesterov=nesterov, dampening=dampening, moment_dtype=moment_dtype),
        scale_by_learning_rate(lr),
    )
