"""What must hold of the Triton kernels on a GPU: `python -m pytest tests/gpu`. Skipped where there is none."""

import json

import pytest
import torch
import torch.nn.functional as F

import triton_kernels as kernels
from fnn import losses, models, ops, optim, random, train, tree
from triton_kernels import _launch, _measure, _tables, matrix
from triton_kernels._activation import ACTIVATIONS, activate
from triton_kernels._matmul._configs import Config

DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["contiguous", "expanded", "transposed", "sliced"]  # of strides, of an incoming gradient
EVERY_KIND = [(torch.float32, kind) for kind in KINDS] + [(dtype, "transposed") for dtype in DTYPES[:2]]
GIB = 2**30
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _launch.INSTALLED, reason="needs Triton"),
]
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs a Hopper GPU"
)


@pytest.fixture(autouse=True)
def _exact_and_fresh():
    """cuBLAS multiplies float32 exactly, and each test has random values and memory of its own."""
    torch.manual_seed(0)
    with _measure.library_computes("ieee"):
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def assert_as_good_as_torch(found, of_torch, exact, *, times=2.0):
    """Our error against the float64 result is less than twice torch's in the same dtype, and float32's rounding."""
    assert found.dtype == of_torch.dtype
    assert found.shape == exact.shape
    rounding = 8 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    ours, theirs = ((x.double() - exact).abs().max().item() for x in (found, of_torch))
    assert ours <= times * theirs + rounding, f"error {ours:.3g}, torch's {theirs:.3g}"


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def gradients(function, operands, grad):
    """The result and the gradients of all operands."""
    operands = [x.detach().requires_grad_() for x in operands]
    out = function(*operands)
    return [out.detach(), *torch.autograd.grad(out, operands, grad)]


def assert_gradients_as_good(ours, reference, operands, grad, *, times=2.0):
    """Result and gradients, where `grad` has strides of its own."""
    found, of_torch = gradients(ours, operands, grad), gradients(reference, operands, grad)
    exact = gradients(reference, [x.double() for x in operands], grad.double())
    for result, theirs, expected in zip(found, of_torch, exact, strict=True):
        assert_as_good_as_torch(result, theirs, expected, times=times)


def incoming(kind, shape, dtype):
    """A gradient as autograd hands it down: of a sum (stride 0), of a transposition, of a slice."""
    match kind:
        case "contiguous":
            return values(*shape, dtype=dtype)
        case "expanded":
            return values(1, dtype=dtype).expand(shape)
        case "transposed":
            return values(*shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        case "sliced":
            return values(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    raise ValueError(kind)


# Products -------------------------------------------------------------------------------------------------------------


def assert_product(a, b, **options):
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    _measure.poison(shape, a.dtype, DEVICE)
    found = kernels.matmul(a, b, backend="triton", **options)
    assert_as_good_as_torch(found, torch.matmul(a, b), a.double() @ b.double())


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_of_odd_sizes_in_every_layout(dtype, layout):
    a = _measure.random_matrix(1, 131, 77, dtype, DEVICE, transposed=layout[0] == "t")
    b = _measure.random_matrix(1, 77, 45, dtype, DEVICE, transposed=layout[1] == "t")
    assert_product(a, b)


@pytest.mark.parametrize(
    "size",
    [(1, 1, 1), (1, 300, 257), (16, 128, 1024), (3, 5, 20_000), (64, 1, 64), (1024, 1024, 1024), (513, 2049, 40)],
    ids=str,
)
def test_matmul_of_every_class_of_size(size):
    m, n, k = size
    assert_product(values(m, k, dtype=torch.bfloat16), values(k, n, dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
def test_the_precisions_of_float32(precision):
    a, b = values(200, 160), values(160, 96)
    found = kernels.matmul(a, b, precision=precision, backend="triton")
    error = _measure.relative_error(found, a.double() @ b.double())
    assert error <= _measure.tolerance(torch.float32, precision)
    if precision == "bf16x3":  # and it is what was asked for: tf32 is an order of magnitude coarser
        tf32 = kernels.matmul(a, b, precision="tf32", backend="triton")
        assert error < 0.2 * _measure.relative_error(tf32, a.double() @ b.double())


def test_operands_of_any_strides():
    a = values(70, 2 * 48, dtype=torch.float16)[:, ::2]
    b = values(48, 1, dtype=torch.float16).expand(48, 33)
    assert_product(a, b)
    assert_product(values(48, dtype=torch.float16).expand(70, 48), values(1, dtype=torch.float16).expand(48, 33))
    assert_product(values(71 * 49 + 3, dtype=torch.float16)[3:].reshape(71, 49), values(49, 8, dtype=torch.float16))


@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 33, 17), (5, 17, 20)), ((2, 1, 9, 17), (3, 17, 20)), ((4, 33, 17), (17, 20)), ((33, 17), (6, 17, 20))],
)
def test_batch_dimensions_broadcast(left, right):
    assert_product(values(*left), values(*right))


