"""Evaluation: a compiled function of one batch, and exact means over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fnn._placement import whole
from fnn._ranks import sum_over
from fnn.train._alike import Alike
from fnn.train._explicit import Processes
from fnn.train._layout import Placed, around, layout_of
from fnn.train._state import TrainState
from fnn.train._step import Runner, batch_size, check_batch, shapes, state_shapes

MetricFunction = Callable[[Any, Any, Any], dict[str, Tensor]]
Sums = dict[str, tuple[Tensor, Tensor]]


def make_eval(metric_fn: MetricFunction, *, compile: bool = True, strict: bool = False, mesh: Any = None) -> Eval:
    """A compiled evaluation step for `evaluate`.

    `metric_fn(params, state, batch) -> {name: values}` gives one value for each example, (batch,) or (batch, ...):
    `losses.cross_entropy(logits, labels, reduction="none")`, `logits.argmax(-1) == labels`. Means over batches of
    unequal size would be wrong; means over examples are exact. `strict=True` allows one graph, and `mesh` makes it the
    program of one process over its part of the examples, as in `make_step`.
    """
    return Eval(metric_fn, compile=compile, strict=strict, mesh=mesh)


class Eval(Runner):
    """What `make_eval` returns: `(train_state, batch, mask=None) -> {name: (sum, count)}`."""

    def __init__(self, metric_fn: MetricFunction, *, compile: bool, strict: bool = False, mesh: Any = None):
        processes = None if mesh is None else Processes("make_eval", mesh)
        self.layout = lambda params: processes or layout_of(params)

        def whole(params: Any, state: Any, batch: Any, mask: Tensor | None) -> Sums:
            layout = self.layout(params)
            differentiated, (batch, mask), _ = layout.inside(params, (batch, mask), None)
            found = metric_fn(layout.for_loss(differentiated, params), state, batch)
            return {name: _sum(name, value, batch, mask) for name, value in found.items()}

        self._alike = Alike("evaluation")
        super().__init__("evaluation", whole, compile=compile, strict=strict)

    def __call__(self, train_state: TrainState, batch: Any, mask: Tensor | None = None) -> Sums:
        arguments = (train_state.params, train_state.state, batch, mask)
        signature = (state_shapes(train_state), shapes((batch, mask)))
        inputs = {"batch": batch, "mask": mask, "params": train_state.params, "state": train_state.state}
        layout = self.layout(train_state.params)
        if isinstance(layout, Placed):
            check_batch(batch)
            self._alike.check(layout.mesh, train_state, batch, batch_size(batch))
        with around(train_state.params, layout):
            return self._call(signature, inputs, *arguments)


def evaluate(eval_step: Eval, train_state: TrainState, loader: Iterable[Any]) -> dict[str, float]:
    """Means over all examples of `loader`, in evaluation: `{"loss": 0.1, "accuracy": 0.97}`.

    Examples that a `data.Loader(remainder="pad")` repeats to fill its last batch do not count. Of a loader that gives
    each process its part (`shard=mesh`), the means are those of all parts, on every process. The device is read once,
    at the end. Raises `ValueError` where the loader has no examples, and for one that drops some.
    """
    if getattr(loader, "examples", 0) < getattr(loader, "size", 0):
        raise ValueError(f"evaluate: {loader} leaves examples out; make it with remainder='pad'")
    collected: dict[str, list[Tensor]] = {}
    mask_of = getattr(loader, "mask", lambda batch: None)
    for batch in loader:
        for name, pair in eval_step(train_state, batch, mask_of(batch)).items():
            collected.setdefault(name, []).append(torch.stack(pair))
    if not collected:
        raise ValueError("evaluate: the loader has no batches")
    totals = {name: torch.stack(pairs).cpu().double().sum(0) for name, pairs in collected.items()}
    shard = getattr(loader, "shard", None)
    if shard is not None and not isinstance(eval_step.layout(train_state.params), Placed):
        totals = dict(zip(totals, sum_over("evaluate", torch.stack(list(totals.values())), shard), strict=True))
    return {name: float(total / count) for name, (total, count) in totals.items()}


def _sum(name: str, values: Tensor, batch: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    size = batch_size(batch)
    if values.dim() == 0 or values.shape[0] != size:
        raise ValueError(
            f"metric_fn: {name!r} needs one value for each of the {size} examples, got shape {tuple(values.shape)}; "
            'give the loss reduction="none"'
        )
    values = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    if mask is None:
        return whole(values.sum()), torch.full((), values.numel(), dtype=values.dtype, device=values.device)
    kept = mask.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return whole(torch.where(kept, values, 0.0).sum()), whole(kept.to(values.dtype).sum())
