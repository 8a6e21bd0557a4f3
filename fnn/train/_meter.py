"""The metrics of a run's steps, read from the device only now and then."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from fnn import _ranks
from fnn.train._callback import Run
from fnn.train._step import Metrics, batch_size

OWN = ("epoch", "step", "skipped", "seconds", "examples_per_second")
"""Columns of the history that are not metrics."""


class Meter:
    """Means over the steps of a row of the history, speed, and which steps were not finite.

    Metrics stay on the device until `read`. Steps that were not finite count in no mean. Speed is that of all
    processes together where `loader` parts its batches among them.
    """

    def __init__(self, run: Run, loader: Any):
        self.run = run
        mesh = getattr(loader, "shard", None)
        self._parts = 1 if mesh is None else _ranks.data_axis("fit", mesh)[1]
        self.totals: dict[str, float] = {}
        self.steps = self.skipped = 0
        """Steps in the row up to the last read, and how many of them were not finite."""
        self.bad_in_a_row = 0
        """How many of the last steps, up to the last read, were not finite."""
        self.worst = range(0)
        """The longest such sequence that the last read saw, as step numbers."""
        self.seconds_before = 0.0
        """Time spent on the row before the run was resumed."""
        self.row_started = time.perf_counter()
        self._pending: list[Metrics] = []
        self._examples, self._since, self._compile_seconds = 0, time.perf_counter(), run.step_fn.compile_seconds

    def add(self, metrics: Metrics, batch: Any) -> None:
        """After a step."""
        if "loss" not in metrics or metrics["loss"].dim():
            raise ValueError('fit: the metrics of a step must contain "loss", a 0-d tensor')
        self._pending.append(metrics)
        self._examples += batch_size(batch) * self._parts

    def read(self) -> tuple[dict[str, float], list[int]]:
        """Wait for the device: the last step's metrics, and those of the steps since the last read that were bad."""
        if not self._pending:
            return {}, []
        columns = _columns(self._pending)
        first = self.run.step - len(self._pending)
        finite = [math.isfinite(loss) for loss in columns["loss"]]
        bad = [step for step, good in enumerate(finite, first) if not good]
        self.worst = range(0)
        for step, good in enumerate(finite, first):
            self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
            if self.bad_in_a_row > len(self.worst):
                self.worst = range(step + 1 - self.bad_in_a_row, step + 1)
        for name, values in columns.items():
            total = self.totals.get(name, 0.0)
            for value, good in zip(values, finite, strict=True):  # not sum(), which rounds by where it begins
                total += value if good else 0.0
            self.totals[name] = total
        self.steps, self.skipped = self.steps + len(self._pending), self.skipped + len(bad)
        self.run.skipped += len(bad)
        elapsed = time.perf_counter() - self._since
        if self._compile_seconds == self.run.step_fn.compile_seconds:  # a speed with compilation in it says nothing
            self.run.examples_per_second = self._examples / elapsed
        self.restart_clock()
        self._pending = []
        return {name: values[-1] for name, values in columns.items()}, bad

    def restart_clock(self) -> None:
        """Leave what happened since the last step, such as an evaluation, out of the speed."""
        self._compile_seconds = self.run.step_fn.compile_seconds
        self._examples, self._since = 0, time.perf_counter()

    def row(self) -> dict[str, float]:
        """The means, and a new start."""
        count = self.steps - self.skipped
        means = {name: total / count if count else math.nan for name, total in self.totals.items()}
        self.totals, self.steps, self.skipped = {}, 0, 0
        return means

    def seconds(self) -> float:
        """How long the row took; and a new start."""
        seconds = self.seconds_before + time.perf_counter() - self.row_started
        self.seconds_before, self.row_started = 0.0, time.perf_counter()
        return seconds

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a row in the middle of which a run was resumed is the same row."""
        seconds = self.seconds_before + time.perf_counter() - self.row_started
        counts = {"steps": self.steps, "skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}
        return {"totals": self.totals, "seconds": seconds, **counts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back what `saved` gave."""
        self.totals, self.seconds_before = dict(saved["totals"]), saved["seconds"]
        self.steps, self.skipped, self.bad_in_a_row = saved["steps"], saved["skipped"], saved["bad_in_a_row"]


def _columns(steps: list[Metrics]) -> dict[str, list[float]]:
    """Each metric over the steps, as numbers: one transfer for all."""
    names = list(steps[0])
    if taken := sorted(set(names) & set(OWN)):
        raise ValueError(f"fit: a step has a metric {taken[0]!r}, which the history uses itself; rename the metric")
    device = steps[0]["loss"].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    table = torch.stack([torch.stack([step[name] for step in steps]).to(device, wide) for name in names])
    return dict(zip(names, table.tolist(), strict=True))