def test_out_dtype_and_nothing_to_sum():
    a, b = values(40, 64, dtype=torch.bfloat16), values(64, 24, dtype=torch.bfloat16)
    wide = kernels.matmul(a, b, out_dtype=torch.float32, backend="triton")
    assert_as_good_as_torch(wide, a.float() @ b.float(), a.double() @ b.double())
    assert torch.equal(kernels.matmul(a[:, :0], b[:0], backend="triton"), torch.zeros_like(a[:, :1] @ b[:1]))
    assert kernels.matmul(a[:0], b, backend="triton").shape == (0, 24)


@pytest.mark.parametrize("split_k", [2, 3, 8])
def test_split_k_is_right_and_gives_the_same_bits(split_k):
    from triton_kernels._matmul._launch import product

    a, b, bias = (values(*shape, dtype=torch.bfloat16) for shape in ((20, 1003), (1003, 72), (72,)))
    config = Config("pointer", 32, 64, 64, 4, 3, split_k=split_k)
    first, before = product(a, b, bias, activation="gelu", preactivation=True, config=config)
    exact = a.double() @ b.double() + bias.double()
    of_torch = torch.addmm(bias, a, b)
    assert_as_good_as_torch(before, of_torch, exact)
    assert_as_good_as_torch(first, F.gelu(of_torch), F.gelu(exact))
    for _ in range(5):
        assert torch.equal(first, product(a, b, bias, activation="gelu", config=config))


@hopper
@pytest.mark.parametrize("warp_specialize", [False, True])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_the_persistent_kernel_in_every_layout(layout, warp_specialize):
    from triton_kernels._matmul._launch import product

    m, n, k = 2056, 1544, 264  # more tiles than multiprocessors, ragged in all three, rows of 16 bytes
    a = _measure.random_matrix(1, m, k, torch.bfloat16, DEVICE, transposed=layout[0] == "t")
    b = _measure.random_matrix(1, k, n, torch.bfloat16, DEVICE, transposed=layout[1] == "t")
    bias = values(n, dtype=torch.bfloat16)
    config = Config("persistent", 128, 128, 64, 4, 3, warp_specialize=warp_specialize)
    _measure.poison((m, n), torch.bfloat16, DEVICE)
    found, before = product(a, b, bias, activation="silu", preactivation=True, config=config)
    exact, of_torch = a.double() @ b.double() + bias.double(), torch.addmm(bias, a, b)
    assert_as_good_as_torch(before, of_torch, exact)
    assert_as_good_as_torch(found, F.silu(of_torch), F.silu(exact))
    assert torch.equal(found, product(a, b, bias, activation="silu", config=config))


