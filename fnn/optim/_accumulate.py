"""Steps over several batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened
from fnn.optim._hyper import start_step
from fnn.optim._inner import check_count, check_state, check_transformation, choose, updates_if
from fnn.tree import Tree

_OF_ONE_BATCH = ("value", "grad", "value_fn")


class AccumulateState(NamedTuple):
    """State of `accumulate`: `mean` is the sum of the gradients of `count` batches over `n`; `step` counts steps."""

    count: Tensor
    step: Tensor
    mean: Tree
    inner: OptState


def accumulate(n: int, optimizer: GradientTransformation) -> GradientTransformation:
    r"""Take a step of `optimizer` with the mean of the gradients of every `n` updates.

    `n` batches of one size, each with the mean of its losses, then make the step that one batch of them all would.
    Between the steps the updates are zero, and nothing of the optimizer's state moves: its schedules count steps, not
    batches. The mean is kept in float32 for half-precision parameters. `optimizer` is evaluated at each update, one
    graph serves all of them, and what a non-step computes is dropped.

    `value`, `grad` and `value_fn` stay outside, for they are those of one batch: what needs them within is an error.
    `reduce_on_plateau` goes around it: ``reduce_on_plateau(accumulate(n, optimizer))``.

    Leaves that are frozen want no mean: ``freeze(accumulate(n, optimizer), where)``.

    Example:
        >>> from fnn import optim
        >>> opt = optim.accumulate(2, optim.sgd(0.1))
        >>> opt_state = opt.init(torch.zeros(1))
        >>> updates, opt_state = opt.update(torch.tensor([1.0]), opt_state)
        >>> updates
        tensor([-0.])
        >>> opt.update(torch.tensor([3.0]), opt_state)[0]
        tensor([-0.2000])
    """
    check_count("accumulate", 1, n=n)
    check_transformation("accumulate", "optimizer", optimizer)

    def init(params: Tree) -> OptState:
        mean = tree.map(lambda p: torch.zeros_like(widened(p)), params)
        return AccumulateState(start_step(params), start_step(params), mean, optimizer.init(params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, AccumulateState)
        last = state.count == n - 1
        mean = map_same(lambda m, g: m + widened(g) / n, "grads", state.mean, grads)
        shared = {name: given for name, given in extra.items() if name not in _OF_ONE_BATCH}
        updates, inner = optimizer.update(mean, state.inner, params, **shared)
        new = AccumulateState(
            count=(state.count + 1) % n,
            step=state.step + last,
            mean=tree.map(lambda m: torch.where(last, 0.0, m), mean),
            inner=choose(last, inner, state.inner),
        )
        return updates_if(last, updates), new

    return GradientTransformation(init, update)
