"""`fnn.random` against values recorded from JAX (`golden/record_random.py`), and itself under every transform."""

import doctest
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fnn.random
from fnn.random import _bits, _threefry

GOLDEN = np.load(Path(__file__).parent / "golden" / "random.npz")
CASES = json.loads(GOLDEN["header"].tobytes())["cases"]
MOST_ULP = 4


def decode(name: str, value):
    if name == "dtype":
        return getattr(torch, value)
    if isinstance(value, dict):
        return torch.tensor(value["array"], dtype=getattr(torch, value["dtype"]))
    return tuple(value) if isinstance(value, list) else value


def derive(path) -> Tensor:
    seed, *steps = path
    key = fnn.random.key(seed)
    for step in steps:
        key = fnn.random.split(key, step[1])[step[2]] if step[0] == "split" else fnn.random.fold_in(key, step[1])
    return key


def as_recorded(value: Tensor, dtype: str) -> np.ndarray:
    value = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    array = value.numpy()
    return array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array


def ulp_distance(x: np.ndarray, y: np.ndarray) -> int:
    integer = {4: np.int32, 8: np.int64}[x.dtype.itemsize]
    ordered = [np.where(bits < 0, np.iinfo(integer).min - bits, bits) for bits in (x.view(integer), y.view(integer))]
    return int(np.abs(ordered[0].astype(object) - ordered[1].astype(object)).max(initial=0))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n]['function']}")
def test_equals_jax(number):
    case, recorded = CASES[number], GOLDEN[str(number)]
    arguments = {name: decode(name, value) for name, value in case["arguments"].items()}
    value = getattr(fnn.random, case["function"])(derive(case["key"]), **arguments)
    assert list(value.shape) == case["shape"]
    value = as_recorded(value, case["dtype"])
    assert value.dtype == np.dtype(case["dtype"])
    if "normal" in case["function"] and value.dtype in (np.float32, np.float64):
        value = value.reshape(-1)[:: case["every"]] if "every" in case else value
        assert ulp_distance(value, recorded) <= MOST_ULP
    elif "sha256" in case:
        assert np.array_equal(np.concatenate([value.reshape(-1)[:8], value.reshape(-1)[-8:]]), recorded)
        assert hashlib.sha256(value.tobytes()).hexdigest() == case["sha256"]
    else:
        assert np.array_equal(value, recorded)


# What every transform has to leave unchanged: functions of a key, and of a vector of parameters in (0, 1).
DRAWS = {
    "split": lambda key, p: fnn.random.split(key, (2, 3)),
    "fold_in": lambda key, p: fnn.random.fold_in(key, (100 * p[0]).to(torch.int64)),
    "bits": lambda key, p: fnn.random.bits(key, (5, 7)),
    "bits_int64": lambda key, p: fnn.random.bits(key, (5,), torch.int64),
    "bits_uint8": lambda key, p: fnn.random.bits(key, (50,), torch.uint8),
    "uniform": lambda key, p: fnn.random.uniform(key, (40, 3)),
    "uniform_between": lambda key, p: fnn.random.uniform(key, (40, 3), minval=-p, maxval=3 * p),
    "uniform_float16": lambda key, p: fnn.random.uniform(key, (90,), torch.float16, -1e-3, p[1]),
    "uniform_bfloat16": lambda key, p: fnn.random.uniform(key, (90,), torch.bfloat16, -0.3, p[1]),
    "uniform_float64": lambda key, p: fnn.random.uniform(key, (90,), torch.float64, -0.3, p[1]),
    "bernoulli": lambda key, p: fnn.random.bernoulli(key, p, (40, 3)),
    "normal": lambda key, p: fnn.random.normal(key, (999,)),
    "normal_bfloat16": lambda key, p: fnn.random.normal(key, (99,), torch.bfloat16),
    "truncated_normal": lambda key, p: fnn.random.truncated_normal(key, -p, 2.0, (99, 3)),
    "randint": lambda key, p: fnn.random.randint(key, (99,), -5, 1000),
    "randint_int64": lambda key, p: fnn.random.randint(key, (9,), -5, 10**12, torch.int64),
    "permutation": lambda key, p: fnn.random.permutation(key, 1700),
    "permutation_independent": lambda key, p: fnn.random.permutation(key, p.expand(4, 3), 1, independent=True),
    "categorical": lambda key, p: fnn.random.categorical(key, p.log(), shape=(50,)),
    "choice": lambda key, p: fnn.random.choice(key, p, (50,), p=p / p.sum()),
    "choice_no_replacement": lambda key, p: fnn.random.choice(key, 3, (2,), replace=False, p=p),
}
PARAMETERS = torch.tensor([0.25, 0.6, 0.15])
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@draws
def test_vmap_over_keys_and_parameters(draw):
    keys = fnn.random.split(fnn.random.key(7), (2, 3))
    parameters = torch.stack([PARAMETERS, PARAMETERS.flip(0)])
    looped = torch.stack([torch.stack([draw(keys[i, j], parameters[i]) for j in range(3)]) for i in range(2)])
    nested = torch.vmap(torch.vmap(draw, (0, None)), (0, 0))
    assert torch.equal(nested(keys, parameters), looped)
    keys_last = torch.vmap(torch.vmap(draw, (1, None), 1), (1, 0), 2)  # keys (2 words, 2, 3); results (., 3, 2, ...)
    assert torch.equal(keys_last(keys.movedim(-1, 0), parameters), looped.transpose(0, 1).movedim(2, 0))