@hopper
def test_the_persistent_kernel_refuses_what_the_copy_engine_cannot_fetch():
    from triton_kernels._matmul._launch import product

    config = Config("persistent", 128, 128, 64, 4, 3, warp_specialize=True)
    with pytest.raises(ValueError, match="16-byte aligned"):
        product(values(64, 33, dtype=torch.bfloat16), values(33, 64, dtype=torch.bfloat16), config=config)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear_and_its_gradients(activation):
    operands = values(3, 21, 40), values(50, 40), values(50)
    assert_gradients_as_good(
        lambda *x: kernels.linear(*x, activation=activation, backend="triton"),
        lambda *x: activate(F.linear(*x), activation),
        operands,
        incoming("transposed", (3, 21, 50), torch.float32),
    )


@pytest.mark.parametrize(("dtype", "kind"), EVERY_KIND)
def test_matmul_takes_gradients_of_any_strides(dtype, kind):
    operands = values(65, 48, dtype=dtype), values(48, 37, dtype=dtype)
    ours = lambda a, b: kernels.matmul(a, b, backend="triton")
    assert_gradients_as_good(ours, torch.matmul, operands, incoming(kind, (65, 37), dtype))


# Softmax and cross-entropy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 7, 64, 1000, 4096, 40_000, 70_001])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_every_length(log, columns):
    ours, reference = (kernels.log_softmax, torch.log_softmax) if log else (kernels.softmax, torch.softmax)
    for dtype, dim in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 0)):
        x = values(*((5, columns) if dim else (columns, 5)), dtype=dtype)
        _measure.poison(x.shape, dtype, DEVICE)
        grad = values(*x.shape, dtype=dtype)
        assert_gradients_as_good(
            lambda x: ours(x, dim, backend="triton"), lambda x: reference(x, dim), (x,), grad, times=3
        )


@pytest.mark.parametrize(("dtype", "kind"), EVERY_KIND)
def test_softmax_takes_any_strides(dtype, kind):
    x = values(6, 2 * 33, 9, dtype=dtype)[:, ::2].permute(2, 0, 1)
    for dim in range(3) if kind == "expanded" else (1,):
        assert_gradients_as_good(
            lambda x: kernels.softmax(x, dim, backend="triton"),
            lambda x: torch.softmax(x, dim),
            (x,),
            incoming(kind, x.shape, dtype),
            times=3,
        )


def test_softmax_of_infinities():
    x = values(4, 300)
    x[0] = -torch.inf
    x[1, ::2] = -torch.inf
    x[2, 5] = torch.inf
    found, expected = kernels.softmax(x, backend="triton"), torch.softmax(x, -1)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("dtype", "classes", "kind"),
    [(dtype, classes, "contiguous") for dtype in DTYPES for classes in (3, 1000, 50_257)]
    + [(torch.float32, 1000, "expanded"), (torch.float32, 1000, "transposed")],
)
def test_cross_entropy_and_its_gradient(dtype, classes, kind):
    logits = values(classes, 37, dtype=dtype).mT if kind == "transposed" else values(37, classes, dtype=dtype)
    labels = torch.randint(classes, (37,), device=DEVICE, dtype=torch.int32)
    labels[5] = -100
    options = {"label_smoothing": 0.1, "reduction": "none"}
    assert_gradients_as_good(
        lambda x: kernels.cross_entropy(x, labels, backend="triton", **options),
        lambda x: F.cross_entropy(x, labels.long(), **options),
        (logits,),
        incoming("expanded" if kind == "expanded" else "contiguous", (37,), dtype),
        times=3,
    )


def test_cross_entropy_of_pixels():
    logits, labels = values(2, 11, 5, 6), torch.randint(11, (2, 5, 6), device=DEVICE)
    ours = lambda x: kernels.cross_entropy(x, labels, backend="triton")
    assert_gradients_as_good(ours, lambda x: F.cross_entropy(x, labels), (logits,), values(()))


