"""Batches of data, in an order that a run can resume from two integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset

from fnn import _ranks, random
from fnn.data._arrays import first_device
from fnn.data._dataset import Reader, is_dataset
from fnn.data._memory import InMemory
from fnn.data._windows import Windows

Tree = Any


class Loader:
    """Batches of one size over data in memory or a torch `Dataset`, shuffled by a key.

    data: a pytree of tensors and numpy arrays that share their first axis, such as ``(images, labels)`` or a
        dict; or `Windows` of a text; or a map-style `torch.utils.data.Dataset`, whose examples go through torch's
        default collate
    batch_size: examples in every batch, of all processes together
    key: shuffles; the order of epoch n is ``random.permutation(random.fold_in(key, n), size)`` and depends on
        nothing else. None keeps the data's own order
    remainder: what happens to the last examples where they do not fill a batch. ``"drop"`` leaves them out of
        this epoch. ``"pad"`` fills their batch with examples from the start of the epoch, and gives every batch
        a mask (batch,) bool, False on the filling: the last element of a tuple or list, ``"mask"`` in a dict.
        Either way all batches of all epochs have the same shapes, so a compiled step compiles once
    device: where batches lie. Data in memory is moved there once, and batches are gathered there; None
        leaves it where its first leaf is. A `Dataset`'s batches are copied to a CUDA device from pinned memory,
        while the step before still runs
    workers: processes that read a `Dataset`, started anew for each epoch, that read ahead two batches each
    shard: the mesh (`fnn.distributed.init`) over whose axis "data" of length n batches are parted: the process at place
        r gives rows ``r * batch_size / n`` to ``(r + 1) * batch_size / n`` of every batch and mask, and reads no others
        of a `Dataset`. The rows of all processes, one after the other, are the batch of the loader without `shard`

    ``len(loader)`` is the number of batches in an epoch, ``loader.examples`` that of different examples in them.
    ``loader.epoch(n, start)`` iterates over epoch n from batch `start`; ``iter(loader)`` is ``loader.epoch(0)``.
    ``loader.identity`` is what decides which examples these are.

    Data in memory is not copied where it lies on `device` already: leave it unchanged while the loader is in use.
    Random transforms inside a `Dataset` draw from the global generators of torch (on the CPU), numpy and Python. These
    are seeded for each example from `key`, the epoch and the example's index, so batches are the same for any number of
    workers and wherever an epoch starts, and put back afterwards. Generators that a data set makes for itself
    are not governed by `key`.

    With `shard` every process makes the loader, over all of the data; as it is made, and only then, they wait for each
    other and compare their `identity`. ``len``, `examples` and `identity` are those of the loader without `shard`, so a
    run can go on with another number of processes.

    Raises `TypeError` or `ValueError` for bad arguments and for data that is empty or of unequal lengths; `ValueError`,
    on every process, where `identity` is not the same on all.

    Example:
        >>> images, labels = torch.zeros(10, 1, 8, 8), torch.arange(10)
        >>> loader = Loader((images, labels), batch_size=4, remainder="pad")
        >>> [(labels.tolist(), mask.tolist()) for _, labels, mask in loader][-1]
        ([8, 9, 0, 1], [True, True, False, False])
        >>> from fnn import distributed
        >>> Loader(torch.arange(8), batch_size=4, shard=distributed.init())
        Loader(8 examples in order, 2 batches of 4, 'drop', part 0 of 1)
    """

    def __init__(
        self,
        data: Tree | Windows | Dataset[Any],
        batch_size: int,
        *,
        key: Tensor | None = None,
        remainder: str = "drop",
        device: torch.device | str | None = None,
        workers: int = 0,
        shard: DeviceMesh | None = None,
    ):
        self.batch_size = _whole_number(batch_size, "batch_size", least=1)
        self.workers = _whole_number(workers, "workers", least=0)
        if remainder not in ("drop", "pad"):
            raise ValueError(f"Loader: remainder is {remainder!r}, expected 'drop' or 'pad'")
        self.remainder = remainder
        if key is not None:
            random.check_key(key)
        self.key = key
        self.shard = shard
        self._place, self._places = (0, 1) if shard is None else _ranks.data_axis("Loader(shard=)", shard)
        self._rows = _rows(self.batch_size, self._place, self._places)
        chosen = None if device is None else torch.device(device)
        if is_dataset(data):
            self._source = Reader(data, chosen, self.workers)
        else:
            self._source = InMemory(data, chosen)
            if self.workers:
                raise ValueError(f"Loader: workers is {workers}, but data in memory needs none; expected 0")
            if remainder == "pad":  # a container without room for a mask fails here, not in epoch
                first = torch.zeros(1, dtype=torch.int64, device=self._source.device)
                _with_mask(self._source.gather(first), first)
        self.device, self.size = self._source.device, self._source.size
        if shard is not None:
            cure = "give every process the same data and arguments: each takes its own part of every batch"
            _ranks.check_same("Loader(shard=)", self.identity, cure)
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

    @property
    def identity(self) -> dict[str, Any]:
        """What the batches depend on, as plain values for a JSON file.

        Equal identities over the same data give equal batches; device, workers and shard make no difference. A
        checkpoint holds it, so that a run does not go on over other batches unnoticed. Of data in memory it has a
        digest of 64 examples, taken when it is first asked for; the examples of a `Dataset` are not looked at.

        Example:
            >>> Loader(torch.arange(6), 2, key=random.key(7)).identity
            {'kind': 'memory', 'digest': '7fe3fd464b9fc494', 'size': 6, 'batch_size': 2, 'remainder': 'drop',
             'key': [0, 7]}
        """
        return {
            **self._source.identity,
            "size": self.size,
            "batch_size": self.batch_size,
            "remainder": self.remainder,
            "key": None if self.key is None else self.key.tolist(),
        }

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
        if start == len(self):
            return iter(())
        key = random.fold_in(random.key(0) if self.key is None else self.key, n)
        order = torch.arange(self.size) if self.key is None else random.permutation(key, self.size)
        end = len(self) * self.batch_size
        if end > self.size:
            order = order[torch.arange(end, device=order.device) % self.size]
        mine = order[start * self.batch_size : end].reshape(-1, self.batch_size)[:, self._rows]
        batches = self._source.batches(mine.reshape(-1), mine.shape[1], key)
        return self._masked(batches, start) if self.remainder == "pad" else batches

    def mask(self, batch: Tree) -> Tensor | None:
        """Which examples of a batch are real, (batch,) bool; None where this loader fills none (``"drop"``)."""
        if self.remainder == "drop":
            return None
        return batch["mask"] if isinstance(batch, dict) else batch[-1]

    def _masked(self, batches: Iterator[Tree], start: int) -> Iterator[Tree]:
        for number, batch in enumerate(batches, start):
            place = torch.arange(self._rows.start, self._rows.stop, device=first_device(batch))
            yield _with_mask(batch, place < self.size - number * self.batch_size)

    def __repr__(self) -> str:
        order = "in order" if self.key is None else "shuffled"
        kept = repr(self.remainder) + ("" if self.shard is None else f", part {self._place} of {self._places}")
        return f"Loader({self.size} examples {order}, {len(self)} batches of {self.batch_size}, {kept})"


def _whole_number(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"Loader: {name} is {value!r} ({type(value).__name__}), expected a whole number, an int")
    if value < least:
        raise ValueError(f"Loader: {name} is {value}, expected at least {least}")
    return int(value)


def _rows(batch_size: int, place: int, places: int) -> slice:
    """The part of every batch that the process at `place` of `places` has."""
    each, over = divmod(batch_size, places)
    if over:
        nearest = [size for size in (each * places, (each + 1) * places) if size]
        raise ValueError(
            f"Loader: batch_size is {batch_size}, which the {places} processes along the mesh's data axis cannot share "
            f"equally; expected a multiple of {places}, such as {' or '.join(map(str, nearest))}"
        )
    return slice(place * each, (place + 1) * each)


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
