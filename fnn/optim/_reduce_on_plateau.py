"""A learning rate that falls when a value has stopped to improve."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fnn.optim._contract import GradientTransformation, OptState
from fnn.optim._hyper import Hyperparameter, Scheduled, hyperparameters
from fnn.optim._inner import check_count, check_state, check_transformation
from fnn.tree import Tree


class ReduceOnPlateauState(NamedTuple):
    """State of `reduce_on_plateau`.

    `best` value up to now; `bad` values since; `cooling`, how many more to ignore; `total` of the `count` values that
    will be averaged; the state of the optimizer, whose learning rates this changes.
    """

    best: Tensor
    bad: Tensor
    cooling: Tensor
    total: Tensor
    count: Tensor
    inner: OptState


def reduce_on_plateau(
    optimizer: GradientTransformation,
    mode: Literal["min", "max"] = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Literal["rel", "abs"] = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
    *,
    accumulation_size: int = 1,
) -> GradientTransformation:
    """Multiply the learning rate of `optimizer` by `factor` when a value has stopped to improve.

    `update` takes the value by name, ``opt.update(grads, opt_state, params, value=loss)``; `train.make_step` passes
    the loss. Step for step what `torch.optim.lr_scheduler.ReduceLROnPlateau` does when it is stepped after the
    optimizer: the lower rate is that of the next update. It is the optimizer's own, so `get(opt_state, "lr")` shows it
    and `set` changes it; where there are several, as in `by_label`, all fall.

    Args:
        optimizer: one with constant learning rates, no schedules.
        mode: whether the value should fall ("min") or rise ("max").
        factor: below 1.
        patience: how many values without improvement are borne; the next one lowers the rate.
        threshold: what counts as improvement: a value below `best * (1 - threshold)` with `threshold_mode` "rel",
            below `best - threshold` with "abs" (mode "max": above, with the opposite sign).
        threshold_mode: "rel" or "abs".
        cooldown: how many values to ignore after the rate fell.
        min_lr: the rate falls no further.
        eps: a change of the rate that is no larger than this is left out.
        accumulation_size: judge the mean of so many values: the updates of an epoch, where `value` is a batch's loss.

    A value that is not finite is no improvement.

    Example:
        >>> from fnn import optim
        >>> opt = optim.reduce_on_plateau(optim.sgd(1.0), factor=0.5, patience=1)
        >>> opt_state = opt.init(torch.zeros(1))
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     updates, opt_state = opt.update(torch.ones(1), opt_state, value=torch.tensor(loss))
        >>> optim.get(opt_state, "lr")
        tensor(0.5000)
    """
    _check_choice("mode", mode, ("min", "max"))
    _check_choice("threshold_mode", threshold_mode, ("rel", "abs"))
    _check_number("factor", factor, lambda x: 0 <= x < 1, "in [0, 1)")
    for name, number in {"threshold": threshold, "min_lr": min_lr, "eps": eps}.items():
        _check_number(name, number, lambda x: 0 <= x < math.inf, ">= 0 and finite")
    check_count("reduce_on_plateau", 0, patience=patience, cooldown=cooldown)
    check_count("reduce_on_plateau", 1, accumulation_size=accumulation_size)
    check_transformation("reduce_on_plateau", "optimizer", optimizer)
    sign = 1.0 if mode == "min" else -1.0

    def init(params: Tree) -> OptState:
        inner = optimizer.init(params)
        zero = torch.zeros_like(_rate(inner))
        # not infinity: a state that is not finite would count as broken
        best = torch.full_like(zero, sign * torch.finfo(zero.dtype).max)
        counts = [torch.zeros_like(zero, dtype=torch.int64) for _ in range(3)]
        return ReduceOnPlateauState(best, counts[0], counts[1], zero, counts[2], inner)

    def improves(value: Tensor, best: Tensor) -> Tensor:
        bound = best * (1 - sign * threshold) if threshold_mode == "rel" else best - sign * threshold
        return torch.isfinite(value) & (value < bound if mode == "min" else value > bound)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, ReduceOnPlateauState)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        total = state.total + _value(extra.get("value"), state.best)
        judged = state.count == accumulation_size - 1
        value = total / accumulation_size

        better = improves(value, state.best)
        bad = torch.where(better | (state.cooling > 0), 0, state.bad + 1)
        fall = judged & (bad > patience)

        def lowered(lr: Tensor) -> Tensor:
            new = (lr * factor).clamp(min=min_lr)
            return torch.where(fall & (lr - new > eps), new, lr)

        new = ReduceOnPlateauState(
            best=torch.where(judged & better, value, state.best),
            bad=torch.where(judged, torch.where(fall, 0, bad), state.bad),
            cooling=torch.where(fall, cooldown, (state.cooling - judged.long()).clamp(min=0)),
            total=torch.where(judged, 0.0, total),
            count=(state.count + 1) % accumulation_size,
            inner=_map_rates(lowered, inner),
        )
        return updates, new

    return GradientTransformation(init, update)


def _value(value: Any, like: Tensor) -> Tensor:
    if value is None:
        raise ValueError(
            "reduce_on_plateau needs the value to judge by: opt.update(grads, opt_state, params, value=loss)"
        )
    if isinstance(value, Real):
        return torch.full_like(like, float(value))
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"reduce_on_plateau: value must be a 0-d tensor, got {got}")
    return value.to(like)


def _map_rates(f: Callable[[Tensor], Tensor], node: Any, name: str = "") -> Any:
    """A state with `f` applied to the learning rates in it."""
    if isinstance(node, Hyperparameter):
        return Hyperparameter(f(node.value)) if name == "lr" else node
    if type(node) is dict:
        return {key: _map_rates(f, child, key) for key, child in node.items()}
    if not isinstance(node, tuple):
        return node
    names = getattr(node, "_fields", None)
    if names is None:
        return tuple([_map_rates(f, child) for child in node])
    return type(node)(*[_map_rates(f, child, key) for key, child in zip(names, node, strict=True)])


def _rate(state: OptState) -> Tensor:
    """The first learning rate in a state. Raises `ValueError` where there is none, or one that follows a schedule."""
    rates = {path: hyper for path, hyper in hyperparameters(state) if path.rpartition(".")[2] == "lr"}
    if not rates:
        raise ValueError("reduce_on_plateau: the optimizer has no learning rate 'lr' to reduce")
    for path, hyper in rates.items():
        if isinstance(hyper, Scheduled):
            raise ValueError(
                f"reduce_on_plateau: {path!r} follows a schedule, which would overwrite the reduced rate at the next "
                "step; make the optimizer with a number"
            )
    return next(iter(rates.values())).value


def _check_choice(name: str, value: str, allowed: tuple[str, str]) -> None:
    if value not in allowed:
        raise ValueError(f"reduce_on_plateau: {name} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}")


def _check_number(name: str, value: float, contains: Callable[[float], bool], words: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not contains(float(value)):
        raise ValueError(f"reduce_on_plateau: {name} must be a number {words}, got {value!r}")
