"""Every derivative of four small networks equals what JAX, Opacus and curvlinops give: eager, compiled, vmapped."""

import subprocess
import sys

import pytest
import torch
from derivative_models import CURVATURE, DERIVATIVES, NAMES, PROBE, Model, check, vector

import fnn
from fnn import tree

MODELS = {name: Model(name) for name in NAMES}


def with_custom_vjp(m):
    """The network with a rule of its own, which is right."""
    f = fnn.custom_vjp(m.batched)
    f.defvjp(lambda p, x: (m.batched(p, x), (p, x)), lambda saved, w: fnn.vjp(m.batched, *saved)[1](w))
    return f


def with_custom_jvp(m):
    f = fnn.custom_jvp(m.batched)
    f.defjvp(lambda primals, tangents: fnn.jvp(m.batched, primals, tangents))
    return f


# A compiled function must find these made.
CUSTOM_VJP = {name: with_custom_vjp(m) for name, m in MODELS.items()}
CUSTOM_JVP = {name: with_custom_jvp(m) for name, m in MODELS.items()}
REMAT = {name: fnn.remat(m.batched) for name, m in MODELS.items()}


def loss_of(rules, m):
    """The mean loss through one of these."""
    return lambda p: m.loss_of_logits(rules[m.name](p, m.x))


def hessian_operator(m, p):
    return fnn.HessianOperator(m.mean_loss, p)


def ggn_operator(m, p):
    return fnn.GGNOperator(m.batched, fnn.losses.cross_entropy, p, m.x, m.labels)


def fisher_operator(m, p, kind):
    return fnn.FisherOperator(m.batched, p, m.x, m.labels, kind=kind)


def times_probe(operator):
    return operator @ PROBE[: operator.shape[1]]


