"""Schedules: functions from the step, a tensor, to the value of a hyper-parameter, a tensor of the same shape.

Any such function can stand where an optimizer takes a number. These compute in the dtype of a floating step, in
torch's default dtype for an integer one, and take steps of any shape, as for a plot:
``schedule(torch.arange(1000))``. The first update asks for step 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    check_numbers("constant", value=value)

    def schedule(step: Tensor) -> Tensor:
        return torch.full_like(floating(step), value)

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
    check_numbers("linear", init_value=init_value, end_value=end_value)
    check_steps("linear", 1, transition_steps=transition_steps)
    check_steps("linear", 0, transition_begin=transition_begin)

    def schedule(step: Tensor) -> Tensor:
        remaining = 1 - (floating(step) - transition_begin).clamp(0, transition_steps) / transition_steps
        return (init_value - end_value) * remaining + end_value

    return schedule


def polynomial(
    init_value: float, end_value: float, power: float, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    r"""A power of a falling line from `init_value` to `end_value` in `transition_steps` steps; flat before and after.

    .. math:: v_t = (v_0 - v_T) \left(1 - \tfrac{t}{T}\right)^p + v_T

    Optax's `polynomial_schedule`; with an `end_value` of 0 torch's `PolynomialLR`.
    Raises `ValueError` unless `power` >= 0, `transition_steps` > 0 and `transition_begin` >= 0.

    Example:
        >>> from fnn import optim
        >>> optim.polynomial(1.0, 0.0, 2, 10)(torch.tensor([0, 5, 20]))
        tensor([1.0000, 0.2500, 0.0000])
    """
    check_numbers("polynomial", init_value=init_value, end_value=end_value, power=power)
    check_steps("polynomial", 1, transition_steps=transition_steps)
    check_steps("polynomial", 0, transition_begin=transition_begin)
    if power < 0:
        raise ValueError(f"polynomial: power must be a number >= 0, got {power!r}")

    def schedule(step: Tensor) -> Tensor:
        remaining = 1 - (floating(step) - transition_begin).clamp(0, transition_steps) / transition_steps
        return (init_value - end_value) * remaining**power + end_value

    return schedule


def exponential(
    init_value: float,
    transition_steps: int,
    decay_rate: float,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    r"""Multiply by `decay_rate` every `transition_steps` steps, smoothly or as a staircase.

    .. math:: v_t = v_0 \, r^{(t - t_0) / T}

    with the exponent rounded down where `staircase` is true, and flat until `transition_begin`. `end_value` is where
    the decay stops (where growth does, for a `decay_rate` of 1 or more). Optax's `exponential_decay`; with
    `transition_steps` 1 torch's `ExponentialLR`, as a staircase its `StepLR`.
    Raises `ValueError` unless `transition_steps` > 0, `decay_rate` > 0 and `transition_begin` >= 0.

    Example:
        >>> from fnn import optim
        >>> optim.exponential(1.0, 10, 0.5)(torch.tensor([0, 10, 20]))
        tensor([1.0000, 0.5000, 0.2500])
    """
    check_numbers("exponential", init_value=init_value, decay_rate=decay_rate)
    check_numbers("exponential", **({} if end_value is None else {"end_value": end_value}))
    check_steps("exponential", 1, transition_steps=transition_steps)
    check_steps("exponential", 0, transition_begin=transition_begin)
    if decay_rate <= 0:
        raise ValueError(f"exponential: decay_rate must be a number > 0, got {decay_rate!r}")

    def schedule(step: Tensor) -> Tensor:
        exponent = (floating(step) - transition_begin).clamp(min=0) / transition_steps
        value = init_value * decay_rate ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        return value.clamp(min=end_value) if decay_rate < 1 else value.clamp(max=end_value)

    return schedule


def step_decay(init_value: float, steps: int | Sequence[int], gamma: float = 0.1) -> Schedule:
    """Multiply by `gamma` at some steps: every `steps` of them, or at each of the steps given.

    torch's `StepLR` for a number, its `MultiStepLR` for a sequence (a step that is in it twice counts twice).
    Raises `ValueError` unless the steps are > 0 and `gamma` > 0.

    Example:
        >>> from fnn import optim
        >>> optim.step_decay(1.0, 10, gamma=0.5)(torch.tensor([0, 9, 10, 20]))
        tensor([1.0000, 1.0000, 0.5000, 0.2500])
        >>> optim.step_decay(1.0, [10, 15], gamma=0.5)(torch.tensor([0, 10, 14, 15]))
        tensor([1.0000, 0.5000, 0.5000, 0.2500])
    """
    check_numbers("step_decay", init_value=init_value, gamma=gamma)
    if gamma <= 0:
        raise ValueError(f"step_decay: gamma must be a number > 0, got {gamma!r}")
    if not isinstance(steps, Sequence):
        check_steps("step_decay", 1, steps=steps)
        return exponential(init_value, steps, gamma, staircase=True)
    milestones = list(steps)
    for milestone in milestones:
        check_steps("step_decay", 1, steps=milestone)

    def schedule(step: Tensor) -> Tensor:
        step = floating(step)
        drops = torch.zeros_like(step)
        for milestone in milestones:
            drops = drops + (step >= milestone)
        return init_value * gamma**drops

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
    check_numbers("cosine", init_value=init_value, alpha=alpha, exponent=exponent)
    check_steps("cosine", 1, decay_steps=decay_steps)

    def schedule(step: Tensor) -> Tensor:
        wave = 0.5 * (1 + torch.cos(math.pi * floating(step).clamp(max=decay_steps) / decay_steps))
        return init_value * ((1 - alpha) * wave**exponent + alpha)

    return schedule


def floating(step: Tensor) -> Tensor:
    """A step in the dtype that a schedule computes in."""
    step = torch.as_tensor(step)
    return step if step.is_floating_point() else step.to(torch.get_default_dtype())


def check_numbers(schedule: str, **numbers: float) -> None:
    """Raise `ValueError` unless each argument of a schedule is a finite number."""
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{schedule}: {name} must be a finite number, got {value!r}")


def check_steps(schedule: str, least: int, **steps: int) -> None:
    """Raise `ValueError` unless each is a number of steps from `least` on."""
    for name, value in steps.items():
        if not isinstance(value, Real) or not least <= value < math.inf:
            raise ValueError(f"{schedule}: {name} must be a number of steps >= {least}, got {value!r}")
