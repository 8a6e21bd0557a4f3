"""How far to go along a direction: a line search for the strong Wolfe conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fnn import tree
from fnn.optim._contract import GradientTransformation, OptState, map_same, widened
from fnn.optim._inner import check_count
from fnn.tree import Tree

# Nocedal and Wright's for quasi-Newton directions: how much of the slope at the start the loss must have fallen by,
# and how much of it may be left.
_DECREASE, _SLOPE = 1e-4, 0.9
_LEAST_CHANGE = 1e-9  # torch's: no element of the parameters changes by more within the bracket


class _Search(NamedTuple):
    """Where a search stands. A point is a (3,) tensor: step length, loss, slope. All else is 0-d.

    `low` is the best point so far; until there is a bracket, the latest. With `high` it encloses a good step length.
    """

    trial: Tensor
    low: Tensor
    high: Tensor
    bracketed: Tensor
    hesitant: Tensor
    done: Tensor
    count: Tensor


def strong_wolfe(max_evaluations: int = 25) -> GradientTransformation:
    r"""Scale updates by a step length :math:`\alpha` that satisfies the strong Wolfe conditions.

    .. math::
        f(p + \alpha u) \le f(p) + 10^{-4} \alpha \, u^\top \nabla f(p), \qquad
        |u^\top \nabla f(p + \alpha u)| \le 0.9 \, |u^\top \nabla f(p)|

    It comes last in a chain: :math:`u` are updates that descend, :math:`\alpha = 1` is tried first, then step lengths
    by cubic interpolation, as in `torch.optim.LBFGS`, at most `max_evaluations` in all; the best of them is taken.
    Where the loss does not fall along :math:`u` the updates are 0.

    ``opt.update(grads, opt_state, params, value_fn=f)``: `f(params)` is the loss, 0-d, of the same data as the
    gradients. With ``value=f(params), grad=grads`` too, loss and gradient at the parameters are not computed again.

    Each trial costs a gradient. Eagerly and compiled the search ends when it has found a step length; under `vmap`
    every one makes `max_evaluations` trials. A compiled `vmap` of it is not possible: torch's `while_loop` has none.

    Example:
        >>> from fnn import optim
        >>> opt = optim.chain(optim.sgd(100.0), optim.strong_wolfe())
        >>> params = torch.tensor([1.0])
        >>> updates, _ = opt.update(2 * params, opt.init(params), params, value_fn=lambda p: (p ** 2).sum())
        >>> optim.apply_updates(params, updates).abs() < 0.9
        tensor([True])

    Reference: Nocedal and Wright, Numerical optimization, 2006, algorithms 3.5 and 3.6,
    https://doi.org/10.1007/978-0-387-40065-5
    """
    check_count("strong_wolfe", 1, max_evaluations=max_evaluations)

    def init(params: Tree) -> OptState:
        return ()

    def update(
        grads: Tree,
        opt_state: OptState,
        params: Tree | None = None,
        *,
        value_fn: Callable[[Tree], Tensor] | None = None,
        value: Tensor | None = None,
        grad: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, OptState]:
        if params is None or not callable(value_fn):
            raise ValueError(
                "a line search needs the parameters and the loss as a function of them: "
                "opt.update(grads, opt_state, params, value_fn=f)"
            )
        if not tree.leaves(grads):
            return grads, opt_state
        wide = any(leaf.dtype == torch.float64 for leaf in tree.leaves((params, grads)))
        dtype = torch.float64 if wide else torch.float32

        def loss(length: Tensor) -> Tensor:
            value = value_fn(map_same(lambda p, u: (widened(p) + length * u).to(p.dtype), "grads", params, grads))
            if not isinstance(value, Tensor) or value.ndim != 0:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"the loss, value_fn, must be a 0-d tensor, got {got}")
            return value

        def point(length: Tensor) -> Tensor:
            slope, value = torch.func.grad_and_value(loss)(length)
            return torch.stack([length, value.to(dtype), slope])

        size = torch.stack([_largest(u, dtype) for u in tree.leaves(grads)]).max()
        zero = torch.zeros_like(size)
        if value is None or grad is None:
            start = point(zero)
        else:
            if not torch.compiler.is_compiling() and (found := tree.difference(grads, grad)) is not None:
                raise ValueError(
                    f"a line search must update every leaf that the loss takes, but grad= has others: {found}. Inside "
                    "freeze, by_label or masked use lbfgs() without a line search, or make the loss a function of the "
                    "trained leaves, as tree.partition gives them"
                )
            slopes = map_same(lambda u, g: (widened(g) * u).sum().to(dtype), "grad", grads, grad)
            slope = sum(tree.leaves(slopes), zero)
            start = torch.stack([zero, value.to(dtype), slope])
        length = _search(point, start, size, max_evaluations)
        return tree.map(lambda u: length * u, grads), opt_state

    return GradientTransformation(init, update)


def _largest(u: Tensor, dtype: torch.dtype) -> Tensor:
    return u.abs().max().to(dtype) if u.numel() else u.new_zeros((), dtype=dtype)


def _search(point: Callable[[Tensor], Tensor], start: Tensor, size: Tensor, limit: int) -> Tensor:
    """The step length that a search from the point `start` finds. `size` is the largest element of the updates."""

    def going(*search: Tensor) -> Tensor:
        state = _Search(*search)
        return ~state.done & (state.count < limit)

    def step(*search: Tensor) -> tuple[Tensor, ...]:
        state = _Search(*search)
        after = _step(state, point(state.trial), start, size)
        return tuple(torch.where(state.done, old, new) for old, new in zip(state, after, strict=True))

    no = torch.zeros_like(start[0], dtype=torch.bool)
    count = torch.zeros_like(start[0], dtype=torch.int64)
    trial = torch.ones_like(start[0])
    descends = start[2] < 0
    search = tuple(_Search(trial, start.clone(), start.clone(), no, no.clone(), ~descends, count))
    if torch.compiler.is_compiling():
        search = torch.while_loop(going, step, search)  # type: ignore[attr-defined]
    elif isinstance(start, FakeTensor):
        search = step(*search)  # shapes without values, from which no end can be told
    elif torch._C._functorch.maybe_current_level() is None:  # type: ignore[attr-defined]
        while going(*search):
            search = step(*search)
    else:
        # a batch of searches ends at no one time
        for _ in range(limit):
            search = step(*search)
    return _Search(*search).low[0]


def _step(state: _Search, new: Tensor, start: Tensor, size: Tensor) -> _Search:
    """The search after the point `new`, made of the trial."""
    _, low, high, bracketed, hesitant, _, count = state
    length, value, slope = new
    # said so that a loss that is not a number is too high
    too_high = ~(value <= start[1] + _DECREASE * length * start[2])
    too_high = too_high | ((bracketed | (count > 1)) & (value >= low[1]))
    found = ~too_high & (slope.abs() <= -_SLOPE * start[2])
    closes = too_high | (~bracketed & (slope >= 0))  # between the trial and the point before it
    beyond = torch.where(slope * (high[0] - low[0]) >= 0, low, high)
    better = ~(new[1] >= low[1])
    better = better & value.isfinite()

    next_low = torch.where(too_high & ~better, low, new)
    next_high = torch.where(closes, torch.where(better, low, new), beyond)
    now_bracketed = bracketed | closes
    further = _interpolate(low, new, length + 0.01 * (length - low[0]), 10 * length)
    within, now_hesitant = _within(next_low, next_high, hesitant)
    narrow = now_bracketed & ((next_high[0] - next_low[0]).abs() * size < _LEAST_CHANGE)
    return _Search(
        trial=torch.where(now_bracketed, within, further),
        low=next_low,
        high=next_high,
        bracketed=now_bracketed,
        hesitant=now_bracketed & now_hesitant,
        done=found | narrow,
        count=count + 1,
    )


def _within(low: Tensor, high: Tensor, hesitant: Tensor) -> tuple[Tensor, Tensor]:
    """The next trial in a bracket, and whether it is near an end, which it may be once but not twice in a row."""
    left, right = torch.minimum(low[0], high[0]), torch.maximum(low[0], high[0])
    trial = _interpolate(low, high, left, right)
    margin = 0.1 * (right - left)
    near = torch.minimum(right - trial, trial - left) < margin
    push = near & (hesitant | (trial >= right) | (trial <= left))
    inside = torch.where((trial - right).abs() < (trial - left).abs(), right - margin, left + margin)
    return torch.where(push, inside, trial), near & ~push


def _interpolate(a: Tensor, b: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """The minimum in `[least, most]` of the cubic through two points, or the middle where it has none."""
    first = a[0] <= b[0]
    a, b = torch.where(first, a, b), torch.where(first, b, a)
    d = a[2] + b[2] - 3 * (a[1] - b[1]) / (a[0] - b[0])
    root = (d.square() - a[2] * b[2]).sqrt()
    minimum = b[0] - (b[0] - a[0]) * (b[2] + root - d) / (b[2] - a[2] + 2 * root)
    return torch.where(minimum.isnan(), (least + most) / 2, minimum.clamp(least, most))
