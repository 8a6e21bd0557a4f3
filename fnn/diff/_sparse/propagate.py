"""From the graph of a linear map to its pattern: index sets pushed through every operation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fnn.diff._sparse.call import Call, Unknown
from fnn.diff._sparse.index_sets import IndexSets, identity
from fnn.diff._sparse.rules import RULES, everything, pointwise

_NAMES = "zeros_like ones_like full_like new_zeros new_ones new_full _new_zeros_with_same_feature_meta"
# What these make of a tensor depends on its shape alone.
_CONSTANT = {f"aten::{name}" for name in _NAMES.split()}


def propagate(graph: GraphModule, seed_shape: tuple[int, ...]) -> tuple[IndexSets | None, tuple[str, ...]]:
    """The dependence of the output on the graph's first input, and the operations answered conservatively.

    None stands for an output that does not depend on it. Raises `OverflowError` for a pattern beyond memory.
    """
    values: dict[Node, Any] = {}
    conservative: dict[str, None] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "output":
                result = pytree.tree_leaves(map_arg(node.args, lambda n: values[n]))[0]
                return result if isinstance(result, IndexSets) else None, tuple(conservative)
            if node.op == "placeholder":
                values[node] = Unknown(node.meta["val"]) if values else identity(seed_shape)
            elif node.op == "get_attr":
                values[node] = _captured(graph, node)
            else:
                values[node] = _call(node, values, conservative)
    raise AssertionError("a graph has an output")


def _captured(graph: GraphModule, node: Node) -> Any:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    # a parameter is trained in place, so a zero of today says nothing of tomorrow's
    return value if isinstance(value, Tensor) and not value.requires_grad else Unknown(value)


def _call(node: Node, values: dict[Node, Any], conservative: dict[str, None]) -> Any:
    args = map_arg(node.args, lambda n: values[n])
    kwargs = map_arg(node.kwargs, lambda n: values[n])
    if node.target is operator.getitem:
        source, index = args[0], int(args[1])  # type: ignore[arg-type]
        return source[index] if isinstance(source, tuple | list) else source
    kinds = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, IndexSets | Unknown)]
    target: Any = node.target
    name = target._schema.name if hasattr(target, "_schema") else str(target)
    if name in _CONSTANT:
        args = map_arg(node.args, lambda n: _zeros(n.meta["val"]))
        return target(*args, **kwargs)
    if not kinds:
        return target(*args, **kwargs)
    result = node.meta.get("val")  # None for a check that returns nothing
    if not any(isinstance(kind, IndexSets) for kind in kinds):
        return _unknown(result)
    if result is None:
        return None
    call = Call(target, tuple(args), dict(kwargs), result, _meta(node.args[0]))
    if name in RULES:
        found: Any = RULES[name](call)
    elif torch.Tag.pointwise in getattr(target, "tags", ()) and isinstance(result, Tensor):
        found = pointwise(call)
    else:
        conservative[name] = None
        found = everything(call)
    if isinstance(result, Tensor):
        return found if _has_derivative(result) else Unknown(result)
    return tuple(
        each if isinstance(each, IndexSets) and _has_derivative(like) else _unknown(like)
        for each, like in zip(found, result, strict=True)
    )


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)


def _meta(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, Node) else None


def _unknown(result: Any) -> Any:
    if isinstance(result, Tensor):
        return Unknown(result)
    return tuple(_unknown(each) for each in result) if isinstance(result, tuple | list) else result


def _has_derivative(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