@draws
def test_meta_key_gives_shape_and_dtype(draw):
    real = draw(fnn.random.key(0), PARAMETERS)
    for meta in (
        draw(fnn.random.key(0, device="meta"), PARAMETERS.to("meta")),
        torch.vmap(draw, (0, None))(torch.empty(4, 2, dtype=torch.int32, device="meta"), PARAMETERS.to("meta"))[0],
    ):
        assert meta.is_meta
        assert meta.shape == real.shape
        assert meta.dtype == real.dtype


# Those with arithmetic of their own, of one shape: they share their random bits, and the compiler computes these once.
COMPILED = {
    "fold_in": DRAWS["fold_in"],
    "uniform_between": lambda key, p: fnn.random.uniform(key, (32, 3), minval=-p, maxval=3 * p),
    "uniform_float16": lambda key, p: fnn.random.uniform(key, (32, 3), torch.float16, -1e-3, p[1]),
    "uniform_float64": lambda key, p: fnn.random.uniform(key, (32, 3), torch.float64, -0.3, p[1]),
    "bernoulli": lambda key, p: fnn.random.bernoulli(key, p, (32, 3)),
    "normal": lambda key, p: fnn.random.normal(key, (32, 3)),
    "normal_bfloat16": lambda key, p: fnn.random.normal(key, (32, 3), torch.bfloat16),
    "truncated_normal": lambda key, p: fnn.random.truncated_normal(key, -p, 2.0, (32, 3)),
    "randint_int64": lambda key, p: fnn.random.randint(key, (32, 3), -5, 10**12, torch.int64),
    "categorical": lambda key, p: fnn.random.categorical(key, p.log(), shape=(32,)),
}


@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in DRAWS]
)
def test_traces_as_one_graph(name):
    # Inductor takes seconds each: with what goes through it below Dynamo alone, with the others AOTAutograd too.
    key = fnn.random.key(11)
    traced = torch.compile(DRAWS[name], backend="eager" if name in COMPILED else "aot_eager", fullgraph=True)
    assert torch.equal(traced(key, PARAMETERS), DRAWS[name](key, PARAMETERS))


@pytest.mark.slow
def test_compiled_equals_eager():
    def every(key, p):
        return {name: draw(key, p) for name, draw in COMPILED.items()}

    key = fnn.random.key(11)
    found, expected = torch.compile(every, fullgraph=True)(key, PARAMETERS), every(key, PARAMETERS)
    assert [name for name in COMPILED if not torch.equal(found[name], expected[name])] == []