def test_labels_out_of_range_are_nan():
    logits, labels = values(4, 9).requires_grad_(), torch.tensor([0, 9, -1, -100], device=DEVICE)
    each = kernels.cross_entropy(logits, labels, reduction="none", backend="triton")
    assert each.isnan().tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(each.sum(), logits)
    assert grad.isnan().all(1).tolist() == [False, True, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, True, False]


def test_linear_cross_entropy_over_several_chunks():
    classes = 150_000
    labels = torch.randint(classes, (300,), device=DEVICE)
    operands = values(300, 24), values(classes, 24) / 5, values(classes)
    assert_gradients_as_good(
        lambda x, weight, bias: kernels.linear_cross_entropy(x, weight, labels, bias, backend="triton"),
        lambda x, weight, bias: F.cross_entropy(F.linear(x, weight, bias), labels),
        operands,
        values(()),
        times=4,
    )


# Transforms -----------------------------------------------------------------------------------------------------------

CELLS = [
    (operation, transform)
    for operation in ("matmul", "linear, gelu", "softmax", "cross_entropy", "linear_cross_entropy")
    for transform in ("grad", "vmap", "vmap(grad)", "jvp", "jvp(grad)", "jacfwd(jacrev)")
]


def cell(operation, transform, mode):
    return matrix.check(
        next(each for each in matrix.OPERATIONS if each.name == operation),
        next(each for each in matrix.TRANSFORMS if each.name == transform),
        mode,
        torch.float32,
        "cuda",
    )


@pytest.mark.parametrize(("operation", "transform"), CELLS)
def test_transforms_of_the_kernels(operation, transform):
    assert cell(operation, transform, "eager") <= matrix.TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("operation", "transform"),
    [("matmul", "jvp(grad)"), ("linear, gelu", "vmap(grad)"), ("softmax", "jvp"), ("cross_entropy", "grad")],
)
def test_compiled_transforms_of_the_kernels(operation, transform):
    assert cell(operation, transform, "inductor") <= matrix.TOLERANCE[torch.float32]


# Where and when they run ----------------------------------------------------------------------------------------------


