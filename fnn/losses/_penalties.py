"""Penalties on the size of parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fnn import tree
from fnn.losses._reduction import widened
from fnn.tree import Tree, Where


def l1_penalty(params: Tree, where: Where | None = None) -> Tensor:
    r"""Sum of absolute values, :math:`\sum |p|`, over the leaves of a tree; its derivative at 0 is taken as 0.

    `where` chooses the leaves, all by default: a path pattern (``"*.weight"``), a predicate `(path, leaf) -> bool`, or
    a tree of bools. Returns a 0-d tensor, float32 or wider. Raises `TypeError` naming a chosen leaf that is not
    floating, `ValueError` for a pattern that matches nothing.

    Example:
        >>> from fnn import losses
        >>> losses.l1_penalty({"weight": torch.tensor([1.0, -2.0]), "bias": torch.ones(1)}, where="weight")
        tensor(3.)
    """
    return _penalty("l1_penalty", torch.abs, params, where)


def l2_penalty(params: Tree, where: Where | None = None) -> Tensor:
    r"""Sum of squares, :math:`\sum p^2`, over the leaves of a tree. There is no factor 1/2: the gradient is :math:`2p`.

    Added to a loss as `0.5 * decay * l2_penalty(params)` it equals the `weight_decay` of `optim.sgd`.
    Arguments, result and errors as in `l1_penalty`.

    Example:
        >>> from fnn import losses
        >>> losses.l2_penalty({"weight": torch.tensor([1.0, -2.0]), "bias": torch.ones(1)})
        tensor(6.)
    """
    return _penalty("l2_penalty", torch.square, params, where)


def _penalty(name: str, f: Callable[[Tensor], Tensor], params: Tree, where: Where | None) -> Tensor:
    chosen = tree.paths(params)
    if where is not None:
        picks = tree.leaves(tree.mask(params, where))
        chosen = {path: leaf for (path, leaf), pick in zip(chosen.items(), picks, strict=True) if pick}
    total = None
    for path, leaf in chosen.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{name}: leaf {path!r} is {kind}, expected a floating tensor; leave it out with where=")
        term = f(widened(leaf)).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total
