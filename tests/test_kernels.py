"""The functions of triton_kernels against torch's: values, gradients, shapes, strides, dtypes, options, bad input."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import triton_kernels as kernels
from triton_kernels._cross_entropy import linear as chunked

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
either_backend = pytest.mark.parametrize("backend", ["auto", "triton"])


def assert_as_good_as_torch(found, exact, of_torch):
    """That the error against float64 is at most twice torch's in the same dtype, and a rounding of the largest."""
    found, of_torch = ([x] if isinstance(x, torch.Tensor) else x for x in (found, of_torch))
    exact = [exact] if isinstance(exact, torch.Tensor) else exact
    for ours, right, theirs in zip(found, exact, of_torch, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(ours.isnan(), right.isnan())
        assert torch.equal(ours.isinf(), right.to(ours.dtype).isinf())
        shown = right.isfinite() & ours.isfinite()
        if shown.any():
            scale = right[shown].abs().max()
            error, allowed = ((x.double() - right)[shown].abs().max() for x in (ours, theirs))
            arithmetic = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps  # of numbers of size one
            assert error <= 2 * allowed + torch.finfo(ours.dtype).eps * scale + arithmetic


def agrees(ours, theirs, *operands, differentiated=True):
    """Checks values and, by a cotangent that differs in every element, gradients against torch in float64."""

    def derivatives(function, values):
        values = [x.detach().requires_grad_(differentiated) for x in values]
        out = function(*values)
        if not differentiated:
            return [out]
        cotangent = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, values, cotangent)]

    exact = derivatives(theirs, [x.double() for x in operands])
    assert_as_good_as_torch(derivatives(ours, operands), exact, derivatives(theirs, operands))


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# matmul


PRODUCTS = [
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((4, 3), (3,)),
    ((4, 3), (3, 5)),
    ((3,), (2, 3, 4)),
    ((2, 4, 3), (3,)),
    ((2, 4, 3), (3, 5)),
    ((4, 3), (2, 3, 5)),
    ((2, 4, 3), (2, 3, 5)),
    ((2, 1, 4, 3), (7, 3, 5)),
    ((7, 1, 4, 3), (1, 2, 3, 5)),
    ((1, 4, 3), (2, 3, 5)),
    ((2, 2, 2, 1, 3), (2, 3, 1)),
    ((1, 1), (1, 1)),
    ((67, 61), (61, 71)),
]


