"""Lion: the signs of an average of the gradients."""

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
from fnn.optim._moments import average
from fnn.tree import Tree, Where


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`: the average `mu` has the parameters' structure."""

    b1: Hyperparameter | Scheduled
    b2: Hyperparameter | Scheduled
    mu: Tree


def scale_by_lion(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    *,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""The sign of an average of the gradients, which weighs the newest one more than the average kept does.

    .. math::
        u_t = \operatorname{sign}(b_1 m_{t-1} + (1 - b_1) g_t), \qquad m_t = b_2 m_{t-1} + (1 - b_2) g_t

    `moment_dtype` is the dtype of :math:`m`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_lion()
        >>> transformation.update(torch.tensor([3.0, -0.2]), transformation.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    Reference: Chen et al., Symbolic discovery of optimization algorithms, 2023, https://arxiv.org/abs/2302.06675
    """
    given = check(b1=b1, b2=b2)

    def init(params: Tree) -> OptState:
        return ScaleByLionState(mu=zeros(params, moment_dtype), **start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (b1, b2), hyper = advance(given, state)
        share = 1 - b1

        def direction(m: Tensor, g: Tensor) -> Tensor:
            ahead = b1 * widened(m) + share * widened(g)
            return torch.where(ahead.isnan(), ahead, torch.sign(ahead))  # torch's sign of NaN is 0

        mu = average(b2, state.mu, grads)
        return tree.map(direction, state.mu, grads), ScaleByLionState(mu=mu, **hyper)

    return GradientTransformation(init, update)


def lion(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    *,
    weight_decay: ScalarOrSchedule = 1e-3,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Lion: every element of a parameter steps by `lr`, and decays as in `adamw`. Equal to `optax.lion`.

    .. math::
        p_t &= p_{t-1} - \eta \left(\operatorname{sign}(b_1 m_{t-1} + (1 - b_1) g_t) + \lambda p_{t-1}\right) \\
        m_t &= b_2 m_{t-1} + (1 - b_2) g_t

    Its `lr` is usually 3 to 10 times smaller than Adam's, its `weight_decay` as many times larger.

    Args:
        lr: :math:`\eta`. It and the other numbers may be floats, 0-d tensors or schedules.
        b1, b2: as in the formulas.
        weight_decay: :math:`\lambda`; each step takes `lr * weight_decay` of a parameter away.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`m`, by default each parameter's own (float32 for float16).

    Example:
        >>> from fnn import optim
        >>> opt = optim.lion(0.1, weight_decay=0.0)
        >>> params = {"weight": torch.ones(2)}
        >>> updates, opt_state = opt.update({"weight": torch.tensor([5.0, -0.1])}, opt.init(params))
        >>> optim.apply_updates(params, updates)
        {'weight': tensor([0.9000, 1.1000])}

    Reference: Chen et al., Symbolic discovery of optimization algorithms, 2023, https://arxiv.org/abs/2302.06675
    """
    return chain(
        scale_by_lion(b1, b2, moment_dtype=moment_dtype),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(lr),
    )
