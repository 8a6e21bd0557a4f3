"""The product's kernels in Triton's interpreter, against float64: our error must stay under twice torch's own."""

from itertools import product as combinations

import pytest
import torch
from torch.nn import functional as F

from triton_kernels._activation import ACTIVATIONS
from triton_kernels._matmul import _launch
from triton_kernels._matmul._configs import Config
from triton_kernels._matmul._launch import coalesce, configuration, product

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Config("pointer", 16, 32, 16, 4, 2, group_m=2)
SPLIT = Config("pointer", 16, 16, 16, 4, 2, group_m=2, split_k=3)
PERSISTENT = Config("persistent", 32, 16, 16, 4, 2, group_m=2, warp_specialize=True)


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _reference(a, b, bias=None, activation=None):
    """Before and after the activation, in float64 if the operands are."""
    before = torch.matmul(a, b)
    before = before if bias is None else before + bias
    return before, before if activation is None else ACTIVATIONS[activation](before)


def _check(a, b, bias=None, *, activation=None, **options):
    """`product` is correct to twice torch's error in the same dtype, and keeps what it is given."""
    exact = _reference(*(None if x is None else x.double() for x in (a, b, bias)), activation)
    torchs = _reference(a, b, bias, activation)
    ours = product(a, b, bias, activation=activation, preactivation=True, **options)
    assert isinstance(ours, tuple)
    for our, torch_, true in zip(ours[::-1], torchs, exact, strict=True):
        assert our.shape == true.shape
        assert our.dtype == options.get("out_dtype", a.dtype)
        assert our.is_contiguous()
        # torch may be exact by luck in a small case: allow what rounding once costs.
        tiny = torch.finfo(torch_.dtype).eps * true.abs().amax() if true.numel() else 0.0
        assert _error(our, true) <= 2 * _error(torch_, true) + tiny


def _error(x, true):
    return (x.double() - true).abs().amax().item() if true.numel() else 0.0


@pytest.mark.parametrize("config", [SMALL, SPLIT, PERSISTENT], ids=["pointer", "split K", "persistent"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation, dtype, config):
    precision = "tf32"  # is computed in full here; the persistent kernel takes no other
    b = _randn(24, 48, dtype=dtype, seed=1).T
    _check(_randn(40, 48, dtype=dtype), b, _randn(24, dtype=dtype, seed=2), activation=activation,
           precision=precision, config=config)  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values(activation):
    """Where it overflows, where it cancels, and NaN, element by element: 1 @ x."""
    values = [0.0, 1e-30, 1e-5, 0.01, 0.3, 0.6, 0.63, 0.7, 1.0, 3.0, 9.0, 20.0, 50.0, 90.0, 1000.0, 1e30]
    x = torch.tensor(values + [-v for v in values] + [float("nan"), float("inf")])
    ours = product(torch.ones(1, 1), x[None], activation=activation, config=SMALL)[0]
    true = ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=2e-7, equal_nan=True)
    small = true.abs() < 1e-3
    if activation == "tanh":  # relative to values near 0 too
        torch.testing.assert_close(ours[small].double(), true[small], rtol=1e-6, atol=0.0)
    assert ours[-2].isnan()


def test_negative_slope():
    a, b = _randn(9, 5), _randn(5, 7, seed=1)
    torch.testing.assert_close(
        product(a, b, activation="leaky_relu", negative_slope=0.3, config=SMALL), F.leaky_relu(a @ b, 0.3)
    )


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    dtype=st.sampled_from(DTYPES),
    transposed=st.tuples(st.booleans(), st.booleans()),
    split_k=st.sampled_from([1, 1, 2, 5]),
)
def test_shapes(sizes, dtype, transposed, split_k):
    m, n, k = sizes
    a = _randn(k, m, dtype=dtype).T if transposed[0] else _randn(m, k, dtype=dtype)
    b = _randn(n, k, dtype=dtype, seed=1).T if transposed[1] else _randn(k, n, dtype=dtype, seed=1)
    _check(a, b, _randn(n, dtype=dtype, seed=2), config=Config("pointer", 32, 32, 32, 4, 2, 3, split_k))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    batch=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    leave_out=st.integers(0, 3),
    data=st.data(),
)
def test_batches(batch, sizes, leave_out, data):
    """Batch dimensions that broadcast, are missing in `b`, permuted, or strided."""
    m, n, k = sizes
    a = _randn(*[1 if one else size for size, one, _ in batch], m, k)
    b = _randn(*[1 if one else size for size, _, one in batch[leave_out:]], k, n, seed=1)
    order = data.draw(st.permutations(range(a.dim())))
    a = a.permute(order).contiguous().permute([order.index(i) for i in range(a.dim())])
    if data.draw(st.booleans()):
        b = b.repeat_interleave(2, -1)[..., ::2]
    _check(a, b, config=SMALL)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["pointer", "split K"])
