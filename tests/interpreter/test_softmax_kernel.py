"""The softmax kernels in Triton's interpreter, against float64 and torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import _round_to_nearest, assert_as_good_as_torch, laid_out  # noqa: F401

from triton_kernels._softmax import _configs
from triton_kernels._softmax._launch import softmax, softmax_backward

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "sliced", "expanded", "one value"]
EACH_DIM = [((7,), 0), ((), 0), ((), -1)]
EACH_DIM += [(shape, dim) for shape in [(5, 9), (3, 5, 7), (2, 3, 5, 6)] for dim in range(-1, len(shape) - 1)]
inf, nan = float("inf"), float("nan")


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of more than a few dozen columns go block by block."""
    monkeypatch.setattr(_configs, "REREAD_RESIDENT", 128)
    monkeypatch.setattr(_configs, "ONLINE_TILE", 256)


def reference(x, dim, log):
    return torch.log_softmax(x, dim) if log else torch.softmax(x, dim)


def torch_backward(grad, output, dim, log):
    backward = torch.ops.aten._log_softmax_backward_data if log else torch.ops.aten._softmax_backward_data
    return backward(grad, output, dim, output.dtype)


def exact_backward(grad, output, dim, log):
    grad, output = grad.double(), output.double()
    if log:
        return grad - output.exp() * grad.sum(dim, keepdim=True)
    return output * (grad - (output * grad).sum(dim, keepdim=True))


def check_forward(x, dim, log):
    y = softmax(x, dim, log=log)
    assert y.is_contiguous()
    assert_as_good_as_torch(y, reference(x, dim, log), reference(x.double(), dim, log))


def check_backward(grad, output, dim, log):
    result = softmax_backward(grad, output, dim, log=log)
    assert result.is_contiguous()
    assert_as_good_as_torch(result, torch_backward(grad, output, dim, log), exact_backward(grad, output, dim, log))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), EACH_DIM)
def test_each_dim_and_dtype(shape, dim, dtype, log):
    x = laid_out("contiguous", shape, dtype)
    check_forward(x, dim, log)
    check_backward(laid_out("contiguous", shape, dtype), reference(x, dim, log), dim, log)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input(layout, dim):
    check_forward(laid_out(layout, (4, 5, 6), torch.float32), dim, log=False)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("output_layout", LAYOUTS[:3])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_strides_of_the_incoming_gradient(grad_layout, output_layout, log):
    grad = laid_out(grad_layout, (4, 5, 6), torch.float32)
    values = laid_out(output_layout, (4, 5, 6), torch.float32)
    for dim in (0, 2):
        output = torch.empty_strided(values.shape, values.stride()).copy_(reference(values, dim, log))
        assert output.stride() == values.stride()
        check_backward(grad, output, dim, log)


def test_more_dimensions_than_the_kernel_takes():
    x = laid_out("sliced", (2, 2, 2, 2, 2, 3), torch.float32)
    check_forward(x, -1, log=False)
    check_forward(x, 1, log=True)
    check_backward(laid_out("transposed", x.shape, torch.float32), torch.softmax(x, 3), 3, log=False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    extra=st.integers(1, 3),
    log=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(data, shape, extra, log, dtype):
    shape = (*shape, extra) if data.draw(st.booleans()) else (extra, *shape)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    layouts = st.sampled_from(LAYOUTS)
    x = laid_out(data.draw(layouts), shape, dtype)
    check_forward(x, dim, log)
    check_backward(laid_out(data.draw(layouts), shape, dtype), reference(x, dim, log), dim, log)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), [((2, 1000), 1), ((2, 257), 1), ((300, 9), 0), ((2, 70, 33), 1)])
def test_rows_longer_than_a_block(small_blocks, shape, dim, dtype, log):
    x = laid_out("contiguous", shape, dtype)
    check_forward(x, dim, log)
    check_backward(laid_out("transposed", shape, dtype), reference(x, dim, log), dim, log)


def test_rising_and_falling_rows_online(small_blocks):
    """Every block, and then no block, has a new maximum."""
    rising = torch.linspace(-400, 400, 900).repeat(2, 1)
    for x in (rising, rising.flip(1)):
        check_forward(x, 1, log=False)
        check_forward(x, 1, log=True)


SPECIAL_ROWS = [
    [-inf] * 6,
    [-inf, 0.0, -inf, 1.0, -inf, -inf],
    [inf, 0.0, 1.0, 2.0, 3.0, 4.0],
    [inf, inf, -inf, 0.0, 0.0, 0.0],
    [nan, 0.0, 1.0, 2.0, 3.0, 4.0],
    [0.0, 1.0, 2.0, -inf, nan, inf],
    [1e30, 1e30, 0.0, -1e30, 3e38, 3e38],
    [-1e30, -1e30, -1e30, -1e30, -3e38, -3e38],
]


@pytest.mark.parametrize("log", [False, True])
def test_special_values(log):
    x = torch.tensor(SPECIAL_ROWS)
    expected = reference(x, 1, log)
    torch.testing.assert_close(softmax(x, 1, log=log), expected, equal_nan=True)
    torch.testing.assert_close(softmax(x.t(), 0, log=log), expected.t(), equal_nan=True)
    grad = torch.randn_like(x)
    expected_gradient = torch_backward(grad, expected, 1, log)
    torch.testing.assert_close(softmax_backward(grad, expected, 1, log=log), expected_gradient, equal_nan=True)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("repeats", [100, 171])  # 600 columns, 1026 columns; blocks have 256
def test_special_values_online(small_blocks, log, repeats):
    rows = torch.tensor(SPECIAL_ROWS)
    spread = rows.repeat_interleave(repeats, dim=1)  # whole blocks of -inf before and after the others
    for x in (rows.repeat(1, repeats), spread, spread.flip(1)):
        torch.testing.assert_close(softmax(x, 1, log=log), reference(x, 1, log), equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("dim", [0, -1])
def test_empty(shape, dim):
    x = torch.empty(shape)
    assert softmax(x, dim).shape == shape
    assert softmax_backward(x, x, dim).shape == shape


def test_a_single_column_is_one_whatever_it_holds():
    x = torch.tensor([[3.0], [-1e30], [-inf], [nan]])
    torch.testing.assert_close(softmax(x, 1), torch.softmax(x, 1), equal_nan=True)


def test_nothing_is_written_but_the_result():
    x = laid_out("sliced", (4, 5), torch.float32)
    base = x._base.clone()
    softmax(x, 0)
    assert torch.equal(x._base, base)


def test_offsets_of_64_bits():
    """Rows 2**30 apart: the third begins where an int32 offset has become negative. Untouched memory costs nothing."""
    x = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 50), (2**30, 1)).copy_(torch.randn(3, 50))
    check_forward(x, 1, log=False)
    check_forward(x.t(), 0, log=False)
    check_backward(x, torch.softmax(x, 1), 1, log=False)
    # Columns that lie as far apart.
    check_forward(x.t(), 1, log=False)
    check_forward(x, 0, log=False)
