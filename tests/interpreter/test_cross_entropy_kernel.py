"""The cross-entropy kernels in Triton's interpreter, against float64 and torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import _round_to_nearest, assert_as_good_as_torch, laid_out  # noqa: F401

from triton_kernels._cross_entropy._launch import cross_entropy, cross_entropy_backward
from triton_kernels._softmax import _configs

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MATRIX_LAYOUTS = ["contiguous", "transposed", "sliced", "expanded", "one value"]
inf, nan = float("inf"), float("nan")


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of more than a few dozen columns go block by block."""
    monkeypatch.setattr(_configs, "ONCE_READ_RESIDENT", 128)
    monkeypatch.setattr(_configs, "ONLINE_TILE", 256)


def torch_forward(logits, labels, ignore_index=-100, label_smoothing=0.0):
    losses = torch.nn.functional.cross_entropy(
        logits, labels.long(), reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return losses, torch.logsumexp(logits, 1)


def torch_backward(grad_losses, grad_log_normalizers, logits, labels, **options):
    logits = logits.detach().requires_grad_()
    losses, log_normalizers = torch_forward(logits, labels, **options)
    outputs, grads = [], []
    if grad_losses is not None:
        outputs, grads = [losses], [grad_losses.to(losses.dtype)]
    if grad_log_normalizers is not None:
        outputs, grads = [*outputs, log_normalizers], [*grads, grad_log_normalizers.to(losses.dtype)]
    return torch.autograd.grad(outputs, logits, grads)[0]


def check(logits, labels, grad_losses=None, grad_log_normalizers=None, **options):
    """Results are float32 for any dtype of the logits, so torch's come from the logits in float32."""
    losses, normalizers = cross_entropy(logits, labels, **options)
    results = losses, normalizers.sum(1)
    theirs, exact = (torch_forward(logits.to(dtype), labels, **options) for dtype in (torch.float32, torch.float64))
    for result, torch_result, exact_result in zip(results, theirs, exact, strict=True):
        assert_as_good_as_torch(result, torch_result, exact_result)
    if grad_losses is None and grad_log_normalizers is None:
        grad_losses = torch.ones(len(labels))
    grads = grad_losses, grad_log_normalizers
    gradient = cross_entropy_backward(*grads, logits, labels, normalizers, **options)
    exact = torch_backward(*grads, logits.double(), labels, **options)
    assert_as_good_as_torch(gradient, torch_backward(*grads, logits, labels, **options), exact)


def some_labels(rows, columns, dtype=torch.int64):
    return torch.randint(columns, (rows,), dtype=dtype)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (1, 10), (33, 10), (5, 300)])
def test_shapes_and_dtypes(shape, dtype, label_smoothing):
    logits = laid_out("contiguous", shape, dtype)
    check(logits, some_labels(*shape), torch.randn(shape[0]), torch.randn(shape[0]), label_smoothing=label_smoothing)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
@pytest.mark.parametrize("vector_layout", ["contiguous", "sliced", "one value"])
def test_strides(layout, vector_layout):
    """Of the logits, the labels and the incoming gradients."""
    logits = laid_out(layout, (12, 17), torch.float32)
    labels = some_labels(2 * 12 + 1, 17)[1::2] if vector_layout == "sliced" else some_labels(1, 17).expand(12)
    grads = laid_out(vector_layout, (12,), torch.float32), laid_out("sliced", (12,), torch.float32)
    check(logits, labels, *grads, label_smoothing=0.1)


@pytest.mark.parametrize("grads", [(True, False), (False, True)])
def test_either_gradient_alone(grads):
    check(torch.randn(5, 7), some_labels(5, 7), *(torch.randn(5) if given else None for given in grads))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int8, torch.int16])
def test_integer_types_of_labels(dtype):
    check(torch.randn(9, 100), some_labels(9, 100, dtype), label_smoothing=0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 1, 6, 255])
