"""fnn.optim: one table of optimizers times behaviours, against torch.optim."""

import pytest
import torch
from optimizer_table import (
    HYPERPARAMETERS,
    OPTIMIZERS,
    compiled_step,
    flat,
    layout,
    loss,
    run,
    start,
    step,
    torch_run,
)
from torch.func import grad, vmap

from fnn import interop, optim, tree

EVERY = pytest.mark.parametrize("row", OPTIMIZERS.values(), ids=OPTIMIZERS)
IN_TORCH = {name: row for name, row in OPTIMIZERS.items() if row.torch is not None}
EVERY_IN_TORCH = pytest.mark.parametrize("row", IN_TORCH.values(), ids=IN_TORCH)
# of muon's row the vectors belong to another optimizer
FOR_VECTORS = {name: row for name, row in OPTIMIZERS.items() if not name.startswith("muon")}
# one of each kind of state
KINDS = [
    "sgd_decay",
    "nesterov",
    "dampening",
    "adam_options",
    "adam_no_average",
    "adamw",
    "rmsprop_options",
    "adagrad_options",
    "adadelta",
    "adamax",
    "nadam_options",
    "radam",
    "muon",
    "lbfgs",
    "lion",
    "lars",
    "lamb",
    "schedule_free_adamw",
]
# of these, those that differ for a compiler: moments; counts and products; matrices; vectors; parameters as state
COMPILED = ["adamw", "dampening", "nadam_options", "muon", "lbfgs", "schedule_free_adamw"]
EVERY_NUMBER = pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, (_, numbers) in HYPERPARAMETERS.items() for number in numbers]
)


def set_lr(opt_state, lr):
    """Every learning rate in a state, of which by_label has several."""
    paths = [path.removesuffix(".value") for path in tree.paths(opt_state) if path.endswith("lr.value")]
    return optim.set(opt_state, **dict.fromkeys(paths, lr))


@EVERY_IN_TORCH
def test_equals_torch(row):
    ours, _ = run(row.make(row.lr), start(), 100)
    theirs = torch_run(lambda p: row.torch(p, row.lr), 100)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-10)


@EVERY_IN_TORCH
def test_in_float32_is_as_near_to_float64_as_torch(row):
    exact = flat(torch_run(lambda p: row.torch(p, row.lr), 30))
    theirs = (flat(torch_run(lambda p: row.torch(p, row.lr), 30, torch.float32)) - exact).abs().max()
    ours = (flat(run(row.make(row.lr), start(torch.float32), 30)[0]) - exact).abs().max()
    assert ours < 2 * theirs + row.single


@pytest.mark.parametrize("name", KINDS)
def test_converges_on_a_quadratic(name):
    row = OPTIMIZERS[name]
    target = torch.tensor([[0.3, -0.7, 0.2]])

    def quadratic(params):
        return ((params["weight"] - target) ** 2).sum() + ((params["bias"] - 0.1) ** 2).sum()

    params = {"weight": torch.ones(1, 3), "bias": torch.zeros(2)}
    opt = row.make(optim.cosine(row.lr, 300))
    params, _ = run(opt, params, 300, f=quadratic)
    # decay of 0.1 (L2, or decoupled) moves the minimum by less than its own size
    assert quadratic(params) < 0.02, params


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layout_are_kept(row, dtype):
    params = start(dtype)
    opt = row.make(row.lr)
    opt_state = opt.init(params)
    before = layout(opt_state)
    for _ in range(2):
        params, opt_state = step(opt, params, opt_state)
        assert layout(opt_state) == before
    assert {leaf.dtype for leaf in tree.leaves(params)} == {dtype}
    assert flat(params).isfinite().all()
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(opt_state))
    shown = [leaf for path, leaf in tree.paths(opt_state).items() if path.endswith("lr.value")]
    assert shown
    assert {lr.dtype for lr in shown} == {torch.float32}
    # a donating step writes into each leaf
    assert len({leaf.data_ptr() for leaf in tree.leaves((params, opt_state))}) == len(tree.leaves((params, opt_state)))


@EVERY
def test_half_precision_is_computed_in_float32_and_rounded_when_stored(row):
    opt = row.make(row.lr)
    half, half_state = start(torch.bfloat16), opt.init(start(torch.bfloat16))

    def wide(x):
        return tree.map(lambda leaf: leaf.float() if leaf.dtype == torch.bfloat16 else leaf, x)

    for _ in range(3):
        grads = grad(loss)(half)
        updates, expected = opt.update(wide(grads), wide(half_state), wide(half))
        half_updates, half_state = opt.update(grads, half_state, half)
        assert tree.allclose(half_state, tree.map(lambda a, b: a.to(b.dtype), expected, half_state), row.stored, 0)
        assert tree.allclose(half_updates, updates, rtol=row.half)  # they follow from the rounded moments
        if not any(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(half_state)):
            assert tree.allclose(half_updates, updates, 0, 0)
        half = optim.apply_updates(half, half_updates)


