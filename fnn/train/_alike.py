"""What the processes that make a step together have to bring alike, looked at where it costs nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fnn import _ranks, tree
from fnn._placement import content, describe, is_parted, local, mesh_of
from fnn.train._layout import over_batch
from fnn.train._state import TrainState


class Alike:
    """Compares what the processes of `mesh` give a step, or an evaluation, before they wait for each other in it.

    Every process calls it at the same times: a number of examples that one has not had, none has had.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._sizes: set[int] = set()

    def check(self, mesh: DeviceMesh | None, train_state: TrainState, batch: Any, size: int) -> bool:
        """Raise `ValueError`, on every process, where a batch has a part of another size, or a first state differs.

        Whether it is the first state is returned.
        """
        if _ranks.count() == 1 or size in self._sizes:
            return False
        mesh = mesh_of(train_state.params) if mesh is None else mesh
        if mesh is None or mesh.size() != _ranks.count():  # the others are not in this step
            return False
        first = not self._sizes
        if first:
            cure = "every process has to start from the same state, made from the same keys and files"
            leaves = tree.paths(train_state).items()
            _ranks.check_same(self.who, {f"leaf {path!r} of the state": described(leaf) for path, leaf in leaves}, cure)
        cure = "give every process as many examples as the others (data.Loader(shard=mesh))"
        _ranks.check_same(self.who, {"the number of examples in the batch": size}, cure)
        if not any(over and mesh.size(axis) > 1 for axis, over in enumerate(over_batch(mesh))):
            cure = "processes that share a layer take the same batch"
            leaves = tree.paths(batch).items()
            _ranks.check_same(self.who, {f"leaf {path!r} of the batch": described(leaf) for path, leaf in leaves}, cure)
        self._sizes.add(size)
        return first

    def check_counts(self, state: Any) -> None:
        """Raise `ValueError` where leaves of the layer state, which no mean is taken of, have come to differ."""
        counts = {path: leaf for path, leaf in tree.paths(state).items() if not leaf.is_floating_point()}
        if counts:
            cure = "what depends on this process's part of the batch has to be of a floating dtype, to be averaged"
            found = {f"leaf {path!r} of the new layer state": described(leaf) for path, leaf in counts.items()}
            _ranks.check_same(self.who, found, cure)


def described(leaf: Tensor) -> Any:
    """A leaf as what is equal where it is equal: its shape, and the sum of its bits where it is whole."""
    if is_parted(leaf) and not all(placement.is_replicate() for placement in leaf.placements):  # type: ignore
        return describe(leaf)
    here = local(leaf).detach()
    return here.item() if not here.dim() and here == here else content(leaf)