def test_ignored_rows(ignore_index, label_smoothing):
    labels = some_labels(12, 7)
    labels[[0, 5, 11]] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    check(torch.randn(12, 7), labels, torch.randn(12), torch.randn(12), **options)
    logits = torch.randn(12, 7)
    losses, normalizers = cross_entropy(logits, labels, **options)
    gradient = cross_entropy_backward(torch.randn(12), None, logits, labels, normalizers, **options)
    ignored = labels == ignore_index
    assert (losses[ignored] == 0).all()
    assert (gradient[ignored] == 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_labels_out_of_range_give_nan(layout, label_smoothing):
    logits = laid_out(layout, (6, 7), torch.float32)
    labels = torch.tensor([0, 7, -1, 2**62, -100, -(2**40)])
    wrong = torch.tensor([False, True, True, True, False, True])
    losses, normalizers = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    assert torch.equal(losses.isnan(), wrong)
    torch.testing.assert_close(normalizers.sum(1), logits.logsumexp(1))
    assert torch.equal(normalizers[:, 0], logits.amax(1))
    for grads in [(torch.ones(6), None), (None, torch.ones(6))]:
        gradient = cross_entropy_backward(*grads, logits, labels, normalizers, label_smoothing=label_smoothing)
        assert torch.equal(gradient.isnan(), wrong[:, None].expand(6, 7))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    layout=st.sampled_from(MATRIX_LAYOUTS),
    vector_layout=st.sampled_from(["contiguous", "sliced", "one value"]),
    dtype=st.sampled_from(DTYPES),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    ignore_index=st.integers(-3, 10),
)
def test_any_shape(rows, columns, layout, vector_layout, dtype, label_smoothing, ignore_index):
    grads = [laid_out(vector_layout, (rows,), torch.float32) for _ in range(2)]
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    check(laid_out(layout, (rows, columns), dtype), some_labels(rows, columns), *grads, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rows_longer_than_a_block(small_blocks, layout, dtype, label_smoothing):
    logits = laid_out(layout, (3, 1000), dtype)
    check(logits, torch.tensor([0, 700, 999]), torch.randn(3), torch.randn(3), label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_do_not_cancel(label_smoothing):
    """A common offset changes nothing in a loss but the rounding of the logits themselves."""
    logits = torch.randn(4, 50) + 1e4
    labels = some_labels(4, 50)
    losses, _ = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    torch_losses, exact = (
        torch_forward(x, labels, label_smoothing=label_smoothing)[0] for x in (logits, logits.double())
    )
    assert_as_good_as_torch(losses, torch_losses, exact)


SPECIAL_ROWS = [
    ([-inf, 0.0, 1.0], 1),
    ([-inf, 0.0, 1.0], 0),
    ([-inf, 0.0, -inf], 1),
    ([-inf, -inf, -inf], 1),
    ([inf, 0.0, 1.0], 0),
    ([inf, 0.0, 1.0], 1),
    ([nan, 0.0, 1.0], 1),
    ([nan, 0.0, -inf], -100),
    ([inf, 0.0, -inf], -100),
    ([-inf, 0.0, -inf], -100),
    ([1e30, -1e30, 0.0], 0),
    ([1e30, -1e30, 0.0], 1),
    ([1e35, 0.0, 1e30], 2),
]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("repeats", [1, 200])  # 600 columns make three blocks
def test_special_values(small_blocks, repeats, label_smoothing):
    logits = torch.tensor([row for row, _ in SPECIAL_ROWS]).repeat_interleave(repeats, dim=1)
    labels = torch.tensor([label * repeats if label > 0 else label for _, label in SPECIAL_ROWS])
    losses, normalizers = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    expected, _ = torch_forward(logits, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    grads = torch.ones(len(labels)), None
    gradient = cross_entropy_backward(*grads, logits, labels, normalizers, label_smoothing=label_smoothing)
    expected = torch_backward(*grads, logits, labels, label_smoothing=label_smoothing)
    torch.testing.assert_close(gradient, expected, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_take_the_place_of_the_logits(dtype, layout):
    logits, labels = laid_out(layout, (5, 600), dtype), some_labels(5, 600)
    normalizers = cross_entropy(logits, labels)[1]
    args = torch.randn(5), torch.randn(5), logits, labels, normalizers
    expected = cross_entropy_backward(*args)
    assert expected.is_contiguous()
    result = cross_entropy_backward(*args, out=logits)
    assert result is logits
    assert torch.equal(result, expected)


def test_empty():
    logits, labels = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    losses, normalizers = cross_entropy(logits, labels)
    assert (losses.shape, normalizers.shape) == ((0,), (0, 2))
    assert cross_entropy_backward(losses, None, logits, labels, normalizers).shape == (0, 5)
    losses, _ = cross_entropy(torch.empty(3, 0), torch.tensor([0, 1, -100]))
    torch.testing.assert_close(losses, torch.tensor([nan, nan, 0.0]), equal_nan=True)


def test_offsets_of_64_bits():
    """Rows 2**30 apart: the third begins where an int32 offset has become negative. Untouched memory costs nothing."""
    logits = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 50), (2**30, 1)).copy_(torch.randn(3, 50))
    labels = some_labels(3, 50)
    check(logits, labels, label_smoothing=0.1)
    normalizers = cross_entropy(logits, labels)[1]
    expected = cross_entropy_backward(torch.ones(3), None, logits, labels, normalizers)
    assert torch.equal(cross_entropy_backward(torch.ones(3), None, logits, labels, normalizers, out=logits), expected)


def test_offsets_of_64_bits_along_the_columns():
    logits = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((4, 3), (1, 2**30)).copy_(torch.randn(4, 3))
    check(logits, torch.tensor([0, 1, 2, 2]))


@pytest.mark.parametrize("offset", [1e4, -1e8])
def test_logits_far_from_zero(offset):
    """The gradient depends on differences of logits alone, so an offset that they all have must not show."""
    logits, labels = torch.randint(-8, 8, (5, 40)).float(), some_labels(5, 40)
    far = (logits * 8 + offset).float()
    near = (far.double() - far.double().amax(1, keepdim=True)).float()
    gradients = [
        cross_entropy_backward(torch.ones(5), None, x, labels, cross_entropy(x, labels)[1]) for x in (far, near)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
