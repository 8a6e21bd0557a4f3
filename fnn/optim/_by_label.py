"""Groups of leaves, each with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, map_partial
from fnn.optim._inner import check_transformation
from fnn.tree import Tree

Labels = dict[str, str] | Callable[[str, Any], str] | Tree


def by_label(optimizers: dict[str, GradientTransformation], labels: Labels) -> GradientTransformation:
    """Give groups of leaves optimizers of their own, as the parameter groups of `torch.optim` do.

    The state is a dict with the state of each group's optimizer, which has memory for the leaves of its group only;
    `get` and `set` reach them by paths such as ``"head.2.lr"``.

    Args:
        optimizers: by label, a string without dots.
        labels: which leaf has which: ``{"head.*": "head", "*": "body"}``, patterns of paths of which the first that
            matches counts; a function `(path, leaf) -> label` of shapes and dtypes; or a tree of labels.

    A group that is not to be trained: ``freeze(by_label(...), where)``. Each optimizer sees its group only, so that a
    `clip_by_global_norm` within it takes the norm of the group.
    Raises `ValueError` for a leaf without a label, for a label without an optimizer, and for an optimizer or a pattern
    without leaves.

    Example:
        >>> from fnn import optim
        >>> opt = optim.by_label(
        ...     {"body": optim.adam(0.01), "head": optim.sgd(0.1)}, {"head.*": "head", "*": "body"}
        ... )
        >>> params = {"body": torch.zeros(1), "head": {"weight": torch.zeros(1)}}
        >>> updates, opt_state = opt.update(tree.map(torch.ones_like, params), opt.init(params))
        >>> updates
        {'body': tensor([-0.0100]), 'head': {'weight': tensor([-0.1000])}}
        >>> optim.get(opt_state, "head.2.lr")
        tensor(0.1000)
    """
    if not isinstance(optimizers, dict) or not optimizers:
        raise TypeError(f"by_label: optimizers must be a dict of optimizers by label, got {optimizers!r}")
    for label, optimizer in optimizers.items():
        if not isinstance(label, str) or not label or "." in label:
            raise ValueError(
                f"by_label: a label is one part of paths such as 'head.2.lr', so it must be a non-empty string without "
                f"dots, got {label!r}"
            )
        check_transformation("by_label", f"the optimizer {label!r}", optimizer)

    def init(params: Tree) -> OptState:
        marked = _labels(params, labels)
        _check_labels(marked, optimizers)
        return {label: optimizer.init(_group(params, marked, label)) for label, optimizer in optimizers.items()}

    def update(grads: Tree, opt_state: OptState, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if not isinstance(opt_state, dict) or list(opt_state) != list(optimizers):
            raise ValueError(
                f"opt_state: expected a dict of the states of {', '.join(map(repr, optimizers))}, got "
                f"{type(opt_state).__name__}; use the state that this optimizer's init(params) returned"
            )
        marked = _labels(grads if params is None else params, labels)
        if not torch.compiler.is_compiling() and (found := tree.difference(marked, grads)) is not None:
            raise ValueError(f"grads: {found}")
        found, states = [], {}
        for label, optimizer in optimizers.items():
            within = None if params is None else _group(params, marked, label)
            updates, states[label] = optimizer.update(_group(grads, marked, label), opt_state[label], within, **extra)
            found.append(updates)
        order = list(optimizers)

        def own(label: str, *updates: Any) -> Any:
            return updates[order.index(label)]

        return map_partial(own, "updates", marked, *found), states

    return GradientTransformation(init, update)


def _group(x: Tree, marked: Tree, label: str) -> Tree:
    """`x` with ``()`` in the place of the leaves of other groups."""
    return tree.map(lambda leaf, own: leaf if own == label else (), x, marked)


def _labels(params: Tree, labels: Labels) -> Tree:
    """The label of each leaf, in the structure of the parameters."""
    if callable(labels):
        named = [labels(path, leaf) for path, leaf in tree.paths(params).items()]
    elif isinstance(labels, dict) and all(isinstance(label, str) for label in labels.values()):
        # for a flat dict of parameters its tree of labels is this too
        named = _first_match(params, labels)
    else:
        if (found := tree.difference(params, labels)) is not None:
            raise ValueError(f"labels: {found}")
        named = tree.leaves(labels)
    return tree.unflatten(tree.flatten(params)[1], named)


def _first_match(params: Tree, labels: dict[str, str]) -> list[str]:
    named: list[Any] = [None for _ in tree.leaves(params)]
    for pattern, label in labels.items():
        chosen = tree.leaves(tree.mask(params, pattern))
        named = [label if name is None and c else name for name, c in zip(named, chosen, strict=True)]
    for path, name in zip(tree.paths(params), named, strict=True):
        if name is None:
            raise ValueError(
                f"labels: no pattern of {', '.join(map(repr, labels))} matches the leaf {path!r}; a last pattern '*' "
                "labels all that are left"
            )
    return named


def _check_labels(marked: Tree, optimizers: dict[str, Any]) -> None:
    known = ", ".join(map(repr, optimizers))
    for path, label in tree.paths(marked).items():
        if label not in optimizers:
            raise ValueError(f"labels: the leaf {path!r} has the label {label!r}, but the optimizers are {known}")
    for label in optimizers:
        if label not in tree.leaves(marked):
            raise ValueError(
                f"labels: no leaf has the label {label!r}; of patterns the first that matches counts, so put the "
                "particular ones before the general"
            )
