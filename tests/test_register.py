"""Registered operators: their rules are the ones that run, in every mode, and the names of torch they rest on exist."""

import ast
import itertools
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fnn
import triton_kernels as kernels
from triton_kernels import _register
from triton_kernels._cross_entropy import linear as linear_cross_entropy
from triton_kernels._cross_entropy import op as cross_entropy
from triton_kernels._matmul import activated
from triton_kernels._matmul import op as matmul
from triton_kernels._register import register
from triton_kernels._softmax import op as softmax

PROBE = torch.library.Library("probe", "DEF")
LABELS = torch.tensor([2, -100, 0])
FACTOR = 10


# Wrong-rule probe: had torch computed a derivative in any other way than by the rule, the factor would not be seen.


@dataclass(frozen=True)
class Operator:
    """An operator, the parts it was registered with, and inputs: shapes stand for tensors to differentiate."""

    op: torch._ops.OpOverload
    parts: dict[str, Any]
    shapes: list[tuple[int, ...] | torch.Tensor]
    options: list[Any]
    rule: type | None = None
    reference: Any = None

    @property
    def name(self):
        return self.op.name().split("::")[1]


def _parts(cpu, fake, vmap):
    return {"cpu": cpu, "cuda": cpu, "fake": fake, "vmap": vmap}


CE_OPTIONS = [-100, 0.1]
OPERATORS = [
    Operator(
        matmul.product,
        _parts(matmul.kernel, matmul._fake, matmul.vmap_rule),
        [(2, 3), (3, 2), (2,)],
        ["ieee", None, "triton"],
        matmul.ProductRule,
    ),
    Operator(
        activated.activated_pair,
        _parts(activated._pair_kernel, activated._fake_pair, activated._vmap_pair),
        [(2, 3), (3, 2), (2,)],
        ["gelu", "default", "triton"],
        activated.PairRule,
        activated._pair_reference,
    ),
    Operator(
        activated.activated,
        _parts(activated._kernel, activated._fake, activated._vmap),
        [(2, 3), (3, 2), (2,)],
        ["gelu", "default", "triton"],
    ),
    Operator(
        softmax.softmax,
        _parts(softmax._kernel, softmax._fake, softmax._vmap),
        [(2, 3)],
        [1, False, "triton"],
        softmax.SoftmaxRule,
    ),
    Operator(
        softmax.softmax_gradient,
        _parts(softmax._backward_kernel, softmax._fake_gradient, softmax._vmap_gradient),
        [(2, 3), (2, 3)],
        [1, False, "triton"],
        None,
        softmax._gradient,
    ),
    Operator(
        cross_entropy.cross_entropy,
        _parts(cross_entropy.kernel, cross_entropy._fake, cross_entropy.vmap_rule),
        [(3, 4), LABELS],
        [*CE_OPTIONS, "triton"],
        cross_entropy.CrossEntropyRule,
    ),
    Operator(
        cross_entropy.cross_entropy_gradient,
        _parts(cross_entropy.gradient_kernel, cross_entropy._fake_gradient, cross_entropy._vmap_gradient),
        [(3,), (3, 2), (3, 4), LABELS, (3, 2)],
        [*CE_OPTIONS, "triton"],
        None,
        cross_entropy.gradient_reference,
    ),
    Operator(
        linear_cross_entropy.linear_cross_entropy,
        _parts(linear_cross_entropy._forward, linear_cross_entropy._fake, linear_cross_entropy._vmap),
        [(3, 2), (4, 2), (4,), LABELS],
        [*CE_OPTIONS, "default", "triton"],
        linear_cross_entropy.LinearCrossEntropyRule,
        linear_cross_entropy._reference,
    ),
    Operator(
        linear_cross_entropy.linear_cross_entropy_gradients,
        _parts(
            linear_cross_entropy._gradients, linear_cross_entropy._fake_gradients, linear_cross_entropy._vmap_gradients
        ),
        [(3,), (3, 2), (3, 2), (4, 2), (4,), LABELS, (3, 2)],
        [[True] * 3, *CE_OPTIONS, "default", "triton"],
        None,
        linear_cross_entropy._gradients_reference,
    ),
]
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def scaled_rule(rule):
    class Scaled(rule):
        @staticmethod
        def backward(ctx, *grads):
            return tuple(None if grad is None else FACTOR * grad for grad in rule.backward(ctx, *grads))

    if hasattr(rule, "jvp"):

        def jvp(ctx, *tangents):
            found = rule.jvp(ctx, *tangents)
            return tuple(FACTOR * x for x in found) if isinstance(found, tuple) else FACTOR * found

        Scaled.jvp = staticmethod(jvp)
    return Scaled


