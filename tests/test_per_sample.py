"""Per-sample gradients, their norms and the clipped sum: against torch.func, one example at a time; their memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fnn import clipped_grad, nn, per_sample_grad, per_sample_grad_norm, random, tree

DTYPE = torch.float64


def leaf(*shape, seed=0):
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed + sum(shape)))


def cross_entropy(logits, label):
    return F.cross_entropy(logits, label)


def network(net, x, classes=3, seed=0):
    params, state = net.init(random.key(seed), x)
    labels = torch.arange(x.shape[0]) % classes

    def loss(params, x, label):
        return cross_entropy(net.apply(params, state, x[None])[0][0], label)

    return loss, params, (x, labels)


def mlp():
    return network(nn.Sequential(nn.Linear(5), nn.tanh, nn.Linear(4), nn.LayerNorm(), nn.Linear(3)), leaf(4, 6))


def convnet():
    net = nn.Sequential(
        nn.Conv2d(4, 3, padding="same"), nn.BatchNorm(), nn.relu, nn.Conv2d(6, 2, stride=2, groups=2), nn.tanh,
        nn.Flatten(), nn.Linear(3),
    )  # fmt: skip
    return network(net, leaf(4, 2, 6, 6))


def attention():
    """Tokens, tied embedding and head, two heads, a norm: T positions per example."""
    params = {
        "embedding": leaf(40, 4),
        "qkv": leaf(12, 4),
        "out": leaf(4, 4),
        "scale": leaf(4),
        "shift": leaf(4, seed=5),
    }
    tokens = torch.tensor([[1, 2, 1], [5, 0, 39], [7, 7, 7], [4, 2, 0]])

    def loss(p, tokens):
        h = F.embedding(tokens, p["embedding"])
        q, k, v = F.linear(F.layer_norm(h, (4,), p["scale"], p["shift"]), p["qkv"]).reshape(-1, 3, 2, 2).unbind(1)
        weights = torch.softmax(torch.einsum("thd,shd->hts", q, k), -1)
        h = h + torch.einsum("hts,shd->thd", weights, v).reshape(-1, 4) @ p["out"].t()
        return F.cross_entropy(F.linear(h, p["embedding"])[:-1], tokens[1:])

    return loss, params, (tokens,)


def wide():
    """Layers much wider than the sequence, so that norms come from Gram matrices."""
    params = {"a": leaf(9, 7), "b": leaf(9), "c": leaf(9, 8), "conv": leaf(8, 8, 1)}

    def loss(p, x, y):
        h = torch.tanh(F.linear(x["sequence"], p["a"], p["b"])) @ p["c"]
        return (F.conv1d(h.mT, p["conv"]).mT.sum() - y).square() * x["weight"]

    return loss, params, ({"sequence": leaf(4, 2, 7), "weight": leaf(4).abs()}, leaf(4, seed=1))


def penalised():
    loss, params, batch = mlp()
    return lambda p, *example: loss(p, *example) + 0.1 * p["0"]["weight"].square().sum(), params, batch


PROBLEMS = {f.__name__: f for f in (mlp, convnet, attention, wide, penalised)}


def reference(loss, params, batch):
    """Gradients one example at a time, and their norms."""
    size = tree.leaves(batch)[0].shape[0]
    examples = [tree.map(lambda x, i=i: x[i], batch) for i in range(size)]
    rows = [torch.func.grad(loss)(params, *example) for example in examples]
    grads = tree.map(lambda *parts: torch.stack(parts), *rows)
    return grads, torch.cat([g.flatten(1) for g in tree.leaves(grads)], 1).norm(dim=1)


# the penalised problem has all of the plain one
CELLS = [(name, False) for name in PROBLEMS] + [
    pytest.param(name, True, marks=() if name == "wide" else pytest.mark.slow) for name in PROBLEMS if name != "mlp"
]


@pytest.mark.parametrize(("name", "compiled"), CELLS)
def test_gradients_norms_and_clipped_sum(name, compiled, fast_compile):
    loss, params, batch = PROBLEMS[name]()
    grads, norms = reference(loss, params, batch)
    bound = norms.median().item()

    def derivatives(params, *batch):
        return per_sample_grad_norm(loss)(params, *batch), clipped_grad(loss, bound, norms=True)(params, *batch)

    if not compiled:
        assert tree.allclose(per_sample_grad(loss)(params, *batch), grads, rtol=1e-10, atol=1e-12)
    got, (clipped, before) = (torch.compile(derivatives, fullgraph=True) if compiled else derivatives)(params, *batch)
    torch.testing.assert_close(got, norms, rtol=1e-10, atol=0)
    torch.testing.assert_close(before, norms, rtol=1e-10, atol=0)
    factors = torch.clamp(bound / norms, max=1)
    assert 0 < (factors < 1).sum() < len(factors)
    expected = tree.map(lambda g: torch.tensordot(factors, g, 1), grads)
    assert tree.allclose(clipped, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_chunks_change_nothing(size):
    loss, params, batch = mlp()
    assert tree.allclose(
        per_sample_grad(loss, chunk_size=size)(params, *batch), per_sample_grad(loss)(params, *batch), rtol=1e-12
    )
    torch.testing.assert_close(
        per_sample_grad_norm(loss, chunk_size=size)(params, *batch), per_sample_grad_norm(loss)(params, *batch)
    )
    assert tree.allclose(
        clipped_grad(loss, 0.5, chunk_size=size)(params, *batch), clipped_grad(loss, 0.5)(params, *batch), rtol=1e-10
    )


def test_aux_and_argnums():
    loss, params, (x, y) = mlp()
    with_aux = lambda p, x, y: (loss(p, x, y), {"x": 2 * x})
    for f in (
        per_sample_grad(with_aux, has_aux=True),
        per_sample_grad_norm(with_aux, has_aux=True),
        clipped_grad(with_aux, 1.0, has_aux=True, chunk_size=3),
    ):
        torch.testing.assert_close(f(params, x, y)[1]["x"], 2 * x)
    inputs = per_sample_grad(loss, argnums=1)(params, x, y)
    total = torch.func.grad(lambda x: torch.vmap(loss, (None, 0, 0))(params, x, y).sum())(x)
    torch.testing.assert_close(inputs, total)  # examples do not share inputs


def test_an_ensemble_under_vmap():
    loss, params, batch = mlp()
    many = tree.map(lambda x: torch.stack([x, -x]), params)
    got = torch.vmap(per_sample_grad_norm(loss), (0, None, None))(many, *batch)
    want = [reference(loss, tree.map(lambda x, i=i: x[i], many), batch)[1] for i in range(2)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=0)


def test_the_norm_is_differentiable():
    loss, params, batch = mlp()
    got = torch.func.grad(lambda p: per_sample_grad_norm(loss)(p, *batch).sum())(params)

    def explicit(p):
        rows = torch.vmap(torch.func.grad(loss), (None, 0, 0))(p, *batch)
        return torch.cat([g.flatten(1) for g in tree.leaves(rows)], 1).norm(dim=1).sum()

    assert tree.allclose(got, torch.func.grad(explicit)(params), rtol=1e-9, atol=1e-12)


def test_a_zero_gradient():
    loss = lambda p, x: (F.linear(x, p["w"])).sum() * 0
    params, x = {"w": leaf(2, 3)}, leaf(4, 3)
    assert per_sample_grad_norm(loss)(params, x).tolist() == [0] * 4
    assert torch.func.grad(lambda p: per_sample_grad_norm(loss)(p, x).sum())(params)["w"].abs().max() == 0
    assert clipped_grad(loss, 1.0)(params, x)["w"].abs().max() == 0


def test_float32_is_as_exact_as_torch():
    loss, params, batch = mlp()
    exact = reference(loss, params, batch)[1]
    single = tree.map(lambda x: x.float(), params)
    got = per_sample_grad_norm(loss)(single, batch[0].float(), batch[1])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_squares_of_half_precision_do_not_overflow(dtype, chunk_size):
    """In a bias, in a weight by its whole gradient, and in a weight by its factors."""

    def loss(p, x):
        return (p["b"] * x).sum() + F.linear(x[:1], p["whole"]).sum() + F.linear(x, p["w"]).sum()

    half = {"b": leaf(3).to(dtype), "whole": leaf(1, 1).to(dtype), "w": leaf(9, 3).to(dtype)}
    x = torch.tensor([[200.0, 300.0, 100.0], [0.001, 0.002, 0.001]]).to(dtype)
    grads, norms = reference(loss, tree.map(lambda p: p.double(), half), (x.double(),))
    bound = 0.01
    factors = torch.clamp(bound / norms, max=1)
    clipped, lengths = clipped_grad(loss, bound, norms=True, chunk_size=chunk_size)(half, x)
    for got in (lengths, per_sample_grad_norm(loss, chunk_size=chunk_size)(half, x)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), norms, rtol=1e-2, atol=0)
    for name, g in grads.items():
        assert clipped[name].dtype == dtype
        torch.testing.assert_close(clipped[name].double(), torch.tensordot(factors, g, 1), rtol=1e-2, atol=0)


def not_scalar(p, x, y):
    return (p["w"] @ x).square()


PROBLEM = ({"w": torch.ones(2, 3)}, torch.ones(4, 3), torch.ones(4))


def test_the_gradient_of_norms_is_right_with_the_layer_norm_of_torch():
    """Torch's own nesting takes the mean and the deviation for constants."""
    params = {"w": leaf(4, 3), "scale": leaf(4), "shift": leaf(4, seed=5)}
    x = leaf(3, 3, seed=9)

    def loss(norm):
        return lambda p, x: norm(F.linear(x, p["w"]).tanh(), p["scale"], p["shift"]).sin().sum()

    def written_out(h, scale, shift):
        centred = h - h.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * scale + shift

    of_torch, want = loss(lambda h, *affine: F.layer_norm(h, (4,), *affine)), loss(written_out)
    for derivative in (
        lambda loss: lambda p: per_sample_grad_norm(loss)(p, x).sum(),
        lambda loss: lambda p: tree.leaves(per_sample_grad(loss)(p, x))[-1].square().sum(),
        lambda loss: lambda p: tree.leaves(clipped_grad(loss, 0.5)(p, x))[-1].square().sum(),
    ):
        grads = torch.func.grad(derivative(want))(params)
        assert tree.allclose(torch.func.grad(derivative(of_torch))(params), grads, rtol=1e-9, atol=1e-11)
        recorded = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
        derivative(of_torch)(recorded).backward()
        assert tree.allclose(tree.map(lambda leaf: leaf.grad, recorded), grads, rtol=1e-9, atol=1e-11)


