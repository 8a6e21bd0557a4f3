"""Linear operators of derivatives: products and algebra against dense matrices in float64, and the errors."""

from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fnn
from fnn import nn, random, tree
from fnn.diff.operators import (
    FisherOperator,
    GGNOperator,
    HessianOperator,
    IdentityOperator,
    JacobianOperator,
    LinearOperator,
    NTKOperator,
)

Pair = namedtuple("Pair", "weight bias")

X = random.normal(random.key(1), (4, 3), torch.float64)
Y = torch.tensor([0, 2, 1, 2])
BATCHES = [(X[:1], Y[:1]), (X[1:], Y[1:])]


def two_layers(params, x):
    first, last = params["layers"]
    return torch.tanh(x @ first.weight.T + first.bias) @ last["w"].T


def parameters():
    a, b, c = random.split(random.key(2), 3)
    first = Pair(random.normal(a, (2, 3), torch.float64), random.normal(b, (2,), torch.float64))
    return {"layers": [first, {"w": random.normal(c, (3, 2), torch.float64)}]}


def cross_entropy_of(params, x, y):
    return F.cross_entropy(two_layers(params, x), y)


def flat_function(f, params):
    """f as a function of one vector, and that vector."""
    vector, unravel = tree.ravel(params)
    return lambda v: f(unravel(v)), vector


def dense_hessian(loss, params):
    return torch.func.hessian(flat_function(loss, params)[0])(tree.ravel(params)[0])


def dense_jacobian(f, params):
    function, vector = flat_function(lambda p: f(p).reshape(-1), params)
    return torch.func.jacrev(function)(vector)


def dense_ggn(params, x, loss):
    """J.T H J with every factor dense."""
    jacobian = dense_jacobian(lambda p: two_layers(p, x), params)
    outputs = two_layers(params, x)
    hessian = torch.func.hessian(loss)(outputs).reshape(outputs.numel(), outputs.numel())
    return jacobian.T @ hessian @ jacobian


def make(kind):
    params = parameters()
    return {
        "jacobian": lambda: JacobianOperator(lambda p: {"out": two_layers(p, X)}, params),
        "hessian": lambda: HessianOperator(cross_entropy_of, params, X, Y),
        "ggn": lambda: GGNOperator(two_layers, F.cross_entropy, params, X, Y),
        "fisher": lambda: FisherOperator(two_layers, params, X),
        "sampled": lambda: FisherOperator(two_layers, params, X, kind="sampled", key=random.key(3), samples=2),
        "empirical": lambda: FisherOperator(two_layers, params, X, Y, kind="empirical"),
        "ntk": lambda: NTKOperator(two_layers, params, X),
        "sum": lambda: 2 * HessianOperator(cross_entropy_of, params, X, Y) - IdentityOperator(params),
        "product": lambda: NTKOperator(two_layers, params, X) @ JacobianOperator(lambda p: two_layers(p, X), params),
    }[kind]()


KINDS = ("jacobian", "hessian", "ggn", "fisher", "sampled", "empirical", "ntk", "sum", "product")


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- what each operator is ---


def test_hessian_of_a_quadratic_form_is_its_matrix():
    A = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [0.5, 0.0, -1.0]])
    H = HessianOperator(lambda x: x @ A @ x / 2, torch.ones(3))
    assert torch.equal(H.to_dense(), A)
    assert torch.equal(H @ torch.tensor([1.0, 0.0, 0.0]), A[0])


def test_hessian_equals_torch():
    params = parameters()
    close(make("hessian").to_dense(), dense_hessian(lambda p: cross_entropy_of(p, X, Y), params))


def test_hessian_of_an_fnn_network():
    net = nn.Sequential(nn.Linear(3), nn.tanh, nn.Linear(2))
    params, _ = net.init(random.key(0), X)
    H = HessianOperator(lambda p, x: fnn.losses.mse(net(p, x), x[:, :2]), params, X)
    expected = dense_hessian(lambda p: ((net(p, X) - X[:, :2]) ** 2).mean(), params)
    close(H.to_dense(), expected)


def test_jacobian_equals_torch_both_ways():
    expected = dense_jacobian(lambda p: two_layers(p, X), parameters())
    J = make("jacobian")
    assert J.shape == tuple(expected.shape)
    close(J.to_dense(), expected)
    close(J.T.to_dense(), expected.T)
    assert J.T.T is J