# One line a derivative: what is recorded, and how it is asked for at the parameters `p` of the model `m`.
CELLS = {
    "grad": ("grad", lambda m, p: vector(fnn.grad(m.mean_loss)(p))),
    "value_and_grad": ("grad", lambda m, p: vector(fnn.value_and_grad(m.mean_loss)(p)[1])),
    "value": ("loss", lambda m, p: fnn.value_and_grad(m.mean_loss)(p)[0]),
    "jvp": ("jvp", lambda m, p: fnn.jvp(m.batched, (p, m.x), (m.v, m.u))[1]),
    "linearize": ("jvp", lambda m, p: fnn.linearize(m.batched, p, m.x)[1](m.v, m.u)),
    "vjp of params": ("vjp_params", lambda m, p: vector(fnn.vjp(m.batched, p, m.x)[1](m.w)[0])),
    "vjp of inputs": ("vjp_x", lambda m, p: fnn.vjp(m.batched, p, m.x)[1](m.w)[1]),
    "jacobian of params": (
        "jacobian_params",
        lambda m, p: fnn.jacobian(m.batched, flat=True)(p, m.x).unflatten(0, (len(m.x), -1)),
    ),
    "jacobian by trees": ("jacobian_params", lambda m, p: vector(fnn.jacobian(m.batched)(p, m.x), lead=2)),
    "jacobian of inputs": ("jacobian_x", lambda m, p: fnn.jacobian(m.f, 1, flat=True, batched=True)(p, m.x)),
    "jacobian forward": (
        "jacobian_x",
        lambda m, p: fnn.jacobian(m.f, 1, mode="fwd", batched=True, chunk_size=70)(p, m.x).flatten(2),
    ),
    "hessian": ("hessian", lambda m, p: fnn.hessian(m.mean_loss, flat=True)(p)),
    "hessian forward": ("hessian", lambda m, p: fnn.hessian(m.mean_loss, flat=True, mode="fwd", chunk_size=80)(p)),
    "hessian of inputs": ("hessian_x", lambda m, p: fnn.hessian(m.first(p), batched=True)(m.flat_x)),
    "hvp": ("hvp", lambda m, p: vector(fnn.hvp(m.mean_loss, p, m.v))),
    "gnvp": ("gnvp", lambda m, p: vector(fnn.gnvp(lambda p: m.batched(p, m.x), m.loss_of_logits, p, m.v))),
    "per_sample_grad": ("per_sample_grad", lambda m, p: vector(fnn.per_sample_grad(m.loss)(p, m.x, m.labels), lead=1)),
    "per_sample_grad_norm": ("per_sample_grad_norm", lambda m, p: fnn.per_sample_grad_norm(m.loss)(p, m.x, m.labels)),
    "clipped_grad": ("clipped_grad", lambda m, p: vector(fnn.clipped_grad(m.loss, m.bound)(p, m.x, m.labels))),
    "ntk": ("ntk", lambda m, p: fnn.ntk(m.f, p, m.x, m.x2)),
    "ntk by contraction": ("ntk", lambda m, p: fnn.ntk(m.f, p, m.x, m.x2, method="contraction")),
    "ntk by products": ("ntk", lambda m, p: fnn.ntk(m.f, p, m.x, m.x2, method="products")),
    "ntk by structure": ("ntk", lambda m, p: fnn.ntk(m.f, p, m.x, m.x2, method="structured")),
    "laplacian": ("laplacian", lambda m, p: torch.vmap(fnn.laplacian(m.first(p)))(m.flat_x)),
    "laplacian by products": (
        "laplacian",
        lambda m, p: torch.vmap(fnn.laplacian(m.first(p), method="products"))(m.flat_x),
    ),
    "divergence": ("divergence", lambda m, p: torch.vmap(fnn.divergence(m.field(p)))(m.flat_x)),
    "diagonal of params": ("diagonal", lambda m, p: vector(fnn.hessian_diagonal(m.mean_loss)(p))),
    "diagonal of inputs": ("diagonal_x", lambda m, p: torch.vmap(fnn.hessian_diagonal(m.first(p)))(m.flat_x)),
    "bilaplacian": ("bilaplacian", lambda m, p: torch.vmap(fnn.bilaplacian(m.first(p)))(m.flat_x)),
    "custom_vjp": ("grad", lambda m, p: vector(fnn.grad(loss_of(CUSTOM_VJP, m))(p))),
    "hvp of custom_vjp": ("hvp", lambda m, p: vector(fnn.hvp(loss_of(CUSTOM_VJP, m), p, m.v))),
    "custom_jvp": ("grad", lambda m, p: vector(fnn.grad(loss_of(CUSTOM_JVP, m))(p))),
    "hvp of custom_jvp": ("hvp", lambda m, p: vector(fnn.hvp(loss_of(CUSTOM_JVP, m), p, m.v))),
    "remat": ("grad", lambda m, p: vector(fnn.grad(loss_of(REMAT, m))(p))),
    "hvp of remat": ("hvp", lambda m, p: vector(fnn.hvp(loss_of(REMAT, m), p, m.v))),
    "HessianOperator": ("hvp", lambda m, p: vector(hessian_operator(m, p) @ m.v)),
    "HessianOperator of a matrix": ("hessian", lambda m, p: times_probe(hessian_operator(m, p))),
    "GGNOperator": ("ggn", lambda m, p: times_probe(ggn_operator(m, p))),
    "FisherOperator exact": ("fisher", lambda m, p: times_probe(fisher_operator(m, p, "exact"))),
    "FisherOperator empirical": ("empirical_fisher", lambda m, p: times_probe(fisher_operator(m, p, "empirical"))),
    "JacobianOperator": (
        "vjp_params",
        lambda m, p: fnn.JacobianOperator(lambda p: m.batched(p, m.x), p).T @ m.w.reshape(-1),
    ),
}
GRID = [(cell, name) for cell in CELLS for name in NAMES if cell != "bilaplacian" or name == "mlp"]
COMPILED_FAST = ("grad", "jacobian of inputs", "hvp")
# Of the MLP every function is compiled, the operators being made outside; test_ntk.py compiles every method.
COMPILED_OF_MLP = [
    cell for cell in CELLS if cell not in (*COMPILED_FAST, "value") and "Operator" not in cell and "ntk by" not in cell
]
COMPILED_OF_OTHERS = {
    "lenet": ("grad", "hvp", "per_sample_grad_norm", "ntk", "laplacian"),
    "resnet": ("grad", "jacobian of inputs", "hvp", "per_sample_grad_norm"),
    "attention": ("grad", "jacobian of inputs", "hvp", "hessian", "per_sample_grad_norm", "ntk", "laplacian"),
}
# Cells that are compiled as one function, which takes a fraction of the time.
COMPILED = [
    pytest.param("mlp", COMPILED_FAST, id="mlp"),
    *[
        pytest.param("mlp", COMPILED_OF_MLP[i : i + 6], marks=pytest.mark.slow, id=f"mlp-{i}")
        for i in range(0, len(COMPILED_OF_MLP), 6)
    ],
    *[pytest.param(name, cells, marks=pytest.mark.slow, id=name) for name, cells in COMPILED_OF_OTHERS.items()],
]


