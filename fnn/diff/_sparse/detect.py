"""The pattern of a Jacobian or Hessian, for every input of the same shapes, from one traced graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function
from fnn.diff._arguments import Argnums
from fnn.diff._purity import call
from fnn.diff._sparse.flat import FlatFunction
from fnn.diff._sparse.index_sets import rows_and_columns
from fnn.diff._sparse.pattern import SparsityPattern, sorted_pattern
from fnn.diff._sparse.propagate import propagate
from fnn.diff._sparse.trace import linear_graph


def jacobian_sparsity(f: Callable[..., Any], *args: Any, argnums: Argnums = 0, **kwargs: Any) -> SparsityPattern:
    """Which entries of the Jacobian of `f` may differ from zero, at any inputs of the shapes of `args`.

    f: a function of pytrees of real tensors. argnums: the arguments to differentiate. Rows and columns are in
    `fnn.tree`'s leaf order, as in `jacobian(flat=True)`. The pattern holds for all values: both branches of
    `torch.where` count, an entry that happens to be zero here too. Tensors that `f` closes over are constants, whose
    zeros and indices are used (those that require a gradient are not: they are trained in place); other arguments may
    change from call to call. Operations whose dependence is not known are taken to depend on everything, and the
    result names them.
    Raises `ValueError` for a function that branches on values or draws from torch's generator.

    Example:
        >>> jacobian_sparsity(lambda x: x[1:] - x[:-1], torch.ones(4))
        SparsityPattern(3x4, nnz=6)
    """
    check_function("jacobian_sparsity", f)
    function = FlatFunction("jacobian_sparsity", f, argnums, False, False)
    return call(function.name, detect, function, args, kwargs)[0]


def hessian_sparsity(f: Callable[..., Any], *args: Any, argnums: Argnums = 0, **kwargs: Any) -> SparsityPattern:
    """Which entries of the Hessian of `f` may differ from zero, at any inputs of the shapes of `args`.

    f: a function of pytrees of real tensors to a scalar of shape (). Otherwise as `jacobian_sparsity`, of the gradient;
    the pattern is symmetric.

    Example:
        >>> hessian_sparsity(lambda x: x[0] * x[1] + x[2], torch.ones(3)).to_dense().int()
        tensor([[0, 1, 0],
                [1, 0, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    check_function("hessian_sparsity", f)
    function = FlatFunction("hessian_sparsity", f, argnums, False, True)
    return call(function.name, detect, function, args, kwargs)[0]


def detect(
    function: FlatFunction, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str = "auto"
) -> tuple[SparsityPattern, str]:
    """The pattern, and the mode in which the graph could be traced: the one asked for, or for "auto" the first to work.

    A Hessian's modes are those of the second derivative.
    """
    _, x = function.bind(args, kwargs)
    leaves, structure = tree.flatten((args, kwargs))
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def flat(x: Tensor, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        # arguments that are not differentiated are inputs of the graph too: their values are not to be relied on
        all_args, all_kwargs = tree.unflatten(structure, [next(given) if isinstance(v, Tensor) else v for v in leaves])
        evaluate, _ = function.bind(all_args, all_kwargs)
        return evaluate(x)[0]

    map_of = torch.func.grad(flat) if function.scalar else flat
    for attempt in ("fwd", "rev") if mode == "auto" else (mode,):
        try:
            graph = linear_graph(function.name, map_of, x.detach(), [t.detach() for t in others], attempt)
        except NotImplementedError:
            if attempt == "rev" or mode != "auto":
                raise
            continue
        break
    outputs, inputs = _sizes(graph)
    try:
        sets, conservative = propagate(graph, (inputs,))
        rows, cols = (np.zeros(0, np.int64),) * 2 if sets is None else rows_and_columns(sets)
    except OverflowError as error:
        raise ValueError(
            f"{function.name}: the pattern has too many entries to be worth storing ({error}): some operation makes "
            "everything depend on everything. Use a dense derivative, or give the pattern: pattern="
        ) from error
    if attempt == "rev":
        rows, cols, outputs, inputs = cols, rows, inputs, outputs
    pattern = sorted_pattern((outputs, inputs), rows, cols, conservative)
    return (_symmetric(pattern) if function.scalar else pattern), attempt


def _sizes(graph: Any) -> tuple[int, int]:
    """(outputs, inputs) of the linear map that was traced."""
    seed = next(iter(graph.graph.nodes)).meta["val"]
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    result = output.all_input_nodes[0].meta["val"]
    return result.numel(), seed.numel()


def _symmetric(pattern: SparsityPattern) -> SparsityPattern:
    """With every entry's mirror image, which the symmetric recovery relies on."""
    rows, cols = np.concatenate([pattern.rows, pattern.cols]), np.concatenate([pattern.cols, pattern.rows])
    return sorted_pattern(pattern.shape, rows, cols, pattern.conservative)