@either_backend
@every_dtype
@pytest.mark.parametrize(("a", "b"), PRODUCTS, ids=str)
def test_matmul(a, b, dtype, backend):
    ours = lambda a, b: kernels.matmul(a, b, backend=backend)
    agrees(ours, torch.matmul, normal(*a, dtype=dtype), normal(*b, dtype=dtype, seed=1))


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 0), (0, 3)), ((0,), (0,)), ((0, 3), (3, 2)), ((2, 3), (3, 0)), ((0, 2, 3), (3, 4)), ((5, 2, 0), (5, 0, 3))],
    ids=str,
)
def test_empty_products(a, b):
    a, b = torch.ones(a, requires_grad=True), torch.ones(b, requires_grad=True)
    out, expected = kernels.matmul(a, b), torch.matmul(a, b)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.sum(), (a, b))
    for ours, theirs in zip(grads, torch.autograd.grad(expected.sum(), (a, b)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_out_dtype(dtype, out_dtype):
    a, b = normal(5, 64, dtype=dtype).requires_grad_(), normal(64, 3, dtype=dtype, seed=1).requires_grad_()
    out = kernels.matmul(a, b, out_dtype=out_dtype)
    exact = a.double() @ b.double()
    assert out.dtype == out_dtype
    # one rounding, to the wider of float32 and the result's dtype at worst: not one to the operands' dtype before
    eps = max(torch.finfo(out_dtype).eps, 16 * torch.finfo(torch.float32).eps)
    assert (out - exact).abs().max() <= eps * exact.abs().max()
    grads = torch.autograd.grad(out.sum(), (a, b))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    for grad, right in zip(grads, torch.autograd.grad(exact.sum(), (a, b)), strict=True):
        torch.testing.assert_close(grad, right, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_half_precision_sums_are_wider():
    """Counting by ones stops at 256 in bfloat16 and at 2048 in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(4096, dtype=dtype)
        assert kernels.matmul(ones, ones).item() == 4096
        assert kernels.softmax(torch.zeros(4096, dtype=dtype)).double().sum().item() == pytest.approx(1, abs=1e-3)
        loss = kernels.cross_entropy(torch.zeros(4096, 8, dtype=dtype), torch.zeros(4096, dtype=torch.long))
        assert loss.item() == pytest.approx(2.0794, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16x3"])
def test_precision_changes_nothing_on_the_cpu(precision):
    a, b = normal(17, 33), normal(33, 9)
    assert torch.equal(kernels.matmul(a, b, precision=precision), kernels.matmul(a, b))


# linear


ACTIVATIONS = [None, "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"]


@every_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3), (0, 3)], ids=str)
def test_linear(shape, activation, bias, dtype):
    operands = [normal(*shape, dtype=dtype), normal(7, 3, dtype=dtype, seed=1)]
    operands += [normal(7, dtype=dtype, seed=2)] if bias else []
    theirs = F.linear if activation is None else lambda *x: getattr(F, activation)(F.linear(*x))
    agrees(lambda *x: kernels.linear(*x, activation=activation), theirs, *operands)


# softmax


@every_dtype
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 0), ((4, 7), 1), ((4, 7), 0), ((3, 4, 5), 1), ((3, 4, 5), -3), ((6, 1), 1), ((2, 300), -1)],
)
def test_softmax(shape, dim, log, dtype):
    ours, theirs = (kernels.log_softmax, torch.log_softmax) if log else (kernels.softmax, torch.softmax)
    agrees(lambda x: ours(x, dim), lambda x: theirs(x, dim), 3 * normal(*shape, dtype=dtype))


@pytest.mark.parametrize("log", [False, True])
def test_softmax_at_the_edges(log):
    ours, theirs = (kernels.log_softmax, torch.log_softmax) if log else (kernels.softmax, torch.softmax)
    inf = float("inf")
    rows = torch.tensor([[-inf, -inf, -inf], [-inf, 0.0, 1.0], [inf, 0.0, 1.0], [1e4, -1e4, 1e4]])
    torch.testing.assert_close(ours(rows), theirs(rows, -1), equal_nan=True)
    for scalar in (torch.tensor(3.0), torch.tensor([3.0])):
        assert torch.equal(ours(scalar), theirs(scalar, -1))
    for empty in (torch.ones(0, 3), torch.ones(3, 0), torch.ones(2, 0, 3)):
        for dim in range(empty.dim()):
            assert ours(empty, dim).shape == empty.shape
    scalars = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.vmap(ours)(scalars), torch.vmap(lambda x: theirs(x, 0))(scalars))


# cross_entropy and linear_cross_entropy


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.3},
    {"label_smoothing": 1.0, "reduction": "none"},
    {"ignore_index": 2},
    {"ignore_index": -1, "label_smoothing": 0.1, "reduction": "sum"},
    {"ignore_index": 0, "reduction": "none"},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "default")


def labels_of(shape, classes, ignore_index):
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))
    labels.view(-1)[::3] = ignore_index
    return labels


@every_dtype
@every_option
@pytest.mark.parametrize("shape", [(7, 5), (5,), (2, 5, 3), (2, 5, 3, 2)], ids=str)
def test_cross_entropy(shape, options, dtype):
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    labels = labels_of(rows, 5, options.get("ignore_index", -100))
    if not rows:
        labels = torch.tensor(3)
    logits = 3 * normal(*shape, dtype=dtype)
    agrees(
        lambda x: kernels.cross_entropy(x, labels, **options), lambda x: F.cross_entropy(x, labels, **options), logits
    )


@every_dtype
@every_option
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [2, 1000])
def test_linear_cross_entropy(chunk_rows, bias, options, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    labels = labels_of((7,), 5, options.get("ignore_index", -100))
    operands = [normal(7, 3, dtype=dtype), normal(5, 3, dtype=dtype, seed=1)]
    operands += [normal(5, dtype=dtype, seed=2)] if bias else []
    ours = lambda x, weight, *bias: kernels.linear_cross_entropy(x, weight, labels, *bias, **options)
    theirs = lambda x, weight, *bias: F.cross_entropy(F.linear(x, weight, *bias), labels, **options)
    agrees(ours, theirs, *operands)


def test_linear_cross_entropy_of_any_batch():
    labels = labels_of((2, 3), 5, -100)
    ours = lambda x, weight: kernels.linear_cross_entropy(x, weight, labels, reduction="none")
    theirs = lambda x, w: F.cross_entropy(F.linear(x, w).movedim(-1, 1), labels, reduction="none")
    agrees(ours, theirs, normal(2, 3, 4), normal(5, 4))


class _Largest(TorchDispatchMode):
    """The largest storage, in bytes, that an operation makes, those inside these operators' kernels included."""

    INSIDE = {
        chunked.linear_cross_entropy: chunked._forward,
        chunked.linear_cross_entropy_gradients: chunked._gradients,
    }
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.INSIDE:
            with self:
                out = self.INSIDE[function](*args)
        else:
            out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_linear_cross_entropy_never_holds_the_logits(monkeypatch):
    rows, features, classes, chunk = 96, 4, 512, 8
    monkeypatch.setattr(chunked, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 0)
    logits = rows * classes * 4
    x, weight, bias = (normal(*shape).requires_grad_() for shape in ((rows, features), (classes, features), (classes,)))
    labels = labels_of((rows,), classes, -100)

    def largest(loss_of):
        with _Largest() as mode:
            torch.autograd.grad(loss_of(), (x, weight, bias))
        return mode.bytes

    assert largest(lambda: F.cross_entropy(F.linear(x, weight, bias), labels)) >= logits
    ours = largest(lambda: kernels.linear_cross_entropy(x, weight, labels, bias))
    assert chunk * classes * 4 <= ours < logits / 4


def test_a_mean_over_no_row_is_zero_with_a_gradient_of_zero():
    logits, labels = normal(3, 4).requires_grad_(), torch.full((3,), -100)
    loss = kernels.cross_entropy(logits, labels)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = normal(3, 4), torch.tensor([3, 0, 2])
    assert torch.equal(kernels.cross_entropy(logits, labels.to(dtype)), kernels.cross_entropy(logits, labels))
    torch.testing.assert_close(kernels.cross_entropy(logits, labels.to(dtype)), F.cross_entropy(logits, labels))


def test_cross_entropy_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, 0.0, 3e38], [-1e30, -1e30, -1e30], [1e7, 1e7 + 1, 1e7 + 2]])
    labels = torch.tensor([0, 0, 1, 2])
    agrees(lambda x: kernels.cross_entropy(x, labels, reduction="none"),
           lambda x: F.cross_entropy(x, labels, reduction="none"), logits)  # fmt: skip