def result(cell, m, params):
    return CELLS[cell][1](m, params)


@pytest.mark.parametrize(("cell", "name"), GRID)
def test_eager_equals_jax(cell, name):
    m = MODELS[name]
    check(result(cell, m, m.members[0]), DERIVATIVES[f"{name}/{CELLS[cell][0]}"][0])


@pytest.mark.parametrize(("cell", "name"), GRID)
def test_vmapped_equals_jax(cell, name):
    m = MODELS[name]
    members = tree.map(lambda *leaves: torch.stack(leaves), *m.members)
    found = torch.vmap(lambda params: result(cell, m, params))(members)
    check(found, DERIVATIVES[f"{name}/{CELLS[cell][0]}"])


@pytest.mark.parametrize(("name", "cells"), COMPILED)
def test_compiled_equals_jax(name, cells, fast_compile):
    check_compiled(MODELS[name], cells)


@pytest.mark.slow
def test_compiled_by_inductor():
    check_compiled(MODELS["mlp"], ("jacobian of inputs", "hvp", "per_sample_grad_norm"))


def check_compiled(m, cells):
    derivatives = torch.compile(lambda params: {cell: result(cell, m, params) for cell in cells}, fullgraph=True)
    for cell, found in derivatives(m.members[0]).items():
        try:
            check(found, DERIVATIVES[f"{m.name}/{CELLS[cell][0]}"][0])
        except AssertionError as error:
            raise AssertionError(f"{cell}: {error}") from None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_products_of_operators_compile(name, fast_compile):
    m = MODELS[name]
    params, v = m.members[0], vector(m.v)
    hessian, ggn = hessian_operator(m, params), ggn_operator(m, params)
    of_hessian, of_ggn = torch.compile(lambda v: (hessian @ v, ggn @ v), fullgraph=True)(v)
    check(of_hessian, DERIVATIVES[f"{name}/hvp"][0])
    check(of_ggn, DERIVATIVES[f"{name}/gnvp"][0])


SOME_SLOW = [pytest.param(name, marks=() if name == "mlp" else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SOME_SLOW)
def test_sparse_jacobian_of_a_batch_is_block_diagonal(name):
    """Examples do not mix, so the colours are those of one example."""
    m = MODELS[name]
    params = m.members[0]
    prepared = fnn.sparse_jacobian(lambda x: m.batched(params, x)).prepare(m.x)
    blocks = prepared(m.x).to_dense().unflatten(0, (len(m.x), -1)).unflatten(2, (len(m.x), -1))
    check(blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0), DERIVATIVES[f"{name}/jacobian_x"][0])
    values = prepared.values(m.x)
    assert len(values) <= len(m.x) * blocks.shape[1] * blocks.shape[3]
    check(torch.vmap(prepared.values)(torch.stack([m.x.flip(0), m.x]))[1], values)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_sparse_hessian_of_a_batch_is_block_diagonal(name):
    m = MODELS[name]
    prepared = fnn.sparse_hessian(lambda x: m.batched(m.members[0], x)[:, 0].sum()).prepare(m.x)
    blocks = prepared(m.x).to_dense().unflatten(0, (len(m.x), -1)).unflatten(2, (len(m.x), -1))
    check(blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0), DERIVATIVES[f"{name}/hessian_x"][0])


