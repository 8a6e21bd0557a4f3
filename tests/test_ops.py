"""fnn.ops: which kernel is chosen, that no choice changes a result, and that a training step goes through it."""

import importlib
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import triton_kernels
from fnn import losses, models, nn, ops, optim, random, train, tree
from triton_kernels import _tables
from triton_kernels._matmul import cpu

ZEN_5 = cpu.Rule(long=2**21, short=2**21, copied=256)


@pytest.fixture
def everything_is_ours(monkeypatch):
    """oneDNN's call from the first multiplication on, as on a machine where it always pays."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "RULE", cpu.Rule(long=0, short=0, copied=0))


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_every_function_equals_torch(backend, everything_is_ours):
    x, weight, bias = torch.randn(5, 7), torch.randn(9, 7), torch.randn(9)
    labels = torch.tensor([0, 8, 3, -100, 2])
    logits = F.linear(x, weight, bias)
    with ops.use(backend):
        close(ops.matmul(x, weight.t()), x @ weight.t())
        close(ops.linear(x, weight, bias), logits)
        for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"):
            close(ops.linear(x, weight, bias, activation=name), getattr(F, name)(logits))
        close(ops.softmax(logits, 0), logits.softmax(0))
        close(ops.log_softmax(logits), logits.log_softmax(-1))
        options = {"label_smoothing": 0.1, "ignore_index": -100}
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(logits, labels, reduction=reduction, **options)
            close(ops.cross_entropy(logits, labels, reduction=reduction, **options), expected)
            close(ops.linear_cross_entropy(x, weight, labels, bias, reduction=reduction, **options), expected)
            close(losses.cross_entropy(logits, labels, reduction=reduction, **options), expected)
        none = torch.full((5,), -100)
        assert ops.cross_entropy(logits, none) == 0
        assert ops.linear_cross_entropy(x, weight, none) == 0


def test_linear_cross_entropy_goes_in_pieces_where_the_logits_are_many(monkeypatch):
    from triton_kernels._cross_entropy import linear

    monkeypatch.setattr(linear, "CHUNK_BYTES", 256)
    calls = []
    monkeypatch.setattr(
        triton_kernels,
        "linear_cross_entropy",
        lambda *args, original=triton_kernels.linear_cross_entropy, **kw: calls.append(1) or original(*args, **kw),
    )
    x, weight, labels = torch.randn(2, 9, 4), torch.randn(11, 4), torch.randint(11, (2, 9))
    close(
        ops.linear_cross_entropy(x, weight, labels), F.cross_entropy((x @ weight.t()).flatten(0, 1), labels.flatten())
    )
    assert calls


class TestWhatDifferentiates:
    """In eager mode a product may go straight to the library, but never where a derivative would be lost."""

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_backward(self, everything_is_ours, which):
        operands = [torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)]
        operands[which].requires_grad_()
        ours = torch.autograd.grad(ops.linear(*operands).sin().sum(), operands[which])
        close(ours, torch.autograd.grad(F.linear(*operands).sin().sum(), operands[which]))

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_plain_forward_mode(self, everything_is_ours, which):
        operands = [torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)]
        tangent = torch.randn_like(operands[which])
        with fwad.dual_level():
            operands[which] = fwad.make_dual(operands[which], tangent)
            ours, theirs = (fwad.unpack_dual(f(*operands)).tangent for f in (ops.linear, F.linear))
        close(ours, theirs)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_transforms(self, everything_is_ours, compiled):
        x, weight = torch.randn(4, 3), torch.randn(5, 3)

        def all_of(linear):
            def f(x, weight):
                return linear(x, weight).tanh()

            def scalar(x, weight):
                return f(x, weight).square().sum()

            def transforms(x, weight):
                return (
                    grad(scalar, (0, 1))(x, weight),
                    vmap(grad(scalar, 1), (0, None))(x.unsqueeze(1), weight),
                    vmap(f, (None, 0))(x, torch.stack([weight, 2 * weight])),
                    jvp(lambda w: f(x, w), (weight,), (weight.sin(),))[1],
                    jacrev(f, 1)(x, weight),
                    jacfwd(f, 1)(x, weight),
                    jacfwd(jacrev(scalar, 1), 1)(x, weight),
                )

            return transforms

        ours = all_of(ops.linear)
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
        close(ours(x, weight), all_of(F.linear)(x, weight), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_lowered_by_inductor(self, everything_is_ours):
        """Each layout that the lowering tells apart, in one graph."""
        x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
        batch, k1 = torch.randn(3, 4, 6), torch.randn(3, 4, 1)

        def f(matmul, linear):
            return (
                linear(x, weight, bias),
                linear(batch, weight, bias),
                matmul(x.t(), x),
                matmul(batch.mT, batch),
                matmul(batch, weight.t()),
                matmul(k1, k1.mT),
                matmul(batch.unsqueeze(1), batch.mT),
                grad(lambda w: linear(x.sin(), w).exp().sum())(weight),
                vmap(lambda x, b: linear(x, weight, b))(batch, torch.stack([bias] * 3)),
                matmul(x.bfloat16(), weight.t().bfloat16()),
                matmul(x.double(), weight.t().double()),
            )

        compiled = torch.compile(lambda: f(ops.matmul, ops.linear), fullgraph=True)
        close(compiled(), f(torch.matmul, F.linear))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_autocast(self, everything_is_ours, compiled):
        def f(x, weight):
            with torch.autocast("cpu", torch.bfloat16):
                return ops.linear(x, weight)

        f = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        assert f(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.bfloat16

    @pytest.mark.slow
    def test_sizes_that_change(self, everything_is_ours):
        weight, bias = torch.randn(24, 6), torch.randn(24)

        def f(x):
            return (
                ops.linear(x, weight, bias),
                ops.matmul(x, x.mT),
                grad(lambda w: ops.linear(x, w).sin().sum())(weight),
            )

        compiled = torch.compile(f, fullgraph=True, dynamic=True)
        for batch in (3, 5, 40):
            x = torch.randn(2, batch, 6)
            close(compiled(x), f(x), rtol=1e-4, atol=1e-5)


class TestLikeTorch:
    """Where `F.linear` and `torch.matmul` work, ours do, whatever the sizes and the rule."""

    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_autocast_through_two_layers(self, everything_is_ours, backend, compiled):
        net = nn.Sequential(nn.Linear(8), nn.relu, nn.Linear(3))
        params, _ = net.init(random.key(0), torch.randn(2, 4))
        labels = torch.tensor([0, 2])

        def f(params, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = net(params, x)
                loss = ops.linear_cross_entropy(y, torch.eye(3), labels)
                return y, ops.matmul(y, torch.ones(3, 2)), loss

        compute = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
        with ops.use(backend):
            assert {y.dtype for y in compute(params, torch.randn(2, 4))} == {torch.bfloat16}

    def test_meta_tensors(self, everything_is_ours):
        x, weight = torch.empty(2, 4, device="meta"), torch.empty(10, 4, device="meta")
        assert ops.linear(x, weight).shape == (2, 10)
        assert ops.matmul(x, weight.mT).is_meta
        with pytest.raises(ValueError, match="one device.* on cpu .* on meta"):
            ops.matmul(torch.ones(1024, 1024), torch.ones(1024, 1024, device="meta"))

    def test_vectors(self, everything_is_ours):
        x, weight = torch.randn(64), torch.randn(80, 64)
        close(ops.linear(x, weight), F.linear(x, weight))
        close(ops.matmul(x, weight.mT), x @ weight.mT)
        close(ops.matmul(weight, x), weight @ x)

    def test_tensors_that_are_not_plain(self, everything_is_ours):
        eye, ones = torch.eye(64), torch.ones(64, 64)
        assert torch.equal(ops.matmul(eye.to_sparse(), ones), ones)
        assert torch.equal(ops.linear(eye.to_sparse_csr(), ones), ones)

    def test_jit_trace(self, everything_is_ours):
        traced = torch.jit.trace(lambda x, w: ops.linear(x, w), (torch.ones(4, 3), torch.ones(5, 3)))
        assert torch.equal(traced(torch.ones(2, 3), torch.ones(5, 3)), torch.full((2, 5), 3.0))

    def test_onednn_may_be_turned_off(self, everything_is_ours):
        a = torch.ones(64, 64)
        assert ops.explain(ops.matmul, a, a).kernel == "oneDNN"
        with torch.backends.mkldnn.flags(enabled=False):
            assert ops.explain(ops.matmul, a, a).kernel != "oneDNN"

    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_operations_are_counted(self, everything_is_ours, backend, activation):
        importlib.import_module("triton_kernels.flops")
        x, weight = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
        with ops.use(backend):
            with FlopCounterMode(display=False) as forward, torch.no_grad():
                ops.linear(x, weight, activation=activation)
            with FlopCounterMode(display=False) as both:
                ops.linear(x, weight, activation=activation).sum().backward()
        assert (forward.get_total_flops(), both.get_total_flops()) == (120, 240)

    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    def test_labels_of_8_bits(self, backend):
        """An ignore_index of -100 is 156 in 8 bits; class 156 counts all the same."""
        labels, x = torch.tensor([156, 156, 3, 1], dtype=torch.uint8), torch.randn(4, 200)
        with ops.use(backend):
            for loss in (ops.cross_entropy, losses.cross_entropy):
                close(loss(x, labels), F.cross_entropy(x, labels.long()))
            close(ops.linear_cross_entropy(x, torch.eye(200), labels), F.cross_entropy(x, labels.long()))

    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    def test_the_mean_of_many_half_precision_losses(self, backend):
        x, labels = torch.zeros(8000, 8, dtype=torch.float16), torch.ones(8000, dtype=torch.long)
        x[:, 0] = 10
        with ops.use(backend):
            for loss in (ops.cross_entropy(x, labels), ops.linear_cross_entropy(x, torch.eye(8).half(), labels)):
                assert loss.dtype == torch.float16
                close(loss.float(), torch.tensor(10.0))

    @pytest.mark.parametrize("backend", ["auto", "triton"])
    def test_the_gradient_of_a_widened_product(self, backend):
        """Of a float32 result the gradient may be out of half precision's range, and the product in it again."""
        a = torch.ones(1, 4, dtype=torch.float16, requires_grad=True)
        b = torch.full((4, 1), 1024.0, dtype=torch.float16)
        with ops.use(backend):
            (gradient,) = torch.autograd.grad(ops.matmul(a, b, out_dtype=torch.float32).sum() * 2.0**-26, a)
        assert torch.equal(gradient, torch.full_like(a, 2.0**-16))

    @pytest.mark.slow
    def test_gradients_of_transposed_logits(self):
        logits, labels = torch.randn(1, 5, 6), torch.randint(5, (1, 6))

        def f(x):
            return grad(lambda x: ops.cross_entropy(x, labels))(x)

        expected = grad(lambda x: F.cross_entropy(x, labels))(logits)
        with ops.use("triton"):
            close(torch.compile(f, fullgraph=True)(logits), expected)


