"""Transformations of some leaves: `masked` hands the others on, `freeze` stops them."""

from __future__ import annotations

from typing import Any

import torch

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, map_partial
from fnn.optim._hyper import hyperparameters
from fnn.optim._inner import check_transformation
from fnn.tree import Tree, Where


def freeze(optimizer: GradientTransformation, where: Where) -> GradientTransformation:
    """Train all leaves but those that `where` chooses.

    A frozen leaf stays as it is, bit for bit: no update, no weight decay, no optimizer memory, and in a compiled step
    no gradient, for nothing asks for it. `optimizer` sees a tree without it.

    `freeze` goes outermost: ``freeze(chain(clip_by_global_norm(1.0), adamw(1e-3)), "embedding.*")``. What stands
    outside still sees the frozen leaves: a clip before it would count their gradients in the norm, and they would have
    to be computed; weight decay after it is an error.

    Args:
        optimizer: what trains the others. Its state is the state.
        where: a path pattern (``"embedding.*"``, where ``*`` is any text), a predicate `(path, leaf) -> bool` of
            shapes and dtypes, or a tree of bools.

    The updates have ``()`` in the place of a frozen leaf, which `apply_updates` leaves as it is.
    Raises `ValueError` for a pattern that matches nothing.

    Example:
        >>> from fnn import optim
        >>> opt = optim.freeze(optim.adamw(0.1, weight_decay=0.5), "embedding.*")
        >>> params = {"embedding": {"weight": torch.ones(2)}, "head": {"weight": torch.ones(2)}}
        >>> updates, opt_state = opt.update(params, opt.init(params), params)
        >>> optim.apply_updates(params, updates)
        {'embedding': {'weight': tensor([1., 1.])}, 'head': {'weight': tensor([0.8500, 0.8500])}}
    """
    check_transformation("freeze", "optimizer", optimizer)

    def init(params: Tree) -> OptState:
        return optimizer.init(_without(params, tree.mask(params, where)))

    def update(grads: Tree, opt_state: OptState, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        frozen = tree.mask(grads if params is None else params, where)
        grads = _without(grads, frozen, "grads")
        return optimizer.update(grads, opt_state, None if params is None else _without(params, frozen), **extra)

    return GradientTransformation(init, update)


def masked(transformation: GradientTransformation, where: Where) -> GradientTransformation:
    """Apply a transformation to the leaves that `where` chooses, and hand the gradients of the others on as they are.

    For the parts of an optimizer: a clip of one layer, weight decay of some. `where` as in `freeze`; the state is that
    of the transformation, without memory for the other leaves.
    Raises `ValueError` for a pattern that matches nothing, and for a whole optimizer (one with a learning rate): the
    gradients that it does not see would be added to the parameters. Use `freeze` or `by_label` there.

    Example:
        >>> from fnn import optim
        >>> opt = optim.chain(optim.masked(optim.clip(1.0), "head.*"), optim.sgd(0.1))
        >>> params = {"body": torch.zeros(1), "head": {"weight": torch.zeros(1)}}
        >>> grads = {"body": torch.tensor([5.0]), "head": {"weight": torch.tensor([5.0])}}
        >>> opt.update(grads, opt.init(params))[0]
        {'body': tensor([-0.5000]), 'head': {'weight': tensor([-0.1000])}}
    """
    check_transformation("masked", "transformation", transformation)

    def init(params: Tree) -> OptState:
        state = transformation.init(_without(params, _others(params, where)))
        for path, _ in hyperparameters(state):
            if path.rpartition(".")[2] == "lr":
                raise ValueError(
                    f"masked: the transformation has a learning rate ({path!r}), so the gradients that masked hands on "
                    "would be added to parameters as they are. To train some leaves only use "
                    "freeze(optimizer, where) with the others, for an optimizer each by_label(optimizers, labels)"
                )
        return state

    def update(grads: Tree, opt_state: OptState, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        others = _others(grads if params is None else params, where)
        chosen = _without(grads, others, "grads")
        within = None if params is None else _without(params, others)
        updates, opt_state = transformation.update(chosen, opt_state, within, **extra)

        def merge(g: Any, other: bool, u: Any) -> Any:
            return g if other else u

        return map_partial(merge, "updates", grads, others, updates), opt_state

    return GradientTransformation(init, update)


def _others(x: Tree, where: Where) -> Tree:
    return tree.map(lambda chosen: not chosen, tree.mask(x, where))


def _without(x: Tree, dropped: Tree, name: str = "params") -> Tree:
    """`x`, which is called `name`, with ``()`` in the place of the leaves to drop, as `tree.partition` has it."""
    if not torch.compiler.is_compiling() and (found := tree.difference(dropped, x)) is not None:
        raise ValueError(f"{name}: {found}")
    return tree.map(lambda leaf, drop: () if drop else leaf, x, dropped)
