"""The contract of a gradient transformation, written once.

A transformation is a pair of pure functions. `init` makes the state from the parameters; `update` turns
gradients into updates and the state into the next one, of the same structure, shapes and dtypes. States are
tuples and NamedTuples of tensors: no callables, no `None`.

A next state is made by its constructor: in torch 2.11 a compiled `_replace` gives an empty tuple.

Arithmetic is done in float32 or wider, and rounded once, where a number is stored: in a moment or in a
parameter. Between transformations the updates of half-precision parameters are therefore float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fnn import tree
from fnn.tree import Tree

OptState = Any

_HALF = (torch.float16, torch.bfloat16)


class Init(Protocol):
    """`opt_state = init(params)`"""

    def __call__(self, params: Tree, /) -> OptState: ...


class Update(Protocol):
    """`updates, opt_state = update(grads, opt_state, params, **extra)`

    `params` may be left out where no part of the chain needs it; `extra` carries values that some
    transformations ask for by name (a loss, say) and the others ignore.
    """

    def __call__(
        self, grads: Tree, opt_state: OptState, /, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, OptState]: ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turns gradients into updates.

    `opt_state = init(params)`; `updates, opt_state = update(grads, opt_state, params)`. Updates are
    added to the parameters by `apply_updates`. What depends on Python values (flags, masks, zero decay) is settled
    when the pair is made; what may change while training is a tensor in the state.

    Example:
        >>> from fnn import optim, tree
        >>> def init(params):
        ...     return ()
        >>> def update(grads, opt_state, params=None, **extra):
        ...     return tree.map(torch.sign, grads), opt_state
        >>> sign_descent = optim.chain(optim.GradientTransformation(init, update), optim.scale_by_learning_rate(0.1))
        >>> sign_descent.update(torch.tensor([3.0, -2.0]), sign_descent.init(torch.zeros(2)))[0]
        tensor([-0.1000,  0.1000])
    """

    init: Init
    update: Update


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """The stepped parameters, `params + updates` leaf by leaf, each in its own dtype.

    Where the updates have ``()`` in the place of a leaf, as those of `freeze` have, the leaf is handed on as it is.
    Raises `ValueError` naming the path where the two trees differ in structure or shape.

    Example:
        >>> from fnn import optim
        >>> optim.apply_updates({"weight": torch.ones(2)}, {"weight": torch.tensor([0.5, -1.0])})
        {'weight': tensor([1.5000, 0.0000])}
    """

    def step(p: Tensor, u: Tensor) -> Tensor:
        if is_absent(u):
            return p
        if not isinstance(u, Tensor) or u.shape != p.shape:
            whole = map_partial(fill, "updates", params, updates)
            raise ValueError(f"updates: {tree.difference(params, whole) or _misfit(params, whole)}")
        return (widened(p) + u).to(p.dtype)

    return map_partial(step, "updates", params, updates)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype in which arithmetic on it is done: float32 for half precision, its own otherwise."""
    # no .to() without effect: each would be a node in every graph, three for each parameter
    return x.float() if x.dtype in _HALF else x


def check_moment_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is `None` or a real floating one in which the square of a small gradient is not 0."""
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and (not floating or dtype == torch.float16):
        raise TypeError(
            "moment_dtype must be None or a real floating dtype of the range of float32, as torch.bfloat16 has it, "
            f"got {dtype!r}"
        )


def zeros(params: Tree, dtype: torch.dtype | None) -> Tree:
    """A moment of the parameters at its start: zeros in `dtype`, or in each leaf's own where that is `None`.

    Never float16: the square of a gradient of 1e-4 is 0 there, and Adam's update 10000 times too large.
    """
    check_moment_dtype(dtype)

    def start(p: Tensor) -> Tensor:
        return torch.zeros_like(p, dtype=torch.float32 if dtype is None and p.dtype == torch.float16 else dtype)

    return tree.map(start, params)


def map_same(f: Callable[..., Any], name: str, expected: Tree, actual: Tree, *rest: Tree) -> Tree:
    """`tree.map` over `expected, actual, *rest` that refuses to broadcast; `name` is what `actual` is called.

    Shapes are compared by Python, at no cost in a compiled step.
    """
    # while tracing, tree.map compares the structures itself; to do it twice would be a third of the tracing time
    if not torch.compiler.is_compiling() and (found := tree.difference(expected, actual)) is not None:
        raise ValueError(f"{name}: {found}")

    def same(want: Tensor, leaf: Tensor, *others: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.shape != want.shape:
            raise ValueError(f"{name}: {_misfit(expected, actual)}")
        return f(want, leaf, *others)

    return tree.map(same, expected, actual, *rest)


def is_absent(piece: Any) -> bool:
    """Whether a piece of a tree is the ``()`` that stands in the place of a leaf."""
    return isinstance(piece, tuple) and len(piece) == 0


def map_partial(f: Callable[..., Any], name: str, whole: Tree, *partial: Tree) -> Tree:
    """`tree.map` over a tree and others that may have ``()`` in the place of its leaves; `f` is called with those too.

    `name` is what the partial trees are called.
    """
    if torch.compiler.is_compiling():
        return tree.map(f, whole, *partial)  # which does not compare structures while tracing
    flat, structure = tree.flatten(whole)
    try:
        columns = [structure.flatten_up_to(other) for other in partial]
    except ValueError as error:
        found = next((found for other in partial if (found := tree.difference(whole, other)) is not None), error)
        raise ValueError(f"{name}: {found}") from None
    return tree.unflatten(structure, [f(*pieces) for pieces in zip(flat, *columns, strict=True)])


def fill(whole: Any, partial: Any) -> Any:
    """The leaf of a partial tree, or where it has ``()`` that of the whole one; for `map_partial`."""
    return whole if is_absent(partial) else partial


def _misfit(expected: Tree, actual: Tree) -> str:
    """The first leaf of the wrong shape, in words."""
    for (path, leaf), want in zip(tree.paths(actual).items(), tree.leaves(expected), strict=True):
        got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"no shape but is {type(leaf).__name__}"
        if getattr(leaf, "shape", None) != want.shape:
            return f"{f'leaf {path!r}' if path else 'the tensor'} has {got}, expected shape {tuple(want.shape)}"
    return "the leaves differ"
