"""Runs a function while each of its values carries derivatives along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fnn import tree
from fnn.diff._composed import composed
from fnn.diff._forward_laplacian._carried import Carried, Unsupported
from fnn.diff._forward_laplacian._rules import OF_STAND_IN, RULES, arranged, name_of, title
from fnn.diff._seeds import unit_vectors


def forward_laplacian(f: Callable[[Any], tuple[Any, Any]], x: Any, start: int, stop: int) -> tuple[Any, Any, Any]:
    """Both results of `f(x)`, and of each element of the first the sum of the second derivatives along unit vectors.

    Of the unit vectors of x those from `start` to `stop` are taken.

    Raises Unsupported where `f` does anything to a value depending on x that has no rule.
    """
    follower = _Follower()
    leaves, structure = tree.flatten(x)
    units = tree.leaves(unit_vectors(x, start, stop))
    inside = [follower.follow(Carried(leaf, unit, None)) for leaf, unit in zip(leaves, units, strict=True)]
    # Recording is on around f, so that where it is off an autograd.Function or a torch.no_grad of f has begun.
    with torch.enable_grad(), follower:
        output, aux = f(tree.unflatten(structure, inside))
    return follower.value(output), follower.value(aux), tree.map(follower.laplacian, output)


class _Follower(TorchFunctionMode):
    """Hands out stand-ins for the values it follows, and computes on what they stand for.

    A stand-in has its value's shape and dtype, and NaN for numbers: what reaches its memory by a way that a mode does
    not see gives NaN, not a result in which derivatives are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.followed: dict[Tensor, Carried] = {}
        self.level = _level()
        self.records = torch.is_grad_enabled()  # as the caller wants it: what is computed here is recorded so

    def follow(self, carried: Carried) -> Tensor:
        value = carried.value
        stand_in = torch.full(value.shape, float("nan"), dtype=value.dtype, device=value.device)
        self.followed[stand_in] = carried
        return stand_in

    def value(self, output: Any) -> Any:
        return tree.map(self._value, output)

    def _value(self, leaf: Any) -> Any:
        carried = self.lookup(leaf)
        return leaf if carried is None else carried.value

    def laplacian(self, leaf: Any) -> Tensor:
        carried = self.lookup(leaf)
        if carried is None:
            raise Unsupported("an output that depends on the argument in no way that can be seen")
        value = carried.value
        laplacian = torch.zeros_like(value) if carried.laplacian is None else carried.laplacian
        return torch.where(torch.isnan(value), value, laplacian)  # a stand-in's NaN may have come as a constant

    def lookup(self, value: Any) -> Carried | None:
        return self.followed.get(value) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _level() != self.level:
            raise Unsupported("a transform of torch.func inside the function")
        found: list[Carried] = []
        operands = [self._operand(arg, found) for arg in args]
        # Many a method passes out=None or dtype=None on.
        options = {name: self._operand(value, found) for name, value in kwargs.items() if value is not None}
        if not found:
            if self.records or not torch.is_grad_enabled() or func is torch._C._set_grad_enabled:
                return composed(func, args, kwargs)
            with torch.no_grad():
                return composed(func, args, kwargs)
        name = name_of(func)
        if name in OF_STAND_IN:
            return func(*args, **kwargs)
        if name not in RULES or "out" in options or "dtype" in options:
            raise Unsupported(title(func))
        if not torch.is_grad_enabled():
            raise Unsupported("a change of grad mode, as in torch.no_grad or an autograd.Function")
        operands, options = arranged(name, operands, options)
        try:
            if self.records:
                return self._result(RULES[name](func, *operands, **options))
            with torch.no_grad():
                return self._result(RULES[name](func, *operands, **options))
        except (
            TypeError
        ):  # an option that the rule does not take; where torch does not either, products raise its error
            raise Unsupported(f"{title(func)} with these arguments") from None

    def _operand(self, value: Any, found: list[Carried]) -> Any:
        if isinstance(value, Tensor):
            carried = self.followed.get(value)
            if carried is not None:
                found.append(carried)
                return carried
            if value._base is not None and value._base in self.followed:
                raise Unsupported("a view that the compiler made by itself")
            return value
        if type(value) in (list, tuple):
            return type(value)([self._operand(part, found) for part in value])
        return value

    def _result(self, out: Any) -> Any:
        if isinstance(out, Carried):
            return self.follow(out)
        return tuple(self._result(part) for part in out) if type(out) is tuple else out


def _level() -> int:
    """How many transforms of torch.func are around; 0 for none."""
    level = torch._C._functorch.maybe_current_level()  # type: ignore[attr-defined]
    return 0 if level is None else level


# Dynamo has no number for it in its graph, but enters the same levels while it traces.
_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
