"""`Progress`: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from fnn import tree
from fnn.train._callback import Callback, Run
from fnn.train._rates import learning_rates

_SILENCE = 30.0
"""Seconds without a line after which one is printed between two rows, where there is no terminal."""
_SHOWN = 8
"""How many metrics a line shows; a bar shows what fits beside it."""


class Progress(Callback):
    """Show the run: bar, loss and other metrics, learning rate, examples a second, time left; and each row.

    Says first what is compiled and then how long that took, where a resumed run goes on, how many steps were skipped
    because they were not finite, and why a run ended early. Where there is no terminal it prints a line for each row of
    the history, and between rows one every half minute. Of many metrics it shows the first. Only rank 0 shows anything.
    """

    main_only = True

    def start(self, run: Run) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        self.bar: Any = None
        self.waiting = run.step_fn.compiled
        """Whether the step has yet to be compiled."""
        self.last_line = time.monotonic()
        if run.finished:
            self._print(f"at step {run.step:,} already: nothing left to do")
            return
        if run.started_at:
            of = f" of {run.total_steps:,}" if run.total_steps else ""
            self._print(f"goes on from step {run.started_at:,}{of}")
        if self.waiting:
            self._wait(run)
        else:
            self._open(run)

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        if self.waiting:
            self._compiled(run)
        if self.bar is not None:
            shown = self._fitting(_now(run, metrics))
            self.bar.update(self.task, completed=run.step, epoch=run.epoch + 1, shown=shown)
        elif time.monotonic() - self.last_line >= _SILENCE:
            of = f"/{run.total_steps}" if run.total_steps else ""
            self._print("  ".join([f"step {run.step}{of}", *_now(run, metrics)]))

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        apart = ("epoch", "step", "skipped", "seconds", "examples_per_second")
        metrics = {name: value for name, value in row.items() if name not in apart}
        skipped = f"  {_count(int(row['skipped']), 'step')} skipped (not finite)" if "skipped" in row else ""
        self._print(
            f"epoch {row['epoch']:>3g}  {'  '.join(_parts(metrics))}  step {row['step']:.0f}  {row['seconds']:.1f} s  "
            f"{row['examples_per_second']:,.0f} examples/s{skipped}"
        )
        if self.bar is not None and not self.waiting:  # a resumed run can owe a row before its first step
            self.bar.update(self.task, completed=run.step)

    def end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.stop()
        if run.stop_reason is not None:
            self._print(f"stopped after step {run.step}: {run.stop_reason}")

    def _print(self, line: str) -> None:
        self.console.print(line)
        self.last_line = time.monotonic()

    def _wait(self, run: Run) -> None:
        """Say what the first step compiles; in a terminal also for how long it has been at it."""
        size = f"{tree.size(run.train_state.params):,} parameters"
        self._print(f"compiling the training step: loss, gradients and optimizer in one graph, {size} ...")
        if self.console.is_terminal:
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = SpinnerColumn(), TextColumn("compiling{task.fields[batch]}", markup=False), TimeElapsedColumn()
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.bar.start()
            self.bar.add_task("compiling", total=None, batch=_Batch(run))

    def _compiled(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        how = f"compiled in {run.step_fn.compile_seconds:.1f} s" if run.step_fn.compiled else "running eagerly"
        self._print(f"training step: {how}{_Batch(run)}")
        self.waiting = False
        self._open(run)

    def _open(self, run: Run) -> None:
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=self._bar_width()),
            MofNCompleteColumn(),
            TimeElapsedColumn() if run.total_steps is None else TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            console=self.console,
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(
            "training", total=run.total_steps, completed=run.step, epoch=run.epoch + 1, shown=""
        )

    def _bar_width(self) -> int:
        return min(40, max(10, self.console.width - 80))

    def _fitting(self, parts: list[str]) -> str:
        """As many of the parts as there is room for beside the bar, its numbers and the time."""
        room = self.console.width - self._bar_width() - 30
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)


class _Batch:
    """The shapes of a run's batch, in words, as they are when this is shown."""

    def __init__(self, run: Run):
        self.run = run

    def __str__(self) -> str:
        leaves = [leaf for leaf in tree.leaves(self.run.batch) if isinstance(leaf, Tensor)]
        shapes = ", ".join(f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}" for leaf in leaves[:4])
        more = ", ..." if len(leaves) > 4 else ""
        return f" for batches of {shapes}{more}" if leaves else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _now(run: Run, metrics: dict[str, float]) -> list[str]:
    """A step in words, what matters most first."""
    first, *others = _parts(metrics)
    rates = [f"{name} {rate:.3g}" for name, rate in learning_rates(run.train_state.opt_state).items()]
    speed = [f"{run.examples_per_second:,.0f} examples/s"] if run.examples_per_second else []
    skipped = [f"{_count(run.skipped, 'step')} skipped"] if run.skipped else []
    return [first, *rates[:2], *speed, *skipped, *others]


def _parts(metrics: dict[str, float]) -> list[str]:
    shown = [f"{name} {_number(value)}" for name, value in list(metrics.items())[:_SHOWN]]
    return shown + ([f"(+{len(metrics) - _SHOWN} more)"] if len(metrics) > _SHOWN else [])


def _number(value: float) -> str:
    """Four places after the point, as long as they say something."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
