"""Normalisation against torch.nn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import KEY, check_against_torch, check_compiled, check_transforms, double, name
from torch.func import grad, jvp, vmap

from fnn import nn, tree

CASES = [
    (nn.BatchNorm(), torch.nn.BatchNorm1d(3), (5, 3)),
    (nn.BatchNorm(), torch.nn.BatchNorm3d(2), (2, 2, 1, 2, 2)),
    (nn.BatchNorm(momentum=None), torch.nn.BatchNorm2d(2, momentum=None), (2, 2, 2, 2)),
    (nn.BatchNorm(1e-3, None, False), torch.nn.BatchNorm1d(3, 1e-3, None, affine=False), (4, 3)),
    (nn.BatchNorm(momentum=0.0), torch.nn.BatchNorm1d(3, momentum=0.0), (4, 3)),
    (nn.BatchNorm(momentum=1.0), torch.nn.BatchNorm1d(3, momentum=1.0), (4, 3, 2)),
    (nn.LayerNorm(2, 1e-3), torch.nn.LayerNorm((2, 3), 1e-3), (2, 2, 3)),
    (nn.RMSNorm(), torch.nn.RMSNorm(4), (2, 3, 4)),
    (nn.RMSNorm(2, 0.1), torch.nn.RMSNorm((3, 2), 0.1), (2, 3, 2)),
    (nn.RMSNorm(affine=False), torch.nn.RMSNorm(4, elementwise_affine=False), (3, 4)),
    (nn.GroupNorm(2), torch.nn.GroupNorm(2, 4), (2, 4)),
    (nn.GroupNorm(2, 1e-3), torch.nn.GroupNorm(2, 4, 1e-3), (2, 4, 2, 1)),
    (nn.GroupNorm(3, affine=False), torch.nn.GroupNorm(3, 3, affine=False), (2, 3, 3)),
    (nn.GroupNorm(1), torch.nn.GroupNorm(1, 2), (1, 2, 2, 2)),
]


@pytest.mark.parametrize(("layer", "module", "shape"), CASES, ids=name)
def test_equals_torch(layer, module, shape):
    check_against_torch(layer, module, shape)


@pytest.mark.parametrize(("layer", "module", "shape"), CASES, ids=name)
def test_transforms(layer, module, shape):
    check_transforms(layer, module, shape)


COMPILED = [
    (nn.BatchNorm(momentum=None), (3, 2)),
    (nn.GroupNorm(2), (2, 4, 2)),
    (nn.RMSNorm(), (2, 3)),
]


@pytest.mark.slow
def test_every_transform_compiles(fast_compile):
    check_compiled(COMPILED)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 2),
    space=st.lists(st.integers(1, 3), max_size=2),
    eps=st.sampled_from([1e-5, 0.1]),
    affine=st.booleans(),
)
def test_norms_of_any_shape(batch, groups, width, space, eps, affine):
    channels = groups * width
    x = double(batch, channels, *space)
    modules = [
        (nn.GroupNorm(groups, eps, affine), torch.nn.GroupNorm(groups, channels, eps, affine)),
        (nn.RMSNorm(x.dim() - 1, eps, affine), torch.nn.RMSNorm(x.shape[1:], eps, affine)),
        (nn.BatchNorm(eps, None, affine), torch.nn.BatchNorm1d(channels, eps, None, affine)),
    ]
    for layer, module in modules:
        count = x.numel() // (channels if isinstance(layer, nn.BatchNorm) else groups * batch)
        if x.dim() == 4 and isinstance(layer, nn.BatchNorm):
            module = torch.nn.BatchNorm2d(channels, eps, None, affine)
        params, state = layer.init(KEY, x)
        if count == 1 and isinstance(layer, nn.BatchNorm):
            with pytest.raises(ValueError, match="more than one value per channel"):
                layer.apply(params, state, x, train=True)
        elif count > 1 or isinstance(layer, nn.RMSNorm):
            for _ in range(2):
                expected = module.double()(x)
                ours, state = layer.apply(params, state, x, train=True)
                torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state, {n: module.get_buffer(n) for n in state}, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_smallest_eps_of_rms_norm_is_torchs(dtype):
    x = (double(3, 4) * 1e-3).to(dtype)
    expected = torch.nn.functional.rms_norm(x, (4,))
    torch.testing.assert_close(nn.RMSNorm(affine=False)({}, x), expected)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2), nn.RMSNorm(), nn.LayerNorm(), nn.BatchNorm()], ids=name)
def test_half_precision_is_normalised_in_float32(layer):
    x = (double(4, 4, 8) * 3 + 100).bfloat16()
    params, state = layer.init(KEY, x)
    assert {p.dtype for p in params.values()} == {torch.bfloat16}
    y, _ = layer.apply(params, state, x, train=True)
    assert y.dtype == torch.bfloat16
    exact, _ = layer.apply(tree.map(torch.Tensor.double, params), state, x.double(), train=True)
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-3)


def test_cumulative_average_is_the_mean_over_batches():
    layer = nn.BatchNorm(momentum=None)
    batches = double(4, 6, 3)
    params, state = layer.init(KEY, batches[0])
    assert list(state) == ["running_mean", "running_var", "num_batches_tracked"]
    for batch in batches:
        _, state = layer.apply(params, state, batch, train=True)
    torch.testing.assert_close(state["running_mean"], batches.mean((0, 1)))
    torch.testing.assert_close(state["running_var"], batches.var(1).mean(0))
    assert state["num_batches_tracked"].dtype == torch.int64
    assert state["num_batches_tracked"].shape == ()
    assert int(state["num_batches_tracked"]) == 4
    kept = layer.apply(params, state, batches[0])[1]
    assert kept is state


def test_members_of_an_ensemble_count_their_own_batches():
    layer = nn.BatchNorm(momentum=None)
    x = double(2, 4, 3)
    params, state = layer.init(KEY, x[0])
    _, later = layer.apply(params, state, x[1], train=True)
    both = tree.map(lambda *leaves: torch.stack(leaves), state, later)
    _, new = vmap(lambda s: layer.apply(params, s, x[0], train=True))(both)
    assert new["num_batches_tracked"].tolist() == [1, 2]
    torch.testing.assert_close(new["running_mean"][1], x.mean((0, 1)))


def test_under_vmap_each_example_is_its_own_batch():
    layer = nn.BatchNorm()
    x = double(3, 2, 4)
    params, state = layer.init(KEY, x)
    evaluated = vmap(lambda one: layer(params, one[None], state=state)[0])(x)
    torch.testing.assert_close(evaluated, layer(params, x, state=state))
    y, new = vmap(lambda one: layer.apply(params, state, one[None], train=True))(x)
    torch.testing.assert_close(y[1], layer.apply(params, state, x[1:2], train=True)[0])
    assert new["running_mean"].shape == (3, 2)
    with pytest.raises(ValueError, match="more than one value per channel"):
        vmap(lambda one: layer.apply(params, state, one[None], train=True)[0])(x[:, :, 0])


def test_no_derivative_flows_into_the_state():
    layer = nn.BatchNorm(momentum=None)
    x = double(4, 3)
    params, state = layer.init(KEY, x)
    moved = lambda x: layer.apply(params, state, x, train=True)[1]["running_var"]
    assert not grad(lambda x: moved(x).sum())(x).any()
    assert not jvp(moved, (x,), (torch.ones_like(x),))[1].any()


def test_errors():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"momentum is the weight of the new batch, in \[0, 1\], or None; got 1\.1"):
        nn.BatchNorm(momentum=1.1)
    with pytest.raises(ValueError, match=r"in \[0, 1\], or None; got -0\.1"):
        nn.BatchNorm(momentum=-0.1)
    with pytest.raises(ValueError, match="GroupNorm: groups=3 must divide the 4 channels"):
        nn.GroupNorm(3).init(KEY, x)
    with pytest.raises(ValueError, match="GroupNorm: groups must be a whole number of at least 1, got 0"):
        nn.GroupNorm(0)
    with pytest.raises(ValueError, match=r"GroupNorm: expected an input of shape \(N, C, ...\), got \(4,\)"):
        nn.GroupNorm(2).init(KEY, x[0])
    with pytest.raises(ValueError, match=r"RMSNorm: dims=3 axes to normalise, but the input has shape \(2, 4\)"):
        nn.RMSNorm(3).init(KEY, x)
    with pytest.raises(ValueError, match="LayerNorm: dims must be a whole number of at least 1, got 0"):
        nn.LayerNorm(0)
    for layer in (nn.BatchNorm(), nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(2)):
        params, state = layer.init(KEY, x)
        with pytest.raises(TypeError, match="expected floating values, got torch.int64; convert them first, x.to"):
            layer.apply(params, state, x.long(), train=True)
    counting = nn.BatchNorm(momentum=None)
    params, state = nn.BatchNorm().init(KEY, x)
    with pytest.raises(ValueError, match="BatchNorm: state has no leaf 'num_batches_tracked'"):
        counting.apply(params, state, x, train=True)
    params, state = counting.init(KEY, x)
    with pytest.raises(ValueError, match="BatchNorm: state has an unexpected leaf 'num_batches_tracked'"):
        nn.BatchNorm().apply(params, state, x, train=True)
