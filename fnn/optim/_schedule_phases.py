"""Schedules in phases: one schedule after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fnn.optim._hyper import Schedule
from fnn.optim._schedules import check_numbers, check_steps, cosine, floating, linear


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: the next begins, at its own step 0, at each of the `boundaries`.

    Optax's `join_schedules`. Any functions from a step tensor to a value will do; each is asked at every step, and
    what it gives before its time or after is left aside.
    Raises `ValueError` unless there is one boundary fewer than schedules, and they rise.

    Example:
        >>> from fnn import optim
        >>> schedule = optim.join([optim.linear(0.0, 1.0, 10), optim.constant(1.0), optim.cosine(1.0, 20)], [10, 50])
        >>> schedule(torch.tensor([5, 30, 60]))
        tensor([0.5000, 1.0000, 0.5000])
    """
    schedules, boundaries = list(schedules), list(boundaries)
    if not schedules:
        raise ValueError("join: expected at least one schedule")
    for position, part in enumerate(schedules):
        if not callable(part):
            raise TypeError(
                f"join: schedule {position} is {part!r}, expected a function of the step such as constant(0.1)"
            )
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join: {len(schedules)} schedules need {len(schedules) - 1} boundaries, got {len(boundaries)}"
        )
    check_steps("join", 1, **{f"boundaries[{k}]": boundary for k, boundary in enumerate(boundaries)})
    if any(left >= right for left, right in pairwise(boundaries)):
        raise ValueError(f"join: boundaries must rise, got {boundaries}")

    def schedule(step: Tensor) -> Tensor:
        step = floating(step)
        value = torch.as_tensor(schedules[0](step)).to(step)
        for boundary, part in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(step < boundary, value, part(step - boundary))
        return value.to(step)

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
    check_numbers("warmup_cosine", init_value=init_value, peak_value=peak_value, end_value=end_value, exponent=exponent)
    check_steps("warmup_cosine", 0, warmup_steps=warmup_steps)
    check_steps("warmup_cosine", warmup_steps + 1, decay_steps=decay_steps)
    decay = cosine(peak_value, decay_steps - warmup_steps, end_value / peak_value if peak_value else 0.0, exponent)
    if warmup_steps == 0:
        return decay
    warmup = linear(init_value, peak_value, warmup_steps)

    def schedule(step: Tensor) -> Tensor:
        step = floating(step)
        return torch.where(step < warmup_steps, warmup(step), decay(step - warmup_steps))

    return schedule


def one_cycle(
    max_value: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    three_phase: bool = False,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """Up to `max_value` and down to almost nothing in `total_steps`, as torch's `OneCycleLR`; flat afterwards.

    From `max_value / div_factor` up in the first `pct_start` of the steps, then down to
    `max_value / div_factor / final_div_factor`; with `three_phase` first back to where it began in as many steps as
    it rose. Each phase is half a cosine, or a line. torch moves the momentum against it, from 0.95 down to 0.85 and
    up again; that is a cycle too: ``one_cycle(0.85, total_steps, div_factor=0.85 / 0.95, final_div_factor=1.0)``.

    Raises `ValueError` for phases that have no steps.

    Example:
        >>> from fnn import optim
        >>> optim.one_cycle(1.0, 11, pct_start=0.5, div_factor=10.0)(torch.tensor([0.0, 4.5, 10.0]))
        tensor([1.0000e-01, 1.0000e+00, 1.0000e-05])

    Reference: Smith and Topin, Super-convergence: very fast training of neural networks using large learning rates,
    2018, https://arxiv.org/abs/1708.07120
    """
    check_numbers("one_cycle", max_value=max_value, pct_start=pct_start)
    check_numbers("one_cycle", div_factor=div_factor, final_div_factor=final_div_factor)
    check_steps("one_cycle", 2, total_steps=total_steps)
    if div_factor <= 0 or final_div_factor <= 0:
        raise ValueError(f"one_cycle: the factors must be > 0, got {div_factor!r} and {final_div_factor!r}")
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(f"one_cycle: anneal_strategy must be 'cos' or 'linear', got {anneal_strategy!r}")
    least = max_value / div_factor
    values = [least, max_value, *([least] if three_phase else []), least / final_div_factor]
    # the phases end where torch has them end, between steps where pct_start * total_steps is no whole number
    ends = [0.0, pct_start * total_steps - 1, *([2 * pct_start * total_steps - 2] if three_phase else [])]
    ends.append(total_steps - 1)
    if any(left >= right for left, right in pairwise(ends)):
        raise ValueError(
            f"one_cycle: with total_steps={total_steps}, pct_start={pct_start}, three_phase={three_phase} the phases "
            f"would end at the steps {ends[1:]}; each must end after the one before, the first after step 0"
        )

    def schedule(step: Tensor) -> Tensor:
        step = floating(step)
        value = torch.full_like(step, values[0])
        for k in range(len(values) - 1):
            remaining = 1 - ((step - ends[k]) / (ends[k + 1] - ends[k])).clamp(0, 1)
            if anneal_strategy == "cos":
                remaining = 0.5 * (1 - torch.cos(math.pi * remaining))
            phase = values[k + 1] + (values[k] - values[k + 1]) * remaining
            value = torch.where(step > ends[k], phase, value)
        return value

    return schedule
