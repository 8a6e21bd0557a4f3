"""Hyper-parameters that live in the optimizer state as 0-d tensors, so that changing one recompiles nothing.

In the state a hyper-parameter is a `Hyperparameter` (constant until `set`) or a `Scheduled` (recomputed from
its own step count by every update). Both have a `.value`. They are types of their own, so that `get` and
`set`, which see nothing but the state, know them from the moments and from each other.

A transformation uses three functions: `check` when it is made, `start` in `init`, `advance` in `update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import OptState
from fnn.tree import Tree

Schedule = Callable[[Tensor], Tensor]
ScalarOrSchedule = float | Tensor | Schedule


class Hyperparameter(NamedTuple):
    """A constant hyper-parameter in an optimizer state. `value`: 0-d tensor."""

    value: Tensor


class Scheduled(NamedTuple):
    """A scheduled hyper-parameter in an optimizer state.

    `value`: 0-d tensor, what the latest update used (before the first: what it will use).
    `step`: 0-d int64 tensor, the number of updates so far.
    """

    value: Tensor
    step: Tensor


class _Range(NamedTuple):
    """Which numbers a hyper-parameter may be: the test, and the test in words."""

    contains: Callable[[float], bool]
    words: str


_NOT_NEGATIVE = _Range(lambda x: 0 <= x < math.inf, "a finite number >= 0")
_POSITIVE = _Range(lambda x: 0 < x < math.inf, "a finite number > 0")
_BELOW_ONE = _Range(lambda x: 0 <= x < 1, "a number in [0, 1)")
_UP_TO_ONE = _Range(lambda x: 0 <= x <= 1, "a number in [0, 1]")

# Every hyper-parameter that a state may hold, by name. Only Python numbers can be held against it: reading a
# tensor would wait for the device.
_RANGES = {
    "lr": _NOT_NEGATIVE,
    "b1": _BELOW_ONE,
    "b2": _BELOW_ONE,
    "eps": _NOT_NEGATIVE,
    "alpha": _BELOW_ONE,
    "rho": _BELOW_ONE,
    "momentum": _NOT_NEGATIVE,
    "dampening": _UP_TO_ONE,
    "momentum_decay": _NOT_NEGATIVE,
    "lr_decay": _NOT_NEGATIVE,
    "trust_coefficient": _POSITIVE,
    "weight_lr_power": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_value": _POSITIVE,
    "max_norm": _POSITIVE,
    "decay": _BELOW_ONE,
    "slow_step_size": _UP_TO_ONE,
}


def check(**given: ScalarOrSchedule) -> dict[str, ScalarOrSchedule]:
    """The hyper-parameters that a transformation was given, by name. Raises where one cannot be."""
    for name, value in given.items():
        _check_number(name, value, "a float, a 0-d tensor or a schedule", schedules=True)
    return given


def is_zero(value: ScalarOrSchedule) -> bool:
    """Whether a hyper-parameter is a Python zero: fixed for good, so that neither work nor memory is spent on it."""
    return isinstance(value, Real) and value == 0


def start(given: dict[str, ScalarOrSchedule], params: Tree) -> dict[str, Any]:
    """The state of the hyper-parameters before the first step, by name."""
    zero = _zero(params)
    return {name: _start(name, value, zero) for name, value in given.items()}


def start_step(params: Tree) -> Tensor:
    """A step count at zero. int64, for a float32 count would stand still at 2**24 steps."""
    return torch.zeros_like(_zero(params), dtype=torch.int64)


def advance(given: dict[str, ScalarOrSchedule], state: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """The values for this step in the order of `given`, and the next state of the hyper-parameters by name.

    `state` is the NamedTuple of the transformation, with a field for each name.
    """
    values: list[Tensor] = []
    states: dict[str, Any] = {}
    for name, source in given.items():
        hyper = getattr(state, name, None)
        if not isinstance(hyper, Scheduled if callable(source) else Hyperparameter):
            what = "the schedule" if callable(source) else "the constant"
            raise ValueError(
                f"opt_state: {type(state).__name__} does not hold {what} {name!r} of this optimizer; "
                "it was made by another one. Use the state that this optimizer's init(params) returned"
            )
        if isinstance(hyper, Scheduled):
            hyper = Scheduled(_evaluate(name, source, hyper.step, hyper.value), hyper.step + 1)
        values.append(hyper.value)
        states[name] = hyper
    return values, states


def get(opt_state: OptState, name: str) -> Tensor:
    """The current value of a hyper-parameter: a tensor of its own, 0-d unless the state was made under `vmap`.

    `name`: ``"lr"``, or a longer end of its path such as ``"1.lr"`` where several are called so. The value of a
    scheduled one is what the latest update used. Raises `KeyError` where there is none of that name and
    `ValueError` where there are several; both name what exists.

    Example:
        >>> from fnn import optim
        >>> optim.get(optim.sgd(0.5).init(torch.zeros(2)), "lr")
        tensor(0.5000)
    """
    _, hyper = _find(opt_state, name)
    # a copy: a donating step writes the next value into the state's own memory
    return hyper.value.clone()


def set(opt_state: OptState, **values: float | Tensor) -> OptState:
    """The state with hyper-parameters replaced: ``set(opt_state, lr=1e-4)``. Shapes, dtypes and devices stay.

    A value is a number, or a tensor that is 0-d or of the shape of the old value. Where several are called the
    same, give a longer end of the path: ``set(opt_state, **{"1.lr": 1e-4})``.
    Raises `KeyError` for an unknown name, `ValueError` for an ambiguous one, for a scheduled hyper-parameter
    (the next update would overwrite it), and for a number that it cannot be.

    Example:
        >>> from fnn import optim
        >>> opt_state = optim.set(optim.sgd(0.5).init(torch.zeros(2)), lr=0.1)
        >>> optim.get(opt_state, "lr")
        tensor(0.1000)
    """
    for name, value in values.items():
        path, hyper = _find(opt_state, name)
        if isinstance(hyper, Scheduled):
            raise ValueError(
                f"set: {path!r} follows a schedule, which would overwrite the new value at the next step; "
                "make the optimizer with a number to set it by hand, or with another schedule"
            )
        old = hyper.value
        _check_number(path.rpartition(".")[2], value, "a number or a tensor", schedules=False, shape=old.shape)
        new = value.to(old).expand(old.shape).clone() if isinstance(value, Tensor) else torch.full_like(old, value)
        opt_state = tree.at(opt_state, path).set(Hyperparameter(new))
    return opt_state


def _check_number(name: str, value: Any, expected: str, schedules: bool, shape: Any = ()) -> None:
    if isinstance(value, Tensor):
        if value.is_complex() or value.shape not in ((), shape):
            raise ValueError(f"{name} must be {expected}, got a {value.dtype} tensor of shape {tuple(value.shape)}")
    elif isinstance(value, Real) and not isinstance(value, bool):
        allowed = _RANGES[name]
        if not allowed.contains(float(value)):
            raise ValueError(f"{name} must be {allowed.words}, got {value!r}")
    elif not (schedules and callable(value)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")


def _zero(params: Tree) -> Tensor:
    """A 0-d zero in the dtype and on the device of the hyper-parameters. Raises `TypeError` for an untrainable leaf."""
    leaves = tree.leaves(params)
    if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        for path, leaf in tree.paths(params).items():
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                what = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"params: leaf {path!r} is {what}, expected a real floating tensor; keep what is not trained "
                    "in the state, or put () in its place with tree.partition"
                )
    dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
    return torch.zeros((), dtype=dtype, device=leaves[0].device if leaves else None)


def _start(name: str, value: ScalarOrSchedule, zero: Tensor) -> Hyperparameter | Scheduled:
    if isinstance(value, Tensor):
        return Hyperparameter(value.to(zero).clone())  # the state owns its memory
    if callable(value):
        step = torch.zeros_like(zero, dtype=torch.int64)
        return Scheduled(_evaluate(name, value, step, zero), step)
    return Hyperparameter(torch.full_like(zero, value))


def _evaluate(name: str, schedule: Any, step: Tensor, like: Tensor) -> Tensor:
    value = schedule(step.to(like.dtype))
    if isinstance(value, Real):
        return torch.full_like(like, float(value))
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the schedule of {name} must return a 0-d tensor for a 0-d step, got {got}")
    return value.to(like)


def _find(opt_state: OptState, name: str) -> tuple[str, Hyperparameter | Scheduled]:
    known = dict(hyperparameters(opt_state))
    found = [name] if name in known else [path for path in known if path.endswith(f".{name}")]
    if len(found) > 1:
        raise ValueError(
            f"{name!r} is ambiguous in this opt_state; give one of the paths {', '.join(map(repr, found))}"
        )
    if not found:
        raise KeyError(
            f"no hyper-parameter {name!r} in this opt_state; there is {', '.join(map(repr, known)) or 'none'}"
        )
    return found[0], known[found[0]]


def hyperparameters(node: Any, path: str = "") -> Iterator[tuple[str, Hyperparameter | Scheduled]]:
    """The hyper-parameters in an optimizer state, `path, hyper-parameter` each."""
    if isinstance(node, Hyperparameter | Scheduled):
        yield path, node
        return
    if isinstance(node, dict):
        children: Any = node.items()
    elif isinstance(node, tuple | list):
        children = zip(getattr(node, "_fields", range(len(node))), node, strict=True)
    else:
        return
    for key, child in children:
        yield from hyperparameters(child, f"{path}.{key}" if path else str(key))