def test_strides(config):
    base = _randn(20, 30)
    for a in (base[::2, ::3], base.T[3:13, :10], base[:1, :10].expand(10, 10), base[:10, :1].expand(10, 10)):
        for b in (base[:10], base[:10, 1:].unsqueeze(0).expand(2, -1, -1), base[:1].expand(10, 30)):
            _check(a, b, base[0, :1].expand(b.shape[-1]), config=config)
            _check(a.expand(2, -1, -1), b.mT.contiguous().mT, base[: b.shape[-1], 3] if b.shape[-1] <= 20 else None,
                   config=config)  # fmt: skip


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["pointer", "split K"])
def test_five_batch_dimensions_that_do_not_coalesce(config):
    """More than the kernel steps through: the rest is looped over by halves."""
    a = _randn(3, 2, 1, 2, 2, 4, 5).transpose(0, 4)
    b = _randn(3, 1, 2, 2, 5, 4, seed=1).transpose(0, 3)
    _check(a, b, _randn(4, seed=2), activation="silu", config=config)
    assert len(_launch._Operands(a, b, torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])).batch_dims) > 3


def test_grid_limit(monkeypatch):
    """A batch of more programs than a grid holds is launched in pieces."""
    monkeypatch.setattr(_launch, "MAX_PROGRAMS", 5)
    _check(_randn(7, 3, 4, 5).transpose(0, 1), _randn(7, 5, 40, seed=1), config=SMALL)
    _check(_randn(9, 4, 40), _randn(9, 40, 3, seed=1), activation="gelu", config=SPLIT)


def test_batch_of_one_matrix_is_more_rows():
    a, b = _randn(2, 3, 4, 5), _randn(5, 6)
    operands = _launch._Operands(a, b, a.shape[:-2])
    assert (operands.m, operands.batch_dims) == (24, [])
    rows = _randn(6, 1, 5)[::2]
    operands = _launch._Operands(rows, b, rows.shape[:-2])
    assert (operands.m, operands.stride_am, operands.batch_dims) == (3, 10, [])
    _check(rows, b, config=SMALL)


def test_coalesce():
    assert coalesce((2, 3, 4), (12, 4, 1), (24, 8, 2)) == [(24, 1, 2)]
    assert coalesce((2, 1, 4), (4, 99, 1), (4, 77, 1)) == [(8, 1, 1)]
    assert coalesce((2, 3), (3, 1), (0, 0)) == [(6, 1, 0)]
    assert coalesce((2, 3), (3, 1), (0, 1)) == [(2, 3, 0), (3, 1, 1)]
    assert coalesce((), (), ()) == []


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_nothing_to_add_up(activation):
    a, b, bias = torch.empty(3, 4, 0), torch.empty(0, 5), _randn(5)
    for config in (None, SMALL, SPLIT):
        _check(a, b, activation=activation, config=config)
        _check(a, b, bias, activation=activation, config=config)


@pytest.mark.parametrize("shapes", [((0, 4), (4, 5)), ((3, 4), (4, 0)), ((0, 3, 4), (4, 5)), ((2, 1, 3, 4), (0, 4, 5))])
def test_empty(shapes):
    a, b = (torch.empty(shape) for shape in shapes)
    _check(a, b)
    assert product(a, b).shape == (a @ b).shape


