"""jacobian and hessian: closed forms, trees, modes, chunks within a budget of memory, complex numbers, bad input."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import rosen_der, rosen_hess

import fnn
from fnn import diff, nn, tree

X = torch.tensor([1.3, 0.7, 0.8, 1.9], dtype=torch.float64)
MODES = ("auto", "fwd", "rev")


def eager(f):
    return f


def compiled(f):
    return torch.compile(f, fullgraph=True)


def batched(options):
    """`f -> x -> J(x)` through batched=True, from two samples."""
    return lambda transform, f: (
        lambda x: tree.map(lambda leaf: leaf[0], transform(f, batched=True, **options)(torch.stack([x, x + 1])))
    )


def vmapped(options):
    return lambda transform, f: (
        lambda x: tree.map(lambda leaf: leaf[0], torch.vmap(transform(f, **options))(torch.stack([x, x + 1])))
    )


def single(options):
    return lambda transform, f: transform(f, **options)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def wood(x):
    a, b, c, d = x
    cross = 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)
    return 100 * (a**2 - b) ** 2 + (a - 1) ** 2 + 90 * (c**2 - d) ** 2 + (c - 1) ** 2 + cross


def wood_hessian(x):
    a, b, c, d = x.tolist()
    return torch.tensor(
        [
            [1200 * a**2 - 400 * b + 2, -400 * a, 0, 0],
            [-400 * a, 220.2, 0, 19.8],
            [0, 0, 1080 * c**2 - 360 * d + 2, -360 * c],
            [0, 19.8, -360 * c, 200.2],
        ],
        dtype=torch.float64,
    )


W1 = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(5, 4).sin()
W2 = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5).cos()


def network(x):
    return fnn.ops.linear(torch.tanh(fnn.ops.linear(x, W1)), W2)


def network_jacobian(x):
    return W2 @ torch.diag(1 - torch.tanh(W1 @ x) ** 2) @ W1


def softmax_jacobian(x):
    p = torch.softmax(x, 0)
    return torch.diag(p) - p[:, None] * p


@pytest.mark.parametrize("form", [single, pytest.param(vmapped, marks=pytest.mark.slow), batched])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_jacobians_in_closed_form(form, mode, chunk_size, fast_compile):
    options = {"mode": mode, "chunk_size": chunk_size}
    for f, want in ((network, network_jacobian), (lambda x: torch.softmax(x, 0), softmax_jacobian)):
        torch.testing.assert_close(form(options)(diff.jacobian, f)(X), want(X))
    torch.testing.assert_close(compiled(form(options)(diff.jacobian, network))(X), network_jacobian(X))
    value, got = form(options | {"value": True, "flat": True})(diff.jacobian, rosenbrock)(X)
    torch.testing.assert_close((value, got[0]), (rosenbrock(X), torch.as_tensor(rosen_der(X.numpy()))))


@pytest.mark.parametrize("form", [single, pytest.param(vmapped, marks=pytest.mark.slow), batched])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_hessians_in_closed_form(form, mode, chunk_size, fast_compile):
    options = {"mode": mode, "chunk_size": chunk_size}
    torch.testing.assert_close(form(options)(diff.hessian, wood)(X), wood_hessian(X))
    value, got = form(options | {"value": True, "flat": True})(diff.hessian, rosenbrock)(X)
    want = torch.as_tensor(rosen_hess(X.numpy()))
    torch.testing.assert_close((value, got), (rosenbrock(X), want))
    if mode == "fwd" and form is not single:
        return  # torch cannot compile forward over reverse mode under vmap (2.11 to 2.15)
    torch.testing.assert_close(compiled(form(options)(diff.hessian, rosenbrock))(X), want)


def test_the_diagonal_of_a_quadratic_form_and_higher_derivatives(fast_compile):
    a = W1[:4] + W1[:4].T
    torch.testing.assert_close(diff.hessian(lambda x: x @ a @ x / 2)(X), a)
    third = diff.jacobian(diff.jacobian(diff.jacobian(lambda x: x**3)))
    for way in (eager, compiled):
        got = way(third)(X)
        assert got.shape == (4, 4, 4, 4)
        torch.testing.assert_close(got.sum((1, 2, 3)), torch.full((4,), 6.0, dtype=torch.float64))
    twice = diff.jacobian(diff.jacobian(network, mode="fwd"), mode="rev")(X)
    h = torch.tanh(W1 @ X)
    want = torch.einsum("ok,k,ki,kj->oij", W2, -2 * h * (1 - h**2), W1, W1)
    torch.testing.assert_close(twice, want)
    gradient_of_jacobian = diff.grad(lambda x: diff.jacobian(network, chunk_size=2)(x).sum())(X)
    torch.testing.assert_close(gradient_of_jacobian, want.sum((0, 1)))


def of_trees(p, s, *, power):
    return {"y": (p["a"] * s[0]) ** power, "z": [p["a"].sum() * p["b"]]}, {"aux": p["a"] + 1}


@pytest.mark.parametrize(
    ("way", "mode", "chunk_size"),
    [(eager, mode, chunk_size) for mode in MODES for chunk_size in (None, 3)]
    + [(compiled, "fwd", None), pytest.param(compiled, "rev", 6, marks=pytest.mark.slow)],
)
def test_trees_of_two_dtypes(way, mode, chunk_size, fast_compile):
    p = {"a": W1[:2, :2], "b": torch.tensor([1.0, 2.0, 3.0])}
    s = (torch.tensor(2.0, dtype=torch.float64),)
    options = {"argnums": (0, 1), "mode": mode, "chunk_size": chunk_size, "has_aux": True, "value": True}
    (output, aux), got = way(diff.jacobian(of_trees, **options))(p, s, power=2)
    torch.testing.assert_close((output, aux), of_trees(p, s, power=2))
    by_p, by_s = got["y"]
    eye = torch.eye(4, dtype=torch.float64).reshape(2, 2, 2, 2)
    torch.testing.assert_close(by_p["a"], 8 * p["a"][:, :, None, None] * eye)
    torch.testing.assert_close(by_p["b"], torch.zeros(2, 2, 3, dtype=torch.float64))
    torch.testing.assert_close(by_s[0], 4 * p["a"] ** 2)
    by_p, by_s = got["z"][0]
    torch.testing.assert_close(by_p["a"], p["b"].double()[:, None, None].expand(3, 2, 2))
    torch.testing.assert_close(by_p["b"], p["a"].sum().float() * torch.eye(3))
    torch.testing.assert_close(by_s[0], torch.zeros(3, dtype=torch.float64))
    _, matrix = diff.jacobian(of_trees, flat=True, **options)(p, s, power=2)
    assert matrix.shape == (7, 8)
    torch.testing.assert_close(diff.unravel_jacobian(matrix, output, (p, s)), got)


def test_leaves_without_elements_and_scalars():
    def f(p):
        return {"s": p["b"].sum(), "e": p["a"], "v": torch.stack([p["c"], p["c"] ** 2])}

    p = {"a": torch.zeros(0, 3), "b": torch.ones(2), "c": torch.tensor(3.0)}
    for mode in MODES:
        for chunk_size in (None, 1):
            got = diff.jacobian(f, mode=mode, chunk_size=chunk_size)(p)
            assert got["e"]["a"].shape == (0, 3, 0, 3)
            assert got["e"]["b"].shape == (0, 3, 2)
            torch.testing.assert_close(got["s"]["b"], torch.ones(2))
            torch.testing.assert_close(got["v"]["c"], torch.tensor([1.0, 6.0]))
            assert diff.jacobian(f, mode=mode, chunk_size=chunk_size, flat=True)(p).shape == (3, 3)
        assert diff.jacobian(lambda x: x.sum().expand(2), mode=mode)(torch.zeros(0)).shape == (2, 0)
        assert diff.jacobian(lambda x: x[:0], mode=mode, flat=True)(torch.zeros(2)).shape == (0, 2)
    assert diff.hessian(lambda x: x**2)(torch.tensor(1.0)) == 2


def test_the_mode_is_chosen_by_the_sizes(monkeypatch):
    from fnn.diff import _jacobian

    calls = []
    forward = _jacobian.pushforward
    monkeypatch.setattr(_jacobian, "pushforward", lambda *args: calls.append("fwd") or forward(*args))
    for outputs, mode in ((2, []), (6, []), (7, ["fwd"])):
        calls.clear()
        diff.jacobian(lambda x, n=outputs: x.sum() * torch.arange(n))(X)
        assert calls == mode


def test_the_seeds_of_a_batch_are_shared(monkeypatch):
    """The product of the identity and the last weight does not depend on the sample and is computed once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in str(func):
                self.size = max(self.size, args[0].numel())
            return func(*args, **(kwargs or {}))

    weight = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        diff.jacobian(lambda x: weight @ x, batched=True)(torch.ones(50, 4, dtype=torch.float64))
    assert seen.size <= 200


