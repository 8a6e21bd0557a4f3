"""Detected patterns hold every nonzero of the dense derivative, at any point, and no more where that is known."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_kernels
from fnn import SparsityPattern, hessian_sparsity, jacobian_sparsity

INDEX = torch.tensor([2, 0, 3])
MASK = torch.tensor([True, False, True, True])
CONSTANT = torch.tensor([[0.0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]], dtype=torch.float64)
KERNEL = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 1, 2, 2)


def points(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(count)]


def nonzeros(f):
    """Where the dense Jacobian differs from zero at one of several points."""
    found = None
    for x in points():
        jacobian = torch.func.jacrev(f)(x).reshape(-1, x.numel()) != 0
        found = jacobian if found is None else found | jacobian
    return found


def write(x):
    y = torch.zeros_like(x)
    y[1:] = x[:-1]
    y.add_(1)
    y[0] *= x[1]
    y[:, 1] = x[2] * x[0]
    return y


EXACT = {
    "pointwise": lambda x: x.sin() + x.exp() * x,
    "broadcast": lambda x: x * x[0] + x[:, :1],
    "where of a constant": lambda x: torch.where(MASK, x, 3.0) + torch.where(MASK, 2.0, x.T),
    "zero of a constant": lambda x: x * CONSTANT,
    "power zero": lambda x: x**0,
    "stopped": lambda x: x.detach() * x.T + x.sign() + x.floor() + (x > 0),
    "in place": write,
    "index": lambda x: x[INDEX] * x[:3, INDEX[:1]],
    "index_put": lambda x: x.index_put((INDEX,), x[1:] * 2),
    "index_put, added": lambda x: torch.zeros_like(x).index_put((INDEX % 2,), x[1:] ** 2, accumulate=True),
    "boolean index": lambda x: x[MASK],
    "gather": lambda x: x.gather(0, INDEX[:, None].expand(3, 2)),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, INDEX[None].expand(2, 3), x[:2, :3]),
    "scatter_add": lambda x: x.scatter_add(0, (INDEX % 2)[None].expand(2, 3), x[1:3, 1:] ** 2),
    "index_add": lambda x: x.index_add(0, INDEX, x[1:] ** 2),
    "moves": lambda x: torch.cat([x.flip(0), x.roll(1, 1).T, x.reshape(2, 8).unfold(0, 2, 1)[0, :4].repeat(1, 2)], 1),
    "pad": lambda x: F.pad(x, (1, 0, 0, 2), value=3.0),
    "reflect": lambda x: F.pad(x[None], (1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x[None], (1, 1), mode="circular"),
    "triangle": lambda x: x.tril() + x.diag().diag() + torch.diag_embed(x)[0],
    "strided": lambda x: torch.as_strided(x, (2, 2), (5, 1)),
    "sums": lambda x: x.sum(0) * x.mean(1) + x.std(0) + x.norm(dim=1),
    "cumsum": lambda x: x.cumsum(0),
    "softmax": lambda x: F.softmax(x, 1) + F.log_softmax(x, 1),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "matmul": lambda x: x @ x[:, :2],
    "constant matmul": lambda x: CONSTANT @ x + x @ CONSTANT,
    "constant matrix-vector": lambda x: CONSTANT @ x[0],
    "addmm": lambda x: torch.addmm(x, x, CONSTANT),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "convolution": lambda x: F.conv2d(x[None, None], KERNEL, stride=2, padding=1),
    "dilated": lambda x: F.conv2d(x[None, None], KERNEL, dilation=2, padding=1),
    "grouped": lambda x: F.conv2d(x.reshape(1, 2, 2, 4), KERNEL, groups=2),
    "transposed": lambda x: F.conv_transpose2d(x.reshape(1, 2, 2, 4), KERNEL, stride=2, output_padding=1),
    "avg_pool": lambda x: F.avg_pool2d(x[None, None], 3, stride=1, padding=1),
    "fft": lambda x: torch.fft.rfft(x, dim=0).abs(),
    "complex inside": lambda x: (torch.complex(x, x.T) * (1 + 2j)).imag,
    "vmap inside": lambda x: torch.vmap(lambda row: row * row.sum())(x),
    "grad inside": lambda x: torch.func.grad(lambda y: (y.tanh() * y.roll(1, 0)).sum())(x),
    "cross entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2, 3]), reduction="none"),
    "our matmul": lambda x: triton_kernels.matmul(x, x[:, :2]),
    "our softmax": triton_kernels.softmax,
    "our linear": lambda x: triton_kernels.linear(x, CONSTANT.T.contiguous(), x[0]),
    "nothing": lambda x: torch.ones(3, dtype=x.dtype),
    "copy": lambda x: x,
}
# Every branch, order and selection that other values would bring counts, though none of the points may take it.
GLOBAL = {
    "relu": F.relu,
    "where": lambda x: torch.where(x > 100, x, x.roll(1, 0)),
    "clamp": lambda x: x.clamp(-100, -99),
    "maximum": lambda x: torch.maximum(x, x.T + 100),
    "max": lambda x: x.max(1).values,
    "amax": lambda x: x.amax(0),
    "sort": lambda x: x.sort(0).values,
    "topk": lambda x: x.topk(2, 1).values,
    "cummax": lambda x: x.cummax(0).values,
    "median": lambda x: x.median(0).values,
    "abs": lambda x: x.abs(),
    "argsort index": lambda x: x[x.argsort(0)[:, 0]],
    "argsort gather": lambda x: x.gather(0, x.argsort(0)),
    "argsort scatter": lambda x: torch.zeros_like(x).scatter_add(0, x.argsort(0), x),
    "argsort index_put": lambda x: torch.zeros_like(x).index_put((x.argsort(0)[:, 0],), x, accumulate=True),
    "max_pool": lambda x: F.max_pool2d(x[None, None], 2),
    "masked_fill": lambda x: x.masked_fill(x > 0, 3.0),
    "prod": lambda x: x.prod(0),
    "cumprod": lambda x: x.cumprod(1),
    "unknown": lambda x: torch.linalg.inv(x + 9 * torch.eye(4, dtype=x.dtype)),
    "upsampled": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "weights": lambda x: F.conv2d(x.reshape(1, 1, 4, 4), x.reshape(2, 1, 2, 4)[:, :, :, :2]),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_jacobian_pattern_is_exact(name):
    found = jacobian_sparsity(EXACT[name], points()[0])
    assert torch.equal(found.to_dense(), nonzeros(EXACT[name]))
    assert found.conservative == ()


@pytest.mark.parametrize("name", GLOBAL)
def test_a_jacobian_pattern_misses_nothing(name):
    assert not (nonzeros(GLOBAL[name]) & ~jacobian_sparsity(GLOBAL[name], points()[0]).to_dense()).any()


@pytest.mark.parametrize("name", [*EXACT, *GLOBAL])
def test_a_hessian_pattern_misses_nothing(name):
    f = {**EXACT, **GLOBAL}[name]

    def scalar(x):
        y = f(x)
        return (y**3).sum() + (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sin().sum()

    found = hessian_sparsity(scalar, points()[0])
    assert found.is_symmetric()
    assert not (nonzeros(torch.func.grad(scalar)) & ~found.to_dense()).any()


def test_branches_not_taken_count():
    x = torch.ones(3)
    assert jacobian_sparsity(F.relu, -x).nnz == 3
    assert jacobian_sparsity(lambda x: torch.where(x > 0, x, x.flip(0)), x).nnz == 5
    assert jacobian_sparsity(lambda x: x * x.flip(0), torch.zeros(3)).nnz == 5
    assert jacobian_sparsity(lambda x: x.abs(), torch.zeros(3)).nnz == 3


def test_linear_terms_have_no_second_derivative():
    found = hessian_sparsity(lambda x: x[0] * x[1] + 3 * x.sum() + x[2] ** 2, torch.ones(4))
    assert list(zip(found.rows.tolist(), found.cols.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 2)]


def test_other_arguments_are_not_constants():
    f = lambda x, scale, at: (x * scale)[at]
    zero, at = torch.zeros(3), torch.tensor([0, 0])
    assert jacobian_sparsity(f, torch.ones(3), zero, at).nnz == 6
    assert jacobian_sparsity(lambda x: f(x, zero, at), torch.ones(3)).nnz == 0
    # a parameter starts at zero, and is trained in place
    weight = torch.nn.Parameter(torch.zeros(3))
    assert jacobian_sparsity(lambda x: x * weight, torch.ones(3)).nnz == 3


def test_what_was_not_known_is_named():
    found = jacobian_sparsity(torch.linalg.matrix_exp, torch.eye(3))
    assert found.nnz == 81
    assert "linalg_matrix_exp" in str(found)


def test_a_hundred_thousand_unknowns():
    found = jacobian_sparsity(lambda x: x.roll(1) * x - x.roll(-1), torch.ones(100_000))
    assert found.nnz == 300_000
    with pytest.raises(ValueError, match="too many entries"):
        jacobian_sparsity(lambda x: x * x.sum(), torch.ones(100_000))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "branches on the values"),
        (lambda x: x * x.sum().item(), "branches on the values"),
        (lambda x: x + torch.randn(3), "global generator"),
        (lambda x: F.dropout(x, 0.5), "global generator"),
    ],
)
def test_functions_that_one_trace_does_not_describe(f, message):
    with pytest.raises(ValueError, match=message):
        jacobian_sparsity(f, torch.ones(3))


STEPS = {
    "sin": lambda x: x.sin(),
    "flip": lambda x: x.flip(0) * x,
    "roll": lambda x: x.roll(1, 1),
    "transpose": lambda x: x.T,
    "relu": F.relu,
    "cut": lambda x: torch.cat([x[1:], x[:1] ** 2]),
    "mask": lambda x: x * MASK,
    "constant": lambda x: CONSTANT @ x,
    "write": write,
    "pool": lambda x: F.avg_pool1d(x, 3, stride=1, padding=1),
    "index": lambda x: x[torch.tensor([3, 1, 1, 0])],
    "put": lambda x: x.index_put((INDEX,), x[1:].cos()),
    "add": lambda x: torch.zeros_like(x).index_add(0, torch.tensor([0, 0, 2, 1]), x),
    "cumsum": lambda x: x.tril().cumsum(0),
    "pad": lambda x: F.pad(x[1:], (0, 0, 0, 1)),
    "sort": lambda x: x.triu().sort(0).values,
    "softmax": lambda x: F.softmax(x, 1).tril(),
    "diagonal": lambda x: x.diagonal().diag_embed() + x.detach(),
    "stack": lambda x: torch.stack([x[0], x[1], x[0] * x[2], x[3].sum().expand(4)]),
    "conv": lambda x: F.conv1d(x[None], CONSTANT[:, :, None].expand(4, 4, 3), padding=1)[0],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 1, 1, 3]] * 4)),
    "max": lambda x: torch.maximum(x, x.roll(1, 0)),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
def test_random_programs_miss_nothing(names):
    def f(x):
        for name in names:
            x = STEPS[name](x)
        return x

    assert not (nonzeros(f) & ~jacobian_sparsity(f, points()[0]).to_dense()).any()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=3))
def test_random_hessians_miss_nothing(names):
    def f(x):
        for name in names:
            x = STEPS[name](x)
        return (x * x.T).cos().sum()

    assert not (nonzeros(torch.func.grad(f)) & ~hessian_sparsity(f, points()[0]).to_dense()).any()


def test_patterns_from_every_form():
    dense = torch.tensor([[1, 0, 2], [0, 0, 3]])
    scipy_sparse = pytest.importorskip("scipy.sparse")
    forms = [
        dense,
        dense.bool().numpy(),
        dense.to_sparse(),
        dense.to_sparse_csr(),
        scipy_sparse.csr_array(dense.numpy()),
        scipy_sparse.coo_matrix(dense.numpy()),
        SparsityPattern.of(dense),
        SparsityPattern.of(dense.T).T,
    ]
    patterns = [SparsityPattern.of(form) for form in forms]
    patterns.append(SparsityPattern.of(([1, 0, 0, 0], [2, 2, 0, 0]), (2, 3)))
    for each in patterns:
        assert each.shape == (2, 3)
        assert each.rows.tolist() == [0, 0, 1]
        assert each.cols.tolist() == [0, 2, 2]
        assert each.starts.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="do not fit into 2x3"):
        SparsityPattern.of(([2], [0]), (2, 3))
    with pytest.raises(ValueError, match=r"has shape \(2, 3\), but the derivative is \(3, 3\)"):
        SparsityPattern.of(dense, (3, 3))
    with pytest.raises(TypeError, match="got str"):
        SparsityPattern.of("dense")
    with pytest.raises(TypeError, match="must be integers"):
        SparsityPattern.of(([0.5], [0]), (2, 3))


def test_a_custom_rule_counts_and_not_what_it_replaces():
    from fnn import custom_vjp

    straight_through = custom_vjp(torch.round)
    straight_through.defvjp(lambda x: (x.round(), None), lambda _, grad: (grad,))
    x = torch.linspace(0, 2, 3)
    assert jacobian_sparsity(torch.round, x).nnz == 0
    assert jacobian_sparsity(straight_through, x).nnz == 3