@EVERY
def test_small_gradients_of_float16_params_are_not_lost(row):
    """Their squares are 0 in float16."""
    half = {"weight": torch.ones(3, 2).half(), "bias": torch.ones(2).half()}
    params, grads = tree.map(torch.Tensor.float, half), tree.map(lambda p: torch.full_like(p, 1e-4), half)
    updates, _ = row.make(row.lr).update(grads, row.make(row.lr).init(half), half)
    expected, _ = row.make(row.lr).update(tree.map(torch.Tensor.float, grads), row.make(row.lr).init(params), params)
    # of schedule_free the updates are between rounded parameters
    assert tree.allclose(tree.map(torch.Tensor.float, updates), expected, rtol=2e-3, atol=2**-11)


@pytest.mark.parametrize("row", FOR_VECTORS.values(), ids=FOR_VECTORS)
def test_bare_tensors_and_absent_leaves_are_params(row):
    opt = row.make(row.lr)
    bare = torch.tensor([1.0, -2.0], dtype=torch.float64)
    alone, _ = run(opt, bare, 5, f=lambda p: (p**2).sum())
    nested = {"a": (bare, ()), "b": {}, "c": ()}
    within, state = run(opt, nested, 5, f=lambda p: (p["a"][0] ** 2).sum())
    assert torch.equal(alone, within["a"][0])
    assert within["a"][1] == within["c"] == ()
    assert within["b"] == {}
    scalar, _ = run(opt, bare[0], 5, f=lambda p: p**2)
    assert scalar.shape == ()
    assert torch.equal(scalar, alone[0]) or not row.elementwise
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(state))


@pytest.mark.parametrize("row", FOR_VECTORS.values(), ids=FOR_VECTORS)
def test_frozen_leaves_take_no_memory(row):
    opt = row.make(row.lr)
    params = start()
    trained, frozen = tree.partition(params, "weight")
    grown = tree.size(opt.init(params)) - tree.size(opt.init(trained))
    assert grown == row.moments * tree.size(frozen)


@EVERY
def test_vmap_over_seeds_and_learning_rates_equals_single_runs(row):
    lrs = torch.tensor([row.lr, row.lr / 3], dtype=torch.float64)
    seeds = {name: torch.stack([leaf, leaf + 0.3]) for name, leaf in start().items()}

    def train(params, lr):
        opt = row.make(1.0)
        return run(opt, params, 4, set_lr(opt.init(params), lr))[0]

    together = vmap(train)(seeds, lrs)
    built = vmap(lambda p, lr: run(row.make(lr), p, 4)[0])(seeds, lrs)
    for k in range(2):
        single, _ = run(row.make(lrs[k].item()), tree.map(lambda leaf, k=k: leaf[k], seeds), 4)
        for name in single:
            torch.testing.assert_close(together[name][k], single[name], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(built[name][k], single[name], rtol=1e-12, atol=1e-12)


@EVERY
def test_foreign_gradients_are_named(row):
    params = start()
    opt = row.make(row.lr)
    opt_state = opt.init(params)

    def whole_step(grads):
        updates, _ = opt.update(grads, opt_state, params)
        return optim.apply_updates(params, updates)

    with pytest.raises(ValueError, match="missing 'bias'"):
        whole_step({"weight": params["weight"]})
    with pytest.raises(ValueError, match="unexpected 'scale'"):
        whole_step({**params, "scale": params["bias"]})
    with pytest.raises(ValueError, match=r"leaf 'weight' has shape \(1, 2\), expected shape \(3, 2\)"):
        whole_step({"weight": params["weight"][:1], "bias": params["bias"]})


@EVERY
def test_a_gradient_that_is_no_number_shows(row):
    opt, params = row.make(row.lr), start()
    grads = {name: leaf.clone() for name, leaf in grad(loss)(params).items()}
    grads["weight"][0, 0] = grads["bias"][0] = torch.nan
    updates, _ = opt.update(grads, opt.init(params), params)
    stepped = optim.apply_updates(params, updates)
    assert stepped["weight"][0, 0].isnan()
    assert stepped["bias"][0].isnan()


@pytest.mark.parametrize("row", FOR_VECTORS.values(), ids=FOR_VECTORS)
def test_derivatives_through_steps_without_a_gradient_are_finite(row):
    """An element that the loss does not depend on: what it ends as is what it started as, or less by decay."""

    def end(p):
        return run(row.make(row.lr), p, 2, f=lambda p: p[0] ** 2)[0].sum()

    meta = grad(end)(torch.tensor([0.5, 0.3], dtype=torch.float64))
    assert meta.isfinite().all()
    if row.elementwise:
        assert 0.5 < meta[1] <= 1.0 + 1e-12


@EVERY
def test_saved_and_loaded_it_continues_bit_for_bit(row, tmp_path):
    opt = row.make(optim.cosine(row.lr, 20))
    before = run(opt, start(), 3)
    interop.save_safetensors(before, tmp_path / "run.safetensors")
    loaded = tree.leaves(interop.load_safetensors(tmp_path / "run.safetensors"))
    params, opt_state = tree.unflatten(tree.flatten(before)[1], loaded)
    assert tree.allclose(run(opt, params, 3, opt_state), run(opt, start(), 6), 0, 0)


# ---- every hyper-parameter


@EVERY_NUMBER
def test_every_hyperparameter_can_be_scheduled_and_set(name, number):
    """A schedule equals setting its values by hand, and neither is ignored."""
    make, numbers = HYPERPARAMETERS[name]
    values = [numbers[number] * (1 - 0.1 * k) for k in range(8)]
    scheduled, state = run(make(**{**numbers, number: lambda step: values[0] * (1 - 0.1 * step)}), start(), 8)
    assert optim.get(state, number).item() == pytest.approx(values[-1], rel=1e-12)

    opt = make(**numbers)
    params, opt_state = start(), opt.init(start())
    for value in values:
        params, opt_state = step(opt, params, optim.set(opt_state, **{number: value}))
    torch.testing.assert_close(flat(scheduled), flat(params), rtol=1e-12, atol=1e-14)
    constant, _ = run(opt, start(), 8)
    assert not torch.allclose(flat(params), flat(constant), rtol=1e-6, atol=0)


@EVERY_NUMBER
def test_every_hyperparameter_is_checked_by_name(name, number):
    make, numbers = HYPERPARAMETERS[name]
    for wrong in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=f"{number} must be .* got {wrong}"):
            make(**{**numbers, number: wrong})
    with pytest.raises(TypeError, match=f"{number} must be .* got '0.1'"):
        make(**{**numbers, number: "0.1"})


