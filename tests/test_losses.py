"""fnn.losses against torch.nn.functional in float64, under every transform, and where torch is wrong or silent."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fnn import losses, optim, tree

NAN = math.nan


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def simplex(*shape):
    return double(*shape, seed=9).softmax(1)


LABELS = torch.tensor([2, 0, 4, 1, 3, 2])
SOME = torch.tensor([True, True, False, True, False, True])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)
DENSE_LABELS = torch.tensor([[1, 0, 2], [2, 2, 0]])  # for logits (2, 3, 3)

# name: (ours, torch's, first argument, second argument)
ELEMENTWISE = {
    "mse": (losses.mse, F.mse_loss, double(6, 5), double(6, 5, seed=1)),
    "mse_1d": (losses.mse, F.mse_loss, double(6), double(6, seed=1)),
    "mae": (losses.mae, F.l1_loss, double(6, 5), double(6, 5, seed=1)),
    "huber": (losses.huber, F.huber_loss, 2 * double(6, 5), double(6, 5, seed=1)),
    "huber_delta": (
        lambda p, t, **o: losses.huber(p, t, 0.3, **o),
        lambda p, t, **o: F.huber_loss(p, t, delta=0.3, **o),
        double(6, 5),
        double(6, 5, seed=1),
    ),
    "bce": (
        losses.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        20 * double(6, 5),
        double(6, 5).sigmoid(),
    ),
    "bce_pos_weight": (
        lambda x, t, **o: losses.binary_cross_entropy_with_logits(x, t, pos_weight=WEIGHT, **o),
        lambda x, t, **o: F.binary_cross_entropy_with_logits(x, t, pos_weight=WEIGHT, **o),
        double(6, 5),
        (double(6, 5, seed=1) > 0).double(),
    ),
    "kl_div": (losses.kl_div, F.kl_div, simplex(6, 5).log(), double(6, 5).softmax(1)),
    "kl_div_log": (
        lambda p, t, **o: losses.kl_div(p, t, log_target=True, **o),
        lambda p, t, **o: F.kl_div(p, t, log_target=True, **o),
        simplex(6, 5).log(),
        double(6, 5).log_softmax(1),
    ),
}


def labelled(**options):
    return (
        lambda x, y, **o: losses.cross_entropy(x, y, **options, **o),
        lambda x, y, **o: F.cross_entropy(x, y, **options, **o),
    )


def likelihood(**options):
    return (lambda x, y, **o: losses.nll(x, y, **options, **o), lambda x, y, **o: F.nll_loss(x, y, **options, **o))


CLASSIFICATION = {
    "plain": (*labelled(), double(6, 5), LABELS),
    "large": (*labelled(), 500 * double(6, 5), LABELS),
    "one": (*labelled(), double(5), torch.tensor(3)),
    "dense": (*labelled(), double(2, 3, 3), DENSE_LABELS),
    "ignore": (*labelled(ignore_index=2), double(6, 5), LABELS),
    "ignore_default": (*labelled(), double(6, 5), LABELS.where(SOME, -100)),
    "smooth": (*labelled(label_smoothing=0.1), double(6, 5), LABELS),
    "smooth_ignore": (*labelled(label_smoothing=0.3, ignore_index=2), double(6, 5), LABELS),
    "smooth_dense_ignore": (*labelled(label_smoothing=0.3, ignore_index=2), double(2, 3, 3), DENSE_LABELS),
    "weight": (*labelled(weight=WEIGHT), double(6, 5), LABELS),
    "weight_dense": (*labelled(weight=WEIGHT[:3]), double(2, 3, 3), DENSE_LABELS),
    "all": (*labelled(weight=WEIGHT, label_smoothing=0.2, ignore_index=4), double(6, 5), LABELS),
    "probabilities": (*labelled(), double(6, 5), simplex(6, 5)),
    "probabilities_one": (*labelled(), double(5), double(5, seed=1).softmax(0)),
    "probabilities_all": (*labelled(weight=WEIGHT, label_smoothing=0.2), double(6, 5), simplex(6, 5)),
    "probabilities_dense": (*labelled(weight=WEIGHT[:3]), double(2, 3, 3), simplex(2, 3, 3)),
    "nll": (*likelihood(), simplex(6, 5).log(), LABELS),
    "nll_all": (*likelihood(weight=WEIGHT, ignore_index=0), simplex(6, 5).log(), LABELS),
    "nll_dense": (*likelihood(), simplex(2, 3, 3).log(), DENSE_LABELS),
}
ALL = {**ELEMENTWISE, **CLASSIFICATION}
EVERY = pytest.mark.parametrize("name", ALL)
# one row of each kind, for what takes long
KINDS = pytest.mark.parametrize("name", ["mse", "huber", "bce_pos_weight", "kl_div", "all", "probabilities_all", "nll"])


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-12, "atol": 1e-13, **tolerances})


# ---- values and derivatives


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:reduction")  # torch's kl_div has a word about its mean
def test_equals_torch(name, reduction):
    ours, theirs, x, y = ALL[name]
    close(ours(x, y, reduction=reduction), theirs(x, y, reduction=reduction))
    if reduction != "none":
        close(grad(ours)(x, y, reduction=reduction), grad(theirs)(x, y, reduction=reduction))
    if reduction == "mean":
        close(ours(x, y), theirs(x, y))


@EVERY
def test_every_derivative_agrees(name):
    """Forward equals reverse, in both orders, and the Hessian equals central differences of the gradient."""
    ours, _, x, y = ALL[name]
    direction = double(*x.shape, seed=5)

    def f(x):
        return ours(x, y)

    gradient = grad(f)(x)
    close(jvp(f, (x,), (direction,))[1], (gradient * direction).sum())
    close(jacfwd(f)(x), gradient)
    curvature = hessian(f)(x)
    close(jacrev(grad(f))(x), curvature)
    h = 1e-5
    differences = (grad(f)(x + h * direction) - grad(f)(x - h * direction)) / (2 * h)
    close((curvature * direction).flatten(x.ndim).sum(-1), differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mse", "huber", "bce_pos_weight", "kl_div", "kl_div_log", "probabilities_all"])
def test_targets_are_differentiable_too(name):
    ours, theirs, x, y = ALL[name]
    options = {"reduction": "sum"}
    close(grad(ours, 1)(x, y, **options), grad(theirs, 1)(x, y, **options))


def test_derivatives_at_the_kinks():
    zero = torch.zeros(3, dtype=torch.float64)
    close(torch.diag(hessian(lambda x: losses.huber(x, zero, reduction="sum"))(zero)), zero + 1)
    close(grad(lambda x: losses.mae(x, zero))(zero), zero)
    bce = losses.binary_cross_entropy_with_logits
    close(grad(lambda x: bce(x, zero, reduction="sum"))(zero), zero + 0.5)
    close(torch.diag(hessian(lambda x: bce(x, zero, reduction="sum"))(zero)), zero + 0.25)
    far = torch.tensor([-1e4, 1e4])
    assert bce(far, torch.tensor([1, 0]), reduction="none").tolist() == [1e4, 1e4]
    assert bce(far, torch.tensor([False, True])) == 0


@EVERY
def test_vmap_is_row_by_row(name):
    ours, _, x, y = ALL[name]
    xs = torch.stack([x, x.flip(0) if x.ndim > 1 else x])
    rows = torch.stack([ours(x, y) for x in xs])
    gradients = torch.stack([grad(ours)(x, y) for x in xs])
    close(vmap(ours, (0, None))(xs, y), rows)
    ys = torch.stack([y, y])
    close(vmap(ours)(xs, ys), rows)
    close(vmap(grad(ours))(xs, ys), gradients)


def test_per_sample_gradients_of_cross_entropy():
    logits = double(6, 5)
    per_sample = vmap(grad(losses.cross_entropy))(logits, LABELS)
    close(per_sample.mean(0), grad(losses.cross_entropy)(logits, LABELS).sum(0))


@KINDS
def test_compiled_equals_eager(name):
    ours, _, x, y = ALL[name]
    rows = torch.ones(len(x), dtype=torch.bool) ^ (torch.arange(len(x)) == 1)

    def everything(x, y, rows):
        def f(x):
            return ours(x, y, where=rows)

        value, gradient = f(x), grad(f)(x)
        tangent = jvp(f, (x,), (gradient,))[1]
        curvature = jvp(grad(f), (x,), (gradient,))[1]
        each = vmap(grad(lambda x, y: ours(x[None], y[None])))(x, y)
        return value, gradient, tangent, curvature, each

    fast = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for ours_, eager in zip(fast(x, y, rows), everything(x, y, rows), strict=True):
        close(ours_, eager)


@pytest.mark.slow
def test_inductor_equals_eager():
    x, y = double(6, 5).float(), LABELS.where(SOME, -100)

    def f(x, y):
        return torch.func.grad_and_value(lambda x: losses.cross_entropy(x, y, label_smoothing=0.1))(x)

    fast = torch.compile(f, fullgraph=True)
    for ours, eager in zip(fast(x, y), f(x, y), strict=True):
        close(ours, eager, rtol=1e-5, atol=1e-6)
    _, value = fast(x, y + 3)  # 2 and 4 become 5 and 7
    assert value.isnan()


# ---- where


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_is_the_batch_without_the_rest(name, reduction):
    ours, _, x, y = ALL[name]
    if x.ndim == 1 and name in CLASSIFICATION:
        pytest.skip("one example has no batch to leave out from")
    keep = SOME[: len(x)].clone()
    keep[1] = False
    dirty_x, dirty_y = x.clone(), y.clone()
    dirty_x[~keep] = NAN
    dirty_y[~keep] = NAN if y.is_floating_point() else 10**6
    expected = ours(x[keep], y[keep], reduction=reduction)
    actual = ours(dirty_x, dirty_y, reduction=reduction, where=keep)
    if reduction == "none":
        assert torch.equal(actual[~keep], torch.zeros_like(actual[~keep]))
        actual = actual[keep]
    close(actual, expected)

    def total(f):
        return lambda *arguments, **options: f(*arguments, reduction=reduction, **options).sum()

    gradient = grad(total(ours))(dirty_x, dirty_y, where=keep)
    assert torch.equal(gradient[~keep], torch.zeros_like(gradient[~keep]))
    close(gradient[keep], grad(total(ours))(x[keep], y[keep]))
    if y.is_floating_point():
        gradient = grad(total(ours), 1)(dirty_x, dirty_y, where=keep)
        assert torch.equal(gradient[~keep], torch.zeros_like(gradient[~keep]))


def test_where_by_element_and_by_leading_dimensions():
    p, t = double(2, 3, 4), double(2, 3, 4, seed=1)
    elements = double(2, 3, 4, seed=2) > 0
    close(losses.mse(p, t, where=elements), ((p - t) ** 2)[elements].mean())
    close(losses.mse(p, t, where=elements[..., 0]), ((p - t) ** 2)[elements[..., 0]].mean())
    logits = double(2, 3, 3)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    kept = F.cross_entropy(logits.movedim(1, 2)[keep], DENSE_LABELS[keep])
    close(losses.cross_entropy(logits, DENSE_LABELS, where=keep), kept)
    rows = torch.tensor([False, True])
    close(losses.cross_entropy(logits, DENSE_LABELS, where=rows), F.cross_entropy(logits[1:], DENSE_LABELS[1:]))
    p, t = simplex(6, 5).log(), double(6, 5).softmax(1)
    expected = F.kl_div(p[SOME], t[SOME], reduction="batchmean")
    close(losses.kl_div(p, t, reduction="batchmean", where=SOME), expected)
    close(losses.kl_div(p, t, reduction="batchmean", where=SOME[:, None].expand(6, 5)), expected)
    close(losses.kl_div(p, t, reduction="batchmean"), F.kl_div(p, t, reduction="batchmean"))


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_where_all_false_is_zero_with_zero_gradients(name, reduction):
    ours, _, x, y = ALL[name]
    nothing = torch.zeros(x.shape[:1] if name in ELEMENTWISE or x.ndim > 1 else (), dtype=torch.bool)
    options = {"where": nothing, "reduction": reduction}
    assert ours(x, y, **options) == 0
    assert torch.equal(grad(ours)(x, y, **options), torch.zeros_like(x))


def test_all_ignored_is_zero_with_zero_gradients():
    x, y = double(3, 4), torch.full((3,), -100)
    assert losses.kl_div(x, x, reduction="batchmean", where=y > 0) == 0
    assert losses.cross_entropy(x, y) == 0
    assert torch.equal(grad(losses.cross_entropy)(x, y), torch.zeros_like(x))


def test_where_under_vmap():
    x, y = double(3, 6, 5), torch.stack([LABELS, LABELS.flip(0), LABELS])
    keep = torch.stack([SOME, ~SOME, SOME & False])
    rows = torch.stack([losses.cross_entropy(*row[:2], where=row[2]) for row in zip(x, y, keep, strict=True)])
    close(vmap(lambda x, y, w: losses.cross_entropy(x, y, where=w))(x, y, keep), rows)


# ---- labels out of range

WRONG = torch.tensor([2, 0, 5, 1, -1, 2])
RIGHT = torch.tensor([True, True, False, True, False, True])
OUT_OF_RANGE = r"labels must be in \[0, 5\) for 5 classes \(or ignore_index=-100\), got labels from -1 to 5"
BY_LABEL = pytest.mark.parametrize(
    "f",
    [losses.nll, losses.cross_entropy, lambda x, y, **o: losses.cross_entropy(x, y, label_smoothing=0.1, **o)],
    ids=["nll", "cross_entropy", "smoothed"],
)


@BY_LABEL
def test_wrong_labels_raise_where_they_can_be_read(f):
    x = double(6, 5).log_softmax(1)
    for call in (
        f,
        grad(f),
        lambda x, y: grad(lambda x: f(x, y))(x),
        lambda x, y: jvp(lambda x: f(x, y), (x,), (x,)),
        hessian(f),
        lambda x, y: vmap(lambda x: grad(f)(x, y))(x[None]),
    ):
        with pytest.raises(ValueError, match=OUT_OF_RANGE):
            call(x, WRONG)
    # what is left out may hold anything
    close(f(x, WRONG, where=RIGHT), f(x[RIGHT], WRONG[RIGHT]))
    close(f(x, WRONG.where(RIGHT, -100)), f(x[RIGHT], WRONG[RIGHT]))
    with pytest.raises(ValueError, match="got labels from 0 to 5"):
        f(x, WRONG, where=torch.tensor([True, True, True, True, False, True]))


def poisoned(values):
    values = values.reshape(len(RIGHT), -1)
    return torch.equal(values.isnan().any(1), ~RIGHT) and values[RIGHT].isfinite().all()


@BY_LABEL
def test_wrong_labels_are_nan_where_they_cannot_be_read(f):
    x = double(6, 5).log_softmax(1)
    assert poisoned(vmap(f)(x, WRONG))
    assert poisoned(vmap(grad(f))(x, WRONG))
    close(vmap(f)(x, WRONG)[RIGHT], f(x[RIGHT], WRONG[RIGHT], reduction="none"))
    torch._dynamo.reset()

    def all_of_it(x, y):
        each = f(x, y, reduction="none")
        return each, vmap(grad(f))(x, y), f(x, y), grad(f)(x, y), vmap(jacrev(grad(f)))(x, y)

    each, gradients, mean, whole_gradient, curvature = torch.compile(all_of_it, fullgraph=True, backend="aot_eager")(
        x, WRONG
    )
    assert poisoned(each)
    assert poisoned(gradients)
    assert mean.isnan()
    assert poisoned(whole_gradient)
    assert poisoned(curvature) or f is losses.nll  # which is linear
    assert poisoned(make_fx(lambda x, y: f(x, y, reduction="none"))(x, WRONG)(x, WRONG))


def test_labels_of_every_integer_type():
    x = double(6, 5)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        close(losses.cross_entropy(x, LABELS.to(dtype)), F.cross_entropy(x, LABELS))
    # 156 is -100 in eight bits
    with pytest.raises(ValueError, match="got labels from 0 to 156"):
        losses.cross_entropy(x, torch.tensor([0, 1, 2, 3, 4, 156], dtype=torch.uint8))


def test_meta_and_fake_tensors_have_no_values_to_check():
    for tensors in ("meta", "fake"):
        with FakeTensorMode() if tensors == "fake" else torch.device("meta"):
            x, y = torch.empty(6, 5, dtype=torch.float64), torch.empty(6, dtype=torch.int64)
            assert losses.cross_entropy(x, y, where=y > 0).shape == ()
            assert grad(losses.cross_entropy)(x, y).shape == (6, 5)
            assert losses.mse(x, x, where=y > 0).shape == ()


# ---- dtypes, penalties, errors


def test_half_precision_sums_in_float32():
    x, t = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    all_but_one = torch.arange(4096) > 0
    for f in (losses.mse, losses.mae):
        assert f(x, t).dtype == torch.bfloat16
        assert f(x, t, where=all_but_one) == 1
    for seed in range(5):
        p, keep = double(999, seed=seed).bfloat16(), double(999, seed=seed + 50) > 0
        exact = p.abs()[keep].double().mean().bfloat16()
        assert losses.mae(p, torch.zeros_like(p), where=keep) == exact
    logits, labels = torch.zeros(3000, 2, dtype=torch.bfloat16), torch.zeros(3000, dtype=torch.int64)
    assert losses.cross_entropy(logits, labels).item() == pytest.approx(math.log(2), rel=2**-8)
    assert losses.cross_entropy(logits, labels).dtype == torch.bfloat16
    for target in (labels, logits):
        assert losses.cross_entropy(logits, target, weight=torch.ones(2)).dtype == torch.bfloat16
    assert losses.l2_penalty({"weight": x}) == 4096
    assert losses.l1_penalty({"weight": x}).dtype == torch.float32


def test_penalties():
    params = {"0": {"weight": double(3, 2), "bias": double(3)}, "1": (), "2": {"weight": double(2).float()}}
    leaves = tree.leaves(params)
    close(losses.l1_penalty(params), sum(leaf.double().abs().sum() for leaf in leaves), rtol=1e-7)
    close(losses.l2_penalty(params), sum((leaf.double() ** 2).sum() for leaf in leaves), rtol=1e-7)
    weights = params["0"]["weight"].abs().sum() + params["2"]["weight"].double().abs().sum()
    mask = tree.mask(params, "*.weight")
    for where in ("*.weight", lambda path, leaf: path.endswith("weight"), mask):
        close(losses.l1_penalty(params, where), weights, rtol=1e-7)
    gradient = grad(losses.l2_penalty)(params)
    assert tree.allclose(gradient, tree.map(lambda leaf: 2 * leaf, params))
    bare = double(4)
    close(losses.l1_penalty(bare), bare.abs().sum())
    close(vmap(losses.l2_penalty)(double(3, 4)), double(3, 4).square().sum(1))
    assert losses.l2_penalty({"a": ()}) == 0
    assert torch.equal(torch.compile(losses.l2_penalty, backend="aot_eager", fullgraph=True)(bare), bare.square().sum())


def test_l2_penalty_equals_weight_decay():
    params, target = double(3), double(3, seed=1)
    plain = grad(lambda p: losses.mse(p, target) + 0.5 * 0.3 * losses.l2_penalty(p))(params)
    decay = optim.add_decayed_weights(0.3)
    close(plain, decay.update(grad(losses.mse)(params, target), decay.init(params), params)[0])


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.mse(X[:, :1], X[:, 0]),
            ValueError,
            r"mse: predictions has shape \(4, 1\) and targets .* \(4,\)",
        ),
        (lambda: losses.mae(X, X[:1]), ValueError, r"mae: predictions has shape .* \(nothing is broadcast\)"),
        (lambda: losses.huber(X, X, -1.0), ValueError, "huber: delta must be > 0, got -1.0"),
        (lambda: losses.mse(X, 0.0), TypeError, "mse: targets must be a tensor, got float"),
        (lambda: losses.mse(Y, Y), ValueError, "mse: predictions must be floating, got torch.int64"),
        (
            lambda: losses.mse(X, X, reduction="avg"),
            ValueError,
            "mse: reduction must be one of 'mean', 'sum', 'none', got",
        ),
        (lambda: losses.mse(X, X, reduction="batchmean"), ValueError, "reduction must be one of"),
        (lambda: losses.cross_entropy(X, Y, reduction="avg"), ValueError, "cross_entropy: reduction must be one of"),
        (lambda: losses.kl_div(X, X, reduction="avg"), ValueError, "kl_div: .* 'none', 'batchmean', got 'avg'"),
        (lambda: losses.kl_div(X[0, 0], X[0, 0], reduction="batchmean"), ValueError, "needs a batch dimension"),
        (lambda: losses.mse(X[:0], X[:0]), ValueError, r"mse: the mean of no values \(shape \(0, 3\)\) .* empty"),
        (lambda: losses.kl_div(X[:0], X[:0], reduction="batchmean"), ValueError, "the mean of no values"),
        (lambda: losses.cross_entropy(X[:0], Y[:0]), ValueError, "cross_entropy: the mean of no values"),
        (
            lambda: losses.mse(X, X, where=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"where has shape \(3,\), expected",
        ),
        (
            lambda: losses.mse(X, X, where=torch.ones(4)),
            TypeError,
            "mse: where must be a bool tensor, got torch.float32",
        ),
        (lambda: losses.nll(X, Y, where=[True] * 4), TypeError, "nll: where must be a bool tensor, got list"),
        (
            lambda: losses.cross_entropy(X, Y[:2]),
            ValueError,
            r"cross_entropy: integer labels must have shape \(4,\) for logits of shape \(4, 3\), got torch.int64 of "
            r"shape \(2,\)",
        ),
        (lambda: losses.cross_entropy(X, X.long()), ValueError, r"got .* \(4, 3\); for probabilities use labels.float"),
        (
            lambda: losses.cross_entropy(X, Y.float()),
            ValueError,
            r"class probabilities and must have the shape \(4, 3\) of logits.* use labels.long",
        ),
        (lambda: losses.cross_entropy(X, Y > 0), ValueError, "labels must be integers, got torch.bool"),
        (lambda: losses.nll(X, X), ValueError, "nll: labels must be integers, got torch.float32"),
        (lambda: losses.cross_entropy(Y, Y), ValueError, "cross_entropy: logits must be floating of shape"),
        (lambda: losses.cross_entropy(X[0, 0], Y[0]), ValueError, "cross_entropy: logits must be floating of shape"),
        (lambda: losses.cross_entropy(X, [0, 1, 2, 0]), TypeError, "cross_entropy: labels must be a tensor, got list"),
        (lambda: losses.cross_entropy(X, Y, label_smoothing=1.5), ValueError, r"label_smoothing must be .* got 1.5"),
        (lambda: losses.cross_entropy(X, Y, label_smoothing=True), ValueError, "label_smoothing must be"),
        (
            lambda: losses.cross_entropy(X, Y, weight=torch.ones(4)),
            ValueError,
            r"weight must have shape \(3,\), got \(4,\)",
        ),
        (
            lambda: losses.binary_cross_entropy_with_logits(X, X, pos_weight=torch.ones(4)),
            ValueError,
            r"pos_weight must broadcast to the shape \(4, 3\) of logits, got shape \(4,\)",
        ),
        (
            lambda: losses.binary_cross_entropy_with_logits(X, Y),
            ValueError,
            "logits has shape .* and targets has shape",
        ),
        (lambda: losses.l1_penalty({"a": {"n": Y}}), TypeError, r"l1_penalty: leaf 'a\.n' is torch.int64, expected a"),
        (lambda: losses.l2_penalty({"a": X}, "b"), ValueError, "no path matches 'b'"),
    ],
)
def test_errors_name_argument_expected_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call()
