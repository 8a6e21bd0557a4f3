"""Schedules: functions from the step, a tensor, to the value of a hyper-parameter, a tensor of the same shape.

Any such function can stand where an optimizer takes a number. These compute in the dtype of a floating step, in
torch's default dtype for an integer one, and take steps of any shape, as for a plot:
``schedule(torch.arange(1000))``. The first update asks for step 0.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from fnn.optim._hyper import Schedule


def constant(value: float) -> Schedule:
    """The same value at every step.

    Example:
        >>> from fnn import optim
        >>> optim.constant(0.1)(torch.tensor(7))
        tensor(0.1000)
    """
    _check("constant", value=value)

    def schedule(step: Tensor) -> Tensor:
        return torch.full_like(_floating(step), value)

    return schedule


def linear(init_value: float, end_value: float, transition_steps: int, transition_begin: int = 0) -> Schedule:
    """A straight line from `init_value` to `end_value` in `transition_steps` steps; flat before and after.

    The line begins at step `transition_begin`.
    Raises `ValueError` unless `transition_steps` > 0 and `transition_begin` >= 0.

    Example:
        >>> from fnn import optim
        >>> optim.linear(1.0, 0.0, 10)(torch.tensor([0, 5, 20]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    _check("linear", init_value=init_value, end_value=end_value)
    _check_steps("linear", 1, transition_steps=transition_steps)
    _check_steps("linear", 0, transition_begin=transition_begin)

    def schedule(step: Tensor) -> Tensor:
        remaining = 1 - (_floating(step) - transition_begin).clamp(0, transition_steps) / transition_steps
        return (init_value - end_value) * remaining + end_value

    return schedule


def cosine(init_value: float, decay_steps: int, alpha: float = 0.0, exponent: float = 1.0) -> Schedule:
    r"""Half a cosine from `init_value` down to `alpha * init_value` in `decay_steps` steps; flat afterwards.

    .. math:: v_t = v_0 \left((1 - \alpha) \left(\tfrac{1 + \cos(\pi t / T)}{2}\right)^p + \alpha\right)

    Raises `ValueError` unless `decay_steps` > 0.

    Example:
        >>> from fnn import optim
        >>> optim.cosine(1.0, 10)(torch.tensor([0, 5, 20]))
        tensor([1.0000, 0.5000, 0.0000])

    Reference: Loshchilov and Hutter, SGDR: stochastic gradient descent with warm restarts, 2017,
    https://arxiv.org/abs/1608.03983
    """
    _check("cosine", init_value=init_value, alpha=alpha, exponent=exponent)
    _check_steps("cosine", 1, decay_steps=decay_steps)

    def schedule(step: Tensor) -> Tensor:
        wave = 0.5 * (1 + torch.cos(math.pi * _floating(step).clamp(max=decay_steps) / decay_steps))
        return init_value * ((1 - alpha) * wave**exponent + alpha)

    return schedule


def warmup_cosine(
    init_value: float,
    peak_value: float,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: float = 1.0,
) -> Schedule:
    """A line from `init_value` up to `peak_value` in `warmup_steps`, then half a cosine down to `end_value`.

    `decay_steps` counts from step 0: it includes the warmup. Raises `ValueError` unless
    0 <= `warmup_steps` < `decay_steps`.

    Example:
        >>> from fnn import optim
        >>> optim.warmup_cosine(0.0, 1.0, 10, 30)(torch.tensor([0, 5, 10, 20, 30]))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000])
    """
    _check("warmup_cosine", init_value=init_value, peak_value=peak_value, end_value=end_value, exponent=exponent)
    _check_steps("warmup_cosine", 0, warmup_steps=warmup_steps)
    _check_steps("warmup_cosine", warmup_steps + 1, decay_steps=decay_steps)
    decay = cosine(peak_value, decay_steps - warmup_steps, end_value / peak_value if peak_value else 0.0, exponent)
    if warmup_steps == 0:
        return decay
    warmup = linear(init_value, peak_value, warmup_steps)

    def schedule(step: Tensor) -> Tensor:
        step = _floating(step)
        return torch.where(step < warmup_steps, warmup(step), decay(step - warmup_steps))

    return schedule


def _floating(step: Tensor) -> Tensor:
    step = torch.as_tensor(step)
    return step if step.is_floating_point() else step.to(torch.get_default_dtype())


def _check(schedule: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{schedule}: {name} must be a finite number, got {value!r}")


def _check_steps(schedule: str, least: int, **steps: int) -> None:
    for name, value in steps.items():
        if not isinstance(value, Real) or not least <= value < math.inf:
            raise ValueError(f"{schedule}: {name} must be a number of steps >= {least}, got {value!r}")
