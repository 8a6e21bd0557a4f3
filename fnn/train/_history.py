"""`History`: one row of numbers for each epoch, as a CSV file and as curves."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any


class History:
    """What `fit` records: `.rows`, one an epoch: `{"epoch": 1, "step": 22, "loss": ..., "eval_loss": ..., ...}`.

    `stopped` says why a run ended early ("interrupted"), and is `None` for one that did not.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.stopped: str | None = None

    def __getitem__(self, name: str) -> list[float]:
        """One column, over the rows that have it: `history["eval_accuracy"]`."""
        column = [row[name] for row in self.rows if name in row]
        if not column:
            raise KeyError(f"history has no column {name!r}; its columns are {self.columns}")
        return column

    def __repr__(self) -> str:
        last = {name: round(value, 4) for name, value in self.rows[-1].items()} if self.rows else None
        return f"History({len(self.rows)} epochs, last: {last})"

    @property
    def columns(self) -> list[str]:
        """The names of all numbers in the rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def to_csv(self, path: str | Path) -> None:
        """Write all rows; the file that was there stays whole until the new one is complete."""
        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, path)

    def plot(self, path: str | Path) -> None:
        """Draw each metric over epochs, training and evaluation in one panel, as a PNG (needs matplotlib)."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        skip = ("epoch", "step", "seconds", "examples_per_second")
        names = list(dict.fromkeys(name.removeprefix("eval_") for name in self.columns if name not in skip))
        figure = Figure(figsize=(5 * max(1, len(names)), 4), layout="constrained")
        for index, name in enumerate(names):
            axes: Any = figure.add_subplot(1, len(names), index + 1)
            for column, label in ((name, "training"), (f"eval_{name}", "evaluation")):
                points = [(row["epoch"], row[column]) for row in self.rows if column in row]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axes.set(xlabel="epoch", ylabel=name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=120)
