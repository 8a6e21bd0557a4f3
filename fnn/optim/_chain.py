"""Transformations one after the other."""

from __future__ import annotations

from typing import Any

from fnn.optim._contract import GradientTransformation, OptState
from fnn.tree import Tree


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Apply transformations in turn: the updates of each are the gradients of the next.

    The state is the tuple of their states. Raises `TypeError` for an argument that is no transformation, and
    `ValueError` for a state that another chain made.

    Example:
        >>> import torch
        >>> from fnn import optim
        >>> opt = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1, momentum=0.9))
        >>> updates, opt_state = opt.update(torch.tensor([3.0, 4.0]), opt.init(torch.zeros(2)))
        >>> updates
        tensor([-0.0600, -0.0800])
    """
    for position, transformation in enumerate(transformations):
        if not isinstance(transformation, GradientTransformation):
            raise TypeError(
                f"chain: argument {position} is {transformation!r}, expected a GradientTransformation "
                "such as sgd(0.1); was a factory passed without calling it?"
            )

    def init(params: Tree) -> OptState:
        return tuple(transformation.init(params) for transformation in transformations)

    def update(grads: Tree, opt_state: OptState, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if type(opt_state) is not tuple or len(opt_state) != len(transformations):
            size = f" of {len(opt_state)}" if isinstance(opt_state, tuple) else ""
            raise ValueError(
                f"opt_state: expected a tuple of {len(transformations)} states as this optimizer's init(params) makes "
                f"it, got {type(opt_state).__name__}{size}; the call is opt.update(grads, opt_state, params)"
            )
        states = []
        for transformation, state in zip(transformations, opt_state, strict=True):
            grads, state = transformation.update(grads, state, params, **extra)
            states.append(state)
        return grads, tuple(states)

    return GradientTransformation(init, update)


def identity() -> GradientTransformation:
    """Hand the gradients on as they are. The state is ``()``.

    Example:
        >>> import torch
        >>> from fnn import optim
        >>> optim.identity().update(torch.ones(2), ())
        (tensor([1., 1.]), ())
    """

    def init(params: Tree) -> OptState:
        return ()

    def update(grads: Tree, opt_state: OptState, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if not isinstance(opt_state, tuple) or len(opt_state) != 0:
            raise ValueError(
                f"opt_state: identity has no state, got {type(opt_state).__name__}; it was made by another optimizer. "
                "Use the state that this optimizer's init(params) returned"
            )
        return grads, opt_state

    return GradientTransformation(init, update)
