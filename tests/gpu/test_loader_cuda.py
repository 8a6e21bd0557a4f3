"""Batches that travel to a GPU while it computes: `python -m pytest tests/gpu`. Skipped where there is none."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fnn import _ranks, random, tree
from fnn.data import Loader, Windows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDTH = 2**20
"""Numbers in an example of `Wide`: a batch of four is 16 MiB, a third of a millisecond on the way to the device."""
SLOW = 100_000_000
"""Clock cycles, some 50 ms: longer than the host takes to read several batches of `Wide`."""


class Wide(Dataset):
    def __init__(self, size=48):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, n):
        return torch.full((WIDTH,), float(n + 1)), n


class Named(Wide):
    """Containers, a leaf that is no tensor, and a random transform."""

    def __getitem__(self, n):
        return {"x": torch.rand(3), "name": f"number {n}", "inner": [np.float32(n), np.random.rand()]}


def values(loader, cycles):
    """The batches of an epoch, each copied on the device by a kernel that waits behind one of `cycles` clock cycles."""
    found = []
    for batch in loader.epoch(1):
        torch.cuda._sleep(cycles)
        found.append(tree.map(torch.clone, batch))
    return tree.map(torch.Tensor.cpu, found)


def equal(a, b):
    """To the bit: structure and values."""
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("cycles", [0, SLOW], ids=["at once", "late"])
def test_a_batch_is_whole_when_it_is_read_and_stays_so(cycles):
    """At once: a kernel must not overtake the copy. Late: no later copy may take the memory that it has yet to read."""
    options = {"batch_size": 4, "key": random.key(0), "remainder": "pad"}
    loader = Loader(Wide(), device="cuda", **options)
    values(loader, 0)  # memory, pinned and on the device, is made once: to make it waits for the device
    expected = list(Loader(Wide(), **options).epoch(1))
    for _ in range(2):
        assert equal(values(loader, cycles), expected)


def test_a_batch_is_fetched_while_the_step_before_runs():
    loader = Loader(Wide(), 4, device="cuda")
    values(loader, 0)
    batches = iter(loader)
    x, _ = next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * SLOW)
    step = torch.cuda.Event()
    step.record()
    y, _ = next(batches)
    assert not step.query()
    torch.cuda.synchronize()
    assert x[:, 0].tolist() == [1, 2, 3, 4]
    assert y[:, -1].tolist() == [5, 6, 7, 8]


def test_the_memory_of_batches_is_used_again():
    loader = Loader(Wide(), 4, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for x, _ in loader:
        assert x.is_cuda
        torch.cuda.synchronize()
    batch = 4 * WIDTH * 4
    assert torch.cuda.max_memory_allocated() - before < 5 * batch  # of twelve


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu(workers):
    options = {"batch_size": 4, "key": random.key(3), "remainder": "pad"}
    expected = list(Loader(Named(10), **options).epoch(1))
    found = list(Loader(Named(10), device="cuda", workers=workers, **options).epoch(1))
    assert [batch["name"] for batch in found] == [batch["name"] for batch in expected]
    for batch, other in zip(found, expected, strict=True):
        for path in (("x",), ("inner", 0), ("inner", 1), ("mask",)):
            here, there = batch, other
            for part in path:
                here, there = here[part], there[part]
            assert here.is_cuda
            assert torch.equal(here.cpu(), there), path


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(
    "data", [Wide(10), (torch.arange(10.0), np.arange(10)), Windows(torch.arange(100), 4, stride=10)], ids=type
)
def test_the_mask_lies_beside_its_batch(data, device):
    loader = Loader(data, 4, device=device, remainder="pad")
    masks = [loader.mask(batch) for batch in loader]
    assert all(leaf.device == torch.device("cuda:0") for batch in loader for leaf in tree.leaves(batch))
    assert [mask.tolist() for mask in masks] == [[True] * 4, [True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("data", [Wide(10), (torch.arange(10.0), np.arange(10))], ids=["dataset", "memory"])
def test_the_parts_of_processes_make_up_the_batch(data, monkeypatch):
    options = {"batch_size": 4, "key": random.key(3), "remainder": "pad"}
    epochs = []
    for place in (0, 1):
        monkeypatch.setattr(_ranks, "data_axis", lambda who, mesh, place=place: (place, 2))
        epochs.append(list(Loader(data, device="cuda", shard="a mesh", **options).epoch(1)))
    together = [tree.map(lambda *leaves: torch.cat(leaves).cpu(), *parts) for parts in zip(*epochs, strict=True)]
    assert equal(together, list(Loader(data, **options).epoch(1)))
