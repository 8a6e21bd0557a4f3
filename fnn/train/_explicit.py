"""The step as the program of one process over its part of the batch: `make_step(..., mesh=mesh)`.

The loss is that of this process's examples. What it has a share in is averaged over the processes in one all-reduce:
the gradients of whole parameters, the loss, the metrics and the floating leaves of the layer state. A parted parameter
(`distributed.fsdp`) reaches the loss as an `ops.ShardedLeaf`; gathering it there makes its gradient the sum over all
processes of this process's shard, so it needs no all-reduce. The optimizer sees parted parameters as such, and so its
norms are those of the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fnn import ops, random, tree
from fnn._placement import is_parted, local
from fnn._ranks import data_axis, data_group
from fnn.train._layout import Alone


class Processes(Alone):
    """The processes over which a batch is parted, as the step of one of them sees them."""

    def __init__(self, who: str, mesh: Any, *, sync_batch_norm: bool = False):
        self.who, self.sync_batch_norm = who, sync_batch_norm
        self.place, self.count = data_axis(who, mesh)
        self.group = data_group(mesh)
        # A tensor, which a graph takes as an input: a number would make another graph of each process.
        self._place = torch.tensor(self.place, dtype=torch.int32)

    def inside(self, params: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
        """Plain leaves to differentiate, the batch, and a key from which each process draws numbers of its own."""
        for path, leaf in tree.paths(params).items():
            self._axis(path, leaf)
        own_key = key if self.count == 1 or key is None else random.fold_in(key, self._place.to(key.device))
        return tree.map(local, params), batch, own_key

    def for_loss(self, differentiated: Any, params: Any) -> Any:
        def box(leaf: Tensor, param: Any) -> Any:
            axis = self._axis("", param)
            return leaf if axis is None else ops.ShardedLeaf(leaf, axis, param.shape[axis], self.group, self.count)

        return tree.map(box, differentiated, params)

    def losses(self) -> AbstractContextManager[Any]:
        if self.sync_batch_norm and self.count > 1:
            return ops.synchronised(self.group, self.count)
        return contextlib.nullcontext()

    def once_more(self, params: Any, like: Any) -> Any:
        """Plain leaves, by which the mean of all losses has the same gradient on every process."""
        shards, plain = {}, {}
        for (path, leaf), old in zip(tree.paths(params).items(), tree.leaves(like), strict=True):
            if is_parted(old) and not is_parted(leaf):
                raise TypeError(
                    f"{self.who}: the optimizer differentiates the loss once more, at parameter {path!r}, which is "
                    "parted: a line search needs whole parameters, or those of distributed.shard, with a step made "
                    "without mesh="
                )
            (plain if self._axis(path, old) is None else shards)[path] = local(leaf)
        plain = self._flat(plain, lambda flat: ops.average_gradient(flat, self.group, self.count))
        together = {**shards, **plain}
        return tree.unflatten(tree.flatten(like)[1], [together[path] for path in tree.paths(like)])

    def mean(self, values: Any) -> Any:
        """Each leaf averaged over the processes, with one all-reduce for each dtype."""
        return self._flat(values, lambda flat: ops.all_reduce(flat, self.group, self.count) / self.count)

    def _flat(self, values: Any, operation: Callable[[Tensor], Tensor]) -> Any:
        """`operation`, of elements, over all leaves of a dtype at once."""
        leaves, structure = tree.flatten(values)
        if self.count == 1 or not leaves:
            return values
        found: list[Any] = [None] * len(leaves)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            members = [index for index, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = operation(torch.cat([leaves[index].reshape(-1) for index in members]))
            parts = flat.split([leaves[index].numel() for index in members])
            for index, part in zip(members, parts, strict=True):
                found[index] = part.reshape(leaves[index].shape)
        return tree.unflatten(structure, found)

    def whole(
        self, grads: Any, params: Any, state: Any, new_state: Any, loss: Tensor, metrics: Any
    ) -> tuple[Any, Any, Tensor, Any]:
        """Gradients placed as `params`, state, loss and metrics of all processes, from those of this one."""
        for name, value in metrics.items():
            if self.count > 1 and not value.is_floating_point():
                raise TypeError(
                    f"loss_fn: metric {name!r} is {value.dtype}; metrics are averaged over the processes, so give a "
                    "mean, of a floating dtype"
                )
        axes = [self._axis(path, leaf) for path, leaf in tree.paths(params).items()]
        grad_leaves, structure = tree.flatten(grads)
        tree.check_like({"state": state}, {"state": new_state}, "the state after the step")
        old, structure_of_state = tree.flatten(state)
        states = tree.leaves(new_state)
        shared = {
            "grads": {n: grad for n, grad in enumerate(grad_leaves) if axes[n] is None},
            # The change, not the value: what no process has changed stays the same to the last bit.
            "moves": {n: leaf - old[n] for n, leaf in enumerate(states) if leaf.is_floating_point()},
        }
        shared, loss, metrics = self.mean((shared, loss, metrics))
        means = [shared["grads"][n] if axes[n] is None else g / self.count for n, g in enumerate(grad_leaves)]
        placed = [_placed(grad, param) for grad, param in zip(means, tree.leaves(params), strict=True)]
        if self.count > 1:
            states = [old[n] + shared["moves"][n] if n in shared["moves"] else leaf for n, leaf in enumerate(states)]
        return tree.unflatten(structure, placed), tree.unflatten(structure_of_state, states), loss, metrics

    def _axis(self, path: str, leaf: Any) -> int | None:
        """The axis along which a leaf is parted, None where it is the same on all processes."""
        if not is_parted(leaf):
            return None
        shards = [placement for placement in leaf.placements if not placement.is_replicate()]
        if not shards:
            return None
        axis = shards[0].dim if shards[0].is_shard() and leaf.device_mesh.ndim == 1 else None
        if axis is None or leaf.shape[axis] % self.count or leaf.device_mesh.size() != self.count:
            raise ValueError(
                f"{self.who}: parameter {path!r} has placements {tuple(leaf.placements)} for its shape "
                f"{tuple(leaf.shape)}; with mesh=, a parameter is whole or parted evenly over the data axis "
                "(distributed.fsdp); for other placements make the step without mesh="
            )
        return axis


def _placed(grad: Tensor, param: Any) -> Tensor:
    """What this process has of a gradient, placed as the parameter is."""
    if not is_parted(param):
        return grad
    from torch.distributed.tensor import DTensor

    layout = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(grad.contiguous(), param.device_mesh, param.placements, run_check=False, **layout)
