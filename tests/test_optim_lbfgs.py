"""optim.lbfgs and its line search, against torch.optim.LBFGS and the Wolfe conditions themselves."""

import pytest
import torch
from optimizer_table import layout, run
from torch.func import grad, grad_and_value, vmap

from fnn import optim

START = torch.tensor([-1.2, 1.0, 0.7, -0.4], dtype=torch.float64)
SCALES = torch.tensor([1.0, 30.0, 4.0, 0.2], dtype=torch.float64)


def rosenbrock(p):
    return ((1 - p[..., :-1]) ** 2 + 100 * (p[..., 1:] - p[..., :-1] ** 2) ** 2).sum()


def quadratic(p):
    return (SCALES.to(p.dtype) * (p - 1) ** 2).sum()


def wiggly(p):
    """A bowl with ripples, where one step length after another fails."""
    return ((p - 1) ** 2).sum() + 3 * torch.cos(4 * p).sum()


def torch_path(f, steps, **options):
    p = START.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([p], max_iter=1, tolerance_grad=0, tolerance_change=0, **options)

    def closure():
        optimizer.zero_grad()
        value = f(p)
        value.backward()
        return value

    path = []
    for _ in range(steps):
        optimizer.step(closure)
        path.append(p.detach().clone())
    return torch.stack(path)


def searched_step(opt, params, opt_state, f):
    grads, value = grad_and_value(f)(params)
    updates, opt_state = opt.update(grads, opt_state, params, value_fn=f, value=value, grad=grads)
    return optim.apply_updates(params, updates), opt_state


def searched_path(opt, f, steps, params=START):
    opt_state, path = opt.init(params), []
    for _ in range(steps):
        params, opt_state = searched_step(opt, params, opt_state, f)
        path.append(params)
    return torch.stack(path)


@pytest.mark.parametrize("history", [1, 3, 10])
def test_fixed_steps_equal_torch(history):
    opt = optim.lbfgs(0.5, history)
    params, opt_state, path = START, None, []
    for _ in range(25):
        params, opt_state = run(opt, params, 1, opt_state, f=quadratic)
        path.append(params)
    expected = torch_path(quadratic, 25, lr=0.5, history_size=history)
    torch.testing.assert_close(torch.stack(path), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("f", "steps", "lr"), [(rosenbrock, 30, 1.0), (quadratic, 8, 1.0), (wiggly, 8, 0.3)])