def everything(x, weight, labels):
    """One number that goes through every kernel, with its gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    hidden = kernels.linear(x, weight, activation="gelu", backend="triton")
    attended = kernels.matmul(kernels.softmax(hidden, backend="triton"), weight, backend="triton")
    loss = kernels.cross_entropy(attended, labels, backend="triton")
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def inputs():
    return values(512, 256), values(300, 256) / 16, torch.randint(256, (512,), device=DEVICE)


def test_the_same_call_gives_the_same_bits():
    operands = inputs()
    first = everything(*operands)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(*operands), strict=True))


def test_on_a_stream_of_its_own():
    operands = inputs()
    expected = everything(*operands)
    slow = values(4096, 4096)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = [torch.empty_like(x) for x in operands]
    with torch.cuda.stream(stream):
        for _ in range(10):  # what follows finds its inputs only if it waits for this stream
            slow = slow @ slow * 1e-2
        for to, source in zip(late, operands, strict=True):
            to.copy_(source)
        found = everything(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_into_a_cuda_graph():
    x, weight, _ = inputs()

    def forward():
        hidden = kernels.linear(x, weight, activation="relu", backend="triton")
        return kernels.log_softmax(kernels.matmul(hidden, weight, backend="triton"), backend="triton")

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(2):
        x.copy_(values(*x.shape))
        graph.replay()
        assert torch.equal(out, forward())


def test_in_place_operations_on_results():
    a, b = values(40, 24).requires_grad_(), values(24, 16).requires_grad_()
    out = kernels.matmul(a, b, backend="triton")
    out.mul_(2)  # nothing needs the product again
    expected = torch.autograd.grad(2 * torch.matmul(a, b).sum(), (a, b))
    for ours, theirs in zip(torch.autograd.grad(out.sum(), (a, b), retain_graph=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    probabilities = kernels.softmax(out, backend="triton")
    probabilities.mul_(2)  # the gradient needs them as they were
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(probabilities.sum(), a)


def test_auto_follows_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(_tables, "_loaded", {})
    _tables.nearest.cache_clear()
    x, card = values(300, 500), torch.cuda.get_device_name(DEVICE)
    assert ops.explain(ops.softmax, x).kernel == "PyTorch"
    for config, kernel in (({}, "Triton"), (None, "PyTorch")):
        entry = {"operation": "softmax", "kind": "float32 last", "sizes": [256, 512], "config": config}
        path = tmp_path / "table.json"
        path.write_text(
            json.dumps({"device": card, "entries": [entry | {"milliseconds": 1, "library_milliseconds": 2}]})
        )
        assert kernels.load_table(path) == card
        assert ops.explain(ops.softmax, x).kernel == kernel
        taken = kernels.softmax(x, backend="triton") if kernel == "Triton" else torch.softmax(x, -1)
        assert torch.equal(ops.softmax(x), taken)
    _tables.nearest.cache_clear()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_training_step_equals_that_of_torch(compile):
    net, optimizer = models.mlp((48, 32), classes=7), optim.adam(1e-2)
    x, labels = values(64, 20), torch.arange(64, device=DEVICE) % 7

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    after = {}
    for setting in ("triton", "torch"):
        torch._dynamo.reset()
        with ops.use(setting):
            step = train.make_step(loss_fn, optimizer, compile=compile)
            params, _ = net.init(random.key(0, device="cuda"), x)
            train_state = train.TrainState.create(params, optimizer, random.key(1, device="cuda"))
            for _ in range(2):
                train_state, metrics = step(train_state, (x, labels))
            assert step.compiled == compile
        after[setting] = [metrics["loss"], *tree.leaves(train_state.params)]
    for ours, theirs in zip(after["triton"], after["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# Offsets beyond 32 bits -----------------------------------------------------------------------------------------------


def needs(gibibytes):
    if torch.cuda.mem_get_info()[0] < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes} GiB of free memory")


def test_a_factor_beyond_32_bits():
    needs(8)
    a = torch.empty(2**21 + 100, 1024, dtype=torch.bfloat16, device=DEVICE).normal_()
    b = values(1024, 16, dtype=torch.bfloat16)
    found = kernels.matmul(a, b, backend="triton")
    for rows in (slice(0, 200), slice(-200, None)):
        assert_as_good_as_torch(found[rows], a[rows] @ b, a[rows].double() @ b.double())


def test_a_product_beyond_32_bits():
    needs(8)
    a, b = values(2**16 + 72, 24, dtype=torch.bfloat16), values(24, 2**15 + 8, dtype=torch.bfloat16)
    found = kernels.matmul(a, b, backend="triton")
    for rows in (slice(0, 100), slice(-100, None)):
        assert_as_good_as_torch(found[rows], a[rows] @ b, a[rows].double() @ b.double())


def test_a_softmax_beyond_32_bits():
    needs(16)
    x = torch.empty(2**14 + 3, 2**17 + 64, dtype=torch.bfloat16, device=DEVICE).normal_()
    found = kernels.softmax(x, backend="triton")
    for rows in (slice(0, 2), slice(-2, None)):
        assert_as_good_as_torch(found[rows], torch.softmax(x[rows], 1), torch.softmax(x[rows].double(), 1))


def test_a_cross_entropy_beyond_32_bits():
    needs(16)
    rows, classes = 2**14 + 3, 2**17 + 64
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    labels = torch.randint(classes, (rows,), device=DEVICE)
    each = kernels.cross_entropy(logits, labels, reduction="none", backend="triton")
    (grad,) = torch.autograd.grad(each.sum(), logits)
    last = logits.detach()[-2:].requires_grad_()
    expected = F.cross_entropy(last.double(), labels[-2:], reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(each[-2:].double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(grad[-2:].double(), expected_grad.double(), rtol=2e-2, atol=1e-6)
