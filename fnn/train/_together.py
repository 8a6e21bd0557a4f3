"""What the processes of one run settle together, so that each of them always does what the others do next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fnn import _ranks, tree
from fnn._placement import mesh_of
from fnn.train._alike import described
from fnn.train._state import TrainState
from fnn.train._step import Step

_CURE = (
    "every process has to call fit with the same options and the same state, made from the same keys and files; "
    "a callback that rank 0 alone has says main_only = True"
)
_COLLECTIVE = ("gloo", "nccl", "timed out", "connection closed", "connection reset", "connection refused")


def any_of(*asked: bool) -> list[bool]:
    """Each of these, whether it is so in any process; every process has to call this."""
    if _ranks.count() == 1:
        return list(asked)
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    flags = torch.tensor(asked, dtype=torch.int32, device=device)
    with _ranks.waiting("fit"):
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def check_alike(options: dict[str, Any], train_state: TrainState) -> None:
    """Raise `ValueError`, on every process, where they are about to do different runs."""
    if _ranks.count() == 1:
        return
    leaves = {f"leaf {path!r} of the state": described(leaf) for path, leaf in tree.paths(train_state).items()}
    _ranks.check_same("fit", {**options, "torch": torch.__version__, **leaves}, _CURE)


def check_trained_together(step: Step, train_state: TrainState, loader: Any) -> None:
    """Raise `ValueError` where each process would train a network of its own on its part of the batches."""
    mesh = getattr(loader, "shard", None)
    alone = getattr(step.update, "mesh", mesh) is None and mesh_of(train_state.params) is None
    if mesh is not None and alone and _ranks.data_axis("fit", mesh)[1] > 1:
        raise ValueError(
            "fit: the loader parts its batches among the processes (shard=), but the step would not bring their "
            "gradients together; give make_step the mesh, or part the parameters (distributed.shard)"
        )
    padded = getattr(loader, "remainder", "drop") == "pad" and loader.size % loader.batch_size
    if mesh is not None and padded and getattr(step.update, "mesh", None) is not None and _ranks.count() > 1:
        raise ValueError(
            "fit: the parts of the last batch have unequal numbers of real examples (remainder='pad'), so the mean of "
            "the processes' losses would not be that of the batch; give the Loader remainder='drop'"
        )


def explain(error: BaseException) -> None:
    """Note on an error of a collective operation that this process was waiting for others, and for how long."""
    if _ranks.count() == 1 or not isinstance(error, RuntimeError):
        return
    said = str(error).lower()
    collective = isinstance(error, dist.DistError) or any(word in said for word in _COLLECTIVE)
    if collective and not any("was waiting for" in note for note in getattr(error, "__notes__", ())):
        error.add_note(f"fit: {_ranks.explain_wait()}")
