"""optim.schedule_free: what the values recorded from Optax (in test_optim.py) do not show."""

import pytest
import torch
from torch.func import vmap

from fnn import optim

TARGET = torch.tensor([0.5, -1.0], dtype=torch.float64)


def run(opt, steps, params=0 * TARGET, opt_state=None):
    opt_state = opt.init(params) if opt_state is None else opt_state
    for _ in range(steps):
        updates, opt_state = opt.update(params - TARGET, opt_state, params)
        params = optim.apply_updates(params, updates)
    return params, opt_state


def test_equals_its_definition_with_changing_numbers():
    """The three sequences kept apart, under schedules of lr and b1."""
    lr, b1 = (lambda k: 0.1 * (1 + k)), (lambda k: 0.9 - 0.05 * k)
    opt = optim.schedule_free(optim.identity(), lr, b1, weight_lr_power=1.0)
    params, opt_state = 0 * TARGET, opt.init(0 * TARGET)
    x = y = z = params
    total = 0.0
    for k in range(6):
        params, opt_state = run(opt, 1, params, opt_state)
        z = z - lr(k) * (y - TARGET)
        total += lr(k)
        x = x + lr(k) / total * (z - x)
        y = b1(k) * x + (1 - b1(k)) * z
        torch.testing.assert_close(params, y, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optim.eval_params(opt_state, params), x, rtol=1e-12, atol=1e-14)


def test_a_b1_set_by_hand_leaves_the_average_as_it_is():
    params, opt_state = run(optim.schedule_free_sgd(0.3), 5)
    before = optim.eval_params(opt_state, params)
    assert torch.equal(optim.eval_params(optim.set(opt_state, b1=0.5), params), before)


def test_a_warmup_from_zero_moves_nothing_at_first():
    opt = optim.schedule_free_sgd(optim.linear(0.0, 0.5, 3))
    params, opt_state = run(opt, 1)
    assert torch.equal(params, 0 * TARGET)
    params, opt_state = run(opt, 200, params, opt_state)
    torch.testing.assert_close(optim.eval_params(opt_state, params), TARGET, rtol=0, atol=1e-2)


def test_within_other_transformations():
    opt = optim.chain(optim.clip_by_global_norm(1.0), optim.freeze(optim.schedule_free_sgd(0.2), "b"))
    params = {"a": torch.ones(2), "b": torch.ones(1)}
    updates, opt_state = opt.update(params, opt.init(params), params)
    shown = optim.eval_params(opt_state, optim.apply_updates(params, updates))
    assert torch.equal(shown["b"], params["b"])
    assert (shown["a"] < 1).all()


def test_adamw_has_no_first_moment():
    state = optim.schedule_free_adamw(0.1).init(torch.ones(5))
    assert sum(leaf.numel() for leaf in (state.z, state.inner[0].nu)) == 10
    assert state.inner[0].mu == ()


def test_vmap_over_b1():
    b1 = torch.tensor([0.7, 0.95], dtype=torch.float64)
    together = vmap(lambda b: optim.eval_params(*run(optim.schedule_free_sgd(0.3, b), 4)[::-1]))(b1)
    for k in range(2):
        params, opt_state = run(optim.schedule_free_sgd(0.3, b1[k].item()), 4)
        torch.testing.assert_close(together[k], optim.eval_params(opt_state, params), rtol=1e-12, atol=1e-14)


def test_errors():
    with pytest.raises(ValueError, match="schedule_free: b1 must be more than 0"):
        optim.schedule_free_sgd(0.1, b1=0.0)
    with pytest.raises(ValueError, match=r"has a learning rate of its own \('2\.lr'\)"):
        optim.schedule_free(optim.sgd(0.1), 0.1).init(TARGET)
    with pytest.raises(TypeError, match="schedule_free: transformation is <function sgd"):
        optim.schedule_free(optim.sgd, 0.1)
    opt = optim.schedule_free_sgd(0.1)
    with pytest.raises(ValueError, match=r"schedule_free needs the parameters: opt\.update"):
        opt.update(TARGET, opt.init(TARGET))
