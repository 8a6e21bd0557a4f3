"""The linear map that is to be recovered, as a graph: what its pattern is read from.

The graph is that of the JVP (or VJP) itself, in the tangent. So whatever has no derivative (`detach`, `sign`, a
comparison) is absent from it, and custom rules count as they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fnn.diff._purity import explanation

POINTWISE = torch.Tag.pointwise


def linear_graph(name: str, f: Callable[[Tensor], Tensor], x: Tensor, others: list[Tensor], mode: str) -> GraphModule:
    """The graph of the map of `f(x, *others)` at x: `(seed, x, *others) -> (m,)` or, for mode "rev", `(n,)`.

    f: flat, `(n,), ... -> (m,)`. Raises `ValueError` where tensors decide what is computed, or random numbers do.
    Raises `NotImplementedError` where an operation has no rule for this mode.
    """

    def forward(seed: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: f(x, *others), (x,), (seed,))[1]

    def reverse(seed: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: f(x, *others), x)[1](seed)[0]

    with torch.no_grad():
        out = f(x, *others)  # an error of the function itself shows here, in its own words
    arguments = (torch.ones_like(x if mode == "fwd" else out), x, *others)
    traced = _trace(name, forward if mode == "fwd" else reverse, arguments, {})
    for node in traced.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(
                f"{name}: the function draws random numbers from torch's global generator ({node.target}), so every "
                "product would see another function; draw them with fnn.random from a key"
            )
    # decomposed only here: functionalization refuses what some decompositions consist of
    if any(_mutates(node) for node in traced.graph.nodes):
        return _trace(name, torch.func.functionalize(traced, remove="mutations"), arguments, _decompositions())
    return _trace(name, traced, arguments, _decompositions())


def _trace(name: str, f: Callable, arguments: tuple[Tensor, ...], decompositions: dict) -> GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        graph = make_fx(f, decomposition_table=decompositions)(*arguments)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        if "value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
            raise ValueError(
                f"{name}: the function branches on the values of tensors (if, while, .item(), bool()), so its pattern "
                "cannot be read from one trace; use torch.where, or give the pattern: pattern="
            ) from error
        if explanation(str(error)) is not None:
            raise
        first = str(error).splitlines()[0]
        raise ValueError(f"{name}: the function could not be traced ({first}); give the pattern: pattern=") from error
    graph.graph.eliminate_dead_code()
    return graph


def _mutates(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _decompositions() -> dict:
    """Torch's own, for operations whose dependence is not known here: what they are made of is."""
    from torch._decomp import core_aten_decompositions

    from fnn.diff._sparse.rules import RULES

    table: dict[Any, Callable] = dict(core_aten_decompositions().items())
    return {op: how for op, how in table.items() if POINTWISE not in op.tags and op._schema.name not in RULES}