WRONG = {
    "must be a scalar, got shape (2,)": (not_scalar, PROBLEM),
    "must be a scalar tensor, got float": (lambda p, x, y: 0.0, PROBLEM),
    "did you mean has_aux=True": (lambda p, x, y: ((p["w"] @ x).sum(), x), PROBLEM),
    "argument 2 has 3 examples, but argument 1 has 4": (not_scalar, (*PROBLEM[:2], torch.ones(3))),
    "leaf 'a' of argument 1 is a scalar": (not_scalar, (PROBLEM[0], {"a": torch.ones(())}, PROBLEM[2])),
    "argument 1 has no examples": (not_scalar, (PROBLEM[0], torch.ones(0, 3), torch.ones(0))),
    "called without a batch": (not_scalar, PROBLEM[:1]),
    "leaf 'w' of argument 0 is torch.int64": (not_scalar, ({"w": torch.ones(2, 3).long()}, *PROBLEM[1:])),
}


@pytest.mark.parametrize("transform", [per_sample_grad, per_sample_grad_norm, lambda f: clipped_grad(f, 1.0)])
@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_came(message, transform):
    loss, arguments = WRONG[message]
    with pytest.raises((ValueError, TypeError)) as error:
        transform(loss)(*arguments)
    assert message in str(error.value)


