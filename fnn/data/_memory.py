"""Where a `Loader` takes its batches from: data in memory, gathered on one device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.data._arrays import common_length, first_device, rows, to_tensor
from fnn.data._windows import Windows

Tree = Any
SAMPLES = 64


class InMemory:
    """A pytree of tensors and numpy arrays, or `Windows`, moved once to the device where batches are gathered."""

    def __init__(self, data: Tree | Windows, device: torch.device | None):
        if isinstance(data, Windows):
            self.device = device or data.tokens.device
            self.size, self.gather = len(data), data.to(self.device).gather
            self._kind = {"kind": "windows", "context": data.context, "stride": data.stride}
        else:
            self.size = common_length(data, "Loader")
            self.device = device or first_device(data)
            self._leaves = _tensors(data, self.device)
            self.gather = self._gather
            self._kind = {"kind": "memory"}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What data this is: its kind, and a digest of some of its examples, from the first to the last."""
        if self.device.type == "meta":
            return self._kind
        digest = hashlib.sha256()
        places = torch.arange(min(self.size, SAMPLES)) * (self.size - 1) // max(min(self.size, SAMPLES) - 1, 1)
        for path, leaf in tree.paths(self.gather(places.to(self.device))).items():
            digest.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {**self._kind, "digest": digest.hexdigest()[:16]}

    def batches(self, order: Tensor, batch_size: int, key: Tensor) -> Iterator[Tree]:
        """One batch after the other of the examples in `order`."""
        for index in order.to(self.device).split(batch_size):
            yield self.gather(index)

    def _gather(self, index: Tensor) -> Tree:
        return tree.map(lambda leaf: rows(leaf, index), self._leaves)


def _tensors(data: Tree, device: torch.device) -> Tree:
    """`data` with every array as a tensor on `device`."""
    paths = tree.paths(data)
    _, structure = tree.flatten(data)
    leaves = [to_tensor(leaf, path, "Loader").detach().to(device) for path, leaf in paths.items()]
    return tree.unflatten(structure, leaves)
