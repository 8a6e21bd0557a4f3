"""`fnn.data`: batches in a reproducible order, keyed splits, and clear words for bad input."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fnn import random, tree
from fnn.data import Loader, split


class Squares(Dataset):
    """Example n is (n, n squared)."""

    def __init__(self, size=11):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, n):
        return torch.tensor([float(n)]), n * n


class Named(Squares):
    def __getitem__(self, n):
        return {"x": np.full(2, n), "name": f"number {n}"}


class Drawing(Squares):
    """An example with a random transform."""

    def __getitem__(self, n):
        return torch.rand(2)


class Ragged(Squares):
    def __getitem__(self, n):
        return torch.zeros(n)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def pairs(size=11):
    return torch.arange(float(size)).reshape(size, 1), torch.arange(size) ** 2


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(tree.allclose(x, y, 0, 0) for x, y in zip(a, b, strict=True))


# Loader: order


@pytest.mark.parametrize("data", [pairs(), Squares()], ids=["memory", "dataset"])
def test_order_is_the_permutation_of_key_and_epoch(data):
    key = random.key(7)
    loader = Loader(data, 4, key=key)
    for epoch in (0, 1, 5):
        order = random.permutation(random.fold_in(key, epoch), 11)[:8]
        batches = list(loader.epoch(epoch))
        assert [len(labels) for _, labels in batches] == [4, 4]
        assert torch.equal(torch.cat([labels for _, labels in batches]), order**2)
        assert torch.equal(torch.cat([x for x, _ in batches]), order[:, None].float())
    assert same(loader, loader.epoch(0))
    assert not same(loader.epoch(0), loader.epoch(1))


def test_without_a_key_the_order_is_the_data_s_own():
    loader = Loader(pairs(), 4)
    assert torch.equal(torch.cat([labels for _, labels in loader.epoch(3)]), torch.arange(8) ** 2)


@pytest.mark.parametrize("remainder", ["drop", "pad"])
@pytest.mark.parametrize("data", [pairs(), Squares()], ids=["memory", "dataset"])
def test_an_epoch_resumes_from_two_integers(data, remainder):
    key = random.key(0)
    whole = list(Loader(data, 3, key=key, remainder=remainder).epoch(3))
    fresh = Loader(data, 3, key=key, remainder=remainder)
    for start in range(len(whole) + 1):
        assert same(fresh.epoch(3, start=start), whole[start:])


def test_epochs_can_be_iterated_side_by_side():
    loader = Loader(pairs(), 3, key=random.key(0))
    for (a, _), (b, _) in zip(loader.epoch(1), loader.epoch(1), strict=True):
        assert torch.equal(a, b)


def test_workers_do_not_change_the_batches():
    key = random.key(3)
    alone = Loader(Squares(), 3, key=key, remainder="pad")
    together = Loader(Squares(), 3, key=key, remainder="pad", workers=2)
    assert same(alone.epoch(2, start=1), together.epoch(2, start=1))


def test_torch_s_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(Loader(Squares(), 4, key=random.key(0)))
    list(Loader(pairs(), 4, key=random.key(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_draw_differently_for_another_key_and_epoch():
    draws = {
        float(next(Loader(Drawing(4), 4, key=random.key(seed), workers=1).epoch(epoch)).sum())
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]
    }
    assert len(draws) == 3  # the same key and epoch draw the same


# Loader: shapes, remainder, containers


@pytest.mark.parametrize(("size", "batch_size"), [(11, 4), (12, 4), (3, 8), (1, 5), (5, 1), (5, 5)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_padded_batches_cover_every_example_exactly_once(size, batch_size, in_memory):
    loader = Loader(pairs(size) if in_memory else Squares(size), batch_size, key=random.key(1), remainder="pad")
    batches = list(loader.epoch(4))
    assert len(batches) == len(loader) == -(-size // batch_size)
    assert loader.examples == size
    for x, labels, mask in batches:
        assert (x.shape, labels.shape) == ((batch_size, 1), (batch_size,))
        assert (mask.shape, mask.dtype) == ((batch_size,), torch.bool)
        assert torch.equal(labels, x[:, 0].long() ** 2)  # the filling is made of real examples
    kept = torch.cat([x[mask, 0] for x, _, mask in batches])
    assert torch.equal(kept.sort().values, torch.arange(float(size)))


def test_dropped_batches_are_whole_and_counted():
    loader = Loader(pairs(11), 4, key=random.key(1))
    assert (len(loader), loader.examples) == (2, 8)
    seen = torch.cat([x for x, _ in loader])
    assert len(seen.unique()) == 8
    assert (len(Loader(pairs(12), 4)), Loader(pairs(12), 4).examples) == (3, 12)


def test_where_the_mask_goes():
    x = torch.arange(3)
    mask = torch.tensor([True, False])
    last = {
        kind: list(Loader(data, 2, remainder="pad"))[-1]
        for kind, data in {"tensor": x, "tuple": (x,), "list": [x, x], "dict": {"x": x}}.items()
    }
    assert type(last["tensor"]) is tuple
    assert type(last["tuple"]) is tuple
    assert type(last["list"]) is list
    assert [len(last[kind]) for kind in ("tensor", "tuple", "list")] == [2, 2, 3]
    assert all(torch.equal(last[kind][-1], mask) for kind in ("tensor", "tuple", "list"))
    assert list(last["dict"]) == ["x", "mask"]
    assert torch.equal(last["dict"]["mask"], mask)


@pytest.mark.parametrize(
    "data", [torch.arange(3), (torch.arange(3),), [torch.arange(3)], {"x": torch.arange(3)}, Squares(3)]
)
def test_the_mask_of_a_batch(data):
    padded, dropping = Loader(data, 2, remainder="pad"), Loader(data, 2)
    assert [padded.mask(batch).tolist() for batch in padded] == [[True, True], [True, False]]
    assert [dropping.mask(batch) for batch in dropping] == [None]


def test_batches_keep_the_containers_of_the_data():
    nested = {"images": np.arange(12.0).reshape(6, 2), "targets": Pair(torch.arange(6), torch.arange(6) > 2)}
    batch = next(iter(Loader(nested, 4)))
    assert type(batch["targets"]) is Pair
    assert torch.equal(batch["images"], torch.arange(8.0, dtype=torch.float64).reshape(4, 2))
    assert batch["targets"].y.dtype == torch.bool
    assert type(next(iter(Loader(Squares(), 4)))) is tuple
    assert type(next(iter(Loader(TensorDataset(*pairs()), 4)))) is tuple


def test_examples_that_hold_text():
    x = list(Loader(Named(5), 3, remainder="pad", device="cpu"))[-1]
    assert x["name"] == ["number 3", "number 4", "number 0"]
    assert x["x"].tolist() == [[3, 3], [4, 4], [0, 0]]
    assert x["mask"].tolist() == [True, True, False]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6)[::-1],
        np.arange(6, dtype=">i4"),
        np.frombuffer(np.arange(6).tobytes(), dtype=np.int64),
        np.arange(12).reshape(6, 2)[:, 1],
        np.arange(6, dtype=np.float16),
        np.arange(6) > 3,
    ],
    ids=["reversed", "big-endian", "read-only", "strided", "float16", "bool"],
)
@pytest.mark.filterwarnings("error")
def test_any_numeric_numpy_array(array):
    got = torch.cat(list(Loader(array, 2)))
    assert got.numpy().dtype.kind == array.dtype.kind
    assert np.array_equal(got.numpy(), array)


def test_batches_are_copies():
    data = torch.ones(4, requires_grad=True)
    batch = next(iter(Loader(data, 4)))
    assert not batch.requires_grad
    batch.zero_()
    assert data.sum() == 4


def test_batches_lie_on_the_device():
    for data in (pairs(), Squares()):
        batch = next(iter(Loader(data, 4, remainder="pad", device="meta", key=random.key(0))))
        assert all(leaf.is_meta for leaf in batch)


def test_repr():
    assert repr(Loader(pairs(), 4, key=random.key(0))) == "Loader(11 examples shuffled, 2 batches of 4, 'drop')"


# Loader: bad input


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Unmeasured(Dataset):
    def __getitem__(self, n):
        return n


@pytest.mark.parametrize(
    ("data", "arguments", "kind", "words"),
    [
        (pairs(), {"batch_size": 0}, ValueError, ["batch_size is 0", "at least 1"]),
        (pairs(), {"batch_size": -3}, ValueError, ["batch_size is -3"]),
        (pairs(), {"batch_size": 2.0}, TypeError, ["batch_size", "2.0", "float"]),
        (pairs(), {"batch_size": True}, TypeError, ["batch_size", "bool"]),
        (pairs(), {"batch_size": 12}, ValueError, ["batch_size is 12", "11 examples", "'pad'"]),
        (Squares(), {"batch_size": 12}, ValueError, ["batch_size is 12", "11 examples", "'pad'"]),
        (pairs(), {"remainder": "keep"}, ValueError, ["remainder", "'keep'", "'drop'", "'pad'"]),
        (pairs(), {"workers": 2}, ValueError, ["workers is 2", "memory"]),
        (Squares(), {"workers": -1}, ValueError, ["workers is -1"]),
        ({"x": torch.ones(3), "y": [torch.ones(4)]}, {}, ValueError, ["'x': 3", "'y.0': 4", "first axis"]),
        ((torch.ones(3), torch.tensor(1.0)), {}, ValueError, ["leaf '1'", "first axis"]),
        ((torch.ones(2), [1, 2]), {}, TypeError, ["leaf '1.0'", "int", "torch.tensor"]),
        (np.array(["a", "b"]), {}, TypeError, ["data has numpy dtype <U1", "numbers"]),
        ("text", {}, TypeError, ["data is str"]),
        ((), {}, ValueError, ["no leaves"]),
        (torch.ones(0, 3), {}, ValueError, ["empty", "at least one example"]),
        (Squares(0), {}, ValueError, ["empty Squares"]),
        (Endless(), {}, TypeError, ["Endless", "IterableDataset", "__getitem__"]),
        (Unmeasured(), {}, TypeError, ["Unmeasured", "__len__"]),
        (DataLoader(Squares()), {}, TypeError, ["DataLoader", ".dataset"]),
        (Pair(*pairs()), {"remainder": "pad"}, TypeError, ["Pair", "mask", "dict"]),
        ({"mask": torch.ones(3)}, {"remainder": "pad"}, ValueError, ["'mask'", "rename"]),
    ],
)
def test_bad_arguments_are_named(data, arguments, kind, words):
    arguments = {"batch_size": 2, **arguments}
    with pytest.raises(kind) as error:
        Loader(data, **arguments)
    assert all(word in str(error.value) for word in ("Loader", *words)), str(error.value)


@pytest.mark.parametrize("key", [0, torch.ones(3), torch.ones(3, dtype=torch.int32)])
def test_a_key_that_is_none(key):
    with pytest.raises((TypeError, ValueError), match=r"`key` is .* fnn\.random\.key\(seed\)"):
        Loader(pairs(), 2, key=key)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((-1,), ValueError, ["epoch is -1"]),
        ((1.0,), TypeError, ["epoch is 1.0", "float"]),
        ((0, -1), ValueError, ["start is -1"]),
        ((0, 6), ValueError, ["start is 6", "at most 5"]),
        ((0, "1"), TypeError, ["start is '1'"]),
    ],
)
def test_bad_epoch_or_start_fails_at_the_call(arguments, kind, words):
    loader = Loader(pairs(), 2)
    with pytest.raises(kind) as error:
        loader.epoch(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_examples_that_do_not_stack():
    with pytest.raises(TypeError, match="cannot be stacked"):
        list(Loader(Ragged(4), 2))


# split


def test_split_puts_every_example_into_exactly_one_part():
    data = {"x": torch.arange(103), "y": np.arange(103) * 2}
    parts = split(data, (0.7, 0.2, 0.1), random.key(0))
    assert [len(part["x"]) for part in parts] == [72, 21, 10]
    assert torch.equal(torch.cat([part["x"] for part in parts]).sort().values, torch.arange(103))
    assert all(isinstance(part["y"], np.ndarray) for part in parts)
    assert all(np.array_equal(part["y"], part["x"].numpy() * 2) for part in parts)


def test_split_is_a_function_of_its_key():
    x = torch.arange(50)
    first, again, other = (split(x, (0.5, 0.5), random.key(seed)) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.cat(first), random.permutation(random.key(0), 50))
    assert torch.equal(torch.cat(split(x, (0.5, 0.5))), x)


@pytest.mark.parametrize("key", [None, 0, 1])
@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.5, 0.3, 0.2), (0.9, 0.1)])
def test_stratified_parts_hold_each_label_in_its_share(key, fractions):
    labels = torch.tensor([0] * 100 + [5] * 37 + [-2] * 10)
    x = torch.arange(147)
    parts = split(x, fractions, None if key is None else random.key(key), stratify=labels)
    plain = split(x, fractions)
    assert [len(part) for part in parts] == [len(part) for part in plain]
    assert torch.equal(torch.cat(parts).sort().values, x)
    for part, fraction in zip(parts, fractions, strict=True):
        for label, count in [(0, 100), (5, 37), (-2, 10)]:
            assert abs(int((labels[part] == label).sum()) - count * fraction) <= 1


def test_a_stratified_part_is_shuffled_or_in_order_as_a_plain_one():
    labels = torch.arange(60) % 3
    shuffled, _ = split(labels, (0.5, 0.5), random.key(0), stratify=labels)
    assert not torch.equal(shuffled, shuffled.sort().values)
    assert not torch.equal(shuffled, torch.arange(30) % 3)
    in_order, _ = split(torch.arange(60), (0.5, 0.5), stratify=labels)
    assert torch.equal(in_order, in_order.sort().values)


@pytest.mark.parametrize(
    ("fractions", "stratify", "words"),
    [
        ((0.5, 0.4), None, ["fractions", "(0.5, 0.4)", "sum to 1"]),
        ((1.5, -0.5), None, ["positive"]),
        ((), None, ["fractions"]),
        ((0.99, 0.01), None, ["0.01", "empty part"]),
        ((0.5, float("nan")), None, ["nan", "sum to 1"]),
        ((0.5, 0.5), torch.zeros(9, dtype=torch.long), ["stratify", "(9,)", "(10,)"]),
        ((0.5, 0.5), torch.zeros(10), ["stratify", "float32", "integer"]),
    ],
)
def test_bad_splits(fractions, stratify, words):
    with pytest.raises(ValueError, match="split") as error:
        split(torch.arange(10), fractions, stratify=stratify)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_split_of_unsigned_integers(dtype):
    whole = torch.arange(6).to(dtype)
    first, second = split((whole,), (0.5, 0.5))
    assert torch.equal(torch.cat([*first, *second]), whole)
    assert first[0].dtype is dtype


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_loader_of_unsigned_integers(dtype):
    batches = [batch.tolist() for batch in Loader(torch.arange(4).to(dtype), 2)]
    assert batches == [[0, 1], [2, 3]]