@pytest.mark.parametrize(("dtype", "out_dtype"), list(combinations(DTYPES, DTYPES)))
def test_out_dtype(dtype, out_dtype):
    a, b = _randn(5, 50, dtype=dtype), _randn(50, 7, dtype=dtype, seed=1)
    for config in (SMALL, SPLIT):
        ours = product(a, b, out_dtype=out_dtype, config=config)
        torch.testing.assert_close(ours, (a.double() @ b.double()).to(out_dtype), rtol=1e-5 + 1.1 * torch.finfo(
            out_dtype).eps, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16x3"])
def test_precisions(precision):
    _check(_randn(20, 20), _randn(20, 20, seed=1), precision=precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), list(combinations([False, True], repeat=2)))
def test_persistent_layouts(a_transposed, b_transposed, dtype):
    """Every layout that the copy engine takes, edges that are not multiples of a tile, more tiles than programs."""
    if dtype == torch.float32 and (a_transposed or not b_transposed):
        with pytest.raises(ValueError, match="K innermost"):
            product(_randn(8, 8).T if a_transposed else _randn(8, 8), _randn(8, 8), precision="tf32", config=PERSISTENT)
        return
    m, n, k = 72, 40, 24
    a = _randn(k, m + 8, dtype=dtype)[:, :m].T if a_transposed else _randn(m, k + 8, dtype=dtype)[:, :k]
    b = _randn(n, k, dtype=dtype, seed=1).T if b_transposed else _randn(k, n, dtype=dtype, seed=1)
    _check(a, b, _randn(n, dtype=dtype, seed=2), precision="tf32", config=PERSISTENT)
    if not b_transposed:
        return
    # K-major, so that any number of rows will do.
    _check(a, _randn(37, k, dtype=dtype, seed=1).T, _randn(37, dtype=dtype, seed=2), precision="tf32",
           config=PERSISTENT)  # fmt: skip


def test_persistent_wants_alignment():
    a, b = _randn(16, 20, dtype=torch.float16), _randn(20, 16, dtype=torch.float16)
    for bad in (a, a[:, 4:], a[:, ::2]):  # rows of 40 bytes, a start at 8 bytes, no unit stride
        with pytest.raises(ValueError, match="16-byte aligned"):
            product(bad, b[: bad.shape[1]], config=PERSISTENT)


def test_splits_are_deterministic():
    a, b = _randn(16, 70), _randn(70, 16, seed=1)
    assert torch.equal(product(a, b, config=SPLIT), product(a, b, config=SPLIT))


def test_rounds_to_bfloat16_as_torch_does():
    x = _randn(16, 64) * 300
    assert torch.equal(product(torch.eye(16), x, out_dtype=torch.bfloat16, config=SMALL), x.bfloat16())


def test_default_configuration():
    a, b = _randn(40, 30), _randn(30, 20, seed=1)
    _check(a, b)
    assert configuration(a, b).kernel == "pointer"
    wide = torch.empty(4096, 4096, dtype=torch.bfloat16)
    assert configuration(wide, wide.T).kernel == "persistent"
    assert configuration(wide[1:, 1:], wide[1:, 1:].T).kernel == "pointer"


def test_64_bit_offsets():
    """The interpreter wraps int32 as a GPU does: rows 2 GiB apart, in memory that is never touched between them."""
    rows, stride = 3, 2**30 + 16
    storage = torch.empty((rows - 1) * stride + 16, dtype=torch.float16)  # 4 GiB of address space, three pages used
    a = storage.as_strided((rows, 16), (stride, 1))
    a.copy_(_randn(rows, 16, dtype=torch.float16))
    b = _randn(16, 5, dtype=torch.float16, seed=1)
    _check(a, b, config=SMALL)
    _check(b.T, a.T, config=SMALL)
    batch = a[:, None]
    _check(batch, b.expand(rows, 16, 5), config=SMALL)
    assert _launch._Operands(a, b, torch.Size()).need_64_bit()
    assert not _launch._Operands(a[:2], b, torch.Size()).need_64_bit()
