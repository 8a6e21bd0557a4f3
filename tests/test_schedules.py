"""Schedules against torch's schedulers and values recorded from Optax; those of test_optim.py are tested there."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import vmap
from torch.optim import lr_scheduler

from fnn import optim

GOLDEN = np.load(Path(__file__).parent / "golden" / "transforms.npz")
OPTAX = {
    "exponential": optim.exponential(0.7, 10, 0.6),
    "exponential_begin": optim.exponential(0.7, 7, 0.5, transition_begin=5, staircase=True, end_value=0.1),
    "exponential_growth": optim.exponential(0.1, 9, 1.5, transition_begin=3, end_value=0.6),
    "polynomial": optim.polynomial(1.0, 0.1, 2.0, 30),
    "polynomial_begin": optim.polynomial(0.2, 1.3, 0.5, 25, 12),
    "piecewise": optim.step_decay(0.8, [10, 25, 40], 0.3),
    "join": optim.join([optim.linear(0.0, 1.0, 8), optim.constant(1.0), optim.cosine(1.0, 20)], [8, 20]),
}
CYCLES = {
    "cos": {},
    "linear": {"anneal_strategy": "linear"},
    "three_phase": {"three_phase": True, "pct_start": 0.4},
    "three_phase_linear": {"three_phase": True, "pct_start": 0.25, "anneal_strategy": "linear", "div_factor": 5.0},
    "between_steps": {"pct_start": 0.37, "final_div_factor": 10.0},
}
TORCH = {
    "exponential": (optim.exponential(0.3, 1, 0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "staircase": (optim.exponential(0.3, 7, 0.5, staircase=True), lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "step_decay": (optim.step_decay(0.3, 9), lambda o: lr_scheduler.StepLR(o, 9)),
    "milestones": (
        optim.step_decay(0.3, [5, 12, 12, 30], 0.6),
        lambda o: lr_scheduler.MultiStepLR(o, [5, 12, 12, 30], 0.6),
    ),
    "polynomial": (optim.polynomial(0.3, 0.0, 1.7, 40), lambda o: lr_scheduler.PolynomialLR(o, 40, 1.7)),
    "join": (
        optim.join([optim.constant(0.03), optim.exponential(0.3, 1, 0.9)], [6]),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 100), lr_scheduler.ExponentialLR(o, 0.9)], [6]
        ),
    ),
    **{
        f"one_cycle_{name}": (
            optim.one_cycle(0.3, 50, **options),
            lambda o, options=options: lr_scheduler.OneCycleLR(o, 0.3, 50, cycle_momentum=False, **options),
        )
        for name, options in CYCLES.items()
    },
}
EVERY = pytest.mark.parametrize("name", [*OPTAX, *(f"one_cycle_{n}" for n in CYCLES)])


def schedule_of(name):
    return OPTAX[name] if name in OPTAX else TORCH[name][0]


def torch_values(make, steps=50, read=lambda group: group["lr"], **options):
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.3, **options)
    scheduler = make(optimizer)
    values = []
    for step in range(steps):
        values.append(read(optimizer.param_groups[0]))
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", OPTAX)
def test_equal_optax(name):
    expected = torch.from_numpy(GOLDEN[f"schedule/{name}"])
    steps = torch.arange(len(expected))
    torch.testing.assert_close(OPTAX[name](steps.double()), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(OPTAX[name](steps), expected.float(), rtol=1e-5, atol=1e-6)


def test_every_recorded_schedule_is_compared():
    assert {key for key in GOLDEN if key.startswith("schedule/")} == {f"schedule/{name}" for name in OPTAX}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TORCH)
def test_equal_torch(name):
    schedule, make = TORCH[name]
    torch.testing.assert_close(
        schedule(torch.arange(50, dtype=torch.float64)), torch_values(make), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("options", [{}, {"three_phase": True, "pct_start": 0.4}], ids=["two", "three"])
def test_one_cycle_serves_the_momentum_too(options):
    """As its docstring says: torch's cycle of the momentum is one_cycle from 0.95 down to 0.85 and up again."""
    expected = torch_values(
        lambda o: lr_scheduler.OneCycleLR(o, 0.3, 50, **options), read=lambda group: group["momentum"], momentum=0.9
    )
    momentum = optim.one_cycle(0.85, 50, div_factor=0.85 / 0.95, final_div_factor=1.0, **options)
    torch.testing.assert_close(momentum(torch.arange(50, dtype=torch.float64)), expected, rtol=1e-12, atol=0)