def test_a_layer_a_module_and_attention_are_functions(fast_compile):
    x = torch.linspace(-1, 1, 3)
    layer = nn.Linear(2)
    params, _ = layer.init(fnn.random.key(0), x)
    got = diff.jacobian(layer, argnums=(0, 1))(params, x)
    torch.testing.assert_close(got[0]["weight"], torch.einsum("ab,c->abc", torch.eye(2), x))
    torch.testing.assert_close(got[0]["bias"], torch.eye(2))
    torch.testing.assert_close(got[1], params["weight"])
    per_sample = torch.vmap(diff.jacobian(layer), (None, 0))(params, torch.stack([x, 2 * x]))
    torch.testing.assert_close(per_sample["weight"][1], 2 * got[0]["weight"])
    module = torch.nn.Linear(3, 2)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    got = diff.jacobian(lambda p: torch.func.functional_call(module, p, x))(weights)
    torch.testing.assert_close(got["bias"], torch.eye(2))

    def attention(q):
        return F.scaled_dot_product_attention(q, 2 * q, q.sin()).pow(2).sum()

    def plain(q):
        return (torch.softmax(q @ q.mT, -1) @ q.sin()).pow(2).sum()

    q = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4)
    want = diff.hessian(plain, flat=True)(q)
    for mode in ("fwd", "rev"):
        for way in (eager, compiled):
            torch.testing.assert_close(way(diff.hessian(attention, flat=True, mode=mode))(q), want)


