"""Where a `Loader` takes its batches from: data in memory, gathered on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.data._arrays import common_length, first_device, to_tensor
from fnn.data._windows import Windows

Tree = Any


class InMemory:
    """A pytree of tensors and numpy arrays, or `Windows`, moved once to the device where batches are gathered."""

    def __init__(self, data: Tree | Windows, device: torch.device | None):
        if isinstance(data, Windows):
            self.device = device or data.tokens.device
            self.size, self.gather = len(data), data.to(self.device).gather
            self.identity = {"kind": "windows", "context": data.context, "stride": data.stride}
        else:
            self.size = common_length(data, "Loader")
            self.device = device or first_device(data)
            self._leaves = _tensors(data, self.device)
            self.gather = self._gather
            self.identity = {"kind": "memory"}

    def batches(self, order: Tensor, batch_size: int, key: Tensor) -> Iterator[Tree]:
        """One batch after the other of the examples in `order`."""
        for index in order.to(self.device).split(batch_size):
            yield self.gather(index)

    def _gather(self, index: Tensor) -> Tree:
        return tree.map(lambda leaf: leaf.index_select(0, index), self._leaves)


def _tensors(data: Tree, device: torch.device) -> Tree:
    """`data` with every array as a tensor on `device`."""
    paths = tree.paths(data)
    _, structure = tree.flatten(data)
    leaves = [to_tensor(leaf, path, "Loader").detach().to(device) for path, leaf in paths.items()]
    return tree.unflatten(structure, leaves)