def test_wide_and_tall_jacobians():
    for m, n in ((1, 4), (4, 1)):
        A = torch.arange(float(m * n)).reshape(m, n)
        assert torch.equal(JacobianOperator(lambda x: A @ x, torch.ones(n)).to_dense(), A)


@pytest.mark.parametrize(
    "loss",
    [lambda o: F.cross_entropy(o, Y), lambda o: F.mse_loss(o, X), lambda o: (o**4).sum()],
    ids=["cross_entropy", "mse", "quartic"],
)
def test_ggn_is_the_product_of_its_factors(loss):
    params = parameters()
    G = GGNOperator(two_layers, lambda o: loss(o), params, X)
    close(G.to_dense(), dense_ggn(params, X, loss))


def test_ggn_of_linear_regression_is_the_gram_matrix():
    G = GGNOperator(lambda w, x: x @ w, lambda o, y: ((o - y) ** 2).sum() / 2, torch.zeros(3).double(), X, X[:, 0])
    close(G.to_dense(), X.T @ X)


def test_ggn_of_a_model_with_a_tree_of_outputs():
    params = parameters()
    G = GGNOperator(
        lambda p, x: {"a": two_layers(p, x), "b": x.sum() * p["layers"][0].bias},
        lambda o, y: F.cross_entropy(o["a"], y) + (o["b"] ** 4).sum(),
        params,
        X,
        Y,
    )
    split = lambda o: F.cross_entropy(o[:12].reshape(4, 3), Y) + (o[12:] ** 4).sum()
    model = lambda p: torch.cat([two_layers(p, X).reshape(-1), X.sum() * p["layers"][0].bias])
    J = dense_jacobian(model, params)
    close(G.to_dense(), J.T @ torch.func.hessian(split)(model(params)) @ J)


def test_exact_fisher_is_the_ggn_of_the_negative_log_likelihood():
    params = parameters()
    close(make("fisher").to_dense(), dense_ggn(params, X, lambda o: F.cross_entropy(o, Y)))
    gaussian = FisherOperator(two_layers, params, X, likelihood="gaussian")
    close(gaussian.to_dense(), dense_ggn(params, X, lambda o: F.mse_loss(o, X, reduction="sum") / 2 / len(X)))
    bernoulli = FisherOperator(two_layers, params, X, likelihood="bernoulli", reduction="sum")
    nll = lambda o: F.binary_cross_entropy_with_logits(o, torch.ones(4, 3).double(), reduction="sum")
    close(bernoulli.to_dense(), dense_ggn(params, X, nll))


def test_exact_fisher_of_softmax_in_closed_form():
    """A linear model and one example: (diag p - p p.T) kron x x.T."""
    W, x = parameters()["layers"][1]["w"], X[:1, :2]
    p = (x @ W.T).softmax(1)[0]
    expected = torch.kron(torch.diag(p) - torch.outer(p, p), x.T @ x)
    close(FisherOperator(lambda w, x: x @ w.T, W, x).to_dense(), expected)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(likelihood):
    params = parameters()
    targets = {"categorical": Y, "bernoulli": (X > 0).double(), "gaussian": X}[likelihood]
    nll = {
        "categorical": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
        "bernoulli": lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum"),
        "gaussian": lambda o, y: F.mse_loss(o, y, reduction="sum") / 2,
    }[likelihood]
    rows = [dense_jacobian(lambda p: nll(two_layers(p, X[i : i + 1]), targets[i : i + 1]), params)[0] for i in range(4)]
    operator = FisherOperator(two_layers, params, X, targets, likelihood=likelihood, kind="empirical")
    close(operator.to_dense(), sum(torch.outer(g, g) for g in rows) / 4)


