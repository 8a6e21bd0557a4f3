"""Where a `Loader` takes its batches from: a torch `Dataset`, read here or by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fnn import random, tree
from fnn.data import _generators

Tree = Any


class Reader:
    """A map-style `Dataset`, whose examples are collated and moved to the device."""

    def __init__(self, data: Any, device: torch.device | None, workers: int):
        if not hasattr(data, "__len__"):
            raise TypeError(f"Loader: {type(data).__name__} has no __len__; add one, it is needed to order the data")
        if len(data) == 0:
            raise ValueError(f"Loader: data is an empty {type(data).__name__}, expected at least one example")
        self.size, self.device = len(data), device
        self.identity = {"kind": "dataset"}
        self._data, self._workers = _Seeded(data), workers

    def batches(self, order: Tensor, batch_size: int, key: Tensor) -> Iterator[Tree]:
        """One batch after the other of the examples in `order`; `key` governs what they draw."""
        # fold_in 0 and 1 are the keys that the permutation of this epoch has used.
        seeds = random.bits(random.fold_in(key, 2), (self.size,), torch.int64).cpu()
        order = order.cpu()
        batches = zip(order.split(batch_size), seeds[order].split(batch_size), strict=True)
        on_gpu = self.device is not None and self.device.type == "cuda"
        read = DataLoader(
            self._data,
            batch_sampler=[list(zip(index.tolist(), seed.tolist(), strict=True)) for index, seed in batches],
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=on_gpu,
            generator=torch.Generator(),  # without one it would draw from torch's global generator
        )
        if self.device is None:
            return iter(read)
        return _on_cuda(read, self.device) if on_gpu else (_moved(batch, self.device) for batch in read)


class _Seeded(Dataset[Any]):
    """Examples that draw from torch's, numpy's and Python's global generators a function of their seed."""

    def __init__(self, data: Dataset[Any]):
        self.data = data

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Any]:
        examples = []
        with _generators.kept():
            for index, seed in places:
                _generators.seed(seed)
                examples.append(self.data[index])
        return examples


def is_dataset(data: Any) -> bool:
    """Whether `data` is a map-style `Dataset`; raises for what is neither that nor data in memory."""
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"Loader: data is {type(data).__name__}, an IterableDataset, which has no order to shuffle or to resume; "
            f"give a map-style Dataset with __getitem__ and __len__, or read it into tensors first"
        )
    if isinstance(data, DataLoader):
        raise TypeError("Loader: data is a torch DataLoader; give the data set inside it, loader.dataset")
    return isinstance(data, Dataset)


def _collate(examples: list[Any]) -> Tree:
    """torch's default, except that examples that are tuples make a tuple, not a list."""
    try:
        batch = default_collate(examples)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"Loader: the examples of the Dataset cannot be stacked into a batch: {error}; "
            f"let it return tensors, arrays or numbers of one shape, for example through its transform"
        ) from error
    return tuple(batch) if type(examples[0]) is tuple else batch


def _moved(batch: Tree, device: torch.device, non_blocking: bool = False) -> Tree:
    return tree.map(lambda x: x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x, batch)


def _on_cuda(batches: DataLoader[Any], device: torch.device) -> Iterator[Tree]:
    """Copied on a stream of their own, so that a batch travels while the kernels of the step before still run."""
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = _moved(batch, device, non_blocking=True)
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(copies)
        for leaf in tree.leaves(moved):
            if isinstance(leaf, Tensor):
                leaf.record_stream(steps)  # else its memory could be taken for a later copy while a step reads it
        yield moved