class TestUse:
    def test_twice(self):
        setting = ops.use("triton")
        ops.use("auto")
        for _ in range(2):
            with setting:
                assert "Triton needs CUDA" in ops.explain(ops.softmax, torch.ones(2)).reason
            assert ops.explain(ops.softmax, torch.ones(2)).reason == "torch's own kernel"

    def test_context_and_default(self):
        x = torch.ones(2, 2)
        assert ops.explain(ops.softmax, x).reason == "torch's own kernel"
        with ops.use("torch"):
            assert ops.explain(ops.softmax, x).reason == 'fnn.ops.use("torch")'
            with ops.use("auto"):
                assert ops.explain(ops.softmax, x).reason == "torch's own kernel"
            assert ops.explain(ops.softmax, x).reason == 'fnn.ops.use("torch")'
        ops.use("torch")
        try:
            assert ops.explain(ops.softmax, x).reason == 'fnn.ops.use("torch")'
        finally:
            ops.use("auto")

    def test_restored_after_an_error(self):
        with pytest.raises(RuntimeError, match="mine"), ops.use("torch"):
            raise RuntimeError("mine")
        assert ops.explain(ops.softmax, torch.ones(2)).reason == "torch's own kernel"

    def test_wrong_name(self):
        with pytest.raises(ValueError, match=r"use: backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
            ops.use("cuda")

    def test_a_compiled_function_follows(self):
        counter = CompileCounterWithBackend("aot_eager")
        f = torch.compile(lambda x: ops.softmax(x), fullgraph=True, backend=counter)
        names = []
        for backend in ("auto", "triton", "auto"):
            with ops.use(backend):
                close(f(torch.ones(3)), torch.full((3,), 1 / 3))
            names.append([str(node.target) for node in counter.graphs[-1].graph.nodes if node.op == "call_function"])
        assert counter.frame_count == 2  # the third finds the first
        assert not any("triton_kernels" in name for name in names[0])
        assert any("triton_kernels.softmax" in name for name in names[1])

    def test_inside_of_a_compiled_function(self):
        def f(x):
            with ops.use("triton"):
                y = ops.softmax(x)
            return y, ops.softmax(x)

        y, z = torch.compile(f, fullgraph=True, backend="aot_eager")(torch.ones(3))
        close(y, z)
        assert ops.explain(ops.softmax, torch.ones(2)).reason == "torch's own kernel"


class TestChoice:
    @pytest.mark.parametrize(
        ("shape", "layout", "kernel"),
        [
            ((256, 784, 512), "nn", "oneDNN"),
            ((256, 784, 512), "tn", "oneDNN"),
            ((8192, 128, 128), "tn", "library"),
            ((64, 784, 10), "nn", "oneDNN"),
            ((64, 784, 10), "tn", "library"),
            ((32, 32, 32), "nn", "library"),
        ],
    )
    def test_of_the_product_on_zen_5(self, monkeypatch, shape, layout, kernel):
        monkeypatch.setattr(cpu, "RULE", ZEN_5)
        m, k, n = shape
        a = torch.empty(k, m).t() if layout[0] == "t" else torch.empty(m, k)
        choice = ops.explain(ops.matmul, a, torch.empty(k, n))
        assert (choice.kernel == "oneDNN") == (kernel == "oneDNN")
        assert choice.kernel in str(choice)

    def test_other_processors_and_dtypes_take_torchs_product(self, monkeypatch):
        a = torch.empty(1024, 1024)
        monkeypatch.setattr(cpu, "RULE", None)
        assert ops.explain(ops.matmul, a, a).kernel != "oneDNN"
        monkeypatch.setattr(cpu, "RULE", ZEN_5)
        assert ops.explain(ops.matmul, a, a).kernel == "oneDNN"
        assert ops.explain(ops.matmul, a.double(), a.double()).kernel != "oneDNN"
        assert ops.explain(ops.matmul, a[None], a[None]).kernel != "oneDNN"

    def test_is_what_runs(self, monkeypatch):
        """`explain` and the call follow one rule: what is said to be oneDNN's reaches oneDNN, and nothing else does."""
        calls = []
        monkeypatch.setattr(
            cpu, "linear_pointwise", lambda *args, original=cpu.linear_pointwise: calls.append(1) or original(*args)
        )
        for shape in ((256, 784, 512), (8, 8, 8), (64, 784, 10)):
            for rule in (None, ZEN_5):
                monkeypatch.setattr(cpu, "RULE", rule)
                a, b = torch.ones(shape[0], shape[1]), torch.ones(shape[1], shape[2])
                calls.clear()
                ops.matmul(a, b)
                assert bool(calls) == (ops.explain(ops.matmul, a, b).kernel == "oneDNN")

    @pytest.mark.parametrize("name", ["matmul", "linear", "softmax", "log_softmax", "cross_entropy"])
    def test_every_function_explains_itself(self, name):
        arguments = {
            "matmul": (torch.ones(3), torch.ones(3, 2)),
            "linear": (torch.ones(3), torch.ones(2, 3)),
            "cross_entropy": (torch.ones(2, 3), torch.zeros(2, dtype=torch.long)),
        }.get(name, (torch.ones(2, 3),))
        assert ops.explain(getattr(ops, name), *arguments).kernel in ("MKL", "PyTorch", "oneDNN")
        with ops.use("triton"):
            assert "Triton needs CUDA" in ops.explain(getattr(ops, name), *arguments).reason

    def test_what_torch_computes_is_not_explained_as_onednn(self, everything_is_ours):
        a = torch.ones(64, 64)
        assert ops.explain(ops.matmul, a, a).kernel == "oneDNN"
        assert ops.explain(ops.matmul, a=a, b=a).kernel == "oneDNN"
        assert ops.explain(ops.matmul, a, a[0]).kernel != "oneDNN"
        assert ops.explain(ops.matmul, a, a, out_dtype=torch.float64).kernel != "oneDNN"
        assert ops.explain(ops.linear, a.bfloat16(), a.bfloat16()).kernel == "PyTorch"
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.explain(ops.linear, a, a).kernel == "PyTorch"
        with pytest.raises(ValueError, match="out_features, in_features"):
            ops.explain(ops.linear, torch.ones(3, 4), torch.ones(5, 6))

    def test_of_something_else(self):
        with pytest.raises(ValueError, match="expected a function of fnn.ops"):
            ops.explain(torch.matmul, torch.ones(2, 2), torch.ones(2, 2))

    def test_no_table_means_the_library(self):
        assert _tables.nearest("a card nobody has", "matmul", "bfloat16 nn", (1, 64, 64, 64)) is None


class TestErrors:
    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: ops.matmul(torch.ones(2, 3), torch.ones(4, 5)), ValueError, r"a of shape \(2, 3\) and b of shape"),
            (lambda: ops.matmul(torch.ones(2, 3), torch.ones(3, 5).long()), TypeError, "b must be floating"),
            (lambda: ops.matmul(torch.ones(2, 3), torch.ones(3, 5).double()), TypeError, "a and b must have one dtype"),
            (lambda: ops.matmul(torch.ones(2, 3) + 0j, torch.ones(3, 5) + 0j), TypeError, "a must be floating"),
            (lambda: ops.matmul([1.0], torch.ones(1)), TypeError, "a must be a tensor, got list"),
            (lambda: ops.matmul(torch.tensor(1.0), torch.ones(1)), ValueError, "at least one dimension"),
            (
                lambda: ops.matmul(torch.ones(2, 3, 4), torch.ones(3, 4, 5)),
                ValueError,
                "batch dimensions must be equal or 1",
            ),
            (lambda: ops.matmul(torch.ones(2, 3), torch.ones(3, 2), precision="fp8"), ValueError, "precision must be"),
            (lambda: ops.matmul(torch.ones(2, 3), torch.ones(3, 2), out_dtype=torch.int32), TypeError, "out_dtype"),
            (lambda: ops.linear(torch.ones(2, 3), torch.ones(3, 4)), ValueError, "out_features, in_features"),
            (lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, r"shape \(4,\)"),
            (
                lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 3), activation="swish"),
                ValueError,
                "activation must be one of .*'relu'.*, got 'swish'",
            ),
            (lambda: ops.softmax(torch.ones(3).long()), TypeError, "x must be floating"),
            (lambda: ops.softmax(torch.ones(3), None), TypeError, "dim must be an int, got None"),
            (lambda: ops.linear_cross_entropy([1.0], torch.ones(1, 1), torch.ones(1)), TypeError, "x must be a tensor"),
            (lambda: ops.softmax(torch.ones(3), 1), IndexError, r"dim must be in \[-1, 1\)"),
            (
                lambda: ops.cross_entropy(torch.ones(2, 3), torch.ones(3, dtype=torch.long)),
                ValueError,
                r"labels must have shape \(2,\)",
            ),
            (lambda: ops.cross_entropy(torch.ones(2, 3), torch.ones(2)), TypeError, "labels must be integers"),
            (
                lambda: ops.cross_entropy(torch.ones(1, 3), torch.tensor([0]), label_smoothing=2),
                ValueError,
                "label_smoothing",
            ),
            (
                lambda: ops.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3, dtype=torch.long)),
                ValueError,
                r"labels must have shape \(2,\) for x",
            ),
        ],
    )
    def test_name_the_operand(self, backend, call, error, message):
        with ops.use(backend), pytest.raises(error, match=message):
            call()

    @pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
    def test_label_out_of_range(self, backend):
        with ops.use(backend), pytest.raises((ValueError, IndexError), match="4"):
            ops.cross_entropy(torch.ones(2, 3), torch.tensor([0, 4]))


