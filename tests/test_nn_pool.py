"""Max pooling in compiled programs, where it is an operator of its own, against eager torch: equal to the last bit."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import nn, ops, tree
from fnn.ops import _max_pool
from triton_kernels._inductor import VERSION

CHANNELS_LAST = torch.channels_last
# Shapes, window and layout: pairs of a row, an image that the windows do not fill, windows that are not two wide,
# channels in whole vectors and not, sequences, and images without a batch.
CASES = [
    ((2, 3, 4, 6), (2, 2), torch.contiguous_format),
    ((2, 3, 5, 7), (2, 2), torch.contiguous_format),
    ((2, 2, 6, 6), (3, 1), torch.contiguous_format),
    ((2, 16, 4, 6), (2, 2), CHANNELS_LAST),
    ((2, 16, 5, 6), (2, 3), CHANNELS_LAST),
    ((2, 3, 4, 6), (2, 2), CHANNELS_LAST),
    ((2, 3, 8), (4,), None),
    ((3, 4, 4), (2, 2), None),
]
TRANSFORMS = {
    "value": lambda f, x, v: f(x),
    "grad": lambda f, x, v: grad(lambda x: (f(x) ** 2).sum())(x),
    "hvp": lambda f, x, v: jvp(grad(lambda x: (f(x) ** 3).sum()), (x,), (v,))[1],
    "grad(grad)": lambda f, x, v: grad(lambda x: (grad(lambda x: (f(x) ** 4).sum())(x) * v).sum())(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "vmap": lambda f, x, v: vmap(f)(torch.stack([x, v])),
    "vmap(grad)": lambda f, x, v: vmap(grad(lambda x: (f(x) ** 2).sum()))(torch.stack([x, v])),
    "vmap(jvp)": lambda f, x, v: vmap(lambda v: jvp(f, (x,), (v,))[1])(torch.stack([x, v])),
    "vmap(vjp)": lambda f, x, v: vmap(lambda y: grad(lambda x: (f(x) * y).sum())(x))(torch.stack([f(x), f(v)])),
}
WHOLE = {
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: (f(x) ** 3).sum())(x),
}


def layer(kernel: tuple[int, ...]) -> nn.Layer:
    return nn.MaxPool2d(kernel) if len(kernel) == 2 else nn.MaxPool1d(kernel[0])


def reference(kernel: tuple[int, ...]):
    return (lambda x: F.max_pool2d(x, kernel)) if len(kernel) == 2 else (lambda x: F.max_pool1d(x, kernel))


def tied(shape: tuple[int, ...], layout: torch.memory_format | None = None) -> Tensor:
    """Few different values, so that most windows have ties."""
    x = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(len(shape))).float()
    return x if layout is None else x.contiguous(memory_format=layout)


def equal(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.numpy(), b.numpy(), equal_nan=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_in_compiled_programs(transform, fast_compile):
    shape, kernel, _ = CASES[1]
    pool, apply = layer(kernel), TRANSFORMS[transform]
    x, v = tied(shape), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = torch.compile(lambda x, v: apply(lambda x: pool({}, x), x, v), fullgraph=True)(x, v)
    assert equal(found, apply(reference(kernel), x, v))


@pytest.mark.parametrize("transform", WHOLE)
def test_whole_derivatives_in_compiled_programs(transform, fast_compile):
    x, apply, pool = tied((1, 1, 4, 5)), WHOLE[transform], nn.MaxPool2d(2)
    found = torch.compile(lambda x: apply(lambda x: pool({}, x), x), fullgraph=True)(x)
    assert equal(found, apply(reference((2, 2)), x))


@pytest.mark.parametrize(("shape", "kernel"), [case[:2] for case in CASES])
def test_the_operator_outside_of_the_compiler(shape, kernel):
    f = lambda x: _max_pool.max_pool(x, *(1, *kernel)[-2:])
    x, v = tied(shape), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for transform in ("value", "hvp", "vmap(jvp)"):
        assert equal(TRANSFORMS[transform](f, x, v), TRANSFORMS[transform](reference(kernel), x, v)), transform


def test_not_a_number_is_passed_on_and_takes_the_gradient(fast_compile):
    x = torch.tensor([[[1.0, torch.nan, 5.0, 5.0], [2.0, 3.0, 5.0, -torch.inf]]])
    layer = nn.MaxPool2d(2)
    both = lambda pool: lambda x: (pool(x), torch.func.vjp(pool, x)[1](torch.tensor([[[2.0, 3.0]]]))[0])
    found = torch.compile(both(lambda x: layer({}, x)), fullgraph=True)(x)
    assert all(map(equal, found, both(reference((2, 2)))(x)))
    assert found[1].tolist() == [[[0, 2, 3, 0], [0, 0, 0, 0]]]


def operators(graph_of: nn.Layer, x: Tensor) -> set[str]:
    """The operators that the compiler sees."""
    found: set[str] = set()

    def backend(graph, inputs):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: graph_of({}, x), backend=backend, fullgraph=True)(x)
    return found


@pytest.mark.skipif(VERSION < (2, 13), reason="its compiler takes every program for an exported one")
def test_which_windows_are_the_operators():
    x = torch.zeros(1, 1, 8, 8)
    ours = "fnn.max_pool.default"
    assert ours in operators(nn.MaxPool2d(2), x)
    assert ours in operators(nn.MaxPool2d(2, 2), x)
    assert ours in operators(nn.MaxPool1d(2), x[0])
    for larger in (nn.MaxPool2d(3), nn.MaxPool2d((4, 2)), nn.MaxPool2d((2, 4))):
        assert ours not in operators(larger, x)
    for other in (nn.MaxPool2d(2, 1), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(3, 2)):
        assert ours not in operators(other, x)
    assert ours not in operators(nn.MaxPool2d(2, ceil_mode=True), x)
    assert ours not in operators(nn.MaxPool2d(2), x.double())
    with ops.use("torch"):
        assert ours not in operators(nn.MaxPool2d(2), x)


def test_an_exported_program_holds_torch_alone():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return nn.MaxPool2d(2)({}, x)

    program = torch.export.export(Pool(), (torch.zeros(1, 1, 4, 4),))
    assert "max_pool2d" in str(program.graph)
    assert "fnn" not in str(program.graph)


@pytest.mark.slow
def test_inductor_computes_the_same():
    """Every way in which images lie in memory in one graph: values, gradients and second derivatives."""
    cases = [CASES[i] for i in (0, 1, 3, 5)]

    def all_of(pools):
        def f(xs, vs):
            losses = [lambda x, pool=pool: (pool(x * 2) ** 3).sum() for pool in pools]
            derivatives = [jvp(grad(loss), (x,), (v,)) for loss, x, v in zip(losses, xs, vs, strict=True)]
            return [pool(x * 2) for pool, x in zip(pools, xs, strict=True)], derivatives

        return f

    xs = [tied(shape, layout) for shape, _, layout in cases]
    xs[0][0, 0, 0, 1] = torch.nan
    vs = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in xs]
    found = torch.compile(all_of([partial(layer(kernel), {}) for _, kernel, _ in cases]), fullgraph=True)(xs, vs)
    expected = all_of([reference(kernel) for _, kernel, _ in cases])(xs, vs)
    assert all(map(equal, tree.leaves(found), tree.leaves(expected)))
