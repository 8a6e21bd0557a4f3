"""Steps that are left out where a gradient is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState
from fnn.optim._hyper import start_step
from fnn.optim._inner import check_count, check_state, check_transformation, choose, updates_if
from fnn.tree import Tree


class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`: errors in a row, errors in all, and whether the last gradients were finite."""

    consecutive: Tensor
    total: Tensor
    last_finite: Tensor
    inner: OptState


def apply_if_finite(optimizer: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """Leave out the step where a gradient is infinite or NaN: no parameter moves, nor the optimizer's state.

    After `max_consecutive_errors` such steps in a row the next one is taken all the same, so that a run that is
    broken is seen to be; gradients that are finite again start a new row. As in Optax.

    In `train.make_step`, which guards the state itself, a step whose loss is not finite counts here neither.

    Example:
        >>> from fnn import optim
        >>> opt = optim.apply_if_finite(optim.sgd(0.1), max_consecutive_errors=3)
        >>> updates, opt_state = opt.update(torch.tensor([1.0, torch.nan]), opt.init(torch.zeros(2)))
        >>> updates, int(opt_state.total)
        (tensor([-0., -0.]), 1)
    """
    check_count("apply_if_finite", 0, max_consecutive_errors=max_consecutive_errors)
    check_transformation("apply_if_finite", "optimizer", optimizer)

    def init(params: Tree) -> OptState:
        zero = start_step(params)
        return ApplyIfFiniteState(zero, zero.clone(), torch.ones_like(zero, dtype=torch.bool), optimizer.init(params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, ApplyIfFiniteState)
        finite = _all_finite(grads, state.last_finite)
        consecutive = torch.where(finite, 0, state.consecutive + 1)
        accepted = finite | (consecutive > max_consecutive_errors)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        new = ApplyIfFiniteState(
            consecutive=consecutive,
            total=state.total + ~finite,
            last_finite=finite,
            inner=choose(accepted, inner, state.inner),
        )
        return updates_if(accepted, updates), new

    return GradientTransformation(init, update)


def _all_finite(x: Tree, like: Tensor) -> Tensor:
    """Whether all elements of all leaves are finite: a 0-d bool; `like` is another."""
    flags = [torch.isfinite(leaf).all() for leaf in tree.leaves(x)]
    return torch.stack(flags).all() if flags else torch.ones_like(like)