def test_line_search_equals_torch(f, steps, lr):
    """The same step lengths, until the loss is flat to rounding."""
    opt = optim.lbfgs(lr, 5, line_search="strong_wolfe")
    expected = torch_path(f, steps, lr=lr, history_size=5, line_search_fn="strong_wolfe", max_eval=26)
    torch.testing.assert_close(searched_path(opt, f, steps), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_line_search_finds_the_minimum_of_rosenbrock(dtype):
    opt = optim.lbfgs(line_search="strong_wolfe")
    start = START[:2]  # in more dimensions there are other minima
    end = searched_path(opt, rosenbrock, 40, start.to(dtype))[-1]
    p = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [p], max_iter=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = rosenbrock(p)
        value.backward()
        return value

    optimizer.step(closure)
    assert rosenbrock(end) < 1e-12
    torch.testing.assert_close(end, p.detach().to(dtype), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("f", [rosenbrock, wiggly])
@pytest.mark.parametrize("first", [1e-3, 1.0, 50.0])
def test_every_step_satisfies_the_wolfe_conditions(f, first):
    opt = optim.chain(optim.sgd(first), optim.strong_wolfe())
    params, opt_state = START, opt.init(START)
    for _ in range(5):
        grads = grad(f)(params)
        updates, opt_state = opt.update(grads, opt_state, params, value_fn=f)  # value and slope are found by itself
        slope, after = (grads * updates).sum(), (grad(f)(params + updates) * updates).sum()
        assert slope < 0
        assert f(params + updates) <= f(params) + 1e-4 * slope
        assert after.abs() <= 0.9 * slope.abs()
        params = optim.apply_updates(params, updates)


def test_line_search_at_its_edges():
    search = optim.strong_wolfe(10)
    one = torch.tensor([1.0])

    def length(updates, f, params=one):
        return search.update(updates, search.init(params), params, value_fn=f)[0] / updates

    assert length(one, lambda p: (p**2).sum()) == 0  # uphill
    assert length(-one, lambda p: 0 * p.sum()) == 0  # flat
    # infinite or no number at the first trial
    assert 0 < length(-3 * one, lambda p: (p - 0.5 * p.log()).sum()) < 1
    assert 0 < length(10 * one, lambda p: torch.where(p > 5, torch.inf, (p - 3).square()).sum()) < 0.4
    # without a lower bound it ends, with progress
    assert length(-one, lambda p: p.sum()) > 1
    # the only trial is higher: nothing moves
    assert optim.strong_wolfe(1).update(-1e6 * one, (), one, value_fn=lambda p: (p**2).sum())[0] == 0


def test_leaves_that_the_loss_takes_but_the_search_does_not_see_are_named():
    params = {"a": torch.ones(2), "b": torch.ones(1)}

    def f(p):
        return (p["a"] ** 2).sum() + (p["b"] ** 2).sum()

    search = optim.lbfgs(line_search="strong_wolfe")
    for opt in (
        optim.freeze(search, "b"),
        optim.by_label({"x": search, "y": optim.sgd(0.1)}, {"a": "x", "b": "y"}),
        optim.chain(optim.sgd(0.1), optim.masked(optim.strong_wolfe(), "a")),
    ):
        with pytest.raises(ValueError, match="update every leaf that the loss takes, but grad= has others: .*'b'"):
            searched_step(opt, params, opt.init(params), f)
    nothing = searched_step(optim.freeze(search, "*"), params, optim.freeze(search, "*").init(params), f)[0]
    assert nothing["a"] is params["a"]


def test_a_tree_of_several_dtypes():
    params = {"wide": torch.ones(2, dtype=torch.float64), "half": torch.ones(3).bfloat16(), "none": ()}

    def f(p):
        return (p["wide"] ** 2).sum() + 3 * (p["half"].double() ** 2).sum()

    opt = optim.lbfgs(line_search="strong_wolfe")
    opt_state = opt.init(params)
    before = layout(opt_state)
    for _ in range(6):
        params, opt_state = searched_step(opt, params, opt_state, f)
    assert layout(opt_state) == before
    assert {name: leaf.dtype for name, leaf in params.items() if name != "none"} == {
        "wide": torch.float64,
        "half": torch.bfloat16,
    }
    assert f(params) < 1e-4


def test_vmap_equals_single_runs():
    starts = torch.stack([START, START.flip(0), 0.3 * START])
    opt = optim.lbfgs(line_search="strong_wolfe", max_evaluations=8)

    def train(params):
        opt_state = opt.init(params)
        for _ in range(4):
            params, opt_state = searched_step(opt, params, opt_state, rosenbrock)
        return params

    together = vmap(train)(starts)
    for k in range(3):
        torch.testing.assert_close(together[k], train(starts[k]), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_line_search_equals_eager(fast_compile):
    opt = optim.lbfgs(history=1, line_search="strong_wolfe")
    fast = torch.compile(lambda p, s: searched_step(opt, p, s, rosenbrock), fullgraph=True)
    params, opt_state = START, opt.init(START)
    expected = searched_path(opt, rosenbrock, 10)
    for row in expected:
        params, opt_state = fast(params, opt_state)
        torch.testing.assert_close(params, row, rtol=0, atol=1e-8)


def test_errors():
    with pytest.raises(ValueError, match="lbfgs: line_search must be 'strong_wolfe' or None, got 'armijo'"):
        optim.lbfgs(line_search="armijo")
    with pytest.raises(ValueError, match="lbfgs: history must be an int >= 1, got 0"):
        optim.lbfgs(history=0)
    with pytest.raises(ValueError, match="strong_wolfe: max_evaluations must be an int >= 1, got 0"):
        optim.lbfgs(line_search="strong_wolfe", max_evaluations=0)
    opt = optim.lbfgs()
    with pytest.raises(ValueError, match=r"L-BFGS needs the parameters: opt\.update\(grads, opt_state, params\)"):
        opt.update(START, opt.init(START))
    with pytest.raises(ValueError, match="expected ScaleByLbfgsState, got"):
        opt.update(START, optim.adam(0.1).init(START)[1:], START)
    opt = optim.lbfgs(line_search="strong_wolfe")
    with pytest.raises(ValueError, match=r"the loss as a function of them: opt\.update\(.*value_fn=f\)"):
        opt.update(START, opt.init(START), START, value=torch.tensor(1.0))
    with pytest.raises(ValueError, match="the loss, value_fn, must be a 0-d tensor, got shape \\(4,\\)"):
        opt.update(START, opt.init(START), START, value_fn=lambda p: p)
