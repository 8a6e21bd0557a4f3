"""L-BFGS: Newton's direction by the changes of parameters and gradients in the last few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened
from fnn.optim._hyper import ScalarOrSchedule, start_step
from fnn.optim._inner import check_count, check_state
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._line_search import strong_wolfe
from fnn.tree import Tree

_LEAST_CURVATURE = 1e-10  # torch's: changes with less say nothing about the Hessian


class ScaleByLbfgsState(NamedTuple):
    """State of `scale_by_lbfgs`, over all n elements of the parameters as one vector, float32 or wider.

    `params` and `grads` of the latest step: (n,). `steps` and `changes` of parameters and gradients, the newest last:
    (history, n); `weights`, one over their inner products, 0 in rows not yet used: (history,). `scale` of the first
    approximation of the inverse Hessian, and `step`, the number of updates: 0-d.
    """

    step: Tensor
    params: Tensor
    grads: Tensor
    steps: Tensor
    changes: Tensor
    weights: Tensor
    scale: Tensor


def scale_by_lbfgs(history: int = 10) -> GradientTransformation:
    r"""Multiply the gradients by an approximation :math:`H` of the inverse Hessian.

    .. math::
        H_{i+1} = (I - w_i s_i y_i^\top) \, H_i \, (I - w_i y_i s_i^\top) + w_i s_i s_i^\top, \qquad
        s_i = p_{i+1} - p_i, \quad y_i = g_{i+1} - g_i, \quad w_i = 1 / s_i^\top y_i

    over the last `history` steps, from :math:`H = s^\top y / y^\top y` of the newest. Steps along which the gradient
    does not grow are left out. The first update, which knows nothing of the Hessian, is the gradient over its 1-norm
    where that is more than 1. Memory is `2 * history + 2` times the parameters. `update` needs the parameters.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_lbfgs()
        >>> transformation.update(torch.tensor([3.0, 1.0]), transformation.init(torch.ones(2)), torch.ones(2))[0]
        tensor([0.7500, 0.2500])

    Reference: Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989,
    https://doi.org/10.1007/BF01589116
    """
    check_count("lbfgs", 1, history=history)

    def init(params: Tree) -> OptState:
        step = start_step(params)
        vector, _ = _vector(params)
        zeros = torch.zeros_like(vector)
        rows = vector.new_zeros(history, len(vector))
        return ScaleByLbfgsState(
            step=step,
            params=zeros,
            grads=zeros.clone(),
            steps=rows,
            changes=rows.clone(),
            weights=vector.new_zeros(history),
            scale=vector.new_ones(()),
        )

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, ScaleByLbfgsState)
        if params is None:
            raise ValueError("L-BFGS needs the parameters: opt.update(grads, opt_state, params)")
        p, _ = _vector(params)
        g, unravel = _vector(map_same(lambda _, g: g, "grads", params, grads))
        s, y = p - state.params, g - state.grads
        curvature = torch.dot(s, y)
        known = (state.step > 0) & (curvature > _LEAST_CURVATURE)
        weight = 1 / torch.where(known, curvature, 1)

        def remember(rows: Tensor, new: Tensor) -> Tensor:
            return torch.where(known, torch.cat([rows[1:], new[None]]), rows)

        steps, changes = remember(state.steps, s), remember(state.changes, y)
        weights = remember(state.weights, weight)
        scale = torch.where(known, curvature / torch.where(known, torch.dot(y, y), 1), state.scale)
        first = torch.where(state.step == 0, (1 / g.abs().sum()).clamp(max=1), 1)
        direction = first * _inverse_hessian_times(g, steps, changes, weights, scale)
        after = ScaleByLbfgsState(state.step + 1, p, g, steps, changes, weights, scale)
        return unravel(direction), after

    return GradientTransformation(init, update)


def _vector(x: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one vector of their own, float32 or wider, and the way back."""
    vector, unravel = tree.ravel(tree.map(widened, x))
    # of one leaf, ravel gives a view: the state must not share the parameters' memory
    return vector.clone(), unravel


def _inverse_hessian_times(g: Tensor, steps: Tensor, changes: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """The two loops of L-BFGS. Rows of weight 0 add nothing."""
    rows = list(zip(steps.unbind(), changes.unbind(), weights.unbind(), strict=True))
    shares = []
    for s, y, weight in reversed(rows):
        share = weight * torch.dot(s, g)
        g = g - share * y
        shares.append(share)
    g = scale * g
    for (s, y, weight), share in zip(rows, reversed(shares), strict=True):
        g = g + (share - weight * torch.dot(y, g)) * s
    return g


def lbfgs(
    lr: ScalarOrSchedule = 1.0,
    history: int = 10,
    *,
    line_search: str | None = None,
    max_evaluations: int = 25,
) -> GradientTransformation:
    r"""L-BFGS, for smooth losses without noise, equal to `torch.optim.LBFGS` with one iteration a step.

    .. math:: p_t = p_{t-1} - \alpha_t \eta \, H_t g_t

    with the approximation :math:`H` of the inverse Hessian of `scale_by_lbfgs`, and :math:`\alpha_t` = 1 or what the
    line search finds. There is no stopping test: at a minimum the updates become 0.

    Args:
        lr: :math:`\eta`, a float, 0-d tensor or schedule; with a line search the first step length tried.
        history: how many steps :math:`H` is made of.
        line_search: `None`, or "strong_wolfe" as in torch. The call is then
            ``opt.update(grads, opt_state, params, value_fn=f, value=value, grad=grads)``; see `strong_wolfe`.
        max_evaluations: how many step lengths the line search tries at most.

    Raises `ValueError` for an unknown line search.

    Example:
        >>> from fnn import optim
        >>> def f(p):
        ...     return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        >>> opt = optim.lbfgs(line_search="strong_wolfe")
        >>> params = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> opt_state = opt.init(params)
        >>> for _ in range(40):
        ...     grads, value = torch.func.grad_and_value(f)(params)
        ...     updates, opt_state = opt.update(grads, opt_state, params, value_fn=f, value=value, grad=grads)
        ...     params = optim.apply_updates(params, updates)
        >>> params
        tensor([1.0000, 1.0000], dtype=torch.float64)

    Reference: Liu and Nocedal, On the limited memory BFGS method for large scale optimization, 1989,
    https://doi.org/10.1007/BF01589116
    """
    direction = chain(scale_by_lbfgs(history), scale_by_learning_rate(lr))
    if line_search is None:
        return direction
    if line_search != "strong_wolfe":
        raise ValueError(f"lbfgs: line_search must be 'strong_wolfe' or None, got {line_search!r}")
    return chain(direction, strong_wolfe(max_evaluations))