WITHOUT_TRITON = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] == "triton" else find(name, *args)
import torch
from fnn import ops
from triton_kernels import _choice, _launch

assert not _launch.INSTALLED
x = torch.randn(5, 3, requires_grad=True)
for backend in ("auto", "triton", "torch"):
    with ops.use(backend):
        assert torch.allclose(ops.linear(x, torch.eye(3), activation="relu"), x.relu())
        assert torch.allclose(ops.softmax(x), x.softmax(-1))
        loss = ops.linear_cross_entropy(x, torch.eye(3), torch.tensor([0, 1, 2, 0, 1]))
        torch.autograd.grad(loss, x)
try:
    _choice.on_cuda("softmax", "float32 last", (4, 4), torch.device("cuda"), torch.float32, "triton")
except RuntimeError as error:
    print(error)
print(_choice.on_cuda("softmax", "float32 last", (4, 4), torch.device("cuda"), torch.float32, "auto"))
"""


def test_without_triton():
    """Everything but the Triton kernels works where Triton cannot be installed, and says so."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, choice = done.stdout.splitlines()
    assert "Triton was asked for and is not installed" in error
    assert choice == "PyTorch: Triton is not installed"


def _transformer():
    """Two blocks of causal self-attention and a feed-forward net, on bytes."""

    def block(m, x):
        batch, length, width = x.shape
        q, k, v = m.attention(m.first(x)).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        scores = ops.matmul(q, k.mT) * (width // 2) ** -0.5
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mixed = ops.matmul(ops.softmax(torch.where(mask, scores, -torch.inf)), v)
        x = x + m.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + m.down(nn.gelu(m.up(m.second(x))))

    def one():
        return nn.Block(
            block,
            attention=nn.Linear(48),
            out=nn.Linear(16),
            first=nn.LayerNorm(),
            second=nn.LayerNorm(),
            up=nn.Linear(32),
            down=nn.Linear(16),
        )

    return nn.Sequential(nn.Linear(16), one(), nn.Linear(11))


WHOLE_STEPS = {
    "mlp": (lambda: models.mlp((16,), 10), (8, 12), (8,), 10),
    "transformer": (_transformer, (3, 6, 11), (3, 6), 11),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_STEPS)
def test_a_whole_step_with_the_operators_equals_torchs(name, monkeypatch, everything_is_ours):
    make, x_shape, y_shape, classes = WHOLE_STEPS[name]
    net = make()
    x, y = torch.randn(x_shape), torch.randint(classes, y_shape)

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[0], key=key, train=True)
        return losses.cross_entropy(logits.flatten(0, -2), batch[1].flatten()), (state, {})

    results = {}
    for backend in ("torch", "triton", "auto"):
        through_inductor = (name, backend) == ("mlp", "triton")
        counter = CompileCounterWithBackend("inductor" if through_inductor else "aot_eager")
        with monkeypatch.context() as patch, ops.use(backend):
            original = torch.compile
            patch.setattr(torch, "compile", lambda *args, **kw: original(*args, **{**kw, "backend": counter}))
            params, state = net.init(random.key(0), x)
            step = train.make_step(loss_fn, optim.sgd(0.1, momentum=0.9))
            train_state = train.TrainState.create(params, optim.sgd(0.1, momentum=0.9), random.key(1), state=state)
            history = []
            for _ in range(4):
                train_state, metrics = step(train_state, (x, y))
                history.append(metrics["loss"])
        assert counter.frame_count == 1
        targets = " ".join(str(node.target) for node in counter.graphs[0].graph.nodes)
        assert ("triton_kernels.product" in targets) == (backend != "torch")
        results[backend] = (torch.stack(history), train_state.params)
    assert results["torch"][0][-1] < results["torch"][0][0]
    for backend in ("triton", "auto"):
        close(results[backend][0], results["torch"][0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(tree.leaves(results[backend][1]), tree.leaves(results["torch"][1]), strict=True):
            close(ours, theirs, rtol=1e-3, atol=1e-5)