Z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)


def test_complex_derivatives(fast_compile):
    for mode in ("fwd", "rev"):
        for way in (eager, compiled):
            got = way(diff.jacobian(lambda z: 1j * z**2, holomorphic=True, mode=mode))(Z)
            torch.testing.assert_close(got, torch.diag(2j * Z))
        got = diff.jacobian(lambda z: z.exp(), holomorphic=True, mode=mode, batched=True)(Z[None])
        torch.testing.assert_close(got[0], torch.diag(Z.exp()))
        got = diff.hessian(lambda z: (z**3).prod(), holomorphic=True, mode=mode)(Z)
        a, b = Z
        want = torch.stack([6 * a * b**3, 9 * a**2 * b**2, 9 * a**2 * b**2, 6 * a**3 * b]).reshape(2, 2)
        torch.testing.assert_close(got, want)
    for chunk_size in (None, 1):
        wave = diff.jacobian(lambda x: torch.exp(1j * x), chunk_size=chunk_size)(X)
        torch.testing.assert_close(wave, torch.diag(1j * torch.exp(1j * X)))


@pytest.mark.parametrize("form", [single, batched])
def test_chunks_are_the_whole(form):
    for mode in MODES:
        for flat in (False, True):
            want = form({"mode": mode, "flat": flat})(diff.jacobian, network)(X)
            for chunk_size in (1, 2, 3, 9):
                options = {"mode": mode, "flat": flat, "chunk_size": chunk_size}
                got = form(options)(diff.jacobian, network)(X)
                torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def wide(p, x):
    return fnn.ops.linear(torch.tanh(fnn.ops.linear(x, p["w1"])), p["w2"])


def wide_params(outputs, hidden, inputs):
    return {"w1": torch.ones(hidden, inputs) / inputs, "w2": torch.ones(outputs, hidden) / hidden}


