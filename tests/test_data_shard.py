"""`Loader(shard=mesh)`: the parts of all processes, one after the other, are the batch of one process."""

import random as python_random

import numpy as np
import pytest
import ranks
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import Dataset

from fnn import _ranks, distributed, random, tree
from fnn.data import Loader, Windows


class Noisy(Dataset):
    """Examples with a random transform of each of the generators that a loader seeds; notes which were read."""

    def __init__(self, size=11):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, n):
        self.read.append(n)
        return {"n": n, "x": torch.rand(2), "y": np.random.rand(), "z": python_random.random()}


DATA = {
    "memory": lambda: (torch.arange(22.0).reshape(11, 2), np.arange(11) ** 2),
    "dict": lambda: {"x": torch.arange(11), "inner": [torch.arange(11.0) / 3]},
    "windows": lambda: Windows(torch.arange(100) ** 2, context=7, stride=8),
    "dataset": Noisy,
}


@pytest.fixture
def parts(monkeypatch):
    """The loaders of `count` processes, made in this one."""

    def make(count, *arguments, **options):
        loaders = []
        for place in range(count):
            monkeypatch.setattr(_ranks, "data_axis", lambda who, mesh, place=place: (place, count))
            loaders.append(Loader(*arguments, shard="a mesh", **options))
        return loaders

    return make


def together(epochs):
    """The batches of several processes, the parts of each step one after the other."""
    return [tree.map(lambda *leaves: torch.cat(leaves), *parts) for parts in zip(*epochs, strict=True)]