# Properties, over shapes


SIZES = st.integers(1, 70) | st.sampled_from([2, 3, 31, 37, 61, 64, 67])
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
float_or_half = st.sampled_from([torch.float32, torch.bfloat16])


@PROPERTY
@given(
    m=SIZES, k=SIZES, n=SIZES, batch=st.integers(1, 3), dtype=float_or_half, transposed=st.tuples(*[st.booleans()] * 2)
)
def test_any_matmul(m, k, n, batch, dtype, transposed):
    a = normal(batch, k, m, dtype=dtype).mT if transposed[0] else normal(batch, m, k, dtype=dtype)
    b = normal(n, k, dtype=dtype, seed=1).mT if transposed[1] else normal(k, n, dtype=dtype, seed=1)
    agrees(kernels.matmul, torch.matmul, a, b)


@PROPERTY
@given(rows=SIZES, features=SIZES, out=SIZES, dtype=float_or_half, activation=st.sampled_from(ACTIVATIONS[1:]))
def test_any_linear(rows, features, out, dtype, activation):
    operands = normal(rows, features), 0.2 * normal(out, features, seed=1), normal(out, seed=2)
    agrees(
        lambda *x: kernels.linear(*x, activation=activation),
        lambda *x: getattr(F, activation)(F.linear(*x)),
        *(x.to(dtype) for x in operands),
    )


@PROPERTY
@given(
    shape=st.lists(SIZES, min_size=1, max_size=3).filter(lambda shape: torch.Size(shape).numel() < 20000),
    axis=st.integers(0, 2),
    dtype=float_or_half,
    log=st.booleans(),
)
def test_any_softmax(shape, axis, dtype, log):
    ours, theirs = (kernels.log_softmax, torch.log_softmax) if log else (kernels.softmax, torch.softmax)
    dim = axis % len(shape)
    agrees(lambda x: ours(x, dim), lambda x: theirs(x, dim), 3 * normal(*shape, dtype=dtype))