@pytest.mark.parametrize("name", [name for name, (_, numbers) in HYPERPARAMETERS.items() if "weight_decay" in numbers])
def test_weight_decay_mask(name):
    make, numbers = HYPERPARAMETERS[name]
    masked, _ = run(make(**numbers, weight_decay_mask=lambda path, leaf: path == "weight"), start(), 1)
    everywhere, _ = run(make(**numbers), start(), 1)
    nowhere, _ = run(make(**{**numbers, "weight_decay": 0.0}), start(), 1)
    assert torch.equal(masked["weight"], everywhere["weight"])
    assert torch.equal(masked["bias"], nowhere["bias"])
    assert not torch.allclose(everywhere["weight"], nowhere["weight"])


@pytest.mark.parametrize("name", [name for name in HYPERPARAMETERS if name != "lbfgs"])
def test_moment_dtype(name):
    """bfloat16 parameters with float32 moments."""
    make, numbers = HYPERPARAMETERS[name]
    params = start(torch.bfloat16)
    for wrong in (torch.float16, torch.int32, torch.complex64, "float32"):
        with pytest.raises(
            TypeError, match="moment_dtype must be None or a real floating dtype of the range of float32"
        ):
            make(**numbers, moment_dtype=wrong).init(params)
    opt = make(**numbers, moment_dtype=torch.float32)
    opt_state = opt.init(params)
    assert {leaf.dtype for leaf in tree.leaves(opt_state) if leaf.ndim} == {torch.float32}
    before = layout(opt_state)
    updates, opt_state = opt.update(grad(loss)(params), opt_state, params)
    assert layout(opt_state) == before
    # the moments hold what bfloat16 could not
    narrow = tree.map(lambda leaf: leaf.bfloat16().float() if leaf.ndim else leaf, opt_state)
    assert not tree.allclose(opt_state, tree.map(lambda a, b: a.to(b.dtype), narrow, opt_state), 0, 0)
    wide_params, wide_grads = (tree.map(torch.Tensor.float, x) for x in (params, grad(loss)(params)))
    wide, _ = make(**numbers).update(wide_grads, make(**numbers).init(wide_params), wide_params)
    if not name.startswith("schedule_free"):  # there the updates are relative to the rounded parameters
        assert tree.allclose(tree.map(torch.Tensor.float, updates), wide, rtol=1e-5)


# ---- one graph


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in COMPILED])
def test_one_graph_whatever_changes(name):
    row = OPTIMIZERS[name]
    opt = row.make(row.lr)
    fast = compiled_step(opt, backend="aot_eager")
    params = start()
    opt_state = opt.init(params)
    expected = params, opt_state
    params, opt_state = fast(params, opt_state)
    expected = step(opt, *expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lr in (0.01, 0.002, torch.tensor(0.03)):
            opt_state, other = set_lr(opt_state, lr), set_lr(expected[1], lr)
            params, opt_state = fast(params, opt_state)
            expected = step(opt, expected[0], other)
    assert tree.allclose((params, opt_state), expected, rtol=1e-12, atol=1e-14)
    assert layout(opt_state) == layout(expected[1])


@pytest.mark.parametrize("name", [name for name in KINDS if name not in COMPILED])
def test_traces_to_one_graph(name):
    """Without a compiler behind it: Dynamo takes the whole update, and the graph does what the update does."""
    opt, params = OPTIMIZERS[name].make(0.1), start()
    opt_state, grads = opt.init(params), grad(loss)(params)
    traced = torch.compile(opt.update, fullgraph=True, backend="eager")
    assert tree.allclose(traced(grads, opt_state, params), opt.update(grads, opt_state, params), rtol=1e-13, atol=0)
