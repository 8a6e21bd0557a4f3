"""`Profile`: a few steps of a run under torch's profiler."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fnn.train._callback import Callback, Run


class Profile(Callback):
    """Record some steps with `torch.profiler`: what ran, when, on which thread and device, and what it cost.

    folder: gets trace.json, which chrome://tracing and https://ui.perfetto.dev show, and operators.txt, a table of the
        costliest operators; what an earlier run left there is replaced
    start: steps of this process before the first that is recorded; at least 2, as the first one compiles and the last
        one warms the profiler up
    steps: how many are recorded

    What `fit` does between these steps is recorded with them. Where one of them compiles again the window moves on, so
    that no compilation is in it. The profiler slows the steps in the window down, not the others. Of several processes
    it records rank 0.

    Raises `ValueError` for bad arguments, `OSError` where the folder cannot be made. A run that ends before the window
    is full warns, and writes what there is.

    Example:
        >>> from fnn import train
        >>> profile = train.Profile("runs/profile", start=10, steps=5)
        >>> train_state, history = train.fit(
        ...     step, train_state, batches, epochs=1, callbacks=[profile]
        ... )  # doctest: +SKIP
    """

    main_only = True

    def __init__(self, folder: str | os.PathLike[str], *, start: int = 10, steps: int = 5):
        for name, value, least in (("start", start, 2), ("steps", steps, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Profile: {name} is {value!r}, expected a number of steps, at least {least}")
        self.folder, self.after, self.steps = Path(folder), start, steps

    def start(self, run: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler: Any = None
        self.warm_up = run.step + self.after
        """The step with which the profiler warms up; it records those after it."""
        self.done = False

    def step(self, run: Run) -> None:
        if self.done:
            return
        if self.profiler is not None and run.step_fn.compile_seconds != self.compile_seconds:
            self.profiler.stop()
            self.profiler, self.warm_up = None, run.step + 1
        if self.profiler is not None and run.step == self.warm_up + self.steps:
            self._write(run)
        elif self.profiler is not None:
            self.profiler.step()
        elif run.step + 1 == self.warm_up:
            self.compile_seconds = run.step_fn.compile_seconds
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=self.steps)
            self.profiler = torch.profiler.profile(schedule=schedule, record_shapes=True, acc_events=True)
            self.profiler.start()

    def end(self, run: Run) -> None:
        if self.done:
            return
        recorded = 0 if self.profiler is None else max(0, run.step - self.warm_up)
        if recorded:
            self._write(run)
        elif self.profiler is not None:
            self.profiler.stop()
        warnings.warn(
            f"Profile: the run ended after step {run.step}, with {recorded} of {self.steps} steps recorded; the last "
            f"was to be step {self.warm_up + self.steps}. A smaller start, or a longer run, records them all",
            RuntimeWarning,
            stacklevel=2,
        )

    def _write(self, run: Run) -> None:
        self.done = True
        self.profiler.stop()
        self.profiler.export_chrome_trace(os.fspath(self.folder / "trace.json"))
        averages = self.profiler.key_averages()
        on_device = any(event.self_device_time_total > 0 for event in averages)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = averages.table(sort_by=order, row_limit=30, max_name_column_width=60)
        (self.folder / "operators.txt").write_text(f"steps {self.warm_up + 1} to {run.step}, all together\n\n{table}\n")
