"""The optimizers: each a short chain of parts."""

from __future__ import annotations

import torch

from fnn.optim._adam import scale_by_adam
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
        moment_dtype: dtype of :math:`b`, by default each parameter's own.

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
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own.

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
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own.

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