def test_fisher_of_several_outcomes_an_example():
    """Categorical outputs (batch, classes, positions): the log-likelihood of an example is the sum over positions."""
    W = parameters()["layers"][1]["w"]  # (3, 2)
    x = random.normal(random.key(5), (2, 2, 4), torch.float64)
    labels = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
    model = lambda w, x: torch.einsum("ci,bit->bct", w, x)
    rows = [
        dense_jacobian(lambda w: F.cross_entropy(model(w, x[i : i + 1]), labels[i : i + 1], reduction="sum"), W)[0]
        for i in range(2)
    ]
    empirical = FisherOperator(model, W, x, labels, kind="empirical", reduction="sum")
    close(empirical.to_dense(), sum(torch.outer(g, g) for g in rows))
    outputs = model(W, x)
    J = dense_jacobian(lambda w: model(w, x), W)
    H = torch.func.hessian(lambda o: F.cross_entropy(o, labels, reduction="sum"))(outputs).reshape(24, 24)
    close(FisherOperator(model, W, x, reduction="sum").to_dense(), J.T @ H @ J)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_sampled_fisher_approaches_the_exact_one(likelihood):
    W, x = parameters()["layers"][1]["w"], X[:2, :2]
    model = lambda w, x: x @ w.T
    exact = FisherOperator(model, W, x, likelihood=likelihood).to_dense()
    errors = []
    for samples in (100, 10_000):
        F_ = FisherOperator(model, W, x, likelihood=likelihood, kind="sampled", key=random.key(0), samples=samples)
        errors.append(float((F_.to_dense() - exact).norm() / exact.norm()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_one_sample_is_an_outer_product_of_a_gradient_for_a_drawn_target():
    W, x = parameters()["layers"][1]["w"], X[:1, :2]
    model = lambda w, x: x @ w.T
    drawn = FisherOperator(model, W, x, kind="sampled", key=random.key(4)).to_dense()
    candidates = [FisherOperator(model, W, x, torch.tensor([label]), kind="empirical").to_dense() for label in range(3)]
    assert min(float((drawn - other).abs().max()) for other in candidates) < 1e-12


def test_ntk_is_the_jacobian_times_its_transpose():
    J = dense_jacobian(lambda p: two_layers(p, X), parameters())
    close(make("ntk").to_dense(), J @ J.T)


# --- the common surface ---


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_vectors_matrices_and_trees_are_those_of_the_dense_matrix(kind):
    A = make(kind)
    dense = A.to_dense()
    m, n = A.shape
    V = random.normal(random.key(7), (n, 3), torch.float64)
    close(A @ V[:, 0], dense @ V[:, 0])
    close(A @ V, dense @ V)
    assert (A @ V[:, :0]).shape == (m, 0)
    W = random.normal(random.key(8), (m, 2), torch.float64)
    close(A.T @ W, dense.T @ W)
    value = A @ tree.ravel(A.domain)[1](V[:, 1])
    assert tree.difference(A.codomain, value) is None
    close(tree.ravel(value)[0], dense @ V[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_mapped(kind):
    A = make(kind)
    v = random.normal(random.key(7), (2, A.shape[1]), torch.float64)
    close(torch.vmap(lambda u: A @ u)(v), v @ A.to_dense().T)
    mapped = torch.vmap(lambda u: tree.ravel(A @ tree.ravel(A.domain)[1](u))[0])(v)
    close(mapped, v @ A.to_dense().T)


@pytest.mark.parametrize("kind", ["jacobian", "ggn", "fisher", "sum"])
def test_products_are_compiled(kind, fast_compile):
    A = make(kind)
    v = random.normal(random.key(7), (A.shape[1],), torch.float64)
    close(torch.compile(lambda u: A(u), fullgraph=True)(v), A.to_dense() @ v)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jacobian", "sampled", "product"])
def test_products_of_every_form_are_compiled(kind, fast_compile):
    A = make(kind)
    v = random.normal(random.key(7), (2, A.shape[1]), torch.float64)
    expected = v @ A.to_dense().T
    both = torch.compile(lambda v, u: (torch.vmap(lambda u: A(u))(v), A(u)), fullgraph=True)
    batched, value = both(v, tree.ravel(A.domain)[1](v[0]))
    close(batched, expected)
    close(tree.ravel(value)[0], expected[0])
    compiled = A.compile()
    close(compiled @ v[0], expected[0])
    close(compiled @ v.T, expected.T)
    close(compiled.T @ (compiled @ v[0]), A.T @ expected[0])


def test_a_compiled_operator_inside_transforms_and_compiled_functions(fast_compile):
    """torch has no transforms of compiled functions; there the product runs as it is."""
    H = HessianOperator(lambda x: (x**3).sum(), torch.ones(3)).compile()
    v = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    close(H @ v[0], 6 * v[0])
    close(torch.vmap(lambda u: H @ u)(v), 6 * v)
    close(torch.func.grad(lambda u: (H @ u).sum())(v[0]), torch.full((3,), 6.0))
    close(torch.compile(lambda u: H(u), fullgraph=True)(v[0]), 6 * v[0])
    close(H.compile() @ v[0], 6 * v[0])


def test_the_sign_of_the_product_in_compiled_code(fast_compile):
    """Dynamo does not tell A @ v from v @ A; what would differ raises."""
    H, J = make("hessian"), make("jacobian")
    v = random.normal(random.key(7), (H.shape[1],), torch.float64)
    both = torch.compile(lambda u: (H @ u, torch.vmap(lambda u: H @ u)(u[None])), fullgraph=True)
    close(both(v), (H @ v, (H @ v)[None]))
    for wrong in (lambda u: J @ u, lambda u: H @ torch.stack([u, u], 1)):
        with pytest.raises(Exception, match=r"write A\(v\)"):
            torch.compile(wrong, fullgraph=True)(v)
    with pytest.raises(TypeError, match="unsupported operand"):
        v @ H


def test_an_operator_made_inside_a_compiled_function(fast_compile):
    f = lambda p, v: HessianOperator(cross_entropy_of, p, X, Y)(v)
    params = parameters()
    close(torch.compile(f, fullgraph=True)(params, params), make("hessian") @ params)


def test_algebra_inside_a_compiled_function(fast_compile):
    def f(p, v):
        J = JacobianOperator(lambda x: x**2, p)
        return (2 * HessianOperator(lambda x: (x**3).sum(), p) + J.T(J) - IdentityOperator(p))(v)

    p, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 2.0])
    close(torch.compile(f, fullgraph=True)(p, v), (12 * p + 4 * p**2 - 1) * v)


@pytest.mark.slow
def test_products_through_inductor():
    A = make("hessian")
    v = random.normal(random.key(7), (A.shape[1],), torch.float64)
    close(A.compile() @ v, A.to_dense() @ v)


def test_products_are_differentiable():
    """d/dp of v.T H(p) v, against the third derivative of a closed form: p**4 has H = 12 p**2."""
    f = lambda p, v: v @ (HessianOperator(lambda q: (q**4).sum(), p) @ v)
    p, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    close(torch.func.grad(f)(p, v), 24 * p * v**2)


@pytest.mark.slow
def test_many_compiled_operators_of_one_process(trace_only):
    """Dynamo recompiles a code object 8 times at most."""
    with torch._dynamo.config.patch(recompile_limit=2):
        x = torch.ones(2)
        for f, curvature in ((torch.sin, -x.sin()), (torch.cos, -x.cos()), (torch.exp, x.exp()), (torch.square, 2 * x)):
            H = HessianOperator(lambda x, f=f: f(x).sum(), x).compile()
            torch.testing.assert_close(H @ x, curvature)


def test_chunks_change_nothing():
    params = parameters()
    whole = HessianOperator(cross_entropy_of, params, X, Y)
    pieces = HessianOperator(cross_entropy_of, params, X, Y, chunk_size=3)
    close(pieces.to_dense(), whole.to_dense())
    close(pieces.diag(), whole.diag())
    assert pieces.columns_at_once() == 3


def test_algebra():
    H, G = make("hessian"), make("ggn")
    J = JacobianOperator(lambda p: two_layers(p, X), parameters())
    h, g, j = H.to_dense(), G.to_dense(), J.to_dense()
    close((H + G).to_dense(), h + g)
    close((H - 2 * G / 3).to_dense(), h - 2 * g / 3)
    close((-J * torch.tensor(0.5)).to_dense(), -j / 2)
    close((J @ H).to_dense(), j @ h)
    close((J @ H).T.to_dense(), h @ j.T)
    close((J + 3 * J).T.to_dense(), 4 * j.T)
    close((H @ G @ H).to_dense(), h @ g @ h)
    close((H + IdentityOperator(parameters())).to_dense(), h + torch.eye(len(h)))


def test_which_products_are_known_to_be_symmetric():
    H, G = make("hessian"), make("ggn")
    J = JacobianOperator(lambda p: two_layers(p, X), parameters())
    assert (J.T @ J).symmetric
    assert (J @ H @ J.T).symmetric
    assert (2 * H - G).symmetric
    assert (H @ G @ H).symmetric
    assert not (H @ G).symmetric
    assert not (2 * J).symmetric
    assert not (J @ H).symmetric


def test_operators_of_your_own():
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    operator = LinearOperator(lambda x: A @ x, torch.zeros(3))
    assert operator.shape == (2, 3)
    assert torch.equal(operator.T.to_dense(), A.T)
    assert torch.equal((operator.T @ operator).to_dense(), A.T @ A)
    assert repr(operator) == "LinearOperator(2 x 3, torch.float32)"


def test_leaves_of_several_dtypes():
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
    H = HessianOperator(lambda p: (p["a"].double() * p["b"]).sum() ** 2, params)
    assert H.dtype == torch.float64
    value = H @ params
    assert (value["a"].dtype, value["b"].dtype) == (torch.float32, torch.float64)
    close(H.to_dense(), dense_hessian(lambda p: (p["a"].double() * p["b"]).sum() ** 2, params), 1e-6)


def test_float32():
    params = tree.map(torch.Tensor.float, parameters())
    H = HessianOperator(cross_entropy_of, params, X.float(), Y)
    assert H.dtype == torch.float32
    close(H.to_dense().double(), make("hessian").to_dense(), 1e-5)


def test_parameters_that_require_gradients_record_nothing_in_loops():
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), parameters())
    H = HessianOperator(cross_entropy_of, params, X, Y)
    assert not H.trace().requires_grad
    assert (H.to_scipy() @ np.ones(H.shape[1])).shape == (H.shape[0],)


