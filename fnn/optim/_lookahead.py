"""Lookahead: slow parameters that follow fast ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, is_absent, map_partial, widened
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start, start_step
from fnn.optim._inner import check_count, check_state, check_transformation
from fnn.tree import Tree


class LookaheadState(NamedTuple):
    """State of `lookahead`: `count` steps since the parameters were last set to the slow ones."""

    count: Tensor
    slow_step_size: Hyperparameter | Scheduled
    slow: Tree
    inner: OptState

    def eval_params(self, params: Tree) -> Tree:
        """The parameters to evaluate with, for `optim.eval_params`; `()` where a leaf is not averaged."""
        return self.slow


def lookahead(
    optimizer: GradientTransformation, sync_period: int = 5, slow_step_size: ScalarOrSchedule = 0.5
) -> GradientTransformation:
    r"""Every `sync_period` steps of `optimizer` go back to where they began, but for a part of the way.

    .. math::
        \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    with the parameters :math:`\theta`, :math:`\alpha` the `slow_step_size` and :math:`\phi` the slow parameters, which
    the state keeps; `eval_params(opt_state, params)` reads them. Optax's `lookahead` (its state of the fast optimizer
    is kept as well), but on plain parameters. `update` needs the parameters. Nothing may change the updates
    afterwards: it goes outermost, but for `freeze`.

    Example:
        >>> from fnn import optim
        >>> opt = optim.lookahead(optim.sgd(1.0), sync_period=2, slow_step_size=0.5)
        >>> params = torch.tensor([0.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(2):
        ...     updates, opt_state = opt.update(torch.tensor([-1.0]), opt_state, params)
        ...     params = optim.apply_updates(params, updates)
        ...     print(params)
        tensor([1.])
        tensor([1.])

    Reference: Zhang, Lucas, Hinton, Ba, Lookahead optimizer: k steps forward, 1 step back, 2019,
    https://arxiv.org/abs/1907.08610
    """
    given = check(slow_step_size=slow_step_size)
    check_count("lookahead", 1, sync_period=sync_period)
    check_transformation("lookahead", "optimizer", optimizer)

    def init(params: Tree) -> OptState:
        slow = tree.map(torch.clone, params)  # the state owns its memory
        return LookaheadState(start_step(params), slow=slow, inner=optimizer.init(params), **start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, LookaheadState)
        if params is None:
            raise ValueError("lookahead needs the parameters: opt.update(grads, opt_state, params)")
        (rate,), hyper = advance(given, state)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        sync = state.count == sync_period - 1

        def follow(p: Tensor, s: Tensor, u: Any) -> Tensor:
            if is_absent(u):
                return s
            moved = widened(s) + rate * (widened(p) + u - widened(s))
            return torch.where(sync, moved.to(s.dtype), s)

        def back(p: Tensor, s: Tensor, u: Any) -> Any:
            return u if is_absent(u) else torch.where(sync, widened(s) - widened(p), u)

        slow = map_partial(follow, "updates", params, state.slow, updates)
        updates = map_partial(back, "updates", params, slow, updates)
        return updates, LookaheadState(count=(state.count + 1) % sync_period, slow=slow, inner=inner, **hyper)

    return GradientTransformation(init, update)