def scaled_reference(reference):
    def scaled(*inputs):
        found = reference(*inputs)
        if isinstance(found, tuple):
            return tuple(FACTOR * x - (FACTOR - 1) * x.detach() for x in found)
        return FACTOR * found - (FACTOR - 1) * found.detach()

    return scaled


def _probes():
    probes = {}
    for operator in OPERATORS:
        parts = dict(operator.parts)
        if operator.name == "activated":  # its derivative is that of the pair
            parts["differentiated"] = lambda *inputs: probes["activated_pair"](*inputs)[0]
        if operator.rule is not None:
            parts["rule"] = scaled_rule(operator.rule)
        if operator.reference is not None:
            parts["reference"] = scaled_reference(operator.reference)
        schema = str(operator.op._schema).split("::")[1]
        probes[operator.name] = register(schema, **parts, library=PROBE)
    return probes


PROBES = _probes()


def _function(operator, op):
    """The operator as a function of its floating tensors to one vector."""

    def function(*floats):
        values = iter(floats)
        tensors = [next(values) if isinstance(shape, tuple) else shape for shape in operator.shapes]
        found = op(*tensors, *operator.options)
        found = found if isinstance(found, tuple) else (found,)
        return torch.cat([x.flatten() for x in found])

    return function


def _floats(operator, batch=()):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(*batch, *shape, dtype=torch.float64, generator=generator)
        for shape in operator.shapes
        if isinstance(shape, tuple)
    )


def _everything(floats):
    return tuple(range(len(floats)))


TRANSFORMS = {
    "grad": lambda f, x, batch: func.grad(lambda *x: f(*x).sin().sum(), _everything(x))(*x),
    "vmap(grad)": lambda f, x, batch: func.vmap(func.grad(lambda *x: f(*x).sin().sum(), _everything(x)))(*batch),
    "jacrev": lambda f, x, batch: func.jacrev(f, _everything(x))(*x),
    "jvp": lambda f, x, batch: (func.jvp(f, x, tuple(t[1].clone() for t in batch))[1],),
    # one by one: torch 2.11 cannot compile it of several
    "jacfwd": lambda f, x, batch: tuple(func.jacfwd(f, i)(*x) for i in _everything(x)),
}


def _assert_ten_times(found, expected):
    for ours, right in zip(found, expected, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(ours, FACTOR * right, rtol=1e-12, atol=1e-12)


def test_every_operator_is_here():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("triton_kernels::")
    }
    assert registered == {operator.name for operator in OPERATORS}


@every_operator
def test_the_copy_computes_the_same(operator):
    x = _floats(operator)
    expected = _function(operator, operator.op)(*x)
    assert torch.equal(_function(operator, PROBES[operator.name])(*x), expected)


@pytest.mark.parametrize("name", TRANSFORMS)
@every_operator
def test_a_wrong_rule_shows_eager(operator, name):
    x, batch = _floats(operator), _floats(operator, (3,))
    transform = TRANSFORMS[name]
    found = transform(_function(operator, PROBES[operator.name]), x, batch)
    _assert_ten_times(found, transform(_function(operator, operator.op), x, batch))


# jvp along every input at once shows each part of the rule; compiled, jacfwd is its batched form, of one input
COMPILED = {**TRANSFORMS, "jacfwd": lambda f, x, batch: (func.jacfwd(f, len(x) - 1)(*x),)}


# One operator of each way to give a derivative.
KINDS = ("product", "activated", "softmax_gradient")


@pytest.mark.parametrize(
    "operator",
    [pytest.param(op, id=op.name, marks=() if op.name in KINDS else pytest.mark.slow) for op in OPERATORS],
)
def test_a_wrong_rule_shows_compiled(operator, fast_compile):
    x, batch = _floats(operator), _floats(operator, (3,))

    def every(function, x, batch):
        return [transform(function, x, batch) for transform in COMPILED.values()]

    wrong, right = (_function(operator, op) for op in (PROBES[operator.name], operator.op))
    compiled = torch.compile(lambda *floats: every(wrong, *floats), fullgraph=True)(x, batch)
    for found, expected in zip(compiled, every(right, x, batch), strict=True):
        _assert_ten_times(found, expected)


