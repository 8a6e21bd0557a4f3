"""Collective operators: every transform of them in two processes against the whole program in one."""

import operator
import pickle

import pytest
import ranks
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fnn import _ranks, ops, tree
from fnn.ops import _collectives
from triton_kernels._register import register

N = 2
FACTOR = 10
BACKENDS = ("aot_eager", "inductor")


def _data(*shape):
    """The values of all processes, by rank."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(N, *shape, dtype=torch.float64, generator=generator)


def _group():
    return dist.group.WORLD.group_name, dist.get_world_size()


# name: the function of one process, and the same for all of them at once, (processes, ...) -> (processes, ...).
OPERATORS = {
    "all_gather": (
        lambda x: ops.all_gather(x, *_group(), dim=1),
        lambda xs: torch.cat(tuple(xs), 1).expand(N, -1, -1),
    ),
    "reduce_scatter": (
        lambda x: ops.reduce_scatter(x, *_group(), dim=-1),
        lambda xs: torch.stack(xs.sum(0).chunk(N, 1)),
    ),
    "all_reduce": (
        lambda x: ops.all_reduce(x, *_group()),
        lambda xs: xs.sum(0).expand_as(xs),
    ),
}
OPERATORS["all three"] = (
    lambda x: torch.cat([apply(x) for apply, _ in list(OPERATORS.values())[:3]], 1),
    lambda xs: torch.cat([whole(xs) for _, whole in list(OPERATORS.values())[:3]], 2),
)


def _nonlinear(apply):
    """A function with derivatives of every order that is another on each process."""
    return lambda x: apply(x).sin() * (1 + _ranks.rank())


def _all_nonlinear(whole):
    return lambda xs: whole(xs).sin() * (1 + torch.arange(N)[:, None, None])


# What one process computes of its x (3, 4), a tangent and a batch (3, 4, 2) along the last axis.
TRANSFORMS = {
    "value": lambda f, loss, x, t, b: f(x),
    "grad": lambda f, loss, x, t, b: grad(loss)(x),
    "vmap": lambda f, loss, x, t, b: vmap(f, 2)(b),
    "vmap(grad)": lambda f, loss, x, t, b: vmap(grad(loss), 2, 2)(b),
    "jvp": lambda f, loss, x, t, b: jvp(f, (x,), (t,))[1],
    "vmap(jvp)": lambda f, loss, x, t, b: vmap(lambda t: jvp(f, (x,), (t,))[1], 2)(b),
    "jacfwd": lambda f, loss, x, t, b: jacfwd(f)(x),
    "jacrev": lambda f, loss, x, t, b: jacrev(f)(x),
    "hessian": lambda f, loss, x, t, b: hessian(loss)(x),
    "jacrev(grad)": lambda f, loss, x, t, b: jacrev(grad(loss))(x),
    "hvp": lambda f, loss, x, t, b: jvp(grad(loss), (x,), (t,))[1],
    "jvp(jvp)": lambda f, loss, x, t, b: jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,))[1],
    "grad(norm of grad)": lambda f, loss, x, t, b: grad(lambda x: grad(loss)(x).square().sum())(x),
    "grad(vmap)": lambda f, loss, x, t, b: grad(lambda b: vmap(f, 2)(b).prod(0).sum())(b),
}


def _expected(whole):
    """The same of the whole program in one process, whose loss is the sum; by transform, then by rank.

    A direction that one process takes, all take: forward Jacobians are along axes common to all, and reverse ones are
    of the outputs' sum.
    """
    f = _all_nonlinear(whole)
    xs, ts, bs = _inputs()
    loss = lambda xs: f(xs).sum()
    forward = jacfwd(f)(xs)
    curvature = hessian(loss)(xs).sum(3)
    return {
        "value": f(xs),
        "grad": grad(loss)(xs),
        "vmap": vmap(f, 3, 1)(bs),
        "vmap(grad)": vmap(grad(loss), 3, 3)(bs),
        "jvp": jvp(f, (xs,), (ts,))[1],
        "vmap(jvp)": vmap(lambda t: jvp(f, (xs,), (t,))[1], 3, 1)(bs),
        "jacfwd": forward.sum(3),
        "jacrev": forward.sum(0).movedim(2, 0),
        "hessian": curvature,
        "jacrev(grad)": curvature,
        "hvp": jvp(grad(loss), (xs,), (ts,))[1],
        "jvp(jvp)": jvp(lambda xs: jvp(f, (xs,), (ts,))[1], (xs,), (ts,))[1],
        "grad(norm of grad)": grad(lambda xs: grad(loss)(xs).square().sum())(xs),
        "grad(vmap)": grad(lambda bs: vmap(f, 3, 1)(bs).prod(1).sum())(bs),
    }


def _inputs():
    return _data(3, 4), _data(4, 3).mT, _data(3, 4, 2)


def _transformed(name, names, backend):
    """What one process computes: the transforms called `names` of the operator called `name`."""
    f = _nonlinear(OPERATORS[name][0])
    # Clones, for torch fails in compiled forward mode over a view that comes from outside.
    mine = [values[_ranks.rank()].clone() for values in _inputs()]

    def every(*mine):
        return [TRANSFORMS[name](f, lambda x: f(x).sum(), *mine) for name in names]

    return (torch.compile(every, fullgraph=True, backend=backend) if backend else every)(*mine)


def _check(name, names, backend=None):
    expected = _expected(OPERATORS[name][1])
    for rank, found in enumerate(ranks.run(N, _transformed, name, names, backend)):
        for transform, value in zip(names, found, strict=True):
            torch.testing.assert_close(
                value, expected[transform][rank], rtol=1e-12, atol=1e-12, msg=lambda m, t=transform: f"{t}: {m}"
            )


@pytest.mark.parametrize("name", OPERATORS)
def test_every_transform(name):
    _check(name, list(TRANSFORMS))


def test_compiled_gradient():
    _check("all three", ["vmap(grad)"], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("names", [list(TRANSFORMS)[:6], list(TRANSFORMS)[6:]], ids=str)
def test_every_transform_compiled(names):
    _check("all three", names, "aot_eager")


def _code():
    from torch._inductor.utils import run_and_get_code

    group, count = _group()
    loss = lambda x: sum(
        collective(x, group, count).sin().sum() for collective in (ops.all_gather, ops.reduce_scatter, ops.all_reduce)
    )
    x = _data(2, 3)[_ranks.rank()]
    kept = x.clone()
    found, code = run_and_get_code(torch.compile(lambda x: grad(loss)(x), fullgraph=True), x)
    torch.testing.assert_close(found, grad(loss)(x))
    assert torch.equal(x, kept)
    return code[0]


@pytest.mark.slow
def test_inductor_is_given_the_collectives_of_torch():
    for code in ranks.run(N, _code):
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            assert f"torch.ops._c10d_functional.{name}" in code
        assert "torch.ops.fnn" not in code


# Wrong-rule probe: had torch computed a derivative in any other way than by the rule, the factor would not be seen.


def _wrong(right, rule, kernel, fake, vmap_rule):
    class Wrong(rule):
        @staticmethod
        def backward(ctx, grad):
            right, *rest = rule.backward(ctx, grad)
            return FACTOR * right, *rest

        @staticmethod
        def jvp(ctx, *tangents):
            return FACTOR * rule.jvp(ctx, *tangents)

    schema = str(right._schema).removeprefix("fnn::")
    library = torch.library.Library("probe_collectives", "FRAGMENT")
    return library, register(schema, cpu=kernel, cuda=kernel, fake=fake, vmap=vmap_rule, rule=Wrong, library=library)


RIGHT = [_collectives.gathered, _collectives.scattered, _collectives.summed]
WRONG = [
    _wrong(
        _collectives.gathered,
        *(_collectives._GatherRule, _collectives._gather),
        *(_collectives._fake_gather, _collectives._vmap_along_axis),
    ),
    _wrong(
        _collectives.scattered,
        *(_collectives._ScatterRule, _collectives._scatter),
        *(_collectives._fake_scatter, _collectives._vmap_along_axis),
    ),
    _wrong(
        _collectives.summed,
        *(_collectives._SumRule, _collectives._sum),
        *(_collectives._fake_sum, _collectives._vmap_elements),
    ),
]


def _derivatives(wrong, backend):
    """First derivatives of the three operators, right or wrong, in both directions."""
    group, count = _group()
    gather, scatter, reduce = [op for _, op in WRONG] if wrong else RIGHT

    def f(x):
        scattered, gathered = scatter(x, 0, count, group), gather(x, 0, count, group)
        return torch.cat([scattered.sin(), gathered.cos(), reduce(x, group).exp()])

    def every(x):
        loss = lambda x: f(x).sum()
        return grad(loss)(x), jvp(f, (x,), (x,))[1], vmap(grad(loss), 2)(x[..., None])

    run = torch.compile(every, fullgraph=True, backend=backend) if backend else every
    return run(_data(2, 3)[_ranks.rank()])


@pytest.mark.parametrize(
    "backend", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_a_wrong_rule_shows(backend):
    right, wrong = ranks.run(N, _derivatives, False, None), ranks.run(N, _derivatives, True, backend)
    for ours, probe in zip(tree.leaves(right), tree.leaves(wrong), strict=True):
        assert ours.abs().min() > 1e-3
        torch.testing.assert_close(probe, FACTOR * ours)


# One operator for a batch, none for one process, no communication for shapes.


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fnn":
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def _batched():
    group, count = _group()
    x = _data(2, 3, 5)[_ranks.rank()]
    with _Counted() as counted:
        vmap(vmap(lambda x: ops.all_gather(x, group, count)), 1)(x)
        vmap(grad(lambda x: ops.all_reduce(x.square(), group, count).sum()), 1)(x)
    return counted.names


def test_a_batch_is_one_collective():
    assert ranks.run(N, _batched) == [["fnn::all_gather", "fnn::all_reduce", "fnn::all_reduce"]] * N


@pytest.mark.parametrize("operation", [ops.all_gather, ops.reduce_scatter, ops.all_reduce, ops.average_gradient])
def test_one_process_alone_computes_nothing(operation):
    x = torch.ones(3, 2)
    assert operation(x, "alone", 1) is x
    with _Counted() as counted:
        grad(lambda x: operation(x, "alone", 1).sum())(x)
    assert counted.names == []


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_shapes_need_no_processes(device):
    """There is no process group here: whatever communicated would raise."""
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        x = torch.ones(4, 6, dtype=torch.bfloat16).t()
        found = [
            ops.all_gather(x, "nowhere", 2),
            ops.all_gather(x, "nowhere", 2, 1),
            ops.reduce_scatter(x, "nowhere", 2, -1),
            ops.all_reduce(x, "nowhere", 2),
            ops.average_gradient(x, "nowhere", 2),
        ]
        gradient = grad(lambda x: ops.all_gather(x, "nowhere", 2).sum())(x)
    assert [tuple(y.shape) for y in found] == [(12, 4), (6, 8), (6, 2), (6, 4), (6, 4)]
    assert {y.dtype for y in (*found, gradient)} == {torch.bfloat16}
    assert gradient.shape == x.shape


def _mean(backend):
    """Derivatives of a mean over processes by what is the same on all of them."""
    (group, count), x = _group(), _inputs()[0][0]

    def mean(x):
        mine = (ops.average_gradient(x, group, count) ** 3).sum() * (1 + _ranks.rank())
        return ops.all_reduce(mine, group, count) / count

    run = _of_every_order(mean)
    return (torch.compile(run, fullgraph=True, backend=backend) if backend else run)(x)


def _of_every_order(f):
    return lambda x: (f(x), grad(f)(x), jvp(f, (x,), (x.cos(),))[1], hessian(f)(x), vmap(grad(f))(x[None] * 2))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_mean_has_the_same_gradient_on_every_process(backend):
    expected = _of_every_order(lambda x: 1.5 * (x**3).sum())(_inputs()[0][0])
    for found in ranks.run(N, _mean, backend):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]


def _of_dtypes():
    group, count = _group()
    found = []
    for dtype in DTYPES:
        x = (torch.arange(12).reshape(3, 4).T + _ranks.rank()).to(dtype)
        found += [
            ops.all_gather(x, group, count, 1),
            ops.reduce_scatter(x, group, count),
            ops.all_reduce(x, group, count),
        ]
    scalar = torch.tensor(1.5)
    return found, ops.all_reduce(scalar, group, count), vmap(lambda x: ops.all_reduce(x, group, count))(scalar[None])


def test_every_dtype_and_tensors_that_are_not_contiguous():
    base = torch.arange(12).reshape(3, 4).T
    total = 2 * base + 1
    for rank, (found, scalar, scalars) in enumerate(ranks.run(N, _of_dtypes)):
        for dtype, several in zip(DTYPES, zip(*[iter(found)] * 3, strict=True), strict=True):
            expected = torch.cat([base, base + 1], 1), total.chunk(N)[rank], total
            torch.testing.assert_close(several, tuple(x.to(dtype) for x in expected), rtol=0, atol=0)
        assert scalar.item() == scalars.item() == 3.0


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "view_as_real", lambda: ops.all_reduce(torch.ones(2, dtype=torch.complex64), "g", 2)),
        (TypeError, "all_gather: x has dtype torch.bool", lambda: ops.all_gather(torch.ones(2).bool(), "g", 2)),
        (TypeError, "x is float, expected a tensor", lambda: ops.all_reduce(2.0, "g", 2)),
        (ValueError, r"shape \(3,\) cannot be cut into 2", lambda: ops.reduce_scatter(torch.ones(3), "g", 2)),
        (ValueError, r"shape \(\) has no axis 0", lambda: ops.all_gather(torch.tensor(1.0), "g", 2)),
        (ValueError, "has no axis 2", lambda: ops.all_gather(torch.ones(2, 2), "g", 2, 2)),
        (ValueError, "count is 0", lambda: ops.all_reduce(torch.ones(2), "g", 0)),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


# A shard of a parameter.


def _linear(params, x):
    params = tree.map(lambda leaf: leaf.gather() if isinstance(leaf, ops.ShardedLeaf) else leaf, params)
    return torch.nn.functional.linear(x, **params).sin().sum()


def _sharded(backend):
    """The gradient of this process's part of a weight (4, 6), cut along 1, and of a bias."""
    group, count = _group()
    rank = _ranks.rank()
    weight, x = _data(4, 6)[0], _data(5, 6)[rank]
    parts = {"weight": weight.chunk(count, 1)[rank], "bias": weight[:, 0].chunk(count)[rank]}

    def step(parts, x):
        def loss(parts):
            leaves = {
                "weight": ops.ShardedLeaf(parts["weight"], 1, 6, group, count),
                "bias": ops.ShardedLeaf(parts["bias"], 0, 4, group, count),
            }
            return _linear(leaves, x)

        return grad(loss)(parts)

    return (torch.compile(step, fullgraph=True, backend=backend) if backend else step)(parts, x)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_sharded_leaf_is_gathered_and_its_gradient_scattered(backend):
    weight = _data(4, 6)[0]
    expected = grad(_linear)({"weight": weight, "bias": weight[:, 0]}, _data(5, 6))
    first, second = ranks.run(N, _sharded, backend)
    torch.testing.assert_close(torch.cat([first["weight"], second["weight"]], 1), expected["weight"])
    torch.testing.assert_close(torch.cat([first["bias"], second["bias"]]), expected["bias"])