@pytest.mark.parametrize("options", [{}, {"flat": True}, {"mode": "fwd"}, {"batched": True, "argnums": 1}])
def test_auto_chunks_keep_the_budget(options):
    from fnn.diff._chunk import LiveBytes

    p, x = wide_params(60, 20, 20), torch.ones(4, 20) if "batched" in options else torch.ones(20)
    want = diff.jacobian(wide, **options)(p, x)
    result = sum(leaf.nbytes for leaf in tree.leaves(want))
    for budget in (result // 3, result // 2):
        with LiveBytes() as memory:
            got = diff.jacobian(wide, chunk_size="auto", budget=budget, **options)(p, x)
        torch.testing.assert_close(got, want)
        assert result < memory.peak <= result + 1.2 * budget
        assert memory.peak >= result + 0.5 * budget


def test_auto_chunk_size():
    p, x = wide_params(60, 20, 20), torch.ones(20)
    sizes = [diff.auto_chunk_size(wide, p, x, budget=b) for b in (1, 50_000, 100_000, 10**9)]
    assert sizes[0] == 1
    assert 1.8 < sizes[2] / sizes[1] < 2.4
    assert sizes[3] == 60
    assert sizes == [diff.auto_chunk_size(wide, p, x, budget=b) for b in (1, 50_000, 100_000, 10**9)]
    hessian = diff.hessian(rosenbrock, chunk_size="auto", budget=1)(X)
    torch.testing.assert_close(hessian, torch.as_tensor(rosen_hess(X.numpy())))


MEASURE = """
import json, resource, sys, torch
from fnn import diff, ops
outputs, hidden, inputs, budget = map(int, sys.argv[1:])
torch.set_num_threads(1)
def f(p, x):
    return ops.linear(torch.tanh(ops.linear(x, p["w1"], p["b1"])), p["w2"], p["b2"])
def network(o, h, i):
    return {"w1": torch.ones(h, i) / i, "b1": torch.zeros(h), "w2": torch.ones(o, h) / h, "b2": torch.zeros(o)}
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
diff.jacobian(f, chunk_size="auto", budget=10_000)(network(8, 8, 8), torch.ones(8))
params, before = network(outputs, hidden, inputs), peak()
matrix = diff.jacobian(f, chunk_size="auto", budget=budget, flat=True)(params, torch.ones(inputs))
print(json.dumps({"result": matrix.nbytes, "budget": budget, "grown": peak() - before}))
"""


def memory_of_auto_chunks(outputs, hidden, inputs, budget):
    """By how many bytes the peak of a fresh process grows, and the bytes of the result and of the budget."""
    command = [sys.executable, "-c", MEASURE, *map(str, (outputs, hidden, inputs, budget))]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_memory_of_1024_outputs_and_100000_parameters():
    budget = 64 * 2**20
    figures = memory_of_auto_chunks(1024, 90, 74, budget)
    assert figures["result"] == 1024 * 99_934 * 4
    assert figures["grown"] < 1.2 * (figures["result"] + budget)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: diff.jacobian(torch.sin, mode="reverse"), ValueError, '"auto", "fwd" or "rev", got \'reverse\''),
        (lambda: diff.jacobian(torch.sin, chunk_size=0), ValueError, "positive int, got 0"),
        (lambda: diff.hessian(torch.sin, chunk_size=True), ValueError, "positive int, got True"),
        (lambda: diff.jacobian(torch.sin, budget=0), ValueError, "budget must be"),
        (lambda: diff.jacobian(torch.compile(torch.sin)), TypeError, "compile the outside"),
        (lambda: diff.hessian(X), TypeError, "takes the function first"),
        (lambda: diff.hessian(torch.sin)(X), ValueError, r"shape \(4,\)"),
        (lambda: diff.jacobian(torch.sin)(torch.arange(3)), TypeError, "int64"),
        (lambda: diff.jacobian(lambda x: (x, 1))(X), TypeError, "leaf '1' of the output is int.*has_aux"),
        (lambda: diff.jacobian(torch.sin)(Z), TypeError, "complex128.*holomorphic=True.*view_as_real"),
        (lambda: diff.jacobian(torch.sin, holomorphic=True)(X), TypeError, "holomorphic=True needs complex"),
        (lambda: diff.jacobian(lambda x: x * 1j, mode="rev")(X), TypeError, 'mode="fwd"'),
        (lambda: diff.jacobian(lambda z: z.abs(), holomorphic=True)(Z), TypeError, "real.*holomorphic"),
        (lambda: diff.jacobian(torch.sin, batched=True)(X[0]), ValueError, "leading axis"),
        (
            lambda: diff.jacobian(lambda p: p["a"] * p["b"], batched=True)({"a": X, "b": X[:3]}),
            ValueError,
            r"leaf 'b'.*\(3,\).*\(4,\)",
        ),
        (lambda: diff.jacobian(lambda x: x if x[0] > 0 else -x, batched=True)(X[:, None]), RuntimeError, "torch.where"),
        (lambda: diff.jacobian(lambda x: x * x[0].item(), batched=True)(X[:, None]), RuntimeError, "torch.where"),
        (lambda: diff.jacobian(lambda x: x[x > 0], batched=True)(X[:, None]), RuntimeError, "torch.where"),
        (lambda: diff.jacobian(F.dropout, batched=True)(X[:, None]), RuntimeError, "fnn.random"),
        (lambda: diff.jacobian(F.dropout)(X), TypeError, "fnn.random"),
        (lambda: torch.vmap(diff.jacobian(torch.sin, chunk_size="auto"))(X[:, None]), ValueError, "auto_chunk_size"),
        (lambda: diff.unravel_jacobian(torch.eye(3), X, X), ValueError, r"\(\.\.\., 4, 4\), got \(3, 3\)"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_auto_is_refused_while_compiling(fast_compile):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="auto_chunk_size"):
        compiled(diff.jacobian(torch.sin, chunk_size="auto"))(X)


@pytest.mark.slow
def test_inductor():
    def several(x):
        reverse, forward = diff.jacobian(network), diff.jacobian(network, mode="fwd")
        rows = diff.jacobian(network, batched=True, chunk_size=2)(torch.stack([x, x + 1]))
        return reverse(x), forward(x), rows[1], diff.hessian(rosenbrock)(x)

    want = network_jacobian(X), network_jacobian(X), network_jacobian(X + 1), torch.as_tensor(rosen_hess(X.numpy()))
    torch.testing.assert_close(compiled(several)(X), want)
