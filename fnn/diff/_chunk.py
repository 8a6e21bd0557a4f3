"""How many rows fit into a budget of bytes, from what one row more needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fnn import tree

PROBES = (2, 4)


def size_for(run: Callable[[int], int], budget: int) -> int:
    """The largest chunk of rows whose evaluation needs at most `budget` bytes at once, at least 1.

    run: evaluates a chunk of so many rows, and gives how many rows there are in all.
    """
    peaks = []
    for count in PROBES:
        with LiveBytes() as memory:
            total = run(count)
        peaks.append(memory.peak)
        if total <= count:
            return max(total, 1)
    per_row = max((peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0]), 1.0)
    fixed = peaks[0] - PROBES[0] * per_row
    return int(min(max((budget - fixed) // per_row, 1), total))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside and still alive: `.now`, and the largest such sum, `.peak`.

    Storages are counted, so views cost nothing; what a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage()._cdata for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree.leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in given:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: Any) -> None:
            self._storages.pop(key, None)
            self.now -= size

        self._storages[key] = weakref.ref(storage, freed)
