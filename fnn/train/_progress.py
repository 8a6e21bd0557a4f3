"""`Progress`: a live bar in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from typing import Any

from fnn.train._callback import Callback, Run


class Progress(Callback):
    """Show the run: bar, loss and other metrics, examples a second, time left; and a line for each epoch."""

    def start(self, run: Run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(highlight=False, soft_wrap=True)
        self.announced = not run.step_fn.compiled
        if run.step_fn.compiled:
            self.console.print("compiling the training step (one graph: loss, gradients, optimizer) ...", style="dim")
        self.bar: Any = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task("training", total=run.total_steps, completed=run.step, epoch=1, metrics="")

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        if not self.announced:
            self.announced = True
            how = f"compiled in {run.step_fn.compile_seconds:.1f} s" if run.step_fn.compiled else "running eagerly"
            self.console.print(f"training step: {how}")
        shown = f"{_numbers(metrics)}  {run.examples_per_second:,.0f} examples/s"
        self.bar.update(self.task, completed=run.step, epoch=run.epoch + 1, metrics=shown)

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        self.bar.update(self.task, completed=run.step)
        metrics = {name: value for name, value in row.items() if name not in ("epoch", "step", "seconds")}
        speed = metrics.pop("examples_per_second")
        self.console.print(
            f"epoch {row['epoch']:>3}  {_numbers(metrics)}  {row['seconds']:.1f} s  {speed:,.0f} examples/s"
        )

    def end(self, run: Run) -> None:
        self.bar.stop()
        if run.stop_reason is not None:
            self.console.print(f"stopped after step {run.step}: {run.stop_reason}")


def _numbers(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