def test_compiled_vmap_of_grad(fast_compile):
    def loss(w, key, step):
        key = fnn.random.fold_in(key, step)
        return (w * fnn.random.uniform(key, w.shape, minval=-1.0)).sum() ** 2

    per_key = torch.vmap(torch.func.grad(loss), (None, 1, 0))
    arguments = (torch.ones(5), fnn.random.split(fnn.random.key(0), 3).T.contiguous(), torch.arange(3))
    torch.testing.assert_close(torch.compile(per_key, fullgraph=True)(*arguments), per_key(*arguments))


def test_steps_and_batch_sizes_compile_once():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def step(key, count, x):
        return fnn.random.bernoulli(fnn.random.fold_in(key, count), 0.5, x.shape)

    torch.compiler.reset()
    for count in range(5):
        step(fnn.random.key(count), torch.tensor(count), torch.zeros(8, 3))
    assert len(graphs) == 1
    for size in (9, 10, 1000, 200_000):  # the second size makes the one dynamic graph
        step(fnn.random.key(0), torch.tensor(0), torch.zeros(size, 3))
    assert len(graphs) == 2


def test_pieces_do_not_show(monkeypatch):
    key = fnn.random.key(5)
    functions = [
        lambda: fnn.random.normal(key, (17, 60)),
        lambda: fnn.random.uniform(key, (1001,), torch.float64, minval=PARAMETERS[0]),
        lambda: fnn.random.truncated_normal(key, torch.linspace(-1.0, 0.0, 60), 0.5, (17, 60)),
        lambda: torch.vmap(lambda key: fnn.random.bits(key, (500,)))(fnn.random.split(key, 3)),
    ]
    whole = [function() for function in functions]
    monkeypatch.setattr(_bits, "_CPU_PIECE", 64)
    for function, expected in zip(functions, whole, strict=True):
        assert torch.equal(function(), expected)


def test_published_threefry_vectors():
    # Random123's known answers: key, counter, result.
    for key, counter, result in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]:
        words = [torch.tensor(_threefry.signed(word), dtype=torch.int32) for word in (*key, *counter)]
        assert [int(word) & 0xFFFFFFFF for word in _threefry.encrypt(*words)] == list(result)


def test_few_hashes_equal_many():
    key, count = fnn.random.key(-12345), torch.arange(-20, 20, dtype=torch.int32)
    one_by_one = torch.stack([_threefry.hash_words(key, one) for one in count])
    assert torch.equal(_threefry.hash_words(key, count), one_by_one)
    assert torch.equal(_threefry.hash_inline(key, count), one_by_one)


def test_counters_beyond_32_bits():
    k0, k1 = key = fnn.random.key(3)
    for start in (2**31, 2**32, 5 * 2**32 + 2**31 + 7):
        low = torch.tensor([_threefry.signed(start + i) for i in range(3)], dtype=torch.int32)
        expected = _threefry.encrypt(k0, k1, start >> 32, low)
        assert all(torch.equal(a, b) for a, b in zip(_bits.words(key, start, 3), expected, strict=True))


def test_seeds():
    for seed in (0, 42, -1, 2**32 + 7, np.int64(9)):
        key = fnn.random.key(seed)
        assert key.tolist() == [0, _threefry.signed(int(seed))]
        assert torch.equal(fnn.random.key(torch.tensor(seed)), key)
    assert fnn.random.key(0, device="meta").is_meta
    seeds = torch.tensor([3, -4])
    assert torch.equal(torch.vmap(fnn.random.key)(seeds), torch.stack([fnn.random.key(3), fnn.random.key(-4)]))