@pytest.mark.parametrize("kind", ["jacobian", "hessian"])
def test_scipy(kind):
    A = make(kind)
    S, dense = A.to_scipy(), A.to_dense().numpy()
    m, n = S.shape
    assert S.dtype == np.float64
    V = np.random.default_rng(0).normal(size=(n, 2))
    np.testing.assert_allclose(S @ V[:, 0], dense @ V[:, 0], rtol=1e-12)
    np.testing.assert_allclose(S @ V, dense @ V, rtol=1e-12)
    np.testing.assert_allclose(S.T @ np.ones((m, 2)), dense.T @ np.ones((m, 2)), rtol=1e-12)


# --- loaders ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loader_gives_the_operator_of_all_its_data(reduction):
    params = parameters()
    loss = lambda o, y: F.cross_entropy(o, y, reduction=reduction)
    whole = GGNOperator(two_layers, loss, params, X, Y)
    loaded = GGNOperator(two_layers, loss, params, loader=BATCHES, reduction=reduction)
    close(loaded.to_dense(), whole.to_dense())
    of_params = lambda p, x, y: loss(two_layers(p, x), y)
    whole = HessianOperator(of_params, params, X, Y)
    loaded = HessianOperator(of_params, params, loader=BATCHES, reduction=reduction)
    close(loaded.to_dense(), whole.to_dense())
    for options in ({"kind": "exact"}, {"kind": "empirical"}):
        whole = FisherOperator(two_layers, params, X, Y, reduction=reduction, **options)
        loaded = FisherOperator(two_layers, params, loader=BATCHES, reduction=reduction, **options)
        close(loaded.to_dense(), whole.to_dense())