def test_other_errors():
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clipped_grad(not_scalar, 0.0)
    with pytest.raises(TypeError, match="already compiled"):
        per_sample_grad_norm(torch.compile(not_scalar))


MEASURED = """
import torch
from fnn import ops
from fnn import per_sample_grad_norm
import torch.nn.functional as F
torch.manual_seed(0)
sizes = (784, 512, 512, 10)
params = [{"w": torch.randn(b, a) / a**0.5, "b": torch.zeros(b)} for a, b in zip(sizes, sizes[1:])]
def loss(params, x, y):
    for layer in params[:-1]:
        x = torch.tanh(ops.linear(x, layer["w"], layer["b"]))
    return F.cross_entropy(ops.linear(x, params[-1]["w"], params[-1]["b"]), y)
norms = per_sample_grad_norm(loss)
x, y = torch.randn(1024, 784), torch.randint(0, 10, (1024,))
def peak():  # of this process alone: the maximum of getrusage begins with that of the process that started it
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
norms(params, x[:2], y[:2])
before = peak()
norms(params, x, y)
gradients = 1024 * 4 * sum(leaf.numel() for layer in params for leaf in layer.values())
print(gradients / (peak() - before))
"""


@pytest.mark.slow
def test_norms_need_a_fiftieth_of_the_gradients_memory():
    run = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 50