def test_flat_before_and_after():
    late, early = torch.tensor(10.0**6), torch.tensor(0.0)
    assert optim.one_cycle(1.0, 20)(late) == optim.one_cycle(1.0, 20)(torch.tensor(19.0))
    assert optim.polynomial(1.0, 0.2, 3, 10, 5)(late).item() == pytest.approx(0.2)
    assert optim.polynomial(1.0, 0.2, 3, 10, 5)(early) == 1
    assert optim.exponential(1.0, 3, 0.5, 10, end_value=0.25)(late) == 0.25
    assert optim.exponential(1.0, 3, 0.5, 10)(early) == 1


@EVERY
def test_steps_of_any_shape_under_vmap_and_compiled(name, fast_compile):
    schedule = schedule_of(name)
    steps = torch.arange(48, dtype=torch.float64)
    expected = schedule(steps)
    assert expected.shape == steps.shape
    assert torch.equal(schedule(steps.reshape(2, 4, 6)), expected.reshape(2, 4, 6))
    assert schedule(torch.tensor(3)).shape == ()
    assert schedule(torch.tensor(3)).dtype == torch.float32
    torch.testing.assert_close(vmap(schedule)(steps), expected, rtol=1e-14, atol=0)
    compiled = torch.compile(schedule, fullgraph=True)
    torch.testing.assert_close(compiled(steps), expected, rtol=1e-14, atol=1e-16)


def test_an_optimizer_follows_them():
    schedule = optim.join([optim.linear(0.0, 1.0, 3), lambda step: 1 / (1 + step)], [3])
    opt = optim.sgd(schedule)
    opt_state = opt.init(torch.zeros(1))
    taken = []
    for _ in range(6):
        updates, opt_state = opt.update(torch.ones(1), opt_state)
        taken.append(-updates.item())
    assert taken == pytest.approx([0, 1 / 3, 2 / 3, 1, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.exponential(1, 0, 0.5), ValueError, "exponential: transition_steps must be .* >= 1, got 0"),
        (lambda: optim.exponential(1, 5, 0.0), ValueError, "exponential: decay_rate must be a number > 0, got 0.0"),
        (lambda: optim.exponential(1, 5, 0.5, -1), ValueError, "exponential: transition_begin must be .* got -1"),
        (lambda: optim.exponential(1, 5, 0.5, end_value=math.nan), ValueError, "end_value must be a finite number"),
        (lambda: optim.polynomial(1, 0, -1, 5), ValueError, "polynomial: power must be a number >= 0, got -1"),
        (lambda: optim.polynomial(1, 0, 1, 0), ValueError, "polynomial: transition_steps must be"),
        (lambda: optim.step_decay(1, 0), ValueError, "step_decay: steps must be a number of steps >= 1, got 0"),
        (lambda: optim.step_decay(1, [5, 0]), ValueError, "step_decay: steps must be a number of steps >= 1, got 0"),
        (lambda: optim.step_decay(1, "5"), ValueError, "step_decay: steps must be a number of steps >= 1, got '5'"),
        (lambda: optim.step_decay(1, 5, 0), ValueError, "step_decay: gamma must be a number > 0, got 0"),
        (lambda: optim.one_cycle(1, 1), ValueError, "one_cycle: total_steps must be a number of steps >= 2, got 1"),
        (lambda: optim.one_cycle(1, 3), ValueError, r"one_cycle: with total_steps=3, pct_start=0.3.* end at the steps"),
        (lambda: optim.one_cycle(1, 20, 0.6, three_phase=True), ValueError, "each must end after the one before"),
        (lambda: optim.one_cycle(1, 20, anneal_strategy="cosine"), ValueError, "must be 'cos' or 'linear', got 'cos"),
        (lambda: optim.one_cycle(1, 20, div_factor=0), ValueError, "one_cycle: the factors must be > 0, got 0"),
        (lambda: optim.join([], []), ValueError, "join: expected at least one schedule"),
        (lambda: optim.join([optim.constant(1)], [5]), ValueError, "join: 1 schedules need 0 boundaries, got 1"),
        (lambda: optim.join([optim.constant(1)] * 3, [5, 5]), ValueError, r"join: boundaries must rise, got \[5, 5\]"),
        (lambda: optim.join([optim.constant(1), 0.1], [5]), TypeError, "join: schedule 1 is 0.1, expected a function"),
        (lambda: optim.join([optim.constant(1)] * 2, [-5]), ValueError, r"join: boundaries\[0\] must be .* >= 1"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