@pytest.mark.slow
def test_a_loader_is_compiled_batch_by_batch(fast_compile):
    loaded = HessianOperator(cross_entropy_of, parameters(), loader=BATCHES)
    v = torch.ones(loaded.shape[1]).double()
    close(loaded.compile() @ v, loaded @ v)
    close((2 * loaded).compile() @ v, 2 * (loaded @ v))


def test_data_loaders_of_torch_and_fnn():
    expected = make("hessian").to_dense()
    torch_loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=3)
    fnn_loader = fnn.data.Loader((X, Y), 2, key=random.key(0))
    for loader in (torch_loader, fnn_loader):
        close(HessianOperator(cross_entropy_of, parameters(), loader=loader).to_dense(), expected)


def test_a_batch_that_is_no_tuple_is_one_argument():
    batches = [{"x": X[:2], "y": Y[:2]}, {"x": X[2:], "y": Y[2:]}]
    loaded = HessianOperator(lambda p, b: cross_entropy_of(p, b["x"], b["y"]), parameters(), loader=batches)
    close(loaded.to_dense(), make("hessian").to_dense())


def test_sampled_fisher_over_a_loader_is_deterministic():
    sampled = FisherOperator(two_layers, parameters(), kind="sampled", key=random.key(0), loader=BATCHES)
    assert torch.equal(sampled.to_dense(), sampled.to_dense())
    first = FisherOperator(two_layers, parameters(), X[:1], kind="sampled", key=random.key(0))
    rest = sampled.to_dense() - first.to_dense() / 4
    assert torch.linalg.matrix_rank(rest) == 3


