"""Batches of data, in an order that a run can resume from two integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from fnn import random, tree
from fnn.data._arrays import common_length, place

Tree = Any


class Loader:
    """Batches of one size over data in memory or a torch `Dataset`, shuffled by a key.

    data: a pytree of tensors and numpy arrays that share their first axis, such as ``(images, labels)`` or a
        dict; or a map-style `torch.utils.data.Dataset`, whose examples go through torch's default collate
    batch_size: examples in every batch
    key: shuffles; the order of epoch n is ``random.permutation(random.fold_in(key, n), size)`` and depends on
        nothing else. None keeps the data's own order
    remainder: what happens to the last examples where they do not fill a batch. ``"drop"`` leaves them out of
        this epoch. ``"pad"`` fills their batch with examples from the start of the epoch, and gives every batch
        a mask (batch,) bool, False on the filling: the last element of a tuple or list, ``"mask"`` in a dict.
        Either way all batches of all epochs have the same shapes, so a compiled step compiles once
    device: where batches lie. Data in memory is moved there once, and batches are gathered there; None
        leaves it where its first leaf is
    workers: processes that read a `Dataset`; the order is the same for any number of them

    ``len(loader)`` is the number of batches in an epoch, ``loader.examples`` that of different examples in them.
    ``loader.epoch(n, start)`` iterates over epoch n from batch `start`; ``iter(loader)`` is ``loader.epoch(0)``.

    Data in memory is not copied where it lies on `device` already: leave it unchanged while the loader is in use.
    Random transforms inside a `Dataset` draw from generators of their own, which `key` does not govern; where a
    run must resume exactly, augment the batches instead.

    Raises `TypeError` or `ValueError` for bad arguments and for data that is empty or of unequal lengths.

    Example:
        >>> images, labels = torch.zeros(10, 1, 8, 8), torch.arange(10)
        >>> loader = Loader((images, labels), batch_size=4, remainder="pad")
        >>> [(labels.tolist(), mask.tolist()) for _, labels, mask in loader][-1]
        ([8, 9, 0, 1], [True, True, False, False])
    """

    def __init__(
        self,
        data: Tree | Dataset[Any],
        batch_size: int,
        *,
        key: Tensor | None = None,
        remainder: str = "drop",
        device: torch.device | str | None = None,
        workers: int = 0,
    ):
        self.batch_size = _whole_number(batch_size, "batch_size", least=1)
        self.workers = _whole_number(workers, "workers", least=0)
        if remainder not in ("drop", "pad"):
            raise ValueError(f"Loader: remainder is {remainder!r}, expected 'drop' or 'pad'")
        self.remainder = remainder
        if key is not None:
            random.check_key(key)
        self.key = key
        self.device = None if device is None else torch.device(device)
        self._in_memory = not _is_dataset(data)
        if self._in_memory:
            self.size = common_length(data, "Loader")
            if self.workers:
                raise ValueError(f"Loader: workers is {workers}, but data in memory needs none; expected 0")
            self.device = self.device or _first_device(data)
            data = _tensors(data, self.device)
            if remainder == "pad":
                _with_mask(data, torch.ones(()))  # a container without room for a mask fails here, not in epoch
        else:
            self.size = _length(data)
        self._data = data
        if self.remainder == "drop" and self.batch_size > self.size:
            raise ValueError(
                f"Loader: batch_size is {batch_size}, but data has only {self.size} examples, and remainder='drop' "
                f"would drop them all; expected at most {self.size}, or remainder='pad'"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch_size if self.remainder == "drop" else -(-self.size // self.batch_size)

    @property
    def examples(self) -> int:
        """Different examples in an epoch: those that are not dropped, filling not counted."""
        return min(len(self) * self.batch_size, self.size)

    def __iter__(self) -> Iterator[Tree]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[Tree]:
        """The batches of epoch `n`, from the batch `start` on: what a run needs to go on where it stopped.

        Example:
            >>> loader = Loader(torch.arange(6), 2, key=random.key(0))
            >>> torch.equal(next(loader.epoch(5, start=2)), list(loader.epoch(5))[2])
            True
        """
        n = _whole_number(n, "epoch", least=0)
        start = _whole_number(start, "start", least=0)
        if start > len(self):
            raise ValueError(f"Loader: start is {start}, expected at most {len(self)}, the batches in an epoch")
        key = None if self.key is None else random.fold_in(self.key, n)
        order = torch.arange(self.size) if key is None else random.permutation(key, self.size)
        missing = len(self) * self.batch_size - self.size
        if missing > 0:
            order = order[torch.arange(self.size + missing, device=order.device) % self.size]
        batches = self._gathered(order, start) if self._in_memory else self._read(order, start, _seed(key, n))
        return self._masked(batches, start) if self.remainder == "pad" else batches

    def mask(self, batch: Tree) -> Tensor | None:
        """Which examples of a batch are real, (batch,) bool; None where this loader fills none (``"drop"``)."""
        if self.remainder == "drop":
            return None
        return batch["mask"] if isinstance(batch, dict) else batch[-1]

    def _gathered(self, order: Tensor, start: int) -> Iterator[Tree]:
        order = order.to(self.device)
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield tree.map(lambda leaf, index=index: leaf.index_select(0, index), self._data)

    def _read(self, order: Tensor, start: int, seed: int) -> Iterator[Tree]:
        indices = order.tolist()
        borders = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        on_gpu = self.device is not None and self.device.type == "cuda"
        batches = DataLoader(
            self._data,
            batch_sampler=[indices[border : border + self.batch_size] for border in borders],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=on_gpu,
            generator=torch.Generator().manual_seed(seed),  # without one it would draw from torch's global generator
        )
        for batch in batches:
            if self.device is None:
                yield batch
            else:
                yield tree.map(lambda x: x.to(self.device, non_blocking=on_gpu) if isinstance(x, Tensor) else x, batch)

    def _masked(self, batches: Iterator[Tree], start: int) -> Iterator[Tree]:
        for number, batch in enumerate(batches, start):
            real = min(self.batch_size, self.size - number * self.batch_size)
            mask = torch.arange(self.batch_size, device=_first_device(batch)) < real
            yield _with_mask(batch, mask)

    def __repr__(self) -> str:
        order = "in order" if self.key is None else "shuffled"
        return f"Loader({self.size} examples {order}, {len(self)} batches of {self.batch_size}, {self.remainder!r})"


def _whole_number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"Loader: {name} is {value!r} ({type(value).__name__}), expected a whole number, an int")
    if value < least:
        raise ValueError(f"Loader: {name} is {value}, expected at least {least}")
    return int(value)


def _is_dataset(data: Any) -> bool:
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"Loader: data is {type(data).__name__}, an IterableDataset, which has no order to shuffle or to resume; "
            f"give a map-style Dataset with __getitem__ and __len__, or read it into tensors first"
        )
    if isinstance(data, DataLoader):
        raise TypeError("Loader: data is a torch DataLoader; give the data set inside it, loader.dataset")
    return isinstance(data, Dataset)


def _length(data: Any) -> int:
    if not hasattr(data, "__len__"):
        raise TypeError(f"Loader: {type(data).__name__} has no __len__; add one, it is needed to order the data")
    if len(data) == 0:
        raise ValueError(f"Loader: data is an empty {type(data).__name__}, expected at least one example")
    return len(data)


def _first_device(batch: Tree) -> torch.device:
    return next((leaf.device for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _tensors(data: Tree, device: torch.device) -> Tree:
    """`data` with every array as a tensor on `device`."""
    paths = tree.paths(data)
    _, structure = tree.flatten(data)
    return tree.unflatten(structure, [_tensor(leaf, path).detach().to(device) for path, leaf in paths.items()])


def _tensor(leaf: Tensor | np.ndarray, path: str) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if leaf.dtype.kind not in "biufc":
        raise TypeError(f"Loader: {place(path)} has numpy dtype {leaf.dtype}, expected numbers; encode it as integers")
    # torch takes neither foreign byte orders nor reversed axes, and warns of memory that is read-only.
    native = leaf.astype(leaf.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


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


def _with_mask(batch: Tree, mask: Tensor) -> Tree:
    if isinstance(batch, Tensor):
        return batch, mask
    if type(batch) in (list, tuple):
        return type(batch)((*batch, mask))
    if not isinstance(batch, dict):
        raise TypeError(
            f"Loader: a batch is {type(batch).__name__}, which has no place for the mask of remainder='pad'; "
            f"expected a tensor, tuple, list or dict"
        )
    if "mask" in batch:
        raise ValueError("Loader: data has a 'mask' already, where remainder='pad' puts its own; rename yours")
    return {**batch, "mask": mask}


def _seed(key: Tensor | None, n: int) -> int:
    """A seed for the generators of the worker processes, from the key of epoch `n`."""
    if key is None:
        return n
    high, low = (int(word) & 0xFFFFFFFF for word in key)
    return high << 32 | low
