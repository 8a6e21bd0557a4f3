"""`tap` and `tap_grads`: gradients with respect to intermediate values of any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from fnn import tree
from fnn._rules._checks import check_function

_listeners: list[_Listener] = []


def tap(value: Any, name: str) -> Any:
    """`value` itself, under a name by which `tap_grads` gives its value and the gradient with respect to it.

    value: a tensor or any tree of tensors. Outside `tap_grads` this is the identity, and costs nothing when compiled.

    Under `tap_grads` it raises ValueError for a name given before, and in a place where a gradient with respect to
    the value cannot be had: inside a `vmap`, `grad` or other transform that the function applies, where the value is
    many values, and where no derivative is recorded, as in `torch.no_grad` or in a custom rule.

    Example:
        >>> import fnn
        >>> fnn.tap(torch.ones(2), "hidden")
        tensor([1., 1.])
    """
    return _listeners[-1].hear(value, name) if _listeners else value


def tap_grads(f: Callable[..., Any]) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """The values that `f` taps, and the gradients of its result with respect to them: `(values, grads)`, by name.

    f: any function of a scalar result, which calls `tap(value, name)`. Both results are dicts of what was tapped, in
    the order of the calls; a value with leaves that are not floating-point has no gradient. A gradient is zero where
    the result does not depend on the value. f is run twice, first for the shapes.

    Raises TypeError or ValueError for a result that is not a scalar tensor, and what `tap` raises.

    Example:
        >>> import fnn
        >>> def f(x):
        ...     y1 = fnn.tap(x + 1, "y1")
        ...     y2 = fnn.tap(2 * x, "y2")
        ...     return (y1 - y2) ** 2
        >>> values, grads = fnn.tap_grads(f)(torch.tensor(3.0))
        >>> grads
        {'y1': tensor(-4.), 'y2': tensor(4.)}
    """
    check_function("tap_grads", f)

    def of_taps(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        heard: list[_Listener] = []

        def run(zeros: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, Any]]:
            listener = _Listener(zeros)
            _listeners.append(listener)
            try:
                out = f(*args, **kwargs)
            finally:
                _listeners.pop()
            heard.append(listener)
            if not isinstance(out, Tensor):
                raise TypeError(f"tap_grads: the function must return a scalar tensor, got {type(out).__name__}")
            if out.dim() != 0:
                raise ValueError(f"tap_grads: the function must return a scalar, got shape {tuple(out.shape)}")
            return out, listener.values

        torch.func.vjp(run, {}, has_aux=True)
        shapes, structures = heard[0].shapes, heard[0].structures
        zeros = {
            name: [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes[name]]
            for name in shapes
        }
        found: tuple[Any, ...] = torch.func.vjp(run, zeros, has_aux=True)
        out, pullback, values = found
        grads = pullback(torch.ones_like(out))[0]
        return values, {name: tree.unflatten(structures[name], grads[name]) for name in grads}

    return of_taps


class _Listener:
    """What one run of a function has tapped: the values by name, after adding the zeros there are for them."""

    def __init__(self, zeros: dict[str, list[Tensor]]) -> None:
        self.zeros, self.level = zeros, retrieve_current_functorch_interpreter().level()
        self.values: dict[str, Any] = {}
        self.shapes: dict[str, list[tuple[torch.Size, torch.dtype, torch.device]]] = {}
        self.structures: dict[str, Any] = {}

    def hear(self, value: Any, name: str) -> Any:
        if not torch.is_grad_enabled() or retrieve_current_functorch_interpreter().level() != self.level:
            raise ValueError(
                f"tap: {name!r} is tapped inside a transform that the function applies (vmap, grad, a custom rule) or "
                "under torch.no_grad, where its gradient cannot be had; tap what comes out of it"
            )
        if name in self.values:
            raise ValueError(f"tap: the name {name!r} is given to two values; give each its own")
        leaves, structure = tree.flatten(value)
        if name in self.zeros:
            added = [leaf + zero for leaf, zero in zip(leaves, self.zeros[name], strict=True)]
            value = tree.unflatten(structure, added)
        elif all([isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]):
            self.shapes[name] = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
            self.structures[name] = structure
        self.values[name] = value
        return value