def test_a_loader_that_shuffles_is_refused():
    data = torch.utils.data.TensorDataset(torch.arange(40.0), torch.arange(40.0))
    shuffled = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    with pytest.raises(ValueError, match="two passes over the loader differ, first in batch 0"):
        HessianOperator(lambda p, x, y: (p * x).sum(), torch.ones(()), loader=shuffled)


def test_a_loader_that_can_be_read_once_is_refused():
    with pytest.raises(ValueError, match="ends after one pass"):
        HessianOperator(cross_entropy_of, parameters(), loader=iter(BATCHES))


# --- errors ---


def loss_of_vector(p):
    return (p["w"] ** 2).sum()


ERRORS = {
    "length": (lambda H: H @ torch.ones(3), ValueError, "expected a vector of length 2, got 3"),
    "rows": (lambda H: H @ torch.ones(3, 2), ValueError, r"a matrix \(2, k\)"),
    "dtype": (lambda H: H @ torch.ones(2).double(), TypeError, r"convert it with .to\(A.dtype\)"),
    "tree": (lambda H: H @ {"v": torch.ones(2)}, ValueError, "missing 'w'"),
    "leaf": (lambda H: H @ {"w": torch.ones(3)}, ValueError, r"leaf 'w' has shape \(3,\), expected \(2,\)"),
    "vector loss": (lambda H: HessianOperator(lambda p: p, torch.ones(2)), ValueError, "one number"),
    "integers": (lambda H: HessianOperator(lambda p: p.sum(), torch.ones(2).int()), TypeError, "int32"),
    "complex": (lambda H: JacobianOperator(lambda p: p, torch.ones(2) + 0j), TypeError, "complex"),
    "random": (lambda H: HessianOperator(lambda p: (p * torch.rand(2)).sum(), torch.ones(2)), TypeError, "generator"),
    "compiled": (lambda H: HessianOperator(torch.compile(loss_of_vector), {"w": torch.ones(2)}), TypeError, "compiled"),
    "both data": (
        lambda H: HessianOperator(loss_of_vector, {"w": torch.ones(2)}, X, loader=[X]),
        ValueError,
        "got both",
    ),
    "reduction": (
        lambda H: HessianOperator(loss_of_vector, {"w": torch.ones(2)}, loader=[X], reduction="none"),
        ValueError,
        "'mean' or 'sum'",
    ),
    "no data": (lambda H: FisherOperator(two_layers, parameters()), ValueError, "expected a batch"),
    "no batches": (
        lambda H: HessianOperator(loss_of_vector, {"w": torch.ones(2)}, loader=[]),
        ValueError,
        "no batches",
    ),
    "kind": (lambda H: FisherOperator(two_layers, parameters(), X, kind="type-1"), ValueError, "'type-1'"),
    "likelihood": (lambda H: FisherOperator(two_layers, parameters(), X, likelihood="normal"), ValueError, "'normal'"),
    "fisher key": (lambda H: FisherOperator(two_layers, parameters(), X, kind="sampled"), ValueError, "needs a key"),
    "targets": (
        lambda H: FisherOperator(two_layers, parameters(), X, kind="empirical"),
        ValueError,
        "needs the targets",
    ),
    "target shape": (
        lambda H: FisherOperator(two_layers, parameters(), X, X, kind="empirical"),
        ValueError,
        r"targets of shape \(4,\), got \(4, 3\)",
    ),
    "sum": (lambda H: H + IdentityOperator({"w": torch.ones(3)}), ValueError, "leaf 'w' has shape"),
    "product": (lambda H: H @ IdentityOperator(torch.ones(2)), ValueError, "missing 'w'"),
    "chunk": (lambda H: JacobianOperator(torch.sin, torch.ones(2), chunk_size=0), ValueError, "chunk_size"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_came_and_the_cure(case):
    call, error, message = ERRORS[case]
    H = HessianOperator(loss_of_vector, {"w": torch.ones(2)})
    with pytest.raises(error, match=message):
        call(H)


def test_an_operator_times_no_number():
    with pytest.raises(TypeError):
        IdentityOperator(torch.ones(2)) * "2"