LEAF = ops.ShardedLeaf(torch.ones(2, 3), 0, 4, "nowhere", 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda leaf: leaf + 1,
        lambda leaf: 1 - leaf,
        lambda leaf: torch.ones(5, 4) @ leaf,
        lambda leaf: leaf @ torch.ones(3),
        lambda leaf: torch.ones(4, 3) * leaf,
        lambda leaf: leaf == 0,
        lambda leaf: leaf[0],
        lambda leaf: bool(leaf),
        lambda leaf: list(leaf),
        lambda leaf: leaf.square(),
        lambda leaf: leaf.device,
        lambda leaf: torch.nn.functional.linear(torch.ones(5, 3), leaf),
        lambda leaf: torch.nn.functional.linear(torch.ones(5, 3), weight=leaf),
        lambda leaf: torch.stack([leaf, leaf]),
        lambda leaf: operator.abs(leaf),
    ],
)
def test_nothing_computes_with_a_sharded_leaf(use):
    with pytest.raises(TypeError, match=r"one of 2 shards of a parameter of shape \(4, 3\).*distributed\.fsdp"):
        use(LEAF)


def test_a_sharded_leaf_is_a_leaf():
    assert tree.leaves({"a": [LEAF]})[0] is LEAF
    assert tree.map(lambda leaf: leaf.shape, LEAF) == (4, 3)
    assert LEAF.dtype is torch.float32
    assert not hasattr(LEAF, "nothing_of_this_name")
    assert pickle.loads(pickle.dumps(LEAF)).shape == (4, 3)
    with pytest.raises(ValueError, match="length 5 along axis 0 cannot be cut into 2 equal parts"):
        ops.ShardedLeaf(torch.ones(2, 3), 0, 5, "nowhere", 2)