@pytest.mark.slow
def test_a_wrong_rule_shows_in_inductor():
    """Inductor sees no rules, only what became of them."""
    operators = [op for op in OPERATORS if op.name in KINDS]
    inputs = [(_floats(operator), _floats(operator, (3,))) for operator in operators]
    wrong = [_function(operator, PROBES[operator.name]) for operator in operators]
    right = [_function(operator, operator.op) for operator in operators]

    def every(functions, inputs):
        results = []
        for f, given in zip(functions, inputs, strict=True):
            results += [TRANSFORMS[name](f, *given) for name in ("vmap(grad)", "jvp")]
        return results

    compiled = torch.compile(lambda inputs: every(wrong, inputs), fullgraph=True)(inputs)
    for found, expected in zip(compiled, every(right, inputs), strict=True):
        _assert_ten_times(found, expected)


@every_operator
def test_a_wrong_rule_shows_without_torch_func(operator):
    x = tuple(x.requires_grad_() for x in _floats(operator))
    tangents = tuple(batch[1].clone() for batch in _floats(operator, (3,)))

    def reverse(op):
        return torch.autograd.grad(_function(operator, op)(*x).sin().sum(), x)

    def forward(op):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(a.detach(), t) for a, t in zip(x, tangents, strict=True)]
            return (forward_ad.unpack_dual(_function(operator, op)(*duals)).tangent,)

    for derivative in (reverse, forward):
        _assert_ten_times(derivative(PROBES[operator.name]), derivative(operator.op))


# What torch's own checkers say.


@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True])
@every_operator
def test_opcheck(operator, differentiated):
    values = iter(_floats(operator))
    tensors = [next(values) if isinstance(shape, tuple) else shape for shape in operator.shapes]
    tensors = [x.requires_grad_(differentiated and x.is_floating_point()) for x in tensors]
    torch.library.opcheck(operator.op, (*tensors, *operator.options))


T = {"backend": "triton"}
# name: ours, torch's, shapes of the operands
PUBLIC = {
    "matmul": (lambda a, b: kernels.matmul(a, b, **T), torch.matmul, [(2, 1, 2, 3), (2, 3, 2)]),
    "matmul of vectors": (lambda a, b: kernels.matmul(a, b, **T), torch.matmul, [(3,), (3,)]),
    "linear": (lambda x, w, b: kernels.linear(x, w, b, **T), F.linear, [(2, 3), (2, 3), (2,)]),
    **{
        f"linear, {name}": (
            lambda x, w, b, name=name: kernels.linear(x, w, b, activation=name, **T),
            lambda x, w, b, name=name: getattr(F, name)(F.linear(x, w, b)),
            [(2, 3), (2, 3), (2,)],
        )
        for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")
    },
    "softmax": (lambda x: kernels.softmax(x, 0, **T), lambda x: torch.softmax(x, 0), [(3, 2)]),
    "log_softmax": (lambda x: kernels.log_softmax(x, **T), lambda x: torch.log_softmax(x, -1), [(2, 3)]),
    "cross_entropy": (
        lambda x: kernels.cross_entropy(x, LABELS, label_smoothing=0.1, **T),
        lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
        [(3, 3)],
    ),
    "linear_cross_entropy": (
        lambda x, w, b: kernels.linear_cross_entropy(x, w, LABELS, b, label_smoothing=0.1, **T),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), LABELS, label_smoothing=0.1),
        [(3, 2), (3, 2), (3,)],
    ),
}
every_function = pytest.mark.parametrize(("ours", "theirs", "shapes"), PUBLIC.values(), ids=PUBLIC)


def _operands(shapes, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(**options) for shape in shapes)


@every_function
def test_gradcheck(ours, theirs, shapes):
    flags = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(ours, _operands(shapes), **flags)


@every_function
def test_gradgradcheck(ours, theirs, shapes):
    flags = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "check_batched_grad": True}
    assert gradgradcheck(ours, _operands(shapes), **flags)


# The other ways in which torch meets an operator.


