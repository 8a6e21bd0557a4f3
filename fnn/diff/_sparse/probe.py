"""Whether a pattern misses a nonzero: a product along a random vector, against that of the recovered matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn import random, tree
from fnn.diff._arguments import at
from fnn.diff._sparse.flat import place
from fnn.diff._sparse.prepared import PreparedDerivative


def _precision(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The machine epsilon of the narrowest leaf: a vector of leaves of several dtypes has the widest."""
    _, selected = at(function.name, function.f, function.argnums, args, kwargs)
    return max([torch.finfo(leaf.dtype).eps for leaf in tree.leaves(selected)], default=0.0)


def probe(derivative: PreparedDerivative, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ValueError`, naming the entry, where the pattern of `derivative` misses a nonzero at these arguments."""
    function, pattern = derivative._function, derivative.pattern
    flat, x = function.bind(args, kwargs)
    map_of: Any = torch.func.grad(flat, has_aux=True) if function.scalar else flat

    def product(mode: str, direction: Tensor) -> Tensor:
        if mode == "fwd":
            return torch.func.jvp(map_of, (x,), (direction,), has_aux=True)[1]
        return torch.func.vjp(map_of, x, has_aux=True)[1](direction)[0]

    products, _ = derivative._products(flat, x)
    entries = products.reshape(-1).index_select(0, derivative._places)
    forward = derivative.mode == "fwd"
    m, n = pattern.shape
    along, into = (derivative._cols, derivative._rows) if forward else (derivative._rows, derivative._cols)
    vector = random.normal(random.key(0, device=x.device), (n if forward else m,), dtype=x.dtype)
    expected = product(derivative.mode, vector)
    terms = entries * vector[along]
    recovered = torch.zeros_like(expected).index_add(0, into, terms)
    size = expected.abs().index_add(0, into, terms.abs())
    # the sums' own rounding is near eps of their terms; a function may lose as many digits again by cancellation
    tolerance = _precision(function, args, kwargs) ** 0.5 * size
    wrong = torch.nonzero((expected - recovered).abs() > tolerance).flatten().tolist()
    if not wrong:
        return
    unit = torch.zeros(m if forward else n, dtype=expected.dtype, device=x.device)
    unit[wrong[0]] = 1.0
    _, selected = at(function.name, function.f, function.argnums, args, kwargs)
    names = {path: leaf.numel() for path, leaf in tree.paths(selected).items()}
    where = f"row {wrong[0]}" if forward else f"column {wrong[0]} (input {place(names, wrong[0])})"
    try:
        line = product("rev" if forward else "fwd", unit)
    except NotImplementedError:
        line = torch.zeros_like(vector)
    line[along[into == wrong[0]]] = 0.0
    missed = torch.nonzero(line).flatten().tolist()
    if not missed:
        raise ValueError(
            f"{function.name}: {len(wrong)} of {len(expected)} {'rows' if forward else 'columns'}, the first {where}, "
            "disagree with a product along a random vector, though no derivative outside the pattern was found there: "
            "the function differs from call to call, or an operation in it is wrong under vmap; check=False skips this"
        )
    other = f"column {missed[0]} (input {place(names, missed[0])})" if forward else f"row {missed[0]}"
    raise ValueError(
        f"{function.name}: the pattern misses a nonzero at {where}, {other}: the derivative there is "
        f"{float(line[missed[0]]):.6g}; {len(wrong)} of {len(expected)} {'rows' if forward else 'columns'} disagree "
        "with a product along a random vector. Add the entry to pattern=, or leave pattern= out to have it detected"
    )