@PROPERTY
@given(
    rows=SIZES,
    features=SIZES,
    classes=SIZES,
    dtype=float_or_half,
    options=st.sampled_from([{}, {"label_smoothing": 0.2}, {"reduction": "sum"}]),
    linear=st.booleans(),
)
def test_any_cross_entropy(rows, features, classes, dtype, options, linear):
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    if linear:
        operands = normal(rows, features, dtype=dtype), 0.2 * normal(classes, features, dtype=dtype, seed=1)
        ours = lambda x, w: kernels.linear_cross_entropy(x, w, labels, **options)
        agrees(ours, lambda x, w: F.cross_entropy(F.linear(x, w), labels, **options), *operands)
    else:
        ours = lambda x: kernels.cross_entropy(x, labels, **options)
        agrees(ours, lambda x: F.cross_entropy(x, labels, **options), 3 * normal(rows, classes, dtype=dtype))


# Strides, of inputs and of incoming gradients


LAYOUTS = {
    "transposed": lambda *shape: normal(*shape[::-1]).permute(*reversed(range(len(shape)))),
    "sliced": lambda *shape: normal(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)],
    "expanded": lambda *shape: normal(*shape[:-1], 1).expand(shape),
    "one number": lambda *shape: normal(1).reshape([1] * len(shape)).expand(shape),
    "offset": lambda *shape: normal(shape[0] + 3, *shape[1:])[3:],
    "gaps": lambda *shape: normal(*shape[:-1], shape[-1] + 5)[..., : shape[-1]],
}
STRIDED = {
    "matmul": (kernels.matmul, torch.matmul, [(2, 5, 3), (2, 3, 4)]),
    "matmul, shared": (kernels.matmul, torch.matmul, [(2, 5, 3), (3, 4)]),
    "linear": (kernels.linear, F.linear, [(5, 3), (4, 3), (4,)]),
    "linear, large enough for oneDNN": (kernels.linear, F.linear, [(48, 512), (256, 512), (256,)]),
    "linear, gelu": (
        lambda *x: kernels.linear(*x, activation="gelu"),
        lambda *x: F.gelu(F.linear(*x)),
        [(2, 5, 3), (4, 3), (4,)],
    ),
    "softmax": (lambda x: kernels.softmax(x, 1), lambda x: torch.softmax(x, 1), [(3, 4, 5)]),
    "softmax, last": (kernels.softmax, lambda x: torch.softmax(x, -1), [(3, 4, 5)]),
    "log_softmax": (lambda x: kernels.log_softmax(x, 0), lambda x: torch.log_softmax(x, 0), [(4, 5)]),
    "cross_entropy": (
        lambda x: kernels.cross_entropy(x, torch.tensor([0, 3, 1]), reduction="none"),
        lambda x: F.cross_entropy(x, torch.tensor([0, 3, 1]), reduction="none"),
        [(3, 4)],
    ),
    "linear_cross_entropy": (
        lambda x, w, b: kernels.linear_cross_entropy(x, w, torch.tensor([0, 3, 1]), b, reduction="none"),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), torch.tensor([0, 3, 1]), reduction="none"),
        [(3, 2), (4, 2), (4,)],
    ),
}
every_strided = pytest.mark.parametrize(("ours", "theirs", "shapes"), STRIDED.values(), ids=STRIDED)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _strided_derivatives(function, operands, cotangent):
    operands = [x.detach().requires_grad_() for x in operands]
    out = function(*operands)
    # of the second order too, where what comes in is the gradient of a gradient
    first = torch.autograd.grad(out, operands, cotangent, create_graph=True)
    seconds = [grad for grad in first if grad.requires_grad]
    by_columns = [x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach() for x in seconds]
    second = torch.autograd.grad(seconds, operands, by_columns, allow_unused=True)
    return [out.detach(), *(x.detach() for x in first), *(x for x in second if x is not None)]


@every_layout
@every_strided
def test_strides_of_operands_and_of_incoming_gradients(ours, theirs, shapes, layout):
    operands = [layout(*shape) for shape in shapes]
    cotangent = layout(*theirs(*operands).shape)
    found = _strided_derivatives(ours, operands, cotangent)
    expected = _strided_derivatives(
        theirs, [x.contiguous().double() for x in operands], cotangent.contiguous().double()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 + 1e-4 * b.abs().max().item())