@pytest.mark.parametrize("name", NAMES)
def test_tap_grads_of_the_logits(name):
    """The gradient with respect to the logits, pulled back, is the gradient with respect to the parameters."""
    m = MODELS[name]
    params = m.members[0]
    values, grads = fnn.tap_grads(lambda p: m.loss_of_logits(fnn.tap(m.batched(p, m.x), "logits")))(params)
    check(values["logits"], DERIVATIVES[f"{name}/logits"][0])
    check(vector(fnn.vjp(m.batched, params, m.x)[1](grads["logits"])[0]), DERIVATIVES[f"{name}/grad"][0])


@pytest.mark.parametrize("name", NAMES)
def test_operators_summarise_their_matrices(name):
    m = MODELS[name]
    params = m.members[0]
    golden = lambda key: DERIVATIVES[f"{name}/{key}"][0]
    hessian = hessian_operator(m, params)
    check(hessian.trace(), golden("trace"))
    check(hessian.diag(), golden("diagonal"))
    check(hessian.eigsh(3, "LA", rtol=1e-9).values, golden("eigenvalues"))
    check(hessian.to_dense(), golden("hessian"))
    kernel = fnn.NTKOperator(m.f, params, m.x2).to_dense().unflatten(0, (2, -1)).unflatten(2, (2, -1))
    check(kernel.transpose(1, 2), fnn.ntk(m.f, params, m.x2).numpy())
    jacobian = fnn.JacobianOperator(lambda p: m.batched(p, m.x), params)
    check(jacobian.to_dense().unflatten(0, (len(m.x), -1)), golden("jacobian_params"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
def test_curvature_over_a_loader_equals_curvlinops(name, kind):
    m = MODELS[name]
    if (name, kind) == ("attention", "hessian"):
        pytest.skip("curvlinops' Hessian is wrong where torch.nn.LayerNorm has parameters; JAX's is right")
    batches = [(m.x[:2], m.labels[:2]), (m.x[2:], m.labels[2:])]
    for member, params in enumerate(m.members):
        operator = {
            "hessian": lambda: fnn.HessianOperator(
                lambda p, x, y: fnn.losses.cross_entropy(m.batched(p, x), y), params, loader=batches
            ),
            "ggn": lambda: fnn.GGNOperator(m.batched, fnn.losses.cross_entropy, params, loader=batches),
            "empirical_fisher": lambda: fnn.FisherOperator(m.batched, params, loader=batches, kind="empirical"),
        }[kind]()
        check(times_probe(operator), CURVATURE[f"{name}/{kind}"][member])


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize(("kind", "theirs"), [("exact", "type-2"), ("empirical", "empirical")])
def test_kfac_equals_curvlinops(name, kind, theirs):
    m = MODELS[name]
    for member, params in enumerate(m.members):
        operator = fnn.KFACOperator(m.batched, params, m.x, m.labels, kind=kind)
        check(times_probe(operator), CURVATURE[f"{name}/kfac_{theirs}_expand_joint"][member])


@pytest.mark.parametrize("name", ["mlp", "lenet", "attention"])
def test_per_sample_gradients_equal_opacus(name):
    m = MODELS[name]
    params = m.members[0]
    golden = lambda key: CURVATURE[f"{name}/opacus/{key}"]
    check(vector(fnn.per_sample_grad(m.loss)(params, m.x, m.labels), lead=1), golden("per_sample_grad"))
    check(fnn.per_sample_grad_norm(m.loss)(params, m.x, m.labels), golden("per_sample_grad_norm"))
    # Opacus clips by bound / (norm + 1e-6).
    clipped = vector(fnn.clipped_grad(m.loss, m.bound)(params, m.x, m.labels))
    check(clipped, golden("clipped_grad"), rtol=2e-6)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_derivatives_agree_with_finite_differences(name):
    m = MODELS[name]
    fnn.check_grads(m.mean_loss, m.members[0])
    with pytest.raises(AssertionError):
        wrong = fnn.custom_vjp(m.mean_loss)
        wrong.defvjp(lambda p: (m.mean_loss(p), p), lambda p, g: (tree.map(lambda leaf: leaf * g, p),))
        fnn.check_grads(wrong, (m.members[0],), order=1, modes=("rev",))


def with_torch_layer_norm():
    """The transformer with torch's own layer norm, whose derivatives torch nests wrongly."""

    def norm(p, x):
        return torch.nn.functional.layer_norm(x, (4,), p["weight"], p["bias"])

    def f(p, x):
        for block in (p["block1"], p["block2"]):
            qkv = norm(block["norm1"], x) @ block["qkv"]["weight"].T
            q, k, v = qkv.reshape(3, 3, 2, 2).permute(1, 2, 0, 3)  # (tokens, 3, heads, 2) -> (3, heads, tokens, 2)
            heads = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
            x = x + heads.movedim(0, 1).reshape(3, 4) @ block["proj"]["weight"].T
            up = norm(block["norm2"], x) @ block["up"]["weight"].T + block["up"]["bias"]
            x = x + torch.nn.functional.gelu(up) @ block["down"]["weight"].T
        return x.mean(0) @ p["head"]["weight"].T + p["head"]["bias"]

    return f


def test_layer_norm_of_torch_keeps_its_mixed_derivatives():
    """torch.func.hessian is wrong here: its vmap rule of the backward pass takes mean and variance for constants."""
    m, f = MODELS["attention"], with_torch_layer_norm()
    params = m.members[0]
    golden = lambda key: DERIVATIVES[f"attention/{key}"][0]
    loss = lambda p, x, label: fnn.losses.cross_entropy(f(p, x)[None], label[None])
    mean_loss = lambda p: torch.stack([loss(p, x, label) for x, label in zip(m.x, m.labels, strict=True)]).mean()
    check(vector(fnn.grad(mean_loss)(params)), golden("grad"))
    for mode in ("fwd", "rev"):
        check(fnn.hessian(mean_loss, flat=True, mode=mode)(params), golden("hessian"))
    check(vector(fnn.hvp(mean_loss, params, m.v)), golden("hvp"))
    check(times_probe(fnn.HessianOperator(mean_loss, params)), golden("hessian"))
    check(fnn.per_sample_grad_norm(loss)(params, m.x, m.labels), golden("per_sample_grad_norm"))
    check(fnn.ntk(f, params, m.x, m.x2), golden("ntk"))
    first = lambda x: f(params, x.reshape(3, 4))[0]
    for method in ("auto", "products"):
        found = torch.stack([fnn.laplacian(first, method=method)(x) for x in m.flat_x])
        check(found, golden("laplacian"))


@pytest.mark.parametrize("nesting", ["reverse over forward", "reverse over rows", "forward over rows"])
def test_layer_norm_of_torch_in_derivatives_of_derivatives(nesting):
    """Here torch.func's own nesting is wrong by a tenth of the result, and more."""
    m, f = MODELS["attention"], with_torch_layer_norm()
    loss = lambda p, x, label: fnn.losses.cross_entropy(f(p, x)[None], label[None])
    mean_loss = lambda p: torch.stack([loss(p, x, label) for x, label in zip(m.x, m.labels, strict=True)]).mean()
    rows = lambda p: vector(fnn.per_sample_grad(loss)(p, m.x, m.labels), lead=1).mean(0)
    found = {
        "reverse over forward": lambda p: vector(fnn.grad(lambda p: fnn.jvp(mean_loss, p, m.v)[1])(p)),
        "reverse over rows": lambda p: vector(m.v) @ fnn.jacobian(rows, flat=True)(p),
        "forward over rows": lambda p: fnn.jvp(rows, p, m.v)[1],
    }[nesting](m.members[0])
    check(found, DERIVATIVES["attention/hvp"][0])


AT_VIEWS = """
import torch, fnn
whole = torch.arange(20.0)
f = lambda whole: fnn.jvp(lambda w: w.mT.sin().sum(), whole[4:16].view(3, 4), torch.ones(3, 4))[1]
torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(whole), whole[4:16].cos().sum())
"""


@pytest.mark.slow
def test_compiled_products_at_parameters_that_are_views():
    """Torch's forward mode fails at views when it is compiled, and leaves a level open: so in a process of its own."""
    done = subprocess.run([sys.executable, "-c", AT_VIEWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