@every_function
def test_gradients_are_of_the_operands_that_ask(ours, theirs, shapes):
    for asked in itertools.product([False, True], repeat=len(shapes)):
        if not any(asked):
            continue
        found, expected = [], []
        for function, gradients in ((ours, found), (theirs, expected)):
            operands = [x.detach().requires_grad_(ask) for x, ask in zip(_operands(shapes), asked, strict=True)]
            function(*operands).sin().sum().backward()
            gradients += [x.grad for x in operands]
        assert [grad is not None for grad in found] == list(asked)
        for ours_grad, theirs_grad in zip(found, expected, strict=True):
            if ours_grad is not None:
                torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-12, atol=1e-12)


class _Counted(TorchDispatchMode):
    """The operators of triton_kernels that are called, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "triton_kernels":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("asked", "products"), [((True, True), 2), ((True, False), 1), ((False, True), 1)])
def test_no_product_is_computed_for_a_gradient_that_nobody_wants(asked, products):
    values = zip(_operands([(4, 3), (2, 3)]), asked, strict=True)
    x, weight = (value.detach().requires_grad_(ask) for value, ask in values)
    loss = kernels.linear(x, weight).sum()
    with _Counted() as counted:
        loss.backward()
    assert counted.names == ["product"] * products


def test_an_activation_is_one_operator_with_and_without_a_gradient():
    x, weight = _operands([(4, 3), (2, 3)])
    with _Counted() as counted:
        kernels.linear(x, weight, activation="gelu")
    assert counted.names == ["activated_pair"]
    with torch.no_grad(), _Counted() as counted:
        kernels.linear(x, weight, activation="gelu")
    assert counted.names == ["activated"]


@every_function
def test_second_derivatives_by_create_graph(ours, theirs, shapes):
    def double(function):
        operands = _operands(shapes)
        grads = torch.autograd.grad(function(*operands).sin().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), operands)

    for found, expected in zip(double(ours), double(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_function
def test_compiled_then_backward(ours, theirs, shapes):
    compiled = torch.compile(lambda *operands: ours(*operands).sin().sum(), fullgraph=True, backend="aot_eager")
    operands, expected = _operands(shapes), _operands(shapes)
    compiled(*operands).backward()
    theirs(*expected).sin().sum().backward()
    for a, b in zip(operands, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


DYNAMIC = {
    "matmul": (lambda a, b: kernels.matmul(a, b).sin().sum(), lambda size: [(size, 4, 3), (size, 3, 2)]),
    "linear": (lambda x, w: kernels.linear(x, w, activation="gelu").sum(), lambda size: [(size, 4, 3), (5, 3)]),
    "softmax": (lambda x: kernels.softmax(x, 1).sin().sum(), lambda size: [(size, 4, 3)]),
    "cross_entropy": (
        lambda x: kernels.cross_entropy(x, torch.ones(x.shape[0], dtype=torch.long)),
        lambda size: [(size, 4)],
    ),
}


@pytest.mark.parametrize(("function", "shapes"), DYNAMIC.values(), ids=DYNAMIC)
def test_one_graph_for_every_batch_size(function, shapes):
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counted)
    after = []
    for size in (7, 11, 13):
        operands = _operands(shapes(size))
        found = torch.autograd.grad(compiled(*operands), operands)
        for a, b in zip(found, torch.autograd.grad(function(*operands), operands), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        after.append(counted.frame_count)
    assert after == [after[0]] * 3


@every_function
def test_dual_numbers(ours, theirs, shapes):
    tangents = _operands([shape[::-1] for shape in shapes], requires_grad=False)

    def tangent(function):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.detach(), t.detach().reshape(x.shape))
                for x, t in zip(_operands(shapes), tangents, strict=True)
            ]
            return forward_ad.unpack_dual(function(*duals)).tangent

    expected = tangent(theirs)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(tangent(ours), expected, rtol=1e-12, atol=1e-12)


@every_function
def test_inference_mode(ours, theirs, shapes):
    with torch.inference_mode():
        operands = _operands(shapes, requires_grad=False)
        found = ours(*operands)
        assert found.is_inference()
        torch.testing.assert_close(found, theirs(*operands), rtol=1e-12, atol=1e-12)


@every_function
def test_export(ours, theirs, shapes):
    class Module(torch.nn.Module):
        def forward(self, *operands):
            return ours(*operands)

    operands = _operands(shapes, requires_grad=False)
    exported = torch.export.export(Module(), operands)
    assert "triton_kernels." in " ".join(str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*operands), theirs(*operands), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_function
def test_shapes_without_data(ours, theirs, shapes, dtype):
    operands = _operands(shapes, dtype)
    expected = theirs(*operands)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ours(*(mode.from_tensor(x) for x in operands))
    found = [fake]
    if "LABELS" not in ours.__code__.co_names:  # labels are on the CPU
        found.append(ours(*(x.detach().to("meta") for x in operands)))
    for out in found:
        assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


# The names of torch without a promise that _register.py rests on.

RELIES = f"torch {torch.__version__} changed what triton_kernels/_register.py relies on: "


def private_names():
    """What fnn and triton_kernels import or read of torch, where a part of the name begins with an underscore."""
    found = set()
    for path in [path for package in (fnn, kernels) for path in Path(package.__path__[0]).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {"torch": "torch"}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
        chains = [ast.unparse(n).split(".") for n in nodes if isinstance(n, ast.Attribute) and id(n) not in inner]
        found |= set(names.values()) | {".".join([names[c[0]], *c[1:]]) for c in chains if c[0] in names}
    graph = "torch._inductor.virtualized.V.graph"  # one only while a graph is lowered
    for here, there in ((f"{graph}.sizevars", "sizevars.SizeVarAllocator"), (graph, "graph.GraphLowering")):
        found = {name.replace(here, f"torch._inductor.{there}") for name in found}
    return [name for name in sorted(found) if any(part[0] == "_" != part[1] for part in name.split("."))]


def test_the_private_names_are_there():
    missing = []
    for name in private_names():
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing, f"torch {torch.__version__} has no longer {missing}, which fnn or triton_kernels use"


def test_forward_mode_can_be_switched():
    with _register._set_fwd_grad_enabled(False):
        assert not torch._C._is_fwd_grad_enabled(), f"{RELIES}_set_fwd_grad_enabled(False) leaves forward mode on"
        with _register._set_fwd_grad_enabled(True):
            assert torch._C._is_fwd_grad_enabled(), f"{RELIES}_set_fwd_grad_enabled(True) leaves forward mode off"


def test_a_single_level_function_is_for_one_level_and_has_both_modes():
    seen = {}

    class Twice(_register._SingleLevelFunction):
        @staticmethod
        def forward(x):
            seen["forward records"] = torch.is_grad_enabled()
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

        @staticmethod
        def jvp(ctx, tangent):
            seen["jvp has forward mode"] = torch._C._is_fwd_grad_enabled()
            seen["saved keeps its tangent"] = forward_ad.unpack_dual(ctx.saved_tensors[0], level=0).tangent is not None
            return 5 * tangent

    x = torch.ones(2, requires_grad=True)
    with _register.enable_single_level_autograd_function():
        (grad,) = torch.autograd.grad(Twice.apply(x).sum(), x)
        with forward_ad.dual_level():
            dual = Twice.apply(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
            tangent = forward_ad.unpack_dual(dual).tangent
    assert grad.tolist() == [3.0, 3.0], f"{RELIES}backward of _SingleLevelFunction is not called"
    assert tangent.tolist() == [5.0, 5.0], f"{RELIES}jvp of _SingleLevelFunction is not called"
    for what, expected in (("forward records", False), ("jvp has forward mode", False)):
        message = f"{RELIES}{what}: {seen[what]}; below_autograd and _single_level could do without their cure"
        assert seen[what] is expected, message


def test_a_redispatch_below_autograd_reaches_the_kernel():
    keysets = []
    library = torch.library.Library("probe_keyset", "DEF")
    library.define("one(Tensor x) -> Tensor")
    op = torch.ops.probe_keyset.one.default
    library.impl("one", lambda x: x + 1, "CPU")

    def autograd(keyset, x):
        keysets.append(keyset)
        return _register.below_autograd(op, keyset, x)

    library.impl("one", autograd, "Autograd", with_keyset=True)
    x = torch.zeros(2, requires_grad=True)
    out = op(x)
    assert out.tolist() == [1.0, 1.0], f"{RELIES}a redispatch below Autograd does not reach the kernel"
    assert not out.requires_grad, f"{RELIES}a redispatch below Autograd records"
    assert len(keysets) == 1, f"{RELIES}a redispatch below Autograd comes back to it"
