"""Derivatives against finite differences, in both modes and to higher order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import random, tree
from fnn._rules._checks import check_function, check_tensors
from fnn.diff._transforms import pullback_of, pushforward

Leaves = dict[str, Tensor]


class Tolerance(NamedTuple):
    atol: float
    rtol: float
    eps: float


def check_grads(
    f: Callable[..., Any],
    args: Any,
    order: int = 2,
    modes: Sequence[str] = ("fwd", "rev"),
    *,
    atol: float = 1e-6,
    rtol: float = 1e-6,
    eps: float = 1e-6,
) -> None:
    """Raise AssertionError unless the derivatives of `f` at `args` agree with central finite differences.

    args: a tuple of arguments, or one bare tensor or tree. Floating-point leaves are converted to float64 (complex
    ones to complex128) and differentiated, one at a time, in a random direction; others stay as they are.
    order: up to which order; the derivatives of order k are differences of those of order k - 1. modes: "fwd", "rev"
    or both, which are then nested in every way. eps: the step of the differences. A derivative may differ from its
    difference by `atol + rtol` times its size. The directions are the same in every run.

    The error names the order, the modes, the output and the argument. Raises ValueError for options that do not fit.

    Example:
        >>> check_grads(torch.sin, torch.tensor([0.1, 2.0]))
    """
    check_function("check_grads", f)
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or any(mode not in ("fwd", "rev") for mode in modes):
        raise ValueError(f'check_grads: modes must be "fwd", "rev" or both, got {modes!r}')
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"check_grads: order must be a positive int, got {order!r}")
    values, structure = tree.flatten(args if type(args) is tuple else (args,))
    values = [_doubled(value) for value in values]
    names = list(tree.paths(tree.unflatten(structure, values)))
    point = {f"argument {name}": value for name, value in zip(names, values, strict=True) if _is_floating(value)}
    if not point:
        raise ValueError("check_grads: no argument is a floating-point tensor")

    def of_leaves(chosen: Leaves) -> Leaves:
        leaves = [chosen.get(f"argument {name}", value) for name, value in zip(names, values, strict=True)]
        output = f(*tree.unflatten(structure, leaves))
        check_tensors("check_grads", output)
        outputs = tree.paths(output)
        return {f"output {name}".strip(): leaf for name, leaf in outputs.items() if _is_floating(leaf)}

    _check(of_leaves, point, order, modes, Tolerance(atol, rtol, eps), ())


def _check(
    f: Callable[[Leaves], Leaves],
    point: Leaves,
    order: int,
    modes: Sequence[str],
    tolerance: Tolerance,
    inner: tuple[str, ...],
) -> None:
    """inner: the modes, innermost first, of the derivatives that `f` is already."""
    output = f(point)
    directions = _random_like(point, len(inner) * 2)
    cotangent = _random_like(output, len(inner) * 2 + 1)
    pullback = pullback_of("check_grads", f, (point,), False)[1] if "rev" in modes else None
    grads: Leaves = pullback(cotangent)[0] if pullback else {}
    for name in point:
        direction = {other: v if other == name else torch.zeros_like(v) for other, v in directions.items()}
        expected = _difference(f, point, direction, tolerance.eps)
        if "fwd" in modes:
            tangent = pushforward("check_grads", f, (point,), (direction,), False)[1]
            for path, want in expected.items():
                _compare(tangent[path], want, want.abs(), tolerance, (*inner, "fwd"), path, name)
        if "rev" in modes:
            terms = [_dot(cotangent[path], want) for path, want in expected.items()]
            sizes = [cotangent[path].norm() * want.norm() for path, want in expected.items()]
            want, size = torch.stack(terms).sum(), torch.stack(sizes).sum()
            got = _dot(grads[name], directions[name])
            _compare(got, want, size, tolerance, (*inner, "rev"), " and ".join(expected), name)
    if order == 1:
        return
    if "fwd" in modes:
        _check(*_tangents(f, point, directions), order - 1, modes, tolerance, (*inner, "fwd"))
    if "rev" in modes:
        _check(*_gradients(f, point, cotangent), order - 1, modes, tolerance, (*inner, "rev"))


def _tangents(f: Callable[[Leaves], Leaves], point: Leaves, directions: Leaves) -> tuple[Any, Leaves]:
    def tangents(values: Leaves) -> Leaves:
        primals = {name: values[name] for name in point}
        moved = {name: values[f"direction of {name}"] for name in point}
        tangent = pushforward("check_grads", f, (primals,), (moved,), False)[1]
        return {f"tangent of {path}": leaf for path, leaf in tangent.items()}

    return tangents, point | {f"direction of {name}": v for name, v in directions.items()}


def _gradients(f: Callable[[Leaves], Leaves], point: Leaves, cotangent: Leaves) -> tuple[Any, Leaves]:
    def gradients(values: Leaves) -> Leaves:
        _, pullback, _ = pullback_of("check_grads", f, ({name: values[name] for name in point},), False)
        (grads,) = pullback({path: values[f"cotangent of {path}"] for path in cotangent})
        return {f"gradient for {name}": leaf for name, leaf in grads.items()}

    return gradients, point | {f"cotangent of {path}": v for path, v in cotangent.items()}


def _compare(
    got: Tensor, want: Tensor, size: Tensor, tolerance: Tolerance, modes: tuple[str, ...], output: str, name: str
) -> None:
    error = (got - want).abs()
    allowed = tolerance.atol + tolerance.rtol * size
    if got.shape == want.shape and bool((error <= allowed).all()):  # a NaN is not
        return
    excess = (error - allowed).nan_to_num(nan=torch.inf).reshape(-1)
    at = int(excess.argmax())
    raise AssertionError(
        f"check_grads: order {len(modes)}, mode {' over '.join(reversed(modes))}: the derivative of {output} with "
        f"respect to {name} is {got.reshape(-1)[at].item():.9g}, and finite differences give "
        f"{want.reshape(-1)[at].item():.9g} (error {error.reshape(-1)[at].item():.3g}, allowed "
        f"{allowed.reshape(-1)[at].item():.3g}; {int((excess > 0).sum())} of {error.numel()} numbers are wrong)"
    )


def _difference(f: Callable[[Leaves], Leaves], point: Leaves, direction: Leaves, eps: float) -> Leaves:
    above = f({name: value + eps * direction[name] for name, value in point.items()})
    below = f({name: value - eps * direction[name] for name, value in point.items()})
    return {path: (above[path] - below[path]) / (2 * eps) for path in above}


def _random_like(values: Leaves, stream: int) -> Leaves:
    found = {}
    for index, (name, value) in enumerate(values.items()):
        key = random.fold_in(random.fold_in(random.key(0), stream), index)
        shape = (*value.shape, 2) if value.is_complex() else value.shape
        numbers = random.normal(key, tuple(shape), torch.float64)
        numbers = torch.view_as_complex(numbers) if value.is_complex() else numbers
        found[name] = numbers.to(value.device, value.dtype)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product = (a.conj() * b).sum()
    return product.real if product.is_complex() else product


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _doubled(value: Any) -> Any:
    if not _is_floating(value):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
