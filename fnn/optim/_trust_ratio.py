"""LARS and LAMB: each leaf steps in proportion to its own norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn.optim._adam import scale_by_adam
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, is_zero, start
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._masked import masked
from fnn.optim._momentum import trace
from fnn.tree import Tree, Where


class ScaleByTrustRatioState(NamedTuple):
    """State of `scale_by_trust_ratio`. `eps` is ``()`` where there is none."""

    trust_coefficient: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled | tuple[()]


def scale_by_trust_ratio(
    trust_coefficient: ScalarOrSchedule = 1.0,
    eps: ScalarOrSchedule = 0.0,
    *,
    mask: Where | None = None,
) -> GradientTransformation:
    r"""Multiply the gradients of each leaf by :math:`c \lVert p \rVert / (\lVert g \rVert + \epsilon)`.

    The factor is 1 where the parameter or the gradient is zero. `mask` chooses the leaves that are scaled, all by
    default, as in `masked`. `update` needs the parameters.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_trust_ratio()
        >>> params = torch.tensor([3.0, 4.0])
        >>> transformation.update(torch.tensor([0.0, 0.1]), transformation.init(params), params)[0]
        tensor([0., 5.])

    Reference: You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017,
    https://arxiv.org/abs/1708.03888
    """
    given = check(trust_coefficient=trust_coefficient, eps=eps)
    if is_zero(eps):
        del given["eps"]

    def init(params: Tree) -> OptState:
        return ScaleByTrustRatioState(**{"eps": (), **start(given, params)})

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if params is None:
            raise ValueError("the trust ratio needs the parameters: opt.update(grads, opt_state, params)")
        (coefficient, *rest), hyper = advance(given, state)

        def scaled(p: Tensor, g: Tensor) -> Tensor:
            g = widened(g)
            p_norm, g_norm = torch.linalg.vector_norm(widened(p)), torch.linalg.vector_norm(g)
            usual = (p_norm > 0) & (g_norm > 0)
            # the division is by 1 where its result is not used, so that its derivative is finite there
            below = torch.where(usual, g_norm + rest[0] if rest else g_norm, 1)
            return torch.where(usual, coefficient * p_norm / below, 1) * g

        updates = map_same(scaled, "grads", params, grads)
        return updates, ScaleByTrustRatioState(**{"eps": (), **hyper})

    transformation = GradientTransformation(init, update)
    return transformation if mask is None else masked(transformation, mask)


def lars(
    lr: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.9,
    *,
    nesterov: bool = False,
    trust_coefficient: ScalarOrSchedule = 1e-3,
    trust_ratio_mask: Where | None = None,
    eps: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""SGD with momentum for large batches: each leaf steps in proportion to its norm. Equal to `optax.lars`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + \eta \, c \frac{\lVert p_{t-1} \rVert}{\lVert g_t \rVert + \epsilon} \, g_t \\
        p_t &= p_{t-1} - b_t, \quad \text{with nesterov } p_{t-1} - (\text{the newest term} + \mu b_t)

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        momentum: :math:`\mu`.
        nesterov: look ahead along the momentum.
        trust_coefficient: :math:`c`.
        trust_ratio_mask: which leaves are scaled by their norms, all by default; usually not biases and the
            parameters of normalizations: ``lambda path, leaf: leaf.ndim > 1``.
        eps: as in the formulas.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`b`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.lars(1.0, trust_coefficient=0.1)
        >>> params = {"weight": torch.tensor([3.0, 4.0])}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([0.0, 7.0])}, opt.init(params), params)
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([3.0000, 3.5000])}

    Reference: You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017,
    https://arxiv.org/abs/1708.03888
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_trust_ratio(trust_coefficient, eps, mask=trust_ratio_mask),
        scale_by_learning_rate(lr),
        trace(momentum, nesterov=nesterov, moment_dtype=moment_dtype),
    )


def lamb(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    *,
    trust_ratio_mask: Where | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""AdamW for large batches: each leaf steps in proportion to its norm. Equal to `optax.lamb`.

    .. math::
        r_t &= \frac{m_t / (1 - b_1^t)}{\sqrt{v_t / (1 - b_2^t)} + \epsilon} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta \, \frac{\lVert p_{t-1} \rVert}{\lVert r_t \rVert} \, r_t

    with the moments :math:`m_t` and :math:`v_t` of `adam`.

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2, eps: as in `adam`.
        trust_ratio_mask: which leaves are scaled by their norms, all by default; usually not biases and the
            parameters of normalizations: ``lambda path, leaf: leaf.ndim > 1``.
        weight_decay: :math:`\lambda`.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`m` and :math:`v`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.lamb(0.1)
        >>> params = {"weight": torch.tensor([3.0, 4.0])}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([0.0, 7.0])}, opt.init(params), params)
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([3.0000, 3.5000])}

    Reference: You et al., Large batch optimization for deep learning: training BERT in 76 minutes, 2020,
    https://arxiv.org/abs/1904.00962
    """
    return chain(
        scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_trust_ratio(mask=trust_ratio_mask),
        scale_by_learning_rate(lr),
    )