@every_strided
def test_strides_compiled(ours, theirs, shapes, fast_compile):
    """Every layout in one graph, which takes a fraction of the time."""
    inputs = [([layout(*shape) for shape in shapes], layout) for layout in LAYOUTS.values()]
    inputs = [(operands, layout(*theirs(*operands).shape)) for operands, layout in inputs]

    def pulled(inputs):
        results = []
        for operands, cotangent in inputs:
            out, pullback = torch.func.vjp(ours, *operands)
            results.append((out, *pullback(cotangent)))
        return results

    for found, (operands, cotangent) in zip(torch.compile(pulled, fullgraph=True)(inputs), inputs, strict=True):
        exact = [x.contiguous().double().requires_grad_() for x in operands]
        out = theirs(*exact)
        expected = (out, *torch.autograd.grad(out, exact, cotangent.double()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 + 1e-4 * b.abs().max().item())


# Bad input: the message names the operand and its shape


def _ints(*shape):
    return torch.ones(shape, dtype=torch.long)


f32, f64 = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
cf = torch.ones(2, 3, dtype=torch.complex64)
meta = torch.ones(2, 3, device="meta")
labels = torch.tensor([0, 1])
BAD = {
    "inner sizes": (
        lambda: kernels.matmul(f32, torch.ones(4, 5)),
        ValueError,
        ["a of shape (2, 3)", "b of shape (4, 5)"],
    ),
    "inner size of a vector": (lambda: kernels.matmul(f32, torch.ones(2)), ValueError, ["(2, 3)", "(2,)"]),
    "batches": (
        lambda: kernels.matmul(torch.ones(2, 1, 3), torch.ones(5, 3, 1)),
        ValueError,
        ["(2, 1, 3)", "(5, 3, 1)"],
    ),
    "scalar": (lambda: kernels.matmul(torch.tensor(1.0), f32), ValueError, ["a of shape ()", "dimension"]),
    "integers": (lambda: kernels.matmul(_ints(2, 3), f32), TypeError, ["a must be floating", "int64 of shape (2, 3)"]),
    "integers, second": (lambda: kernels.matmul(f32, _ints(3, 2)), TypeError, ["b must be floating", "(3, 2)"]),
    "complex": (lambda: kernels.matmul(f32, cf.mT), TypeError, ["b must be floating", "complex64 of shape (3, 2)"]),
    "mixed": (
        lambda: kernels.matmul(f32, f64.mT),
        TypeError,
        ["a and b", "float32 of shape (2, 3)", "float64 of shape (3, 2)"],
    ),
    "devices": (lambda: kernels.matmul(f32, meta.mT), ValueError, ["a and b", "cpu", "meta", "(2, 3)"]),
    "no tensor": (lambda: kernels.matmul([[1.0]], f32), TypeError, ["a must be a tensor", "list"]),
    "precision": (lambda: kernels.matmul(f32, f32.mT, precision="tf16"), ValueError, ["precision", "'tf16'", "'tf32'"]),
    "out_dtype": (lambda: kernels.matmul(f32, f32.mT, out_dtype=torch.int32), TypeError, ["out_dtype", "int32"]),
    "backend": (lambda: kernels.matmul(f32, f32.mT, backend="cuda"), ValueError, ["backend", "'cuda'", "'triton'"]),
    "weight": (
        lambda: kernels.linear(f32, torch.ones(3, 4)),
        ValueError,
        ["weight of shape (3, 4)", "x of shape (2, 3)"],
    ),
    "weight dims": (
        lambda: kernels.linear(f32, torch.ones(3)),
        ValueError,
        ["weight of shape (3,)", "x of shape (2, 3)"],
    ),
    "bias": (lambda: kernels.linear(f32, f32, torch.ones(3)), ValueError, ["bias must have shape (2,)", "(3,)"]),
    "bias dtype": (lambda: kernels.linear(f32, f32, f64[:, 0]), TypeError, ["bias", "float64 of shape (2,)"]),
    "bias integers": (lambda: kernels.linear(f32, f32, _ints(2)), TypeError, ["bias", "int64 of shape (2,)"]),
    "weight dtype": (lambda: kernels.linear(f32, f64), TypeError, ["x and weight", "float64 of shape (2, 3)"]),
    "weight device": (lambda: kernels.linear(f32, meta), ValueError, ["x and weight", "meta"]),
    "activation": (lambda: kernels.linear(f32, f32, activation="selu"), ValueError, ["activation", "'selu'", "'gelu'"]),
    "x complex": (lambda: kernels.linear(cf, cf), TypeError, ["x must be floating", "complex64 of shape (2, 3)"]),
    "softmax integers": (
        lambda: kernels.softmax(_ints(2, 3)),
        TypeError,
        ["x must be floating", "int64 of shape (2, 3)"],
    ),
    "softmax dim": (lambda: kernels.softmax(f32, 2), IndexError, ["softmax", "dim", "[-2, 2)", "(2, 3)"]),
    "log_softmax dim": (lambda: kernels.log_softmax(f32, -3), IndexError, ["log_softmax", "dim", "(2, 3)"]),
    "logits integers": (
        lambda: kernels.cross_entropy(_ints(2, 3), labels),
        TypeError,
        ["logits", "int64 of shape (2, 3)"],
    ),
    "logits scalar": (lambda: kernels.cross_entropy(torch.tensor(1.0), labels), ValueError, ["logits", "scalar"]),
    "labels shape": (
        lambda: kernels.cross_entropy(f32, _ints(3)),
        ValueError,
        ["labels must have shape (2,)", "(2, 3)", "(3,)"],
    ),
    "labels floating": (
        lambda: kernels.cross_entropy(f32, torch.ones(2)),
        TypeError,
        ["labels", "integers", "float32 of shape (2,)"],
    ),
    "labels bool": (lambda: kernels.cross_entropy(f32, torch.ones(2, dtype=torch.bool)), TypeError, ["labels", "bool"]),
    "labels list": (lambda: kernels.cross_entropy(f32, [0, 1]), TypeError, ["labels must be a tensor", "list"]),
    "labels device": (lambda: kernels.cross_entropy(f32, labels.to("meta")), ValueError, ["labels", "meta", "cpu"]),
    "smoothing": (
        lambda: kernels.cross_entropy(f32, labels, label_smoothing=1.5),
        ValueError,
        ["label_smoothing", "1.5"],
    ),
    "ignore_index": (lambda: kernels.cross_entropy(f32, labels, ignore_index=0.5), TypeError, ["ignore_index", "0.5"]),
    "reduction": (
        lambda: kernels.cross_entropy(f32, labels, reduction="avg"),
        ValueError,
        ["reduction", "'avg'", "'mean'"],
    ),
    "no rows": (lambda: kernels.cross_entropy(f32[:0], labels[:0]), ValueError, ["mean of no rows", "(0,)"]),
    "features": (
        lambda: kernels.linear_cross_entropy(f32, torch.ones(5, 4), labels),
        ValueError,
        ["weight of shape (5, 4)", "x of shape (2, 3)"],
    ),
    "labels of x": (
        lambda: kernels.linear_cross_entropy(f32, f32, _ints(3)),
        ValueError,
        ["labels must have shape (2,)", "x of shape (2, 3)"],
    ),
    "label too large": (
        lambda: kernels.cross_entropy(f32, torch.tensor([0, 3])),
        ValueError,
        ["labels", "[0, 3)", "from 3 to 3"],
    ),
    "label negative": (
        lambda: kernels.cross_entropy(f32, torch.tensor([0, -1])),
        ValueError,
        ["labels", "[0, 3)", "-1"],
    ),
    "label of x": (
        lambda: kernels.linear_cross_entropy(f32, f32, torch.tensor([0, 2])),
        ValueError,
        ["labels", "[0, 2)", "from 2"],
    ),
}


@pytest.mark.parametrize(("call", "error", "said"), BAD.values(), ids=BAD)
def test_bad_input(call, error, said):
    with pytest.raises(error) as caught:
        call()
    missing = [words for words in said if words not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


WRONG_LABELS = {
    "cross_entropy": lambda x, labels: kernels.cross_entropy(x, labels),
    "linear_cross_entropy": lambda x, labels: kernels.linear_cross_entropy(x, x, labels),
}


@pytest.mark.parametrize("loss", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_a_label_out_of_range_raises_in_every_mode(loss, fast_compile):
    x, wrong = torch.ones(3, 3), torch.tensor([0, 3, 1])
    message = re.escape("labels must be in [0, 3)")
    for call in (
        lambda: loss(x, wrong),
        lambda: torch.func.grad(loss)(x, wrong),
        lambda: torch.func.jvp(lambda x: loss(x, wrong), (x,), (x.clone(),)),
        lambda: torch.vmap(loss)(torch.ones(2, 3, 3), torch.stack([wrong % 3, wrong])),
        lambda: torch.vmap(loss, (None, 0))(x, torch.stack([wrong % 3, wrong])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    compiled = torch.compile(loss, fullgraph=True)
    assert compiled(x, wrong % 3).isfinite()
    with pytest.raises(Exception, match=message):
        compiled(x, wrong)


def test_bad_input_is_named_when_compiled(fast_compile):
    with pytest.raises(Exception, match=re.escape("b of shape (4, 5)")):
        torch.compile(kernels.matmul, fullgraph=True)(f32, torch.ones(4, 5))