def test_gradients_of_uniform_bounds():
    key, low, high = fnn.random.key(1), torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 7.0])
    u = fnn.random.uniform(key, (50, 2))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)):

        def mean(low, high, dtype=dtype):
            return fnn.random.uniform(key, (50, 2), dtype, low, high).double().mean(0).sum()

        u = fnn.random.uniform(key, (50, 2), dtype).double()
        grads = torch.func.grad(mean, (0, 1))(low, high)
        for grad, expected in zip(grads, ((1 - u).mean(0), u.mean(0)), strict=True):
            torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)
        tangent = torch.func.jvp(mean, (low, high), (torch.ones(2), torch.ones(2)))[1]
        torch.testing.assert_close(tangent, torch.tensor(2.0, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_derivatives_of_truncated_normal_bounds():
    key = fnn.random.key(1)
    bounds = torch.tensor([[-1.0, -2.0, 0.5], [1.0, 0.3, 2.0]], dtype=torch.float64)

    def f(bounds):
        return fnn.random.truncated_normal(key, *bounds, (4, 3), torch.float64).pow(2).sum()

    torch.autograd.gradcheck(f, bounds.clone().requires_grad_())
    torch.autograd.gradgradcheck(f, bounds.clone().requires_grad_())
    forward = torch.func.jacfwd(f)(bounds)
    torch.testing.assert_close(torch.func.grad(f)(bounds), forward)

    def single(bounds):
        return fnn.random.truncated_normal(key, *bounds, (4, 3)).pow(2).sum()

    # The same bits make coarser draws of another stream in float32, so compare with its own differences.
    step = torch.zeros(2, 3)
    step[0, 0] = 1e-2
    difference = (single(bounds.float() + step) - single(bounds.float() - step)) / 2e-2
    torch.testing.assert_close(torch.func.grad(single)(bounds.float())[0, 0], difference, rtol=1e-3, atol=1e-3)


def test_gradients_reach_what_is_drawn_from():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for draw in (
        lambda x: fnn.random.permutation(fnn.random.key(0), x),
        lambda x: fnn.random.permutation(fnn.random.key(0), x, 1, independent=True),
    ):
        grad = torch.func.grad(lambda x, draw=draw: (draw(x) ** 2).sum())(x)
        torch.testing.assert_close(grad, 2 * x)
    places = fnn.random.choice(fnn.random.key(0), 6, (20,))
    grad = torch.func.grad(lambda x: fnn.random.choice(fnn.random.key(0), x, (20,)).sum())(x)
    torch.testing.assert_close(grad, torch.bincount(places, minlength=6).float()[:, None].expand(6, 4))


KEY = fnn.random.key(0)
MISTAKES = [
    (lambda: fnn.random.uniform(0), TypeError, "but `key` is int 0. Make a key with fnn.random.key(seed)"),
    (lambda: fnn.random.split(KEY.float()), TypeError, "a float32 tensor of shape (2,). Make a key"),
    (lambda: fnn.random.fold_in(KEY.view(torch.uint32), 1), TypeError, "`key` is a uint32 tensor"),
    (lambda: fnn.random.normal(torch.zeros(3, dtype=torch.int32)), ValueError, "of shape (3,). Make a key"),
    (lambda: fnn.random.normal(fnn.random.split(KEY, 4)), ValueError, "of shape (4, 2). For one call per key"),
    (lambda: fnn.random.key(1.5), TypeError, "`seed` is an integer"),
    (lambda: fnn.random.key(2**63), ValueError, "`seed` has 64 bits"),
    (lambda: fnn.random.key(torch.ones(2, dtype=torch.int64)), TypeError, "`seed` is an integer or an integer tensor"),
    (lambda: fnn.random.split(KEY, -1), ValueError, "`num` has no negative sizes"),
    (lambda: fnn.random.split(KEY, 2.5), TypeError, "`num` is a tuple of sizes"),
    (lambda: fnn.random.fold_in(KEY, 0.5), TypeError, "`data` is an integer"),
    (lambda: fnn.random.fold_in(KEY, 2**32), ValueError, "`data` has 32 bits"),
    (lambda: fnn.random.fold_in(KEY, torch.tensor(0.5)), TypeError, "`data` is an integer"),
    (lambda: fnn.random.fold_in(KEY, torch.arange(3)), ValueError, "torch.vmap(fnn.random.fold_in, (None, 0))"),
    (lambda: fnn.random.uniform(KEY, 3), TypeError, "`shape` is a tuple of sizes such as (3,) or (), not int 3"),
    (lambda: fnn.random.uniform(KEY, (2, -1)), ValueError, "`shape` has no negative sizes"),
    (lambda: fnn.random.uniform(KEY, (2.0,)), TypeError, "`shape` is a tuple of sizes"),
    (lambda: fnn.random.uniform(KEY, (2,), torch.int32), TypeError, "`dtype` is one of torch.float32"),
    (lambda: fnn.random.uniform(KEY, (2,), minval=1.5), ValueError, "`minval` is at most `maxval`, but 1.5 is more"),
    (lambda: fnn.random.uniform(KEY, (2,), minval="0"), TypeError, "`minval` is a real number"),
    (lambda: fnn.random.uniform(KEY, (2,), maxval=torch.tensor(True)), TypeError, "`maxval` is a real number"),
    (lambda: fnn.random.uniform(KEY, (2,), maxval=torch.ones(3)), ValueError, "`maxval` of shape (3,) does not broad"),
    (lambda: fnn.random.uniform(KEY, (), maxval=torch.ones(1)), ValueError, "`maxval` of shape (1,) does not broad"),
    (lambda: fnn.random.bits(KEY, (2,), torch.float32), TypeError, "`dtype` is one of torch.int32"),
    (lambda: fnn.random.bernoulli(KEY, 1.5), ValueError, "`p` is a probability, from 0 to 1, not 1.5"),
    (lambda: fnn.random.bernoulli(KEY, torch.tensor(1)), TypeError, "the dtype of `p`"),
    (lambda: fnn.random.bernoulli(KEY, None), TypeError, "`p` is a real number"),
    (lambda: fnn.random.truncated_normal(KEY, 2, -2), ValueError, "`lower` is at most `upper`"),
    (lambda: fnn.random.randint(KEY, (2,), 5, 5), ValueError, "`minval` is less than `maxval`"),
    (lambda: fnn.random.randint(KEY, (2,), 0, 9.5), TypeError, "`maxval` is an integer"),
    (lambda: fnn.random.randint(KEY, (2,), torch.tensor(0.5), 9), TypeError, "`minval` is an integer"),
    (lambda: fnn.random.randint(KEY, (2,), 0, 300, torch.int8), ValueError, "`maxval` lies between -128 and 128"),
    (lambda: fnn.random.randint(KEY, (2,), 0, 3, torch.float32), TypeError, "`dtype` is one of torch.int32"),
    (lambda: fnn.random.permutation(KEY, 2.5), TypeError, "`x` is an integer or a tensor"),
    (lambda: fnn.random.permutation(KEY, torch.tensor(3)), TypeError, "`x` is an integer or a tensor"),
    (lambda: fnn.random.permutation(KEY, -1), ValueError, "`x` is not negative"),
    (lambda: fnn.random.permutation(KEY, torch.ones(2, 3), 2), IndexError, "`axis` 2 is none"),
    (lambda: fnn.random.categorical(KEY, [0.1, 0.2]), TypeError, "`logits` is a tensor"),
    (lambda: fnn.random.categorical(KEY, torch.arange(3)), TypeError, "the dtype of `logits`"),
    (
        lambda: fnn.random.categorical(KEY, torch.ones(2, 3), shape=(3,)),
        ValueError,
        "`shape` (3,) does not end in (2,)",
    ),
    (lambda: fnn.random.choice(KEY, 3, (4,), replace=False), ValueError, "4 draws without replacement need as many"),
    (lambda: fnn.random.choice(KEY, 0, (4,)), ValueError, "`a` has no outcomes"),
    (lambda: fnn.random.choice(KEY, 2.5), TypeError, "`a` is an integer or a tensor"),
    (lambda: fnn.random.choice(KEY, 3, p=[0.1, 0.2, 0.7]), TypeError, "`p` is a tensor"),
    (lambda: fnn.random.choice(KEY, 3, p=torch.ones(2)), ValueError, "`p` has a probability for each outcome"),
]


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_errors_name_the_argument(mistake, error, message):
    with pytest.raises(error, match=re.escape(message)):
        mistake()


def test_examples():
    modules = [fnn.random, *(sys.modules[name] for name in list(sys.modules) if name.startswith("fnn.random."))]
    results = [doctest.testmod(module, extraglobs={"fnn": fnn, "torch": torch}) for module in modules]
    assert sum(result.attempted for result in results) > 15
    assert not any(result.failed for result in results)
