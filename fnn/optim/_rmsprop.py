"""RMSprop: gradients over the root of an average of their squares."""

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
from fnn.optim._moments import average, average_of_squares, root
from fnn.optim._momentum import trace
from fnn.tree import Tree, Where


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`: the averages `mu` (``()`` unless centered) and `nu` have the parameters' structure."""

    alpha: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    mu: Tree
    nu: Tree


def scale_by_rms(
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    *,
    centered: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Divide the gradients by the root of an average of their squares: :math:`u_t = g_t / (\sqrt{v_t} + \epsilon)`.

    :math:`v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2`, with `centered` less the square of the average gradient (at
    least 0, which rounding could otherwise miss). `moment_dtype` is the dtype of the averages, by default each
    parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_rms(0.75)
        >>> transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])

    Reference: Tieleman and Hinton, Lecture 6.5 of Neural networks for machine learning, 2012,
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """
    given = check(alpha=alpha, eps=eps)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        mu = zeros(params, moment_dtype) if centered else ()
        return ScaleByRmsState(mu=mu, nu=zeros(params, moment_dtype), **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (alpha, eps), hyper = advance(given, state)
        mu = average(alpha, state.mu, grads) if centered else ()
        nu = average_of_squares(alpha, state.nu, grads)

        def scaled(g: Tensor, v: Tensor) -> Tensor:
            return widened(g) / (root(widened(v)) + eps)

        def scaled_centered(g: Tensor, v: Tensor, m: Tensor) -> Tensor:
            return widened(g) / (root(widened(v) - widened(m).square()) + eps)

        updates = tree.map(scaled_centered, grads, nu, mu) if centered else tree.map(scaled, grads, nu)
        return updates, ScaleByRmsState(mu=mu, nu=nu, **hyper)

    return GradientTransformation(init, update)


def rmsprop(
    lr: ScalarOrSchedule,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    momentum: ScalarOrSchedule = 0.0,
    *,
    centered: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""RMSprop, equal to `torch.optim.RMSprop`.

    .. math::
        g_t &= \nabla f(p_{t-1}) + \lambda p_{t-1} \\
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad m_t = \alpha m_{t-1} + (1 - \alpha) g_t \\
        b_t &= \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \quad
            \text{centered } \mu b_{t-1} + \frac{g_t}{\sqrt{v_t - m_t^2} + \epsilon} \\
        p_t &= p_{t-1} - \eta \, b_t

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        alpha, eps: as in the formulas.
        momentum: :math:`\mu`.
        centered: divide by an estimate of the standard deviation of the gradients.
        weight_decay: :math:`\lambda`, added to the gradients.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`v`, :math:`m` and :math:`b`, by default each parameter's own (float32 for
            float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.rmsprop(0.1, alpha=0.75)
        >>> params = {"weight": torch.ones(2)}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([5.0, -0.1])}, opt.init(params))
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([0.8000, 1.2000])}

    Reference: Tieleman and Hinton, Lecture 6.5 of Neural networks for machine learning, 2012,
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_rms(alpha, eps, centered=centered, moment_dtype=moment_dtype),
        trace(momentum, moment_dtype=moment_dtype),
        scale_by_learning_rate(lr),
    )
