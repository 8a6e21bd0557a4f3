"""Convolutions, their transposes and pooling against torch.nn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import KEY, check_against_torch, check_compiled, check_transforms, double, name
from torch.func import grad, vmap

import fnn
from fnn import nn, random

CASES = [
    (nn.Conv1d(4, 3), torch.nn.Conv1d(2, 4, 3), (2, 2, 5)),
    (
        nn.Conv1d(4, 2, stride=2, padding=1, dilation=2, groups=2, bias=False),
        torch.nn.Conv1d(2, 4, 2, 2, 1, 2, groups=2, bias=False),
        (2, 6),
    ),
    (nn.Conv1d(3, 3, padding="same", dilation=2), torch.nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 2, 4)),
    (nn.Conv2d(4, (2, 3), groups=2), torch.nn.Conv2d(2, 4, (2, 3), groups=2), (2, 2, 3, 4)),
    (nn.Conv2d(2, 2, padding="same"), torch.nn.Conv2d(2, 2, 2, padding="same"), (1, 2, 3, 3)),
    (nn.Conv2d(2, 2, stride=(2, 1), padding="valid"), torch.nn.Conv2d(2, 2, 2, (2, 1), "valid"), (2, 3, 4)),
    (nn.Conv3d(2, (1, 2, 2), padding=(0, 1, 0)), torch.nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0)), (1, 1, 2, 2, 3)),
    (nn.ConvTranspose1d(4, 3, stride=2), torch.nn.ConvTranspose1d(2, 4, 3, 2), (2, 2, 3)),
    (nn.ConvTranspose2d(4, 2), torch.nn.ConvTranspose2d(2, 4, 2), (2, 2, 2, 3)),
    (
        nn.ConvTranspose2d(4, (2, 3), stride=(2, 3), padding=1, output_padding=(1, 2), groups=2, dilation=2),
        torch.nn.ConvTranspose2d(2, 4, (2, 3), (2, 3), 1, (1, 2), 2, dilation=2),
        (1, 2, 3, 2),
    ),
    (nn.ConvTranspose2d(3, 2, bias=False), torch.nn.ConvTranspose2d(2, 3, 2, bias=False), (2, 2, 3)),
    (nn.MaxPool1d(2), torch.nn.MaxPool1d(2), (2, 2, 5)),
    (nn.MaxPool1d(2, 1, 1, 2, True), torch.nn.MaxPool1d(2, 1, 1, 2, ceil_mode=True), (2, 6)),
    (nn.MaxPool2d((3, 2), 2, (1, 0)), torch.nn.MaxPool2d((3, 2), 2, (1, 0)), (2, 1, 4, 5)),
    (nn.AvgPool1d(3, 2, 1, True, False), torch.nn.AvgPool1d(3, 2, 1, True, False), (2, 2, 6)),
    (nn.AvgPool2d((2, 3), 1), torch.nn.AvgPool2d((2, 3), 1), (1, 2, 3, 4)),
    (nn.AdaptiveAvgPool2d((2, 3)), torch.nn.AdaptiveAvgPool2d((2, 3)), (1, 2, 5, 4)),
]


@pytest.mark.parametrize(("layer", "module", "shape"), CASES, ids=name)
def test_equals_torch(layer, module, shape):
    check_against_torch(layer, module, shape)


@pytest.mark.parametrize(("layer", "module", "shape"), CASES, ids=name)
def test_transforms(layer, module, shape):
    check_transforms(layer, module, shape)


COMPILED = [
    (nn.Conv1d(2, 2, padding="same", groups=2), (2, 2, 4)),
    (nn.ConvTranspose2d(2, 2, stride=2, groups=2), (1, 2, 2, 2)),
    (nn.MaxPool1d(3, 2, 1), (2, 2, 5)),
]


@pytest.mark.slow
def test_every_transform_compiles(fast_compile):
    check_compiled(COMPILED)


def same_outcome(layer, build, x):
    """Equal to torch's module, or both refuse."""
    try:
        module = build()
        expected = module.double()(x)
    except (RuntimeError, ValueError):
        expected = None
    try:
        params, _ = layer().init(KEY, x)
        if expected is not None:
            params = {n: p.detach() for n, p in module.named_parameters()}
        ours = layer()(params, x)
    except ValueError:
        ours = None
    assert (ours is None) == (expected is None), (ours, expected)
    if ours is not None:
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 2),
    transposed=st.booleans(),
    groups=st.integers(1, 2),
    per_group=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"])),
    extra=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(1, 5),
    bias=st.booleans(),
)
def test_convolutions_of_any_arguments(
    dims, transposed, groups, per_group, kernel, stride, padding, extra, dilation, size, bias
):
    channels, out = groups * per_group[0], groups * per_group[1]
    x = double(2, channels, *[size, size + 1][:dims])
    if transposed:
        options = (kernel, stride, 0 if isinstance(padding, str) else padding, extra, groups, bias, dilation)
        ours, theirs = f"ConvTranspose{dims}d", getattr(torch.nn, f"ConvTranspose{dims}d")
    else:
        options = (kernel, stride, padding, dilation, groups, bias)
        ours, theirs = f"Conv{dims}d", getattr(torch.nn, f"Conv{dims}d")
    same_outcome(lambda: getattr(nn, ours)(out, *options), lambda: theirs(channels, out, *options), x)


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 2),
    kernel=st.integers(1, 4),
    stride=st.one_of(st.none(), st.integers(1, 3)),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    flags=st.tuples(st.booleans(), st.booleans()),
    size=st.integers(1, 6),
    largest=st.booleans(),
)
def test_pooling_of_any_arguments(dims, kernel, stride, padding, dilation, flags, size, largest):
    x = double(2, *[size, size + 1][:dims])
    ceil_mode, count = flags
    if largest:
        ours = lambda: getattr(nn, f"MaxPool{dims}d")(kernel, stride, padding, dilation, ceil_mode)
        theirs = lambda: getattr(torch.nn, f"MaxPool{dims}d")(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    else:
        ours = lambda: getattr(nn, f"AvgPool{dims}d")(kernel, stride, padding, ceil_mode, count)
        theirs = lambda: getattr(torch.nn, f"AvgPool{dims}d")(kernel, stride, padding, ceil_mode, count)
    same_outcome(ours, theirs, x)


def test_per_sample_gradients_are_those_of_a_loop():
    net = nn.Sequential(nn.Conv1d(4, 2, groups=2), nn.MaxPool1d(2), nn.ConvTranspose1d(2, 2), nn.Flatten(0))
    x = double(3, 2, 5)
    params, _ = net.init(KEY, x[0])
    loss = lambda p, x: net(p, x).square().sum()
    norms = fnn.per_sample_grad_norm(loss)(params, x)
    norms = norms[0] if isinstance(norms, tuple) else norms
    expected = [fnn.tree.ravel(grad(loss)(params, one))[0].norm() for one in x]
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_distribution_of_a_transposed_convolution_is_torchs():
    ours, _ = nn.ConvTranspose2d(60, 3).init(KEY, torch.zeros(1, 40, 4, 4))
    theirs = torch.nn.ConvTranspose2d(40, 60, 3)
    bound = (60 * 9) ** -0.5
    for leaf, module_leaf in ((ours["weight"], theirs.weight), (ours["bias"], theirs.bias)):
        assert leaf.shape == module_leaf.shape
        for tensor in (leaf, module_leaf):
            assert 0.9 * bound < tensor.abs().max() <= bound
    torch.testing.assert_close(ours["weight"].std(), theirs.weight.std(), rtol=0.02, atol=0)


def test_an_ensemble_starts_from_keys():
    net = nn.Sequential(nn.Conv1d(2, 3), nn.ConvTranspose1d(2, 3))
    keys, x = random.split(KEY, 3), torch.zeros(1, 2, 6)
    many = vmap(lambda key: net.init(key, x)[0])(keys)
    one, _ = net.init(keys[2], x)
    assert fnn.tree.allclose(fnn.tree.map(lambda leaf: leaf[2], many), one, rtol=0, atol=0)


def refused(message, layer, x, error=ValueError):
    with pytest.raises(error, match=message):
        layer().init(KEY, x)
        layer()(layer().init(KEY, x)[0], x)


def test_errors():
    line, image = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5, 6)
    refused(r"Conv1d: groups=3 must divide the 4 channels out", lambda: nn.Conv1d(4, 3, groups=3), line)
    refused(r"Conv2d: groups=3 must divide the 4 channels in", lambda: nn.Conv2d(6, 3, groups=3), image)
    refused(r"Conv1d: expected .* \(N, C, L\) or \(C, L\), got \(2, 4, 5, 6\)", lambda: nn.Conv1d(4, 3), image)
    refused(
        r"Conv2d: the window spans 7 along H, the input only 5; got an image of \(5, 6\)",
        lambda: nn.Conv2d(4, 4, dilation=2),
        image,
    )
    refused("the window spans 9 along L, the input only 5 and padding 1 on", lambda: nn.Conv1d(4, 9, padding=1), line)
    refused("padding must be a size, 'same' or 'valid', got 'full'", lambda: nn.Conv1d(4, 3, padding="full"), line)
    refused("padding='same' keeps the size, so it needs stride 1, got 2", lambda: nn.Conv1d(4, 3, 2, "same"), line)
    refused("kernel_size must be a whole number of at least 1, got 0", lambda: nn.Conv1d(4, 0), line)
    refused(r"at least 1 or a tuple of 2, one an axis, got \(3, 3, 3\)", lambda: nn.Conv2d(4, (3, 3, 3)), image)
    refused(r"kernel_size must be .* got \[3, 3\]", lambda: nn.Conv2d(4, [3, 3]), image)
    refused("stride must be a whole number of at least 1.* got 1.5", lambda: nn.Conv2d(4, 3, 1.5), image)
    refused("padding must be a whole number of at least 0.* got -1", lambda: nn.Conv2d(4, 3, padding=-1), image)
    refused("out_channels must be a whole number of at least 1, got 0", lambda: nn.Conv2d(0, 3), image)
    refused("groups must be a whole number of at least 1, got 0", lambda: nn.ConvTranspose2d(4, 3, groups=0), image)
    refused("bias must be True or False, got 3", lambda: nn.Conv2d(4, 3, bias=3), image, TypeError)
    refused(
        "expected floating values, got torch.uint8; convert them first, x.to", lambda: nn.Conv2d(4, 3), image.byte(),
        TypeError,
    )  # fmt: skip
    refused("output_padding must be less than", lambda: nn.ConvTranspose1d(4, 3, 2, output_padding=2), line)
    refused(
        r"padding=4 leaves nothing of the output for an image of \(5,\)",
        lambda: nn.ConvTranspose1d(4, 3, padding=4),
        line,
    )
    refused("ConvTranspose1d: groups=3 must divide the 4 channels in", lambda: nn.ConvTranspose1d(3, 3, groups=3), line)
    refused("MaxPool1d: the window spans 6 along L, the input only 5", lambda: nn.MaxPool1d(6), line)
    refused(
        "AvgPool2d: padding must be at most half of kernel_size=3, got 2", lambda: nn.AvgPool2d(3, padding=2), image
    )
    refused("MaxPool2d: stride must be a whole number of at least 1", lambda: nn.MaxPool2d(3, 0), image)
    refused("AdaptiveAvgPool2d: output_size must be", lambda: nn.AdaptiveAvgPool2d(0), image)
    refused(
        r"layer '1' Conv1d\(4, 9\): the window spans 9 along L",
        lambda: nn.Sequential(nn.relu, nn.Conv1d(4, 9), nn.relu),
        line,
    )
    with pytest.raises(ValueError, match=r"ConvTranspose1d: params leaf 'weight' has shape \(4, 2, 3\)"):
        layer = nn.ConvTranspose1d(2, 3)
        layer(layer.init(KEY, line)[0], line[:, :3])


def test_sizes_of_integer_inputs_are_known_before_they_are_converted():
    for first in (nn.Conv2d(2, 3), nn.AvgPool2d(3, 1), nn.AdaptiveAvgPool2d(3)):
        net = nn.Sequential(first, nn.Flatten(), nn.Linear(2))
        image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
        params, _ = net.init(KEY, image)
        assert net(params, image.float()).shape == (1, 2)
        with pytest.raises(TypeError, match=r"expected floating values, got torch.uint8; convert them first, x\.to"):
            net(params, image)