def equal(a, b):
    """To the bit: structure, dtypes and values."""
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("remainder", ["drop", "pad"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", DATA)
def test_the_parts_make_up_the_batches_of_one_process(parts, kind, count, remainder):
    options = {"batch_size": 4, "key": random.key(7), "remainder": remainder}
    whole, loaders = Loader(DATA[kind](), **options), parts(count, DATA[kind](), **options)
    for start in (0, 1):
        expected = list(whole.epoch(3, start))
        assert equal(together([loader.epoch(3, start) for loader in loaders]), expected)
    for loader in loaders:
        assert (len(loader), loader.examples, loader.size) == (len(whole), whole.examples, whole.size)
        assert loader.identity == whole.identity
        assert loader.batch_size == 4
        assert {len(leaf) for batch in loader for leaf in tree.leaves(batch)} == {4 // count}


def test_the_parts_without_a_key_are_rows_in_order(parts):
    first, second = parts(2, torch.arange(9), 4)
    assert [batch.tolist() for batch in first] == [[0, 1], [4, 5]]
    assert [batch.tolist() for batch in second] == [[2, 3], [6, 7]]


def test_the_mask_of_a_part_is_that_of_its_rows(parts):
    loaders = parts(3, torch.arange(8), 6, remainder="pad")
    masks = [[loader.mask(batch).tolist() for batch in loader] for loader in loaders]
    assert masks == [[[True, True], [True, True]], [[True, True], [False, False]], [[True, True], [False, False]]]
    assert [next(loader.epoch(0, 1))[0].tolist() for loader in loaders] == [[6, 7], [0, 1], [2, 3]]


def test_a_process_reads_only_its_part_of_a_dataset(parts):
    key, sets = random.key(1), [Noisy(), Noisy()]
    loaders = [parts(2, data, 4, key=key)[place] for place, data in enumerate(sets)]
    for loader in loaders:
        list(loader.epoch(2))
    order = random.permutation(random.fold_in(key, 2), 11)[:8].reshape(2, 2, 2)  # step, place, row
    assert [data.read for data in sets] == [order[:, place].flatten().tolist() for place in (0, 1)]


def test_workers_read_the_parts_of_one_process(parts):
    options = {"batch_size": 4, "key": random.key(7), "remainder": "pad"}
    loaders = parts(2, Noisy(), workers=2, **options)
    assert equal(together([loader.epoch(3, 1) for loader in loaders]), list(Loader(Noisy(), **options).epoch(3, 1)))


# processes


def _epochs():
    meshes = {
        "data": distributed.init(quiet=False),
        "one by two": distributed.init(model=2, quiet=False),
        "two by one": init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model")),
    }
    found = {}
    for name, mesh in meshes.items():
        loaders = [Loader(make(), 4, key=random.key(7), remainder="pad", shard=mesh) for make in DATA.values()]
        assert all(loader.shard is mesh for loader in loaders)
        found[name] = [list(loader.epoch(3, 1)) for loader in loaders], repr(loaders[0])
    return found


def test_the_mesh_says_which_part():
    expected = [list(Loader(make(), 4, key=random.key(7), remainder="pad").epoch(3, 1)) for make in DATA.values()]
    first, second = ranks.run(2, _epochs)
    for name in ("data", "two by one"):
        for one, other, whole in zip(first[name][0], second[name][0], expected, strict=True):
            assert equal(together([one, other]), whole)
        assert second[name][1] == "Loader(11 examples shuffled, 3 batches of 4, 'pad', part 1 of 2)"
    for rank in (first, second):  # processes that share a model have the same rows
        assert all(equal(epoch, whole) for epoch, whole in zip(rank["one by two"][0], expected, strict=True))
        assert rank["one by two"][1].endswith("part 0 of 1)")


def _refused():
    """What each of several loaders says that differ between processes."""
    mesh, rank = distributed.init(quiet=False), _ranks.rank()
    said = []
    for data, batch_size, seed in [
        (torch.arange(8), 4, rank),
        (torch.arange(8) + rank, 4, 0),
        (torch.zeros(8 - 6 * rank), 4, 0),
        (torch.zeros(8), 4 + 2 * rank, 0),
        (Noisy(8 + rank), 4, 0),
        ([torch.zeros(8), Noisy(8)][rank], 4, 0),
    ]:
        try:
            Loader(data, batch_size, key=random.key(seed), shard=mesh)
        except ValueError as error:
            said.append(str(error))
    return said


def test_processes_with_other_data_or_arguments_are_told_so():
    first, second = ranks.run(2, _refused)
    assert first == second
    begin = [
        "key is [0, 0] on rank 0 and [0, 1]",
        "digest is ",
        "digest is ",
        "batch_size is 4",
        "size is 8",
        "kind is ",
    ]
    for message, words in zip(first, begin, strict=True):
        assert message.startswith(f"Loader(shard=): {words}"), message
        assert "rank 1; give every process the same data" in message


# one process


def test_a_run_of_one_process_has_all_rows():
    loader = Loader(torch.arange(8), 4, shard=distributed.init(device="cpu"))
    assert repr(loader) == "Loader(8 examples in order, 2 batches of 4, 'drop', part 0 of 1)"
    assert torch.equal(torch.cat(list(loader)), torch.arange(8))
    assert Loader(torch.arange(8), 4).shard is None


@pytest.mark.parametrize(
    ("batch_size", "count", "words"),
    [(10, 4, "is 10, which the 4 .* such as 8 or 12$"), (3, 4, "is 3, which the 4 .* a multiple of 4, such as 4$")],
)
def test_a_batch_that_cannot_be_shared(parts, batch_size, count, words):
    with pytest.raises(ValueError, match=f"Loader: batch_size {words}"):
        parts(count, torch.arange(16), batch_size)


def test_a_shard_that_is_no_mesh_with_a_data_axis():
    with pytest.raises(TypeError, match=r"Loader\(shard=\): mesh is int, expected a DeviceMesh"):
        Loader(torch.arange(8), 4, shard=2)
    distributed.init(device="cpu")
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "model"))
    with pytest.raises(ValueError, match=r"Loader\(shard=\): no axis .* 'data'.* \['rows', 'model'\]"):
        Loader(torch.arange(8), 4, shard=mesh)
