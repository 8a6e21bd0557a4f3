"""Momentum: a decaying sum of the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import identity
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened, zeros
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, is_zero, start, start_step
from fnn.tree import Tree


class TraceState(NamedTuple):
    """State of `trace`. `dampening` and `step` are ``()`` where there is no dampening."""

    momentum: Hyperparameter | Scheduled
    dampening: Hyperparameter | Scheduled | tuple[()]
    step: Tensor | tuple[()]
    trace: Tree


def trace(
    momentum: ScalarOrSchedule,
    *,
    nesterov: bool = False,
    dampening: ScalarOrSchedule = 0.0,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Momentum as `torch.optim.SGD` has it, not averaged: :math:`b_1 = g_1`, :math:`b_t = \mu b_{t-1} + (1 - d) g_t`.

    The updates are :math:`b_t`, with `nesterov` :math:`g_t + \mu b_t`. `moment_dtype` is the dtype of :math:`b`,
    by default each parameter's own (float32 for float16). A `momentum` that is a Python zero leaves nothing to do and
    nothing in memory.
    Raises `ValueError` for `nesterov` without momentum or with dampening.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.trace(0.9)
        >>> state = transformation.init(torch.zeros(1))
        >>> updates, state = transformation.update(torch.ones(1), state)
        >>> updates, state = transformation.update(torch.ones(1), state)
        >>> updates
        tensor([1.9000])
    """
    given = check(momentum=momentum, dampening=dampening)
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening 0, got momentum={momentum!r}, dampening={dampening!r}"
        )
    if is_zero(momentum):
        return identity()
    damped = not is_zero(dampening)
    if not damped:
        del given["dampening"]

    def init(params: Tree) -> OptState:
        hyper = {"dampening": (), **start(given, params)}
        return TraceState(step=start_step(params) if damped else (), trace=zeros(params, moment_dtype), **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        values, hyper = advance(given, state)
        momentum, weight, step = values[0], None, ()
        if damped:
            # torch starts the sum at the first gradient, undamped
            weight = torch.where(state.step == 0, 1.0, 1 - values[1])
            step = state.step + 1

        def add(b: Tensor, g: Tensor) -> Tensor:
            g = widened(g)
            return (momentum * widened(b) + (g if weight is None else weight * g)).to(b.dtype)

        sums = map_same(add, "grads", state.trace, grads)
        if nesterov:
            updates = tree.map(lambda b, g: widened(g) + momentum * widened(b), sums, grads)
        else:
            updates = tree.map(widened, sums)
        return updates, TraceState(step=step, trace=sums, **{"dampening": (), **hyper})

    return GradientTransformation(init, update)
