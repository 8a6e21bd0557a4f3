"""Weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

from fnn import tree
from fnn.optim._chain import identity
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, is_zero, start
from fnn.tree import Tree, Where


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`."""

    weight_decay: Hyperparameter | Scheduled


def add_decayed_weights(weight_decay: ScalarOrSchedule, mask: Where | None = None) -> GradientTransformation:
    r"""Add weight decay to the gradients: :math:`u = g + \lambda p`.

    Before the moments of an optimizer this is L2 regularization (of :math:`\lambda/2 \lVert p \rVert^2`), after
    them decoupled weight decay. `mask` chooses the leaves that decay, all by default: a path pattern
    (``"*.weight"``), a predicate `(path, leaf) -> bool` of shapes and dtypes, or a tree of bools.
    `update` needs the parameters. A `weight_decay` that is a Python zero leaves nothing to do.

    Example:
        >>> import torch
        >>> from fnn import optim
        >>> transformation = optim.add_decayed_weights(0.1, mask="weight")
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> grads = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
        >>> transformation.update(grads, transformation.init(params), params)[0]
        {'weight': tensor([0.1000]), 'bias': tensor([0.])}

    Reference: Loshchilov and Hutter, Decoupled weight decay regularization, 2019, https://arxiv.org/abs/1711.05101
    """
    given = check(weight_decay=weight_decay)
    if is_zero(weight_decay):
        return identity()

    def init(params: Tree) -> OptState:
        _decays(params, mask)  # a pattern that matches nothing is known here
        return AddDecayedWeightsState(**start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if params is None:
            raise ValueError("weight decay needs the parameters: opt.update(grads, opt_state, params)")
        (decay,), hyper = advance(given, state)
        updates = map_same(
            lambda p, g, decays: widened(g) + decay * widened(p) if decays else g,
            "grads",
            params,
            grads,
            _decays(params, mask),
        )
        return updates, AddDecayedWeightsState(**hyper)

    return GradientTransformation(init, update)


def _decays(params: Tree, mask: Where | None) -> Tree:
    return tree.map(lambda _: True, params) if mask is None else tree.mask(params, mask)
