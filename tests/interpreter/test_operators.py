"""The operators with the Triton kernels inside: derivatives, batches, and a whole training step."""

import pytest
import torch
import torch.nn.functional as F
from oracle import _round_to_nearest, assert_as_good_as_torch  # noqa: F401  a fixture
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import triton_kernels as tk
from fnn import losses, nn, ops, optim, random, train, tree
from triton_kernels import _launch

LABELS = torch.tensor([1, 0, 6, -100, 3])


def both(name):
    """The operator on Triton's kernels, and torch's function of it, of (x, weight, bias)."""
    activation = name if name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu") else None
    options = {"backend": "triton"}
    return {
        "matmul": (lambda x, w, b: tk.matmul(x, w.mT, **options), lambda x, w, b: x @ w.mT),
        "linear": (lambda x, w, b: tk.linear(x, w, b, **options), F.linear),
        "softmax": (lambda x, w, b: tk.softmax(x * w[0], 0, **options), lambda x, w, b: (x * w[0]).softmax(0)),
        "log_softmax": (lambda x, w, b: tk.log_softmax(x * w[0], **options), lambda x, w, b: (x * w[0]).log_softmax(1)),
        "cross_entropy": (
            lambda x, w, b: tk.cross_entropy(F.linear(x, w, b), LABELS, label_smoothing=0.1, **options),
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), LABELS, label_smoothing=0.1),
        ),
        "linear_cross_entropy": (
            lambda x, w, b: tk.linear_cross_entropy(x, w, LABELS, b, **options),
            lambda x, w, b: F.cross_entropy(F.linear(x, w, b), LABELS),
        ),
    }.get(
        name,
        (
            lambda x, w, b: tk.linear(x, w, b, activation=activation, **options),
            lambda x, w, b: getattr(F, activation)(F.linear(x, w, b)),
        ),
    )  # fmt: skip


TRANSFORMS = {
    "grad": lambda f: grad(lambda x, w, b: f(x, w, b).sin().sum(), (0, 1, 2)),
    "vmap(grad)": lambda f: (
        lambda x, w, b: vmap(grad(lambda w, s: f(x * s, w, b).sin().sum()), (None, 0))(
            w, torch.tensor([1.0, 2.0], dtype=x.dtype)
        )
    ),
    "vmap of the weight": lambda f: lambda x, w, b: vmap(f, (None, 0, 0))(x, torch.stack([w, -w]), torch.stack([b, b])),
    "jvp": lambda f: lambda x, w, b: jvp(f, (x, w, b), (x.cos(), w.cos(), b.cos()))[1],
    "hessian": lambda f: lambda x, w, b: jacfwd(jacrev(lambda b: f(x * b[0], w * b[1], b).sin().sum()))(b),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "name", ["matmul", "linear", "relu", "gelu", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"]
)
def test_derivatives(name, transform, compiled):
    if compiled and transform not in ("grad", "jvp"):
        pytest.skip("tests/test_matrix.py has every transform compiled; the kernels do not know of it")
    torch.manual_seed(0)
    operands = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    ours, theirs = (TRANSFORMS[transform](f) for f in both(name))
    ours = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    exact = theirs(*(x.double() for x in operands))
    for result, torch_result, exact_result in zip(
        *(tree.leaves(x) for x in (ours(*operands), theirs(*operands), exact)), strict=True
    ):
        assert_as_good_as_torch(result, torch_result, exact_result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "gelu", "softmax", "cross_entropy", "linear_cross_entropy"])
def test_half_precision(name, dtype):
    torch.manual_seed(0)
    operands = [x.to(dtype) for x in (torch.randn(5, 3), torch.randn(7, 3), torch.randn(7))]
    for transform in (lambda f: f, lambda f: grad(lambda x, w, b: f(x, w, b).float().sin().sum(), (0, 1, 2))):
        ours, theirs = (transform(f) for f in both(name))
        results, exact = ours(*operands), theirs(*(x.double() for x in operands))
        for result, torch_result, exact_result in zip(
            *(tree.leaves(x) for x in (results, theirs(*operands), exact)), strict=True
        ):
            # half a rounding more than torch's error: where torch happens to round to the very number
            slack = torch.finfo(dtype).eps * exact_result.abs().max().clamp(min=1)
            error, torch_error = ((x.double() - exact_result).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + slack


def test_the_kernels_are_what_runs(monkeypatch):
    """Each operator reaches Triton's kernel here, so the tests above are about it."""
    from triton_kernels._cross_entropy import _launch as cross_entropy
    from triton_kernels._matmul import _launch as matmul
    from triton_kernels._softmax import _launch as softmax

    assert _launch.INTERPRETED
    for module, kernel, name in (
        (matmul, "product", "linear"),
        (matmul, "product", "gelu"),
        (softmax, "softmax", "softmax"),
        (cross_entropy, "cross_entropy", "cross_entropy"),
        (cross_entropy, "cross_entropy", "linear_cross_entropy"),
    ):
        calls = []
        with monkeypatch.context() as patch:
            original = getattr(module, kernel)
            patch.setattr(
                module, kernel, lambda *args, original=original, **kw: calls.append(1) or original(*args, **kw)
            )
            both(name)[0](torch.randn(5, 3), torch.randn(7, 3), torch.randn(7))
        assert calls, name


def test_a_training_step_in_one_graph():
    net = nn.Sequential(nn.Linear(6), nn.gelu, nn.Linear(3))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    results = {}
    for backend in ("triton", "torch"):
        with ops.use(backend), pytest.MonkeyPatch.context() as patch:
            original = torch.compile
            patch.setattr(torch, "compile", lambda *args, **kw: original(*args, **{**kw, "backend": "aot_eager"}))
            step = train.make_step(loss_fn, optim.adam(1e-2))
            train_state = train.TrainState.create(net.init(random.key(0), x)[0], optim.adam(1e-2), random.key(1))
            for _ in range(3):
                train_state, metrics = step(train_state, (x, y))
        results[backend] = (metrics["loss"], *tree.leaves(train_state.params))
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
